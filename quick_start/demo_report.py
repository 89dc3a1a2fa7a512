"""Put the demo's measurements into a table and a page:  python quick_start/demo_report.py --help"""

from __future__ import annotations

import html
import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from dnnlib.files import atomic_write, read_json  # noqa: E402
from torch_utils.options import FOLDER  # noqa: E402


@dataclass
class Row:
    """One line of the table and its picture."""

    key: str
    title: str
    evaluations: int | None
    distance: float
    milliseconds: float | None
    picture: str | None


REPORT = click.Path(exists=True, dir_okay=False, path_type=Path)


@click.command()
@click.option("--before", type=REPORT, help="Report on the student before distillation: calculate_metrics.py --out.")
@click.option("--after", type=REPORT, required=True, help="Report on the student after distillation.")
@click.option("--teacher", type=REPORT, required=True, help="Report on the teacher.")
@click.option("--real", type=REPORT, required=True, help="Report on images of the data set itself.")
@click.option("--data", metavar="DIR|ZIP", required=True, help="The data set, for a sheet of real images.")
@click.option("--solved", type=click.Path(path_type=Path), multiple=True, help="Output folders of posterior_sample.py.")
@click.option("--outdir", type=FOLDER, required=True, help="For results.json and index.html.")
def main(
    before: Path | None, after: Path, teacher: Path, real: Path, data: str, solved: tuple[Path, ...], outdir: str
) -> None:
    """Put the demo's reports into one table and one page, with the pictures that stand in OUTDIR."""
    folder = Path(outdir)
    try:
        reports = {"before": before, "after": after, "teacher": teacher, "data": real}
        records = {k: read_json(p)["results"] for k, p in reports.items() if p is not None}
        rows = [make_row(key, record, folder) for key, part in records.items() for record in part]
        facts = describe(records)
        write_sheet_of_data(data, folder)
        problems = [write_strip(path, folder) for path in solved]
    except (OSError, ValueError, KeyError, IndexError) as error:
        raise click.ClickException(f"these reports cannot be used: {error}") from error
    table = format_table(rows)
    print(table)
    print(f"fd_demo: Fréchet distance to {facts['reference_images']} images of the data in the features of a small")
    print(f"classifier of the same data, {facts['images_per_row']} images per row. It is no FID and compares within")
    print("this table only.")
    results = {**facts, "rows": [{k: v for k, v in vars(row).items() if k != "picture"} for row in rows]}
    for name, text in (
        ("results.json", json.dumps(results, indent=2) + "\n"),
        ("index.html", page(rows, facts, problems)),
    ):
        with atomic_write(folder / name, "w", encoding="utf-8") as file:
            file.write(text)


def make_row(key: str, record: dict[str, Any], outdir: Path) -> Row:
    """One line of the table."""
    distance = next(metric["value"] for metric in record["metrics"] if metric["name"] == "fd_demo")
    evaluations = record.get("evaluations")
    if key == "data":
        title, picture = f"{record['num_images']} images of the data itself", "data.png"
    elif key == "teacher":
        title, picture = f"teacher, Heun, {evaluations} evaluations", "teacher/grid.png"
    else:
        title = f"student {key} distillation, {evaluations} step{'s' if evaluations > 1 else ''}"
        key = f"{key}-{evaluations}"
        picture = f"{key}/grid.png"
    shown = picture if key == "data" or (outdir / picture).is_file() else None
    return Row(key, title, evaluations, distance, record.get("sampling_ms_per_image"), shown)


