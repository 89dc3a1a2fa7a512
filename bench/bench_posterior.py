"""Where the time of posterior sampling goes, for every task: network, likelihood step, random numbers. Random weights.

python bench/bench_posterior.py --device cuda --preset ffhq256-xs --batch 25 --out bench/results/gpu_inverse.json
python bench/bench_posterior.py --device cpu --preset fashion16 --batch 4 --steps 5          in a minute
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import click
from bench_options import out_option

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]

FOLDERS = {"ffhq256-xs": "", "fashion16": "demo/"}  # architecture: where the tasks of that size are


class Stopwatch:
    """Seconds by stage: at any moment the innermost stage that was entered is the one that counts."""

    def __init__(self, device: Any) -> None:
        self.seconds: dict[str, float] = {}
        self._device = device
        self._stage, self._since = "likelihood", 0.0

    def start(self) -> None:
        self.seconds = {"network": 0.0, "likelihood": 0.0, "noise": 0.0}
        self._stage, self._since = "likelihood", self._now()

    def enter(self, stage: str) -> str:
        """Count for another stage from now on, and return the one before."""
        now, before = self._now(), self._stage
        self.seconds[before] += now - self._since
        self._stage, self._since = stage, now
        return before

    def timed(self, stage: str, function: Any) -> Any:
        """Return the function, whose time counts for `stage`."""

        def call(*args: Any, **kwargs: Any) -> Any:
            before = self.enter(stage)
            result = function(*args, **kwargs)
            self.enter(before)
            return result

        return call

    def _now(self) -> float:
        import torch

        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()


@click.command(context_settings={"show_default": True})
@click.option("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps.")
@click.option("--preset", type=click.Choice(sorted(FOLDERS)), default="ffhq256-xs", help="Whose architecture and size.")
@click.option("--task", "names", metavar="NAME", multiple=True, help="Repeatable.  [default: all of that size]")
@click.option("--batch", type=click.IntRange(1), default=25, help="Images at once.")
@click.option("--steps", type=click.IntRange(3), default=50, help="Noise levels.")
@click.option("--dtype", type=click.Choice(["auto", "float32", "bf16", "fp16"]), default="auto", help="Of the U-Net.")
@out_option()
def main(device: str, preset: str, names: tuple[str, ...], batch: int, steps: int, dtype: str, out: str | None) -> None:
    """Print seconds per image of one sample each, and the shares of network, likelihood step and random numbers.

    Each task's own settings but for the noise levels. Random numbers are drawn as posterior_sample.py does, on the CPU
    and one stream per image. The likelihood's share includes the running estimate.
    """
    import torch
    from bench_train import TEACHERS

    from dnnlib.files import write_json
    from inverse.tasks import load_task, task_names
    from networks import GenerativeDenoiser, PrecondCondition
    from torch_utils.distributed import compute_dtype, device_for
    from torch_utils.errors import user_errors

    with user_errors():
        folder = FOLDERS[preset]
        known = [name.removeprefix(folder) for name in task_names() if name.rpartition("/")[0] == folder.rstrip("/")]
        for name in names:
            if name not in known:
                raise click.BadParameter(f"{name}: one of {', '.join(known)}", param_hint="--task")
        resolved = device_for(device)
        torch.manual_seed(0)
        net = GenerativeDenoiser(PrecondCondition(**TEACHERS[preset])).eval().requires_grad_(False)
        net.to(resolved, memory_format=torch.channels_last)
        net.compute_dtype = compute_dtype(dtype, resolved)
        where = torch.cuda.get_device_name(resolved) if resolved.type == "cuda" else resolved.type
        shown = str(net.compute_dtype).removeprefix("torch.")
        print(f"{preset}, batch {batch}, {steps} noise levels, {shown}, {where}, random weights")
        print(f"{'task':22} {'step':9} {'s/image':>9} {'network':>8} {'likelihood':>11} {'numbers':>8} {'retries':>8}")
        rows = []
        for name in names or known:
            row = measure(net, load_task(folder + name, {"steps": steps}), batch, resolved)
            total = sum(row["seconds"].values())
            network, likelihood, noise = (f"{value / total:.1%}" for value in row["seconds"].values())
            print(
                f"{name:22} {row['likelihood']:9} {row['s_per_image']:9.4f} {network:>8} {likelihood:>11} {noise:>8} "
                f"{row['retries']:8d}",
                flush=True,
            )
            rows.append({"task": name, **row})
        if out is not None:
            report = {"preset": preset, "batch": batch, "steps": steps, "dtype": shown, "device": where, "rows": rows}
            write_json(Path(out), report)


def measure(net: Any, task: Any, batch: int, device: Any) -> dict[str, Any]:
    """Seconds of each stage for one sample of `batch` smooth random images, after a short run that warms up."""
    import warnings

    import torch

    from inverse.operators import get_operator
    from inverse.pnp import LangevinWarning, pnp_sample
    from sampling.grids import karras_sigmas
    from sampling.seeds import SeededNoise

    parameters = dict(task.operator)
    operator = get_operator(parameters.pop("name"), **parameters)
    coarse = SeededNoise(range(batch), device).randn([batch, net.img_channels, 4, 4])
    size = (net.img_resolution, net.img_resolution)
    truth = torch.nn.functional.interpolate(coarse, size, mode="bicubic").mul(0.5).clamp(-1, 1)
    y = operator.measure(truth, task.noise, SeededNoise(range(batch, 2 * batch), device).randn_like)
    labels = None
    if net.label_dim:
        labels = torch.nn.functional.one_hot(torch.arange(batch) % net.label_dim, net.label_dim).float().to(device)
    watch = Stopwatch(device)
    network = watch.timed("network", net)

    def sample(levels: Any) -> Any:
        return pnp_sample(
            network,
            operator,
            y,
            levels,
            **task.sampler_options(),
            labels=labels,
            shape=truth.shape,
            randn_like=watch.timed("noise", SeededNoise(range(batch), device).randn_like),
        )

    levels = karras_sigmas(task.steps, task.sigma_min, task.sigma_max, task.rho, dtype=torch.float64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", LangevinWarning)  # counted below
        watch.start()
        sample(levels[-3:])
        watch.start()
        result = sample(levels)
        watch.enter("likelihood")
    return {
        "likelihood": result.likelihood,
        "s_per_image": sum(watch.seconds.values()) / batch,
        "seconds": watch.seconds,
        "retries": int(result.retries.sum()),
    }


if __name__ == "__main__":
    from torch_utils.options import set_wait_policy

    set_wait_policy()
    main()
