"""Plug-and-play sampling of a point of which one coordinate was observed, against the closed-form posterior."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from inverse.operators.base import LinearOperator, check_image_shape, gaussian_conditional
from inverse.pnp import pnp_sample
from sampling.grids import karras_sigmas
from toy.measures import energy_distance, spread
from toy.mixture import ExactDenoiser, GaussianMixture
from toy.training import BatchNoise

NOISE_STD = 0.1  # of the observed coordinate
LEVELS, RHO = 50, 2.0  # of the annealing, as in the image tasks


class FirstCoordinate(LinearOperator):
    """y = the first channel: of a point [N,2,1,1] its first coordinate [N,1,1,1]."""

    def measurement_shape(self, shape):
        n, _, height, width = check_image_shape(shape)
        return n, 1, height, width

    def forward(self, x: Tensor) -> Tensor:
        return x[:, :1]

    def adjoint(self, y: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        return torch.cat([y, torch.zeros_like(y)], 1)

    def sample_conditional(self, x, y, likelihood_std, rho, randn_like=torch.randn_like):
        self.check_pair(x, y)
        mask = torch.tensor([1.0, 0.0], dtype=x.dtype, device=x.device).reshape(1, 2, 1, 1)
        gain, std = gaussian_conditional(mask, likelihood_std, rho)
        return x + gain * (y - x[:, :1]) + std * randn_like(x)


def pnp_draws(
    denoiser: Callable[..., Tensor],
    values: Tensor,  # noisy first coordinates [N]
    samples: int,  # draws per value
    noise: BatchNoise,
    ts: tuple[int, ...] | None = None,  # few-step schedule of the prior step
) -> Tensor:
    """Draw [N,samples,2] from p(x0 | value)."""
    y = values.to(torch.float32).repeat_interleave(samples).reshape(-1, 1, 1, 1)
    result = pnp_sample(
        denoiser,
        FirstCoordinate(),
        y,
        karras_sigmas(LEVELS, rho=RHO),
        beta=2 * NOISE_STD**2,
        ts=ts,
        shape=(len(y), 2, 1, 1),
        randn_like=noise.randn_like,
    )
    return result.images.reshape(len(values), samples, 2)


def measure_pnp(
    mixture: GaussianMixture, generator: Callable[..., Tensor], *, values: int = 16, samples: int = 256, seed: int = 0
) -> list[dict[str, Any]]:
    """Distance of PnP's draws to the true posterior with the trained denoiser, few-step and exact, and the floor."""
    noise = BatchNoise(seed, values)
    observed = mixture.sample(values, noise.randn_like, torch.float64)[:, 0, 0, 0]
    observed = observed + NOISE_STD * noise.randn_like(observed)
    posterior = mixture.posterior_of_coordinate(observed, NOISE_STD)
    true, second = (posterior.sample(samples, noise.randn_like) for _ in range(2))
    exact = ExactDenoiser(mixture)
    draws = {
        "true posterior": second,
        "exact denoiser": pnp_draws(exact, observed, samples, noise),
        "1 step": pnp_draws(generator, observed, samples, noise),
        "4 steps": pnp_draws(generator, observed, samples, noise, ts=(0, 10, 20, 30, 39)),
    }
    floor = float(energy_distance(second, true).mean())
    rows = []
    for name, points in draws.items():
        energy = float(energy_distance(points.to(true.dtype), true).mean())
        ratio = float((spread(points.to(true.dtype)) / spread(true)).mean())
        rows.append({"denoiser": name, "energy": energy, "energy_ratio": energy / floor, "spread_ratio": ratio})
    return rows
