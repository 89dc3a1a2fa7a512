"""The published pickles of EDM2 and NCVSD, as what a network is built from."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from networks.architecture import kwargs_of_part, merge_parts, show
from torch_utils import safe_pickle
from torch_utils.safe_pickle import CheckpointError, Record

_PARTS = ("unet", "ctrl", "enc", "dec")  # of the published networks, which carry architecture arguments too
_MAX_ENTRIES = 100_000  # weights, buffers and modules of a network; the largest need a few thousand


Contents = tuple[dict[str, Any], dict[str, torch.Tensor]]  # of a file of a network, of either kind: config and tensors


def read_pickle(path: Path) -> Contents:
    """What a pickle of a network holds. Raises CheckpointError for other pickles."""
    data = safe_pickle.load(path)
    if type(data) is not dict or type(data.get("ema")) is not Record:
        raise CheckpointError("a pickle without a network under 'ema': not a network file of EDM2 or NCVSD")
    outer = model = data["ema"]
    if generative := outer.qualname == "GenerativeDenoiser":
        model = _entries(outer, "_modules").get("model")
    kinds = ("PrecondCondition",) if generative else ("Precond", "PrecondCondition")
    if type(model) is not Record or model.qualname not in kinds:
        name = show(getattr(model, "qualname", None))
        raise CheckpointError(f"a network of class {name}; known: {', '.join(kinds)}")
    parts = {name: part for name, part in _entries(model, "_modules").items() if type(part) is Record}
    parts = {name: kwargs_of_part(parts[name].state, name) for name in _PARTS if name in parts}
    init_kwargs = merge_parts(kwargs_of_part(model.state, model.qualname), parts)
    dataset = data.get("dataset_kwargs")
    config = {
        "kind": outer.qualname,
        "init_kwargs": init_kwargs,
        **{name: outer.state.get(name) if generative else None for name in ("gamma", "init_sigma")},
        "encoder": _encoder_config(data.get("encoder"), init_kwargs.get("img_channels")),
        "dataset": _scalars(dataset) if type(dataset) is dict else None,
        "provenance": None,
    }
    return config, _collect_tensors(outer)


def _entries(record: Record, name: str) -> dict[str, Any]:
    entries = record.state.get(name, {})
    if type(entries) is not dict or not all(type(key) is str and len(key) <= 100 for key in entries):
        raise CheckpointError(f"damaged: {name} of a {show(record.qualname)} is not a dictionary of short names")
    return entries


def _collect_tensors(record: Record) -> dict[str, torch.Tensor]:
    """The state dictionary of an inert module: keys are paths through its submodules."""
    tensors: dict[str, torch.Tensor] = {}
    pending, seen, entries = [("", record)], set(), 0
    while pending:
        prefix, module = pending.pop()
        if module is None:
            continue
        if type(module) is not Record or id(module) in seen or len(prefix) > 1000:
            raise CheckpointError(f"damaged: the modules at {show(prefix)} are not a tree")
        seen.add(id(module))
        parts = [_entries(module, part) for part in ("_parameters", "_buffers", "_modules")]
        entries += sum(map(len, parts))  # many modules may share one dictionary, which takes little room in a file
        if entries > _MAX_ENTRIES:
            raise CheckpointError(f"damaged: more than {_MAX_ENTRIES} weights and modules")
        parameters, buffers, children = parts
        temporary = module.state.get("_non_persistent_buffers_set")
        skipped = temporary if type(temporary) is set else set()
        for name, value in (parameters | {name: buffers[name] for name in buffers.keys() - skipped}).items():
            if type(value) not in (torch.Tensor, type(None)):
                raise CheckpointError(f"damaged: {show(prefix + name)} is not a tensor")
            if value is not None:
                tensors[prefix + name] = value
        pending += [(f"{prefix}{name}.", child) for name, child in children.items()]
    return tensors


def _encoder_config(encoder: Any, img_channels: int | None) -> dict[str, Any]:
    name = getattr(encoder, "qualname", None)
    if name == "StandardRGBEncoder" or (
        encoder is None and img_channels in (1, 3)
    ):  # EDM2's choice where none is named
        return {"type": "rgb"}
    if name != "StabilityVAEEncoder":
        raise CheckpointError(f"an encoder of class {show(name)}; known are StandardRGBEncoder, StabilityVAEEncoder")
    arrays = {key: encoder.state.get(key) for key in ("scale", "bias")}
    if any(getattr(array, "ndim", None) != 1 or len(array) > 64 for array in arrays.values()):
        raise CheckpointError("damaged: scale or bias of its encoder is not a short list of numbers")
    others = {key: encoder.state.get(key) for key in ("vae_name", "batch_size")}
    return {"type": "sd-vae", **others, **{key: array.tolist() for key, array in arrays.items()}}


def _scalars(items: Mapping[Any, Any]) -> dict[str, Any]:
    """The entries of a dictionary that are simple and short enough to show."""
    simple = {k: v for k, v in list(items.items())[:100] if type(v) in (str, int, float, bool, type(None))}
    return {k: v for k, v in simple.items() if type(k) is str and len(k) < 1000 and len(str(v)) < 1000}
