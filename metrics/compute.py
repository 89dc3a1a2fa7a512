"""From collected features and reference statistics to the numbers of a report."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from metrics.collect import Collected
from metrics.features.detectors import LoadedDetector
from metrics.kinds import KINDS, Metric
from metrics.references import Reference, ReferenceFileError, Statistics


@dataclass(frozen=True)
class MetricValue:
    """One metric's outcome."""

    name: str
    value: float  # precision for precision and recall
    detector: str
    detector_sha256: str
    details: dict[str, Any] = field(default_factory=dict)  # recall, standard deviations, settings


def check_reference(metrics: Iterable[Metric], reference: Reference) -> None:
    """Raise ReferenceFileError where the reference lacks what a metric needs, before any image is drawn."""
    for metric in metrics:
        if metric.needs == "logits":
            continue  # of the generated images alone
        statistics = reference.statistics.get(metric.detector)
        if statistics is None:
            held = f"{', '.join(reference.statistics)}, not for {metric.detector} ({metric.name})"
            advice = f"choose other --metrics, or make one with: calculate_metrics.py ref --metrics {metric.name}"
            raise ReferenceFileError(f"{reference.source} holds statistics for {held}: {advice}")
        if metric.needs == "features" and (statistics.features is None or len(statistics.features) < 4):
            lacks = f"holds no single features of {metric.detector}, which {metric.name} needs"
            advice = f"make it anew with: calculate_metrics.py ref --metrics {metric.name}"
            raise ReferenceFileError(f"{reference.source} {lacks}: {advice}")


def check_dimensions(metrics: Iterable[Metric], detectors: Mapping[str, LoadedDetector], reference: Reference) -> None:
    """Raise ReferenceFileError where a detector gives features of another size than the reference has, as far as
    detectors know theirs before the first image, and where the reference holds no covariance.
    """
    for metric in metrics:
        if metric.needs != "logits" and detectors[metric.detector].feature_dim:
            _check_dimension(metric, reference.statistics[metric.detector], detectors[metric.detector].feature_dim)


def _check_dimension(metric: Metric, statistics: Statistics, dim: int) -> None:
    """Dimensions first: eigenvalues take their cube."""
    known, reason = len(statistics.mu), "sigma of the reference has negative eigenvalues, which no covariance has"
    if dim != known:
        raise ReferenceFileError(f"{metric.name}: the reference has {known} feature dimensions and the detector {dim}")
    if metric.needs == "moments" and not statistics.has_covariance:
        raise ReferenceFileError(f"{metric.name}: {reason}")


def compute_metrics(
    metrics: Iterable[Metric], collected: dict[str, Collected], reference: Reference | None
) -> tuple[list[MetricValue], list[str]]:
    """Return the values and warnings about numbers that mean less than they seem. Raises ValueError for fewer than 2
    images, statistics of another size and too few images for a metric.
    """
    values, warnings = [], []
    for metric in metrics:
        part = collected[metric.detector]
        statistics = None if reference is None else reference.statistics.get(metric.detector)
        if metric.needs == "logits":
            given = (part.logits,)
        elif statistics is None:
            raise ReferenceFileError(f"{metric.name} needs reference statistics: give --ref")
        else:
            warnings += _warnings(metric, part, statistics, reference.num_images)
            _check_dimension(metric, statistics, len(part.moments.mean()))
            if metric.needs == "features":
                given = part.features, torch.from_numpy(statistics.features)
            else:
                known = map(torch.from_numpy, (statistics.mu, statistics.sigma))
                given = part.moments.mean(), part.moments.cov(), *known
        value, details = KINDS[metric.kind].compute(*given)
        values.append(MetricValue(metric.name, value, metric.detector, part.detector.sha256, details))
    return values, list(dict.fromkeys(warnings))


def _warnings(metric: Metric, part: Collected, statistics: Statistics, reference_images: int | None) -> list[str]:
    count, dim, own = part.moments.count, len(part.moments.mean()), part.detector.sha256
    found, singular = [], "covariance is singular"
    if metric.needs == "moments" and count <= dim:
        large = "and the distance comes out much too large to compare with published values"
        found.append(f"{count} images for {dim} feature dimensions: their {singular}, {large}")
    if metric.needs == "moments" and reference_images is not None and reference_images <= dim:
        found.append(f"the reference has {reference_images} images for {dim} feature dimensions: its {singular}")
    if statistics.sha256 is not None and statistics.sha256 != own:
        weights = f"other weights of {metric.detector} ({statistics.sha256[:8]}, here {own[:8]})"
        found.append(f"the reference was made with {weights}: the values compare with nothing")
    return [f"{metric.name}: {warning}" for warning in found]
