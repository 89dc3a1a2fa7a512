"""The output folder of a posterior sampling run: what is written for each image, and what a restart finds.

options.json               resolved options and task
truth/NAME.png             the image that was measured (not with real measurements)
measurements/NAME.png|npz  a picture of y, and y itself (array y)
samples/run_J/NAME.png     posterior samples
mean/NAME.png std/NAME.png over the runs, where there are several; std is scaled to its largest value
records/NAME.json          residuals and coverage; written last, so that an image with a record is finished
kernel.png, mask.png       of the operator, where it has one
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dnnlib.files import atomic_write, lock_folder, parse_json, read_regular, write_json
from generation.pictures import read_image, save_image
from inverse.operators.base import Operator
from inverse.solve import Solution
from networks.encoders import RGBEncoder

LEVEL = 0.9  # of the samples' central interval, for the calibration
_RESUMABLE = ("batch", "device", "num", "net")  # options that a restart may change
_OF_IMAGES = ("truth", "measurements", "samples", "mean", "std", "records", "metrics.json")
_OF_OPERATORS = ("kernel.png", "mask.png")
_SHARES = ("interval", "coverage")  # of records
_MAX_BYTES = 1 << 28  # of a JSON file

Scores = dict[str, float]  # residual and, where there is a truth, psnr, ssim and lpips


class ResultsError(ValueError):
    """An output folder or a file of it cannot be used; the message is one line that says why."""


@dataclass
class ImageResult:
    """One finished image: what its record holds, and what `inverse.evaluation` adds to it."""

    name: str
    runs: list[Scores]  # of each sample
    retries: int  # Langevin steps repeated with a smaller step size, over all runs
    has_truth: bool
    std_max: float | None = None  # largest value of the std map
    interval: float | None = None  # see `coverage`
    coverage: float | None = None
    posterior_mean: Scores | None = None  # of several runs, as are the next
    chosen_run: int | None = None  # of the smallest residual
    oracle_run: int | None = None  # of the best PSNR

    def to_dict(self) -> dict[str, Any]:
        """What there is of it, as JSON data."""
        return {name: value for name, value in vars(self).items() if value is not None}


class ResultsFolder:
    """Writes one image's results at a time, each file whole or not at all."""

    def __init__(self, path: str | Path, runs: int | None = None) -> None:
        """`runs`: samples that each image must have; None = any number."""
        self.path, self._runs = Path(path), runs

    def begin(self, options: dict[str, Any], operator: Operator, size: tuple[int, int]) -> None:
        """Create the folder, or check that it holds results of the same options, or none yet; keep other processes out
        as long as this object lives.

        Raises ResultsError, naming what differs, where it does not, and ValueError where another process does so.
        """
        options = json.loads(json.dumps(options))
        self._check(options)
        self.path.mkdir(parents=True, exist_ok=True)
        self._held = lock_folder(self.path)
        self._check(options)  # of a process that ended meanwhile
        write_json(self.path / "options.json", options)
        self._write_operator(operator, size)

    def _check(self, options: dict[str, Any]) -> None:
        file = self.path / "options.json"
        if self.path.exists() and not self.path.is_dir():
            raise ResultsError(f"{self.path} is a file: give a folder")
        if file.exists():
            before = read_object(file, "use another folder")
            if not {"task", "net_sha256"} <= set(before):
                raise ResultsError(f"{file} is not of posterior_sample.py: use another folder")
            fixed = (set(options) | set(before)) - set(_RESUMABLE)
            differing = sorted(_differences({k: before.get(k) for k in fixed}, {k: options.get(k) for k in fixed}))
            if differing and self._has(*_OF_IMAGES):
                raise ResultsError(f"{self.path} holds results of other options ({'; '.join(differing)}): use another")
        elif self._has(*_OF_IMAGES, *_OF_OPERATORS):
            raise ResultsError(f"{self.path} holds results without options.json: use another folder")

    def _has(self, *names: str) -> bool:
        return any((self.path / name).exists() for name in names)

    def record(self, name: str) -> ImageResult | None:
        """Return what was recorded of a finished image, or None, also where one of its pictures is gone.

        Raises ResultsError for a damaged record.
        """
        path, advice = self.path / "records" / f"{name}.json", "remove it, and the image is drawn again"
        if not path.exists():
            return None
        record = read_object(path, advice)
        damage = _damage(record, name, self._runs)
        if damage:
            raise ResultsError(f"{path}: damaged, {damage}; {advice}")
        result = ImageResult(
            name,
            [{"residual": _or_inf(run["residual"])} for run in record["runs"]],
            record["retries"],
            bool(record.get("has_truth")),
            _or_inf(record["std_max"]) if "std_max" in record else None,
            *(record.get(key) for key in _SHARES),
        )
        folders = [f"samples/run_{run}" for run in range(len(result.runs))] + ["truth"] * result.has_truth
        if len(result.runs) > 1:
            result.posterior_mean = {"residual": _or_inf(record["mean_residual"])}
            folders.append("mean")
        return result if all((self.path / folder / f"{name}.png").exists() for folder in folders) else None

    def write(self, solution: Solution, operator: Operator) -> None:
        """Write the files of one image, its record last."""
        problem, samples = solution.problem, solution.samples.float()
        runs = len(samples)
        y = problem.y.cpu()[None]
        self._image("measurements", problem.name, _measurement_picture(y[0], operator.measures_images))
        with atomic_write(self.path / "measurements" / f"{problem.name}.npz") as file:
            np.savez(file, y=y[0].numpy())
        pixels = _to_pixels(samples)
        for run, sample in enumerate(pixels):
            self._image(f"samples/run_{run}", problem.name, sample)
        clipped = samples.clamp(-1, 1)
        residuals = operator.residual(clipped, y.expand(runs, *y.shape[1:])).tolist()
        record: dict[str, Any] = {
            "name": problem.name,
            "runs": [{"residual": value} for value in residuals],
            "retries": solution.retries,
            "has_truth": problem.truth is not None,
        }
        if runs > 1:
            mean, std = clipped.mean(dim=0), clipped.std(dim=0)
            self._image("mean", problem.name, _to_pixels(mean[None])[0])
            self._image("std", problem.name, (255 * std / std.max().clamp_min(1e-12)).to(torch.uint8))
            record["std_max"] = std.max().item()
            record["mean_residual"] = operator.residual(mean[None], y).item()
        if problem.truth is not None:
            truth = _to_pixels(problem.truth.cpu()[None])[0]
            self._image("truth", problem.name, truth)
            record.update(coverage(pixels, truth) if runs > 1 else {})
        write_json(self.path / "records" / f"{problem.name}.json", record)

    def _write_operator(self, operator: Operator, size: tuple[int, int]) -> None:
        for name in _OF_OPERATORS:
            if not hasattr(operator, Path(name).stem):  # of a task that was given up before its first image
                (self.path / name).unlink(missing_ok=True)
        if (kernel := getattr(operator, "kernel", None)) is not None:
            scaled = (255 * kernel / kernel.max().clamp_min(1e-12)).clamp(0, 255)
            save_image(self.path / "kernel.png", scaled.to(torch.uint8)[None])
        if (mask := getattr(operator, "mask", None)) is not None:
            save_image(self.path / "mask.png", (255 * mask(*size)).to(torch.uint8)[None])

    def _image(self, folder: str, name: str, pixels: Tensor) -> None:
        save_image(self.path / folder / f"{name}.png", pixels)


