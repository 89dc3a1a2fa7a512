"""Curves of one or several runs from their stats.jsonl, as a PNG: python -m training.plot RUN_DIR ..."""

from pathlib import Path

import click

from torch_utils.errors import user_errors
from torch_utils.options import set_wait_policy

DEFAULT_KEYS = "Loss/*,Discriminator/*,Metrics/*,Gradients/*,Nonfinite/*_total,Progress/img_per_s,Progress/lr"


@click.command(context_settings={"show_default": True, "max_content_width": 120})
@click.argument("run_dirs", metavar="RUN_DIR ...", nargs=-1, required=True)
@click.option("--out", metavar="FILE", help="PNG to write.  [default: curves.png in the first folder]")
@click.option("--keys", metavar="LIST", default=DEFAULT_KEYS, help="Quantities, with * for any text.")
def main(run_dirs: tuple[str, ...], out: str | None, keys: str) -> None:
    """Draw what happened in training, several runs over one another. The horizontal axis is images seen."""
    from dnnlib.files import atomic_write, check_output
    from training.run.curves import draw, png, read_curves

    with user_errors():
        path = Path(out) if out else Path(run_dirs[0]) / "curves.png"
        check_output(path, ".png")
        picture = png(draw({run_dir: read_curves(run_dir) for run_dir in run_dirs}, keys.split(",")))
        with atomic_write(path) as file:
            file.write(picture)
        click.echo(str(path))


if __name__ == "__main__":
    set_wait_policy()
    main()
