"""Process groups under torchrun; without `init`, every function answers for a single process."""

import os
import re
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from typing import NoReturn, TypeVar

import torch
import torch.distributed as dist

from torch_utils.errors import MainProcessError

T = TypeVar("T")


def launched_by_torchrun() -> bool:
    """Whether the environment describes a process group. Raises ValueError, naming the variable, where none can be."""
    if "RANK" not in os.environ or not _number("WORLD_SIZE"):
        return False
    if _number("RANK") >= _number("WORLD_SIZE"):
        _refuse("RANK", f"and WORLD_SIZE is {os.environ['WORLD_SIZE']!r}")
    _number("MASTER_PORT")
    return True


def _number(name: str) -> int:
    """Value of a variable of torchrun's, 0 where it is not set. Raises ValueError for what is no whole number."""
    text = os.environ.get(name, "0")
    if not re.fullmatch("[0-9]{1,9}", text):
        _refuse(name, "not a whole number")
    return int(text)


def _refuse(name: str, reason: str) -> NoReturn:
    advice = "unset RANK and WORLD_SIZE, or start with torchrun"
    raise ValueError(f"the environment variable {name} is {os.environ[name]!r}, {reason}: {advice}")


def device_for(device: str | torch.device = "auto") -> torch.device:
    """Resolve a device name: 'auto' is CUDA if there is one, else MPS, else the CPU; under torchrun 'cuda' and 'auto'
    become this process's own GPU. Raises ValueError for an unknown or absent device.
    """
    if str(device) == "auto":
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    with suppress(RuntimeError):
        device = torch.device(device)
    if getattr(device, "type", None) not in ("cpu", "cuda", "mps"):
        raise ValueError(f"device {str(device)!r} is not known: use auto, cpu, cuda, cuda:N or mps")
    if device.type == "cuda":
        count, index = torch.cuda.device_count() if torch.cuda.is_available() else 0, device.index
        if index is None:
            index = _number("LOCAL_RANK") if launched_by_torchrun() else torch.cuda.current_device() if count else 0
        if index >= count:
            raise ValueError(f"device cuda:{index} does not exist: PyTorch sees {count} CUDA device(s) on this machine")
        device = torch.device("cuda", index)
    elif device.type == "mps" and not torch.backends.mps.is_available():
        raise ValueError("device mps does not exist on this machine: use --device cpu")
    return device


def init(device: str | torch.device = "auto") -> torch.device:
    """Resolve the device and, under torchrun, join the process group, once. Raises ValueError as `device_for`."""
    device = device_for(device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if launched_by_torchrun() and not dist.is_initialized():
        # Imported later, it would take the group as a default argument and keep its threads alive past the group's end,
        # which can abort the process when it exits.
        from torch.distributed import nn  # noqa: F401

        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(minutes=30))
    return device


def rank() -> int:
    """This process's index in the group (0 without one)."""
    return dist.get_rank() if in_group() else 0


def world_size() -> int:
    """The number of processes in the group (1 without one)."""
    return dist.get_world_size() if in_group() else 1


def is_main() -> bool:
    """Whether this is the process that prints and writes shared files."""
    return rank() == 0


def collective_device() -> torch.device:
    """Where the tensors of a collective must be: this process's GPU with NCCL, the CPU otherwise."""
    if in_group() and dist.get_backend() == "nccl":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def barrier() -> None:
    """Wait for every process of the group."""
    if in_group():
        device = collective_device()
        dist.barrier(device_ids=None if device.index is None else [device.index])


def main_first(function: Callable[[], T]) -> T:
    """function() of every process, the main one (which downloads, say) first; the others raise MainProcessError with
    the text of what it raises.
    """
    if not in_group():
        return function()
    if not is_main():
        if (told := from_main(None)) is not None:
            raise MainProcessError(told)
        return function()
    try:
        result = function()
    except Exception as error:  # of any kind: the others are waiting to hear of it
        from_main(str(error))
        raise
    from_main(None)
    return result


def from_main(value: T) -> T:
    """The main process's value, a small picklable one, in every process. Collective."""
    if not in_group():
        return value
    dist.broadcast_object_list(message := [value], src=0)
    return message[0]


def print0(*args: object, **kwargs: object) -> None:
    """Print from the main process only."""
    if is_main():
        print(*args, **kwargs)


def in_group() -> bool:
    """Whether this process has joined a process group."""
    return dist.is_available() and dist.is_initialized()


def compute_dtype(name: str, device: torch.device) -> torch.dtype | None:
    """Torch dtype of a --dtype choice, None for auto, the network's own. Raises ValueError for fp16 without CUDA."""
    if name == "fp16" and device.type != "cuda":
        raise ValueError(f"--dtype fp16 needs a CUDA device, and this run is on {device.type}: use bf16 or float32")
    return {"auto": None, "float32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[name]
