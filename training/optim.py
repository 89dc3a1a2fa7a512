"""Learning rate schedule, updates, and what is done about gradients and weights that are not finite."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from torch_utils import distributed
from training.presets import TrainingConfig
from training.tasks import Phase


class DivergenceError(ValueError):
    """Training cannot go on: gradients have been non-finite for too many updates in a row, or weights are."""


@dataclass
class Health:
    """Non-finite gradients of one network."""

    streak: int = 0  # affected updates in a row, up to the last one
    updates: int = 0  # affected updates since the run began
    entries: int = 0  # entries in all of them


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


def update_network(
    phase: Phase, optimizer: torch.optim.Optimizer, lr: float, health: Health, config: TrainingConfig
) -> dict[str, Tensor | int]:
    """Check gradients, take one step, and bring `health` up to date; return what to record of them. Raises
    DivergenceError after `config.nonfinite_limit` affected updates.
    """
    name, parameters = phase.name, list(phase.net.parameters())
    norm, bad = total_norm(_gradients(parameters)), count_nonfinite(parameters)
    health.streak = health.streak + 1 if bad else 0
    health.updates += bad > 0
    health.entries += bad
    if health.streak >= config.nonfinite_limit:
        raise DivergenceError(
            f"gradients of the {name} network have been non-finite for {health.streak} updates in a row "
            f"({bad} entries in the last one): resume with --dtype bf16 or float32, or start anew with a lower --ref-lr"
        )
    if bad:
        zero_nonfinite(parameters)
    if not bad or config.nonfinite == "zero":
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
    # Replicas accumulate in the messages' buffers; exact resuming with any number of processes wants fresh gradients.
    fresh = distributed.world_size() == 1 or torch.are_deterministic_algorithms_enabled()
    optimizer.zero_grad(set_to_none=fresh)
    return {f"Gradients/{name}_norm": norm, f"Nonfinite/{name}_entries": bad, f"Nonfinite/{name}_updates": bad > 0}


@torch.no_grad()
def total_norm(tensors: Iterable[Tensor]) -> Tensor:
    """L2 norm of all entries together, a scalar on their device."""
    norms = torch._foreach_norm([t.detach() for t in tensors])
    return torch.stack([n.float() for n in norms]).norm() if norms else torch.zeros([])


@torch.no_grad()
def count_nonfinite(parameters: Iterable[torch.nn.Parameter]) -> int:
    """Number of gradient entries that are NaN or infinite."""
    grads = _gradients(parameters)
    norms = torch.stack(torch._foreach_norm(grads)) if grads else torch.zeros(1)
    return 0 if torch.isfinite(norms.sum()) else int(sum((~torch.isfinite(g)).sum() for g in grads))


@torch.no_grad()
def zero_nonfinite(parameters: Iterable[torch.nn.Parameter]) -> None:
    """Replace NaN and infinite gradient entries by 0."""
    for grad in _gradients(parameters):
        torch.nan_to_num(grad, nan=0, posinf=0, neginf=0, out=grad)


@torch.no_grad()
def check_weights(phases: Iterable[Phase]) -> None:
    """Raise DivergenceError where a network has a weight that is not finite."""
    for phase in phases:
        if not torch.isfinite(total_norm(phase.net.parameters())):
            advice = "resume with --dtype bf16 or float32, or start anew with a lower --ref-lr"
            raise DivergenceError(f"weights of the {phase.name} network are no longer finite: {advice}")


def _gradients(parameters: Iterable[torch.nn.Parameter]) -> list[Tensor]:
    return [p.grad for p in parameters if p.grad is not None]
