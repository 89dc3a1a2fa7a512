"""Image quality of posterior samples, from the files of a finished run: PSNR, SSIM and LPIPS, per image and averaged.

Everything is measured on the 8-bit images that were written, so that the numbers belong to the files.
"""

from __future__ import annotations

import csv
import io
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dnnlib.files import atomic_write, write_json
from inverse.inputs import pixels_to_image
from inverse.report_input import ReportError, read_png
from inverse.results import ResultsFolder
from metrics.image_quality import SSIM_WINDOW, psnr, ssim

QUALITIES = ("psnr", "ssim", "lpips")


def evaluate(
    outdir: str | Path,
    names: Sequence[str],  # of the images, all finished
    task_name: str,
    *,
    lpips: Any = None,  # metrics.image_quality.LPIPS; None = not computed
    lpips_note: str | None = None,  # why not
) -> dict[str, Any]:
    """Write metrics.json and metrics.csv for the images of a results folder and return what the former holds.

    Per image and run: PSNR in dB, SSIM and LPIPS against the truth where there is one, and the residual, the root mean
    square of A(x) - y. With several runs also the posterior mean; the run of the smallest residual, which a user can
    choose without the truth; and the oracle, the best run by PSNR against the truth, which a user cannot.
    `summary` averages over the images: "sample" first over the runs of each; std is that over the images.
    `langevin_retries` counts the Langevin steps that diverged and were repeated with a smaller step size.
    """
    outdir = Path(outdir)
    folder = ResultsFolder(outdir)
    images = [_evaluate_image(outdir, folder.record(name), lpips) for name in names]
    runs = len(images[0]["runs"])
    report: dict[str, Any] = {
        "task": task_name,
        "num_images": len(images),
        "runs": runs,
        "has_truth": "psnr" in images[0]["runs"][0],
        "lpips": {"computed": lpips is not None, "name": getattr(lpips, "name", None), "note": lpips_note},
        "langevin_retries": sum(image["retries"] for image in images),
        "summary": _summarise(images, runs),
    }
    covered = [image for image in images if "coverage" in image]
    if covered:
        report["calibration"] = {
            "interval": covered[0]["interval"],
            "expected": covered[0]["interval"],
            "coverage": statistics.fmean(image["coverage"] for image in covered),
            "runs": runs,
        }
    report["images"] = images
    write_json(outdir / "metrics.json", report)
    _write_csv(outdir / "metrics.csv", images)
    return report


def _evaluate_image(outdir: Path, record: dict[str, Any], lpips: Any) -> dict[str, Any]:
    name, count = record["name"], len(record["runs"])
    # null stands for a residual beyond float32
    runs = [{"residual": math.inf if run["residual"] is None else run["residual"]} for run in record["runs"]]
    image = {**record, "runs": runs}
    truth_file = outdir / "truth" / f"{name}.png"
    if count > 1:
        residual = image.pop("mean_residual")
        image["posterior_mean"] = {"residual": math.inf if residual is None else residual}
        image["chosen_run"] = min(range(count), key=lambda run: image["runs"][run]["residual"])
    if truth_file.exists():
        files = [outdir / "samples" / f"run_{run}" / f"{name}.png" for run in range(count)]
        results = [*image["runs"]]
        if count > 1:
            files.append(outdir / "mean" / f"{name}.png")
            results.append(image["posterior_mean"])
        for result, values in zip(results, _qualities(files, truth_file, lpips), strict=True):
            result.update(values)
        if count > 1:
            image["oracle_run"] = max(range(count), key=lambda run: image["runs"][run]["psnr"])
    return image


@torch.no_grad()
def _qualities(files: Sequence[Path], truth_file: Path, lpips: Any) -> list[dict[str, float]]:
    pixels = read_png(truth_file)
    images = [read_png(file, pixels.shape[1:]) for file in files]
    for file, image in zip(files, images, strict=True):
        if image.shape != pixels.shape:
            raise ReportError(f"{file}: {image.shape[0]} channels, and {truth_file} has {pixels.shape[0]}")
    x = pixels_to_image(np.stack(images))
    truth = pixels_to_image(pixels)[None].expand_as(x)
    values: dict[str, Tensor] = {"psnr": psnr(x, truth)}
    if min(x.shape[2:]) >= SSIM_WINDOW:
        values["ssim"] = ssim(x, truth)
    if lpips is not None:
        values["lpips"] = lpips(x, truth).cpu()
    return [{name: column[i].item() for name, column in values.items()} for i in range(len(files))]


def _summarise(images: Sequence[dict[str, Any]], runs: int) -> dict[str, Any]:
    picks: dict[str, list[list[dict[str, float]]]] = {"sample": [image["runs"] for image in images]}
    if runs > 1:
        picks["posterior_mean"] = [[image["posterior_mean"]] for image in images]
        picks["chosen"] = [[image["runs"][image["chosen_run"]]] for image in images]
        if "oracle_run" in images[0]:
            picks["oracle"] = [[image["runs"][image["oracle_run"]]] for image in images]
    summary: dict[str, Any] = {}
    for pick, results in picks.items():
        summary[pick] = {}
        for name in [*QUALITIES, "residual"]:
            if name in results[0][0]:
                values = [statistics.fmean(result[name] for result in of_image) for of_image in results]
                std = statistics.stdev(values) if len(values) > 1 and all(map(np.isfinite, values)) else 0.0
                summary[pick][name] = {"mean": statistics.fmean(values), "std": std}
    return summary


def _write_csv(path: Path, images: Sequence[dict[str, Any]]) -> None:
    columns = [name for name in [*QUALITIES, "residual"] if name in images[0]["runs"][0]]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["image", "run", "role", *columns])
    for image in images:
        for run, result in enumerate(image["runs"]):
            roles = [role for role in ("chosen", "oracle") if image.get(f"{role}_run") == run]
            writer.writerow([image["name"], run, "+".join(["sample", *roles]), *(result[name] for name in columns)])
        if "posterior_mean" in image:
            writer.writerow([image["name"], "", "mean", *(image["posterior_mean"][name] for name in columns)])
    with atomic_write(path, "w", encoding="utf-8") as file:
        file.write(text.getvalue())


def format_summary(report: dict[str, Any]) -> str:
    """Return the averages as a table for the terminal, with a line on LPIPS and calibration where there is one."""
    labels = {
        "sample": "one sample",
        "posterior_mean": f"mean of {report['runs']}",
        "chosen": "smallest residual",
        "oracle": "best by truth (oracle)",
    }
    columns = [name for name in [*QUALITIES, "residual"] if name in report["summary"]["sample"]]
    rows = [["", *(name.upper() if name != "residual" else name for name in columns)]]
    digits = {"psnr": 2, "ssim": 4, "lpips": 4, "residual": 4}
    for pick, values in report["summary"].items():
        rows.append([labels[pick], *(f"{values[name]['mean']:.{digits[name]}f}" for name in columns)])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows]
    if "calibration" in report:
        found = report["calibration"]
        lines.append(
            f"calibration: {found['coverage']:.1%} of the true pixels lie in the central {found['interval']:.0%} "
            "interval of the samples"
        )
    if report["langevin_retries"]:
        affected = sum(image["retries"] > 0 for image in report["images"])
        lines.append(
            f"Langevin steps diverged and were repeated with a smaller step size {report['langevin_retries']} times, "
            f"in {affected} of {report['num_images']} images: a smaller c1 avoids this"
        )
    if report["has_truth"] and not report["lpips"]["computed"]:
        lines.append(f"LPIPS not computed: {report['lpips']['note']}")
    return "\n".join(lines)
