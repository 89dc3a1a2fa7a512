"""Antialiased bicubic downsampling as a matrix, and the border rule it shares with the Gaussian kernel."""

from __future__ import annotations

import numpy as np


def mirror(index: np.ndarray, size: int) -> np.ndarray:
    """Map integer positions beyond 0..size-1 back inside by reflection with the edge repeated: … 1 0 | 0 1 …"""
    index = np.mod(index, 2 * size)
    return np.minimum(index, 2 * size - 1 - index)


def cubic(t: np.ndarray, a: float = -0.5) -> np.ndarray:
    """Keys' cubic convolution kernel at t (Keys, 1981); a = -0.5 is the third-order accurate one."""
    t = np.abs(t)
    near = (a + 2) * t**3 - (a + 3) * t**2 + 1
    far = a * (t**3 - 5 * t**2 + 8 * t - 4)
    return np.where(t <= 1, near, np.where(t < 2, far, 0.0))


def bicubic_matrix(size: int, factor: int) -> np.ndarray:
    """Return the float64 matrix [ceil(size/factor), size] that downsamples a row of pixels by an integer factor.

    Output pixel i is centred at input factor·i + (factor - 1)/2, the kernel is stretched by `factor` against aliasing,
    borders are mirrored, and the weights of each output pixel sum to 1. Factor 1 is the identity.
    """
    matrix = np.zeros([-(-size // factor), size])
    for i, row in enumerate(matrix):
        center = factor * i + (factor - 1) / 2
        taps = np.arange(np.floor(center - 2 * factor), np.ceil(center + 2 * factor) + 1).astype(np.int64)
        np.add.at(row, mirror(taps, size), cubic((taps - center) / factor))
        row /= row.sum()
    return matrix
