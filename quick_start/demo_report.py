"""Put the demo's measurements into a table and a page:  python quick_start/demo_report.py --help"""

import itertools
import json
import os
import sys
from pathlib import Path
from typing import Any

import click

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from dnnlib.files import atomic_write, read_json  # noqa: E402
from torch_utils.options import FOLDER, set_wait_policy  # noqa: E402

REPORT = click.Path(exists=True, dir_okay=False, path_type=Path)


@click.command()
@click.option("--before", type=REPORT, help="Report on the student before distillation: calculate_metrics.py --out.")
@click.option("--after", type=REPORT, required=True, help="Report on the student after distillation.")
@click.option("--teacher", type=REPORT, required=True, help="Report on the teacher.")
@click.option("--real", "data", type=REPORT, required=True, help="Report on images of the data set itself.")
@click.option("--data", "dataset", metavar="DIR|ZIP", required=True, help="The data set, for a sheet of real images.")
@click.option("--solved", type=click.Path(path_type=Path), multiple=True, help="Output folders of posterior_sample.py.")
@click.option("--outdir", type=FOLDER, required=True, help="For results.json and index.html.")
def main(dataset: str, solved: tuple[Path, ...], outdir: str, **reports: Path | None) -> None:
    """Put the demo's reports into one table and one page, with the pictures that stand in OUTDIR."""
    folder = Path(outdir)
    try:
        given = [key for key in ("before", "after", "teacher", "data") if reports[key] is not None]
        records = {key: read_json(reports[key])["results"] for key in given}
        rows = [make_row(key, record, folder) for key, part in records.items() for record in part]
        every = [record for part in records.values() for record in part]
        if not records["after"]:
            raise ValueError("there are no results after distillation")
        if len({record["reference"]["sha256"] for record in every}) != 1:
            raise ValueError("they were made with different references")
        first = records["after"][0]
        facts = {"reference_images": first["reference"]["num_images"], "images_per_row": first["num_images"]}
        facts |= {"dtype": first["compute_dtype"], "detector": "fd_demo"}
        problems = write_pictures(dataset, solved, folder)
    except (OSError, ValueError, KeyError, IndexError) as error:
        raise click.ClickException(f"these reports cannot be used: {error}") from error
    except (TypeError, AttributeError, StopIteration) as error:  # another structure
        told = "these reports cannot be used: one of them is not calculate_metrics.py's, or has no fd_demo"
        raise click.ClickException(told) from error
    print(format_table(rows))
    print(f"fd_demo: Fréchet distance to {facts['reference_images']} images of the data in the features of a small")
    print(f"classifier of the same data, {facts['images_per_row']} images per row. It is no FID and compares within")
    print("this table only.")
    results = {**facts, "rows": [{k: v for k, v in row.items() if k != "picture"} for row in rows]}
    page = render("demo.html", rows=rows, facts=facts, problems=problems)
    for name, text in (("results.json", json.dumps(results, indent=2) + "\n"), ("index.html", page)):
        with atomic_write(folder / name, "w", encoding="utf-8") as file:
            file.write(text)


def make_row(key: str, record: dict[str, Any], outdir: Path) -> dict[str, Any]:
    """One line of the table and its picture, None where there is none."""
    distance = float(next(metric["value"] for metric in record["metrics"] if metric["name"] == "fd_demo"))
    evaluations, milliseconds = record.get("evaluations"), record.get("sampling_ms_per_image")
    milliseconds = None if milliseconds is None else float(milliseconds)
    if key == "data":
        title = f"{record['num_images']} images of the data itself"
    elif key == "teacher":
        title = f"teacher, Heun, {evaluations} evaluations"
    else:
        title = f"student {key} distillation, {evaluations} step{'s' if evaluations > 1 else ''}"
        key = f"{key}-{evaluations}"
    picture = "data.png" if key == "data" else f"{key}/grid.png"
    if key != "data" and not (outdir / picture).is_file():
        picture = None
    row = dict(key=key, title=title, evaluations=evaluations, distance=distance, milliseconds=milliseconds)
    return {**row, "picture": picture}


def write_pictures(data: str, solved: tuple[Path, ...], outdir: Path) -> list[dict[str, Any]]:
    """data.png: 64 random images; for each solved problem TASK-strip.png: rows of truths, measurements, first samples
    and posterior means. Returns what to say about these.
    """
    import numpy as np
    from PIL import Image

    from data.dataset import ImageDataset
    from data.pictures import to_array, to_picture
    from generation.pictures import read_image, save_grid

    dataset, problems = ImageDataset(data, use_labels=False, max_size=64), []
    save_grid(outdir / "data.png", np.stack([dataset[i][0] for i in range(len(dataset))]), columns=8)
    for folder in solved:
        report, options = read_json(folder / "metrics.json"), read_json(folder / "options.json")
        names, tiles = [image["name"] for image in report["images"]][:12], []
        for part, name in itertools.product(("truth", "measurements", "samples/run_0", "mean"), names):
            size = read_image(folder / "truth" / f"{name}.png").shape[:0:-1]
            picture = to_picture(read_image(folder / part / f"{name}.png")[:1])
            tiles.append(to_array(picture.resize(size, Image.Resampling.NEAREST)))
        strip, page = f"{report['task']}-strip.png", Path(os.path.relpath(folder / "report.html", outdir)).as_posix()
        save_grid(outdir / strip, np.stack(tiles), columns=len(names))
        sample, mean = (report["summary"][pick]["psnr"]["mean"] for pick in ("sample", "posterior_mean"))
        quality = f"PSNR of a sample {sample:.2f} dB, of the mean of {report['runs']} samples {mean:.2f} dB"
        problems.append({"picture": strip, "page": page, "text": f"{options['task']['description']}. {quality}"})
    return problems


def format_table(rows: list[dict[str, Any]]) -> str:
    """The table as text."""
    width = max(len(row["title"]) for row in rows)
    lines = [f"{'':{width}}  {'fd_demo':>8}  {'NFE':>4}  {'ms/image':>8}"]
    for row in rows:
        time = "" if row["milliseconds"] is None else f"{row['milliseconds']:.2f}"
        lines.append(f"{row['title']:{width}}  {row['distance']:8.3f}  {str(row['evaluations'] or ''):>4}  {time:>8}")
    return "\n".join(lines)


def render(template: str, **values: Any) -> str:
    """A page from a template beside this file."""
    import jinja2

    folder = jinja2.FileSystemLoader(Path(__file__).parent)
    return jinja2.Environment(loader=folder, autoescape=True, trim_blocks=True).get_template(template).render(**values)


if __name__ == "__main__":
    set_wait_policy()
    main()
