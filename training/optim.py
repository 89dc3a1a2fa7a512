"""Learning rate schedule and gradient checks."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from training.presets import TrainingConfig


class DivergenceError(RuntimeError):
    """Training cannot go on: gradients have been non-finite for too many updates in a row."""


def learning_rate(nimg: int, config: TrainingConfig) -> float:
    """Learning rate of the update that begins after `nimg` images (EDM2, Eq. 67).

    Inverse square root decay after ref_batches batches, linear ramp-up (so the very first update has rate 0) and, where
    the configuration asks for it, a linear fall to 0 over the last images of the run.
    """
    lr = config.ref_lr
    if config.ref_batches > 0:
        lr /= max(nimg / (config.ref_batches * config.batch), 1) ** 0.5
    if config.rampup_mimg > 0:
        lr *= min(nimg / (config.rampup_mimg * 1e6), 1)
    if config.cooldown_mimg > 0:
        lr *= min(max((config.duration - nimg) / (config.cooldown_mimg * 1e6), 0), 1)
    return lr


@torch.no_grad()
def count_nonfinite(parameters: Iterable[torch.nn.Parameter]) -> int:
    """Number of gradient entries that are NaN or infinite."""
    grads = [p.grad for p in parameters if p.grad is not None]
    norms = torch.stack(torch._foreach_norm(grads)) if grads else torch.zeros(1)
    if torch.isfinite(norms.sum()):
        return 0
    return int(sum((~torch.isfinite(g)).sum() for g in grads))


@torch.no_grad()
def zero_nonfinite(parameters: Iterable[torch.nn.Parameter]) -> None:
    """Replace NaN and infinite gradient entries by 0."""
    for p in parameters:
        if p.grad is not None:
            torch.nan_to_num(p.grad, nan=0, posinf=0, neginf=0, out=p.grad)
