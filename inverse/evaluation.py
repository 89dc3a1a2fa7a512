"""Image quality of posterior samples, per image and averaged, from the 8-bit files that a finished run has written."""

import csv
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dnnlib.files import atomic_write, write_json
from inverse.inputs import pixels_to_image
from inverse.results import ImageResult, ResultsError, ResultsFolder, Scores, read_picture
from metrics.image_quality import LPIPS, SSIM_WINDOW, psnr, ssim

DIGITS = {"psnr": 2, "ssim": 4, "lpips": 4, "residual": 4}  # of each measure in the table


@dataclass
class Results:
    """All images of a run and their averages: what metrics.json holds, in its order."""

    task: str
    num_images: int
    runs: int  # samples per image
    has_truth: bool
    lpips: dict[str, Any]  # computed, name, note: why not
    langevin_retries: int  # Langevin steps that diverged and were repeated with a smaller step size
    summary: dict[str, dict[str, dict[str, float]]]  # estimate, measure: mean and std over the images
    calibration: dict[str, float] | None  # interval, expected, coverage (average over the images), runs
    images: list[ImageResult]

    @property
    def measures(self) -> list[str]:
        """Those that were computed."""
        return [name for name in DIGITS if name in self.images[0].runs[0]]


def evaluate(
    folder: ResultsFolder, names: Sequence[str], task_name: str, has_truth: bool, lpips: LPIPS | str | None = None
) -> Results:
    """Judge finished images of a results folder; `lpips` may be the reason why it is not computed.

    Per image and run: PSNR in dB, SSIM and LPIPS against the truth where there is one, and the residual, the root mean
    square of A(x) - y. With several runs also the posterior mean; the run of the smallest residual, which a user can
    choose without the truth; and the oracle, the best run by PSNR against the truth, which a user cannot.
    `summary` averages over the images: "sample" first over the runs of each; std is that over the images.
    Raises ResultsError for records and pictures that are missing or damaged.
    """
    images, scorer = [], None if isinstance(lpips, str) else lpips
    for name in names:
        images.append(image := folder.record(name))
        if image is None:
            raise ResultsError(f"{folder.path}: files of {name} were removed meanwhile; run the same command again")
        if len(image.runs) > 1:
            image.chosen_run = min(range(len(image.runs)), key=lambda run: image.runs[run]["residual"])
        if has_truth:
            _compare(folder.path, image, scorer)
    runs, calibration = len(images[0].runs), None
    if covered := [image for image in images if image.coverage is not None]:
        found, interval = statistics.fmean(image.coverage for image in covered), covered[0].interval
        calibration = {"interval": interval, "expected": interval, "coverage": found, "runs": runs}
    about_lpips = {"computed": scorer is not None, "name": getattr(scorer, "name", None)}
    about_lpips["note"] = lpips if scorer is None else None
    retries, summary = sum(image.retries for image in images), _summarise(images)
    return Results(task_name, len(images), runs, has_truth, about_lpips, retries, summary, calibration, images)


@torch.no_grad()
def _compare(outdir: Path, image: ImageResult, lpips: LPIPS | None) -> None:
    """Add qualities against the truth to the scores of one image, and its best run."""
    scores = {f"samples/run_{run}": found for run, found in enumerate(image.runs)}
    if image.posterior_mean is not None:
        scores["mean"] = image.posterior_mean
    pixels = read_picture(outdir / "truth" / f"{image.name}.png")
    x = pixels_to_image(np.stack([read_picture(outdir / f / f"{image.name}.png", pixels.shape) for f in scores]))
    truth = pixels_to_image(pixels)[None].expand_as(x)
    values = {"psnr": psnr(x, truth)}
    if min(x.shape[2:]) >= SSIM_WINDOW:
        values["ssim"] = ssim(x, truth)
    if lpips is not None:
        values["lpips"] = lpips(x, truth).cpu()
    for i, found in enumerate(scores.values()):
        found |= {name: column[i].item() for name, column in values.items()}
    if image.posterior_mean is not None:
        image.oracle_run = max(range(len(image.runs)), key=lambda run: image.runs[run]["psnr"])


def _summarise(images: Sequence[ImageResult]) -> dict[str, dict[str, dict[str, float]]]:
    picks: dict[str, list[list[Scores]]] = {"sample": [image.runs for image in images]}
    if images[0].posterior_mean is not None:
        picks["posterior_mean"] = [[image.posterior_mean] for image in images]
        picks["chosen"] = [[image.runs[image.chosen_run]] for image in images]
    if images[0].oracle_run is not None:
        picks["oracle"] = [[image.runs[image.oracle_run]] for image in images]

    def average(scores: list[list[Scores]], name: str) -> dict[str, float]:
        values = [statistics.fmean(score[name] for score in of_image) for of_image in scores]
        std = statistics.stdev(values) if len(values) > 1 and all(map(math.isfinite, values)) else 0.0
        return {"mean": statistics.fmean(values), "std": std}

    return {pick: {name: average(s, name) for name in DIGITS if name in s[0][0]} for pick, s in picks.items()}


def write_metrics(outdir: Path, results: Results) -> None:
    """Write metrics.json and metrics.csv."""

    def given(record: Results | ImageResult) -> dict[str, Any]:
        return {name: value for name, value in vars(record).items() if value is not None}

    write_json(outdir / "metrics.json", {**given(results), "images": [given(image) for image in results.images]})
    with atomic_write(outdir / "metrics.csv", "w", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["image", "run", "role", *results.measures])
        for image in results.images:
            for run, scores in enumerate(image.runs):
                role = "sample" + "+chosen" * (run == image.chosen_run) + "+oracle" * (run == image.oracle_run)
                writer.writerow([image.name, run, role, *(scores[name] for name in results.measures)])
            if image.posterior_mean is not None:
                writer.writerow([image.name, "", "mean", *(image.posterior_mean[name] for name in results.measures)])


def format_summary(results: Results) -> str:
    """Return the averages as a table for the terminal, with a line on LPIPS and calibration where there is one."""
    labels = {"sample": "one sample", "posterior_mean": f"mean of {results.runs}"}
    labels |= {"chosen": "smallest residual", "oracle": "best by truth (oracle)"}
    rows = [["", *(name.upper() if name != "residual" else name for name in results.measures)]]
    for pick, values in results.summary.items():
        rows.append([labels[pick], *(f"{values[name]['mean']:.{DIGITS[name]}f}" for name in results.measures)])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows]
    if results.calibration is not None:
        found = "{coverage:.1%} of the true pixels lie in the central {interval:.0%}".format(**results.calibration)
        lines.append(f"calibration: {found} interval of the samples")
    if results.langevin_retries:
        count = f"{results.langevin_retries} times, in {sum(image.retries > 0 for image in results.images)} of"
        count = f"{count} {results.num_images} images: a smaller c1 avoids this"
        lines.append(f"Langevin steps diverged and were repeated with a smaller step size {count}")
    if results.has_truth and not results.lpips["computed"]:
        lines.append(f"LPIPS not computed: {results.lpips['note']}")
    return "\n".join(lines)
