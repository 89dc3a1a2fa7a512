"""What the networks of a distillation see, from fixed seeds: the score network's and the teacher's view of samples."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sampling.posterior import combine_observations
from sampling.seeds import SeededNoise


@torch.no_grad()
def denoised_views(
    generator: nn.Module,  # GenerativeDenoiser whose samples are looked at
    score_net: nn.Module,
    teacher: nn.Module,
    encoder: Any,
    seeds: Sequence[int],
    t: float,  # noise level of x_t
    batch: int,
) -> dict[str, Tensor]:
    """Images [N,C,H,W] uint8 on the CPU: E[x | x_t, y] for x_t = x + t·n and samples x of y at the highest level.

    By the score network ("score_view") and by the teacher ("teacher_view"). The generator's loss is the difference of
    the two: where they look alike it has nothing left to learn at this level.
    """
    sigma, device = generator.init_sigma, generator.device
    shape = [generator.img_channels, generator.img_resolution, generator.img_resolution]
    views: dict[str, list[Tensor]] = {"score_view": [], "teacher_view": []}
    for first in range(0, len(seeds), batch):
        noise = SeededNoise(seeds[first : first + batch], device)
        count = len(noise.seeds)
        y = sigma * noise.randn([count, *shape])
        labels = None
        if generator.label_dim:
            labels = torch.nn.functional.one_hot(noise.randint(generator.label_dim), generator.label_dim).float()
        x = generator(y, sigma, labels, randn_like=noise.randn_like)
        x_t = x + t * noise.randn_like(x)
        found = (
            score_net(x_t, t, y, sigma, labels),
            teacher(*combine_observations(y, sigma, x_t, t), labels),
        )
        for images, latents in zip(views.values(), found, strict=True):
            images.append(encoder.decode(latents).cpu())
    return {name: torch.cat(images) for name, images in views.items()}