def describe(records: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Facts to state beside the table. Raises ValueError where the rows do not belong together."""
    every = [record for part in records.values() for record in part]
    if len({record["reference"]["sha256"] for record in every}) != 1:
        raise ValueError("they were made with different references")
    first = records["after"][0]
    return {
        "reference_images": first["reference"]["num_images"],
        "images_per_row": first["num_images"],
        "dtype": first["compute_dtype"],
        "detector": "fd_demo",
    }


def write_sheet_of_data(data: str, outdir: Path) -> None:
    """data.png: 64 random images."""
    import numpy as np

    from data.dataset import ImageDataset
    from generation.pictures import save_grid

    dataset = ImageDataset(data, use_labels=False, max_size=64)
    save_grid(outdir / "data.png", np.stack([dataset[i][0] for i in range(len(dataset))]), columns=8)


def write_strip(folder: Path, outdir: Path) -> dict[str, Any]:
    """TASK-strip.png: rows of truths, measurements, first samples and posterior means; returns what to say about it."""
    import numpy as np
    from PIL import Image

    from data.pictures import to_array, to_picture
    from generation.pictures import read_image, save_grid

    report = read_json(folder / "metrics.json")
    options = read_json(folder / "options.json")
    names = [image["name"] for image in report["images"]][:12]
    rows = []
    for part in ("truth", "measurements", "samples/run_0", "mean"):
        for name in names:
            pixels = read_image(folder / part / f"{name}.png")
            size = read_image(folder / "truth" / f"{name}.png").shape[:0:-1]
            rows.append(to_array(to_picture(pixels[:1]).resize(size, Image.Resampling.NEAREST)))
    save_grid(outdir / f"{report['task']}-strip.png", np.stack(rows), columns=len(names))
    psnr = {pick: values["psnr"]["mean"] for pick, values in report["summary"].items()}
    return {
        "picture": f"{report['task']}-strip.png",
        "page": Path(os.path.relpath(folder / "report.html", outdir)).as_posix(),
        "text": f"{options['task']['description']}. PSNR of a sample {psnr['sample']:.2f} dB, of the mean of "
        f"{report['runs']} samples {psnr['posterior_mean']:.2f} dB",
    }


def format_table(rows: list[Row]) -> str:
    """The table as text."""
    width = max(len(row.title) for row in rows)
    lines = [f"{'':{width}}  {'fd_demo':>8}  {'NFE':>4}  {'ms/image':>8}"]
    for row in rows:
        evaluations = "" if row.evaluations is None else str(row.evaluations)
        milliseconds = "" if row.milliseconds is None else f"{row.milliseconds:.2f}"
        lines.append(f"{row.title:{width}}  {row.distance:8.3f}  {evaluations:>4}  {milliseconds:>8}")
    return "\n".join(lines)


def page(rows: list[Row], facts: dict[str, Any], problems: list[dict[str, Any]]) -> str:
    """index.html: the table, a sheet of images for each row, then the inverse problems."""
    body = "".join(
        f"<tr><td>{html.escape(row.title)}</td><td>{row.distance:.3f}</td><td>{row.evaluations or '–'}</td>"
        f"<td>{'–' if row.milliseconds is None else f'{row.milliseconds:.2f}'}</td></tr>"
        for row in rows
    )
    figures = "".join(
        f"<figure><img src='{row.picture}' alt='{html.escape(row.title)}'><figcaption>{html.escape(row.title)}"
        f"<span>fd_demo {row.distance:.3f}</span></figcaption></figure>"
        for row in rows
        if row.picture
    )
    solved = "".join(
        f"<figure><img src='{html.escape(p['picture'])}' alt='truth, measurement, sample and mean of each image'>"
        f"<figcaption>{html.escape(p['text'])}<a href='{html.escape(p['page'])}'>report</a></figcaption></figure>"
        for p in problems
    )
    if solved:
        solved = f"""<h2>Inverse problems</h2>
<p>The student, distilled above, finds images it has never seen from noisy measurements. From top to bottom: truth,
measurement, one sample of the posterior, mean of the samples. The class of each image is given.</p>
<section>{solved}</section>"""
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>NCVSD on one CPU</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 68rem; margin: 2rem auto; padding: 0 1rem; color: #1a1a1a }}
table {{ border-collapse: collapse; margin: 1rem 0 }}
th, td {{ padding: .25rem .9rem; text-align: right; border-bottom: 1px solid #ddd }}
th:first-child, td:first-child {{ text-align: left }}
main {{ display: grid; grid-template-columns: repeat(auto-fit, minmax(19rem, 1fr)); gap: 1.5rem }}
figure {{ margin: 0 }}
img {{ width: 100%; image-rendering: pixelated; border: 1px solid #ddd }}
figcaption {{ display: flex; justify-content: space-between; gap: 1rem; color: #444 }}
section figure {{ margin: 1rem 0 }}
</style></head><body>
<h1>NCVSD on one CPU</h1>
<p>A diffusion model (the teacher) was distilled into a generative denoiser (the student) on this machine. All sheets
of generated images show the same 64 seeds.</p>
<table><tr><th></th><th>fd_demo</th><th>NFE</th><th>ms/image</th></tr>{body}</table>
<p><b>fd_demo</b> is the Fréchet distance to {facts["reference_images"]} images of the data in the features of a small
classifier trained on the same data, with {facts["images_per_row"]} images per row. It is no FID and compares within
this table only. NFE is the number of network evaluations per image.</p>
<main>{figures}</main>{solved}</body></html>
"""


if __name__ == "__main__":
    main()
