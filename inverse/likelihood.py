"""Draws from the likelihood step p(u | x, y) by unadjusted Langevin dynamics, for operators without an exact step. The
target is proportional to exp(-|A(u) - y|²/beta - |u - x|²/(2·rho²)): a Gaussian prior of mean x and standard deviation
rho, and Gaussian measurement noise of standard deviation sqrt(beta/2).
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from inverse.operators.base import Operator, check_positive
from sampling.posterior import RandnLike
from sampling.seeds import SeededNoise

RETRY_SHRINK = 0.25  # each retry of a diverged chain takes this fraction of the previous step size
ENERGY_PER_DIMENSION = 10.0  # excess energy of a diverged chain; at equilibrium it is 1/2, plus discretisation error


class LangevinDivergenceError(ValueError):
    """Langevin chains diverged although the step size was reduced repeatedly."""


class LangevinResult(NamedTuple):
    """Draws of one Langevin likelihood step, and which chains had to be repeated with a smaller step size."""

    sample: Tensor  # [N,C,H,W]
    retries: Tensor  # [N] int64 on the CPU: 0 = converged at the step size asked for


def likelihood_std(beta: float) -> float:
    """Return the noise's standard deviation, beta = 2·std²; raises ValueError unless beta is a positive number."""
    return math.sqrt(check_positive(beta, "beta") / 2)


def langevin_step(
    operator: Operator,
    x: Tensor,  # prior mean and start of the chains [N,C,H,W]
    y: Tensor,  # measurements [N,...]
    beta: float,  # 2·(measurement noise std)²
    rho_sigma: float,  # standard deviation of the prior
    *,
    steps: int = 100,
    c1: float = 0.1,  # step size of the prior's scale
    c2: float = 0.1,  # smaller = longer steps where the likelihood dominates
    max_retries: int = 4,  # attempts with smaller and smaller steps for chains that diverged
    randn_like: RandnLike = torch.randn_like,
) -> LangevinResult:
    """Draw u approximately from p(u | x, y) by unadjusted Langevin dynamics started at x.

    Iterates u ← u - lr·∇[|A(u) - y|²/beta + |u - x|²/(2·rho_sigma²)] + sqrt(2·lr)·n with the step size
    lr = c1/(c2/beta + 1/rho_sigma²) (NCVSD, arXiv 2506.09416). Noise: one number per image, then one image per step.
    A chain has diverged if its end is not finite or its energy (the bracket) exceeds that of the start by more than 10
    per pixel. It runs again from x at a quarter of the step size, from a stream that the number of its image seeds, so
    that images do not depend on one another. Raises LangevinDivergenceError if that does not help `max_retries` times,
    ValueError for settings that are not positive and for x or y that are not finite or do not fit.
    """
    if steps < 1 or max_retries < 0:
        raise ValueError(f"Langevin needs steps >= 1 and max_retries >= 0, not {steps} and {max_retries}")
    beta, rho_sigma = check_positive(beta, "beta"), check_positive(rho_sigma, "rho_sigma")
    operator.check_pair(x, y)
    lr = check_positive(c1, "c1") / (check_positive(c2, "c2") / beta + rho_sigma**-2)

    def energy(u: Tensor) -> Tensor:
        misfit = (operator.forward(u) - y).flatten(1).square().sum(1) / beta
        return misfit + (u - x).flatten(1).square().sum(1) / (2 * rho_sigma**2)

    def chain(x: Tensor, y: Tensor, randn_like: RandnLike) -> Tensor:
        u = x
        for _ in range(steps):
            gradient = operator.misfit_gradient(u, y) / beta + (u - x) / rho_sigma**2
            u = u - lr * gradient + math.sqrt(2 * lr) * randn_like(u)
        return u

    limit = energy(x) + ENERGY_PER_DIMENSION * x[0].numel()
    if not limit.isfinite().all():
        given = {"x": x, "A(x)": operator.forward(x), "y": y}.items()
        reached = ", ".join(f"{name} {values.abs().max().item():.3g}" for name, values in given)
        raise ValueError(
            f"Langevin cannot start: |A(x) - y|²/beta is not finite in {x.dtype}, with values up to: {reached}, beta "
            f"{beta:g}; check the measurements' scale, beta and the operator"
        )
    seeds = randn_like(x[:, :1, :1, :1]).float().cpu().flatten().view(torch.int32).tolist()
    u, retries = chain(x, y, randn_like), torch.zeros(len(x), dtype=torch.int64)
    while len(again := (~(energy(u) <= limit)).nonzero().flatten()):
        attempt = int(retries.max())
        if attempt == max_retries:
            found = f"{len(again)} of {len(x)} images at noise level {rho_sigma:.4g}, even with the step size {lr:.3g}"
            advice = f"make c1 smaller than {c1:g} or c2 larger than {c2:g}"
            raise LangevinDivergenceError(f"Langevin diverged for {found}: {advice}")
        lr *= RETRY_SHRINK
        noise = SeededNoise([(seeds[i] & 0xFFFFFFFF) + (attempt << 32) for i in again.tolist()], x.device)
        u[again] = chain(x[again], y[again], noise.randn_like)
        retries[again.cpu()] += 1
    return LangevinResult(u, retries)
