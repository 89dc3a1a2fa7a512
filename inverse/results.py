"""The output folder of a posterior sampling run: what is written for each image, and what a restart finds.

options.json               resolved options and task
truth/NAME.png             the image that was measured (not with real measurements)
measurements/NAME.png|npz  a picture of y, and y itself (array y)
samples/run_J/NAME.png     posterior samples
mean/NAME.png std/NAME.png over the runs, where there are several; std is scaled to its largest value
records/NAME.json          residuals and coverage; written last, so that an image with a record is finished
kernel.png, mask.png       of the operator, where it has one
"""

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
_MAX_BYTES = 1 << 28  # of a JSON file
_to_pixels = RGBEncoder().decode
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


class ResultsFolder:
    """Writes one image's results at a time, each file whole or not at all."""

    def __init__(self, path: str | Path, runs: int | None = None) -> None:
        """`runs`: samples that each image must have; None = any number."""
        self.path, self._runs = Path(path), runs

    def begin(self, options: dict[str, Any], operator: Operator, size: tuple[int, int]) -> None:
        """Create the folder, or check that it holds results of the same options, or none yet; keep other processes out
        as long as this object lives. Raises ResultsError, naming what differs, where it does not, and ValueError
        where another process does so.
        """
        options = json.loads(json.dumps(options))
        self._check(options)
        self.path.mkdir(parents=True, exist_ok=True)
        self._held = lock_folder(self.path)
        self._check(options)  # of a process that ended meanwhile
        write_json(self.path / "options.json", options)
        for name in _OF_OPERATORS:  # of a task that was given up before its first image
            (self.path / name).unlink(missing_ok=True)
        if hasattr(operator, "kernel"):
            save_image(self.path / "kernel.png", _scaled(operator.kernel)[None])
        if hasattr(operator, "mask"):
            save_image(self.path / "mask.png", (255 * operator.mask(*size)).to(torch.uint8)[None])

    def _check(self, options: dict[str, Any]) -> None:
        file = self.path / "options.json"
        if file.exists():
            before = read_object(file, "use another folder")
            if not {"task", "net_sha256"} <= set(before):
                raise ResultsError(f"{file} is not of posterior_sample.py: use another folder")
            old, new = (flatten({k: v for k, v in o.items() if k not in _RESUMABLE}) for o in (before, options))
            pairs = {key: (old.get(key), new.get(key)) for key in sorted(old.keys() | new.keys())}
            differing = [f"{k}: {json.dumps(a)} there, {json.dumps(b)} now" for k, (a, b) in pairs.items() if a != b]
            if differing and self._has(*_OF_IMAGES):
                raise ResultsError(f"{self.path} holds results of other options ({'; '.join(differing)}): use another")
        elif self._has(*_OF_IMAGES, *_OF_OPERATORS):
            raise ResultsError(f"{self.path} holds results without options.json: use another folder")

    def _has(self, *names: str) -> bool:
        return any((self.path / name).exists() for name in names)

    def record(self, name: str) -> ImageResult | None:
        """A finished image, or None, also where a picture of it is gone. Raises ResultsError for a damaged record."""
        path, advice = self.path / "records" / f"{name}.json", "remove it, and the image is drawn again"
        if not path.exists():
            return None
        record = read_object(path, advice)

        def number(key: str, of: dict[str, Any] = record, most: float = 1e300) -> float:
            value = of[key]
            if value is None and most > 1:  # beyond float32
                return math.inf
            if type(value) not in (int, float) or not 0 <= value <= most:
                raise ValueError(f"{key} is not a number that it can be")
            return value

        try:  # users edit and copy them
            runs, retries = [{"residual": number("residual", run)} for run in record["runs"]], record["retries"]
            if not runs or record["name"] != name or type(retries) is not int or retries < 0:
                raise KeyError
            if self._runs not in (None, len(runs)):
                raise ValueError(f"of {len(runs)} runs where the task has {self._runs}")
            result = ImageResult(name, runs, retries, bool(record.get("has_truth")))
            if "std_max" in record:
                result.std_max = number("std_max")
            if "interval" in record or "coverage" in record:
                result.interval, result.coverage = number("interval", most=1), number("coverage", most=1)
            if len(runs) > 1:
                result.posterior_mean = {"residual": number("mean_residual")}
        except (KeyError, TypeError):
            raise ResultsError(f"{path}: damaged, not the record of {name}; {advice}") from None
        except ValueError as error:
            raise ResultsError(f"{path}: damaged, {error}; {advice}") from None
        folders = [f"samples/run_{run}" for run in range(len(runs))] + ["truth"] * result.has_truth
        folders += ["mean"] * (len(runs) > 1)
        return result if all((self.path / folder / f"{name}.png").exists() for folder in folders) else None

    def write(self, solution: Solution, operator: Operator) -> None:
        """Write the files of one image, its record last."""
        problem, y = solution.problem, solution.problem.y.cpu()[None]
        pixels, clipped = _to_pixels(solution.samples), solution.samples.float().clamp(-1, 1)
        runs = len(pixels)
        residuals = operator.residual(clipped, y.expand(runs, *y.shape[1:])).tolist()
        record = {"name": problem.name, "runs": [{"residual": value} for value in residuals]}
        record |= {"retries": solution.retries, "has_truth": problem.truth is not None}
        pictures = {f"samples/run_{run}": sample for run, sample in enumerate(pixels)}
        pictures["measurements"] = _to_pixels(y[0]) if operator.measures_images else _scaled(y[0].clamp_min(0).log1p())
        if runs > 1:
            mean, std = clipped.mean(dim=0), clipped.std(dim=0)
            pictures |= {"mean": _to_pixels(mean), "std": _scaled(std)}
            record |= {"std_max": std.max().item(), "mean_residual": operator.residual(mean[None], y).item()}
        if problem.truth is not None:
            pictures["truth"] = _to_pixels(problem.truth.cpu())
            record |= coverage(pixels, pictures["truth"]) if runs > 1 else {}
        for folder, picture in pictures.items():
            save_image(self.path / folder / f"{problem.name}.png", picture)
        with atomic_write(self.path / "measurements" / f"{problem.name}.npz") as file:
            np.savez(file, y=y[0].numpy())
        write_json(self.path / "records" / f"{problem.name}.json", record)


