"""One run from its first step to its last: what the processes agree on, what is saved, recorded and shown, and when."""

import dataclasses
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

import networks
from data.dataset import ImageDataset
from generation.pictures import image_grid, save_grid
from networks.encoders import Encoder
from torch_utils import distributed
from training.optim import DivergenceError, check_weights, learning_rate
from training.presets import TrainingConfig
from training.run import record
from training.run.identity import check_identity, run_identity, sole_user, write_identity
from training.run.memory import memory_plan
from training.run.options import RunOptions
from training.run.parallel import FAIL, GO_ON, INTERRUPT, STOP, gravest
from training.run.record import Recorder, RunningMeans
from training.run.state import StateWriter, Trained, newest_state
from training.run.stop import TIME_IS_OVER
from training.tasks import Task, draw

GRID_SEEDS = range(64)


@dataclass
class Run:
    """A run between its steps. Where several processes train together, each calls the same methods at the same time."""

    task: Task
    dataset: ImageDataset
    encoder: Encoder
    config: TrainingConfig
    options: RunOptions
    device: torch.device
    reason: str | None = None  # to stop early
    interrupted: bool = False  # by Ctrl-C, in any process

    @contextmanager
    def opened(self) -> Iterator[None]:
        """Resume from the newest valid state, or begin; at the end, finish. What is saved is complete after an error
        too, and a DivergenceError names the last good state.
        """
        with self.options.stop, sole_user(self.options.run_dir):
            self.begin()
            try:
                self.agree()
                # A run that resumes may have been cut off between its state and the snapshot at the same image.
                due = self.done or self.crossed(self.config.snapshot)
                missing = not all(self.snapshot_path(std).exists() for std in self.trained.ema.stds)
                if self.reason is None and (self.resumed is None or (due and distributed.from_main(missing))):
                    self.snapshot()
                yield
                self.finish()
            except DivergenceError as error:
                self.await_write()  # all processes have seen it
                good = self.writer.last_good
                named = f"the last good state is {good}" if good else "no state was written before"
                raise DivergenceError(f"{error}; {named}") from None
            except Exception:  # but not Ctrl-C: at once, whatever is being written
                self.writer.wait()
                raise
            finally:
                self.recorder.close()

    def take_up(self, warn: Callable[[str], None]) -> None:
        """Take what is trained from the newest valid state of the folder. Raises StateError where the folder holds
        another run, or no state that can be used.
        """
        options, config, force = self.options, self.config, self.options.force_resume
        self.identity = run_identity(config, options.seed, self.dataset.fingerprint(), self.task.teacher_digest)
        ema_device = None if options.ema_device == "same" else options.ema_device
        self.trained = Trained(self.task, config, options.seed, self.device, shard=options.shard, ema_device=ema_device)
        self.resumed, state = newest_state(options.run_dir, warn, writing=not options.dry_run)
        check_identity(options.run_dir, self.identity, state, type(config)(), force=force, log=warn)
        if state is not None:
            self.trained.load_state_dict(state, force=force)

    def dry_run(self) -> None:
        """Check all that a run does before its first step, writing nothing, and print what it would begin with."""
        with sole_user(self.options.run_dir, create=False):
            self.take_up(distributed.print0)
        begins = f"it would resume at {self.trained.nimg} images" if self.resumed else "it would begin a new run"
        distributed.print0(f"dry run: nothing is written; {begins}")

    def begin(self) -> None:
        """Take up the run, and open what records and saves it."""
        options, config, main, warnings = self.options, self.config, distributed.is_main(), []
        self.take_up(warnings.append)
        self.first = nimg = self.trained.nimg
        if main:
            write_identity(options.run_dir, self.identity)
        self.recorder = Recorder(options.run_dir, config.duration, nimg, active=main, quiet=options.quiet)
        log = self.recorder.log
        for line in options.description:
            log(line, terminal=False)
        warnings.append(f"resuming at {nimg} images" if self.resumed else f"training for {config.duration} images")
        for line in warnings:
            log(line)
        plan = memory_plan([(p.name, p.net) for p in self.task.phases], [], self.task.result, len(config.ema_stds))
        self.writer = StateWriter(options.run_dir, keep_every=config.keep_every, expected=plan.state * main, log=log)
        self.writer.last_good = self.resumed
        self.means = RunningMeans()
        self.clock = nimg, time.perf_counter()  # of the last statistics; snapshots do not count

    @property
    def done(self) -> bool:
        """Whether all images have been seen."""
        return self.trained.nimg >= self.config.duration

    @property
    def over(self) -> bool:
        """Whether there is no further step."""
        return self.done or self.reason is not None

    def after_step(self) -> None:
        """Record, save and show what is due, and whether to go on."""
        self.recorder.progress(self.config.batch)
        self.writer.poll()
        self.agree()
        if self.over or self.crossed(self.config.status):
            self.statistics()
        saved = self.over or self.crossed(self.config.checkpoint)
        if saved:
            self.checkpoint()
        if self.done or self.crossed(self.config.snapshot):
            self.snapshot()
            if self.reason and not saved:
                self.checkpoint()

    def finish(self) -> None:
        """After the last step. Raises OSError where its state could not be written, ValueError where time was too short
        for one step, and KeyboardInterrupt where Ctrl-C ended training.
        """
        self.await_write()
        if gravest(int(self.writer.failures > 0), self.device):
            raise self.told_by_main(self.writer.error())
        if self.reason == TIME_IS_OVER and self.trained.nimg == self.first and not self.done:
            advice = "nothing was trained; give more"
            raise self.told_by_main(ValueError(f"--max-time leaves no time for an iteration and its state: {advice}"))
        outcome = "finished" if self.done else f"stopped ({self.reason}): the same command goes on"
        self.recorder.log(f"{outcome} at {self.trained.nimg} images")
        if self.interrupted and not self.done:
            raise KeyboardInterrupt

    def agree(self) -> None:
        """Whether to stop now, for a reason of any process. Raises OSError where states cannot be written any more."""
        batch, config = self.config.batch, self.config
        shows = self.trained.nimg + batch >= config.duration or self.crossed(config.snapshot, ahead=batch)
        reason = self.options.stop.reason(self.writer.reserve + (self.trained.snapshot_seconds if shows else 0))
        wish = INTERRUPT if reason == "SIGINT" else STOP if reason else GO_ON
        verdict = gravest(FAIL if self.writer.exhausted else wish, self.device)
        if verdict == FAIL:
            raise self.told_by_main(self.writer.error())
        self.interrupted = verdict == INTERRUPT
        self.reason = None if verdict == GO_ON else reason or "another process was told to"

    @staticmethod
    def told_by_main(error: Exception) -> Exception:
        """An error that all processes raise, for the main one to tell."""
        return error if distributed.is_main() else distributed.MainProcessError(str(error))

    def await_write(self) -> None:
        """Wait for the state that is being written, together: a process alone in a collective would give up on it."""
        while gravest(int(self.writer.busy), self.device):
            time.sleep(0.05)
        self.writer.wait()

    def crossed(self, interval: int, ahead: int = 0) -> bool:
        """Whether the step that ends so many images `ahead` passes a multiple of `interval`."""
        nimg = self.trained.nimg + ahead
        return nimg // interval != (nimg - self.config.batch) // interval

    def statistics(self) -> None:
        """Means since the last statistics, norms, memory and speed, in every place that records."""
        trained, config = self.trained, self.config
        (since, started), now = self.clock, time.perf_counter()
        trained.seconds, self.clock = trained.seconds + now - started, (trained.nimg, now)
        progress = {"Progress/img_per_s": (trained.nimg - since) / (now - started), "Progress/seconds": trained.seconds}
        lr = learning_rate(trained.nimg - config.batch, config)  # of the last update
        values = {**self.means.read(), **record.facts(trained, lr, self.device), **progress}
        self.recorder.stats(trained.nimg, values)
        self.recorder.log(record.status_line(trained.nimg, config.duration, values))

    def checkpoint(self) -> None:
        """Have the state written, in the background. Raises DivergenceError for one not worth keeping."""
        check_weights(self.task.phases)
        started = time.perf_counter()
        self.await_write()
        waited = time.perf_counter() - started
        state = self.trained.host_state(self.identity)
        if distributed.is_main():
            stall = time.perf_counter() - started
            sound = not any(health.streak for health in self.trained.health.values())  # all gradients were finite
            self.writer.start(state, self.trained.nimg, sound=sound, spent=stall - waited)
            self.means.add("Checkpoint/stall_seconds", stall)

    def snapshot(self) -> None:
        """Averaged networks, one safetensors file per profile, sample sheets, and metrics if asked for; may take long,
        so that a reason to stop is asked for again.
        """
        trained, options, nimg, main = self.trained, self.options, self.trained.nimg, distributed.is_main()
        started = time.perf_counter()
        facts = dict(options.provenance, seed=options.seed, images_seen=nimg, training_seconds=round(trained.seconds))
        facts["config"] = dataclasses.asdict(self.config)
        for index, std in reversed(list(enumerate(trained.ema.stds))):
            measured = index == 0 and options.evaluate is not None
            if not (main or options.shard or measured):
                continue
            average = trained.ema.network(index)
            try:
                if main:
                    known = dict(dataset=self.dataset.facts(), provenance={**facts, "ema_std": std})
                    networks.save(self.snapshot_path(std), average, self.encoder, dtype=torch.float16, **known)
                    if index == 0:
                        self.sheets(average)
            except OSError as error:
                self.recorder.log(f"the snapshot at {nimg} images could not be written ({error.strerror or error})")
            if measured:
                self.measure(average)
        trained.snapshot_seconds = time.perf_counter() - started
        if main:
            self.means.add("Snapshot/seconds", trained.snapshot_seconds)
        self.clock = self.clock[0], self.clock[1] + trained.snapshot_seconds
        options.stop.skip()
        if self.reason is None:
            self.agree()

    def snapshot_path(self, std: float) -> Path:
        """File of the average of relative width `std` at this moment."""
        return self.options.run_dir / f"network-snapshot-{self.trained.nimg:09d}-{std:.3f}.safetensors"

    def measure(self, average: nn.Module) -> None:
        """Metrics of a snapshot."""
        nimg, log = self.trained.nimg, self.recorder.log
        try:
            found = self.options.evaluate(average, self.encoder)
        except distributed.MainProcessError:
            raise
        except (ValueError, torch.linalg.LinAlgError) as error:  # the same in all processes: too few images, say
            return log(f"the snapshot at {nimg} images could not be measured: {error}")
        self.recorder.stats(nimg, {f"Metrics/{name}": value for name, value in found.items()})
        log(f"{nimg} images: " + "  ".join(f"{name} {value:.4g}" for name, value in found.items()))

    def sheets(self, average: nn.Module) -> None:
        """Sample sheets of the first average, one for each schedule of the task, and once the teacher's."""
        nimg, task = self.trained.nimg, self.task
        shown = self.encoder, GRID_SEEDS, self.config.split_batch(distributed.world_size())[0]
        try:
            grids = {name: draw(average, *shown, **options) for name, options in task.schedules.items()}
            grids = {f"{nimg:09d}-{name}": images for name, images in (grids | task.views(average, *shown)).items()}
            if task.teacher is not None and not nimg:
                grids["teacher"] = draw(task.teacher, *shown)
        except ValueError as error:  # latents whose autoencoder is not at hand
            return self.recorder.log(f"no sample grids: {error}")
        for name, images in grids.items():
            save_grid(self.options.run_dir / f"grid-{name}.png", images)
            self.recorder.image(nimg, f"Samples/{name.rpartition('-')[2]}", image_grid(images))
