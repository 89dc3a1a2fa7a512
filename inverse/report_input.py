"""Reading and checking the output folder of posterior_sample.py for its report."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import numpy as np

from generation.pictures import read_image

METRICS = ("psnr", "ssim", "lpips", "residual")


class ReportError(ValueError):
    """A file of the output folder is missing, damaged or does not hold what it should."""


@dataclass
class LoadedImage:
    """The pictures of one image, uint8 [C,H,W], and its deviations, float32 [H,W] in units of images in [-1, 1]."""

    record: dict[str, Any]
    measurement: np.ndarray
    samples: dict[int, np.ndarray]  # by run
    truth: np.ndarray | None = None
    mean: np.ndarray | None = None
    std: np.ndarray | None = None
    error: np.ndarray | None = None  # of the mean, or of the only sample


def get(record: dict[str, Any], key: str, kind: type, where: str) -> Any:
    value = record.get(key)
    if not isinstance(value, kind) or (kind is int and (isinstance(value, bool) or value < 0)):
        expected = {int: "a whole number", bool: "true or false", dict: "an object", list: "a list", str: "text"}[kind]
        raise ReportError(f"{where}{key} must be {expected}" + ("" if key in record else "; it is missing"))
    return value


def number(record: dict[str, Any], key: str, where: str) -> float | None:
    """A finite number, or None where it is null, absent or not finite."""
    value = record.get(key)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ReportError(f"{where}{key} must be a number or null")
    return float(value) if abs(value) < 1e300 else None


def check_record(record: Any, runs: int, where: str) -> None:
    """Raises ReportError unless this is an entry of `images` whose name cannot leave the folder."""
    if not isinstance(record, dict):
        raise ReportError(f"{where} must be an object")
    name = get(record, "name", str, f"{where}: ")
    if (
        name in ("", ".", "..")
        or any(ord(c) < 32 for c in name)
        or any(kind(name).name != name for kind in (PurePosixPath, PureWindowsPath))
    ):
        raise ReportError(f"{where}: {name!r} is not a plain file name")
    results = get(record, "runs", list, f"{where}: ")
    if len(results) != runs or not all(isinstance(result, dict) for result in results):
        raise ReportError(f"{where}: runs must be a list of {runs} objects")
    for j, result in enumerate(results):
        for key in METRICS:
            number(result, key, f"{where}: runs[{j}]: ")
    for key in ("chosen_run", "oracle_run"):
        if record.get(key) is not None and get(record, key, int, f"{where}: ") >= runs:
            raise ReportError(f"{where}: {key} must be below the number of runs, {runs}")
    if runs > 1 and record.get("posterior_mean") is not None:
        for key in METRICS:
            number(get(record, "posterior_mean", dict, f"{where}: "), key, f"{where}: posterior_mean: ")
    if (number(record, "std_max", f"{where}: ") or 0) < 0:
        raise ReportError(f"{where}: std_max must not be negative")
    if record.get("retries") is not None:
        get(record, "retries", int, f"{where}: ")


def read_png(path: Path, shape: tuple[int, ...] | None = None) -> np.ndarray:
    """A picture as uint8 [C,H,W]; ReportError if it is missing, damaged or not of this height and width."""
    try:
        image = read_image(path)
    except FileNotFoundError:
        raise ReportError(f"{path}: missing, though metrics.json names this image") from None
    except Exception as error:  # Pillow's decoders raise many kinds for damaged data
        raise ReportError(f"{path}: damaged or not a PNG ({type(error).__name__})") from None
    if shape is not None and image.shape[1:] != shape:
        raise ReportError(f"{path}: {image.shape[2]}x{image.shape[1]} pixels, where {shape[1]}x{shape[0]} are expected")
    return image


def load_images(outdir: Path, record: dict[str, Any], runs: int, has_truth: bool, count: int) -> LoadedImage:
    """Read the pictures of one image and work out its deviations."""
    file = f"{record['name']}.png"
    marked = [record.get(key) for key in ("chosen_run", "oracle_run")]
    order = list(dict.fromkeys([run for run in marked if run is not None] + list(range(runs))))
    first = read_png(outdir / "samples" / f"run_{order[0]}" / file)
    shape = first.shape[1:]
    samples = {run: read_png(outdir / "samples" / f"run_{run}" / file, shape) for run in sorted(order[:count])}
    images = LoadedImage(record, read_png(outdir / "measurements" / file), samples)
    if has_truth:
        images.truth = read_png(outdir / "truth" / file, shape)
    if runs > 1:
        images.mean = read_png(outdir / "mean" / file, shape)
        picture, top = read_png(outdir / "std" / file, shape), number(record, "std_max", "")
        images.std = None if top is None else picture.mean(axis=0, dtype=np.float32) * np.float32(top / 255)
    if images.truth is not None:
        estimate = first if images.mean is None else images.mean
        difference = np.abs(estimate.astype(np.float32) - images.truth.astype(np.float32))
        images.error = difference.mean(axis=0) / np.float32(127.5)
    return images
