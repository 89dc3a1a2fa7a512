"""Posterior means against reconstructions without a network: pseudo-inverse, quadratic smoothing, total variation.

All see the same measurements, those that posterior_sample.py wrote; what has a parameter is tuned on other images.

python bench/bench_inverse.py --results out/sr4 --results out/box --tune assets/fashion16-test.zip \\
    --tune-range 100-199 --out bench/results/cpu_inverse.json
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from bench_options import out_option

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]

if TYPE_CHECKING:
    from reconstruction import Prox
    from torch import Tensor

    from inverse.operators import Operator

MAX_PIXELS = 4096  # of an image; the operators are written out as matrices
RESULTS = {  # name in the JSON file: label in the table
    "pseudo_inverse": "pseudo-inverse",
    "simple": "",  # named by the operator
    "tikhonov": "tikhonov |Au-y|² + w|∇u|²",
    "tv": "total variation",
    "tv_bounded": "total variation, u in [-1,1]",
    "sample": "one sample",
    "posterior_mean": "posterior mean",
}
SIMPLE = {  # what a user would do first, by the operator's name
    "super_resolution": "bicubic interpolation",
    "inpainting": "linear interpolation",
    "gaussian_blur_circ": "measurement as it is",
    "motion_blur_circ": "measurement as it is",
}


def _parse_range(ctx: click.Context, param: click.Parameter, value: str) -> range:
    first, _, last = value.partition("-")
    if not (first.isdecimal() and last.isdecimal() and int(first) <= int(last)):
        raise click.BadParameter(f"{value!r}: give the first and the last image, as 100-199")
    return range(int(first), int(last) + 1)


@click.command(context_settings={"show_default": True, "max_content_width": 120})
@click.option("--results", metavar="DIR", multiple=True, required=True, help="Of posterior_sample.py; repeatable.")
@click.option("--tune", metavar="DIR|ZIP", required=True, help="Images on which the weights are tuned.")
@click.option("--tune-range", callback=_parse_range, default="100-199", help="Which of them, in order of their names.")
@click.option("--iterations", type=click.IntRange(1), default=400, help="Of the total-variation solver.")
@click.option("--inner", type=click.IntRange(1), default=10, help="Iterations of each of its proximal steps.")
@click.option("--check", type=click.IntRange(0), default=3, help="Images also solved with scikit-image's step.")
@out_option()
def main(results: Sequence[str], tune: str, check: int, out: str | None, **options: Any) -> None:
    """Print PSNR and SSIM per task: linear baselines, total variation, one sample, posterior mean.

    Results are clipped to [-1,1] and rounded to 8 bit. The pseudo-inverse leaves out singular values below 1e-6 of the
    largest; that of inpainting leaves removed pixels grey. Weights are those of the best mean PSNR on the tuning
    images, on a grid of ratio 1.5, the same for all images of a task.
    """
    from reconstruction import CUT, RATIO

    from dnnlib.files import write_json
    from torch_utils.errors import user_errors

    with user_errors():
        prox = _scikit_image_prox() if check else None
        tasks = [_load(Path(folder), tune, options["tune_range"]) for folder in results]
        rows = []
        for task in tasks:
            row = measure(task, options["iterations"], options["inner"], check, prox)
            print(format_table(row), flush=True)
            rows.append(row)
        if out:
            chosen = options.pop("tune_range")
            settings = {
                **options,
                "check": check,
                "tune": Path(tune).name,
                "tune_range": [chosen[0], chosen[-1]],
                "grid_ratio": RATIO,
                "cut": CUT,
            }
            write_json(Path(out), {"settings": settings, "tasks": rows})


@dataclass
class Problems:
    """The images of one results folder and, measured in the same way, the images to tune on."""

    task: dict[str, Any]
    sampling: dict[str, Any]  # what else the samples depend on
    operator: Operator
    matrix: Tensor  # [m,n] float64: A, of one channel
    truth: Tensor  # [N,C,H,W]
    y: Tensor  # [N,C,h,w]
    tune_truth: Tensor
    tune_y: Tensor
    drawn: dict[str, list[Tensor]]  # "sample" of each run and "posterior_mean" [N,C,H,W]


def _load(folder: Path, tune: str, tune_range: range) -> Problems:
    """Read a results folder and simulate the tuning images' measurements. Raises ValueError for what does not fit."""
    import torch
    from reconstruction import dense_matrix

    from generation.pictures import read_image
    from inverse.inputs import MeasurementFolder, pixels_to_image

    task, sampling, operator = _options(folder)
    finished = {path.stem for path in (folder / "records").glob("*.json")}
    names = sorted(finished & {path.stem for path in (folder / "truth").glob("*.png")})
    if not names:
        raise ValueError(f"{folder}: no finished images with a known truth")

    def read(kind: str) -> Tensor:
        return torch.stack([pixels_to_image(read_image(folder / kind / f"{name}.png")) for name in names]).double()

    truth = read("truth")
    height, width = truth.shape[2:]
    if height * width > MAX_PIXELS:
        raise ValueError(f"{folder}: {width}x{height} pixels; this bench takes images of up to {MAX_PIXELS} pixels")
    shape = operator.measurement_shape(truth.shape)[1:]
    measurements = MeasurementFolder(folder / "measurements", shape=shape, pictures=False)
    y = torch.stack([measurements.read(name) for name in names]).double()
    reported = dict(zip(names, truth.float(), strict=True))
    tune_truth, tune_y = _tuning(folder, tune, tune_range, reported, operator, sampling["seed"], task["noise"])
    drawn = {"sample": [read(f"samples/run_{run}") for run in range(task["runs"])]}
    if task["runs"] > 1:
        drawn["posterior_mean"] = [read("mean")]
    return Problems(
        task=task,
        sampling=sampling,
        operator=operator,
        matrix=dense_matrix(operator, height, width),
        truth=truth,
        y=y,
        tune_truth=tune_truth,
        tune_y=tune_y,
        drawn=drawn,
    )


