"""When training should stop early: signals, and a limit on its time. Imports no torch, to listen from the start."""

import signal
import threading
import time
from types import FrameType
from typing import Any

SIGNALS = [s for s in signal.Signals if s.name in ("SIGTERM", "SIGUSR1", "SIGINT", "SIGHUP")]
TIME_IS_OVER = "--max-time is nearly over"
clock = time.monotonic


class StopRequest:
    """Notes requests to stop while it is entered: SIGTERM, SIGUSR1, SIGHUP (a closed terminal, unless nohup has it
    ignored), Ctrl-C, or that `seconds` from its making are nearly over.

    What is going on is finished: the request takes effect at the next `reason`. Ctrl-C aborts (KeyboardInterrupt) until
    `reason` has been asked for the first time, when training begins, and from then on if it is pressed twice. Signals
    are handled in the main thread only, where Python delivers them. May be entered again while it is entered.
    """

    def __init__(self, seconds: float | None = None) -> None:
        self.deadline = None if seconds is None else clock() + seconds
        self.longest = 0.0  # seconds between two calls of `reason`
        self._signal: str | None = None
        self._interrupts = 0
        self._asked: float | None = None  # when `reason` was called last
        self._before: list[dict[int, Any]] = []  # handlers to put back, one entry for each time it was entered

    def __enter__(self) -> "StopRequest":
        before = {}
        if not self._before and threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                if number.name != "SIGHUP" or signal.getsignal(number) != signal.SIG_IGN:
                    before[number] = signal.signal(number, self._note)
        self._before.append(before)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.pop().items():
            signal.signal(number, handler)

    def reason(self, save_seconds: float) -> str | None:
        """Why to stop now, or None. `save_seconds` is what the last state will take to write. Kept in reserve before
        the deadline: that time and the longest step so far, both half as long again.
        """
        now = clock()
        if self._asked is not None:
            self.longest = max(self.longest, now - self._asked)
        self._asked = now
        late = self.deadline is not None and now + 1.5 * (self.longest + save_seconds) >= self.deadline
        return self._signal or (TIME_IS_OVER if late else None)

    def skip(self) -> None:
        """Leave out of `longest` what has passed since `reason` was asked for."""
        if self._asked is not None:
            self._asked = clock()

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            self._interrupts += 1
            if self._interrupts > 1 or self._asked is None:
                raise KeyboardInterrupt
        self._signal = signal.Signals(number).name


def ignore_signals(worker: int) -> None:
    """For processes that load data: a signal sent to the whole group must not end them before the step is finished."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
