"""What each ingredient of the generator's loss buys: a list of settings, each trained with several seeds and measured.

python bench/recipes.py toy --seeds 0,1,2 --iterations 1000 --out bench/results/recipes_toy.json
python bench/recipes.py fashion16 --seeds 0,1,2 --runs training-runs/recipes --out bench/results/recipes_fashion16.json

The list is recipes.json. A run whose result stands in --out already is not repeated.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
from bench_options import out_option

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
Result = dict[str, Any]  # "settings", "seconds" and the values by column

TOY_SIGMAS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 80.0)
SCHEDULES = {"1 step": "12,39", "2 steps": "10,22,39", "4 steps": "0,10,20,30,39"}


def common_options(function: Callable) -> Callable:
    for option in (
        click.option("--only", multiple=True, help="Some of the recipes, by name."),
        click.option("--seeds", default="0,1,2", help="Seeds, comma-separated."),
        click.option("--recipes", type=click.Path(exists=True), default=Path(__file__).with_name("recipes.json")),
        out_option("JSON of all results, which are not measured again.", required=True),
    ):
        function = option(function)
    return function


@click.group(context_settings={"show_default": True})
def main() -> None:
    """Train recipes and print a table of mean and spread over the seeds."""


@main.command()
@common_options
@click.option("--iterations", type=click.IntRange(1), default=1000)
def toy(iterations: int, **options: Any) -> None:
    """On the toy: energy distance over the floor by noise level, in one and in four steps."""

    def measure(name: str, settings: dict[str, Any], seed: int) -> Result:
        import torch

        from toy.check import SCHEDULES, Bench
        from toy.mixture import spiral_arms
        from toy.settings import ToySettings
        from toy.training import train

        torch.set_num_threads(1)
        mixture = spiral_arms()
        student = train(mixture, ToySettings(**settings, seed=seed))
        bench, values = Bench(mixture, sigmas=TOY_SIGMAS), {}
        for label in ("1 step", "4 steps"):
            for sigma in TOY_SIGMAS:
                row = bench.row(sigma, bench.draw(student.generator, sigma, ts=SCHEDULES[label]), label)
                values[f"{label}, {sigma:g}"] = round(row.energy_ratio, 3)
        return {"seconds": round(student.seconds, 1), "values": values}

    run_all("toy", measure, {"iterations": iterations}, **options)


@main.command()
@common_options
@click.option(
    "--runs", type=click.Path(path_type=Path), required=True, help="Folder for the runs; they can be resumed."
)
@click.option("--duration", type=click.IntRange(4), default=51_200, help="Images.")
def fashion16(runs: Path, duration: int, **options: Any) -> None:
    """On the embedded images: fd_demo with 2,000 images of one, two and four steps."""

    def measure(name: str, settings: dict[str, Any], seed: int) -> Result:
        folder = runs / f"{''.join(c if c.isalnum() else '-' for c in name)}-seed{seed}"
        command = [sys.executable, str(ROOT / "train_ncvsd.py"), "--preset", "fashion16", "--quiet"]
        command += [
            "--net",
            str(ROOT / "assets/demo/teacher.safetensors"),
            "--data",
            str(ROOT / "assets/fashion16.zip"),
        ]
        given = {"seed": seed, "snapshot": duration // 4, "outdir": folder, **settings}
        for key, value in given.items():
            command += [f"--{key.replace('_', '-')}", str(value)]
        started = time.perf_counter()
        subprocess.run(command, check=True)
        seconds = time.perf_counter() - started
        newest = max(folder.glob("*-0.050.safetensors"))
        if f"-{given['duration']:09d}-" not in newest.name:
            raise ValueError(f"{folder}: stopped early; the same command goes on")
        return {"seconds": round(seconds, 1), "values": fd_demo(newest, runs)}

    run_all("fashion16", measure, {"duration": duration}, **options)


def fd_demo(path: Path, folder: Path) -> dict[str, float]:
    """Of a network, with 2,000 images, one value for each schedule; statistics of the data are kept in `folder`."""
    import torch

    import networks
    from data.dataset import ImageDataset
    from training.run.evaluation import snapshot_metrics

    torch.set_num_threads(1)
    loaded, schedules = networks.load(path), {k: {"ts": [int(t) for t in ts.split(",")]} for k, ts in SCHEDULES.items()}
    dataset = ImageDataset(ROOT / "assets/fashion16.zip")
    options = dict(run_dir=folder, batch=100, schedules=schedules)
    measure = snapshot_metrics("fd_demo", 2000, dataset, torch.device("cpu"), **options)
    found = measure(loaded.net, loaded.encoder)
    return {name: round(found[f"fd_demo_{name}"], 4) for name in SCHEDULES}


def run_all(
    where: str,
    measure: Callable[[str, dict[str, Any], int], Result],
    common: dict[str, Any],  # settings of every recipe that does not name them itself
    *,
    only: tuple[str, ...],
    seeds: str,
    recipes: str | Path,
    out: str,
) -> None:
    """Measure what is not in `out` yet, seed by seed, and print the table."""
    from dnnlib.files import write_json
    from sampling.seeds import parse_seeds
    from torch_utils.errors import user_errors

    with user_errors():
        listed = _read(Path(recipes))[where]
        unknown = sorted(set(only) - set(listed))
        if unknown:
            raise ValueError(f"there is no recipe {unknown[0]!r}: use one of {', '.join(listed)}")
        path = Path(out)
        found = _read(path) if path.exists() else {}
        for seed in parse_seeds(seeds):
            for name in only or listed:
                settings = {**common, **listed[name]}
                rows = found.setdefault(name, {"settings": settings, "seeds": {}})
                if rows["settings"] != settings:
                    raise ValueError(f"{path} has other settings of {name!r}: name another --out")
                if str(seed) in rows["seeds"]:
                    continue
                rows["seeds"][str(seed)] = measure(name, settings, seed)
                write_json(path, found)
                print(f"{name}, seed {seed}: {rows['seeds'][str(seed)]}", flush=True)
        print(table({name: rows for name, rows in found.items() if rows["seeds"]}))


def _read(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} is not a table of this bench: name another file") from error


def table(found: dict[str, Any]) -> str:
    """Markdown: mean and, for several seeds, standard deviation of each value."""
    columns = list(next(iter(next(iter(found.values()))["seeds"].values()))["values"]) if found else []
    lines = ["| " + " | ".join(["recipe", *columns, "seeds", "s"]) + " |", "|---" * (len(columns) + 3) + "|"]
    for name, rows in found.items():
        results = list(rows["seeds"].values())
        cells = []
        for column in columns:
            values = [result["values"][column] for result in results]
            spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.2f}{spread}")
        seconds = statistics.mean(result["seconds"] for result in results)
        lines.append("| " + " | ".join([name, *cells, str(len(results)), f"{seconds:.0f}"]) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    from torch_utils.options import set_wait_policy

    set_wait_policy()
    main()