def _options(folder: Path) -> tuple[dict[str, Any], dict[str, Any], Operator]:
    """Task, what else the samples depend on, and the operator of a results folder."""
    from inverse.inputs import read_mask
    from inverse.operators import get_operator

    try:
        options = json.loads((folder / "options.json").read_text(encoding="utf-8"))
        task, mask = options["task"], options["mask"]
        parameters = dict(task["operator"])
        name, _, _ = parameters.pop("name"), task["noise"], task["runs"]
        sampling = {key: options[key] for key in ("net_sha256", "class", "seed", "dtype")}
    except FileNotFoundError:
        raise ValueError(f"{folder}: holds no options.json; give a folder that posterior_sample.py wrote") from None
    except (AttributeError, KeyError, TypeError, ValueError):
        raise ValueError(f"{folder}/options.json is damaged or not of posterior_sample.py") from None
    operator = get_operator(name, **(parameters if mask is None else {"mask": read_mask(mask)}))
    if not operator.is_linear:
        raise ValueError(f"{folder}: {name} is not linear and has no pseudo-inverse; leave it out")
    return task, sampling, operator


def _tuning(
    folder: Path, tune: str, tune_range: range, reported: dict[str, Tensor], operator: Operator, seed: int, noise: float
) -> tuple[Tensor, Tensor]:
    """Images to tune on and their measurements, [N,C,H,W] and [N,C,h,w]; none of them may be a reported one."""
    import torch

    from inverse.inputs import ImageFolder
    from inverse.solve import simulate

    channels, height, _ = next(iter(reported.values())).shape
    images = ImageFolder(tune, resolution=height, channels=channels)
    chosen = images.names[tune_range[0] : tune_range[-1] + 1]
    if len(chosen) < len(tune_range):
        raise ValueError(f"{tune}: holds {len(images.names)} images, too few for {tune_range[0]}-{tune_range[-1]}")
    found = {name: images.read(name) for name in chosen}
    known = {image.numpy().tobytes(): name for name, image in reported.items()}
    for tuned, image in found.items():
        if image.numpy().tobytes() in known:
            raise ValueError(
                f"{folder}: {known[image.numpy().tobytes()]} is the tuning image {tuned}; tune on other images"
            )
    y = [simulate(operator, image, noise, seed=seed, name=name) for name, image in found.items()]
    return torch.stack(list(found.values())).double(), torch.stack(y).double()


