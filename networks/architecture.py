"""Checks of the architecture arguments that a file gives, before anything is built from them."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from torch_utils.safe_pickle import CheckpointError

POSITIONAL = ("img_resolution", "img_channels", "label_dim", "use_fp16", "sigma_data", "logvar_channels")
Check = Callable[[Any], bool]

_IGNORED = frozenset({"has_controlnet", "gradient_checkpoint"})  # of inner parts: implied, or without effect here


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
