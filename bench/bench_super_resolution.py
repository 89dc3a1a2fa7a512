"""The exact likelihood step of super-resolution against 100 Langevin steps: time, and what is left of the error.

python bench/bench_super_resolution.py --size 256 --factor 4 --batch 4 --out bench/results/cpu_super_resolution.json
"""

from __future__ import annotations

import statistics
import sys
import time
from pathlib import Path
from typing import Any

import click
from bench_options import out_option

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

BETA = 1e-3  # of the published super-resolution task


@click.command(context_settings={"show_default": True})
@click.option("--size", type=click.IntRange(8), default=256, help="Height and width of the images.")
@click.option("--factor", type=click.IntRange(2), default=4)
@click.option("--batch", type=click.IntRange(1), default=4)
@click.option("--langevin-steps", type=click.IntRange(1), default=100)
@click.option("--repeats", type=click.IntRange(1), default=5, help="Timed calls of each; the median counts.")
@click.option("--device", default="auto")
@out_option()
def main(size: int, factor: int, batch: int, langevin_steps: int, repeats: int, device: str, out: str | None) -> None:
    """Print a table: seconds per image of both steps, their ratio, and the error of the conditional mean.

    Both use the same separable matrices. The error is the root-mean-square difference, without noise, to the
    conditional mean, over that of the start; it is 0 for the exact step and what is left after the chain for Langevin.
    """
    from torch_utils import distributed
    from torch_utils.errors import user_errors

    with user_errors():
        result = measure(size, factor, batch, langevin_steps, repeats, distributed.device_for(device))
        print(f"super-resolution {size} -> {-(-size // factor)}, batch {batch}, 3 channels, {result['device']}")
        print(f"{'sigma':>8} {'exact s/img':>12} {'langevin s/img':>15} {'ratio':>7} {'langevin error':>15}")
        for row in result["rows"]:
            print(
                f"{row['sigma']:8.3f} {row['exact_seconds']:12.5f} {row['langevin_seconds']:15.5f} "
                f"{row['ratio']:7.1f} {row['langevin_error']:15.3f}"
            )
        if out:
            from dnnlib.files import write_json

            write_json(out, result)


def measure(size: int, factor: int, batch: int, steps: int, repeats: int, device: Any) -> dict[str, Any]:
    """Time both steps at a high, a middle and a low noise level."""
    import torch

    from inverse import get_operator
    from inverse.likelihood import langevin_step, likelihood_std

    generator = torch.Generator().manual_seed(0)
    operator = get_operator("super_resolution", factor=factor)
    truth = torch.rand([batch, 3, size, size], generator=generator).to(device) * 2 - 1
    y = operator.forward(truth)
    y = y + 0.05 * torch.randn(y.shape, generator=generator).to(device)
    x = truth + 0.1 * torch.randn(truth.shape, generator=generator).to(device)
    rows = []
    for sigma in (10.0, 1.0, 0.1):

        def exact(randn_like: Any = torch.randn_like, sigma: float = sigma) -> torch.Tensor:
            return operator.sample_conditional(x, y, likelihood_std(BETA), sigma, randn_like)

        def langevin(randn_like: Any = torch.randn_like, sigma: float = sigma) -> torch.Tensor:
            return langevin_step(operator, x, y, BETA, sigma, steps=steps, randn_like=randn_like).sample

        mean = exact(torch.zeros_like)
        error = (langevin(torch.zeros_like) - mean).norm() / (x - mean).norm()
        exact_seconds, langevin_seconds = (_median_seconds(step, repeats, device) / batch for step in (exact, langevin))
        rows.append(
            {
                "sigma": sigma,
                "exact_seconds": exact_seconds,
                "langevin_seconds": langevin_seconds,
                "ratio": langevin_seconds / exact_seconds,
                "langevin_error": float(error),
            }
        )
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu, {torch.get_num_threads()} threads"
    return {"size": size, "factor": factor, "batch": batch, "langevin_steps": steps, "device": name, "rows": rows}


def _median_seconds(step: Any, repeats: int, device: Any) -> float:
    import torch

    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)


if __name__ == "__main__":
    from torch_utils.options import set_wait_policy

    set_wait_policy()
    main()
