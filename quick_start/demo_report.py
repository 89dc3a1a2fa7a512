"""Measure the demo's networks, print the table and write index.html:  python quick_start/demo_report.py --help"""

from __future__ import annotations

import html
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from dnnlib.util import atomic_write  # noqa: E402

STUDENT_SCHEDULES = {1: (12, 39), 2: (10, 22, 39), 4: (0, 10, 20, 30, 39)}
TEACHER_STEPS = 32


@dataclass
class Row:
    """One line of the table and its picture."""

    key: str
    title: str
    evaluations: int | None
    distance: float
    milliseconds: float | None
    picture: str | None


@click.command(context_settings={"show_default": True})
@click.option("--teacher", metavar="FILE", required=True, help="The teacher.")
@click.option("--before", metavar="FILE", help="Student before distillation.")
@click.option("--after", metavar="FILE", required=True, help="Student after distillation.")
@click.option("--data", metavar="DIR|ZIP", required=True, help="The data set to compare with.")
@click.option("--outdir", metavar="DIR", required=True, help="Pictures, results.json and index.html.")
@click.option("--num", type=click.IntRange(2), default=2000, help="Images per row, seeds 0 to NUM-1.")
@click.option("--batch", type=click.IntRange(1), default=100)
@click.option("--dtype", type=click.Choice(["float32", "bf16"]), default="float32", help="Of the U-Nets.")
@click.option("--device", default="cpu")
def main(teacher: str, before: str | None, after: str, data: str, outdir: str, num: int, **options: Any) -> None:
    """Compare teacher and student by their Fréchet distance to the data, in the demo classifier's features."""
    try:
        rows, facts = measure(teacher, before, after, data, Path(outdir), num, **options)
    except (ValueError, OSError) as error:
        raise click.ClickException(str(error)) from error
    table = format_table(rows)
    print(table)
    print(f"fd_demo: Fréchet distance to {facts['reference_images']} images of the data in the features of a small")
    print(f"classifier of the same data, {num} images per row. It is no FID and compares within this table only.")
    results = {**facts, "rows": [{k: v for k, v in vars(row).items() if k != "picture"} for row in rows]}
    for name, text in (("results.json", json.dumps(results, indent=2) + "\n"), ("index.html", page(rows, facts))):
        with atomic_write(Path(outdir) / name, "w", encoding="utf-8") as file:
            file.write(text)


def measure(
    teacher: str,
    before: str | None,
    after: str,
    data: str,
    outdir: Path,
    num: int,
    *,
    batch: int,
    dtype: str,
    device: str,
) -> tuple[list[Row], dict[str, Any]]:
    """Rows of the table, in its order, and the facts to state beside it; writes a sheet of the data itself."""
    import torch
    from tqdm import tqdm

    import networks
    from metrics.detectors import load_demo_classifier
    from metrics.evaluate import dataset_moments, evaluate
    from metrics.frechet import frechet_distance
    from sampling.grid import save_grid
    from training.dataset import ImageDataset

    outdir.mkdir(parents=True, exist_ok=True)
    detector = load_demo_classifier()
    dataset = ImageDataset(data, cache=True)
    reference = dataset_moments(dataset, detector)
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(0))[:num].tolist()
    floor = dataset_moments(dataset, detector, order)
    real = torch.stack([torch.from_numpy(dataset[i][0]) for i in order[:64]])
    save_grid(outdir / "data.png", real, columns=8)
    compute = {"float32": torch.float32, "bf16": torch.bfloat16}[dtype]
    settings: list[tuple[str, str, str, dict[str, Any]]] = []
    for label, path in (("before", before), ("after", after)):
        for steps, ts in STUDENT_SCHEDULES.items() if path else ():
            name = f"student {label} distillation, {steps} step{'s' if steps > 1 else ''}"
            settings.append((f"{label}-{steps}", name, path, {"ts": ts}))
    settings.append(("teacher", f"teacher, Heun, {2 * TEACHER_STEPS - 1} evaluations", teacher, {}))

    rows = []
    bar = tqdm(total=num * len(settings), unit="img", desc="sampling", leave=False)
    for key, title, path, sampling in settings:
        loaded = networks.load(path, device=device)
        loaded.net.to(memory_format=torch.channels_last)
        result = evaluate(
            loaded.net,
            loaded.encoder,
            detector,
            reference,
            range(num),
            batch=batch,
            dtype=compute,
            progress=bar.update,
            **sampling,
        )
        picture = f"{key}/grid.png"
        rows.append(
            Row(
                key,
                title,
                result.evaluations,
                result.distance,
                1000 * result.seconds_per_image,
                picture if (outdir / picture).is_file() else None,
            )
        )
    bar.close()
    distance = frechet_distance(floor.mean(), floor.cov(), reference.mean(), reference.cov())
    rows.append(Row("data", f"{num} images of the data itself", None, distance, None, "data.png"))
    facts = {"reference_images": reference.count, "images_per_row": num, "dtype": dtype, "detector": detector.name}
    return rows, facts


def format_table(rows: list[Row]) -> str:
    """The table as text."""
    width = max(len(row.title) for row in rows)
    lines = [f"{'':{width}}  {'fd_demo':>8}  {'NFE':>4}  {'ms/image':>8}"]
    for row in rows:
        evaluations = "" if row.evaluations is None else str(row.evaluations)
        milliseconds = "" if row.milliseconds is None else f"{row.milliseconds:.2f}"
        lines.append(f"{row.title:{width}}  {row.distance:8.3f}  {evaluations:>4}  {milliseconds:>8}")
    return "\n".join(lines)


def page(rows: list[Row], facts: dict[str, Any]) -> str:
    """index.html: the table, then a sheet of images for each row."""
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
figcaption {{ display: flex; justify-content: space-between; color: #444 }}
</style></head><body>
<h1>NCVSD on one CPU</h1>
<p>A diffusion model (the teacher) was distilled into a generative denoiser (the student) on this machine. All sheets
of generated images show the same 64 seeds.</p>
<table><tr><th></th><th>fd_demo</th><th>NFE</th><th>ms/image</th></tr>{body}</table>
<p><b>fd_demo</b> is the Fréchet distance to {facts["reference_images"]} images of the data in the features of a small
classifier trained on the same data, with {facts["images_per_row"]} images per row. It is no FID and compares within
this table only. NFE is the number of network evaluations per image.</p>
<main>{figures}</main></body></html>
"""


if __name__ == "__main__":
    main()
