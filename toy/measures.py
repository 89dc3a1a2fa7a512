"""Distances between sets of points in the plane, a set for each of N conditions: [N,n,2]."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def energy_distance(a: Tensor, b: Tensor) -> Tensor:
    """2·E|A - B| - E|A - A'| - E|B - B'| of each pair of sets [N,n,2] and [N,m,2], over all pairs of points: [N].

    Not negative, and for n = m draws of one distribution about 2/n times its mean distance between two points
    (Székely and Rizzo, 2013).
    """
    return 2 * _mean_distance(a, b) - _mean_distance(a, a) - _mean_distance(b, b)


def _mean_distance(a: Tensor, b: Tensor) -> Tensor:
    difference = a[:, :, None] - b[:, None]
    return torch.hypot(difference[..., 0], difference[..., 1]).mean(dim=(1, 2))


def sliced_wasserstein(a: Tensor, b: Tensor, directions: int = 32) -> Tensor:
    """Mean Wasserstein-1 distance of the projections of sets [N,n,2] of equal size onto evenly spread lines: [N]."""
    angles = torch.arange(directions, dtype=a.dtype, device=a.device) * (math.pi / directions)
    lines = torch.stack([angles.cos(), angles.sin()])
    return ((a @ lines).sort(1).values - (b @ lines).sort(1).values).abs().mean(dim=(1, 2))


def spread(a: Tensor) -> Tensor:
    """Root-mean-square distance of each set's points [N,n,2] from their mean: [N]."""
    return (a - a.mean(1, keepdim=True)).square().sum(2).mean(1).sqrt()
