"""Training states written in the background, and what happens when the disk refuses them."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from training.run.state import save_state

MAX_FAILURES = 3  # in a row, until training stops
_SLOW_DISK = 50 << 20  # bytes per second assumed before the first write is measured


class StateWriteError(OSError):
    """Training states cannot be written."""


class StateWriter:
    """Writes one state at a time in a thread of its own. Training waits for the copy to host memory only.

    A failed write leaves the previous states in place; it is reported, and the next one is tried when it comes.
    """

    def __init__(
        self,
        run_dir: Path,
        *,
        keep_every: int = 0,  # see `training.run.state.prune`
        expected: int = 0,  # bytes of a state; 0 in processes that write none
        log: Callable[[str], None] = print,
    ) -> None:
        self.run_dir = run_dir
        self.keep_every = keep_every
        self.log = log
        self.failures = 0  # in a row
        self.last_good: Path | None = None  # newest state written while training was sound
        self.seconds = expected / _SLOW_DISK  # the longest write so far, a guess before the first one
        self._thread: threading.Thread | None = None
        self._outcome: tuple[Path | None, BaseException | None] = (None, None)
        self._sound = True
        self._measured = False
        self._warnings: list[str] = []  # of the write that is going on

    def start(self, state: dict[str, Any], nimg: int, *, sound: bool = True, spent: float = 0.0) -> None:
        """Begin to write a state that nobody changes any more, after the write before it, if that is still going on.

        `sound` states are those that `last_good` may name; `spent` is how many seconds the copy took.
        """
        self.wait()
        self._sound = sound
        self._thread = threading.Thread(target=self._write, args=(state, nimg, spent), daemon=True)
        self._thread.start()

    def poll(self) -> None:
        """Take note of a write that has ended. Does not wait."""
        if not self.busy:
            self.wait()

    def wait(self) -> None:
        """Wait for the write that is going on, if any, and take note of how it ended.

        Raises what is not an error of the file system.
        """
        if self._thread is None:
            return
        self._thread.join()
        self._thread = None
        while self._warnings:
            self.log(self._warnings.pop(0))
        path, error = self._outcome
        if error is None:
            self.failures = 0
            if self._sound:
                self.last_good = path
            return
        if not isinstance(error, OSError):
            raise error
        self.failures += 1
        left = self.last_good.name if self.last_good else "none so far"
        again = "" if self.exhausted else "; training goes on and tries again at the next interval"
        reason = error.strerror or error
        self.log(
            f"a training state could not be written to {self.run_dir} ({reason}), failure {self.failures} of "
            f"{MAX_FAILURES}: the previous one stays ({left}){again}"
        )

    @property
    def busy(self) -> bool:
        """Whether a write is going on."""
        return self._thread is not None and self._thread.is_alive()

    @property
    def reserve(self) -> float:
        """Seconds that a state begun now may take, the end of the write that is going on included."""
        return self.seconds if self._thread is None else 2 * self.seconds

    @property
    def exhausted(self) -> bool:
        """Whether writing has failed too many times in a row."""
        return self.failures >= MAX_FAILURES

    def error(self) -> StateWriteError:
        """The error that ends training."""
        newest = f"newest state: {self.last_good}" if self.last_good else "there is no state"
        return StateWriteError(
            f"training stopped: states cannot be written to {self.run_dir}, {newest}; make space or give write access, "
            "then run the same command again"
        )

    def _write(self, state: dict[str, Any], nimg: int, spent: float) -> None:
        started = time.perf_counter()
        try:
            path = save_state(self.run_dir, state, nimg, keep_every=self.keep_every, warn=self._warnings.append)
            self._outcome = path, None
            seconds = spent + time.perf_counter() - started
            self.seconds = max(self.seconds, seconds) if self._measured else seconds
            self._measured = True
        except BaseException as error:  # handed to the thread that trains
            self._outcome = None, error
