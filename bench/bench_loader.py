"""Images per second that the data path alone delivers, with and without loader processes, and its memory.

python bench/bench_loader.py                                   random 64x64 pixels and latents in ZIPs made for it
python bench/bench_loader.py --data img512-sd.zip --workers 4
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import click
from bench_options import out_option

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


def _counts(ctx: click.Context, param: click.Parameter, value: str) -> list[int]:
    try:
        counts = [int(part) for part in value.split(",")]
    except ValueError:
        counts = [-1]
    if min(counts) < 0:
        raise click.BadParameter(f"{value!r}: write whole numbers of 0 or more, as in 0,1,2")
    return counts


@click.command(context_settings={"show_default": True})
@click.option("--data", metavar="DIR|ZIP", help="Data set to read.  [default: random pixels and latents]")
@click.option("--images", type=click.IntRange(1), default=4096, help="Images to read for each figure.")
@click.option("--batch", type=click.IntRange(1), default=64)
@click.option("--workers", callback=_counts, default="0,1,2", help="Numbers of loader processes to compare.")
@out_option()
def main(data: str | None, images: int, batch: int, workers: list[int], out: str | None) -> None:
    """Print a table: kind of data, loader processes, images per second, resident memory of all processes."""
    from data.dataset import DatasetError, one_line
    from torch_utils.errors import user_errors

    with user_errors(), tempfile.TemporaryDirectory() as folder:
        sources = [data] if data else [make_data(Path(folder), kind) for kind in ("pixels", "latents")]
        try:
            rows = [measure(source, images, batch, count) for source in sources for count in workers]
        except DatasetError as error:  # with a traceback where it comes from a loader process
            raise click.ClickException(one_line(error)) from error
        print(f"{'data':24} {'workers':>7} {'img/s':>9} {'MiB/s':>7} {'memory MiB':>11}")
        for row in rows:
            rates = f"{row['img_per_s']:9.0f} {row['mib_per_s']:7.0f}"
            print(f"{row['data']:24} {row['workers']:7} {rates} {row['rss_mib']:11.0f}")
        if out:
            from dnnlib.files import write_json

            write_json(out, {"batch": batch, "images": images, "rows": rows})


def measure(source: str, images: int, batch: int, workers: int) -> dict[str, Any]:
    """One row: the loader of training on one data set, after a first batch that warms up."""
    import warnings

    import psutil
    import torch

    from data.dataset import ImageDataset, InfiniteSampler

    dataset = ImageDataset(source)
    sampler = InfiniteSampler(len(dataset))
    prefetch = 2 if workers else None
    options = dict(batch_size=batch, sampler=sampler, num_workers=workers, prefetch_factor=prefetch)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "This DataLoader will create")  # more processes than cores: what is measured
        loader = iter(torch.utils.data.DataLoader(dataset, **options))
    size = next(loader)[0][0].nbytes
    started, rounds = time.perf_counter(), max(images // batch, 1)
    for _ in range(rounds):
        next(loader)
    seconds = time.perf_counter() - started
    process = psutil.Process()
    resident = sum(p.memory_info().rss for p in [process, *process.children()])
    rate = rounds * batch / seconds
    return {
        "data": Path(source).name,
        "workers": workers,
        "img_per_s": rate,
        "mib_per_s": rate * size / 2**20,
        "rss_mib": resident / 2**20,
    }


def make_data(folder: Path, kind: str, count: int = 1024) -> str:
    """A ZIP of random 64x64 RGB images or 8-channel latents, in 1000 classes."""
    import numpy as np

    from data.pictures import encode_png
    from data.writer import DatasetWriter, encode_npy

    rng, path = np.random.default_rng(0), folder / f"{kind}.zip"
    with DatasetWriter(path) as writer:
        for i in range(count):
            label = int(rng.integers(1000))
            if kind == "pixels":
                data = encode_png(rng.integers(0, 256, (3, 64, 64), dtype=np.uint8))
                writer.add(f"00000/img{i:08d}.png", data, label)
            else:
                data = encode_npy(rng.standard_normal((8, 64, 64), dtype=np.float32))
                writer.add(f"00000/img-mean-std-{i:08d}.npy", data, label)
    return str(path)


if __name__ == "__main__":
    from torch_utils.options import set_wait_policy

    set_wait_policy()
    main()
