"""Types of command-line options that several scripts have. Imports no PyTorch, so that scripts still answer --help."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import click

SEED = click.IntRange(0, (1 << 63) - 1)


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
