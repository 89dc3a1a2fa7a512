"""One page, readable without a network, that shows the results of posterior_sample.py."""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path, PureWindowsPath
from typing import Any

import jinja2
import numpy as np

from data.pictures import encode_png
from dnnlib.files import atomic_write
from inverse.json_files import JsonFileError, read_json
from inverse.report_input import LoadedImage, ReportError, check_record, get, load_images, number, read_png

_TEMPLATES = Path(__file__).resolve().parent / "templates"
_METRICS = {  # key: title, direction, format
    "psnr": ("PSNR", "dB, higher is better", "{:.2f}"),
    "ssim": ("SSIM", "higher is better", "{:.3f}"),
    "lpips": ("LPIPS", "lower is better", "{:.3f}"),
    "residual": ("Residual", "close to the noise is best", "{:.4f}"),
}
_SMALL = 128  # pixels; images below are magnified without smoothing

# Stops of the colour map for errors and deviations in OKLab (L, a, b). Lightness rises in equal steps, hence also when
# printed in grey; hue runs from violet over red to yellow.
_OKLAB_STOPS = np.array(
    [[0.16, 0.02, -0.06], [0.36, 0.10, -0.10], [0.56, 0.18, 0.01], [0.76, 0.08, 0.12], [0.96, -0.02, 0.08]]
)


@dataclass
class Figure:
    """One picture of a card."""

    label: str
    src: str  # data: URL
    alt: str
    pixelated: bool
    note: str = ""
    tags: list[str] = field(default_factory=list)
    scores: list[tuple[str, str]] = field(default_factory=list)  # (name, value)
    has_scale: bool = False  # drawn in the colour map


@dataclass
class Card:
    """All pictures of one image."""

    name: str
    figures: list[Figure]
    remark: str


