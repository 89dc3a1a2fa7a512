"""Fréchet distances and their relatives: of a network's images, of images on disk, and of a data set as reference."""

import click

from torch_utils.errors import user_errors
from torch_utils.options import COUNT, DTYPE, SEED, device_option, options, quiet_option, set_wait_policy

METRICS = """Of fid, fd_dinov2, fd_demo, kid, pr (precision and recall), is (inception score); kid:fd_demo takes another
detector's features.  [default: fid; with --detector its distance]"""
OWN = """A detector of your own, a TorchScript program (of a source that you trust) from uint8 images to features; its
distance is reported as fd_NAME."""
WEIGHTS = "Weights of the published detector, or their folder.  [default: $NCVSD_DETECTORS, else downloaded]"

common_options = options(
    click.option("--metrics", "metric_names", metavar="LIST", help=METRICS),
    click.option("--detector-path", metavar="PATH", help=WEIGHTS),
    click.option("--detector", "custom", metavar="FILE", help=OWN),
    click.option("--detector-name", metavar="NAME", help="Of --detector.  [default: the file's name]"),
    click.option("--batch", type=COUNT, default=64, help="Images at once, per process."),
    device_option,
    quiet_option,
)


@click.group(context_settings={"show_default": True, "max_content_width": 120})
def cli() -> None:
    """Compare images with a data set in the features of a pretrained network.

    \b
    # Statistics of a data set
    python calculate_metrics.py ref --data imagenet64.zip --dest img64.npz --metrics fid,fd_dinov2
    \b
    # 50,000 images of a network in one, two and four steps, on 8 GPUs
    torchrun --standalone --nproc-per-node 8 calculate_metrics.py gen --net student.safetensors --ref img64.npz \\
        --ts 12,39 --ts 10,22,39 --ts 0,10,20,30,39 --out fid.json
    (behind torchrun say --num-images for --num, which it takes for its own)
    \b
    # Images on disk
    python calculate_metrics.py calc --images out/fid --ref img64.npz
    """


@cli.command()
@click.option("--net", "net_path", metavar="PATH|URL|hf://ID", required=True, help="Student or teacher.")
@click.option("--ref", "ref_path", metavar="FILE|URL", required=True, help="Reference: .npz, or EDM2's .pkl.")
@common_options
@click.option("--num", "--num-images", "num", type=click.IntRange(min=2), default=50000, help="Images.")
@click.option("--seed", type=SEED, default=123456789, help="First seed; one seed per image.")  # of the published 50,000
@click.option("--ts", "schedules", metavar="LIST", multiple=True, help="Indices; repeatable.")
@click.option("--zeta", type=click.FloatRange(0, 1), default=1.0, help="With --ts: share of fresh noise between steps.")
@click.option("--sampler", type=click.Choice(["few-step", "heun"]), help="[default: by the network's kind]")
@click.option("--steps", type=click.IntRange(min=2), help="Teacher: noise levels N (2N-1 evaluations).  [default: 32]")
@click.option("--gnet", "gnet_path", metavar="PATH|URL|hf://ID", help="Teacher: guiding network.")
@click.option("--guidance", type=float, default=1.0, help="Teacher: guidance strength, 1 = none.")
@click.option("--class", "class_idx", type=click.IntRange(min=0), help="Of every image.  [default: drawn per seed]")
@click.option("--dtype", type=DTYPE, default="auto", help="Of the U-Nets.")
@click.option("--save-images", metavar="ZIP", help="Also keep the images, as a data set (one --ts only).")
@click.option("--out", metavar="JSON", help="Write the report here.")
def gen(**given: object) -> None:
    """Draw images with a network and evaluate them."""
    with user_errors():
        from metrics import commands

        commands.gen(**given)


@cli.command()
@click.option("--images", "images_path", metavar="DIR|ZIP", required=True, help="Square images of one size.")
@click.option("--ref", "ref_path", metavar="FILE|URL", required=True, help="Reference: .npz, or EDM2's .pkl.")
@common_options
@click.option("--num", "--num-images", "num", type=click.IntRange(min=2), help="Random subset.  [default: all images]")
@click.option("--seed", type=SEED, default=0, help="Of the subset.")
@click.option("--out", metavar="JSON", help="Write the report here.")
def calc(**given: object) -> None:
    """Evaluate images on disk."""
    with user_errors():
        from metrics import commands

        commands.calc(**given)


@cli.command()
@click.option("--data", "data_path", metavar="DIR|ZIP", required=True, help="Square images of one size.")
@click.option("--dest", metavar="NPZ", required=True, help="The statistics; replaced if it exists.")
@common_options
def ref(**given: object) -> None:
    """Compute the statistics of a data set, for --ref; with kid or pr among the metrics, its features as well."""
    with user_errors():
        from metrics import commands

        commands.ref(**given)


if __name__ == "__main__":
    set_wait_policy()
    cli()
