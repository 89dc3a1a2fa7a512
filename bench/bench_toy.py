"""What each ingredient buys on the toy: short trainings with one switched off at a time, against the true posterior.

python bench/bench_toy.py --out bench/results/cpu_toy_ablation.json
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
from bench_options import out_option

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

VARIANTS: dict[str, dict[str, Any]] = {
    "all ingredients": {},
    "gamma 0": {"gamma": 0.0},
    "no adversarial loss": {"adversarial": False},
    "no control branch": {"control": False},
    "score of p(x_t), no identity": {"identity": False},
    "2 score updates": {"score_updates": 2},
    "5 score updates": {"score_updates": 5},
    "score network at x_t (published)": {"combined_score": False},
    "linear discriminator head (published)": {"joint": False},
    "both as published": {"combined_score": False, "joint": False},
}
SIGMAS = (0.1, 0.3, 1.0, 10.0, 80.0)


@click.command(context_settings={"show_default": True})
@click.option("--iterations", type=click.IntRange(1), default=400)
@click.option("--batch", type=click.IntRange(1), default=512)
@click.option("--width", type=click.IntRange(1), default=64)
@click.option("--seed", type=click.IntRange(0), default=0)
@click.option("--only", multiple=True, type=click.Choice(list(VARIANTS)), help="Some of the variants.")
@out_option("Also write JSON, with the rows that it already holds.")
def main(iterations: int, batch: int, width: int, seed: int, only: tuple[str, ...], out: str | None) -> None:
    """Print a line per variant: energy distance over the floor and spread over the truth's, by noise level."""
    import torch

    from dnnlib.files import write_json
    from torch_utils.errors import user_errors

    with user_errors():
        torch.set_num_threads(1)
        base = dict(iterations=iterations, batch=batch, width=width, seed=seed, pretraining=400)
        path = Path(out) if out else None
        try:
            rows = dict(json.loads(path.read_text(encoding="utf-8"))["rows"]) if path and path.is_file() else {}
        except (ValueError, KeyError, TypeError) as error:
            raise click.BadParameter(f"{path} is not a table of this bench: name another file") from error
        for name in only or VARIANTS:
            rows[name] = measure({**base, **VARIANTS[name]})
            print(line(name, rows[name]), flush=True)
            if path:
                write_json(path, {"sigmas": SIGMAS, "points": 64, "samples": 256, "rows": rows})


def measure(settings: dict[str, Any]) -> dict[str, Any]:
    """Train once and compare one- and four-step draws with the true posterior."""
    from toy.check import SCHEDULES, Bench
    from toy.mixture import spiral_arms
    from toy.settings import ToySettings
    from toy.training import train

    mixture, checked = spiral_arms(), ToySettings(**settings)
    student = train(mixture, checked)
    bench = Bench(mixture, sigmas=SIGMAS)
    found: dict[str, Any] = {"settings": asdict(checked), "processor_seconds": round(student.seconds, 1)}
    for name in ("1 step", "4 steps"):
        drawn = [bench.row(s, bench.draw(student.generator, s, ts=SCHEDULES[name]), name) for s in SIGMAS]
        found[name] = {
            "energy_ratio": [round(row.energy_ratio, 2) for row in drawn],
            "spread_ratio": [round(row.spread_ratio, 3) for row in drawn],
        }
    return found


def line(name: str, row: dict[str, Any]) -> str:
    """One variant as text."""
    energies = ("  ".join(f"{value:6.1f}" for value in row[key]["energy_ratio"]) for key in ("1 step", "4 steps"))
    spreads = "  ".join(f"{value:5.2f}" for value in row["1 step"]["spread_ratio"])
    one, four = energies
    return f"{name:38} 1 step {one} | 4 steps {four} | spread {spreads} | {row['processor_seconds']:.0f} s"


if __name__ == "__main__":
    from torch_utils.options import set_wait_policy

    set_wait_policy()
    main()
