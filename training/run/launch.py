"""From command-line options to a run: devices, data, networks, what is printed first, and what errors say."""

import dataclasses
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import click
import torch

import networks
from data.dataset import DatasetError, ImageDataset, one_line
from dnnlib import ROOT
from dnnlib.text import first_line, redact
from generation.images import generate_images
from networks.encoders import Encoder, RGBEncoder, StabilityVAEEncoder
from networks.unet import set_recompute
from sampling.grids import parse_ts
from torch_utils import distributed
from training.loop import train
from training.presets import EDM2Config, NCVSDConfig, TrainingConfig
from training.run.evaluation import snapshot_metrics
from training.run.memory import memory_plan
from training.run.options import RunOptions
from training.run.session import Run
from training.tasks import Task, distillation_task, pretraining_task


def distil(config: NCVSDConfig, options: RunOptions, net: str, gnet: str | None = None) -> None:
    """Train a student of the teacher `net`, guided by `gnet` (files or URLs). Raises ValueError for bad ones."""

    def build(dataset: ImageDataset, device: torch.device) -> tuple[Task, Encoder]:
        loaded = networks.load(net, device=device)
        check_teacher(loaded, net, dataset, options.data, config.cond)
        guide = None if gnet is None else networks.load(gnet, device=device).net
        guided = dict(gnet=guide, guidance=config.guidance, gnet_labels=guide is not None or config.guidance == 1)
        generate_images(loaded.net, seeds=[], **guided)  # checks that they fit
        return distillation_task(loaded.net, config, guide), loaded.encoder.to(device)

    list(map(parse_ts, config.eval_ts))  # a mistake is told before anything is loaded
    launch(config, options, build)


def pretrain(config: EDM2Config, options: RunOptions) -> None:
    """Train a fresh teacher. Raises ValueError for latents that are not Stable Diffusion's."""

    def build(dataset: ImageDataset, device: torch.device) -> tuple[Task, Encoder]:
        if dataset.num_channels != 8 and dataset[0][0].dtype != "uint8":
            raise ValueError(
                f"{options.data} holds latents of {dataset.num_channels} channels, not 8 (mean and standard deviation "
                "of Stable Diffusion's autoencoder): make them with dataset_tool.py encode"
            )
        encoder = StabilityVAEEncoder() if dataset.num_channels == 8 else RGBEncoder()
        names = "model_channels channel_mult num_blocks attn_resolutions channels_per_head dropout".split()
        architecture = {name: getattr(config, name) for name in names}
        channels = encoder.latent_channels(dataset.num_channels)
        teacher = networks.Precond(dataset.resolution, channels, dataset.label_dim, **architecture).to(device)
        return pretraining_task(teacher, config), encoder

    launch(config, options, build)


def check_teacher(loaded: networks.LoadedNetwork, net: str, dataset: ImageDataset, data: str, cond: bool) -> None:
    """Raise ValueError where what `net` holds is no teacher, or none of the images in `data`."""
    teacher, encoder = loaded.net, loaded.encoder
    if not isinstance(teacher, networks.Precond):
        raise ValueError(f"{net} holds a {type(teacher).__name__}: --net takes a teacher (Precond)")
    if encoder.name == "sd-vae" and dataset.num_channels == 3:
        raise ValueError(f"{data} holds pixels, the teacher works on latents: use dataset_tool.py encode")
    if encoder.name == "rgb" and dataset[0][0].dtype != "uint8":
        raise ValueError(f"{data} holds latents, and the teacher {net} works on pixels: name the images themselves")
    found = (encoder.latent_channels(dataset.num_channels), dataset.resolution)
    wanted = (teacher.img_channels, teacher.img_resolution)
    if found != wanted:
        has, takes = (f"{channels} channels at {size}x{size}" for channels, size in (found, wanted))
        raise ValueError(f"{data} has images of {has}, the teacher {net} works on {takes}")
    if dataset.label_dim and dataset.label_dim != teacher.label_dim and (teacher.label_dim or cond):
        raise ValueError(f"{data} has {dataset.label_dim} classes, the teacher has {teacher.label_dim}")
    if teacher.label_dim and not dataset.label_dim:
        raise ValueError(f"the teacher has {teacher.label_dim} classes and {data} has no labels in use")


