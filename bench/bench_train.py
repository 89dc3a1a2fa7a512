"""Half-precision error of teacher and student, and speed and memory of training with a random-weight teacher.

python bench/bench_train.py --preset img64-s --batch-gpu 64 --steps 20 --state-dir training-runs      on a GPU
python bench/bench_train.py --preset fashion16 --batch-gpu 64 --steps 5           on a CPU
"""

from __future__ import annotations

import gc
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
from bench_options import out_option

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

VARIANTS = ("contiguous", "compile")
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
@click.option(
    "--variants",
    metavar="LIST",
    help="dtype[+contiguous][+compile], ...: memory format of networks and images (else channels_last, as training), "
    "torch.compile.  [default: float32 and bf16 in both formats; on CUDA all dtypes, the rest with fp16]",
)
@click.option("--backend", default="inductor", help="Of torch.compile.")
@click.option(
    "--state-dir", metavar="DIR", help="Also write a training state there, in the last variant without compile."
)
@out_option()
def main(
    preset: str,
    batch_gpu: int,
    steps: int,
    device: str,
    variants: str | None,
    backend: str,
    state_dir: str | None,
    out: str | None,
) -> None:
    """Print a table of variants: relative error to float32, images per second, peak memory, seconds of each phase.

    A variant that needs more memory than there is gets a line that says so.
    """
    import torch

    from dnnlib.files import write_json
    from torch_utils import distributed
    from torch_utils.errors import user_errors
    from training.run.launch import configure_backends

    with user_errors("--batch-gpu"):
        resolved = distributed.device_for(device)
        configure_backends(deterministic=False)
        names = variants.split(",") if variants else _variants(resolved)
        for name in names:
            dtype, options = _parse(name)
            if dtype == "fp16" and resolved.type != "cuda":
                raise click.BadParameter(f"{name!r}: fp16 needs a CUDA device, and this run is on {resolved.type}")
            if "compile" in options and backend not in torch.compiler.list_backends(()):
                raise click.BadParameter(f"{backend!r}: one of {', '.join(torch.compiler.list_backends())}")
        if state_dir:
            Path(state_dir).mkdir(parents=True, exist_ok=True)
        with_state = [name for name in names if "compile" not in name][-1:] if state_dir else []
        print(f"{preset}, batch_gpu {batch_gpu}, {steps} iterations, {_device_name(resolved)}, random-weight teacher")
        print(f"{'variant':20} {'img/s':>8} {'peak GiB':>9} {'teacher err':>12} {'student err':>12}  phases, s")
        rows = []
        for name in names:
            try:
                folder = state_dir if name in with_state else None
                row = measure(preset, name, batch_gpu, steps, resolved, backend=backend, state_dir=folder)
            except torch.OutOfMemoryError:
                row = {"variant": name, "error": "out of memory"}
            _release(name, resolved)
            rows.append(row)
            print(_line(row), flush=True)
            if out:
                where = _device_name(resolved)
                write_json(out, {"preset": preset, "batch_gpu": batch_gpu, "device": where, "rows": rows})


def measure(
    preset: str, variant: str, batch_gpu: int, steps: int, device: Any, *, backend: str, state_dir: str | None
) -> dict[str, Any]:
    """One row: 2 + `steps` iterations of the three phases, with the averages, as one process trains."""
    import torch

    from torch_utils.distributed import compute_dtype
    from training.presets import NCVSDConfig, load_config
    from training.run.state import Trained
    from training.tasks import distillation_task

    dtype, options = _parse(variant)
    overrides = {"batch": batch_gpu, "batch_gpu": batch_gpu, "gan_warmup_kimg": 0.0}
    config = load_config(NCVSDConfig, preset, overrides)
    layout = torch.contiguous_format if "contiguous" in options else torch.channels_last
    teacher, images, labels = _teacher_and_data(preset, batch_gpu, device, layout)
    task = distillation_task(teacher, config)
    for phase in task.phases:
        phase.net.to(memory_format=layout).eval().requires_grad_(False)
    errors = {
        "teacher": _rounding(teacher, images, labels, dtype),
        "student": _rounding(task.result, images, labels, dtype, noise=torch.randn_like(images)),
    }
    if "compile" in options:
        import torch._dynamo.config

        torch._dynamo.config.cache_size_limit = 256  # networks and blocks share code: each shape and mode is one entry
    for net in [teacher, *(phase.net for phase in task.phases)]:
        net.compute_dtype = compute_dtype(dtype, device)
        if "compile" in options:
            getattr(net, "model", net).compile(backend=backend)
    trained = Trained(task, config, 0, device)

    def iterate(seconds: dict[str, float]) -> None:
        _iterate(task, config, trained, images, labels, seconds)

    warm: dict[str, float] = {}
    for _ in range(2):
        iterate(warm)
    _synchronize(device, reset_peak=True)
    seconds: dict[str, float] = {}
    for _ in range(steps):
        iterate(seconds)
    row = {
        "variant": variant,
        "img_per_s": steps * batch_gpu / sum(seconds.values()),
        "peak_gib": _peak_bytes(device) / 2**30,
        "teacher_error": errors["teacher"],
        "student_error": errors["student"],
        "warm_up_seconds": sum(warm.values()),
        "phase_seconds": {name: value / steps for name, value in seconds.items()},
    }
    if state_dir:
        row["state"] = write_state(trained, iterate, batch_gpu, Path(state_dir))
    return row


