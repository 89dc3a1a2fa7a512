"""A detector and a data set small enough to know their features."""

import numpy as np
import torch

from metrics.collect import evaluate_dataset
from metrics.features.detectors import LoadedDetector
from metrics.references import load_reference, save_reference


class Linear(torch.nn.Module):
    """Features that move with the pixels."""

    def __init__(self, pixels, dim):
        super().__init__()
        weights = torch.randn(pixels, dim, generator=torch.Generator().manual_seed(0)) / pixels
        self.register_buffer("weights", weights)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.flatten(1).float() @ self.weights


def linear_detector(dim=4):
    return {"lin": LoadedDetector(Linear(64, dim).eval(), "lin", dim, "ab" * 32)}


def pixels(n, seed=0):
    """A data set of grey 8x8 images that leave room for a shift."""
    rng = np.random.default_rng(seed)
    return [(image, None) for image in rng.integers(0, 200, (n, 1, 8, 8), dtype=np.uint8)]


def reference_of(path, data, metrics, detectors):
    save_reference(path, evaluate_dataset(data, metrics, detectors))
    return load_reference(path)
