"""Seconds that a training state takes to copy, write and read, and for how long training is held up by one.

python bench/bench_state.py --gib 1 --dir training-runs --out bench/results/cpu_state.json
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

import click
from bench_options import out_option

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

FOLDER = click.Path(exists=True, file_okay=False, writable=True)


@click.command(context_settings={"show_default": True})
@click.option("--gib", type=click.FloatRange(0, 1024, min_open=True), default=1.0, help="Size of the state.")
@click.option("--dir", "folder", type=FOLDER, metavar="DIR", default=".", help="Where to write it.")
@click.option("--device", default="auto", help="Where its tensors are.")
@out_option()
def main(gib: float, folder: str, device: str, out: str | None) -> None:
    """Print seconds and MiB/s of each stage for a state of random tensors of 4 MiB."""
    import torch

    from torch_utils import distributed
    from torch_utils.errors import user_errors
    from training.run.parallel import to_host
    from training.run.state import StateWriter, newest_state

    with user_errors("--gib"):
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
            newest_state(run_dir)
            verified = time.perf_counter() - started
        stages = {"training is held up": stall, "until written": total, "verified and mapped": verified}
        rows = [{"stage": name, "seconds": s, "mib_per_s": 4 * count / s} for name, s in stages.items()]
        for row in rows:
            print(f"{row['stage']:20} {row['seconds']:7.2f} s {row['mib_per_s']:8.0f} MiB/s")
        if out:
            from dnnlib.files import write_json

            write_json(out, {"gib": count / 256, "device": str(resolved), "rows": rows})


if __name__ == "__main__":
    from torch_utils.options import set_wait_policy

    set_wait_policy()
    main()
