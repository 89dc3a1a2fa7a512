"""The training loop of teachers and students: data, accumulation, updates, averages, checkpoints."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import networks
from dnnlib.util import atomic_write
from sampling.grid import image_grid, save_grid
from sampling.seeds import stream_seed
from torch_utils import distributed
from training.dataset import ImageDataset, InfiniteSampler
from training.noise import training_noise
from training.optim import DivergenceError, count_nonfinite, learning_rate, zero_nonfinite
from training.phema import PowerFunctionEMA
from training.presets import TrainingConfig
from training.records import Recorder, RunningMeans
from training.state import StateError, load_newest_state, save_state
from training.tasks import Batch, Phase, Task

GRID_SEEDS = range(64)
ADAM_BETAS = (0.9, 0.99)
MAY_CHANGE = (  # on resume
    "duration",
    "status",
    "snapshot",
    "checkpoint",
    "batch_gpu",
    "eval_ts",
    "eval_steps",
    "nonfinite",
    "nonfinite_limit",
)


@dataclasses.dataclass
class Run:
    """Where and how to train: all that does not change the result."""

    run_dir: Path
    device: torch.device
    seed: int = 0
    workers: int = 0  # processes that load data; 0 = this one
    provenance: dict[str, Any] = dataclasses.field(default_factory=dict)  # facts to keep in snapshots
    quiet: bool = False  # no progress bar


def train(task: Task, dataset: ImageDataset, encoder: Any, config: TrainingConfig, run: Run) -> nn.Module:
    """Train until `config.duration` images, resuming from the newest valid state; return the first average.

    An iteration runs every phase on a fresh batch and counts as `config.batch` images. The noise of an image depends
    on the seed and on its position in the run's image sequence alone. Raises ValueError where batch sizes do not fit
    the number of processes or the state belongs to another run, DivergenceError if gradients stay non-finite.
    """
    world = distributed.world_size()
    batch_gpu, rounds = split_batch(config, world)
    identity = _identity(config, run.seed, dataset, task)
    for p in task.phases:
        p.net.eval().requires_grad_(False)  # but for the one whose turn it is
    ema = PowerFunctionEMA(task.result, config.ema_stds)
    optimizers = {p.name: _optimizer(p.net, run.device) for p in task.phases}
    streaks = {p.name: 0 for p in task.phases}
    nimg, seconds = 0, 0.0
    _claim_folder(run.run_dir, identity)
    state = _newest_state(run.run_dir)
    if state is not None:
        for p in task.phases:
            p.net.load_state_dict(state["nets"][p.name])
            optimizers[p.name].load_state_dict(state["optimizers"][p.name])
        ema.load_state_dict(state["ema"])
        nimg, seconds, streaks = state["nimg"], state["seconds"], state["streaks"]
        del state

    recorder = Recorder(run.run_dir, config.duration, nimg, active=distributed.is_main(), quiet=run.quiet)
    recorder.log(f"resuming at {nimg} images" if nimg else f"training for {config.duration} images")
    means = RunningMeans()
    loader = _batches(dataset, batch_gpu, run, start=nimg * len(task.phases))
    since, started = nimg, time.perf_counter()

    def snapshot() -> None:
        """Averaged networks, one safetensors file per profile, and a sheet of samples for each schedule."""
        if not distributed.is_main():
            return
        for std, average in zip(ema.stds, ema.averages, strict=True):
            facts = dict(run.provenance, seed=run.seed, images_seen=nimg, ema_std=std, training_seconds=round(seconds))
            facts["config"] = dataclasses.asdict(config)
            path = run.run_dir / f"network-snapshot-{nimg:09d}-{std:.3f}.safetensors"
            networks.save(path, average, encoder, dtype=torch.float16, dataset=dataset.facts(), provenance=facts)
        try:
            grids = task.sample_grids(ema.averages[0], encoder, GRID_SEEDS, batch_gpu)
        except ValueError as error:  # latents whose autoencoder is not at hand
            recorder.log(f"no sample grids: {error}")
            return
        for name, images in grids.items():
            save_grid(run.run_dir / f"grid-{nimg:09d}-{name}.png", images)
            recorder.image(nimg, f"Samples/{name}", image_grid(images))

    def checkpoint() -> None:
        """Everything that a resumed run needs."""
        if distributed.is_main():
            nets = {p.name: p.net.state_dict() for p in task.phases}
            optims = {name: optimizer.state_dict() for name, optimizer in optimizers.items()}
            state = dict(nimg=nimg, seconds=seconds, streaks=streaks)
            save_state(run.run_dir, {**state, "nets": nets, "optimizers": optims, "ema": ema.state_dict()}, nimg)
        distributed.barrier()

    if nimg == 0:
        snapshot()
    while nimg < config.duration:
        iteration = nimg // config.batch * world + distributed.rank()
        torch.manual_seed(stream_seed((run.seed + 1 << 32) + iteration))  # of dropout, all else has its own streams
        lr = learning_rate(nimg, config)
        for index, phase in enumerate(task.phases):
            position = nimg * len(task.phases) + index * config.batch
            if nimg < phase.start:
                for _ in range(rounds):
                    next(loader)
                continue
            phase.net.train().requires_grad_(True)
            for k in range(rounds):
                raw, labels = next(loader)
                first = position + k * batch_gpu * world + distributed.rank()
                noise = training_noise(run.seed, range(first, first + batch_gpu * world, world), run.device)
                batch = Batch(_encode(encoder, raw, noise), labels.to(run.device), noise, nimg)
                terms = phase.loss(batch)
                terms.total.sum().mul(config.loss_scaling * world / config.batch).backward()
                for name, value in terms.reported.items():
                    means.add(f"Loss/{name}", value.detach().mean())
            average_gradients(phase.net)
            streaks[phase.name] = update_network(phase, optimizers[phase.name], lr, streaks[phase.name], config, means)
            phase.net.eval().requires_grad_(False)

        nimg += config.batch
        ema.update(nimg, config.batch)
        recorder.progress(config.batch)
        done = nimg >= config.duration
        if done or _crossed(nimg, config.batch, config.status):
            now = time.perf_counter()
            seconds, rate, since, started = seconds + now - started, (nimg - since) / (now - started), nimg, now
            values = {**means.read(), "Progress/img_per_s": rate, "Progress/lr": lr, "Progress/seconds": seconds}
            recorder.stats(nimg, values)
        if done or _crossed(nimg, config.batch, config.checkpoint):
            checkpoint()
        if done or _crossed(nimg, config.batch, config.snapshot):
            snapshot()

    recorder.log(f"finished at {nimg} images")
    recorder.close()
    return ema.averages[0]


def split_batch(config: TrainingConfig, world: int) -> tuple[int, int]:
    """Images per forward pass and accumulation rounds of each process. Raises ValueError where they do not add up."""
    batch_gpu = config.batch_gpu or config.batch // world
    rounds, rest = divmod(config.batch, max(batch_gpu, 1) * world)
    if rest or not rounds:
        raise ValueError(f"batch {config.batch} must be a multiple of batch_gpu {batch_gpu} times {world} processes")
    return batch_gpu, rounds


def average_gradients(net: nn.Module) -> None:
    """Mean of the gradients over all processes, in one message."""
    if distributed.world_size() == 1:
        return
    grads = [p.grad for p in net.parameters() if p.grad is not None]
    flat = torch.cat([g.flatten() for g in grads])
    torch.distributed.all_reduce(flat)
    flat /= distributed.world_size()
    for grad, part in zip(grads, flat.split([g.numel() for g in grads]), strict=True):
        grad.copy_(part.reshape(grad.shape))


def _optimizer(net: nn.Module, device: torch.device) -> torch.optim.Optimizer:
    return torch.optim.Adam(net.parameters(), betas=ADAM_BETAS, fused=device.type in ("cpu", "cuda"))


def update_network(
    phase: Phase, optimizer: torch.optim.Optimizer, lr: float, streak: int, config: TrainingConfig, means: RunningMeans
) -> int:
    """Check gradients and take one step; return the number of affected updates in a row."""
    bad = count_nonfinite(phase.net.parameters())
    means.add(f"Nonfinite/{phase.name}_entries", bad)
    means.add(f"Nonfinite/{phase.name}_updates", bad > 0)
    streak = streak + 1 if bad else 0
    if streak >= config.nonfinite_limit:
        raise DivergenceError(
            f"gradients of the {phase.name} network have been non-finite for {streak} updates in a row "
            f"({bad} entries in the last one): resume with --dtype bf16 or float32, or start anew with a lower --ref-lr"
        )
    if bad:
        zero_nonfinite(phase.net.parameters())
    if not bad or config.nonfinite == "zero":
        for group in optimizer.param_groups:
            group["lr"] = lr * phase.lr_scaling
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return streak


def _batches(dataset: ImageDataset, batch_gpu: int, run: Run, start: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless stream of this process's batches, from position `start` of the run's image sequence on."""
    rank, world = distributed.rank(), distributed.world_size()
    sampler = InfiniteSampler(len(dataset), rank=rank, num_replicas=world, seed=run.seed, start_index=start)
    loader = torch.utils.data.DataLoader(
        dataset,
        batch_size=batch_gpu,
        sampler=sampler,
        num_workers=run.workers,
        pin_memory=run.device.type == "cuda",
        prefetch_factor=2 if run.workers else None,
    )
    return iter(loader)


