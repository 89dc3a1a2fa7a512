"""From collected features and reference statistics to the numbers of a report."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from metrics.collect import Collected
from metrics.features.detectors import LoadedDetector
from metrics.frechet import frechet_distance
from metrics.references import Reference, ReferenceFileError, Statistics
from metrics.sample_metrics import inception_score, kernel_distance, precision_recall
from metrics.specs import Metric


@dataclass(frozen=True)
class MetricValue:
    """One metric's outcome."""

    name: str
    value: float  # precision for precision and recall
    detector: str
    detector_sha256: str
    details: dict[str, Any] = field(default_factory=dict)  # recall, standard deviations, settings

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON data."""
        return asdict(self)


def check_reference(metrics: Iterable[Metric], reference: Reference) -> None:
    """Raise ReferenceFileError where the reference lacks what a metric needs, before any image is drawn."""
    for metric in metrics:
        if metric.kind == "is":
            continue  # looks at the generated images alone
        statistics = reference.statistics.get(metric.detector)
        if statistics is None:
            held = ", ".join(reference.statistics)
            raise ReferenceFileError(
                f"{reference.source} holds statistics for {held}, not for {metric.detector} ({metric.name}): choose "
                f"other --metrics, or make one with: calculate_metrics.py ref --metrics {metric.name}"
            )
        if metric.needs_features and (statistics.features is None or len(statistics.features) < 4):
            raise ReferenceFileError(
                f"{reference.source} holds no single features of {metric.detector}, which {metric.name} needs: make "
                f"it anew with: calculate_metrics.py ref --metrics {metric.name}"
            )


def check_dimensions(metrics: Iterable[Metric], detectors: Mapping[str, LoadedDetector], reference: Reference) -> None:
    """Raise ReferenceFileError where a detector gives features of another size than the reference has, as far as
    detectors know theirs before the first image, and where the reference holds no covariance.
    """
    for metric in metrics:
        if metric.kind != "is" and detectors[metric.detector].feature_dim:
            _check_dimension(metric, reference.statistics[metric.detector], detectors[metric.detector].feature_dim)


def _check_dimension(metric: Metric, statistics: Statistics, dim: int) -> None:
    """Dimensions first: eigenvalues take their cube."""
    if dim != len(statistics.mu):
        raise ReferenceFileError(
            f"{metric.name}: the reference has {len(statistics.mu)} feature dimensions and the detector {dim}"
        )
    if metric.kind == "fd" and not statistics.has_covariance:
        raise ReferenceFileError(
            f"{metric.name}: sigma of the reference has negative eigenvalues, which no covariance has"
        )


def compute_metrics(
    metrics: Iterable[Metric], collected: dict[str, Collected], reference: Reference | None
) -> tuple[list[MetricValue], list[str]]:
    """Return the values and warnings about numbers that mean less than they seem.

    Raises ValueError for fewer than 2 images, statistics of another size and too few images for a metric.
    """
    metrics = list(metrics)
    warnings: dict[str, None] = {}
    values = []
    for metric in metrics:
        part = collected[metric.detector]
        statistics = None if reference is None else reference.statistics.get(metric.detector)
        if metric.kind != "is" and statistics is not None:
            for warning in _warnings(metric, part, reference):
                warnings[warning] = None
        value, details = _value(metric, part, statistics)
        values.append(MetricValue(metric.name, value, metric.detector, part.detector.sha256, details))
    return values, list(warnings)


def _value(metric: Metric, part: Collected, statistics: Statistics | None) -> tuple[float, dict[str, Any]]:
    if metric.kind == "is":
        # In blocks of random images: data sets are often sorted by class, and a block of one class scores 1.
        order = torch.randperm(len(part.logits), generator=torch.Generator().manual_seed(0))
        score = inception_score(part.logits[order])
        return score.mean, {"std": score.std, "splits": 10}
    if statistics is None:
        raise ReferenceFileError(f"{metric.name} needs reference statistics: give --ref")
    _check_dimension(metric, statistics, len(part.moments.mean()))
    if metric.kind == "fd":
        mu, sigma = torch.from_numpy(statistics.mu), torch.from_numpy(statistics.sigma)
        return frechet_distance(part.moments.mean(), part.moments.cov(), mu, sigma), {}
    real = torch.from_numpy(statistics.features)
    if metric.kind == "kid":
        distance = kernel_distance(part.features, real)
        size = min(1000, len(real), len(part.features))
        return distance.mean, {"std": distance.std, "subsets": 100, "subset_size": size}
    result = precision_recall(real, part.features)
    return result.precision, {"recall": result.recall, "k": 3, "reference_features": len(real)}


def _warnings(metric: Metric, part: Collected, reference: Reference) -> list[str]:
    statistics, count, dim = reference.statistics[metric.detector], part.moments.count, len(part.moments.mean())
    found = []
    if metric.kind == "fd" and count <= dim:
        found.append(
            f"{metric.name}: {count} images for {dim} feature dimensions: their covariance is singular, and the "
            "distance comes out much too large to compare with published values"
        )
    if metric.kind == "fd" and reference.num_images is not None and reference.num_images <= dim:
        found.append(
            f"{metric.name}: the reference has {reference.num_images} images for {dim} feature dimensions: its "
            "covariance is singular"
        )
    if statistics.sha256 is not None and statistics.sha256 != part.detector.sha256:
        found.append(
            f"{metric.name}: the reference was made with other weights of {metric.detector} "
            f"({statistics.sha256[:8]}, here {part.detector.sha256[:8]}): the values compare with nothing"
        )
    return found
