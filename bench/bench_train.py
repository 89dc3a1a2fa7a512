"""Half-precision error of teacher and student, and speed and memory of training with a random-weight teacher.

python bench/bench_train.py --preset img64-s --batch-gpu 64 --steps 20            on a GPU
python bench/bench_train.py --preset fashion16 --batch-gpu 64 --steps 5           on a CPU
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import click

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

TEACHERS = {  # architecture of each preset's teacher
    "img64-s": dict(img_resolution=64, img_channels=3, label_dim=1000, model_channels=192),
    "img512-s": dict(img_resolution=64, img_channels=4, label_dim=1000, model_channels=192),
    "ffhq256-xs": dict(img_resolution=256, img_channels=3, label_dim=0, model_channels=128),
    "fashion16": dict(
        img_resolution=16,
        img_channels=1,
        label_dim=10,
        model_channels=32,
        channel_mult=[1, 2],
        num_blocks=1,
        attn_resolutions=[8],
        channels_per_head=32,
    ),
}


@click.command(context_settings={"show_default": True})
@click.option("--preset", type=click.Choice(sorted(TEACHERS)), default="fashion16")
@click.option("--batch-gpu", type=click.IntRange(1), default=64)
@click.option("--steps", type=click.IntRange(1), default=20, help="Timed iterations, after two that warm up.")
@click.option("--device", default="auto")
@click.option("--out", metavar="FILE", help="Also write JSON.")
def main(preset: str, batch_gpu: int, steps: int, device: str, out: str | None) -> None:
    """Print a table of dtypes: relative error to float32, images per second, peak memory, seconds of each phase."""
    from torch_utils import distributed

    resolved = distributed.device_for(device)
    rows = [measure(preset, dtype, batch_gpu, steps, resolved) for dtype in _dtypes(resolved)]
    base = rows[0]["img_per_s"]
    print(f"{preset}, batch_gpu {batch_gpu}, {steps} iterations, {_device_name(resolved)}, random-weight teacher")
    print(f"{'dtype':9} {'img/s':>8} {'ratio':>6} {'peak GiB':>9} {'teacher err':>12} {'student err':>12}  phases, s")
    for row in rows:
        phases = "  ".join(f"{name} {seconds:.3f}" for name, seconds in row["phase_seconds"].items())
        print(
            f"{row['dtype']:9} {row['img_per_s']:8.1f} {row['img_per_s'] / base:6.2f} {row['peak_gib']:9.2f} "
            f"{row['teacher_error']:12.2e} {row['student_error']:12.2e}  {phases}"
        )
    if out:
        from dnnlib.util import atomic_write

        Path(out).parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(out, "w") as file:
            json.dump({"preset": preset, "batch_gpu": batch_gpu, "device": _device_name(resolved), "rows": rows}, file)


def measure(preset: str, dtype: str, batch_gpu: int, steps: int, device: Any) -> dict[str, Any]:
    """One row: 2 + `steps` iterations of the three phases in one compute dtype."""
    import torch

    from networks import Precond
    from training.launch import compute_dtype
    from training.noise import training_noise
    from training.optim import Health, update_network
    from training.presets import NCVSDConfig, load_config
    from training.records import RunningMeans
    from training.tasks import Batch, distillation_task

    torch.manual_seed(0)
    overrides = {"batch": batch_gpu, "batch_gpu": batch_gpu, "gan_warmup_kimg": 0.0}
    config = load_config(NCVSDConfig, preset, overrides)
    teacher = Precond(**TEACHERS[preset]).to(device, memory_format=torch.channels_last)
    for name, p in teacher.named_parameters():
        if name.endswith(("emb_gain", "out_gain")):
            torch.nn.init.constant_(p, 0.5)
    teacher.eval()
    shape = [batch_gpu, teacher.img_channels, teacher.img_resolution, teacher.img_resolution]
    images = (torch.randn(shape, device=device) * 0.5).contiguous(memory_format=torch.channels_last)
    labels = None
    if teacher.label_dim:
        classes = torch.randint(teacher.label_dim, [batch_gpu], device=device)
        labels = torch.nn.functional.one_hot(classes, teacher.label_dim).float()

    task = distillation_task(teacher, config)
    errors = {}
    for name, net, noise in (("teacher", teacher, None), ("student", task.result, torch.randn_like(images))):
        outputs = []
        for kind in ("float32", dtype):
            net.compute_dtype = compute_dtype(kind, device)
            draw = {} if noise is None else {"randn_like": lambda x, noise=noise: noise}
            with torch.no_grad():
                outputs.append(net(images, 1.0, labels, **draw))
        errors[name] = float((outputs[1] - outputs[0]).norm() / outputs[0].norm())
    for phase in task.phases:
        phase.net.eval().requires_grad_(False)
        phase.net.compute_dtype = compute_dtype(dtype, device)
    optimizers = {p.name: torch.optim.Adam(p.net.parameters(), betas=(0.9, 0.99)) for p in task.phases}
    seconds = {p.name: 0.0 for p in task.phases}
    for step in range(2 + steps):
        if step == 2:
            _synchronize(device, reset_peak=True)
            seconds = {name: 0.0 for name in seconds}
        for index, phase in enumerate(task.phases):
            started = time.perf_counter()
            phase.net.train().requires_grad_(True)
            first = (3 * step + index) * batch_gpu
            noise = training_noise(0, range(first, first + batch_gpu), device)
            terms = phase.loss(Batch(images, labels, noise, nimg=step * batch_gpu), phase.net)
            (terms.total.sum() / batch_gpu).backward()
            update_network(phase, optimizers[phase.name], 1e-4, Health(), config, RunningMeans())
            phase.net.eval().requires_grad_(False)
            _synchronize(device)
            seconds[phase.name] += time.perf_counter() - started
    return {
        "dtype": dtype,
        "img_per_s": steps * batch_gpu / sum(seconds.values()),
        "peak_gib": _peak_bytes(device) / 2**30,
        "teacher_error": errors["teacher"],
        "student_error": errors["student"],
        "phase_seconds": {name: value / steps for name, value in seconds.items()},
    }


def _dtypes(device: Any) -> list[str]:
    return ["float32", "bf16"] + ["fp16"] * (device.type == "cuda")


def _device_name(device: Any) -> str:
    import torch

    return (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"{device.type}, {torch.get_num_threads()} threads"
    )


def _synchronize(device: Any, reset_peak: bool = False) -> None:
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)
        if reset_peak:
            torch.cuda.reset_peak_memory_stats(device)


def _peak_bytes(device: Any) -> int:
    import psutil
    import torch

    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else psutil.Process().memory_info().rss


if __name__ == "__main__":
    main()
