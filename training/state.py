"""Crash-safe training state: one file per checkpoint, its checksum in its name, the newest valid one wins."""

from __future__ import annotations

import hashlib
import os
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from dnnlib.util import atomic_write

_NAME = re.compile(r"training-state-(\d{9,})-([0-9a-f]{8})\.pt")


class StateError(ValueError):
    """A training state that cannot be used."""


class _HashingFile:
    """File for torch.save that takes the SHA-256 of what passes through."""

    def __init__(self, file: Any) -> None:
        self.file = file
        self.sha256 = hashlib.sha256()

    def write(self, data: bytes) -> int:
        self.sha256.update(data)
        return self.file.write(data)

    def flush(self) -> None:
        self.file.flush()


def save_state(run_dir: str | Path, state: dict[str, Any], nimg: int, keep: int = 2) -> Path:
    """Write tensors and plain data as training-state-NIMG-SHA8.pt; then remove all but the newest `keep` states.

    The file is written under a temporary name, flushed to the disk and renamed, so that a crash at any moment leaves
    the previous state in place.
    """
    temporary = Path(run_dir) / f"training-state-{nimg:09d}.new"
    with atomic_write(temporary) as file:
        hashing = _HashingFile(file)
        torch.save(state, hashing)
    path = Path(run_dir) / f"training-state-{nimg:09d}-{hashing.sha256.hexdigest()[:8]}.pt"
    os.replace(temporary, path)
    for old in list_states(run_dir)[keep:]:
        old.unlink()
    return path


def list_states(run_dir: str | Path) -> list[Path]:
    """Training states of a run, the newest first."""
    found = [path for path in Path(run_dir).glob("training-state-*.pt") if _NAME.fullmatch(path.name)]
    return sorted(found, key=lambda path: int(_NAME.fullmatch(path.name)[1]), reverse=True)


def load_state(path: str | Path) -> dict[str, Any]:
    """Read a state onto the CPU. Raises StateError if the file is damaged; nothing in it is executed."""
    path = Path(path)
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _digest(file)
    if digest[:8] != _NAME.fullmatch(path.name)[2]:
        raise StateError(f"{path} is damaged: its SHA-256 does not begin with the digits in its name")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise StateError(f"{path} cannot be read: {str(error).splitlines()[0]}") from error


def load_newest_state(run_dir: str | Path, warn: Callable[[str], None] = print) -> dict[str, Any] | None:
    """Newest valid state of a run, or None if it has none yet. A damaged one is set aside as *.damaged with a warning.

    Raises StateError if states are there and none is valid: starting afresh would overwrite the run.
    """
    states = list_states(run_dir)
    for path in states:
        try:
            return load_state(path)
        except StateError as error:
            aside = path.with_suffix(".damaged")
            os.replace(path, aside)
            warn(f"{error}; it is set aside as {aside.name}")
    if states or list(Path(run_dir).glob("training-state-*.damaged")):
        raise StateError(f"no valid training state is left in {run_dir}: restore one, or use another --outdir")
    return None


def _digest(file: Any) -> str:
    sha256 = hashlib.sha256()
    while chunk := file.read(1 << 20):
        sha256.update(chunk)
    return sha256.hexdigest()
