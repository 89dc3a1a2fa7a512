"""Make data sets for training: convert images, encode them to autoencoder latents, decode those again."""

import re
from collections.abc import Callable, Iterable
from typing import Any

import click

from torch_utils.errors import user_errors


def parse_resolution(_: click.Context, __: click.Parameter, text: str | None) -> tuple[int, int] | None:
    """'64' or '512x384' -> (width, height)."""
    if text is None:
        return None
    match = re.fullmatch(r"(\d{1,5})(?:x(\d{1,5}))?", text)
    if not match or int(match[1]) < 1 or int(match[2] or match[1]) < 1:
        raise click.BadParameter(f"{text!r} is not a size such as 64 or 512x384 (width x height)")
    return int(match[1]), int(match[2] or match[1])


def progress(unit: str) -> Callable[[Iterable[Any]], Iterable[Any]]:
    from tqdm import tqdm

    return lambda items: tqdm(items, unit=unit, dynamic_ncols=True)


def report(result: Any, dest: str) -> None:
    shape = "x".join(map(str, result.image_shape))
    labels = "with labels" if result.labelled else "without labels"
    skipped = f"; {result.num_skipped} too small for the resolution were left out" if result.num_skipped else ""
    click.echo(f"{dest}: {result.num_images} files of {shape} (channels, height, width) {labels}{skipped}")


def make_encoder(vae: str, batch: int, device: str) -> Any:
    from networks.encoders import StabilityVAEEncoder
    from torch_utils import distributed

    return StabilityVAEEncoder(vae, batch_size=batch).to(distributed.device_for(device))


@click.group()
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


def common_options(command: Callable) -> Callable:
    for option in reversed([
        click.option("--source", help="Input folder or file", metavar="PATH", required=True),
        click.option("--dest", help="Output folder, or archive if it ends in .zip", metavar="PATH", required=True),
        click.option("--max-images", help="Take only the first so many", metavar="INT", type=click.IntRange(min=1)),
    ]):  # fmt: skip
        command = option(command)
    return command


def vae_options(command: Callable) -> Callable:
    for option in reversed([
        click.option("--vae", help="Autoencoder: local diffusers folder or Hub id", metavar="NAME",
                     default="stabilityai/sd-vae-ft-mse", show_default=True),
        click.option("--batch", help="Images per pass", metavar="INT", type=click.IntRange(min=1), default=16,
                     show_default=True),
        click.option("--device", help="auto, cpu, cuda, cuda:1, mps, ...", metavar="NAME", default="auto",
                     show_default=True),
    ]):  # fmt: skip
        command = option(command)
    return command


@cli.command()
@common_options
@click.option("--resolution", help="Output size, such as 64 or 512x384", metavar="WxH", callback=parse_resolution)
@click.option(
    "--transform",
    help="How to reach that size",
    default="none",
    show_default=True,
    type=click.Choice(["none", "center-crop", "center-crop-wide", "center-crop-dhariwal"]),
)
@click.option(
    "--filter",
    "resample",
    help="Filter for scaling (dhariwal has its own)",
    default="lanczos",
    show_default=True,
    type=click.Choice(["lanczos", "box"]),
)
@click.option(
    "--pad",
    help="Black pixels to add on every side first",
    metavar="INT",
    default=0,
    show_default=True,
    type=click.IntRange(0, 4096),
)
@click.option(
    "--labels",
    help="Where labels come from",
    default="auto",
    show_default=True,
    type=click.Choice(["auto", "none", "folders", "json"]),
)
@click.option("--rgb", help="Store grey images with three channels", is_flag=True)
@click.option("--compress", help="Compress the PNG files (smaller, slower to read)", is_flag=True)
def convert(source: str, dest: str, resolution: tuple[int, int] | None, **options: Any) -> None:
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

        report(convert_dataset(source, dest, size=resolution, progress=progress("img"), **options), dest)


@cli.command()
@common_options
@vae_options
def encode(source: str, dest: str, vae: str, batch: int, device: str, max_images: int | None) -> None:
    """Encode an image data set to Stable-Diffusion latents: 8 channels, mean and standard deviation."""
    with user_errors():
        from data.convert import encode_dataset

        encoder = make_encoder(vae, batch, device)
        bar = progress("batch")
        report(encode_dataset(source, dest, encoder, batch_size=batch, max_images=max_images, progress=bar), dest)


@cli.command()
@common_options
@vae_options
def decode(source: str, dest: str, vae: str, batch: int, device: str, max_images: int | None) -> None:
    """Decode the means of a data set of latents to images."""
    with user_errors():
        from data.convert import decode_dataset

        encoder = make_encoder(vae, batch, device)
        bar = progress("batch")
        report(decode_dataset(source, dest, encoder, batch_size=batch, max_images=max_images, progress=bar), dest)


if __name__ == "__main__":
    cli()
