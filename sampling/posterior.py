"""Observations at two noise levels, and few-step sampling of p(x0 | y) with any callable `denoiser(y, sigma)`."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

RandnLike = Callable[[Tensor], Tensor]  # standard normal noise in a tensor's shape, dtype and device


def expand_sigma(sigma: float | Tensor, x: Tensor) -> Tensor:
    """Return a noise level per sample as [N,1,1,1] on x's device, for x [N,C,H,W]; float64 for such x, else float32.
    `sigma` is a number, or a tensor of 1 or N elements shaped [], [N] or [N,1,1,1]; raises ValueError otherwise.
    """
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    sigma = torch.as_tensor(sigma, dtype=dtype, device=x.device)
    if sigma.numel() not in (1, x.shape[0]) or sigma.shape.numel() != (sigma.shape[0] if sigma.ndim else 1):
        raise ValueError(f"sigma of shape {list(sigma.shape)} does not fit a batch of {x.shape[0]}: give 1 or N values")
    ones = [1] * (x.ndim - 1)
    return sigma.reshape(-1, *ones).expand(x.shape[0], *ones)


def combine_observations(y: Tensor, sigma: float | Tensor, x_t: Tensor, t: float | Tensor) -> tuple[Tensor, Tensor]:
    """Merge independent observations y = x0 + sigma·n and x_t = x0 + t·n of images [N,C,H,W], levels as in
    `expand_sigma`, into the sufficient one: (y_eff [N,C,H,W], sigma_eff [N,1,1,1]).

    sigma_eff^-2 = sigma^-2 + t^-2 and y_eff = sigma_eff^2·(y/sigma^2 + x_t/t^2), written as a convex combination so
    that no intermediate overflows or cancels (NCVSD, arXiv 2506.09416).
    """
    sigma, t = expand_sigma(sigma, y), expand_sigma(t, x_t)
    total = torch.hypot(sigma, t)
    return (t / total).square() * y + (sigma / total).square() * x_t, sigma * (t / total)


def few_step_posterior(
    denoiser: Callable[[Tensor, Tensor], Tensor],  # (y [N,C,H,W], sigma [N,1,1,1]) -> draw of x0
    y: Tensor,  # observation x0 + sigma·n, [N,C,H,W]
    sigma: float | Tensor,  # its level: number, [N] or [N,1,1,1]
    ts_sigmas: Sequence[float] | Tensor,  # decreasing levels [n+1]; the last is not evaluated
    *,
    zeta: float = 1.0,  # share of fresh noise in each re-noising: 1 = all fresh, 0 = all kept
    randn_like: RandnLike = torch.randn_like,
) -> Tensor:
    """Draw x0 [N,C,H,W] from p(x0 | y) in n evaluations of a one-step generative denoiser.

    Algorithm of NCVSD (arXiv 2506.09416, Proposition 2): each step merges y with the current x_i at level t_i, draws
    x0, and re-noises it to t_{i+1}. Noise is drawn in the order start, [denoiser's own], re-noise, [denoiser's own], …
    and none after the last evaluation. Raises ValueError for fewer than two levels or zeta outside [0, 1].
    """
    if not 0 <= zeta <= 1:
        raise ValueError(f"zeta is the share of fresh noise and must lie in [0, 1], not {zeta}")
    levels = torch.as_tensor(ts_sigmas, dtype=torch.float32, device=y.device)
    if levels.ndim != 1 or len(levels) < 2:
        raise ValueError(f"few-step sampling needs at least two noise levels, not {levels.numel()}")
    x = levels[0] * randn_like(y)
    for i in range(len(levels) - 1):
        x0 = denoiser(*combine_observations(y, sigma, x, levels[i]))
        if i == len(levels) - 2:
            break
        noise = randn_like(x0)
        if zeta < 1:
            noise = zeta**0.5 * noise + (1 - zeta) ** 0.5 * (x - x0) / levels[i]
        x = x0 + levels[i + 1] * noise
    return x0