def measure(problems: Problems, iterations: int, inner: int, check: int, prox: Prox | None) -> dict[str, Any]:
    """Return mean PSNR and SSIM of every reconstruction of one task, the tuned weights and how well TV converged."""
    import torch
    from reconstruction import interpolate, pseudo_inverse, tikhonov, tune_weight

    matrix, truth, y = problems.matrix, problems.truth, problems.y
    started = time.perf_counter()
    tv = _tv_solver(matrix, iterations, inner)
    drawn = {kind: [_quality(images, truth) for images in runs] for kind, runs in problems.drawn.items()}
    found = {
        "pseudo_inverse": pseudo_inverse(matrix, y, truth.shape),
        "simple": interpolate(problems.operator, y, truth.shape),
    }
    weights: dict[str, float] = {}
    tuning: dict[str, dict[str, float]] = {}

    def tuned(kind: str, solver: Callable[[Tensor, float, torch.Size], Tensor], start: float) -> None:
        def score(weight: float) -> float:
            images = solver(problems.tune_y, weight, problems.tune_truth.shape)
            return _quality(images, problems.tune_truth)["psnr"].mean().item()

        weights[kind], scores = tune_weight(score, start)
        tuning[kind] = {f"{weight:.4g}": value for weight, value in scores.items()}
        found[kind] = solver(y, weights[kind], truth.shape)

    tuned("tikhonov", lambda y, weight, shape: tikhonov(matrix, y, weight, shape), 0.05)
    tuned("tv", lambda y, weight, shape: tv(y, weight, shape, False), 0.02)
    tuned("tv_bounded", lambda y, weight, shape: tv(y, weight, shape, True), 0.02)
    qualities = {kind: _quality(images, truth) for kind, images in found.items()}
    convergence = {}
    for kind in ("tv", "tv_bounded"):
        longer = _quality(tv(y, weights[kind], truth.shape, kind == "tv_bounded", effort=2), truth)["psnr"]
        change = longer - qualities[kind]["psnr"]
        convergence[kind] = {"mean_change_db": change.mean().item(), "largest_change_db": change.abs().max().item()}
    if prox is not None:
        convergence["scikit_image"] = _compare(problems, found["tv"], weights["tv"], iterations, check, prox)
    for kind, runs in drawn.items():
        qualities[kind] = {key: torch.stack([run[key] for run in runs]).mean(dim=0) for key in runs[0]}
    row: dict[str, Any] = {
        "task": problems.task,
        "sampling": problems.sampling,
        "images": len(truth),
        "results": {
            kind: {
                **({"method": SIMPLE[problems.task["operator"]["name"]]} if kind == "simple" else {}),
                **({"weight": weights[kind]} if kind in weights else {}),
                **{key: values.mean().item() for key, values in qualities[kind].items()},
            }
            for kind in RESULTS
            if kind in qualities
        },
        "tuning_psnr": tuning,
        "convergence": convergence,
        "seconds": time.perf_counter() - started,
    }
    if "posterior_mean" in qualities:
        row["gain_db"] = {
            kind: _difference(qualities["posterior_mean"]["psnr"] - qualities[kind]["psnr"]) for kind in found
        }
    return row


