"""Options that the benches share."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click


def _writable(ctx: click.Context, param: click.Parameter, value: str | None) -> str | None:
    """Refuse, before anything is measured, a file that could not be written at the end."""
    if value is not None:
        path = Path(value).absolute()
        folder = next(parent for parent in path.parents if parent.exists())  # the rest will be made
        if path.is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK):
            raise click.BadParameter(f"{value}: this is a folder, or {folder} cannot be written to: name another file")
    return value


def out_option(help: str = "Also write JSON.", *, required: bool = False) -> Callable[[Any], Any]:
    """The option --out of a bench."""
    return click.option("--out", metavar="FILE", callback=_writable, required=required, help=help)
