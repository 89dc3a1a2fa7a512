"""Put the demo's measurements into a table and a page:  python quick_start/demo_report.py --help"""

from __future__ import annotations

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
from torch_utils.threads import wait_passively  # noqa: E402


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
    except (TypeError, AttributeError, StopIteration) as error:  # another structure
        told = "these reports cannot be used: one of them is not calculate_metrics.py's, or has no fd_demo"
        raise click.ClickException(told) from error
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
    distance = float(next(metric["value"] for metric in record["metrics"] if metric["name"] == "fd_demo"))
    evaluations, milliseconds = record.get("evaluations"), record.get("sampling_ms_per_image")
    if key == "data":
        title, picture = f"{record['num_images']} images of the data itself", "data.png"
    elif key == "teacher":
        title, picture = f"teacher, Heun, {evaluations} evaluations", "teacher/grid.png"
    else:
        title = f"student {key} distillation, {evaluations} step{'s' if evaluations > 1 else ''}"
        key = f"{key}-{evaluations}"
        picture = f"{key}/grid.png"
    shown = picture if key == "data" or (outdir / picture).is_file() else None
    return Row(key, title, evaluations, distance, None if milliseconds is None else float(milliseconds), shown)


def describe(records: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Facts to state beside the table. Raises ValueError where the rows do not belong together."""
    every = [record for part in records.values() for record in part]
    if not records["after"]:
        raise ValueError("there are no results after distillation")
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
    import jinja2

    folder = jinja2.FileSystemLoader(Path(__file__).parent)
    template = jinja2.Environment(loader=folder, autoescape=True, trim_blocks=True).get_template("demo.html")
    return template.render(rows=rows, facts=facts, problems=problems)


if __name__ == "__main__":
    wait_passively()
    main()
