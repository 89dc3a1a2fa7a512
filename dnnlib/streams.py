"""Standard output and error that cost no result: what cannot be written leads nowhere."""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO


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
