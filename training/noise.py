"""Distributions of noise levels, and the random stream of each training image."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sampling.grids import karras_sigmas
from sampling.seeds import SeededNoise


@dataclass(frozen=True)
class LogNormalSigma:
    """ln sigma ~ N(p_mean, p_std²) (EDM, Table 1)."""

    p_mean: float
    p_std: float

    def sample(self, noise: SeededNoise, count: int) -> Tensor:
        """Noise levels [count,1,1,1]."""
        return (noise.randn([count, 1, 1, 1]) * self.p_std + self.p_mean).exp()

    def quartiles(self) -> tuple[float, float, float]:
        """Levels below which a quarter, half and three quarters of the draws lie."""
        return tuple(math.exp(self.p_mean + self.p_std * z) for z in (-0.67449, 0.0, 0.67449))


@dataclass(frozen=True)
class UniformKarrasSigma:
    """Uniform over the points of a Karras grid (NCVSD, Section 5)."""

    num_steps: int = 1000
    sigma_min: float = 0.002
    sigma_max: float = 80.0
    rho: float = 7.0

    def sample(self, noise: SeededNoise, count: int) -> Tensor:
        """Noise levels [count,1,1,1]."""
        grid = karras_sigmas(self.num_steps, self.sigma_min, self.sigma_max, self.rho, device=noise.device)
        return grid[noise.randint(self.num_steps)].reshape(count, 1, 1, 1)

    def quartiles(self) -> tuple[float, float, float]:
        """Levels below which a quarter, half and three quarters of the draws lie."""
        return tuple(karras_sigmas(5, self.sigma_min, self.sigma_max, self.rho)[[3, 2, 1]].tolist())


def training_noise(seed: int, positions: Sequence[int], device: torch.device | str = "cpu") -> SeededNoise:
    """The random stream of each image at the given positions of the run's image sequence.

    A function of the run's seed and of the position alone: the same on resume and for any split over processes and
    accumulation rounds.
    """
    return SeededNoise([((seed + 1) << 32) + position for position in positions], device)