def _iterate(task: Any, config: Any, trained: Any, images: Any, labels: Any, seconds: dict[str, float]) -> None:
    """One iteration; adds what each phase took."""
    from training.noise import training_noise
    from training.optim import update_network
    from training.tasks import Batch

    batch, device = len(images), images.device
    for index, phase in enumerate(task.order):
        started = time.perf_counter()
        phase.net.train().requires_grad_(True)
        first = trained.nimg * len(task.order) + index * batch
        noise = training_noise(0, range(first, first + batch), device)
        terms = phase.loss(Batch(images, labels, noise, trained.nimg), phase.net)
        terms.total.sum().mul(config.loss_scaling / batch).backward()
        update_network(phase, trained.optimizers[phase.name], 1e-4, trained.health[phase.name], config)
        phase.net.eval().requires_grad_(False)
        _synchronize(device)
        seconds[phase.name] = seconds.get(phase.name, 0.0) + time.perf_counter() - started
    started = time.perf_counter()
    trained.nimg += batch
    trained.ema.update(trained.nimg, batch)
    _synchronize(device)
    seconds["ema"] = seconds.get("ema", 0.0) + time.perf_counter() - started


def _teacher_and_data(preset: str, count: int, device: Any, layout: Any) -> tuple[Any, Any, Any]:
    """A teacher with random weights that matter, images [N,C,H,W] and class weights."""
    import torch

    from networks import Precond

    torch.manual_seed(0)
    teacher = Precond(**TEACHERS[preset]).to(device, memory_format=layout)
    for name, p in teacher.named_parameters():
        if name.endswith(("emb_gain", "out_gain")):
            torch.nn.init.constant_(p, 0.5)
    shape = [count, teacher.img_channels, teacher.img_resolution, teacher.img_resolution]
    images = (torch.randn(shape, device=device) * 0.5).contiguous(memory_format=layout)
    labels = None
    if teacher.label_dim:
        classes = torch.randint(teacher.label_dim, [count], device=device)
        labels = torch.nn.functional.one_hot(classes, teacher.label_dim).float()
    return teacher.eval(), images, labels


def _rounding(net: Any, images: Any, labels: Any, dtype: str, noise: Any = None) -> float:
    """Relative difference between the outputs in `dtype` and in float32."""
    import torch

    from torch_utils.distributed import compute_dtype

    outputs = []
    for kind in ("float32", dtype):
        net.compute_dtype = compute_dtype(kind, images.device)
        draw = {} if noise is None else {"randn_like": lambda x: noise}
        with torch.no_grad():
            outputs.append(net(images, 1.0, labels, **draw))
    return float((outputs[1] - outputs[0]).norm() / outputs[0].norm())


def write_state(
    trained: Any, iterate: Callable[[dict[str, float]], None], batch_gpu: int, parent: Path
) -> dict[str, float]:
    """How long one training state holds training up, how long it takes to write, and the speed meanwhile."""
    from training.run.memory import tensor_bytes
    from training.run.state import StateWriter

    with tempfile.TemporaryDirectory(dir=parent) as folder:
        writer = StateWriter(Path(folder))
        started = time.perf_counter()
        copied = trained.host_state()
        stall = time.perf_counter() - started
        size = tensor_bytes(copied)
        writer.start(copied, trained.nimg, spent=stall)
        iterations, meanwhile = 0, {}
        while writer.last_good is None and not writer.failures:
            iterate(meanwhile)
            iterations += 1
            writer.poll()
        if writer.failures:
            raise click.ClickException(f"the state could not be written to {parent}")
        return {
            "gib": size / 2**30,
            "stall_seconds": stall,
            "copied_and_written_seconds": writer.seconds,
            "img_per_s_meanwhile": iterations * batch_gpu / sum(meanwhile.values()),
        }


def _line(row: dict[str, Any]) -> str:
    if "error" in row:
        return f"{row['variant']:20} {row['error']}"
    phases = "  ".join(f"{name} {seconds:.3f}" for name, seconds in row["phase_seconds"].items())
    line = (
        f"{row['variant']:20} {row['img_per_s']:8.1f} {row['peak_gib']:9.2f} {row['teacher_error']:12.2e} "
        f"{row['student_error']:12.2e}  {phases}  (warm-up {row['warm_up_seconds']:.0f})"
    )
    if "state" in row:
        state = row["state"]
        line += (
            f"\n  training state of {state['gib']:.2f} GiB: held up {state['stall_seconds']:.2f} s, written after "
            f"{state['copied_and_written_seconds']:.2f} s, {state['img_per_s_meanwhile']:.1f} img/s meanwhile"
        )
    return line


def _release(variant: str, device: Any) -> None:
    """Give back what a variant held, also one that was cut off."""
    import torch

    if "compile" in variant:
        torch.compiler.reset()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _parse(variant: str) -> tuple[str, list[str]]:
    """The dtype and the options of a variant."""
    dtype, *options = variant.split("+")
    unknown = [name for name in options if name not in VARIANTS]
    if dtype not in ("float32", "bf16", "fp16") or unknown:
        raise click.BadParameter(f"{variant!r}: a dtype (float32, bf16, fp16), then any of +{', +'.join(VARIANTS)}")
    return dtype, options


def _variants(device: Any) -> list[str]:
    if device.type != "cuda":
        return ["float32", "float32+contiguous", "bf16", "bf16+contiguous"]
    return ["fp16", "bf16", "fp16+contiguous", "fp16+compile", "bf16+compile", "float32"]


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
    from torch_utils.options import set_wait_policy

    set_wait_policy()
    main()
