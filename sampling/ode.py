"""Deterministic sampling of a teacher: the probability-flow ODE over any denoiser(x, sigma)."""

from collections.abc import Callable

import torch
from torch import Tensor

from sampling.grids import karras_sigmas

Network = Callable[..., Tensor]  # (x [N,C,H,W], sigma, labels) -> E[x0 | x], [N,C,H,W]
Denoiser = Callable[[Tensor, Tensor], Tensor]  # the same of (x, sigma []), for fixed labels


def heun_sampler(denoiser: Denoiser, noise: Tensor, *, num_steps: int = 32, **grid: float) -> Tensor:
    """Integrate the probability-flow ODE from standard normal noise to images [N,C,H,W], in noise's type.

    Heun's second-order method with a first-order last step (EDM, arXiv 2206.00364, Algorithm 1): 2·num_steps - 1
    evaluations, at the levels of `karras_sigmas(num_steps, **grid)` and 0. Raises ValueError for an impossible grid.
    """
    levels = [*karras_sigmas(num_steps, **grid, dtype=torch.float64, device="cpu").tolist(), 0.0]

    def slope(x: Tensor, level: float) -> Tensor:
        return (x - denoiser(x, torch.as_tensor(level, dtype=torch.float32, device=x.device))) / level

    x = noise * levels[0]
    for current, following in zip(levels, levels[1:], strict=False):
        step, d = following - current, slope(x, current)
        x_next = x + step * d
        if following > 0:
            x_next = x + step * 0.5 * (d + slope(x_next, following))
        x = x_next
    return x


def guided_denoiser(
    net: Network, gnet: Network | None = None, guidance: float = 1.0, labels: Tensor | None = None, *, gnet_labels=True
) -> Denoiser:
    """Return the denoiser gnet + guidance·(net - gnet) for fixed one-hot labels [N,label_dim]; gnet None is net itself.

    A `gnet` that is a worse `net` makes this autoguidance (arXiv 2406.02507, equation 3), one that sees no labels, as
    with `gnet_labels=False`, classifier-free guidance. With guidance 1 only `net` is evaluated.
    """
    if guidance == 1:
        return lambda x, sigma: net(x, sigma, labels)
    gnet = net if gnet is None else gnet
    guide_labels = labels if gnet_labels and getattr(gnet, "label_dim", 0) > 0 else None

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        guide = gnet(x, sigma, guide_labels)
        return guide + guidance * (net(x, sigma, labels) - guide)

    return denoise
