"""Features of images from a data set or straight from a network, collected over any number of processes."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from generation.images import GeneratedBatch, generate_images
from metrics.distances import FeatureMoments
from metrics.features.detectors import LoadedDetector
from metrics.features.weights import DetectorError
from metrics.kinds import Metric
from networks.encoders import Encoder
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
        needs: dict[str, set[str]] = {}
        for metric in metrics:
            needs.setdefault(metric.detector, set()).add(metric.needs)
        self._detectors = {name: detectors[name] for name in needs}
        self._features: dict[str, list[Tensor]] = {name: [] for name in needs if "features" in needs[name]}
        self._logits: dict[str, list[Tensor]] = {name: [] for name in needs if "logits" in needs[name]}
        for name in self._logits:
            if not hasattr(self._detectors[name].module, "logits"):
                raise DetectorError(f"the inception score needs class logits, and detector {name} has none")
        self._moments: dict[str, FeatureMoments] = {}
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
            if name in self._features:
                self._features[name].append(features[rows].float().cpu())
            if name in self._logits:
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
            features = _gather_rows(self._features[name], kept_order) if name in self._features else None
            logits = _gather_rows(self._logits[name], order) if name in self._logits else None
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


@dataclass
class GeneratedFeatures:
    """What the detectors saw of a network's images, and what drawing them took."""

    collected: dict[str, Collected]  # by detector
    seconds_per_image: float  # of drawing alone, in this process


def evaluate_dataset(
    dataset: Sequence[tuple[np.ndarray, object]],  # images uint8 [C,H,W], each with a label, which is not looked at
    metrics: Iterable[Metric],
    detectors: dict[str, LoadedDetector],
    *,
    indices: Sequence[int] | None = None,  # None = all images
    batch: int = 64,
    device: torch.device | str = "cpu",
    max_features: int | None = None,  # single features are kept of so many images, drawn at random; None = of all
    progress: Callable[[int], object] | None = None,  # called with the number of images of all processes' batches
) -> dict[str, Collected]:
    """Collect features of a data set, each process taking its share. Collective.

    Raises ValueError for fewer than 2 images and for data sets of latents.
    """
    indices = range(len(dataset)) if indices is None else indices
    if len(indices) < 2:
        raise ValueError(f"at least 2 images are needed, got {len(indices)}")
    keep = None
    if max_features is not None and max_features < len(indices):
        keep = set(np.random.default_rng(0).choice(len(indices), max_features, replace=False).tolist())
    collector = FeatureCollector(metrics, detectors, keep)
    rank, world = distributed.rank(), distributed.world_size()
    for first in range(0, len(indices), batch * world):
        part = range(first, min(first + batch * world, len(indices)))
        own = part[rank * batch : (rank + 1) * batch]
        images = [dataset[indices[i]][0] for i in own]
        if any(image.dtype != np.uint8 for image in images):
            raise ValueError("metrics are taken of pixels, and this data set holds latents: decode it first")
        if images:
            collector.add(torch.from_numpy(np.stack(images)).to(device), own)
        if progress is not None:
            progress(len(part))
    return collector.gather()


def evaluate_network(
    net: nn.Module,
    encoder: Encoder,
    metrics: Iterable[Metric],
    detectors: dict[str, LoadedDetector],
    seeds: Sequence[int],
    *,
    batch: int = 64,
    progress: Callable[[int], object] | None = None,  # called with the number of images of all processes' batches
    on_batch: Callable[[GeneratedBatch], object] | None = None,  # sees every batch, to save it for example
    **sampling: Any,  # further arguments of generate_images: ts, zeta, num_steps, device, dtype, ...
) -> GeneratedFeatures:
    """Draw an image per seed, each process its share, and collect their features; nothing is written. Collective.

    Classes are drawn from the seeds, hence uniform. Raises ValueError for fewer than 2 images.
    """
    if len(seeds) < 2:
        raise ValueError(f"at least 2 images are needed, got {len(seeds)}")
    collector = FeatureCollector(metrics, detectors)
    position = {seed: i for i, seed in enumerate(seeds)}
    count, reported, seconds, started = 0, 0, 0.0, time.perf_counter()
    for result in generate_images(net, encoder, seeds=seeds, batch=batch, **sampling):
        if result.images.is_cuda:
            torch.cuda.synchronize(result.images.device)
        seconds += time.perf_counter() - started
        count += len(result.images)
        collector.add(result.images, [position[seed] for seed in result.seeds])
        if on_batch is not None:
            on_batch(result)
        if progress is not None:
            drawn = len(result.images) * distributed.world_size()
            progress(min(drawn, len(seeds) - reported))
            reported += min(drawn, len(seeds) - reported)
        started = time.perf_counter()
    return GeneratedFeatures(collector.gather(), seconds / max(count, 1))
