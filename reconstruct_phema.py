"""Make networks of other EMA widths from the snapshots of a finished run."""

import click

from dnnlib.text import parse_si
from torch_utils.errors import user_errors
from torch_utils.options import FOLDER, set_wait_policy


@click.command(context_settings={"show_default": True, "max_content_width": 120})
@click.argument("snapshots", metavar="DIR|FILE ...", nargs=-1, required=True)
@click.option("--std", "stds", metavar="LIST", required=True, help="Relative widths of the wanted averages: 0.05,0.1.")
@click.option("--outdir", type=FOLDER, required=True, help="Where to write phema-IMAGES-STD.safetensors.")
@click.option("--nimg", metavar="COUNT", help="Snapshot at which they end, such as 32Mi.  [default: the last]")
@click.option("--dtype", type=click.Choice(("fp16", "float32")), default="fp16", help="Of kernels in the files.")
@click.option("--quiet", is_flag=True, help="No progress bar.")
def main(snapshots: tuple[str, ...], stds: str, outdir: str, nimg: str | None, dtype: str, quiet: bool) -> None:
    """Reconstruct averages that were not tracked in training from those that were (EDM2's post-hoc EMA).

    SNAPSHOTS are a run folder of this project, or files of one run: its .safetensors or EDM2's .pkl. A profile that
    would be more than 10 % off is refused: more snapshots, or a width nearer to theirs, help.

    \b
    python reconstruct_phema.py training-runs/img512-m --std 0.03,0.08,0.15 --outdir out/phema
    """
    with user_errors():
        widths, end = parse_widths(stds), None if nimg is None else parse_si(nimg)
        from training.reconstruction import reconstruct_files

        for line in reconstruct_files(snapshots, widths, end, outdir, half=dtype == "fp16", quiet=quiet):
            click.echo(line)


def parse_widths(text: str) -> list[float]:
    """Widths of profiles, as in 0.05,0.1. Raises BadParameter for what cannot be told apart in names of files."""
    try:
        widths = [float(part) for part in text.split(",")]
    except ValueError:
        raise click.BadParameter(f"{text!r}: write numbers with commas between them, as in 0.05,0.1") from None
    if any(std < 0.001 for std in widths):
        raise click.BadParameter(f"{text!r}: widths are at least 0.001, since names of files have three decimals")
    if len({f"{std:.3f}" for std in widths}) < len(widths):
        raise click.BadParameter(f"{text!r}: widths must differ in their first three decimals")
    return widths


if __name__ == "__main__":
    set_wait_policy()
    main()
