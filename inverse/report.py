"""One page, readable without a network, that shows the results of posterior_sample.py."""

import base64
import json
import math
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath
from typing import Any

import jinja2
import numpy as np

from data.pictures import encode_png
from dnnlib.files import atomic_write
from inverse.evaluation import Results
from inverse.operators.base import Operator
from inverse.results import ImageResult, Scores, flatten, read_picture
from inverse.tasks import Task

_TEMPLATES = Path(__file__).resolve().parent / "templates"
_MEASURES = {  # key: title, direction, format
    "psnr": ("PSNR", "dB, higher is better", "{:.2f}"),
    "ssim": ("SSIM", "higher is better", "{:.3f}"),
    "lpips": ("LPIPS", "lower is better", "{:.3f}"),
    "residual": ("Residual", "close to the noise is best", "{:.4f}"),
}

# Stops of the colour map for errors and deviations in OKLab: L in equal steps, also when printed in grey, then a and b,
# whose hue runs from violet over red to yellow.
_STOPS = ([0.16, 0.36, 0.56, 0.76, 0.96], [0.02, 0.10, 0.18, 0.08, -0.02], [-0.06, -0.10, 0.01, 0.12, 0.08])
_LAB_TO_CONES = np.array(  # Ottosson, "A perceptual color space for image processing", 2020
    [[1, 0.3963377774, 0.2158037573], [1, -0.1055613458, -0.0638541728], [1, -0.0894841775, -1.2914855480]]
)
_CONES_TO_RGB = np.array(
    [
        [4.0767416621, -3.3077115913, 0.2309699292],
        [-1.2684380046, 2.6097574011, -0.3413193965],
        [-0.0041960863, -0.7034186147, 1.7076147010],
    ]
)


@dataclass
class Pictures:
    """What is shown of one image, uint8 [C,H,W], and its deviations, float32 [H,W], in units of images in [-1, 1]."""

    result: ImageResult
    measurement: np.ndarray
    samples: dict[int, np.ndarray]  # by run
    truth: np.ndarray | None = None
    mean: np.ndarray | None = None
    std: np.ndarray | None = None
    error: np.ndarray | None = None  # of the mean, or of the only sample

    def __len__(self) -> int:
        others = (self.measurement, self.truth, self.mean, self.std, self.error)
        return len(self.samples) + sum(picture is not None for picture in others)


def write_report(
    outdir: Path,  # where the pictures are
    results: Results,
    task: Task,
    operator: Operator,
    options: dict[str, Any],  # resolved, as in options.json: shown as they are
    *,
    max_images: int = 24,  # the first ones are shown
    samples_per_image: int = 3,  # the chosen run and the oracle's come first, if shown at all
) -> Path:
    """Write OUTDIR/report.html, one self-contained page, and return its path. Raises ResultsError, naming the file, for
    pictures that are missing or damaged; an older report then stays.
    """
    shown = [_load_pictures(outdir, r, results.has_truth, samples_per_image) for r in results.images[:max_images]]
    loader = jinja2.FileSystemLoader(_TEMPLATES)
    environment = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined)
    environment.trim_blocks = environment.lstrip_blocks = True
    png = lambda image: base64.b64encode(encode_png(image, {"optimize": True})).decode()  # noqa: E731
    environment.filters |= {"scores": _scores, "text": _format, "png": png, "coloured": colour_map}
    maps = [array.ravel() for pictures in shown for array in (pictures.std, pictures.error) if array is not None]
    top = float(np.quantile(np.concatenate(maps), 0.995)) if maps else 0.0  # of the one scale, rounded up to 0.05
    title, sentence = describe_task(task, operator)
    files = {label: outdir / f"{label.split()[-1].lower()}.png" for label in ("Blur kernel", "Mask")}
    page = environment.get_template("report.html").render(
        results=results,
        title=title,
        sentence=sentence,
        noise=f"{task.noise:g}" if results.has_truth else None,
        net=PureWindowsPath(str(options.get("net", ""))).name,
        options=options,
        settings=[(k, v if isinstance(v, str) else json.dumps(v)) for k, v in flatten(options).items()],
        measures={key: _MEASURES[key] for key in results.measures},
        of_operator={label: read_picture(file) for label, file in files.items() if file.exists()},
        shown=shown,
        scale_top=max(0.05, math.ceil(top * 20 - 1e-6) / 20) if maps else None,
        scale=np.linspace(0, 1, 256)[None],
    )
    with atomic_write(outdir / "report.html") as file:
        file.write(page.encode("utf-8", "replace"))
    return outdir / "report.html"


def colour_map(values: np.ndarray) -> np.ndarray:
    """Colours, uint8 [3,…], of values of any shape; those outside [0, 1] take the colour of the nearer end."""
    lab = np.stack([np.interp(values, np.linspace(0, 1, len(stops)), stops) for stops in _STOPS])
    linear = np.tensordot(_CONES_TO_RGB, np.tensordot(_LAB_TO_CONES, lab, 1) ** 3, 1).clip(0, 1)
    srgb = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    return np.rint(255 * srgb).astype(np.uint8)


def describe_task(task: Task, operator: Operator) -> tuple[str, str]:
    """Return a title and a sentence about the measurement."""
    title = task.name.removesuffix("_circ").replace("_", " ").strip() or str(task.operator["name"]).replace("_", " ")
    if operator.ratio and operator.ratio[1:] not in title:
        title = f"{title} {operator.ratio}"
    return title[:1].upper() + title[1:], operator.description or task.description


def _load_pictures(outdir: Path, result: ImageResult, has_truth: bool, count: int) -> Pictures:
    """Read the pictures of one image, `count` samples of it, and work out its deviations."""

    def read(folder: str, shape: tuple[int, ...] | None = None) -> np.ndarray:
        return read_picture(outdir / folder / f"{result.name}.png", shape)

    runs = range(len(result.runs))
    order = list(dict.fromkeys(run for run in (result.chosen_run, result.oracle_run, *runs) if run is not None))
    estimate = read(f"samples/run_{order[0]}")
    shape = estimate.shape
    samples = {run: read(f"samples/run_{run}", shape) for run in sorted(order[:count])}
    pictures = Pictures(result, read("measurements"), samples)
    if len(runs) > 1:
        pictures.mean = estimate = read("mean", shape)
        std, top = read("std", shape), result.std_max
        if top is not None and math.isfinite(top):
            pictures.std = std.mean(axis=0, dtype=np.float32) * np.float32(top / 255)
    if has_truth:
        pictures.truth = read("truth", shape)
        difference = np.abs(estimate.astype(np.float32) - pictures.truth.astype(np.float32))
        pictures.error = difference.mean(axis=0) / np.float32(127.5)
    return pictures


def _format(value: float, measure: str) -> str:
    return _MEASURES[measure][2].format(value) if math.isfinite(value) else "–"


def _scores(scores: Scores) -> list[tuple[str, str]]:
    return [(title, _format(scores[key], key)) for key, (title, *_) in _MEASURES.items() if key in scores]
