"""From command-line options to a run: what train_edm2.py and train_ncvsd.py share."""

from __future__ import annotations

import dataclasses
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from dnnlib import ROOT
from dnnlib.text import first_line, parse_duration, redact
from torch_utils.errors import user_errors
from torch_utils.options import FOLDER
from training.presets import TrainingConfig, load_config, preset_names
from training.run import stop as stopping
from training.run.stop import StopRequest

CACHE_LIMIT = 256 << 20  # bytes of decoded images that are kept in memory
DTYPES = ("auto", "float32", "bf16", "fp16")


def common_options(kind: type[TrainingConfig]) -> Callable:
    """Click decorator with the options that every training script has."""
    names = ", ".join(preset_names(kind))
    options = [
        click.option("--outdir", type=FOLDER, required=True, help="Run folder: snapshots, statistics, states."),
        click.option("--data", metavar="DIR|ZIP", required=True, help="Training images or latents."),
        click.option("--preset", metavar="NAME|FILE", help=f"Settings to start from: {names}, or a .json file."),
        click.option("--seed", type=click.IntRange(0, 2**31 - 2), default=0, help="Of weights, order and noise."),
        click.option("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps."),
        click.option(
            "--dtype",
            type=click.Choice(DTYPES),
            default="auto",
            help="Of the U-Nets; auto = fp16 on CUDA, else float32.",
        ),
        click.option(
            "--workers", type=click.IntRange(0), default=None, help="Loader processes.  [default: 2 on CUDA, else 0]"
        ),
        click.option(
            "-n", "--dry-run", is_flag=True, help="Check options, networks and data, print the settings and stop."
        ),
        click.option("--quiet", is_flag=True, help="No progress bar."),
        click.option(
            "--max-time", metavar="TIME", help="Save and stop in time before so much has passed, as in 11h30m."
        ),
        click.option("--force-resume", is_flag=True, help="Resume although settings or data are not those of the run."),
        click.option("--shard", is_flag=True, help="Divide Adam's moments and the averages between the processes."),
        click.option(
            "--ema-device",
            type=click.Choice(("same", "cpu")),
            default="same",
            help="Where averages are kept: with the networks, or in host memory.",
        ),
        click.option(
            "--checkpoint-activations",
            is_flag=True,
            help="Compute activations again in the backward pass: less memory, more time.",
        ),
        click.option("--eval-metric", metavar="LIST", help="Measure each snapshot: fd_demo, fid, ...  [default: none]"),
        click.option("--eval-num", type=click.IntRange(2), default=2000, help="Images drawn for that."),
        click.option("--eval-ref", metavar="FILE|URL", help="Statistics to compare with.  [default: the data's]"),
        click.option(
            "--deterministic", is_flag=True, help="Use no operation whose result varies from run to run on a GPU."
        ),
    ]

    def decorate(function: Callable) -> Callable:
        for option in reversed(options):
            function = option(function)
        return function

    return decorate


def launch(kind: type[TrainingConfig], options: dict[str, Any], build: Callable) -> None:
    """Check the options, build the task with `build(config, options, dataset, device)` and train.

    Every mistake of the user's ends in one line and a non-zero exit.
    """
    started = stopping.clock()
    with user_errors("--batch-gpu"):
        limit = None if options["max_time"] is None else parse_duration(options["max_time"])
        with StopRequest(None if limit is None else started + limit) as stop:
            _launch(kind, options, build, stop)


def _launch(kind: type[TrainingConfig], options: dict[str, Any], build: Callable, stop: StopRequest) -> None:
    settings = {f.name: options.pop(f.name) for f in dataclasses.fields(kind)}
    config = load_config(kind, options["preset"], settings)
    run_dir = Path(options["outdir"])

    if options["deterministic"]:
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # else replicas remark on what `parallel` wants of them
    import torch

    from data.dataset import DatasetError, one_line
    from networks.unet import set_recompute
    from torch_utils import distributed
    from training.loop import train
    from training.optim import DivergenceError
    from training.run.resuming import dry_run

    device = distributed.init(options["device"])
    configure_backends(options["deterministic"])
    dataset = distributed.main_first(lambda: _load_data(config, options["data"]))
    torch.manual_seed(options["seed"])
    task, encoder = distributed.main_first(lambda: build(config, options, dataset, device))
    dtype = distributed.main_first(lambda: compute_dtype(options["dtype"], device))
    for net in [phase.net for phase in task.phases] + list(task.frozen.values()):
        net.to(memory_format=torch.channels_last)
        net.compute_dtype = dtype
        set_recompute(net, options["checkpoint_activations"])
    description = _description(config, options, task, dataset, device)
    distributed.print0("\n".join(description), flush=True)
    run = _run(config, options, task, dataset, device, stop)
    run.description = description
    if options["dry_run"]:
        dry_run(task, dataset.fingerprint(), config, run)
        return
    distributed.main_first(lambda: run_dir.mkdir(parents=True, exist_ok=True))
    try:
        train(task, dataset, encoder, config, run)
    except DatasetError as error:
        raise click.ClickException(one_line(error)) from error
    except DivergenceError as error:
        if not distributed.is_main():  # all processes saw it: one message is enough
            raise distributed.MainProcessError(str(error)) from error
        raise click.ClickException(str(error)) from error
    except RuntimeError as error:
        if "deterministic" not in str(error):
            raise
        raise click.ClickException(f"{first_line(error)}; train without --deterministic") from error


