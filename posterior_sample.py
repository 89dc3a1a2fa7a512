"""Solve inverse problems (deblurring, super-resolution, inpainting, phase retrieval ...) with a generative denoiser."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from inverse.tasks import LIKELIHOODS, load_task, task_names
from torch_utils.errors import user_errors
from torch_utils.options import FOLDER, SEED
from torch_utils.threads import wait_passively

NETWORK = "PATH|URL|hf://ID[#sha256=HEX]"
BATCH = """Samples at once, per process. With 1 an image is the same, bit for bit, whatever else is drawn; more round
otherwise: float32 by less than a grey level (more where beta is far below 2·noise²), bf16 and fp16 by several."""
OVERRIDES = (  # options that replace a setting of the task
    "beta",
    "ema_decay",
    "ema_sigma",
    "noise",
    "steps",
    "sigma_min",
    "sigma_max",
    "rho",
    "likelihood",
    "langevin_steps",
    "langevin_c1",
    "langevin_c2",
    "ts",
    "zeta",
    "runs",
)


def _parse_ts(ctx: click.Context, param: click.Parameter, value: str | None) -> tuple[int, ...] | None:
    from sampling.grids import parse_ts

    try:
        return None if value is None else parse_ts(value).ts
    except ValueError as error:
        raise click.BadParameter(str(error)) from error


def _parse_class(ctx: click.Context, param: click.Parameter, value: str | None) -> int | str | None:
    if value is None or value == "data":
        return value
    if not value.isdecimal():
        raise click.BadParameter(f"{value!r}: give a class index, or 'data' for the classes in the data's dataset.json")
    return int(value)


@click.command(context_settings={"show_default": True, "max_content_width": 120})
@click.option("--net", "net_path", metavar=NETWORK, required=True, help="Generative denoiser; #sha256 checks the file.")
@click.option("--task", "task_path", metavar="NAME|FILE", required=True, help=f"{', '.join(task_names())}, or a .yaml.")
@click.option("--data", "data_path", metavar="DIR|ZIP", help="Images to measure and to find again.")
@click.option(
    "--measurements", metavar="DIR|ZIP", help="Real measurements instead of --data: .npz (array y), .npy, or images."
)
@click.option("--outdir", type=FOLDER, required=True, help="Results; a second call finishes what is missing.")
@click.option("--num", type=click.IntRange(min=1), help="The first so many images.  [default: all]")
@click.option("--resize", is_flag=True, help="Crop the centre of images of another size and resize it.")
@click.option("--mask", "mask_path", metavar="IMAGE", help="Inpainting: black pixels are removed; replaces the task's.")
@click.option("--class", "class_idx", metavar="INT|data", callback=_parse_class, help="Of conditional networks.")
@click.option("--seed", type=SEED, default=0, help="Of measurement noise and samples.")
@click.option("--runs", type=click.IntRange(min=1), help="Samples per image.  [default: the task's]")
@click.option("--batch", type=click.IntRange(min=1), default=16, help=BATCH)
@click.option("--ts", metavar="LIST", callback=_parse_ts, help="Few-step prior steps: grid indices, as 10,22,39.")
@click.option("--zeta", type=click.FloatRange(0, 1), help="With --ts: share of fresh noise between steps.")
@click.option("--noise", type=click.FloatRange(0), help="Task: standard deviation of simulated measurement noise.")
@click.option("--beta", type=float, help="Task: 2·(noise std)² that the sampler assumes.")
@click.option("--ema-decay", type=float, help="Task: share of the previous running estimate.")
@click.option("--ema-sigma", type=float, help="Task: noise level below which the estimate is averaged.")
@click.option("--steps", type=click.IntRange(min=2), help="Task: noise levels.")
@click.option("--sigma-min", type=float, help="Task: last noise level.")
@click.option("--sigma-max", type=float, help="Task: first noise level.")
@click.option("--rho", type=float, help="Task: exponent of the Karras grid of noise levels.")
@click.option("--likelihood", type=click.Choice(LIKELIHOODS), help="Task: auto is exact where the operator allows it.")
@click.option("--langevin-steps", type=click.IntRange(min=1), help="Task: Langevin iterations per likelihood step.")
@click.option("--langevin-c1", type=float, help="Task: Langevin step size on the prior's scale.")
@click.option("--langevin-c2", type=float, help="Task: smaller = longer Langevin steps under a strong likelihood.")
@click.option(
    "--lpips",
    type=click.Choice(["auto", "download", "off"]),
    default="auto",
    help="auto computes it where VGG-16's weights are at hand; download fetches them (528 MB).",
)
@click.option("--lpips-path", metavar="FILE|DIR", help="VGG-16's weights, vgg16-397923af.pth.")
@click.option(
    "--lpips-pooling",
    type=click.Choice(["max", "average"]),
    default="average",
    help="average: published tables; max: original.",
)
@click.option("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps.")
@click.option("--dtype", type=click.Choice(["auto", "float32", "bf16", "fp16"]), default="auto", help="Of the U-Net.")
@click.option("--quiet", is_flag=True, help="No progress bar.")
def main(task_path: str, device: str, **options: Any) -> None:
    """Draw samples of p(image | measurement) by plug-and-play sampling, and judge them.

    Writes samples, measurements, mean and std maps, metrics.json, metrics.csv and report.html, which shows them all.

    \b
    # 4x super-resolution of the first 10 images of a folder, 4 samples each
    python posterior_sample.py --net ncvsd-ffhq256-xs.pkl --task super_resolution --data ffhq_val \\
        --num 10 --runs 4 --outdir out/sr
    \b
    # Real measurements, on 8 GPUs
    torchrun --standalone --nproc-per-node 8 -- posterior_sample.py --net student.safetensors --task my_task.yaml \\
        --measurements scans --outdir out/scans
    """
    from torch_utils import distributed

    with user_errors():
        overrides = {name: options.pop(name) for name in OVERRIDES}
        task = load_task(task_path, {name: value for name, value in overrides.items() if value is not None})
        resolved = distributed.init(device)
        run = distributed.main_first(lambda: _prepare(task, resolved, **options))
        _sample(run, options["batch"], options["quiet"])
        distributed.barrier()
        if distributed.is_main():
            _evaluate(run)


@dataclass
class _Run:
    """What the checks of the request leave behind: everything is loaded, nothing is drawn."""

    net: Any
    operator: Any
    task: Any
    source: Any  # ImageFolder, or MeasurementFolder
    simulated: bool  # measurements are made from images, which are the truth
    classes: dict[str, int | None]
    folder: Any
    seed: int
    device: Any
    lpips: Any
    lpips_note: str | None


def _prepare(
    task: Any,
    device: Any,
    *,
    net_path: str,
    data_path: str | None,
    measurements: str | None,
    outdir: str,
    num: int | None,
    resize: bool,
    mask_path: str | None,
    class_idx: int | str | None,
    seed: int,
    dtype: str,
    lpips: str,
    lpips_path: str | None,
    lpips_pooling: str,
    batch: int,
    quiet: bool,
) -> _Run:
    import torch

    import networks
    from dnnlib.files import file_sha256
    from dnnlib.text import redact
    from inverse.inputs import ImageFolder, InputError, MeasurementFolder, read_mask
    from inverse.operators import get_operator
    from inverse.pnp import resolve_likelihood
    from inverse.results import ResultsFolder
    from networks.encoders import RGBEncoder
    from sampling.grids import few_step_sigmas
    from torch_utils import distributed

    if (data_path is None) == (measurements is None):
        raise click.UsageError("give either --data, images to measure, or --measurements, real ones")
    parameters = {name: value for name, value in task.operator.items() if name != "name"}
    if mask_path is not None:
        if task.operator["name"] != "inpainting":
            raise click.UsageError(f"--mask belongs to inpainting, and the task's operator is {task.operator['name']}")
        parameters = {"mask": read_mask(mask_path)}
    operator = get_operator(task.operator["name"], **parameters)
    resolve_likelihood(operator, task.likelihood)
    loaded = networks.load(net_path, device=device)
    net = loaded.net
    if not isinstance(net, networks.GenerativeDenoiser):
        raise ValueError(f"{net_path}: a {type(net).__name__}; inverse problems need a generative denoiser")
    if not isinstance(loaded.encoder, RGBEncoder):
        raise ValueError(f"{net_path}: works on latents; inverse problems need a network of pixels")
    if task.ts is not None:
        few_step_sigmas(task.ts, sigma_max=net.init_sigma)
    compute_dtype = {"auto": None, "float32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
    if compute_dtype == torch.float16 and device.type != "cuda":
        raise ValueError(f"float16 needs a CUDA device, not {device}: use float32 or bf16")
    net.compute_dtype = compute_dtype
    if device.type == "cpu":
        net.to(memory_format=torch.channels_last)

    scorer, note = None, None
    if data_path is not None:
        scorer, note = _load_lpips(lpips, lpips_path, lpips_pooling, net.img_resolution, device)
    shape = (1, net.img_channels, net.img_resolution, net.img_resolution)
    y_shape = operator.measurement_shape(shape)[1:]
    operator.forward(torch.zeros(shape))  # a mask or box that does not fit is told before anything is written
    if data_path is not None:
        source = ImageFolder(
            data_path, resolution=net.img_resolution, channels=net.img_channels, resize=resize, num=num
        )
    else:
        source = MeasurementFolder(measurements, shape=y_shape, pictures=operator.measures_images, num=num)
    inputs = Path(data_path or measurements).resolve()
    if inputs.is_dir() and Path(outdir).resolve().is_relative_to(inputs):
        raise InputError(f"{outdir} lies in {inputs}, and results would be taken for input: use another --outdir")
    classes = _classes(net, net_path, source, class_idx, data_path is not None)
    run = _Run(
        net=net,
        operator=operator,
        task=task,
        source=source,
        simulated=data_path is not None,
        classes=classes,
        folder=ResultsFolder(outdir),
        seed=seed,
        device=device,
        lpips=scorer,
        lpips_note=note,
    )
    if distributed.is_main():
        source.check()
        options = {
            "task": task.to_dict(),
            "net": redact(net_path),
            "net_sha256": file_sha256(loaded.path),
            "data": data_path,
            "measurements": measurements,
            "mask": mask_path,
            "resize": resize,
            "class": class_idx,
            "seed": seed,
            "dtype": dtype,
            "num": num,
            "batch": batch,
            "device": str(device),
        }
        run.folder.begin(options, operator, shape[2:])
    return run


def _classes(
    net: Any, net_path: str, source: Any, class_idx: int | str | None, has_images: bool
) -> dict[str, int | None]:
    """The class of every image by name. Raises ValueError where the network and the request do not fit."""
    if net.label_dim == 0:
        if class_idx is not None:
            raise ValueError(f"{net_path} has no classes: leave out --class")
        return dict.fromkeys(source.names)
    known = f"{net_path} has classes 0 to {net.label_dim - 1}"
    if class_idx is None:
        raise ValueError(f"{known}: give one with --class" + (", or --class data" if has_images else ""))
    if class_idx == "data" and not has_images:
        raise ValueError("--class data needs --data: measurements carry no classes")
    classes = source.labels() if class_idx == "data" else dict.fromkeys(source.names, class_idx)
    wrong = [c for c in classes.values() if c >= net.label_dim]
    if wrong:
        raise ValueError(f"{known}, and not {wrong[0]}")
    return classes


def _load_lpips(mode: str, path: str | None, pooling: str, resolution: int, device: Any) -> tuple[Any, str | None]:
    """LPIPS, or None and the reason."""
    from metrics.features.weights import DetectorError
    from metrics.image_quality import LPIPS_MIN_SIZE, load_lpips

    if mode == "off":
        return None, "switched off"
    if resolution < LPIPS_MIN_SIZE:
        return None, f"it needs images of at least {LPIPS_MIN_SIZE}x{LPIPS_MIN_SIZE} pixels"
    try:
        return load_lpips(path, variant=pooling, device=device, download=mode == "download"), None
    except DetectorError as error:
        if path is not None or mode == "download":
            raise
        return None, str(error)


def _sample(run: _Run, batch: int, quiet: bool) -> None:
    """Draw and write what this process's share of the images lacks."""
    import warnings

    from tqdm import tqdm

    from inverse.pnp import LangevinWarning
    from inverse.solve import Problem, simulate, solve
    from torch_utils import distributed

    todo = [name for name in run.source.names if run.folder.record(name) is None]
    distributed.barrier()  # all have looked before anyone writes
    distributed.print0(
        f"{run.task.name}: {run.task.runs} sample(s) each of {len(run.source.names)} images, "
        f"{run.task.steps} noise levels"
        + (f"; {len(run.source.names) - len(todo)} were finished before" if len(todo) < len(run.source.names) else ""),
        file=sys.stderr,
    )
    mine = todo[distributed.rank() :: distributed.world_size()]

    def problems() -> Iterator[Problem]:
        for name in mine:
            found = run.source.read(name)
            if run.simulated:
                y = simulate(run.operator, found, run.task.noise, seed=run.seed, name=name)
                yield Problem(name, y, found, run.classes[name])
            else:
                yield Problem(name, found, None, run.classes[name])

    total = len(mine) * run.task.runs
    layout = "{l_bar}{bar}| {n:.0f}/{total_fmt} [{elapsed}<{remaining}, {rate_fmt}]"
    disable = quiet or not total or not distributed.is_main()
    with (
        warnings.catch_warnings(),
        tqdm(total=total, unit="sample", bar_format=layout, disable=disable) as progress,
    ):
        warnings.simplefilter("ignore", LangevinWarning)  # recorded with each image, and told at the end
        for solution in solve(
            run.net,
            run.operator,
            run.task,
            problems(),
            seed=run.seed,
            batch=batch,
            device=run.device,
            progress=lambda samples: progress.update(min(samples, total - progress.n)),
        ):
            run.folder.write(solution, run.operator)


def _evaluate(run: _Run) -> None:
    from inverse.evaluation import evaluate, format_summary
    from inverse.report import write_report

    report = evaluate(run.folder.path, run.source.names, run.task.name, lpips=run.lpips, lpips_note=run.lpips_note)
    page = write_report(run.folder.path)
    click.echo(format_summary(report))
    click.echo(f"results: {run.folder.path}; page: {page}", err=True)


if __name__ == "__main__":
    wait_passively()
    main()
