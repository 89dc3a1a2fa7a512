"""What `generate.py` does: images of seeds as PNG files, and a contact sheet of them."""

import math
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import numpy as np
import torch
from torch import nn
from tqdm import tqdm

import networks
from generation.images import GeneratedBatch, count_evaluations, generate_images, image_path
from generation.pictures import read_image, save_grid
from sampling.grids import ParsedSchedule, describe_ts, parse_ts
from sampling.seeds import parse_seeds
from torch_utils import distributed
from torch_utils.options import about

MAX_GRID_IMAGES = 1024  # on one contact sheet


def generate(
    *,
    net_path: str,
    gnet_path: str | None,  # guiding network
    outdir: str,
    seeds: str,  # as in 1,2,5-10
    class_idx: int | None,
    batch: int,
    subdirs: bool,
    grid: bool,
    ts: str | None,  # as in 10,22,39; None = one direct step, or a teacher
    zeta: float,
    steps: int | None,  # teacher: noise levels
    guidance: float,
    gnet_no_labels: bool,
    device: str,
    dtype: str,
    quiet: bool,
) -> None:
    """Draw an image per seed into a folder, in any number of processes. Raises ValueError for a bad request."""
    with about("--seeds"):
        numbers = list(dict.fromkeys(parse_seeds(seeds)))
    with about("--ts"):
        schedule = None if ts is None else parse_ts(ts)
    place = distributed.init(device)

    def prepare() -> tuple[nn.Module, Iterator[GeneratedBatch]]:
        loaded, guiding = load_networks(net_path, gnet_path, place)
        model = dict(gnet=guiding and guiding.net, gnet_labels=not gnet_no_labels, guidance=guidance, zeta=zeta)
        model |= dict(dtype=distributed.compute_dtype(dtype, place), num_steps=steps, ts=schedule and schedule.ts)
        files = dict(seeds=numbers, class_idx=class_idx, batch=batch, device=place, outdir=outdir, subdirs=subdirs)
        return loaded.net, generate_images(loaded.net, loaded.encoder, **model, **files)

    # The main process downloads first, and what is wrong with the request is wrong in all processes alike.
    net, batches = distributed.main_first(prepare)
    distributed.print0(_describe(net, schedule, steps, guidance), file=sys.stderr)
    with tqdm(total=len(numbers), unit="img", disable=quiet or not distributed.is_main()) as progress:
        for part in batches:
            progress.update(min(len(part.seeds) * distributed.world_size(), len(numbers) - progress.n))
    distributed.barrier()
    if grid and distributed.is_main():
        paths = [image_path(outdir, seed, subdirs=subdirs) for seed in numbers[:MAX_GRID_IMAGES]]
        sheet = Path(outdir) / "grid.png"
        save_grid(sheet, np.stack([read_image(path) for path in paths]), columns=math.ceil(math.sqrt(len(paths))))
        click.echo(f"contact sheet of {len(paths)} images: {sheet}", err=True)


def load_networks(net_path: str, gnet_path: str | None, device: torch.device) -> list[networks.LoadedNetwork | None]:
    """The network and the guiding one, in the layout in which a CPU draws about a tenth faster."""
    parts = [None if path is None else networks.load(path, device=device) for path in (net_path, gnet_path)]
    for part in filter(None, parts) if device.type == "cpu" else ():
        part.net.to(memory_format=torch.channels_last)
    return parts


def _describe(net: nn.Module, schedule: ParsedSchedule | None, steps: int | None, guidance: float) -> str:
    """Return what is about to be drawn, with the noise levels of a few-step schedule."""
    if not isinstance(net, networks.GenerativeDenoiser):
        text = f"teacher: Heun's method, {count_evaluations(net, num_steps=steps)} evaluations"
        return text if guidance == 1 else f"{text} of each network, guidance {guidance:g}"
    if schedule is None:
        return f"generative denoiser: 1 step, directly at noise level {net.init_sigma:.4g}"
    added = f" (39, the end of the schedule, was added: --ts {','.join(map(str, schedule.ts))})"
    return f"generative denoiser: {describe_ts(schedule.ts, sigma_max=net.init_sigma)}" + added * schedule.end_added