def _tv_solver(matrix: Tensor, iterations: int, inner: int) -> Callable[..., Tensor]:
    from reconstruction import total_variation

    def tv(y: Tensor, weight: float, shape: Sequence[int], bounded: bool, effort: int = 1) -> Tensor:
        work = {"iterations": effort * iterations, "inner": effort * inner}
        return total_variation(matrix, y, weight, shape, bounded=bounded, **work)

    return tv


def _compare(
    problems: Problems, found: Tensor, weight: float, iterations: int, check: int, prox: Prox
) -> dict[str, float]:
    """How far total variation with another proximal step lies from what was found, on the first images."""
    from reconstruction import total_variation

    few, truth = problems.y[:check], problems.truth[:check]
    images = total_variation(problems.matrix, few, weight, truth.shape, iterations=iterations, prox=prox)
    change = _quality(images, truth)["psnr"] - _quality(found[:check], truth)["psnr"]
    return {"images": len(few), "largest_change_db": change.abs().max().item()}


def _difference(values: Tensor) -> dict[str, float]:
    error = values.std().item() / math.sqrt(len(values)) if len(values) > 1 else math.inf
    share = (values > 0).double().mean().item()
    return {"mean": values.mean().item(), "standard_error": error, "share_of_images": share}


def _quality(images: Tensor, truth: Tensor) -> dict[str, Tensor]:
    """PSNR and, where images are large enough, SSIM [N] of images [N,C,H,W], clipped and rounded to 8 bit."""
    from inverse.inputs import pixels_to_image
    from metrics.image_quality import SSIM_WINDOW, psnr, ssim
    from networks.encoders import RGBEncoder

    x = pixels_to_image(RGBEncoder().decode(images.float()).numpy()).to(truth.dtype)
    return {"psnr": psnr(x, truth), **({"ssim": ssim(x, truth)} if min(x.shape[2:]) >= SSIM_WINDOW else {})}


def format_table(row: dict[str, Any]) -> str:
    """Return the results of one task as a table for the terminal."""
    task = row["task"]
    parameters = ", ".join(f"{key} {value}" for key, value in task["operator"].items() if key != "name")
    lines = [
        f"\n{task['name']}: {task['operator']['name']} ({parameters}), noise {task['noise']}, {row['images']} images",
        f"{'':36} {'weight':>8} {'PSNR':>7} {'SSIM':>7} {'mean gains':>17}",
    ]
    for kind, result in row["results"].items():
        label = result.get("method") or RESULTS[kind] + (f" of {task['runs']}" if kind == "posterior_mean" else "")
        weight = f"{result['weight']:.2g}" if "weight" in result else ""
        ssim = f"{result['ssim']:.4f}" if "ssim" in result else ""
        gain = row.get("gain_db", {}).get(kind)
        gained = f"{gain['mean']:+.2f} ± {gain['standard_error']:.2f} dB" if gain else ""
        lines.append(f"{label:36} {weight:>8} {result['psnr']:7.2f} {ssim:>7} {gained:>17}")
    shown = {"tv": "twice as long", "tv_bounded": "twice as long, u in [-1,1]", "scikit_image": "scikit-image's step"}
    for kind, change in row["convergence"].items():
        mean = f", {change['mean_change_db']:+.4f} dB on average" if "mean_change_db" in change else ""
        lines.append(f"total variation, {shown[kind]}: PSNR moves by up to {change['largest_change_db']:.4f} dB{mean}")
    return "\n".join(lines)


def _scikit_image_prox() -> Prox:
    try:
        from skimage.restoration import denoise_tv_chambolle
    except ImportError:
        raise ValueError("the check against scikit-image needs it: pip install scikit-image, or --check 0") from None
    import numpy as np
    import torch

    def prox(images: Tensor, weight: float) -> Tensor:
        found = [denoise_tv_chambolle(image, weight=weight, eps=1e-7, max_num_iter=300) for image in images.numpy()]
        return torch.from_numpy(np.stack(found))

    return prox


if __name__ == "__main__":
    from torch_utils.options import set_wait_policy

    set_wait_policy()
    main()
