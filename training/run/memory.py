"""Bytes that each process needs before the first activation, network by network."""

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from dnnlib.text import format_bytes


class NetworkMemory(NamedTuple):
    """Bytes of one network in one process."""

    name: str
    weights: int  # with buffers
    gradients: int = 0
    adam: int = 0
    ema: int = 0  # on the device of the network


def tensor_bytes(tree: Any) -> int:
    """Bytes of all tensors in nested dicts and lists."""
    return sum(leaf.nbytes for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor))


class MemoryPlan(NamedTuple):
    """What networks, gradients, optimizers and averages take up; activations and the workspace of kernels come on top.
    A single process has the gradients of one network at a time. Several keep a buffer for those of each network.
    """

    rows: list[NetworkMemory]
    world: int
    ema_host: int  # bytes of averages in host memory
    state: int  # bytes of a training state, which the main process copies to host memory
    snapshot: int  # bytes on the device of one average, for as long as a snapshot takes

    @property
    def device(self) -> int:
        """Bytes on the device of one process."""
        gradients = [row.gradients for row in self.rows]
        return sum(sum(row[1:]) for row in self.rows) - sum(gradients) + (sum if self.world > 1 else max)(gradients)

    def lines(self) -> list[str]:
        """The plan as a table."""
        table = [("per process", "weights", "gradients", "Adam", "EMA", "sum")]
        table += [(row.name, *map(format_bytes, (*row[1:], sum(row[1:])))) for row in self.rows]
        note = "" if self.world > 1 else ", with the gradients of one network at a time"
        host = f"{format_bytes(self.ema_host)} of averages, " if self.ema_host else ""
        return [
            *(f"{name:12} " + " ".join(f"{cell:>10}" for cell in cells) for name, *cells in table),
            f"{'together':12} {format_bytes(self.device)} on the device{note}; activations come on top",
            f"{'':12} and {format_bytes(self.snapshot)} for the average of which a snapshot is made",
            f"{'host':12} {host}{format_bytes(self.state)} in the main process while a state is written",
        ]


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
    rows = [NetworkMemory(name, tensor_bytes(net.state_dict())) for name, net in frozen]
    parts = world if shard else 1
    ema_host = state = 0
    for name, net in trained:
        weights, gradients = tensor_bytes(net.state_dict()), 4 * sum(p.numel() for p in net.parameters())  # float32
        ema = profiles * gradients if net is averaged else 0
        state += weights + 2 * gradients + ema
        ema_host += ema // parts if ema_on_host else 0
        rows.append(NetworkMemory(name, weights, gradients, 2 * gradients // parts, 0 if ema_on_host else ema // parts))
    return MemoryPlan(rows, world, ema_host, state, tensor_bytes(averaged.state_dict()))
