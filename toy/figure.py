"""The figure of a trained student, drawn with Pillow: samples beside the true posterior, and the course of training."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from dnnlib.files import atomic_write
from toy.check import PROBE_SAMPLES, SCHEDULES
from toy.mixture import GaussianMixture
from toy.training import BatchNoise, Student

PANEL, GAP, LEFT, TOP = 264, 12, 128, 58  # pixels
OVERSAMPLING = 3
EXTENT = 1.25  # of a panel, in data units from the centre
DRAWS = 700  # points per panel
INK, MUTED, PAPER = (34, 40, 49), (120, 128, 138), (255, 255, 255)
DATA, TRUE, BEFORE, MODEL, MARK = (196, 203, 211), (222, 118, 28), (138, 120, 160), (20, 104, 168), (190, 30, 60)
LINES = {0.1: (20, 104, 168), 0.3: (52, 152, 150), 1.0: (222, 150, 28), 10.0: (222, 86, 60), 80.0: (120, 60, 130)}
EXAMPLES = ((0.1, (0.02, -0.49)), (0.3, (-0.3, 0.12)), (0.7, (0.75, 0.5)), (80.0, None))  # sigma and y; None = any


def draw_figure(path: str | Path, mixture: GaussianMixture, student: Student, seed: int = 1) -> None:
    """Write the PNG: one row per observation y, columns truth, before distillation, 1, 2 and 4 steps; then curves."""
    noise = BatchNoise(seed, 1)
    columns = ["true posterior", "before distillation", *SCHEDULES]
    width = LEFT + len(columns) * (PANEL + GAP) + GAP
    curve_top = TOP + len(EXAMPLES) * (PANEL + GAP) + 46
    canvas = Image.new("RGB", (width, curve_top + 250), PAPER)
    pen = ImageDraw.Draw(canvas)
    density = _density(mixture)
    for column, title in enumerate(columns):
        _text(pen, (LEFT + column * (PANEL + GAP) + PANEL / 2, TOP - 20), title, 21, anchor="mm")
    for row, (sigma, position) in enumerate(EXAMPLES):
        top = TOP + row * (PANEL + GAP)
        y = torch.tensor(position or (0.0, 0.0)).reshape(1, 2, 1, 1)
        _text(pen, (LEFT / 2, top + PANEL / 2 - 14), f"sigma {sigma:g}", 23, anchor="mm")
        _text(pen, (LEFT / 2, top + PANEL / 2 + 14), "given y" if position else "unconditional", 16, MUTED, anchor="mm")
        for column, points in enumerate(_draws(mixture, student, y, sigma, noise)):
            color = TRUE if column == 0 else BEFORE if column == 1 else MODEL
            panel = _panel(density, points, color, position, sigma)
            canvas.paste(panel, (LEFT + column * (PANEL + GAP), top))
    middle = (width + GAP) // 2
    energies = {
        f"sigma {s:g}": [(e["iteration"], e[f"energy_{s:g}"]) for e in student.curves if f"energy_{s:g}" in e]
        for s in LINES
    }
    losses = {
        name: [(e["iteration"], e[name]) for e in student.curves if name in e]
        for name in ("disc_real", "disc_fake", "gan")
    }
    energy_colors = dict(zip(energies, LINES.values(), strict=True))
    loss_colors = dict(zip(losses, (MODEL, TRUE, LINES[80.0]), strict=True))
    _curves(
        pen,
        (LEFT, curve_top, middle - 40, curve_top + 190),
        energies,
        energy_colors,
        f"energy distance to the truth, 1 step / floor ({PROBE_SAMPLES} draws)",
        log=True,
    )
    _curves(
        pen,
        (middle + 60, curve_top, width - GAP - 90, curve_top + 190),
        losses,
        loss_colors,
        "adversarial losses",
        log=False,
    )
    data = io.BytesIO()
    canvas.quantize(256, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE).save(data, format="PNG", optimize=True)
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


def _density(mixture: GaussianMixture) -> np.ndarray:
    """The data's density over a panel, largest value 1, [PANEL,PANEL]."""
    axis = (torch.arange(PANEL, dtype=torch.float64) + 0.5) / PANEL * 2 - 1
    vertical, horizontal = torch.meshgrid(-axis * EXTENT, axis * EXTENT, indexing="ij")
    points = torch.stack([horizontal, vertical], -1).reshape(-1, 2, 1, 1)
    prior = mixture.prior()
    values = torch.cat([prior.log_prob(part) for part in points.split(8192)]).exp().reshape(PANEL, PANEL)
    return (values / values.max()).numpy()


