"""Seconds that a training state takes to copy, write and read, and for how long training is held up by one.

python bench/bench_state.py --gib 1 --dir training-runs
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

import click

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


@click.command(context_settings={"show_default": True})
@click.option("--gib", type=float, default=1.0, help="Size of the state.")
@click.option("--dir", "folder", metavar="DIR", default=".", help="Where to write it.")
@click.option("--device", default="auto", help="Where its tensors are.")
def main(gib: float, folder: str, device: str) -> None:
    """Print seconds and MiB/s of each stage for a state of random tensors of 4 MiB."""
    import torch

    from torch_utils import distributed
    from training.state import find_newest_state, to_host
    from training.writer import StateWriter

    resolved = distributed.device_for(device)
    count = max(int(gib * 256), 1)
    state = {"nets": {f"w{i}": torch.randn(1024, 1024, device=resolved) for i in range(count)}, "nimg": 1}
    with tempfile.TemporaryDirectory(dir=folder) as run_dir:
        writer = StateWriter(Path(run_dir))
        started = time.perf_counter()
        writer.start(to_host(state), 1)
        stall = time.perf_counter() - started
        writer.wait()
        total = time.perf_counter() - started
        if writer.failures:
            raise click.ClickException("the state could not be written")
        started = time.perf_counter()
        find_newest_state(run_dir)
        verified = time.perf_counter() - started
    for name, seconds in (("training is held up", stall), ("until written", total), ("verified and mapped", verified)):
        print(f"{name:20} {seconds:7.2f} s {4 * count / seconds:8.0f} MiB/s")


if __name__ == "__main__":
    main()
