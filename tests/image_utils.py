"""Test images."""

import numpy as np


def picture(height, width, channels=3, seed=0):
    """Smooth random uint8 [C,H,W], so that filters matter but rounding stays small."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, [channels, (height + 4) // 5, (width + 4) // 5])
    return np.repeat(np.repeat(coarse, 5, axis=1), 5, axis=2)[:, :height, :width].astype(np.uint8)