def _panel(
    density: np.ndarray, points: Tensor, color: Sequence[int], y: Sequence[float] | None, sigma: float
) -> Image.Image:
    """Points [n,2] over the data's density, with a cross at y and a circle of radius sigma around it."""
    size = PANEL * OVERSAMPLING
    panel = np.asarray(PAPER) + density[..., None] ** 0.7 * 0.75 * (np.asarray(DATA) - PAPER)
    cells = ((points.numpy() * [1, -1] / EXTENT + 1) / 2 * size).astype(int)
    cells = cells[((cells >= 0) & (cells < size)).all(1)]
    counts = np.zeros((size, size), np.float32)
    np.add.at(counts, (cells[:, 1], cells[:, 0]), 1)
    dot = _disc(2.1 * OVERSAMPLING)
    ink = np.fft.irfft2(np.fft.rfft2(counts) * np.fft.rfft2(dot, s=counts.shape), s=counts.shape)
    ink = np.roll(ink, (-(dot.shape[0] // 2),) * 2, (0, 1)).clip(0)
    ink = ink.reshape(PANEL, OVERSAMPLING, PANEL, OVERSAMPLING).mean((1, 3))
    cover = 1 - 0.42**ink
    panel = panel + cover[..., None] * (np.asarray(color) - panel)
    image = Image.fromarray(panel.clip(0, 255).astype(np.uint8)).resize((size, size), Image.Resampling.NEAREST)
    pen = ImageDraw.Draw(image)
    if y is not None:
        x, v, radius = (y[0] / EXTENT + 1) / 2 * size, (1 - y[1] / EXTENT) / 2 * size, sigma / EXTENT / 2 * size
        pen.ellipse((x - radius, v - radius, x + radius, v + radius), outline=MARK, width=OVERSAMPLING)
        for dx, dy in ((1, 1), (1, -1)):
            arm = 5 * OVERSAMPLING
            pen.line((x - dx * arm, v - dy * arm, x + dx * arm, v + dy * arm), fill=MARK, width=2 * OVERSAMPLING)
    pen.rectangle((0, 0, size - 1, size - 1), outline=DATA, width=OVERSAMPLING)
    return image.resize((PANEL, PANEL), Image.Resampling.BOX)


def _disc(radius: float) -> np.ndarray:
    reach = np.arange(-math.ceil(radius), math.ceil(radius) + 1)
    return (np.hypot(reach[:, None], reach[None]) <= radius).astype(np.float32)


def _curves(pen, box, series, colors, title: str, *, log: bool) -> None:
    """Lines over the training iterations, each named at its end."""
    left, top, right, bottom = box
    series = {name: points for name, points in series.items() if points}
    _text(pen, (left, top - 22), title, 19, anchor="lm")
    pen.line((left, top, left, bottom, right, bottom), fill=MUTED, width=1)
    if not series:
        return
    values = [v for points in series.values() for _, v in points]
    last = max(i for points in series.values() for i, _ in points)
    low, high = (1.0, max(values)) if log else (min(values), max(values))
    high = max(high, low * 1.1 + 1e-6)

    def place(iteration: float, value: float) -> tuple[float, float]:
        share = math.log(max(value, low) / low) / math.log(high / low) if log else (value - low) / (high - low)
        return left + iteration / last * (right - left), bottom - share * (bottom - top)

    ticks = [10**k * m for k in range(3) for m in (1, 3)] if log else [k / 10 for k in range(20)]
    for tick in ticks:
        if low <= tick <= high:
            _, v = place(0, tick)
            pen.line((left, v, right, v), fill=(232, 235, 238), width=1)
            _text(pen, (left - 8, v), f"{tick:.3g}", 14, MUTED, anchor="rm")
    for share in (0.5, 1.0):
        _text(pen, (left + share * (right - left), bottom + 14), f"{share * last:.0f}", 14, MUTED, anchor="mm")
    _text(pen, (left, bottom + 14), "iteration", 14, MUTED, anchor="lm")
    ends = []
    for name, points in series.items():
        pen.line([place(i, v) for i, v in points], fill=colors[name], width=3, joint="curve")
        ends.append([place(*points[-1])[1], name])
    ends.sort()
    for i in range(1, len(ends)):
        ends[i][0] = max(ends[i][0], ends[i - 1][0] + 16)
    excess = max(0.0, ends[-1][0] - bottom + 4)
    for v, name in ends:
        _text(pen, (right + 8, v - excess), name, 15, colors[name], anchor="lm")


def _text(pen, position, text: str, size: int, color=INK, anchor: str = "la") -> None:
    pen.text(position, text, fill=color, font=ImageFont.load_default(size), anchor=anchor)
