"""NCVSD where everything is known: a mixture of Gaussians in the plane, its exact denoiser as the teacher."""

import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import click

from torch_utils.errors import user_errors
from torch_utils.options import SEED, set_wait_policy
from toy.settings import ToySettings

FILE = click.Path(dir_okay=False, path_type=Path)
STUDENT = "assets/toy/student.safetensors"


def setting_options(function: Callable) -> Callable:
    """One option per field of ToySettings; those that switch an ingredient are written --x/--no-x."""
    for field in reversed(fields(ToySettings)):
        name, switch = field.name.replace("_", "-"), isinstance(field.default, bool)
        flag, kind = (f"--{name}/--no-{name}", None) if switch else (f"--{name}", type(field.default))
        option = click.option(flag, field.name, type=kind, default=field.default, help=field.metadata["help"] + ".")
        function = option(function)
    return function


@click.group(context_settings={"show_default": True, "max_content_width": 120})
def main() -> None:
    """Distil an exact denoiser of 2-D data, and compare what comes out with the true posterior.

    \b
    python toy_example.py train --out out/toy/student.safetensors         ten minutes on two cores
    python toy_example.py check --net out/toy/student.safetensors --out out/toy/check.json
    python toy_example.py plot --net out/toy/student.safetensors --out out/toy/figure.png
    """


@main.command()
@click.option("--out", type=FILE, required=True, help="The student, a safetensors file.")
@click.option("--quiet", is_flag=True, help="No lines on the way.")
@setting_options
def train(out: Path, quiet: bool, **settings: Any) -> None:
    """Distil the exact denoiser into a small network with the losses of image training."""
    with user_errors():
        from dnnlib.files import check_output
        from toy.check import probe
        from toy.mixture import spiral_arms
        from toy.training import save_student
        from toy.training import train as distil

        checked, mixture = ToySettings(**settings), spiral_arms()
        check_output(out, ".safetensors")
        log = (lambda text: None) if quiet else (lambda text: print(text, file=sys.stderr, flush=True))
        student = distil(mixture, checked, probe=probe(mixture), log=log)
        save_student(out, student)
        click.echo(f"{out}: {checked.iterations} iterations, {student.seconds:.0f} s of processor time")


@main.command()
@click.option("--net", type=FILE, default=STUDENT, help="A student that `train` wrote.")
@click.option("--points", type=click.IntRange(2), default=64, help="Observations y per noise level.")
@click.option("--samples", type=click.IntRange(8), default=256, help="Draws per observation.")
@click.option("--seed", type=SEED, default=12345, help="Of observations and draws.")
@click.option("--out", type=FILE, help="Also write all numbers as JSON.")
def check(net: Path, points: int, samples: int, seed: int, out: Path | None) -> None:
    """Compare the student's draws with the true posterior at eight noise levels; check the score identity and PnP."""
    with user_errors():
        from dnnlib.files import check_output, write_json
        from toy.check import report
        from toy.mixture import spiral_arms
        from toy.report import tables
        from toy.training import load_student

        if out is not None:
            check_output(out, ".json", [net])
        result = report(spiral_arms(), load_student(net), points=points, samples=samples, seed=seed)
        if out is not None:
            write_json(out, result)
        click.echo(tables(result))


@main.command()
@click.option("--net", type=FILE, default=STUDENT, help="A student that `train` wrote.")
@click.option("--seed", type=SEED, default=1, help="Of the draws.")
@click.option("--out", type=FILE, required=True, help="The figure, a PNG.")
def plot(net: Path, seed: int, out: Path) -> None:
    """Draw samples beside the true posterior for four observations, and the course of training."""
    with user_errors():
        from dnnlib.files import check_output
        from toy.figure import draw_figure
        from toy.mixture import spiral_arms
        from toy.training import load_student

        check_output(out, ".png", [net])
        draw_figure(out, spiral_arms(), load_student(net), seed)
        click.echo(str(out))


if __name__ == "__main__":
    set_wait_policy()
    main()
