"""Draw images from a distilled generative denoiser in one or a few steps, or from its teacher."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from typing import Any

import click

from generation.images import DEFAULT_STEPS, count_evaluations, generate_images, image_path
from torch_utils.errors import user_errors
from torch_utils.options import FOLDER
from torch_utils.threads import wait_passively

__all__ = ["generate_images", "main"]

MAX_GRID_IMAGES = 1024  # on one contact sheet
NETWORK = "PATH|URL|hf://ID[#sha256=HEX]"


def _parsed(parse: str) -> Callable[[click.Context, click.Parameter, str | None], Any]:
    """Return an option callback that reads the text with one of the two parsers, imported only when needed."""

    def callback(ctx: click.Context, param: click.Parameter, value: str | None) -> Any:
        from sampling.grids import parse_ts
        from sampling.seeds import parse_seeds

        if value is None:
            return None
        try:
            return parse_ts(value) if parse == "ts" else list(dict.fromkeys(parse_seeds(value)))
        except ValueError as error:
            raise click.BadParameter(str(error)) from error

    return callback


@click.command(context_settings={"show_default": True, "max_content_width": 120})
@click.option("--net", "net_path", metavar=NETWORK, required=True, help="Student or teacher; #sha256 checks the file.")
@click.option("--outdir", type=FOLDER, required=True, help="Where to write the images, one SEED.png each.")
@click.option("--seeds", metavar="LIST", default="0-15", callback=_parsed("seeds"), help="One image each: 1,2,5-10.")
@click.option("--class", "class_idx", type=click.IntRange(min=0), help="Of every image.  [default: drawn per seed]")
@click.option("--batch", type=click.IntRange(min=1), default=32, help="Largest batch per process.")
@click.option("--subdirs", is_flag=True, help="One folder per 1000 seeds.")
@click.option("--grid", is_flag=True, help=f"Also write grid.png: the first {MAX_GRID_IMAGES} seeds on one sheet.")
@click.option(
    "--ts",
    "schedule",
    metavar="LIST",
    callback=_parsed("ts"),
    help="Generative denoiser: increasing indices (0-39) of the 40-point Karras grid, n+1 for n steps. "
    "Published: 12,39 · 10,22,39 · 0,10,20,30,39.  [default: one direct step at the highest level]",
)
@click.option("--zeta", type=click.FloatRange(0, 1), default=1.0, help="With --ts: share of fresh noise between steps.")
@click.option(
    "--steps",
    type=click.IntRange(min=2),
    help=f"Teacher: noise levels N (2N-1 evaluations).  [default: {DEFAULT_STEPS}]",
)
@click.option("--gnet", "gnet_path", metavar=NETWORK, help="Teacher: guiding network, weaker or unconditional.")
@click.option("--guidance", type=float, default=1.0, help="Teacher: guidance strength, 1 = none.")
@click.option(
    "--gnet-no-labels",
    is_flag=True,
    help="Guide with no labels (classifier-free); without --gnet, by the network itself.",
)
@click.option("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps.")
@click.option(
    "--dtype",
    type=click.Choice(["auto", "float32", "bf16", "fp16"]),
    default="auto",
    help="Of the U-Nets; auto = fp16 on CUDA for networks trained with it, else float32.",
)
@click.option("--quiet", is_flag=True, help="No progress bar.")
def main(net_path: str, gnet_path: str | None, device: str, **options: Any) -> None:
    """Draw images with a generative denoiser (a few steps) or a teacher (Heun's method), chosen by the network's type.

    A seed gives the same image whatever the batch size and the number of processes.

    \b
    # Two steps, 16 images and a contact sheet
    python generate.py --net student.safetensors --ts 10,22,39 --grid --outdir out/two-steps
    \b
    # The teacher, 63 evaluations
    python generate.py --net teacher.safetensors --seeds 0-15 --outdir out/teacher
    \b
    # 50,000 images on 8 GPUs
    torchrun --standalone --nproc-per-node 8 generate.py --net student.safetensors --ts 10,22,39 --seeds 0-49999 \\
        --subdirs --outdir out/fid
    """
    from torch_utils import distributed

    with user_errors():
        resolved = distributed.init(device)
        # The main process downloads first, and what is wrong with the request is wrong in all processes alike.
        net, batches = distributed.main_first(lambda: _prepare(net_path, gnet_path, resolved, **options))
        _generate(net, batches, **options)


def _prepare(
    net_path: str,
    gnet_path: str | None,
    device: Any,
    *,
    schedule: Any,
    steps: int | None,
    gnet_no_labels: bool,
    dtype: str,
    grid: bool,
    quiet: bool,
    **options: Any,
) -> tuple[Any, Any]:
    """Return the network and this process's batches, after every check; nothing is drawn yet."""
    import torch

    import networks

    loaded = networks.load(net_path, device=device)
    gnet = networks.load(gnet_path, device=device).net if gnet_path is not None else None
    if device.type == "cpu":
        for net in [loaded.net] if gnet is None else [loaded.net, gnet]:
            net.to(memory_format=torch.channels_last)  # convolutions on the CPU run about a tenth faster
    batches = generate_images(
        loaded.net,
        loaded.encoder,
        gnet=gnet,
        ts=None if schedule is None else schedule.ts,
        num_steps=steps,
        gnet_labels=not gnet_no_labels,
        device=device,
        dtype=_compute_dtype(dtype),
        **options,
    )
    return loaded.net, batches


def _generate(
    net: Any,
    batches: Any,
    *,
    outdir: str,
    seeds: list[int],
    schedule: Any,
    steps: int | None,
    guidance: float,
    grid: bool,
    subdirs: bool,
    quiet: bool,
    **_: Any,
) -> None:
    from tqdm import tqdm

    from torch_utils import distributed

    distributed.print0(_describe(net, schedule, steps, guidance), file=sys.stderr)
    with tqdm(total=len(seeds), unit="img", disable=quiet or not distributed.is_main()) as progress:
        for batch in batches:
            drawn = len(batch.seeds) * distributed.world_size()
            progress.update(min(drawn, len(seeds) - progress.n))
    distributed.barrier()
    if grid and distributed.is_main():
        _write_grid(outdir, seeds, subdirs)


def _compute_dtype(name: str) -> Any:
    import torch

    return {"auto": None, "float32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[name]


def _describe(net: Any, schedule: Any, steps: int | None, guidance: float) -> str:
    """Return what is about to be drawn, with the noise levels of a few-step schedule."""
    from sampling.grids import describe_ts

    if hasattr(net, "init_sigma"):
        if schedule is None:
            return f"generative denoiser: 1 step, directly at noise level {net.init_sigma:.4g}"
        text = f"generative denoiser: {describe_ts(schedule.ts, sigma_max=net.init_sigma)}"
        if schedule.end_added:
            text += f" (39, the end of the schedule, was added: --ts {','.join(map(str, schedule.ts))})"
        return text
    text = f"teacher: Heun's method, {count_evaluations(net, num_steps=steps)} evaluations"
    return text if guidance == 1 else f"{text} of each network, guidance {guidance:g}"


def _write_grid(outdir: str, seeds: list[int], subdirs: bool) -> None:
    from pathlib import Path

    import numpy as np

    from generation.pictures import read_image, save_grid

    images = np.stack([read_image(image_path(outdir, seed, subdirs=subdirs)) for seed in seeds[:MAX_GRID_IMAGES]])
    path = Path(outdir) / "grid.png"
    save_grid(path, images, columns=math.ceil(math.sqrt(len(images))))
    click.echo(f"contact sheet of {len(images)} images: {path}", err=True)


if __name__ == "__main__":
    wait_passively()
    main()