def _encode(encoder: Any, raw: Tensor, noise: Any) -> Tensor:
    latents = encoder.encode(raw.to(noise.device), randn_like=noise.randn_like)
    return latents.contiguous(memory_format=torch.channels_last)


def _crossed(nimg: int, batch: int, interval: int) -> bool:
    return nimg // interval != (nimg - batch) // interval


def _newest_state(run_dir: Path) -> dict[str, Any] | None:
    """Newest valid state; the main process looks first, so that it alone sets damaged files aside."""
    if not distributed.is_main():
        distributed.barrier()
    state = load_newest_state(run_dir, warn=distributed.print0)
    if distributed.is_main():
        distributed.barrier()
    return state


def _identity(config: TrainingConfig, seed: int, dataset: ImageDataset, task: Task) -> dict[str, Any]:
    """What a state must have in common with the run that resumes from it."""
    fields = {k: v for k, v in dataclasses.asdict(config).items() if k not in MAY_CHANGE}
    return {**fields, "seed": seed, "data": dataset.fingerprint(), "teacher": task.teacher_digest}


def _claim_folder(run_dir: Path, identity: dict[str, Any]) -> None:
    """Write run.json where it is new. Raises StateError where the folder holds a run with other settings."""
    path = run_dir / "run.json"
    wanted = json.loads(json.dumps(identity))
    if distributed.is_main() and not path.exists():
        with atomic_write(path, "w", encoding="utf-8") as file:
            json.dump(identity, file, indent=2)
    distributed.barrier()
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise StateError(f"{path} is damaged ({error}): restore it, or use another --outdir") from None
    differing = [k for k in sorted(stored.keys() | wanted.keys()) if stored.get(k) != wanted.get(k)]
    if differing:
        k = differing[0]
        raise StateError(
            f"{run_dir} holds a run with other settings ({', '.join(differing)}; its {k} is {stored.get(k)}, "
            f"now {wanted.get(k)}): give the same options to resume it, or another --outdir"
        )
