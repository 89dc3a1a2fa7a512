"""From collected features and reference statistics to the numbers of a report."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

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
            held = ", ".join(reference.statistics)
            raise ReferenceFileError(
                f"{reference.source} holds statistics for {held}, not for {metric.detector} ({metric.name}): choose "
                f"other --metrics, or make one with: calculate_metrics.py ref --metrics {metric.name}"
            )
        if metric.needs == "features" and (statistics.features is None or len(statistics.features) < 4):
            raise ReferenceFileError(
                f"{reference.source} holds no single features of {metric.detector}, which {metric.name} needs: make "
                f"it anew with: calculate_metrics.py ref --metrics {metric.name}"
            )


def check_dimensions(metrics: Iterable[Metric], detectors: Mapping[str, LoadedDetector], reference: Reference) -> None:
    """Raise ReferenceFileError where a detector gives features of another size than the reference has, as far as
    detectors know theirs before the first image, and where the reference holds no covariance.
    """
    for metric in metrics:
        if metric.needs != "logits" and detectors[metric.detector].feature_dim:
            _check_dimension(metric, reference.statistics[metric.detector], detectors[metric.detector].feature_dim)


def _check_dimension(metric: Metric, statistics: Statistics, dim: int) -> None:
    """Dimensions first: eigenvalues take their cube."""
    if dim != len(statistics.mu):
        raise ReferenceFileError(
            f"{metric.name}: the reference has {len(statistics.mu)} feature dimensions and the detector {dim}"
        )
    if metric.needs == "moments" and not statistics.has_covariance:
        raise ReferenceFileError(
            f"{metric.name}: sigma of the reference has negative eigenvalues, which no covariance has"
        )


def compute_metrics(
    metrics: Iterable[Metric], collected: dict[str, Collected], reference: Reference | None
) -> tuple[list[MetricValue], list[str]]:
    """Return the values and warnings about numbers that mean less than they seem.

    Raises ValueError for fewer than 2 images, statistics of another size and too few images for a metric.
    """
    warnings: dict[str, None] = {}
    values = []
    for metric in metrics:
        part = collected[metric.detector]
        if metric.needs != "logits" and reference is not None and metric.detector in reference.statistics:
            warnings |= dict.fromkeys(_warnings(metric, part, reference))
        value, details = KINDS[metric.kind].compute(*_arrays(metric, part, reference))
        values.append(MetricValue(metric.name, value, metric.detector, part.detector.sha256, details))
    return values, list(warnings)


def _arrays(metric: Metric, part: Collected, reference: Reference | None) -> tuple[Tensor, ...]:
    """What the metric is a function of, see `Kind`."""
    if metric.needs == "logits":
        return (part.logits,)
    statistics = None if reference is None else reference.statistics.get(metric.detector)
    if statistics is None:
        raise ReferenceFileError(f"{metric.name} needs reference statistics: give --ref")
    _check_dimension(metric, statistics, len(part.moments.mean()))
    if metric.needs == "features":
        return part.features, torch.from_numpy(statistics.features)
    return part.moments.mean(), part.moments.cov(), *map(torch.from_numpy, (statistics.mu, statistics.sigma))


def _warnings(metric: Metric, part: Collected, reference: Reference) -> list[str]:
    statistics, count, dim = reference.statistics[metric.detector], part.moments.count, len(part.moments.mean())
    found = []
    if metric.needs == "moments" and count <= dim:
        found.append(
            f"{metric.name}: {count} images for {dim} feature dimensions: their covariance is singular, and the "
            "distance comes out much too large to compare with published values"
        )
    if metric.needs == "moments" and reference.num_images is not None and reference.num_images <= dim:
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
