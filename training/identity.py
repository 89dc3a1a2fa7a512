"""Which run a folder holds: settings, data and teacher that a resumed run must share with the one that began it."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from dnnlib.util import write_json
from torch_utils import distributed
from training.presets import TrainingConfig
from training.state import StateError

MAY_CHANGE = (  # on resume
    "duration",
    "status",
    "snapshot",
    "checkpoint",
    "keep_every",
    "batch_gpu",
    "eval_ts",
    "eval_steps",
    "nonfinite",
    "nonfinite_limit",
)


def run_identity(config: TrainingConfig, seed: int, data: str, teacher: str | None) -> dict[str, Any]:
    """Settings that shape the result, seed, and fingerprints of data set and teacher, as plain JSON data."""
    fields = {k: v for k, v in dataclasses.asdict(config).items() if k not in MAY_CHANGE}
    return json.loads(json.dumps({**fields, "seed": seed, "data": data, "teacher": teacher}))


@contextmanager
def sole_user(run_dir: Path) -> Iterator[None]:
    """Keep other runs out of a folder, by a lock that ends with the main process at the latest. Collective.

    Raises StateError where another run holds it. File systems without locks are trusted.
    """
    held = distributed.main_first(lambda: _lock(run_dir / ".lock") if distributed.is_main() else None)
    try:
        yield
    finally:
        if held is not None:
            held.close()


def _lock(path: Path) -> IO[str] | None:
    try:
        import fcntl
    except ImportError:  # Windows
        return None
    file = open(path, "a+", encoding="utf-8")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # of the process: loader processes do not inherit it
    except OSError as error:
        file.seek(0)
        holder = file.read(200).strip()
        file.close()
        if error.errno in (errno.EACCES, errno.EAGAIN):
            raise StateError(
                f"{path.parent} is in use by another run ({holder or 'unknown'}): stop it, or use another --outdir"
            ) from None
        return None
    try:
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
    except OSError:  # a full disk: the lock holds without a name
        pass
    return file


def claim_folder(
    run_dir: Path, identity: dict[str, Any], *, force: bool = False, log: Callable[[str], None] = print
) -> None:
    """Write run.json where it is new; where it is not, compare. Collective.

    Raises StateError, listing every difference, where the folder holds a run with other settings or other data; with
    `force` the differences are logged and run.json becomes that of the new settings.
    """
    distributed.main_first(lambda: _claim(run_dir, identity, force, log))


def _claim(run_dir: Path, identity: dict[str, Any], force: bool, log: Callable[[str], None]) -> None:
    path = run_dir / "run.json"
    if not path.exists():
        write_json(path, identity)
        return
    differences = _differences(_read(path), identity)
    if not differences:
        return
    if not force:
        raise StateError(
            f"{run_dir} holds a run with other settings ({'; '.join(differences)}): give the same options to resume "
            "it, --force-resume to go on with the new ones, or another --outdir"
        )
    if distributed.is_main():
        log(f"resuming with other settings, as --force-resume asks: {'; '.join(differences)}")
        write_json(path, identity)


def _differences(stored: dict[str, Any], wanted: dict[str, Any]) -> list[str]:
    fields = [k for k in sorted(stored.keys() | wanted.keys()) if stored.get(k) != wanted.get(k)]
    return [f"{k} is {_short(stored.get(k))}, now {_short(wanted.get(k))}" for k in fields]


def _short(value: Any) -> str:
    """A value in few characters: fingerprints are long."""
    text = str(value)
    return text if len(text) <= 40 else f"{text[:12]}…"


def _read(path: Path) -> dict[str, Any]:
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(stored, dict):
            raise ValueError("not a JSON object")
    except ValueError as error:
        raise StateError(f"{path} is damaged ({error}): restore it, or use another --outdir") from None
    return stored
