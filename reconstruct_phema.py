"""Make networks of other EMA widths from the snapshots of a finished run."""

import sys

import click

from dnnlib.text import parse_si, redact
from torch_utils.errors import user_errors
from torch_utils.options import FOLDER
from torch_utils.threads import wait_passively


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
    try:
        widths = [float(part) for part in stds.split(",")]
    except ValueError:
        raise click.BadParameter(f"{stds!r}: write numbers with commas between them, as in 0.05,0.1") from None
    if any(std < 0.001 for std in widths):
        raise click.BadParameter(f"{stds!r}: widths are at least 0.001, since names of files have three decimals")
    if len({f"{std:.3f}" for std in widths}) < len(widths):
        raise click.BadParameter(f"{stds!r}: widths must differ in their first three decimals")
    with user_errors():
        end = None if nimg is None else parse_si(nimg)
        _reconstruct(snapshots, widths, end, outdir, dtype, quiet)


def _reconstruct(paths, widths, end, outdir, dtype, quiet):
    from pathlib import Path

    import torch
    from tqdm import tqdm

    import networks
    from training.reconstruction import find_snapshots, plan_reconstruction, reconstruct

    plan = plan_reconstruction(find_snapshots(paths), widths, end)
    with tqdm(total=len(plan.snapshots), unit="file", disable=quiet) as bar:
        results, last = reconstruct(plan, progress=lambda snapshot: bar.update())
    columns = zip(widths, results, plan.coefficients.T, plan.errors, strict=True)
    for std, weights, column, error in columns:
        net = last.net
        for name, p in net.named_parameters():
            p.copy_(weights[name])
        sources = {s.path.name: float(c) for s, c in zip(plan.snapshots, column, strict=True)}
        facts = dict(
            images_seen=plan.nimg, ema_std=std, command=[redact(part) for part in sys.argv], reconstructed_from=sources
        )
        facts["profile_error"] = float(error)
        path = Path(outdir) / f"phema-{plan.nimg:09d}-{std:.3f}.safetensors"
        kernels = torch.float16 if dtype == "fp16" else torch.float32
        networks.save(path, net, last.encoder, dtype=kernels, dataset=last.config["dataset"], provenance=facts)
        click.echo(
            f"{path}: from {len(plan.snapshots)} snapshots, coefficients {column.min():.3g} to {column.max():.3g}, "
            f"profile error {error:.2%}"
        )


if __name__ == "__main__":
    wait_passively()
    main()
