"""Deterministic sampling of a teacher: the probability-flow ODE over any denoiser(x, sigma)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from sampling.grids import karras_sigmas

Denoiser = Callable[[Tensor, Tensor], Tensor]  # (x [N,C,H,W], sigma []) -> E[x0 | x], [N,C,H,W]


def heun_sampler(
    denoiser: Denoiser,
    noise: Tensor,  # standard normal [N,C,H,W]; scaled to sigma_max here
    *,
    num_steps: int = 32,  # noise levels; 2·num_steps - 1 denoiser evaluations with Heun, num_steps with Euler
    sigma_min: float = 0.002,
    sigma_max: float = 80.0,
    rho: float = 7.0,
    second_order: bool = True,  # False = Euler steps only
    dtype: torch.dtype = torch.float32,  # of the state between steps
) -> Tensor:
    """Integrate the probability-flow ODE from noise to images [N,C,H,W] on a Karras grid ending in 0, by Heun's method
    with a first-order last step (EDM, arXiv 2206.00364, Algorithm 1). Raises ValueError for an impossible grid.
    """
    levels = karras_sigmas(num_steps, sigma_min, sigma_max, rho, dtype=torch.float64, device="cpu").tolist() + [0.0]

    def slope(x: Tensor, level: float) -> Tensor:
        sigma = torch.as_tensor(level, dtype=torch.float32, device=x.device)
        return (x - denoiser(x.to(noise.dtype), sigma).to(dtype)) / level

    x = noise.to(dtype) * levels[0]
    for current, following in zip(levels, levels[1:], strict=False):
        step, d = following - current, slope(x, current)
        x_next = x + step * d
        if second_order and following > 0:
            x_next = x + step * 0.5 * (d + slope(x_next, following))
        x = x_next
    return x


def guided_denoiser(
    net: Callable[..., Tensor],  # net(x, sigma, labels)
    gnet: Callable[..., Tensor] | None = None,  # guiding network; None = net itself
    guidance: float = 1.0,  # 1 = net alone, 0 = gnet alone, above 1 = away from gnet
    labels: Tensor | None = None,  # one-hot [N, label_dim]
    *,
    gnet_labels: bool = True,  # False = gnet is evaluated without labels (classifier-free guidance)
) -> Denoiser:
    """Return the denoiser gnet + guidance·(net - gnet) for fixed labels; with guidance 1 only `net` is evaluated. A
    `gnet` that is a worse `net` makes this autoguidance (arXiv 2406.02507, equation 3), one that sees no labels
    classifier-free guidance.
    """
    if guidance == 1:
        return lambda x, sigma: net(x, sigma, labels)
    gnet = net if gnet is None else gnet
    guide_labels = labels if gnet_labels and getattr(gnet, "label_dim", 0) > 0 else None

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        guide = gnet(x, sigma, guide_labels)
        return guide + guidance * (net(x, sigma, labels) - guide)

    return denoise
