"""Curves of one or several runs from their stats.jsonl, as a PNG: python -m training.plot RUN_DIR ..."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from torch_utils.errors import user_errors
from training.run.curves import Curve, PlotError, read_curves

if TYPE_CHECKING:
    from PIL import ImageDraw

DEFAULT_KEYS = "Loss/*,Discriminator/*,Metrics/*,Gradients/*,Nonfinite/*_total,Progress/img_per_s,Progress/lr"
COLOURS = ("#1b6ca8", "#d1495b", "#2e8b57", "#b8860b", "#6a4c93", "#3d3d3d", "#e07a1f", "#009e9e")
PANEL = (560, 300)  # pixels
MARGIN = (70, 44, 16, 34)  # of a panel: left, top, right, bottom
FONT_SIZE = 14


def nice_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About `count` round numbers that cover low..high; at least two."""
    size = max(abs(low), abs(high))
    if not high - low > 1e-12 * size:
        low, high = low - (size or 1) * 0.5, high + (size or 1) * 0.5
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [i * step for i in range(first, max(last, first + 1) + 1)]


def short_number(value: float) -> str:
    """A tick's label: 0.25, 12k, 3.5M."""
    for factor, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= factor:
            return f"{value / factor:.4g}{suffix}"
    return f"{value:.4g}"


def draw(runs: dict[str, dict[str, Curve]], keys: Sequence[str]) -> Any:
    """Picture with a panel for each quantity that matches one of the patterns `keys`, the runs over one another.

    Raises PlotError if there is none.
    """
    from PIL import Image, ImageDraw

    known = list(dict.fromkeys(key for curves in runs.values() for key in curves))
    chosen = list(dict.fromkeys(key for pattern in keys for key in known if fnmatch(key, pattern.strip())))
    if not chosen:
        raise PlotError(f"no statistics match {', '.join(keys)}: known are {', '.join(known)}")
    columns = min(2, len(chosen))
    rows = math.ceil(len(chosen) / columns)
    legend = 22 * len(runs) + 16
    picture = Image.new("RGB", (columns * PANEL[0], rows * PANEL[1] + legend), "white")
    pen = ImageDraw.Draw(picture)
    font = _font()
    for i, name in enumerate(runs):
        y = 8 + 22 * i
        _line(pen, [(16, y + 8), (44, y + 8)], i, width=4)
        pen.text((54, y), name, fill="black", font=font)
    for i, key in enumerate(chosen):
        corner = (i % columns * PANEL[0], legend + i // columns * PANEL[1])
        _panel(pen, corner, key, [(j, curves[key]) for j, curves in enumerate(runs.values()) if key in curves])
    return picture


def _panel(pen: ImageDraw.ImageDraw, corner: tuple[int, int], title: str, curves: list[tuple[int, Curve]]) -> None:
    font = _font()
    points = [point for _, curve in curves for point in curve]
    xs, ys = nice_ticks(0, max(x for x, _ in points)), nice_ticks(min(y for _, y in points), max(y for _, y in points))
    left, top = corner[0] + MARGIN[0], corner[1] + MARGIN[1]
    right, bottom = corner[0] + PANEL[0] - MARGIN[2], corner[1] + PANEL[1] - MARGIN[3]

    def place(x: float, y: float) -> tuple[float, float]:
        across, up = (x - xs[0]) / (xs[-1] - xs[0]), (y - ys[0]) / (ys[-1] - ys[0])
        return left + across * (right - left), bottom - up * (bottom - top)

    pen.text((left, corner[1] + 16), title, fill="black", font=font)
    for y in ys:
        row = place(xs[0], y)[1]
        pen.line((left, row, right, row), fill="#e2e2e2")
        pen.text((left - 8, row), short_number(y), fill="#444444", font=font, anchor="rm")
    for x in xs:
        column = place(x, ys[0])[0]
        pen.line((column, bottom, column, bottom + 4), fill="#888888")
        pen.text((column, bottom + 8), short_number(x), fill="#444444", font=font, anchor="ma")
    pen.line((left, bottom, right, bottom), fill="#888888")
    for index, curve in curves:
        path = [place(x, y) for x, y in curve]
        if len(path) > 1:
            _line(pen, path, index, width=2)
        else:
            (x, y), colour = path[0], COLOURS[index % len(COLOURS)]
            inside = colour if index < len(COLOURS) else "white"
            pen.ellipse((x - 3, y - 3, x + 3, y + 3), fill=inside, outline=colour)


def _line(pen: ImageDraw.ImageDraw, path: list[tuple[float, float]], index: int, width: int) -> None:
    """The line of run number `index`: where the colours begin again it is dashed, with wider gaps each time."""
    again, number = divmod(index, len(COLOURS))
    if not again:
        pen.line(path, fill=COLOURS[number], width=width, joint="curve")
        return
    import numpy as np

    xs, ys = np.array(path).T
    along = np.concatenate([[0], np.hypot(np.diff(xs), np.diff(ys)).cumsum()])
    for start in np.arange(0, along[-1], 6 + 4 * again):
        ends = (start, min(start + 6, along[-1]))
        pen.line(list(zip(np.interp(ends, along, xs), np.interp(ends, along, ys), strict=True)), COLOURS[number], width)


def _font() -> Any:
    from PIL import ImageFont

    return ImageFont.load_default(FONT_SIZE)


@click.command(context_settings={"show_default": True, "max_content_width": 120})
@click.argument("run_dirs", metavar="RUN_DIR ...", nargs=-1, required=True)
@click.option("--out", metavar="FILE", help="PNG to write.  [default: curves.png in the first folder]")
@click.option("--keys", metavar="LIST", default=DEFAULT_KEYS, help="Quantities, with * for any text.")
def main(run_dirs: tuple[str, ...], out: str | None, keys: str) -> None:
    """Draw what happened in training, several runs over one another. The horizontal axis is images seen."""
    import io

    from dnnlib.files import atomic_write, check_output

    with user_errors():
        path = Path(out) if out else Path(run_dirs[0]) / "curves.png"
        check_output(path, ".png")
        runs = {run_dir: read_curves(run_dir) for run_dir in run_dirs}
        picture = draw(runs, keys.split(","))
        data = io.BytesIO()
        picture.save(data, format="PNG")
        with atomic_write(path) as file:
            file.write(data.getvalue())
        click.echo(str(path))


if __name__ == "__main__":
    main()
