"""Make data sets for training: convert images, encode them to autoencoder latents, decode those again."""

import re
from typing import Any

import click

from torch_utils.errors import user_errors
from torch_utils.options import options, set_wait_policy


def _size(_: click.Context, __: click.Parameter, text: str | None) -> tuple[int, int] | None:
    """'64' or '512x384' -> (width, height)."""
    if text is None:
        return None
    match = re.fullmatch(r"(\d{1,5})(?:x(\d{1,5}))?", text)
    if not match or int(match[1]) < 1 or int(match[2] or match[1]) < 1:
        raise click.BadParameter(f"{text!r} is not a size such as 64 or 512x384 (width x height)")
    return int(match[1]), int(match[2] or match[1])


_common = options(
    click.option("--source", help="Input folder or file", metavar="PATH", required=True),
    click.option("--dest", help="Output folder, or archive if it ends in .zip", metavar="PATH", required=True),
    click.option("--max-images", help="Take only the first so many", metavar="INT", type=click.IntRange(min=1)),
)
_autoencoder = options(
    click.option("--vae", help="Autoencoder: local diffusers folder or Hub id", metavar="NAME",
                 default="stabilityai/sd-vae-ft-mse"),
    click.option("--batch", help="Images per pass", metavar="INT", type=click.IntRange(min=1), default=16),
    click.option("--device", help="auto, cpu, cuda, cuda:1, mps, ...", metavar="NAME", default="auto"),
)  # fmt: skip


@click.group(context_settings={"show_default": True})
def cli() -> None:
    """Make data sets in the EDM2 layout: a folder or an uncompressed ZIP of PNG pixels or NPY latents with labels.

    \b
    Examples:
      # ImageNet at 64x64, as published
      python dataset_tool.py convert --source imagenet/train --dest img64.zip \\
          --resolution 64x64 --transform center-crop-dhariwal --rgb
      # ImageNet at 512x512, then its latents
      python dataset_tool.py convert --source imagenet/train --dest img512.zip \\
          --resolution 512x512 --transform center-crop-dhariwal --rgb
      python dataset_tool.py encode --source img512.zip --dest img512-sd.zip
    """


@cli.command()
@_common
@options(
    click.option("--resolution", "size", help="Output size, such as 64 or 512x384", metavar="WxH", callback=_size),
    click.option("--transform", help="How to reach that size", default="none",
                 type=click.Choice(["none", "center-crop", "center-crop-wide", "center-crop-dhariwal"])),
    click.option("--filter", "resample", help="Filter for scaling (dhariwal has its own)", default="lanczos",
                 type=click.Choice(["lanczos", "box"])),
    click.option("--pad", help="Black pixels to add on every side first", metavar="INT", default=0,
                 type=click.IntRange(0, 4096)),
    click.option("--labels", help="Where labels come from", default="auto",
                 type=click.Choice(["auto", "none", "folders", "json"])),
    click.option("--rgb", help="Store grey images with three channels", is_flag=True),
    click.option("--compress", help="Compress the PNG files (smaller, slower to read)", is_flag=True),
)  # fmt: skip
def convert(dest: str, **given: Any) -> None:
    """Convert images to a data set.

    The source is a folder (searched recursively) or a ZIP of images, or MNIST-style IDX files. Images without
    --resolution must all be square and of one size. Labels: the source's dataset.json, or else the top-level folders
    in sorted order if there are several. Transforms:

    \b
      none                  scale to the resolution
      center-crop           cut the largest centred square, scale
      center-crop-wide      cut to the resolution's rows, scale, put on a black square
      center-crop-dhariwal  halve, scale the short side (bicubic), cut (ADM's ImageNet)
    """
    with user_errors():
        from data.convert import convert_dataset

        click.echo(f"{dest}: {convert_dataset(dest=dest, **given)}")


@cli.command()
@_common
@_autoencoder
def encode(dest: str, **given: Any) -> None:
    """Encode an image data set to Stable-Diffusion latents: 8 channels, mean and standard deviation."""
    with user_errors():
        from data.latents import encode_dataset

        click.echo(f"{dest}: {encode_dataset(dest=dest, **given)}")


@cli.command()
@_common
@_autoencoder
def decode(dest: str, **given: Any) -> None:
    """Decode the means of a data set of latents to images."""
    with user_errors():
        from data.latents import decode_dataset

        click.echo(f"{dest}: {decode_dataset(dest=dest, **given)}")


if __name__ == "__main__":
    set_wait_policy()
    cli()