def read_picture(path: Path, shape: tuple[int, ...] | None = None) -> np.ndarray:
    """A picture of a finished image as uint8 [C,H,W]; users may have changed it since.

    Raises ResultsError if it is missing, damaged or not of this height and width.
    """
    try:
        image = read_image(path)
    except FileNotFoundError:
        raise ResultsError(f"{path}: missing, though the image is recorded as finished") from None
    except Exception as error:  # Pillow's decoders raise many kinds for damaged data
        raise ResultsError(f"{path}: damaged or not a PNG ({type(error).__name__})") from None
    if shape is not None and image.shape[1:] != shape:
        raise ResultsError(
            f"{path}: {image.shape[2]}x{image.shape[1]} pixels, where {shape[1]}x{shape[0]} are expected"
        )
    return image


def coverage(
    samples: Tensor,  # uint8 [R,C,H,W]
    truth: Tensor,  # uint8 [C,H,W]
) -> dict[str, float]:
    """Return the share of true pixels within the samples' central interval, as `coverage`.

    Between the k-th smallest and the k-th largest of R samples, a further draw of the same distribution lies with
    probability 1 - 2k/(R+1): `interval`, as near to 0.9 as R allows. Where samples equal the truth (8 bits; black
    pixels), their order is taken to be random and its expectation counts, so that this stays exact. `coverage` equals
    `interval` on average if the samples are calibrated; it is smaller if they are overconfident.
    """
    runs = len(samples)
    k = max(1, int((1 - LEVEL) / 2 * (runs + 1) + 1e-9))
    below, equal = (samples < truth).sum(dim=0), (samples == truth).sum(dim=0)
    ranks_inside = (below + equal).clamp(max=runs - k) - below.clamp(min=k) + 1
    share = ranks_inside.clamp(min=0) / (equal + 1).double()
    return {"interval": 1 - 2 * k / (runs + 1), "coverage": share.mean().item()}


