"""Fréchet distance of a network's images to a data set."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from metrics.frechet import FeatureMoments, frechet_distance
from sampling.images import count_evaluations, generate_images


@dataclass
class Evaluation:
    """How close generated images come, and what they cost."""

    distance: float  # Fréchet distance in the detector's features
    num_images: int
    evaluations: int  # network evaluations per image
    seconds_per_image: float  # sampling alone


@torch.no_grad()
def dataset_moments(dataset: Any, detector: nn.Module, indices: Sequence[int] | None = None) -> FeatureMoments:
    """Feature moments of a data set of pixels, or of the images at `indices`."""
    moments = FeatureMoments(detector.feature_dim)
    indices = range(len(dataset)) if indices is None else indices
    for first in range(0, len(indices), 256):
        images = np.stack([dataset[i][0] for i in indices[first : first + 256]])
        moments.add(detector(torch.from_numpy(images)))
    return moments


@torch.no_grad()
def evaluate(
    net: nn.Module,
    encoder: Any,
    detector: nn.Module,
    reference: FeatureMoments,
    seeds: Sequence[int],
    *,
    batch: int = 64,
    progress: Any = None,  # called with the number of images of each batch
    **sampling: Any,  # further arguments of generate_images: ts, num_steps, dtype, ...
) -> Evaluation:
    """Draw an image per seed and compare their features with the reference's.

    The classes are drawn from the seeds, hence uniform.
    """
    moments = FeatureMoments(detector.feature_dim)
    sampling_seconds, started = 0.0, time.perf_counter()
    for result in generate_images(net, encoder, seeds=seeds, batch=batch, **sampling):
        images = result.images.cpu()
        sampling_seconds += time.perf_counter() - started
        moments.add(detector(images))
        if progress is not None:
            progress(len(images))
        started = time.perf_counter()
    evaluations = count_evaluations(net, ts=sampling.get("ts"), num_steps=sampling.get("num_steps"))
    distance = frechet_distance(moments.mean(), moments.cov(), reference.mean(), reference.cov())
    return Evaluation(distance, moments.count, evaluations, sampling_seconds / moments.count)
