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
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dnnlib.files import atomic_write, lock_folder, write_json
from generation.pictures import save_image
from inverse.json_files import JsonFileError, read_json
from inverse.operators.base import Operator
from inverse.solve import Solution
from networks.encoders import RGBEncoder

LEVEL = 0.9  # of the samples' central interval, for the calibration
_RESUMABLE = ("batch", "device", "num", "net")  # options that a restart may change
_OF_IMAGES = ("truth", "measurements", "samples", "mean", "std", "records", "metrics.json")
_OF_OPERATORS = ("kernel.png", "mask.png")
_SHARES = ("interval", "coverage")  # of records
_NUMBERS = ("residual", "std_max", "mean_residual", *_SHARES)


class ResultsError(ValueError):
    """An output folder cannot be used; the message is one line that says why."""


class ResultsFolder:
    """Writes one image's results at a time, each file whole or not at all."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def begin(self, options: dict[str, Any], operator: Operator, size: tuple[int, int]) -> None:
        """Create the folder, or check that it holds results of the same options, or none yet; keep other processes out
        as long as this object lives.

        Raises ResultsError, naming what differs, where it does not, and FolderInUseError where another process does so.
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
            before = self._read(file, "use another folder")
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

    def record(self, name: str) -> dict[str, Any] | None:
        """Return what was recorded of a finished image, or None, also where one of its pictures is gone.

        Raises ResultsError for a damaged record.
        """
        path = self.path / "records" / f"{name}.json"
        if not path.exists():
            return None
        advice = "remove it, and the image is drawn again"
        record = self._read(path, advice)
        runs = record.get("runs")
        whole = record.get("name") == name and type(record.get("retries")) is int and isinstance(runs, list) and runs
        if not whole or not all(isinstance(run, dict) and "residual" in run for run in runs):
            raise ResultsError(f"{path}: damaged, not the record of {name}; {advice}")
        if len(runs) > 1 and "mean_residual" not in record:
            raise ResultsError(f"{path}: damaged, without the posterior mean; {advice}")
        named = [*record.items(), *(item for run in runs for item in run.items())]
        wrong = [key for key, value in named if key in _NUMBERS and not _is_number(value, null=key not in _SHARES)]
        wrong += [key for key in _SHARES if key not in record and any(other in record for other in _SHARES)]
        if wrong:
            raise ResultsError(f"{path}: damaged, {wrong[0]} is not a number that it can be; {advice}")
        folders = [f"samples/run_{run}" for run in range(len(runs))] + ["mean"] * (len(runs) > 1)
        folders += ["truth"] * bool(record.get("has_truth"))
        return record if all((self.path / folder / f"{name}.png").exists() for folder in folders) else None

    @staticmethod
    def _read(path: Path, advice: str) -> dict[str, Any]:
        try:
            return read_json(path, advice)
        except JsonFileError as error:
            raise ResultsError(str(error)) from None

    def write(self, solution: Solution, operator: Operator) -> dict[str, Any]:
        """Write the files of one image and return its record."""
        problem, samples = solution.problem, solution.samples.float()
        runs = len(samples)
        y = problem.y.cpu()[None]
        self._image("measurements", problem.name, _measurement_picture(y[0], operator.measures_images))
        with atomic_write(self._file("measurements", f"{problem.name}.npz")) as file:
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
        write_json(self._file("records", f"{problem.name}.json"), record)
        return record

    def _write_operator(self, operator: Operator, size: tuple[int, int]) -> None:
        kernel, mask = getattr(operator, "kernel", None), getattr(operator, "mask", None)
        for name, found in zip(_OF_OPERATORS, (kernel, mask), strict=True):
            if found is None:  # of a task that was given up before its first image
                (self.path / name).unlink(missing_ok=True)
        if kernel is not None:
            save_image(
                self.path / "kernel.png",
                (255 * kernel / kernel.max().clamp_min(1e-12)).clamp(0, 255).to(torch.uint8)[None],
            )
        if mask is not None:
            save_image(self.path / "mask.png", (255 * mask(*size)).to(torch.uint8)[None])

    def _image(self, folder: str, name: str, pixels: Tensor) -> None:
        save_image(self._file(folder, f"{name}.png"), pixels)

    def _file(self, folder: str, name: str) -> Path:
        path = self.path / folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        return path


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


def _is_number(value: Any, *, null: bool) -> bool:
    """Whether it is a finite number, or null, which stands for one beyond float32."""
    return (null and value is None) or (type(value) in (int, float) and abs(value) < 1e300)


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
