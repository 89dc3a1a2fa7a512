"""Golden data and the networks whose weights are regenerated from their names."""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch

DATA = Path(__file__).parent / "data"


def golden_json() -> dict[str, Any]:
    """Return networks.json: config, seed, shapes and gradient norms."""
    return json.loads((DATA / "networks.json").read_text())


def golden_config() -> dict[str, Any]:
    """Return the architecture arguments of the golden networks."""
    return golden_json()["config"]


def golden_arrays(name: str = "networks.npz") -> dict[str, torch.Tensor]:
    """Return every array of a golden .npz file as a tensor."""
    with np.load(DATA / name, allow_pickle=False) as arrays:
        return {key: torch.from_numpy(arrays[key]) for key in arrays.files}


def weight_by_name(name: str, shape: tuple[int, ...], seed: int) -> torch.Tensor:
    """Return the float32 weight that belongs to a checkpoint key."""
    rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
    if name.endswith(("emb_gain", "out_gain")):
        value = rng.uniform(0.3, 0.9, shape)
    elif name.endswith(("additional_x_weight", "additional_skips_weight")):
        value = rng.uniform(0.1, 0.6, shape)
    elif name.endswith("freqs"):
        value = 2 * np.pi * rng.standard_normal(shape)
    elif name.endswith("phases"):
        value = 2 * np.pi * rng.random(shape)
    else:
        value = rng.standard_normal(shape)
    return torch.as_tensor(np.asarray(value, dtype=np.float32))


@torch.no_grad()
def fill_by_name(module: torch.nn.Module, seed: int, prefix: str = "") -> torch.nn.Module:
    """Fill every parameter and buffer by its key (with `prefix` removed from its front); return the module."""
    for name, tensor in module.state_dict().items():
        tensor.copy_(weight_by_name(name.removeprefix(prefix), tuple(tensor.shape), seed))
    return module
