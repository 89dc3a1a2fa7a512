"""Bytes that each process needs before the first activation, network by network."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from dnnlib.text import format_bytes

FLOAT32 = 4  # bytes


@dataclasses.dataclass(frozen=True)
class NetworkMemory:
    """Bytes of one network in one process."""

    name: str
    weights: int  # with buffers
    gradients: int
    adam: int
    ema: int  # on the device of the network

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.adam + self.ema


def tensor_bytes(tree: Any) -> int:
    """Bytes of all tensors in nested dicts and lists."""
    if isinstance(tree, torch.Tensor):
        return tree.numel() * tree.element_size()
    if isinstance(tree, (list, tuple, Mapping)):
        return sum(map(tensor_bytes, tree.values() if isinstance(tree, Mapping) else tree))
    return 0


@dataclasses.dataclass(frozen=True)
class MemoryPlan:
    """What networks, gradients, optimizers and averages take up; activations and the workspace of kernels come on top.

    A single process has the gradients of one network at a time. Several keep a buffer for those of each network.
    """

    rows: tuple[NetworkMemory, ...]
    world: int
    ema_host: int  # bytes of averages in host memory
    state: int  # bytes of a training state, which the main process copies to host memory
    snapshot: int  # bytes on the device of one average, for as long as a snapshot takes

    @property
    def device(self) -> int:
        """Bytes on the device of one process."""
        fixed = sum(row.total - row.gradients for row in self.rows)
        gradients = [row.gradients for row in self.rows]
        return fixed + (sum(gradients) if self.world > 1 else max(gradients))

    def lines(self) -> list[str]:
        """The plan as a table."""
        head = f"{'per process':12} {'weights':>10} {'gradients':>10} {'Adam':>10} {'EMA':>10} {'sum':>10}"
        table = [
            f"{row.name:12} "
            + " ".join(f"{format_bytes(n):>10}" for n in (row.weights, row.gradients, row.adam, row.ema, row.total))
            for row in self.rows
        ]
        note = "" if self.world > 1 else ", with the gradients of one network at a time"
        table.append(f"{'together':12} {format_bytes(self.device)} on the device{note}; activations come on top")
        table.append(f"{'':12} and {format_bytes(self.snapshot)} for the average of which a snapshot is made")
        host = f"{format_bytes(self.ema_host)} of averages, " if self.ema_host else ""
        table.append(f"{'host':12} {host}{format_bytes(self.state)} in the main process while a state is written")
        return [head, *table]


def memory_plan(
    trained: Iterable[tuple[str, nn.Module]],  # name and network of each phase
    frozen: Iterable[tuple[str, nn.Module]],  # networks that are only evaluated
    averaged: nn.Module,  # one of those in `trained`
    profiles: int,  # number of EMA profiles
    *,
    world: int = 1,  # processes
    shard: bool = False,  # whether Adam's moments and the averages are divided between them
    ema_on_host: bool = False,
) -> MemoryPlan:
    """Arithmetic on parameter counts; networks on the meta device will do. Shares are those of an even division."""
    rows = [NetworkMemory(name, tensor_bytes(net.state_dict()), 0, 0, 0) for name, net in frozen]
    parts = world if shard else 1
    ema_host = state = 0
    for name, net in trained:
        count = sum(p.numel() for p in net.parameters())
        ema = profiles * count * FLOAT32 if net is averaged else 0
        state += tensor_bytes(net.state_dict()) + 2 * count * FLOAT32 + ema
        ema_host += ema // parts if ema_on_host else 0
        on_device = 0 if ema_on_host else ema // parts
        moments = 2 * count * FLOAT32
        rows.append(NetworkMemory(name, tensor_bytes(net.state_dict()), count * FLOAT32, moments // parts, on_device))
    return MemoryPlan(tuple(rows), world, ema_host, state, tensor_bytes(averaged.state_dict()))