def launch(config: TrainingConfig, options: RunOptions, build: Callable[..., tuple[Task, Encoder]]) -> None:
    """Load the data, build the task and train. Mistakes of the user's are ValueError or ClickException, in one line."""
    device = distributed.init(options.device)
    configure_backends(options.deterministic)
    dtype = distributed.main_first(lambda: distributed.compute_dtype(options.dtype, device))
    batch, _ = distributed.main_first(lambda: config.split_batch(distributed.world_size()))
    path = Path(options.data)
    small = path.is_file() and path.stat().st_size <= 32 << 20  # kept in memory, decoded; a folder is read file by file
    arguments = dict(use_labels=config.cond, xflip=config.xflip, cache=small)
    dataset = distributed.main_first(lambda: ImageDataset(options.data, **arguments))
    torch.manual_seed(options.seed)
    task, encoder = distributed.main_first(lambda: build(dataset, device))
    for net in [phase.net for phase in task.phases] + list(task.frozen.values()):
        net.to(memory_format=torch.channels_last)
        net.compute_dtype = dtype
        set_recompute(net, options.checkpoint_activations)
    command = shlex.join(map(redact, sys.argv))
    description = _description(config, options, task, dataset, device, command)
    distributed.print0("\n".join(description), flush=True)
    evaluate = None
    if options.eval_metric:
        given = dict(reference=options.eval_ref, run_dir=options.run_dir, writing=not options.dry_run)
        given |= dict(batch=batch, schedules=task.schedules)
        evaluate = snapshot_metrics(options.eval_metric, options.eval_num, dataset, device, **given)
    provenance = {"command": command, "git_commit": git_commit()}
    options = dataclasses.replace(options, evaluate=evaluate, provenance=provenance, description=description)
    if options.dry_run:
        Run(task, dataset, encoder, config, options, device).dry_run()
        return
    distributed.main_first(lambda: options.run_dir.mkdir(parents=True, exist_ok=True))
    try:
        train(task, dataset, encoder, config, options, device)
    except DatasetError as error:
        raise click.ClickException(one_line(error)) from error
    except RuntimeError as error:
        if "deterministic" not in str(error):
            raise
        raise click.ClickException(f"{first_line(error)}; train without --deterministic") from error


def configure_backends(deterministic: bool) -> None:
    """Let cuDNN choose the fastest algorithms, or, where asked for, none whose result varies from run to run."""
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA's matrix library starts
    torch.use_deterministic_algorithms(deterministic)
    torch.backends.cudnn.benchmark = not deterministic
    torch.backends.cudnn.deterministic = deterministic


def git_commit() -> str | None:
    """Commit of the code that runs, with '+changes' where the working tree differs; None outside a repository."""
    git = ["git", "-C", str(ROOT), "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty=+changes"]
    try:
        return subprocess.run(git, check=True, capture_output=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _description(
    config: TrainingConfig, options: RunOptions, task: Task, dataset: ImageDataset, device: torch.device, command: str
) -> tuple[str, ...]:
    """What is about to run, and the memory that it needs, in lines."""
    phases, world = [(p.name, p.net) for p in task.phases], distributed.world_size()
    where = dict(world=world, shard=options.shard, ema_on_host=options.ema_device == "cpu" and device.type != "cpu")
    return (
        f"command   {command}",
        f"data      {options.data}: {json.dumps(dataset.facts())}",
        *(f"{name:9s} {sum(w.numel() for w in net.parameters()):,} parameters" for name, net in phases),
        *memory_plan(phases, task.frozen.items(), task.result, len(config.ema_stds), **where).lines(),
        f"device    {device}, {world} process(es), dtype {options.dtype}",
        f"settings  {json.dumps(dataclasses.asdict(config))}",
        *(f"warning   {text}" for text in config.warnings()),
    )