def _run(
    config: TrainingConfig, options: dict[str, Any], task: Any, dataset: Any, device: Any, stop: StopRequest
) -> Any:
    """What the options say about where and how to train. Collective."""
    import torch

    from torch_utils import distributed
    from training.loop import Run, split_batch

    run_dir = Path(options["outdir"])
    evaluate = None
    if options["eval_metric"]:
        from training.run.evaluation import snapshot_metrics

        evaluate = snapshot_metrics(
            options["eval_metric"],
            options["eval_num"],
            dataset,
            device,
            reference=options["eval_ref"],
            run_dir=run_dir,
            batch=split_batch(config, distributed.world_size())[0],
            schedules=task.schedules,
            writing=not options["dry_run"],
        )
    return Run(
        run_dir,
        device,
        options["seed"],
        options["workers"] if options["workers"] is not None else 2 * (device.type == "cuda"),
        {"command": shlex.join(map(redact, sys.argv)), "git_commit": git_commit()},
        options["quiet"],
        force_resume=options["force_resume"],
        stop=stop,
        shard=options["shard"],
        ema_device=torch.device("cpu") if options["ema_device"] == "cpu" else None,
        evaluate=evaluate,
    )


def compute_dtype(name: str, device: Any) -> Any:
    """Torch dtype of a --dtype choice; None for 'auto', the network's own default.

    Raises ValueError for float16 anywhere but on CUDA.
    """
    import torch

    if name == "fp16" and device.type != "cuda":
        raise ValueError(f"--dtype fp16 needs a CUDA device, and this run is on {device.type}: use bf16 or float32")
    return {"auto": None, "float32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[name]


def configure_backends(deterministic: bool) -> None:
    """Let cuDNN choose the fastest algorithms, or, where asked for, none whose result varies from run to run."""
    import torch

    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA's matrix library starts
    torch.use_deterministic_algorithms(deterministic)
    torch.backends.cudnn.benchmark = not deterministic
    torch.backends.cudnn.deterministic = deterministic


def git_commit() -> str | None:
    """Commit of the code that runs, with '+changes' where the working tree differs; None outside a repository."""
    try:
        commit = subprocess.run(
            ["git", "-C", str(ROOT), "rev-parse", "HEAD"], capture_output=True, text=True, check=True
        ).stdout.strip()
        changed = subprocess.run(
            ["git", "-C", str(ROOT), "status", "--porcelain", "--untracked-files=no"], capture_output=True, text=True
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit + ("+changes" if changed else "")


def _load_data(config: TrainingConfig, path: str) -> Any:
    """The data set. Raises ValueError where it, or the division of batches between processes, cannot be used."""
    from data.dataset import ImageDataset
    from torch_utils import distributed
    from training.loop import split_batch

    split_batch(config, distributed.world_size())
    return ImageDataset(path, use_labels=config.cond, xflip=config.xflip, cache=_is_small(path))


def _is_small(path: str) -> bool:
    """Whether a ZIP's images are worth keeping decoded; a folder is read file by file."""
    return Path(path).is_file() and Path(path).stat().st_size <= CACHE_LIMIT // 8


def _description(config: TrainingConfig, options: dict[str, Any], task: Any, dataset: Any, device: Any) -> list[str]:
    """What is about to run, and the memory that it needs, in lines."""
    from torch_utils import distributed
    from training.run.memory import memory_plan

    plan = memory_plan(
        [(p.name, p.net) for p in task.phases],
        task.frozen.items(),
        task.result,
        len(config.ema_stds),
        world=distributed.world_size(),
        shard=options["shard"],
        ema_on_host=options["ema_device"] == "cpu" and device.type != "cpu",
    )
    return [
        f"command   {shlex.join(map(redact, sys.argv))}",
        f"data      {options['data']}: {json.dumps(dataset.facts())}",
        *(f"{p.name:9s} {sum(w.numel() for w in p.net.parameters()):,} parameters" for p in task.phases),
        *plan.lines(),
        f"device    {device}, {distributed.world_size()} process(es), dtype {options['dtype']}",
        f"settings  {json.dumps(dataclasses.asdict(config))}",
        *(f"warning   {text}" for text in config.warnings()),
    ]