def write_report(
    outdir: str | Path,  # written by posterior_sample.py
    *,
    max_images: int = 24,  # the first ones are shown
    samples_per_image: int = 3,  # the chosen run and the oracle's come first, if shown at all
) -> Path:
    """Write OUTDIR/report.html, one self-contained page, and return its path.

    Reads options.json, metrics.json and the pictures. Deviations (std_max in metrics.json) and errors are in units of
    images in [-1, 1]. Raises ReportError, naming the file, for anything missing or damaged; an older report is then
    kept as it is.
    """
    for name, value in (("max_images", max_images), ("samples_per_image", samples_per_image)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ReportError(f"{name} must be a whole number of at least 1, not {value!r}")
    outdir = Path(outdir)
    try:
        options, metrics = (
            read_json(outdir / name, "write_report needs a folder written by posterior_sample.py")
            for name in ("options.json", "metrics.json")
        )
    except JsonFileError as error:
        raise ReportError(str(error)) from None
    where = f"{outdir / 'metrics.json'}: "
    records = get(metrics, "images", list, where)
    runs = get(metrics, "runs", int, where)
    if runs < 1:
        raise ReportError(f"{where}runs must be at least 1")
    has_truth = get(metrics, "has_truth", bool, where)
    for i, record in enumerate(records):
        check_record(record, runs, f"{where}images[{i}]")
    task_options = get(options, "task", dict, f"{outdir / 'options.json'}: ")
    operator = get(task_options, "operator", dict, f"{outdir / 'options.json'}: task: ")
    noise = number(task_options, "noise", f"{outdir / 'options.json'}: task: ") if has_truth else None
    loaded = [load_images(outdir, record, runs, has_truth, samples_per_image) for record in records[:max_images]]
    top = _scale_top(loaded)
    title, sentence = describe_task(
        str(task_options.get("name", "")), operator, str(task_options.get("description") or "")
    )
    total = max(get(metrics, "num_images", int, where), len(records))
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template("report.html").render(
        title=title,
        sentence=sentence,
        noise=None if noise is None else f"{noise:g}",
        net=PureWindowsPath(str(options.get("net", ""))).name,
        seed=options.get("seed"),
        runs=runs,
        has_truth=has_truth,
        shown=len(loaded),
        finished=len(records),
        total=total,
        columns=_columns(metrics, has_truth, where),
        rows=_summary(metrics, runs, has_truth, where),
        retries=number(metrics, "langevin_retries", where) or 0,
        lpips=_lpips_note(metrics, has_truth, where),
        calibration=_calibration(metrics, where),
        pictures=[figure for name in ("kernel", "mask") if (figure := _picture(outdir / f"{name}.png", name))],
        cards=[_card(images, top, noise) for images in loaded],
        scale_top=None if top is None else f"{top:g}",
        scale_src=_data_url(colour_map(np.linspace(0, 1, 256))[:, None, :]),
        settings=list(_flatten(options)),
    )
    path = outdir / "report.html"
    with atomic_write(path) as file:
        file.write(page.encode("utf-8", "replace"))
    return path


def colour_map(values: np.ndarray) -> np.ndarray:
    """Colours, uint8 [3,…], of values in [0, 1] of any shape; lightness rises evenly in OKLab (Ottosson 2020).

    Values outside take the colour of the nearer end.
    """
    place = np.linspace(0, 1, len(_OKLAB_STOPS))
    lightness, a, b = (np.interp(values, place, stop) for stop in _OKLAB_STOPS.T)
    long = (lightness + 0.3963377774 * a + 0.2158037573 * b) ** 3
    medium = (lightness - 0.1055613458 * a - 0.0638541728 * b) ** 3
    short = (lightness - 0.0894841775 * a - 1.2914855480 * b) ** 3
    linear = np.stack(
        [
            4.0767416621 * long - 3.3077115913 * medium + 0.2309699292 * short,
            -1.2684380046 * long + 2.6097574011 * medium - 0.3413193965 * short,
            -0.0041960863 * long - 0.7034186147 * medium + 1.7076147010 * short,
        ]
    ).clip(0, 1)
    srgb = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    return np.rint(255 * srgb).astype(np.uint8)


def describe_task(name: str, operator: dict[str, Any], description: str = "") -> tuple[str, str]:
    """Return a title and a sentence about the measurement, for an operator's name and parameters."""
    kind, sentence = operator.get("name"), description
    title = name.removesuffix("_circ").replace("_", " ").strip() or str(kind).replace("_", " ")
    if kind == "inpainting":
        if isinstance(operator.get("box"), list):
            size = " × ".join(str(v) for v in operator["box"][2:])
            sentence = f"A box of {size} pixels was removed from each image."
        elif isinstance(operator.get("fraction"), float):
            share = f"{operator['fraction']:.0%}"
            sentence = f"{share} of the pixels, drawn at random, were removed, the same ones in every image."
        else:
            sentence = "The pixels outside a mask were removed from each image."
    elif kind == "gaussian_blur_circ":
        sentence = f"Each image was blurred by a Gaussian of {operator.get('std', 3.0)} pixels, wrapping at the border."
    elif kind == "motion_blur_circ":
        sentence = "Each image was blurred by random camera shake, wrapping around at the border."
    elif kind == "super_resolution":
        factor = operator.get("factor", 4)
        title = f"{title} ×{factor}" if str(factor) not in title else title
        sentence = f"Each image was shrunk {factor} times in height and width by antialiased bicubic interpolation."
    elif kind == "phase_retrieval":
        sentence = (
            "Only the magnitude of each image's oversampled Fourier transform was measured; its phase is lost. An "
            "image and its copy turned by 180 degrees have the same magnitude, which is drawn on a logarithmic scale."
        )
    elif kind == "high_dynamic_range":
        scale = operator.get("scale", 2.0)
        sentence = f"Each image was overexposed: pixel values were multiplied by {scale} and clipped to the range."
    elif kind == "nonlinear_blur":
        sentence = "Each image was blurred by camera shake in linear light, as in a camera, and encoded again."
    return title[:1].upper() + title[1:], sentence


# ---------------------------------------------------------------------------------------------------------------------
# What the page says


def _columns(metrics: dict[str, Any], has_truth: bool, where: str) -> list[tuple[str, str, str]]:
    """Key, title and direction of the metrics in the table: those that were computed."""
    rows = [row for row in get(metrics, "summary", dict, where).values() if isinstance(row, dict)]
    keys = [key for key in _METRICS if key == "residual" or has_truth and any(key in row for row in rows)]
    return [(key, *_METRICS[key][:2]) for key in keys]


def _summary(metrics: dict[str, Any], runs: int, has_truth: bool, where: str) -> list[tuple[str, str, list[Any]]]:
    """Title, explanation and (mean, deviation) per column of each row of the table of averages."""
    summary = get(metrics, "summary", dict, where)
    titles = {"sample": ("One sample", "average over all images and runs" if runs > 1 else "average over all images")}
    if runs > 1:
        titles["posterior_mean"] = ("Posterior mean", f"the mean of {runs} samples")
        titles["chosen"] = ("Chosen by residual", "the run with the smallest residual; needs no truth")
        if has_truth:
            titles["oracle"] = (
                "Oracle: needs the truth",
                f"the best of {runs} runs by PSNR to the truth; not a result",
            )
    rows = []
    for key, (title, explanation) in titles.items():
        if key not in summary:
            continue
        record, cells = get(summary, key, dict, f"{where}summary: "), []
        for metric, *_ in _columns(metrics, has_truth, where):
            cell = record.get(metric)
            if not isinstance(cell, dict | None):
                raise ReportError(f"{where}summary: {key}: {metric} must be an object")
            values = (number(cell or {}, k, f"{where}summary: {key}: {metric}: ") for k in ("mean", "std"))
            cells.append(tuple(_format(metric, value) for value in values))
        rows.append((title, explanation, cells))
    return rows


def _lpips_note(metrics: dict[str, Any], has_truth: bool, where: str) -> str:
    """Which LPIPS this is, or why there is none."""
    lpips = get(metrics, "lpips", dict, where)
    if not has_truth:
        return ""
    if get(lpips, "computed", bool, f"{where}lpips: "):
        return str(lpips.get("name") or "")
    return ": ".join(["LPIPS was not computed", *filter(None, [str(lpips.get("note") or "")])])


def _calibration(metrics: dict[str, Any], where: str) -> dict[str, Any] | None:
    if metrics.get("calibration") is None:
        return None
    record = get(metrics, "calibration", dict, where)
    values = {key: number(record, key, f"{where}calibration: ") for key in ("interval", "coverage", "expected")}
    if any(value is None or not 0 <= value <= 1 for value in values.values()):
        raise ReportError(f"{where}calibration: interval, coverage and expected must be numbers in [0, 1]")
    lack = values["expected"] - values["coverage"]
    verdict = "The spread of the samples is about right."
    if abs(lack) > 0.05:
        verdict = f"The samples are {'over-confident: they spread too little' if lack > 0 else 'spread too widely'}."
    return {**values, "runs": record.get("runs"), "verdict": verdict}


def _flatten(options: dict[str, Any], prefix: str = "") -> Iterable[tuple[str, str]]:
    for key, value in options.items():
        if isinstance(value, dict) and value:
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value if isinstance(value, str) else json.dumps(value)


def _format(metric: str, value: float | None) -> str:
    return "–" if value is None else _METRICS[metric][2].format(value)


def _scores(record: dict[str, Any] | None) -> list[tuple[str, str]]:
    """The metrics that were computed, as text. `record` was checked."""
    found = {key: number(record, key, "") for key in _METRICS if key in record} if record else {}
    return [(_METRICS[key][0], _format(key, value)) for key, value in found.items()]


# ---------------------------------------------------------------------------------------------------------------------
# Pictures


def _scale_top(loaded: list[LoadedImage]) -> float | None:
    """Upper end of the one scale of all errors and deviations: their 99.5 % quantile, rounded up to 0.05."""
    maps = [array.ravel() for images in loaded for array in (images.std, images.error) if array is not None]
    if not maps:
        return None
    return max(0.05, math.ceil(float(np.quantile(np.concatenate(maps), 0.995)) * 20 - 1e-6) / 20)


def _data_url(image: np.ndarray) -> str:
    """A picture, uint8 [C,H,W], as a data: URL."""
    return "data:image/png;base64," + base64.b64encode(encode_png(image, {"optimize": True})).decode()


def _figure(label: str, image: np.ndarray, alt: str, **rest: Any) -> Figure:
    return Figure(label, _data_url(image), alt, pixelated=max(image.shape[1:]) < _SMALL, **rest)


def _picture(path: Path, name: str) -> Figure | None:
    """The kernel or mask, if there is one."""
    if not path.exists():
        return None
    image = read_png(path)
    size = f"{image.shape[2]} × {image.shape[1]} pixels"
    label, note = ("Blur kernel", size) if name == "kernel" else ("Mask", f"{size}, white = measured")
    return _figure(label, image, f"{label} of {size}", note=note)


def _card(images: LoadedImage, top: float | None, noise: float | None) -> Card:
    record, figures = images.record, []
    name = record["name"]
    if images.truth is not None:
        figures.append(_figure("Truth", images.truth, f"Ground truth of image {name}"))
    height, width = images.measurement.shape[1:]
    note = f"{width} × {height}" + ("" if noise is None else f", noise {noise:g}")
    figures.append(_figure("Measurement", images.measurement, f"Measurement of image {name}", note=note))
    several = len(record["runs"]) > 1
    for run, sample in images.samples.items():
        tags = ["chosen by residual"] * (several and record.get("chosen_run") == run)
        tags += ["oracle"] * (several and images.truth is not None and record.get("oracle_run") == run)
        label = f"Sample {run}" if several else "Sample"
        alt = f"Posterior sample {run} of image {name}" + (f" ({', '.join(tags)})" if tags else "")
        figures.append(_figure(label, sample, alt, tags=tags, scores=_scores(record["runs"][run])))
    if images.mean is not None:
        scores = _scores(record.get("posterior_mean"))
        figures.append(_figure("Mean", images.mean, f"Mean of the samples of image {name}", scores=scores))
    estimate = "|mean − truth|" if images.mean is not None else "|sample − truth|"
    deviations = (
        ("Std", images.std, "Standard deviation of the samples"),
        ("Error", images.error, "Absolute error"),
    )
    for label, values, words in deviations:
        if values is not None and top is not None:
            scores = [("largest", f"{values.max():.3f}"), ("average", f"{values.mean():.3f}")]
            note = estimate if values is images.error else ""
            alt = f"{words} of image {name}"
            figures.append(_figure(label, colour_map(values / top), alt, note=note, scores=scores, has_scale=True))
    retries = record.get("retries") or 0
    remark = f"Langevin steps diverged and were repeated with smaller ones: {retries} times" if retries else ""
    return Card(name, figures, remark)
