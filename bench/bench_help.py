"""Seconds until each script has shown its --help, in processes of their own, beside those of an empty Python. As from
the second time on, when Python has compiled the modules.

python bench/bench_help.py --out bench/results/cpu_help.json
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import click
from bench_options import out_option

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ("train_ncvsd", "train_edm2", "generate", "calculate_metrics", "posterior_sample", "dataset_tool")
SCRIPTS += ("reconstruct_phema", "toy_example")
ENVIRONMENT = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}  # compiled modules are kept


def seconds(arguments: list[str]) -> float:
    start = time.perf_counter()
    subprocess.run([sys.executable, *arguments], cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.DEVNULL, check=True)
    return time.perf_counter() - start


@click.command()
@click.option("--rounds", type=click.IntRange(1), default=7, show_default=True, help="Of all scripts in turns.")
@out_option()
def main(rounds: int, out: str | None) -> None:
    """Print a table: median and least seconds of each script."""
    commands = {"python -c ''": ["-c", ""]} | {f"{name}.py --help": [f"{name}.py", "--help"] for name in SCRIPTS}
    taken: dict[str, list[float]] = {name: [] for name in commands}
    for run in range(rounds + 1):
        for name, arguments in commands.items():
            found = seconds(arguments)
            taken[name] += [found] * (run > 0)  # the first one compiles
    rows = {name: {"median": statistics.median(times), "least": min(times)} for name, times in taken.items()}
    click.echo("| command | median s | least s |\n|---|---|---|")
    for name, row in rows.items():
        click.echo(f"| `{name}` | {row['median']:.3f} | {row['least']:.3f} |")
    if out is not None:
        Path(out).parent.mkdir(parents=True, exist_ok=True)
        Path(out).write_text(json.dumps({"rounds": rounds, "seconds": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
