"""When training should stop early: signals, and a limit on its time."""

from __future__ import annotations

import signal
import threading
import time
from types import FrameType, TracebackType
from typing import Any

import torch

from torch_utils import distributed

GO_ON, STOP, FAIL = 0, 1, 2
SIGNALS = ("SIGTERM", "SIGUSR1", "SIGINT")


class StopRequest:
    """Notes requests to stop while it is entered: SIGTERM, SIGUSR1, Ctrl-C, or a deadline that comes near.

    The step that is going on is finished, so the request takes effect at the next `reason`. A second Ctrl-C aborts at
    once (KeyboardInterrupt). Signals are handled in the main thread only, where Python delivers them.
    """

    def __init__(self, deadline: float | None = None) -> None:
        """`deadline` is a reading of time.monotonic()."""
        self.deadline = deadline
        self.longest = 0.0  # seconds between two calls of `reason`
        self._signal: str | None = None
        self._interrupts = 0
        self._last = time.monotonic()
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        self._last = time.monotonic()
        if threading.current_thread() is threading.main_thread():
            for name in SIGNALS:
                number = getattr(signal, name, None)
                if number is not None:
                    self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def reason(self, save_seconds: float) -> str | None:
        """Why to stop now, or None. `save_seconds` is what the last state will take to write.

        Kept in reserve before the deadline: that time and the longest step so far, both half as long again.
        """
        now = time.monotonic()
        self.longest, self._last = max(self.longest, now - self._last), now
        if self._signal is not None:
            return self._signal
        if self.deadline is not None and now + 1.5 * (self.longest + save_seconds) >= self.deadline:
            return "--max-time is nearly over"
        return None

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            self._interrupts += 1
            if self._interrupts > 1:
                raise KeyboardInterrupt
        self._signal = signal.Signals(number).name


def ignore_signals(worker: int) -> None:
    """For processes that load data: a signal sent to the whole group must not end them before the step is finished."""
    for name in SIGNALS:
        number = getattr(signal, name, None)
        if number is not None:
            signal.signal(number, signal.SIG_IGN)


def agree(verdict: int, device: torch.device) -> int:
    """The gravest verdict (GO_ON, STOP or FAIL) of any process. Collective."""
    if distributed.world_size() == 1:
        return verdict
    shared = torch.tensor(verdict, dtype=torch.int32, device=device)
    torch.distributed.all_reduce(shared, op=torch.distributed.ReduceOp.MAX)
    return int(shared)