def _damage(record: dict[str, Any], name: str, count: int | None) -> str | None:
    """What is wrong with the record of an image, in words; users edit and copy them."""
    runs, retries = record.get("runs"), record.get("retries")
    whole = isinstance(runs, list) and runs and all(isinstance(run, dict) and "residual" in run for run in runs)
    if not whole or record.get("name") != name or type(retries) is not int or retries < 0:
        return f"not the record of {name}"
    if count not in (None, len(runs)):
        return f"of {len(runs)} runs where the task has {count}"
    if len(runs) > 1 and "mean_residual" not in record:
        return "without the posterior mean"
    numbers = [("residual", run["residual"], 1e300) for run in runs]
    numbers += [(key, record[key], 1e300) for key in ("std_max", "mean_residual") if key in record]
    numbers += [(key, record.get(key), 1) for key in _SHARES if any(share in record for share in _SHARES)]
    for key, value, most in numbers:
        beyond_float32 = value is None and key not in _SHARES
        if not beyond_float32 and not (type(value) in (int, float) and 0 <= value <= most):
            return f"{key} is not a number that it can be"
    return None


def _or_inf(value: float | None) -> float:
    return math.inf if value is None else value


def read_object(path: Path, advice: str) -> dict[str, Any]:
    """The object in a JSON file. Raises ResultsError, which ends in `advice`, where it cannot be had."""
    try:
        content = parse_json(read_regular(path, _MAX_BYTES))
    except OSError as error:
        raise ResultsError(f"{path}: cannot be read ({error.strerror}); {advice}") from None
    except ValueError as error:
        raise ResultsError(f"{path}: damaged, not JSON ({str(error)[:100]}); {advice}") from None
    if not isinstance(content, dict):
        raise ResultsError(f"{path}: damaged, must hold a JSON object, not {type(content).__name__}; {advice}")
    return content


def _to_pixels(images: Tensor) -> Tensor:
    return RGBEncoder().decode(images)


def _measurement_picture(y: Tensor, is_image: bool) -> Tensor:
    if is_image:
        return _to_pixels(y[None])[0]
    shown = y.clamp_min(0).log1p()
    return (255 * shown / shown.max().clamp_min(1e-12)).to(torch.uint8)


def _differences(before: Any, now: Any, where: str = "") -> list[str]:
    if isinstance(before, dict) and isinstance(now, dict):
        keys = sorted(set(before) | set(now))
        return [d for k in keys for d in _differences(before.get(k), now.get(k), f"{where}.{k}" if where else k)]
    return [] if before == now else [f"{where}: {json.dumps(before)} there, {json.dumps(now)} now"]
