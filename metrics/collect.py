"""Gathers what the metrics need from a stream of images, over any number of processes."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from metrics.features.detectors import DetectorError, LoadedDetector
from metrics.frechet import FeatureMoments
from metrics.specs import Metric
from torch_utils import distributed


@dataclass
class Collected:
    """What one detector saw, in all processes together."""

    detector: LoadedDetector
    moments: FeatureMoments
    features: Tensor | None  # float32 [M,D] on the CPU, in the order of the images' indices; None = not kept
    logits: Tensor | None  # float32 [N,classes], likewise


class FeatureCollector:
    """Runs images through detectors; keeps moments, and single features only where a metric needs them.

    Without such metrics memory does not grow with the number of images.
    """

    def __init__(
        self,
        metrics: Iterable[Metric],
        detectors: dict[str, LoadedDetector],
        keep: Collection[int] | None = None,  # indices of the images whose single features are kept; None = all
    ) -> None:
        """Raises DetectorError where a metric needs logits and its detector has none."""
        self._keep = keep
        metrics = list(metrics)
        self._detectors = {m.detector: detectors[m.detector] for m in metrics}
        self._keep_features = {m.detector for m in metrics if m.needs_features}
        self._keep_logits = {m.detector for m in metrics if m.kind == "is"}
        for name in self._keep_logits:
            if not hasattr(self._detectors[name].module, "logits"):
                raise DetectorError(f"the inception score needs class logits, and detector {name} has none")
        self._moments: dict[str, FeatureMoments] = {}
        self._features: dict[str, list[Tensor]] = {name: [] for name in self._keep_features}
        self._logits: dict[str, list[Tensor]] = {name: [] for name in self._keep_logits}
        self._indices: list[int] = []
        self._kept: list[int] = []  # those whose single features are kept

    @torch.no_grad()
    def add(self, images: Tensor, indices: Sequence[int]) -> None:
        """Take in images uint8 [N,C,H,W]; `indices` say where they belong among all processes' images."""
        if not len(images):
            return
        rows = [row for row, i in enumerate(indices) if self._keep is None or i in self._keep]
        for name, detector in self._detectors.items():
            features = detector.module(images)
            if name not in self._moments:
                self._moments[name] = FeatureMoments(features.shape[1], features.device)
            self._moments[name].add(features)
            if name in self._keep_features:
                self._features[name].append(features[rows].float().cpu())
            if name in self._keep_logits:
                self._logits[name].append(detector.module.logits(features).float().cpu())
        self._indices += indices
        self._kept += [indices[row] for row in rows]

    def gather(self) -> dict[str, Collected]:
        """What all processes saw, by detector, the same in each. Collective. Raises ValueError for no images."""
        dims = _gather_objects({name: len(m.mean()) for name, m in self._moments.items()})
        found = {name: dim for part in dims for name, dim in part.items()}
        if not found:
            raise ValueError("no images were given")
        order, kept_order = (_gather_order(indices) for indices in (self._indices, self._kept))
        result = {}
        for name, detector in self._detectors.items():
            moments = self._moments.get(name) or FeatureMoments(found[name])
            moments.merge_processes()
            features = _gather_rows(self._features[name], kept_order) if name in self._keep_features else None
            logits = _gather_rows(self._logits[name], order) if name in self._keep_logits else None
            result[name] = Collected(detector, moments, features, logits)
        return result


def _gather_objects(item: object) -> list:
    if distributed.world_size() == 1:
        return [item]
    parts = [None] * distributed.world_size()
    torch.distributed.all_gather_object(parts, item)
    return parts


def _gather_order(indices: list[int]) -> Tensor:
    """Places of all processes' images in the order of their indices."""
    return torch.tensor([i for part in _gather_objects(indices) for i in part], dtype=torch.long).argsort(stable=True)


def _gather_rows(batches: list[Tensor], order: Tensor) -> Tensor:
    """Rows of all processes, sorted."""
    own = torch.cat(batches) if batches else torch.zeros(0, 0)
    parts = [part for part in _gather_objects(own) if len(part)]
    return torch.cat(parts)[order]
