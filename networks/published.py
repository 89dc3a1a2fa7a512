"""The published pickles of EDM2 and NCVSD as what a network is built from, and checks of what any file says of it."""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from networks.denoisers import POSITIONAL
from torch_utils import safe_pickle
from torch_utils.safe_pickle import CheckpointError, Record

_PARTS = ("unet", "ctrl", "enc", "dec")  # of the published networks, which carry architecture arguments too
_MAX_ENTRIES = 100_000  # weights, buffers and modules of a network; the largest need a few thousand
_IGNORED = frozenset({"has_controlnet", "gradient_checkpoint"})  # of inner parts: implied, or without effect here

Check = Callable[[Any], bool]
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
    if name == "StandardRGBEncoder" or (encoder is None and img_channels in (1, 3)):  # EDM2's where none is named
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


def check_number(name: str, value: Any, low: float, high: float) -> float:
    """Returns `value` if it is a number in [low, high]; raises CheckpointError otherwise, also for NaN."""
    if not _number(low, high)(value):
        raise CheckpointError(f"{name} in the file is not a number from {low:g} to {high:g}")
    return float(value)


def check_init_kwargs(kwargs: Any) -> dict[str, Any]:
    """Returns a network's arguments if complete, known and within sane bounds; raises CheckpointError otherwise."""
    if type(kwargs) is not dict:
        raise CheckpointError("the architecture arguments in the file are not a dictionary")
    _check_values(kwargs)
    if missing := [name for name in POSITIONAL[:3] if name not in kwargs]:
        raise CheckpointError(f"architecture arguments missing: {', '.join(missing)}")
    return kwargs


def _check_values(kwargs: dict[Any, Any]) -> None:
    for name, value in kwargs.items():
        if name not in _CHECKS:
            raise CheckpointError(f"unknown architecture argument {ascii(name)[:60]}")
        if not _CHECKS[name](value):
            raise CheckpointError(f"architecture argument {name} has a value that no network uses: {show(value)}")


def merge_parts(kwargs: dict[str, Any], parts: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """Arguments of a network together with those that only its parts name. Raises CheckpointError where they differ."""
    merged = dict(kwargs)
    for part, (name, value) in ((part, item) for part, given in parts.items() for item in given.items()):
        if merged.setdefault(name, value) != value:
            raise CheckpointError(f"architecture argument {name} of the part {part} differs from the network's")
    return merged


def kwargs_of_part(state: dict[str, Any], name: str) -> dict[str, Any]:
    """Keyword arguments, checked, of a network or one of its parts as the published pickles store them."""
    args, kwargs = state.get("_init_args", ()), state.get("_init_kwargs", {})
    if type(args) not in (tuple, list) or type(kwargs) is not dict or len(args) > len(POSITIONAL):
        raise CheckpointError(f"the architecture arguments of {name} are damaged")
    merged = dict(zip(POSITIONAL, args, strict=False))
    if twice := sorted(merged.keys() & kwargs.keys()):
        raise CheckpointError(f"architecture argument {twice[0]} of {name} is given twice")
    merged |= {key: value for key, value in kwargs.items() if key not in _IGNORED}
    _check_values(merged)
    return {key: list(value) if type(value) is tuple else value for key, value in merged.items()}


def show(value: Any) -> str:
    """Short printable form of something that a file says; nothing is shown of compound values."""
    if isinstance(value, (str, int, float, bool, Exception, type(None))):
        return str(value)[:150].encode("ascii", "backslashreplace").decode().replace("\n", " ").replace("\x1b", "?")
    return f"a {type(value).__name__}"


def _number(low: float, high: float, kinds: tuple[type, ...] = (int, float)) -> Check:
    return lambda value: type(value) in kinds and low <= value <= high


def _sequence(item: Check, max_length: int) -> Check:
    return lambda value: type(value) in (list, tuple) and len(value) <= max_length and all(map(item, value))


def _optional(check: Check) -> Check:
    return lambda value: value is None or check(value)


_integer = partial(_number, kinds=(int,))
_CHECKS: dict[str, Check] = {
    "img_resolution": _integer(1, 4096),
    "img_channels": _integer(1, 1024),
    "label_dim": _integer(0, 1_000_000),
    "use_fp16": lambda value: type(value) is bool,
    "sigma_data": _number(1e-3, 1e3),
    **dict.fromkeys(("logvar_channels", "model_channels", "channels_per_head"), _integer(1, 8192)),
    "channel_mult": _sequence(_integer(1, 64), 12),
    **dict.fromkeys(("channel_mult_noise", "channel_mult_emb"), _optional(_integer(1, 64))),
    "num_blocks": _integer(1, 64),
    "attn_resolutions": _sequence(_integer(1, 8192), 12),
    **dict.fromkeys(("label_balance", "concat_balance", "res_balance", "attn_balance"), _number(0, 1)),
    "dropout": _number(0, 0.99),
    "resample_filter": _sequence(_number(-100, 100), 16),
    "clip_act": _optional(_number(1e-3, 1e6)),
}
