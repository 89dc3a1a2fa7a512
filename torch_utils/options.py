"""What several scripts share at their command lines. Imports no PyTorch: they answer --help at once."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import reduce
from pathlib import Path
from typing import Any

import click

SEED = click.IntRange(0, (1 << 63) - 1)
COUNT = click.IntRange(min=1)
DTYPE = click.Choice(("auto", "float32", "bf16", "fp16"))  # `torch_utils.distributed.compute_dtype` reads them

device_option = click.option("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps.")
quiet_option = click.option("--quiet", is_flag=True, help="No progress bar.")


def running() -> int:
    """Processes that want a core at this moment, with this one; no end of them where the system does not say."""
    with suppress(OSError, ValueError, IndexError):
        return int(Path("/proc/loadavg").read_text().split()[3].partition("/")[0])
    return 1 << 20


AT_FIRST = running()  # of two moments, since one may be chance


def set_wait_policy() -> None:
    """Before importing PyTorch: where others are busy, let OpenMP's threads sleep while they wait, unless set."""
    if 8 * (min(AT_FIRST, running()) - 1) >= (os.cpu_count() or 1):  # on an eighth of the cores
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def options(*added: Callable) -> Callable[[Callable], Callable]:
    """Decorator with several options of click, in the order of --help."""
    return lambda command: reduce(lambda known, option: option(known), reversed(added), command)


@contextmanager
def about(option: str) -> Iterator[None]:
    """Tell a ValueError as a mistake in an option, as click tells those that it finds itself: exit code 2."""
    try:
        yield
    except ValueError as error:
        context = click.get_current_context(silent=True)
        raise click.BadParameter(str(error), context, param_hint=f"'{option}'") from error


class OutputFolder(click.ParamType):
    """A folder that is there and can be written to, or that can be made. Nothing is made; the value stays a string."""

    name = "dir"  # in upper case in --help

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Refuses, in one line, what could not take files later."""
        text = os.fspath(value)
        if not text.strip():
            self.fail("it is empty: name a folder", param, ctx)
        try:
            path = Path(text).absolute()
        except FileNotFoundError:  # of os.getcwd
            self.fail(f"{text}: the current folder was removed: change to another one", param, ctx)
        for folder in (path, *path.parents):
            try:
                folder.lstat()
            except (FileNotFoundError, NotADirectoryError, PermissionError):  # told of the parent
                continue
            except (OSError, ValueError) as error:  # a name that is too long, or no name
                self.fail(f"{text}: {getattr(error, 'strerror', None) or error}", param, ctx)
            if not os.path.exists(folder):
                self.fail(f"{folder} is a link to what does not exist: make that, or name another folder", param, ctx)
            if not os.path.isdir(folder):
                self.fail(f"{folder} is a file: name a folder", param, ctx)
            if not os.access(folder, os.W_OK | os.X_OK):
                self.fail(f"{folder} cannot be written to: name another folder", param, ctx)
            break
        return text


FOLDER = OutputFolder()
