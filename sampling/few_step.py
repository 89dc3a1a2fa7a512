"""Unconditional generation with a generative denoiser, in one step or a few."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch

from networks.posterior import few_step_posterior, few_step_sigmas

if TYPE_CHECKING:
    from networks import GenerativeDenoiser

__all__ = ["few_step_posterior", "few_step_sampler", "few_step_sigmas"]


def few_step_sampler(
    net: GenerativeDenoiser,
    noise: torch.Tensor,  # standard normal [N,C,H,W]; scaled to net.init_sigma here
    labels: torch.Tensor | None = None,  # one-hot [N, label_dim]
    *,
    ts: Sequence[int] | None = None,  # grid indices; None = one direct evaluation at init_sigma
    zeta: float = 1.0,  # share of fresh noise in each re-noising
    randn_like: Callable[[torch.Tensor], torch.Tensor] = torch.randn_like,
) -> torch.Tensor:
    """Draw images [N,C,H,W] from pure noise: the posterior given y = init_sigma·noise, which says nothing.

    NCVSD (arXiv 2506.09416): len(ts) - 1 evaluations, or one without `ts`. Raises ValueError for a bad schedule.
    """
    return net(net.init_sigma * noise, net.init_sigma, labels, ts=ts, zeta=zeta, randn_like=randn_like)
