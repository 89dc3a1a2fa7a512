"""All that training changes, and durable copies of it: written whole or not at all, verified when read."""

import contextlib
import dataclasses
import hashlib
import os
import re
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any, BinaryIO

import torch

from dnnlib.files import file_sha256
from dnnlib.text import printable
from torch_utils import distributed
from training.optim import Health
from training.phema import PowerFunctionEMA
from training.presets import TrainingConfig
from training.run.parallel import build_optimizer, load_optimizer_state, optimizer_state, to_host
from training.tasks import Task

MAX_FAILURES = 3  # writes in a row, until training stops
_SLOW_DISK = 50 << 20  # bytes per second assumed before the first write is measured
_NAME = re.compile(r"training-state-(\d{9,})-([0-9a-f]{8})\.pt")

State = dict[str, Any]  # tensors and plain data
Found = tuple[Path, State] | tuple[None, None]
Log = Callable[[str], None]


class StateError(ValueError):
    """A training state that cannot be used."""


class Trained:
    """Networks, optimizers, averages and counters of a run: all that a resumed one needs."""

    def __init__(
        self,
        task: Task,
        config: TrainingConfig,
        seed: int,
        device: torch.device,
        *,
        shard: bool = False,  # divide Adam's moments and the averages between the processes
        ema_device: str | None = None,  # where the averages are kept; None = `device`
    ) -> None:
        self.task, self.seed = task, seed
        self.nimg = 0  # images seen
        self.seconds = 0.0  # of training, up to the last statistics
        self.snapshot_seconds = 0.0  # of the last snapshot
        self.health = {p.name: Health() for p in task.phases}
        self.optimizers = {p.name: build_optimizer(p.net, device, beta1=p.beta1, shard=shard) for p in task.phases}
        self.ema = PowerFunctionEMA(task.result, config.ema_stds, device=ema_device, shard=shard)

    def host_state(self, identity: State | None = None) -> State:
        """Plain data, what identifies the run among it, and in the main process copies of all tensors in host memory.
        The order of the images and all noise are functions of seed and position in the image sequence. Collective.
        """
        main = distributed.is_main()
        return {
            "identity": identity,
            "nimg": self.nimg,
            "seconds": self.seconds,
            "snapshot_seconds": self.snapshot_seconds,
            "seed": self.seed,
            "position": self.nimg * len(self.task.order),
            "health": {name: dataclasses.asdict(health) for name, health in self.health.items()},
            "nets": {p.name: to_host(p.net.state_dict()) if main else None for p in self.task.phases},
            "optimizers": {name: optimizer_state(optimizer) for name, optimizer in self.optimizers.items()},
            "ema": self.ema.state_dict(),
        }

    def load_state_dict(self, state: State, *, force: bool = False) -> None:
        """Take in a state of any number of processes, with `force` one of other EMA profiles too. Raises StateError
        where it does not fit.
        """
        try:
            for p in self.task.phases:
                p.net.load_state_dict(state["nets"][p.name])
                load_optimizer_state(self.optimizers[p.name], state["optimizers"][p.name])
                self.health[p.name] = Health(**{k: int(v) for k, v in state["health"][p.name].items()})
            self.ema.load_state_dict(state["ema"], force=force)
            self.nimg, self.seconds = int(state["nimg"]), float(state["seconds"])
            self.snapshot_seconds = float(state.get("snapshot_seconds", 0))
            if self.nimg < 0:
                raise ValueError(f"nimg is {self.nimg}")
        except KeyError as error:
            raise StateError(f"the training state does not fit this run (no {printable(error)} in it)") from error
        except (RuntimeError, ValueError) as error:
            raise StateError(f"the training state does not fit this run ({printable(error)})") from error
        except (ArithmeticError, AttributeError, LookupError, TypeError) as error:
            reason = "something else stands where a part should be"
            raise StateError(f"the training state does not fit this run ({reason})") from error


