"""Fréchet distance through symmetric eigenvalues against the formula with scipy.linalg.sqrtm: seconds and values.

python bench/bench_frechet.py --threads 1 --out bench/results/cpu_frechet.json
"""

from __future__ import annotations

import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
from bench_options import out_option

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


@click.command(context_settings={"show_default": True})
@click.option("--dims", default="64,512,2048", help="Feature dimensions, with commas between them.")
@click.option("--repeats", type=click.IntRange(1), default=3, help="Timed calls of ours; the fastest counts.")
@click.option("--threads", type=click.IntRange(1), default=1, help="Of both.")
@out_option()
def main(dims: str, repeats: int, threads: int, out: str | None) -> None:
    """Print a table of feature dimensions: seconds of both, their ratio, relative difference of the two values."""
    from torch_utils.errors import user_errors

    try:
        sizes = [int(dim) for dim in dims.split(",")]
    except ValueError as error:
        raise click.BadParameter(f"{dims!r}: write whole numbers, as in 64,512", param_hint="--dims") from error
    if min(sizes) < 1:
        raise click.BadParameter(f"{dims!r}: dimensions are at least 1", param_hint="--dims")
    with user_errors("--dims"):
        environment = _environment(threads)
        print(", ".join(f"{key} {value}" for key, value in environment.items()))
        print(f"{'dim':>5} {'sqrtm, s':>10} {'ours, s':>10} {'ratio':>7} {'difference':>11}")
        rows = []
        for dim in sizes:
            row = measure(dim, repeats)
            rows.append(row)
            print(
                f"{dim:5} {row['sqrtm_seconds']:10.4f} {row['seconds']:10.4f} {row['ratio']:7.1f} "
                f"{row['relative_difference']:11.1e}",
                flush=True,
            )
        if out:
            from dnnlib.files import write_json

            write_json(out, {**environment, "rows": rows})


def measure(dim: int, repeats: int) -> dict[str, float]:
    """One row: well-conditioned statistics with eigenvalues between 0.1 and 10, in two unrelated bases."""
    import numpy as np
    import scipy.linalg

    from metrics.distances import frechet_distance

    rng = np.random.default_rng(dim)
    statistics = []
    for _ in range(2):
        basis, _ = np.linalg.qr(rng.standard_normal((dim, dim)))
        statistics += [rng.standard_normal(dim), (basis * np.geomspace(0.1, 10, dim)) @ basis.T]

    def reference() -> float:
        mu1, cov1, mu2, cov2 = statistics
        root = scipy.linalg.sqrtm(cov1 @ cov2).real
        return float(((mu1 - mu2) ** 2).sum() + np.trace(cov1 + cov2 - 2 * root))

    expected, slow = _timed(reference, repeats if dim <= 512 else 1)
    value, fast = _timed(lambda: frechet_distance(*statistics), repeats)
    return {
        "dim": dim,
        "sqrtm_seconds": slow,
        "seconds": fast,
        "ratio": slow / fast,
        "relative_difference": abs(value - expected) / expected,
    }


def _timed(function: Callable[[], float], repeats: int) -> tuple[float, float]:
    """The value and the fewest seconds of a call."""
    seconds, value = [], 0.0
    for _ in range(repeats):
        started = time.perf_counter()
        value = function()
        seconds.append(time.perf_counter() - started)
    return value, min(seconds)


def _environment(threads: int) -> dict[str, Any]:
    """Set the number of threads of all libraries, and say what ran. To be called before numpy is imported."""
    import os

    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[name] = str(threads)
    import numpy
    import scipy
    import torch

    torch.set_num_threads(threads)
    return {
        "device": f"cpu ({platform.machine()})",
        "threads": threads,
        "numpy": numpy.__version__,
        "scipy": scipy.__version__,
        "torch": torch.__version__,
    }


if __name__ == "__main__":
    from torch_utils.options import set_wait_policy

    set_wait_policy()
    main()
