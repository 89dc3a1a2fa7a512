"""The training loop of teachers and students: data, accumulation, updates, averages, checkpoints."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import networks
from data.dataset import ImageDataset, InfiniteSampler
from generation.pictures import image_grid, save_grid
from sampling.seeds import stream_seed
from torch_utils import distributed
from training.noise import training_noise
from training.optim import DivergenceError, check_weights, learning_rate, update_network
from training.presets import TrainingConfig
from training.run import monitor, parallel
from training.run import stop as stopping
from training.run.identity import sole_user, write_identity
from training.run.memory import memory_plan
from training.run.parallel import accumulate, replicate
from training.run.record import Recorder, RunningMeans
from training.run.resuming import take_up
from training.run.writer import StateWriter
from training.tasks import Batch, Phase, Task, draw

GRID_SEEDS = range(64)


@dataclasses.dataclass
class Run:
    """Where and how to train: all that does not change the result."""

    run_dir: Path
    device: torch.device
    seed: int = 0
    workers: int = 0  # processes that load data; 0 = this one
    provenance: dict[str, Any] = dataclasses.field(default_factory=dict)  # facts to keep in snapshots
    quiet: bool = False  # no progress bar
    force_resume: bool = False  # resume although settings or data differ
    stop: stopping.StopRequest = dataclasses.field(default_factory=stopping.StopRequest)  # what may end it early
    shard: bool = False  # divide Adam's moments and the averages between the processes
    ema_device: torch.device | None = None  # where the averages are kept; None = `device`
    evaluate: Callable[[nn.Module, Any], dict[str, float]] | None = None  # network, encoder -> metrics; collective
    description: list[str] = dataclasses.field(default_factory=list)  # lines to begin log.txt with


def train(task: Task, dataset: ImageDataset, encoder: Any, config: TrainingConfig, run: Run) -> nn.Module:
    """Train until `config.duration` images, resuming from the newest valid state; return the first average.

    An iteration runs every phase on a fresh batch and counts as `config.batch` images. The noise of an image depends
    on the seed and on its position in the run's image sequence alone. A signal or the deadline ends training after
    the iteration that is going on, with its state written; after Ctrl-C KeyboardInterrupt is raised then. Raises
    ValueError where batch sizes do not fit the number of processes, the state belongs to another run or another run is
    using the folder, DivergenceError if gradients stay non-finite, OSError if states cannot be written.
    """
    with run.stop, sole_user(run.run_dir):
        trainer = Trainer(task, dataset, encoder, config, run)
        try:
            trainer.train()
        except KeyboardInterrupt:
            raise  # at once, whatever is being written
        except Exception as error:
            if not isinstance(error, DivergenceError):
                trainer.writer.wait()
                raise
            trainer.await_write()  # all processes have seen it
            good = trainer.writer.last_good
            named = f"the last good state is {good}" if good else "no state was written before"
            raise DivergenceError(f"{error}; {named}") from None
        finally:
            trainer.close()
    return trainer.trained.ema.network(0)


class Trainer:
    """One run: what is trained, the data it sees, and where it leaves its results."""

    def __init__(self, task: Task, dataset: ImageDataset, encoder: Any, config: TrainingConfig, run: Run) -> None:
        """Resumes from the newest valid state. Collective."""
        self.task, self.dataset, self.encoder, self.config, self.run = task, dataset, encoder, config, run
        self.world, self.main = distributed.world_size(), distributed.is_main()
        self.batch_gpu, self.rounds = split_batch(config, self.world)
        for p in task.phases:
            p.net.eval().requires_grad_(False)  # but for the one whose turn it is
        warnings: list[str] = []
        begun = take_up(task, dataset.fingerprint(), config, run, warnings.append)
        self.trained, self.resumed, self.identity = begun
        self.interrupted = False  # by Ctrl-C, in any process
        if self.main:
            write_identity(run.run_dir, self.identity)
        self.callables = {p.name: replicate(p.net) for p in task.phases}  # what is called in training
        nimg = self.trained.nimg
        self.recorder = Recorder(run.run_dir, config.duration, nimg, active=self.main, quiet=run.quiet)
        for line in run.description:
            self.recorder.log(line, terminal=False)
        for line in warnings:
            self.recorder.log(line)
        self.recorder.log(f"resuming at {nimg} images" if self.resumed else f"training for {config.duration} images")
        phases = [(p.name, p.net) for p in task.phases]
        expected = memory_plan(phases, [], task.result, len(config.ema_stds)).state if self.main else 0
        log = self.recorder.log
        self.writer = StateWriter(run.run_dir, keep_every=config.keep_every, expected=expected, log=log)
        self.writer.last_good = self.resumed
        self.means = RunningMeans()
        self.loader = _batches(dataset, self.batch_gpu, run, start=nimg * len(task.order))
        self.clock = nimg, time.perf_counter()  # of the last statistics; snapshots do not count

    @property
    def done(self) -> bool:
        return self.trained.nimg >= self.config.duration

    def train(self) -> None:
        """Train to the end, or until a stop is requested. Raises ValueError where time was too short for one step, and
        KeyboardInterrupt where Ctrl-C was that request.
        """
        first = self.trained.nimg
        reason = self.agree()
        if not reason and (self.resumed is None or self.snapshot_is_missing()):
            self.snapshot()
            reason = self.agree()
        while not self.done and not reason:
            self.iteration()
            self.writer.poll()
            reason = self.agree()
            if self.done or reason or self.crossed(self.config.status):
                self.statistics()
            save = self.done or reason or self.crossed(self.config.checkpoint)
            if save:
                self.checkpoint()
            if self.done or self.crossed(self.config.snapshot):
                self.snapshot()
                reason = reason or self.agree()
                if reason and not save:
                    self.checkpoint()
        self.await_write()
        if parallel.gravest(int(self.writer.failures > 0), self.run.device):
            raise self.writer.error() if self.main else distributed.MainProcessError("states cannot be written")
        if reason == stopping.TIME_IS_OVER and self.trained.nimg == first and not self.done:
            message = "--max-time leaves no time for an iteration and its state: nothing was trained; give more"
            raise ValueError(message) if self.main else distributed.MainProcessError(message)
        outcome = "finished" if self.done else f"stopped ({reason}): the same command goes on"
        self.recorder.log(f"{outcome} at {self.trained.nimg} images")
        if self.interrupted and not self.done:
            raise KeyboardInterrupt

    def close(self) -> None:
        """End what would keep the process alive: loader processes, which ignore signals. Finish the progress bar."""
        getattr(self.loader, "_shutdown_workers", lambda: None)()
        self.recorder.close()

    def await_write(self) -> None:
        """Wait for the state that is being written, together: a process alone in a collective would give up on it."""
        while parallel.gravest(int(self.writer.busy), self.run.device):
            time.sleep(0.05)
        self.writer.wait()

    def iteration(self) -> None:
        """Every phase on a batch of its own, then the averages."""
        trained, config = self.trained, self.config
        iteration = trained.nimg // config.batch * self.world + distributed.rank()
        torch.manual_seed(stream_seed((self.run.seed + 1 << 32) + iteration))  # of dropout: all else has own streams
        lr = learning_rate(trained.nimg, config)
        order = self.task.order
        for index, phase in enumerate(order):
            if trained.nimg < phase.start:
                for _ in range(self.rounds):
                    next(self.loader)
                continue
            phase.net.train().requires_grad_(True)
            self.gradients(phase, position=trained.nimg * len(order) + index * config.batch)
            health = trained.health[phase.name]
            update_network(
                phase, trained.optimizers[phase.name], lr * phase.rate(trained.nimg), health, config, self.means
            )
            phase.net.eval().requires_grad_(False)
        trained.nimg += config.batch
        trained.ema.update(trained.nimg, config.batch)
        self.recorder.progress(config.batch)

    def gradients(self, phase: Phase, position: int) -> None:
        """Gradients of one phase's loss, summed over rounds and averaged over processes, of the images from `position`
        of the run's image sequence on.
        """
        for k in range(self.rounds):
            raw, labels = next(self.loader)
            first = position + k * self.batch_gpu * self.world + distributed.rank()
            positions = range(first, first + self.batch_gpu * self.world, self.world)
            noise = training_noise(self.run.seed, positions, self.run.device)
            batch = Batch(_encode(self.encoder, raw, noise), labels.to(self.run.device), noise, self.trained.nimg)
            net = self.callables[phase.name]
            with accumulate(net, last=k == self.rounds - 1):
                terms = phase.loss(batch, net)
                terms.total.sum().mul(self.config.loss_scaling * self.world / self.config.batch).backward()
            monitor.add_losses(self.means, phase, terms)

    def agree(self) -> str | None:
        """A reason to stop now, of any process. Raises OSError in the main process, and MainProcessError in the others,
        where states cannot be written any more. Collective.
        """
        snapshot = self.trained.snapshot_seconds if self.crosses(self.config.snapshot) else 0
        reason = self.run.stop.reason(self.writer.reserve + snapshot)
        wish = parallel.INTERRUPT if reason == "SIGINT" else parallel.STOP if reason else parallel.GO_ON
        verdict = parallel.gravest(parallel.FAIL if self.writer.exhausted else wish, self.run.device)
        if verdict == parallel.FAIL:
            raise self.writer.error() if self.main else distributed.MainProcessError("states cannot be written")
        self.interrupted = verdict == parallel.INTERRUPT
        return None if verdict == parallel.GO_ON else reason or "another process was told to"

    def crossed(self, interval: int) -> bool:
        """Whether the last iteration passed a multiple of so many images."""
        nimg = self.trained.nimg
        return nimg // interval != (nimg - self.config.batch) // interval

    def crosses(self, interval: int) -> bool:
        """Whether the next iteration does, or ends training."""
        ahead = self.trained.nimg + self.config.batch
        return ahead >= self.config.duration or ahead // interval != self.trained.nimg // interval

    def statistics(self) -> None:
        """Means since the last statistics, norms, memory and speed, in every place that records. Collective."""
        trained, config = self.trained, self.config
        (since, started), now = self.clock, time.perf_counter()
        trained.seconds, self.clock = trained.seconds + now - started, (trained.nimg, now)
        progress = {"Progress/img_per_s": (trained.nimg - since) / (now - started), "Progress/seconds": trained.seconds}
        lr = learning_rate(trained.nimg - config.batch, config)  # of the last update
        values = {**self.means.read(), **monitor.facts(trained, lr), **monitor.memory(self.run.device), **progress}
        self.recorder.stats(trained.nimg, values)
        self.recorder.log(monitor.status_line(trained.nimg, config.duration, values))

    def checkpoint(self) -> None:
        """Have the state written, in the background. Raises DivergenceError for one not worth keeping. Collective."""
        check_weights(self.task.phases)
        started = time.perf_counter()
        self.await_write()
        waited = time.perf_counter() - started
        state = self.trained.host_state(self.identity)
        if self.main:
            stall = time.perf_counter() - started
            self.writer.start(state, self.trained.nimg, sound=self.trained.sound, spent=stall - waited)
            self.means.add("Checkpoint/stall_seconds", stall)

    def snapshot(self) -> None:
        """Averaged networks, one safetensors file per profile, sample sheets, and metrics if asked for. Collective."""
        trained, run, nimg = self.trained, self.run, self.trained.nimg
        started = time.perf_counter()
        facts = dict(run.provenance, seed=run.seed, images_seen=nimg, training_seconds=round(trained.seconds))
        facts["config"] = dataclasses.asdict(self.config)
        for index, std in reversed(list(enumerate(trained.ema.stds))):
            measured = index == 0 and run.evaluate is not None
            if not (self.main or run.shard or measured):
                continue
            average = trained.ema.network(index)
            try:
                if self.main:
                    path = self.snapshot_path(std)
                    known = dict(dataset=self.dataset.facts(), provenance={**facts, "ema_std": std})
                    networks.save(path, average, self.encoder, dtype=torch.float16, **known)
                    if index == 0:
                        self.sheets(average)
            except OSError as error:
                self.recorder.log(f"the snapshot at {nimg} images could not be written ({error.strerror or error})")
            if measured:
                self.measure(average)
        trained.snapshot_seconds = time.perf_counter() - started
        if self.main:
            self.means.add("Snapshot/seconds", trained.snapshot_seconds)
        self.clock = self.clock[0], self.clock[1] + trained.snapshot_seconds
        run.stop.skip()

    def measure(self, average: nn.Module) -> None:
        """Metrics of a snapshot. Collective."""
        try:
            found = self.run.evaluate(average, self.encoder)
        except distributed.MainProcessError:
            raise
        except (ValueError, torch.linalg.LinAlgError) as error:  # the same in all processes: too few images, say
            self.recorder.log(f"the snapshot at {self.trained.nimg} images could not be measured: {error}")
            return
        metrics = {f"Metrics/{name}": value for name, value in found.items()}
        self.recorder.stats(self.trained.nimg, metrics)
        values = "  ".join(f"{name} {value:.4g}" for name, value in found.items())
        self.recorder.log(f"{self.trained.nimg} images: {values}")

    def snapshot_path(self, std: float) -> Path:
        """File of the average of relative width `std` at this moment."""
        return self.run.run_dir / f"network-snapshot-{self.trained.nimg:09d}-{std:.3f}.safetensors"

    def snapshot_is_missing(self) -> bool:
        """Whether a run that resumes was cut off between its state and the snapshot at the same image. Collective."""
        if self.trained.nimg < self.config.duration and not self.crossed(self.config.snapshot):
            return False
        return distributed.from_main(not all(self.snapshot_path(std).exists() for std in self.trained.ema.stds))

    def sheets(self, average: nn.Module) -> None:
        """Sample sheets of the first average, one for each schedule of the task, and once the teacher's."""
        nimg, task, shown = self.trained.nimg, self.task, (self.encoder, GRID_SEEDS, self.batch_gpu)
        try:
            grids = {f"{nimg:09d}-{name}": images for name, images in task.sample_grids(average, *shown).items()}
            if task.teacher is not None and not nimg:
                grids["teacher"] = draw(task.teacher, *shown)
        except ValueError as error:  # latents whose autoencoder is not at hand
            self.recorder.log(f"no sample grids: {error}")
            return
        for name, images in grids.items():
            save_grid(self.run.run_dir / f"grid-{name}.png", images)
            self.recorder.image(nimg, f"Samples/{name.rpartition('-')[2]}", image_grid(images))


def split_batch(config: TrainingConfig, world: int) -> tuple[int, int]:
    """Images per forward pass and accumulation rounds of each process. Raises ValueError where they do not add up."""
    batch_gpu = config.batch_gpu or config.batch // world
    rounds, rest = divmod(config.batch, max(batch_gpu, 1) * world)
    if rest or not rounds:
        raise ValueError(f"batch {config.batch} must be a multiple of batch_gpu {batch_gpu} times {world} processes")
    return batch_gpu, rounds


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
        worker_init_fn=stopping.ignore_signals,
    )
    return iter(loader)


def _encode(encoder: Any, raw: Tensor, noise: Any) -> Tensor:
    latents = encoder.encode(raw.to(noise.device), randn_like=noise.randn_like)
    return latents.contiguous(memory_format=torch.channels_last)