class HashingFile:
    """File for torch.save that takes the SHA-256 of what passes through, and keeps the first OSError. Raised in the
    middle of torch.save, its archive writer would try to finish a file that cannot be finished.
    """

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.sha256 = file, hashlib.sha256()
        self.error: OSError | None = None

    def write(self, data: bytes) -> int:
        self.sha256.update(data)
        try:
            if self.error is None:
                self.file.write(data)
        except OSError as error:
            self.error = error
        return len(data)

    def flush(self) -> None:
        """Nothing to do: the file is flushed when it is complete."""


def save_state(run_dir: Path, state: State, nimg: int, *, keep_every: int = 0, warn: Log = print) -> Path:
    """Write training-state-NIMG-SHA8.pt, then remove all but the newest two states and, with `keep_every` > 0, the
    first of each `keep_every` images; what cannot be removed stays, with a warning. The file is written under a
    temporary name, flushed to the disk and renamed: a crash at any moment leaves the previous state in place. Raises
    OSError where that fails; nothing of the attempt is left then.
    """
    temporary = run_dir / f".training-state-{nimg:09d}-{os.getpid()}.new"
    try:
        with open(temporary, "xb") as file:
            hashing = HashingFile(file)
            torch.save(state, hashing)
            if hashing.error is not None:
                raise hashing.error
            file.flush()
            os.fsync(file.fileno())
        path = run_dir / f"training-state-{nimg:09d}-{hashing.sha256.hexdigest()[:8]}.pt"
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # make the name durable too, on systems where a folder can be flushed
        handle = os.open(run_dir, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
    states = list_states(run_dir)
    first = {state_nimg(old) // keep_every: old for old in states} if keep_every else {}  # the last, so the oldest
    for old in set(states[2:]) - {kept for multiple, kept in first.items() if multiple > 0}:
        try:
            old.unlink(missing_ok=True)
        except OSError as error:
            warn(f"{old} could not be removed ({error.strerror or error})")
    return path


class StateWriter:
    """Writes one state at a time in a thread of its own. Training waits for the copy to host memory only. A failed
    write leaves the previous states in place; it is reported, and the next one is tried when it comes. `keep_every` as
    in `save_state`; `expected` bytes of a state, 0 in processes that write none.
    """

    def __init__(self, run_dir: Path, *, keep_every: int = 0, expected: int = 0, log: Log = print) -> None:
        self.run_dir, self.keep_every, self.log = run_dir, keep_every, log
        self.failures = 0  # in a row
        self.last_good: Path | None = None  # newest state written while training was sound
        self.seconds = expected / _SLOW_DISK  # the longest write so far, a guess before the first one
        self._measured = False
        self._going: Future[tuple[Path, bool, float, list[str]]] | None = None  # the write, until its end is noted

    def start(self, state: State, nimg: int, *, sound: bool = True, spent: float = 0.0) -> None:
        """Begin to write a state that nobody changes any more, after the write before it, if that is still going on.
        `sound` states are those that `last_good` may name; `spent` is how many seconds the copy took.
        """

        def write(going: Future) -> None:
            started, warnings = time.perf_counter() - spent, []
            try:
                path = save_state(self.run_dir, state, nimg, keep_every=self.keep_every, warn=warnings.append)
                going.set_result((path, sound, time.perf_counter() - started, warnings))
            except BaseException as error:  # for the thread that trains
                going.set_exception(error)

        self.wait()
        self._going = Future()
        threading.Thread(target=write, args=(self._going,), daemon=True).start()

    def poll(self) -> None:
        """Take note of a write that has ended."""
        if not self.busy:
            self.wait()

    def wait(self) -> None:
        """Wait for the write that is going on, if any, and note how it ended; raises what is no OSError."""
        if self._going is None:
            return
        going, self._going = self._going, None
        try:
            path, sound, seconds, warnings = going.result()
        except OSError as error:
            self.failures += 1
            left = self.last_good.name if self.last_good else "none so far"
            again = "" if self.exhausted else "; training goes on and tries again at the next interval"
            self.log(
                f"a training state could not be written to {self.run_dir} ({error.strerror or error}), failure "
                f"{self.failures} of {MAX_FAILURES}: the previous one stays ({left}){again}"
            )
            return
        for warning in warnings:
            self.log(warning)
        self.failures, self.last_good = 0, path if sound else self.last_good
        self.seconds, self._measured = max(self.seconds if self._measured else 0, seconds), True

    @property
    def busy(self) -> bool:
        """Whether a write is going on."""
        return self._going is not None and not self._going.done()

    @property
    def reserve(self) -> float:
        """Seconds that a state begun now may take, the end of the write that is going on included."""
        return self.seconds if self._going is None else 2 * self.seconds

    @property
    def exhausted(self) -> bool:
        """Whether writing has failed too many times in a row."""
        return self.failures >= MAX_FAILURES

    def error(self) -> OSError:
        """The error that ends training."""
        newest = f"newest state: {self.last_good}" if self.last_good else "there is no state"
        advice = "make space or give write access, then run the same command again"
        return OSError(f"training stopped: states cannot be written to {self.run_dir}, {newest}; {advice}")


def list_states(run_dir: str | Path) -> list[Path]:
    """Training states of a run, the newest first."""
    found = [path for path in Path(run_dir).glob("training-state-*.pt") if _NAME.fullmatch(path.name)]
    return sorted(found, key=state_nimg, reverse=True)


def state_nimg(path: Path) -> int:
    """Images seen, from a state's name."""
    return int(_NAME.fullmatch(path.name)[1])


def load_state(path: Path, *, verified: bool = False) -> State:
    """Read a state, mapped from the file; nothing in it is executed. Raises StateError if it is damaged. `verified`: by
    another process.
    """
    if not verified and file_sha256(path)[:8] != _NAME.fullmatch(path.name)[2]:
        raise StateError(f"{path} is damaged: its SHA-256 does not begin with the digits in its name")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (OSError, MemoryError):
        raise
    except Exception as error:  # what a damaged archive or pickle leads to can be of any kind
        raise StateError(f"{path} is cut off, damaged or no training state") from error
    if type(state) is not dict or type(state.get("nimg")) is not int:
        raise StateError(f"{path} is no training state: it holds a {type(state).__name__} without a count of images")
    return state


def newest_state(run_dir: str | Path, warn: Log = print, *, writing: bool = True) -> Found:
    """Newest valid state of a run with its path, the same in every process, or (None, None) if it has none yet.

    The main process verifies files; one that the system cannot read is left out, and a damaged one too, with a warning.
    If `writing`, that is set aside as *.damaged, and what a killed process left is removed. Raises StateError in a
    process that does not see the file, and if states are there and none is valid: starting afresh would overwrite the
    run. Collective.
    """

    def find() -> Found:
        reasons = []
        for path in Path(run_dir).glob(".training-state-*.new") if writing else ():
            path.unlink()
        for path in list_states(run_dir):
            try:
                return path, load_state(path)
            except (StateError, OSError) as error:
                reason, outcome = str(error), "the one before is used"
                if isinstance(error, OSError):
                    reason = f"{path} cannot be read ({error.strerror or error})"
                elif writing:
                    with contextlib.suppress(OSError):
                        outcome = f"it is set aside as {path.replace(path.with_suffix('.damaged')).name}"
            reasons.append(f"{reason}; {outcome}")
            warn(reasons[-1])
        if reasons or list(Path(run_dir).glob("training-state-*.damaged")):
            why, advice = "; ".join(reasons) or "all have been set aside as .damaged", "restore one, or use another"
            raise StateError(f"no valid training state is left in {run_dir}: {advice} --outdir ({why})")
        return None, None

    path, state = distributed.main_first(lambda: find() if distributed.is_main() else (None, None))
    name = distributed.from_main(path.name if path else None)
    if path is None and name is not None:
        path = Path(run_dir) / name
        if not path.is_file():
            raise StateError(f"process {distributed.rank()} does not see {path}: all machines must share that folder")
        state = load_state(path, verified=True)
    return path, state
