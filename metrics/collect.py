"""Features of images from a data set or straight from a network, collected over any number of processes."""

import time
from collections.abc import Callable, Collection, Sequence
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
    """Runs images through detectors; keeps moments, and single features only where a metric needs them. Without such
    metrics memory does not grow with the number of images. Of the images with indices in `keep` (None = of all) single
    features are kept. Raises DetectorError where a metric needs logits and its detector has none.
    """

    def __init__(
        self, metrics: Sequence[Metric], detectors: dict[str, LoadedDetector], keep: Collection[int] | None = None
    ) -> None:
        self._keep = keep
        needs = {(metric.detector, metric.needs) for metric in metrics}
        self._detectors = {name: detectors[name] for name in dict.fromkeys(metric.detector for metric in metrics)}
        self._features, self._logits = (
            {name: [] for name in self._detectors if (name, kind) in needs} for kind in ("features", "logits")
        )
        for name in self._logits:
            if not hasattr(self._detectors[name].module, "logits"):
                raise DetectorError(f"the inception score needs class logits, and detector {name} has none")
        self._moments: dict[str, FeatureMoments] = {}
        self._indices, self._kept = [], []  # of all images, and of those whose single features are kept

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
        result = {}
        for name, detector in self._detectors.items():
            moments = self._moments.get(name) or FeatureMoments(found[name])
            moments.merge_processes()
            features = _gather_rows(self._features[name], self._kept) if name in self._features else None
            logits = _gather_rows(self._logits[name], self._indices) if name in self._logits else None
            result[name] = Collected(detector, moments, features, logits)
        return result


def _gather_objects(item: object) -> list:
    parts = [item] * distributed.world_size()
    if len(parts) > 1:
        torch.distributed.all_gather_object(parts, item)
    return parts


def _gather_rows(batches: list[Tensor], indices: list[int]) -> Tensor:
    """Rows of all processes, sorted by the indices of their images."""
    order = torch.tensor([i for part in _gather_objects(indices) for i in part], dtype=torch.long).argsort(stable=True)
    parts = _gather_objects(torch.cat(batches) if batches else torch.zeros(0, 0))
    return torch.cat([part for part in parts if len(part)])[order]


@dataclass
class GeneratedFeatures:
    """What the detectors saw of a network's images, and what drawing them took."""

    collected: dict[str, Collected]  # by detector
    seconds_per_image: float  # of drawing alone, in this process


def evaluate_dataset(
    dataset: Sequence[tuple[np.ndarray, object]],  # images uint8 [C,H,W], each with a label, which is not looked at
    metrics: Sequence[Metric],
    detectors: dict[str, LoadedDetector],
    *,
    indices: Sequence[int] | None = None,  # None = all images
    batch: int = 64,
    device: torch.device | str = "cpu",
    max_features: int | None = None,  # single features are kept of so many images, drawn at random; None = of all
    progress: Callable[[int], object] = lambda count: None,  # is given the number of images of all processes' batches
) -> dict[str, Collected]:
    """Collect features of a data set, each process its share. Collective. Raises ValueError for fewer than 2 images and
    for latents.
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
        progress(len(part))
    return collector.gather()


def evaluate_network(
    net: nn.Module,
    encoder: Encoder,
    metrics: Sequence[Metric],
    detectors: dict[str, LoadedDetector],
    seeds: Sequence[int],
    *,
    batch: int = 64,
    progress: Callable[[int], object] = lambda count: None,  # is given the number of images of all processes' batches
    on_batch: Callable[[GeneratedBatch], object] | None = None,  # sees every batch, to save it for example
    **sampling: Any,  # further arguments of generate_images: ts, zeta, num_steps, device, dtype, ...
) -> GeneratedFeatures:
    """Draw an image per seed, each process its share, and collect their features. Classes are drawn from the seeds,
    hence uniform. Collective. Raises ValueError for fewer than 2 images.
    """
    if len(seeds) < 2:
        raise ValueError(f"at least 2 images are needed, got {len(seeds)}")
    collector = FeatureCollector(metrics, detectors)
    position, world = {seed: i for i, seed in enumerate(seeds)}, distributed.world_size()
    count, seconds, started = 0, 0.0, time.perf_counter()
    for result in generate_images(net, encoder, seeds=seeds, batch=batch, **sampling):
        if result.images.is_cuda:
            torch.cuda.synchronize(result.images.device)
        seconds += time.perf_counter() - started
        collector.add(result.images, [position[seed] for seed in result.seeds])
        if on_batch is not None:
            on_batch(result)
        progress(max(0, min(len(result.images) * world, len(seeds) - count * world)))
        count += len(result.images)
        started = time.perf_counter()
    return GeneratedFeatures(collector.gather(), seconds / max(count, 1))
