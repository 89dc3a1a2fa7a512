"""Noise levels: the Karras grid, and the grid indices of few-step schedules as levels and as text."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

TS_GRID_SIZE = 40  # few-step schedules are indices of the 40-point Karras grid


def karras_sigmas(
    num: int,
    sigma_min: float = 0.002,  # last level, in data units
    sigma_max: float = 80.0,  # first level, in data units
    rho: float = 7.0,  # larger = more levels near sigma_min
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> Tensor:
    """Return `num` decreasing noise levels [num] from `sigma_max` to `sigma_min` (EDM, arXiv 2206.00364, equation 5).
    Raises ValueError if there are fewer than two levels or the range is not 0 <= sigma_min < sigma_max.
    """
    if num < 2:
        raise ValueError(f"a Karras grid needs at least 2 levels, not {num}")
    if not 0 <= sigma_min < sigma_max or rho <= 0:
        given = f"sigma_min {sigma_min}, sigma_max {sigma_max}, rho {rho}"
        raise ValueError(f"a Karras grid needs 0 <= sigma_min < sigma_max and rho > 0, not {given}")
    fraction = torch.arange(num, dtype=dtype, device=device) / (num - 1)
    high, low = sigma_max ** (1 / rho), sigma_min ** (1 / rho)
    return (high + fraction * (low - high)) ** rho


def few_step_sigmas(ts: Sequence[int], *, sigma_max: float = 80.0, device: torch.device | str | None = None) -> Tensor:
    """Return the noise levels [n+1] of grid indices t_0 < … < t_n; index 0 has `sigma_max`, in data units. They mean n
    network evaluations: the last level is where the result would be re-noised to. Raises ValueError unless the indices
    are at least two, integers in 0..39, and strictly increasing.
    """
    ts, shown = list(ts), ",".join(map(str, ts))
    if any(isinstance(t, bool) or int(t) != t or not 0 <= t < TS_GRID_SIZE for t in ts):
        raise ValueError(f"ts {shown}: every entry must be an integer from 0 to {TS_GRID_SIZE - 1}")
    if any(a >= b for a, b in zip(ts, ts[1:], strict=False)):
        raise ValueError(f"ts {shown}: the entries must increase strictly (noise levels decrease), as in 10,22,39")
    if len(ts) < 2:
        raise ValueError(f"ts {shown or '(empty)'}: at least two entries are needed, as in 10,39")
    return karras_sigmas(TS_GRID_SIZE, sigma_max=sigma_max, device=device)[[int(t) for t in ts]]


class ParsedSchedule(NamedTuple):
    """Grid indices of a few-step schedule, and whether the final index was added to what the user wrote."""

    ts: tuple[int, ...]
    end_added: bool


def parse_ts(text: str | Sequence[int]) -> ParsedSchedule:
    """Read a few-step schedule such as '10,22,39': indices of the 40-point Karras grid, 0 (80) to 39 (0.002). n+1
    indices are n network evaluations; the last, 39, ends the schedule and is added where it is missing. Raises
    ValueError unless the entries are strictly increasing integers in 0..39 with at least one below 39.
    """
    parts = [part.strip() for part in text.split(",")] if isinstance(text, str) else list(text)
    try:
        ts = tuple(int(part) for part in parts)
    except ValueError as error:
        raise ValueError(f"ts {text!r}: write whole numbers with commas between them, as in 10,22,39") from error
    end_added = bool(ts) and ts[-1] != TS_GRID_SIZE - 1
    if end_added:
        ts += (TS_GRID_SIZE - 1,)
    few_step_sigmas(ts)
    return ParsedSchedule(ts, end_added)


def describe_ts(ts: Sequence[int], *, sigma_max: float = 80.0) -> str:
    """Return the noise levels of the evaluations in words, as in '2 steps at noise levels 16.78, 1.382'."""
    levels = [f"{level:.4g}" for level in few_step_sigmas(ts, sigma_max=sigma_max).tolist()[:-1]]
    plural = "s" if len(levels) > 1 else ""
    return f"{len(levels)} step{plural} at noise level{plural} {', '.join(levels)}"
