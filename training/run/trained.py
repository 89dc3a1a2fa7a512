"""Everything that training changes."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from dnnlib.text import printable
from torch_utils import distributed
from training.optim import Health
from training.phema import PowerFunctionEMA
from training.presets import TrainingConfig
from training.run.parallel import build_optimizer, load_optimizer_state, optimizer_state
from training.run.state import StateError, to_host
from training.tasks import Task


class Trained:
    """Networks, optimizers, averages and counters of a run: all that a resumed one needs."""

    def __init__(
        self,
        task: Task,
        config: TrainingConfig,
        seed: int,
        device: torch.device,
        *,
        shard: bool = False,  # divide Adam's moments and the averages between the processes
        ema_device: torch.device | None = None,  # where the averages are kept; None = `device`
    ) -> None:
        self.task = task
        self.seed = seed
        self.nimg = 0  # images seen
        self.seconds = 0.0  # of training, up to the last statistics
        self.snapshot_seconds = 0.0  # of the last snapshot
        self.health = {p.name: Health() for p in task.phases}
        self.optimizers = {p.name: build_optimizer(p.net, device, beta1=p.beta1, shard=shard) for p in task.phases}
        self.ema = PowerFunctionEMA(task.result, config.ema_stds, device=ema_device, shard=shard)

    @property
    def sound(self) -> bool:
        """Whether the last update of every network had finite gradients."""
        return not any(health.streak for health in self.health.values())

    def host_state(self, identity: dict[str, Any] | None = None) -> dict[str, Any]:
        """Plain data, what identifies the run among it, and copies of all tensors in the main process's host memory;
        none elsewhere. Collective.

        The order of the images and all noise are functions of the seed and of the position in the image sequence.
        """
        copied = to_host if distributed.is_main() else (lambda tree: None)
        averages = self.ema.state_dict()
        return {
            "identity": identity,
            "nimg": self.nimg,
            "seconds": self.seconds,
            "snapshot_seconds": self.snapshot_seconds,
            "seed": self.seed,
            "position": self.nimg * len(self.task.order),
            "health": {name: dataclasses.asdict(health) for name, health in self.health.items()},
            "nets": {p.name: copied(p.net.state_dict()) for p in self.task.phases},
            "optimizers": {name: optimizer_state(optimizer) for name, optimizer in self.optimizers.items()},
            "ema": averages if self.ema.sharded else copied(averages),
        }

    def load_state_dict(self, state: dict[str, Any], *, force: bool = False) -> None:
        """Take in a state of any number of processes, with `force` one of other EMA profiles too.

        Raises StateError where it does not fit.
        """
        try:
            for p in self.task.phases:
                p.net.load_state_dict(state["nets"][p.name])
                load_optimizer_state(self.optimizers[p.name], state["optimizers"][p.name])
                self.health[p.name] = Health(**{k: int(v) for k, v in state["health"][p.name].items()})
            self.ema.load_state_dict(state["ema"], force=force)
            self.nimg, self.seconds = int(state["nimg"]), float(state["seconds"])
            self.snapshot_seconds = float(state.get("snapshot_seconds", 0))
            if self.nimg < 0:
                raise ValueError(f"nimg is {self.nimg}")
        except (ArithmeticError, AttributeError, LookupError, TypeError) as error:
            reason = (
                f"no {error} in it" if isinstance(error, KeyError) else "something else stands where a part should be"
            )
            raise StateError(f"the training state does not fit this run ({printable(reason)})") from error
        except (RuntimeError, ValueError) as error:
            raise StateError(f"the training state does not fit this run ({printable(error)})") from error
