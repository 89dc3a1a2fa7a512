"""Curves of a run, read from its stats.jsonl."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dnnlib.files import parse_json, read_regular

Curve = list[tuple[float, float]]  # (images seen, value)

MAX_STATISTICS = 1 << 30  # bytes of a stats.jsonl
LARGEST = 1e300  # magnitude whose sums and differences are still numbers


class PlotError(ValueError):
    """A run that has nothing to draw."""


def read_entry(line: bytes) -> dict[str, Any] | None:
    """What a line of stats.jsonl holds; None for one that was cut off, damaged or holds something else."""
    try:
        entry = parse_json(line.decode(errors="replace"))
    except ValueError:
        return None
    known = isinstance(entry, dict) and type(entry.get("nimg")) is int and 0 <= entry["nimg"] < 1 << 63
    return entry if known else None


def read_curves(run_dir: str | Path) -> dict[str, Curve]:
    """Every quantity of a run's stats.jsonl by name; numbers beyond 1e300 are left out, those within 1e-300 are 0.

    Raises PlotError for no file or no numbers in it, OSError for one that cannot be read.
    """
    path = Path(run_dir) / "stats.jsonl"
    if not path.is_file():
        raise PlotError(f"{run_dir} has no stats.jsonl: name the folder of a run")
    curves: dict[str, Curve] = {}
    for line in read_regular(path, MAX_STATISTICS).splitlines():
        entry = read_entry(line) or {}
        for key, value in entry.items():
            if key != "nimg" and isinstance(value, (int, float)) and abs(value) <= LARGEST:  # False for NaN
                number = float(value) if abs(value) >= 1 / LARGEST else 0.0
                curves.setdefault(key, []).append((entry["nimg"], number))
    if not curves:
        raise PlotError(f"{path} holds no statistics yet")
    return curves