def read_picture(path: Path, shape: tuple[int, ...] | None = None) -> np.ndarray:
    """A picture of a finished image, uint8 [C,H,W]. Raises ResultsError if missing, damaged or not of this shape."""
    try:
        image = read_image(path)
    except FileNotFoundError:
        raise ResultsError(f"{path}: missing, though the image is recorded as finished") from None
    except Exception as error:  # Pillow's decoders raise many kinds for damaged data
        raise ResultsError(f"{path}: damaged or not a PNG ({type(error).__name__})") from None
    if shape not in (None, image.shape):
        (c, h, w), (channels, height, width) = image.shape, shape
        found = f"{w}x{h} pixels, where {width}x{height} are expected"
        if (h, w) == (height, width):
            found = f"{c} channels, where {channels} are expected"
        raise ResultsError(f"{path}: {found}")
    return image


def coverage(samples: Tensor, truth: Tensor) -> dict[str, float]:
    """Return the share of true pixels, uint8 [C,H,W], within the central interval of samples [R,C,H,W], as `coverage`.

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


def flatten(options: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Options, and options within them, by dotted names."""
    found: dict[str, Any] = {}
    for key, value in options.items():
        found |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {f"{prefix}{key}": value}
    return found


def _scaled(values: Tensor) -> Tensor:
    """As uint8, the largest value white."""
    return (255 * values / values.max().clamp_min(1e-12)).clamp(0, 255).to(torch.uint8)
