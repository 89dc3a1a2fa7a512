"""Features of images from a data set or straight from a network, collected over any number of processes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from generation.images import GeneratedBatch, generate_images
from metrics.collect import Collected, FeatureCollector
from metrics.features.detectors import LoadedDetector
from metrics.specs import Metric
from torch_utils import distributed


@dataclass
class GeneratedFeatures:
    """What the detectors saw of a network's images, and what drawing them took."""

    collected: dict[str, Collected]  # by detector
    num_images: int
    sampling_seconds: float  # this process's, drawing alone
    seconds_per_image: float  # of sampling, in this process


def evaluate_dataset(
    dataset: Any,  # images uint8 [C,H,W] by index, as (image, label)
    metrics: Iterable[Metric],
    detectors: dict[str, LoadedDetector],
    *,
    indices: Sequence[int] | None = None,  # None = all images
    batch: int = 64,
    device: torch.device | str = "cpu",
    max_features: int | None = None,  # single features are kept of so many images, drawn at random; None = of all
    progress: Callable[[int], Any] | None = None,  # called with the number of images of all processes' batches
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
    encoder: Any,
    metrics: Iterable[Metric],
    detectors: dict[str, LoadedDetector],
    seeds: Sequence[int],
    *,
    batch: int = 64,
    progress: Callable[[int], Any] | None = None,  # called with the number of images of all processes' batches
    on_batch: Callable[[GeneratedBatch], Any] | None = None,  # sees every batch, to save it for example
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
    return GeneratedFeatures(collector.gather(), len(seeds), seconds, seconds / max(count, 1))
