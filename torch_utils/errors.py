"""From exceptions to what a script says, and streams that raise none. Imports no PyTorch: --help comes at once."""

import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO

import click

from dnnlib.text import first_line, redact


class MainProcessError(ValueError):
    """The main process failed, and has said or will say why; raised in the others, so that they end too."""


@contextmanager
def user_errors(batch_option: str = "--batch") -> Iterator[None]:
    """Turn errors that the user can mend into one line and exit code 1, and leave the process group at the end. Bad
    input (ValueError, OSError) is told in its own words; where memory runs out the advice names `batch_option`; any
    other exception is a defect and passes. Raises click.ClickException, or SystemExit where the main process failed; of
    several with the same mistake one tells it. Ctrl-C, SIGTERM and SIGHUP: one line, exit code 128 + number.
    """
    failed = True
    try:
        with lasting_streams() as output, _stopped_by_signals():
            yield
        if isinstance(output.error, BrokenPipeError):
            sys.exit(1)  # who closed it knows
        if output.error is not None:  # all else is done, but the exit code must tell
            reason = output.error.strerror or output.error
            raise click.ClickException(f"standard output cannot be written ({reason}); all files are complete")
        failed = False
    except MainProcessError:
        _let_others_speak()
        sys.exit(1)  # one message is enough
    except (ValueError, OSError, OverflowError, RecursionError) as error:
        if _rank() > 0:
            _let_others_speak()
        raise click.ClickException(redact(_text(error))) from error
    except (MemoryError, RuntimeError) as error:
        if _process_group() and re.search(r"[Cc]onnection (closed|reset)|Broken pipe|ncclRemoteError", str(error)):
            _let_others_speak()
            raise click.ClickException("lost the connection to another process") from error
        import torch

        if not isinstance(error, (MemoryError, torch.OutOfMemoryError)) and "can't allocate memory" not in str(error):
            raise
        raise click.ClickException(f"out of memory: try a smaller {batch_option} ({first_line(error)})") from error
    finally:
        group = _process_group()
        # After an error, leaving a group of GPUs could wait for processes that are still at work.
        if group is not None and not (failed and group.get_backend() == "nccl"):
            group.destroy_process_group()


@contextmanager
def _stopped_by_signals() -> Iterator[None]:
    owner, before = os.getpid(), {}

    def stop(number: int, _: object) -> None:
        signal.signal(number, signal.SIG_DFL)  # a second one ends at once
        if os.getpid() == owner:
            raise KeyboardInterrupt(number)
        os.kill(os.getpid(), number)  # of a child, which inherited this

    if threading.current_thread() is threading.main_thread():
        for number in (getattr(signal, name, None) for name in ("SIGINT", "SIGTERM", "SIGHUP")):
            if number is not None and signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
                before[number] = signal.signal(number, stop)
    try:
        yield
    except KeyboardInterrupt as error:
        number = signal.Signals(error.args[0] if error.args else signal.SIGINT)
        if _rank() == 0:
            line = f"Error: stopped by {number.name}"
            print(f"\n{line}" if sys.stderr.isatty() else line, file=sys.stderr)
        raise SystemExit(128 + number) from None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _text(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"{error.filename}: {error.strerror}"
    if isinstance(error, OverflowError):
        return f"a number is too large to compute with ({error})"
    return "something is nested too deeply" if isinstance(error, RecursionError) else str(error)


def _rank(variable: str = "RANK") -> int:
    text = os.environ.get(variable, "")
    return int(text) if text.isdecimal() else 0  # what is no number is an error of `torch_utils.distributed`


def _let_others_speak() -> None:
    """Wait before saying what another process is likely to say too: when that one ends, torchrun ends this one."""
    time.sleep(10 + _rank("LOCAL_RANK"))


def _process_group() -> Any:
    """torch.distributed, where this process has joined a group; None otherwise."""
    group = sys.modules.get("torch.distributed")
    return group if group is not None and group.is_available() and group.is_initialized() else None


def lead_nowhere(stream: TextIO) -> None:
    """Have everything that is written to a stream from now on, or waits in it, go to the null device."""
    with suppress(OSError, ValueError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())
        os.close(null)


class LastingStream:
    """A text stream whose writing raises nothing; `error` is the first that it would have raised."""

    error: OSError | None = None

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        try:
            self._attempt(self._stream.write, text)
        except UnicodeEncodeError:  # such as of a file's name in another encoding
            self._attempt(self._stream.write, text.encode("ascii", "backslashreplace").decode())
        return len(text)

    def flush(self) -> None:
        self._attempt(self._stream.flush)

    def _attempt(self, action: Callable[..., Any], *arguments: str) -> None:
        try:
            action(*arguments)
        except OSError as error:
            self.error = self.error or error
            lead_nowhere(self._stream)


@contextmanager
def lasting_streams() -> Iterator[LastingStream]:
    """Puts such streams in the place of sys.stdout and sys.stderr, even of closed ones; yields that of the output."""
    stdout, stderr = sys.stdout, sys.stderr
    with open(os.devnull, "w") as null:
        try:
            sys.stdout, sys.stderr = LastingStream(stdout or null), LastingStream(stderr or null)
            yield sys.stdout
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            sys.stdout, sys.stderr = stdout, stderr
