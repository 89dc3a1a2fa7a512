"""Noise schedules: the Karras grid and the grid indices of few-step sampling, as text and as noise levels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from networks.posterior import TS_GRID_SIZE, combine_observations, few_step_sigmas, karras_sigmas

__all__ = [
    "ParsedSchedule",
    "TS_GRID_SIZE",
    "combine_observations",
    "describe_ts",
    "few_step_sigmas",
    "karras_sigmas",
    "parse_ts",
]


class ParsedSchedule(NamedTuple):
    """Grid indices of a few-step schedule, and whether the final index was added to what the user wrote."""

    ts: tuple[int, ...]
    end_added: bool


def parse_ts(text: str | Sequence[int]) -> ParsedSchedule:
    """Read a few-step schedule such as '10,22,39': indices of the 40-point Karras grid, 0 (80) to 39 (0.002).

    n+1 indices are n network evaluations; the last, 39, ends the schedule and is added where it is missing.
    Raises ValueError unless the entries are strictly increasing integers in 0..39 with at least one below 39.
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
    levels = few_step_sigmas(ts, sigma_max=sigma_max).tolist()[:-1]
    shown = ", ".join(f"{level:.4g}" for level in levels)
    return f"{len(levels)} step{'s' if len(levels) > 1 else ''} at noise level{'s' if len(levels) > 1 else ''} {shown}"
