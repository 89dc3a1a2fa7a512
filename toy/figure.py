"""The figure of a trained student: samples beside the true posterior, and the course of training."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from PIL import Image
from torch import Tensor

from dnnlib.files import atomic_write
from toy.check import PROBE_SAMPLES, SCHEDULES
from toy.mixture import GaussianMixture
from toy.training import BatchNoise, Student
from training.run.curves import new_figure, png

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SIZE = (15.2, 14.6)  # inches
EXTENT = 1.25  # of a panel, in data units from the centre
CELLS = 264  # of the density in a panel, across
DRAWS = 700  # points per panel
INK, MUTED, DATA, RULE = "#222831", "#78808a", "#c4cbd3", "#e8ebee"
TRUE, BEFORE, MODEL, MARK = "#de761c", "#8a78a0", "#1468a8", "#be1e3c"
LINES = {0.1: "#1468a8", 0.3: "#349896", 1.0: "#de961c", 10.0: "#de563c", 80.0: "#783c82"}
LOSSES = {"disc_real": MODEL, "disc_fake": TRUE, "gan": "#783c82"}
EXAMPLES = ((0.1, (0.02, -0.49)), (0.3, (-0.3, 0.12)), (0.7, (0.75, 0.5)), (80.0, None))  # sigma and y; None = any


def draw_figure(path: str | Path, mixture: GaussianMixture, student: Student, seed: int = 1) -> None:
    """Write the PNG: one row per observation y, columns truth, before distillation, 1, 2 and 4 steps; then curves.

    Raises PlotError without matplotlib.
    """
    columns = {"true posterior": TRUE, "before distillation": BEFORE} | dict.fromkeys(SCHEDULES, MODEL)
    figure = new_figure(*SIZE)
    figure.get_layout_engine().set(w_pad=0.06, h_pad=0.08, wspace=0, hspace=0)
    upper, lower = figure.subfigures(2, 1, height_ratios=(len(EXAMPLES), 0.95))
    panels = upper.subplots(len(EXAMPLES), len(columns))
    noise, density = BatchNoise(seed, 1), _density(mixture)
    for row, (sigma, position) in zip(panels, EXAMPLES, strict=True):
        y = torch.tensor(position or (0.0, 0.0)).reshape(1, 2, 1, 1)
        for panel, points, color in zip(row, _draws(mixture, student, y, sigma, noise), columns.values(), strict=True):
            panel.imshow(density, cmap=_greys(), extent=(-EXTENT, EXTENT) * 2, interpolation="bilinear")
            _points(panel, points, color, position, sigma)
        row[0].set_ylabel("given y" if position else "unconditional", fontsize=11, color=MUTED)
        row[0].text(
            -0.17,
            0.5,
            f"sigma {sigma:g}",
            transform=row[0].transAxes,
            fontsize=16,
            color=INK,
            ha="right",
            va="center",
            rotation=90,
        )
    for panel, title in zip(panels[0], columns, strict=True):
        panel.set_title(title, fontsize=16, color=INK, pad=10)
    left, right = lower.subplots(1, 2)
    energies = {f"energy_{sigma:g}": (f"sigma {sigma:g}", color) for sigma, color in LINES.items()}
    losses = {name: (name, color) for name, color in LOSSES.items()}
    _curves(left, student, energies, f"energy distance to the truth, 1 step / floor ({PROBE_SAMPLES} draws)")
    left.set_yscale("log")
    left.set_ylim(bottom=1)
    _ticks(left)
    _curves(right, student, losses, "adversarial losses")
    data = io.BytesIO()
    with Image.open(io.BytesIO(png(figure))) as image:  # a fifth of the bytes
        palette = image.convert("RGB").quantize(256, Image.Quantize.MAXCOVERAGE, kmeans=1, dither=Image.Dither.NONE)
    palette.save(data, format="PNG", optimize=True)
    with atomic_write(path) as file:
        file.write(data.getvalue())


@torch.no_grad()
def _draws(mixture: GaussianMixture, student: Student, y: Tensor, sigma: float, noise: BatchNoise) -> list[Tensor]:
    many = y.expand(DRAWS, -1, -1, -1)
    draws = [mixture.posterior(y.double(), sigma).sample(DRAWS, noise.randn_like)[0]]
    draws.append(student.start(many, sigma, randn_like=noise.randn_like).flatten(1))
    for ts in SCHEDULES.values():
        draws.append(student.generator(many, sigma, ts=ts, randn_like=noise.randn_like).flatten(1))
    return draws


def _density(mixture: GaussianMixture) -> Tensor:
    """The data's density over a panel, from the upper left, largest value 1, [CELLS,CELLS]."""
    axis = ((torch.arange(CELLS, dtype=torch.float64) + 0.5) / CELLS * 2 - 1) * EXTENT
    vertical, horizontal = torch.meshgrid(-axis, axis, indexing="ij")
    points = torch.stack([horizontal, vertical], -1).reshape(-1, 2, 1, 1)
    prior = mixture.prior()
    values = torch.cat([prior.log_prob(part) for part in points.split(8192)]).exp().reshape(CELLS, CELLS)
    return (values / values.max()) ** 0.7


def _greys():
    from matplotlib.colors import LinearSegmentedColormap

    return LinearSegmentedColormap.from_list("data", ["white", "#d3d8de"])


def _points(panel: Axes, points: Tensor, color: str, y: Sequence[float] | None, sigma: float) -> None:
    """Points [n,2], with a cross at y and a circle of radius sigma around it."""
    from matplotlib.patches import Circle

    panel.scatter(*points.T.numpy(), s=9, color=color, alpha=0.55, linewidths=0)
    if y is not None:
        panel.add_patch(Circle(y, sigma, fill=False, color=MARK, linewidth=1))
        panel.plot(*y, "x", color=MARK, markersize=8, markeredgewidth=1.6)
    panel.set(xlim=(-EXTENT, EXTENT), ylim=(-EXTENT, EXTENT), xticks=[], yticks=[], aspect="equal")
    panel.spines[:].set_color(DATA)


def _curves(panel: Axes, student: Student, names: dict[str, tuple[str, str]], title: str) -> None:
    """Lines over the training iterations; `names` gives label and colour of each quantity."""
    for name, (label, color) in names.items():
        points = [(entry["iteration"], entry[name]) for entry in student.curves if name in entry]
        if points:
            panel.plot(*zip(*points, strict=True), color=color, label=label, linewidth=2.2)
    panel.set_title(title, loc="left", fontsize=13, color=INK)
    panel.set_xlabel("iteration", fontsize=10, color=MUTED)
    panel.set_xlim(left=0)
    panel.grid(axis="y", color=RULE)
    panel.tick_params(colors=MUTED, labelsize=10, which="both")
    panel.spines[["top", "right"]].set_visible(False)
    panel.spines[["left", "bottom"]].set_color(MUTED)
    if panel.lines:
        panel.legend(frameon=False, fontsize=11, labelcolor="linecolor", loc="center left", bbox_to_anchor=(1, 0.5))


def _ticks(panel: Axes) -> None:
    """Plain numbers on a logarithmic axis: 1, 3, 10, 30 ..."""
    from matplotlib.ticker import FormatStrFormatter, LogLocator, NullFormatter

    panel.yaxis.set_major_locator(LogLocator(subs=(1, 3)))
    panel.yaxis.set_major_formatter(FormatStrFormatter("%g"))
    panel.yaxis.set_minor_formatter(NullFormatter())
