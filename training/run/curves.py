"""Curves of runs: read from their stats.jsonl, and drawn by matplotlib, which is imported on first use."""

import io
import math
import warnings
from collections.abc import Sequence
from fnmatch import fnmatch
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dnnlib.files import parse_json, read_regular

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Curve = list[tuple[float, float]]  # (images seen, value)

MAX_STATISTICS = 1 << 30  # bytes of a stats.jsonl
LARGEST = 1e300  # magnitude whose sums and differences are still numbers
COLOURS = ("#1b6ca8", "#d1495b", "#2e8b57", "#b8860b", "#6a4c93", "#3d3d3d", "#e07a1f", "#009e9e")
PANEL = (5.6, 3.0)  # inches
DPI = 100


class PlotError(ValueError):
    """A run that has nothing to draw, or nothing to draw it with."""


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
        raise PlotError(f"{run_dir or repr('')} has no stats.jsonl: name the folder of a run")
    curves: dict[str, Curve] = {}
    for entry in filter(None, map(read_entry, read_regular(path, MAX_STATISTICS).splitlines())):
        for key, value in entry.items():
            if key != "nimg" and isinstance(value, (int, float)) and abs(value) <= LARGEST:  # False for NaN
                number = float(value) if abs(value) >= 1 / LARGEST else 0.0
                curves.setdefault(key, []).append((entry["nimg"], number))
    if not curves:
        raise PlotError(f"{path} holds no statistics yet")
    return curves


def new_figure(width: float, height: float) -> "Figure":
    """An empty figure of that size in inches. Raises PlotError without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        advice = "pip install matplotlib"
        raise PlotError(f"figures are drawn by matplotlib, which is not installed: {advice} ({error})") from error
    return Figure(figsize=(width, height), dpi=DPI, layout="constrained")


def png(figure: "Figure") -> bytes:
    """The figure as a PNG file."""
    data = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from")  # names in scripts that the font lacks
        figure.savefig(data, format="png")
    return data.getvalue()


def draw(runs: dict[str, dict[str, Curve]], keys: Sequence[str]) -> "Figure":
    """A panel for each quantity that matches one of the patterns `keys`, the runs over one another. Raises PlotError if
    there is none, and without matplotlib.
    """
    known = list(dict.fromkeys(key for curves in runs.values() for key in curves))
    chosen = list(dict.fromkeys(key for pattern in keys for key in known if fnmatch(key, pattern.strip())))
    if not chosen:
        shown = ", ".join(key or repr(key) for key in keys)
        raise PlotError(f"no statistics match {shown}: known are {', '.join(known)}")
    rows, columns = math.ceil(len(chosen) / 2), min(2, len(chosen))
    figure = new_figure(columns * PANEL[0], rows * PANEL[1] + 0.22 * len(runs) + 0.16)
    figure.get_layout_engine().set(w_pad=0.1, h_pad=0.08)
    for panel, key in zip_longest(figure.subplots(rows, columns, squeeze=False).flat, chosen):
        if key is None:
            panel.remove()
        else:
            _draw_panel(panel, key, {i: curves[key] for i, curves in enumerate(runs.values()) if key in curves})
    _draw_legend(figure, list(runs))
    return figure


def _draw_panel(panel: "Axes", title: str, curves: dict[int, Curve]) -> None:
    """The curves of one quantity, by number of their run."""
    from matplotlib.ticker import EngFormatter

    for index, curve in curves.items():
        panel.plot(*zip(*curve, strict=True), **_style(index), marker="o" if len(curve) == 1 else None, clip_on=False)
    panel.set_title(title, loc="left", fontsize=11, parse_math=False)
    panel.set_xlim(0, max(1, *(x for curve in curves.values() for x, _ in curve)))
    panel.xaxis.set_major_formatter(EngFormatter(sep=""))
    panel.ticklabel_format(axis="y", useOffset=False)
    panel.tick_params(labelsize=9, colors="#444444")
    panel.tick_params(axis="y", length=0)
    panel.grid(axis="y", color="#e2e2e2")
    panel.set_axisbelow(True)
    panel.spines[["top", "right", "left"]].set_visible(False)
    panel.set_xlabel("images", fontsize=9, color="#444444")


def _draw_legend(figure: "Figure", names: list[str]) -> None:
    from matplotlib.lines import Line2D

    lines = [Line2D([], [], **_style(i), label=str(i)) for i in range(len(names))]  # a name with _ would be left out
    legend = figure.legend(handles=lines, loc="outside upper left", frameon=False, fontsize=10, handlelength=3.5)
    for text, name in zip(legend.get_texts(), names, strict=True):
        text.set_parse_math(False)
        text.set_text(name.encode(errors="replace").decode())


def _style(index: int) -> dict[str, Any]:
    """Look of run number `index`: where the colours begin again it is dashed, with wider gaps each time."""
    again, number = divmod(index, len(COLOURS))
    marks = dict(linewidth=1.8, markersize=5, fillstyle="none" if again else "full")
    return dict(color=COLOURS[number], linestyle=(0, (4, 1.5 * again)) if again else "-", **marks)
