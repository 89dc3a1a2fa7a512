"""Durable training states: written whole or not at all, verified when read, the newest valid one wins."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from dnnlib.files import file_sha256

_NAME = re.compile(r"training-state-(\d{9,})-([0-9a-f]{8})\.pt")
_UNFINISHED = ".training-state-*.new"


class StateError(ValueError):
    """A training state that cannot be used."""


class HashingFile:
    """File for torch.save that takes the SHA-256 of what passes through.

    An error of the file system is kept for `check` instead of being raised in the middle of torch.save, whose archive
    writer would then try to finish a file that cannot be finished.
    """

    def __init__(self, file: Any) -> None:
        self.file = file
        self.sha256 = hashlib.sha256()
        self.error: OSError | None = None

    def write(self, data: bytes) -> int:
        self.sha256.update(data)
        if self.error is None:
            try:
                self.file.write(data)
            except OSError as error:
                self.error = error
        return len(data)

    def flush(self) -> None:
        """Nothing to do: the file is flushed when it is complete."""

    def check(self) -> None:
        """Raise the first OSError of a write."""
        if self.error is not None:
            raise self.error


def to_host(tree: Any) -> Any:
    """The same nested dicts and lists with copies of all tensors in host memory, so that training may go on."""
    if isinstance(tree, torch.Tensor):
        return tree.detach().to("cpu", copy=True)
    if isinstance(tree, dict):
        return {key: to_host(value) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return type(tree)(to_host(value) for value in tree)
    return tree


def state_bytes(tree: Any) -> int:
    """Bytes of all tensors in nested dicts and lists."""
    if isinstance(tree, torch.Tensor):
        return tree.numel() * tree.element_size()
    if isinstance(tree, dict):
        tree = tree.values()
    elif not isinstance(tree, (list, tuple)):
        return 0
    return sum(map(state_bytes, tree))


def save_state(
    run_dir: str | Path,
    state: dict[str, Any],
    nimg: int,
    *,
    keep: int = 2,
    keep_every: int = 0,
    warn: Callable[[str], None] = print,
) -> Path:
    """Write tensors and plain data as training-state-NIMG-SHA8.pt; then remove the states that `prune` does.

    The file is written under a temporary name, flushed to the disk and renamed, so that a crash at any moment leaves
    the previous state in place. Raises OSError where that fails; nothing of the attempt is left then.
    """
    run_dir = Path(run_dir)
    temporary = run_dir / f".training-state-{nimg:09d}-{os.getpid()}.new"
    try:
        with open(temporary, "xb") as file:
            hashing = HashingFile(file)
            torch.save(state, hashing)
            hashing.check()
            file.flush()
            os.fsync(file.fileno())
        path = run_dir / f"training-state-{nimg:09d}-{hashing.sha256.hexdigest()[:8]}.pt"
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    _flush_folder(run_dir)
    prune(run_dir, keep, keep_every, warn)
    return path


def prune(run_dir: str | Path, keep: int, keep_every: int = 0, warn: Callable[[str], None] = print) -> None:
    """Remove all but the newest `keep` states and, with `keep_every` > 0, the first of each `keep_every` images.

    What cannot be removed stays, with a warning.
    """
    states = list_states(run_dir)
    kept = set(states[:keep])
    if keep_every:
        first = {state_nimg(path) // keep_every: path for path in states}  # newest first: the oldest one stays
        kept |= {path for multiple, path in first.items() if multiple > 0}
    for path in states:
        if path not in kept:
            try:
                path.unlink(missing_ok=True)
            except OSError as error:
                warn(f"{path} could not be removed ({error.strerror or error})")


def remove_unfinished(run_dir: str | Path) -> None:
    """Remove what a killed process left of a state it was writing."""
    for path in Path(run_dir).glob(_UNFINISHED):
        path.unlink()


def list_states(run_dir: str | Path) -> list[Path]:
    """Training states of a run, the newest first."""
    found = [path for path in Path(run_dir).glob("training-state-*.pt") if _NAME.fullmatch(path.name)]
    return sorted(found, key=state_nimg, reverse=True)


def state_nimg(path: Path) -> int:
    """Images seen, from a state's name."""
    return int(_NAME.fullmatch(path.name)[1])


def load_state(path: str | Path) -> dict[str, Any]:
    """Read a verified state. Raises StateError if the file is damaged; nothing in it is executed.

    Tensors are mapped from the file, so that the processes of a machine share the memory; copy what is kept.
    """
    path = Path(path)
    if file_sha256(path)[:8] != _NAME.fullmatch(path.name)[2]:
        raise StateError(f"{path} is damaged: its SHA-256 does not begin with the digits in its name")
    return read_state(path)


def read_state(path: str | Path) -> dict[str, Any]:
    """Read a state that another process has verified; otherwise as `load_state`."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (OSError, MemoryError):
        raise
    except Exception as error:  # what a damaged archive or pickle leads to can be of any kind
        raise StateError(f"{path} is cut off, damaged or no training state") from error
    if type(state) is not dict or type(state.get("nimg")) is not int:
        raise StateError(f"{path} is no training state: it holds a {type(state).__name__} without a count of images")
    return state


def find_newest_state(
    run_dir: str | Path, warn: Callable[[str], None] = print, *, set_aside: bool = True
) -> tuple[Path | None, dict[str, Any] | None]:
    """Newest valid state of a run with its path, or (None, None) if it has none yet.

    A damaged one is set aside as *.damaged (unless `set_aside` is off) with a warning, and one that the system cannot
    read is left out. Raises StateError if states are there and none is valid: starting afresh would overwrite the run.
    """
    reasons = []
    for path in list_states(run_dir):
        try:
            return path, load_state(path)
        except StateError as error:
            aside, outcome = path.with_suffix(".damaged"), "the one before is used"
            if set_aside:
                with contextlib.suppress(OSError):
                    os.replace(path, aside)
                    outcome = f"it is set aside as {aside.name}"
            reasons.append(f"{error}; {outcome}")
        except OSError as error:
            reasons.append(f"{path} cannot be read ({error.strerror or error}); the one before is used")
        warn(reasons[-1])
    if reasons or list(Path(run_dir).glob("training-state-*.damaged")):
        found = "; ".join(reasons) or "all have been set aside as .damaged"
        raise StateError(
            f"no valid training state is left in {run_dir}: restore one, or use another --outdir ({found})"
        )
    return None, None


def load_newest_state(run_dir: str | Path, warn: Callable[[str], None] = print) -> dict[str, Any] | None:
    """The state that `find_newest_state` finds."""
    return find_newest_state(run_dir, warn)[1]


def _flush_folder(folder: Path) -> None:
    """Make a rename durable, on systems where a folder can be flushed."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(handle)
    except OSError:
        pass
    finally:
        os.close(handle)
