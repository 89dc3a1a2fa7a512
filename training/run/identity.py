"""Which run a folder holds: settings, data and teacher that a resumed run must share with the one that began it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dnnlib.files import lock_folder, read_json, write_json
from torch_utils import distributed
from training.presets import TrainingConfig
from training.run.state import StateError

_MAX_BYTES = 1 << 20  # of run.json
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
    fields = settings(config)
    if config.cooldown_mimg > 0:
        fields["duration"] = config.duration  # the learning rate falls to 0 at its end
    return {**fields, "seed": seed, "data": data, "teacher": teacher}


def settings(config: TrainingConfig) -> dict[str, Any]:
    """Those that must stay on resume, as plain JSON data."""
    return json.loads(json.dumps({k: v for k, v in dataclasses.asdict(config).items() if k not in MAY_CHANGE}))


@contextmanager
def sole_user(run_dir: Path, *, create: bool = True) -> Iterator[None]:
    """Keep other runs out of a folder, by a lock that ends with the main process at the latest. Collective.

    Raises FolderInUseError where another run holds it; without `create`, a folder without lock is free.
    """
    wanted = distributed.is_main() and (create or (run_dir / ".lock").exists())
    held = distributed.main_first(lambda: lock_folder(run_dir) if wanted else None)
    try:
        yield
    finally:
        if held is not None:
            held.close()


def check_identity(
    run_dir: Path,
    identity: dict[str, Any],
    state: dict[str, Any] | None,  # the training state to resume from
    *,
    defaults: dict[str, Any],  # what a run had of settings that did not exist when it began
    force: bool = False,
    log: Callable[[str], None] = print,
) -> None:
    """Compare a run with the one that the folder holds, by run.json or, without that, by its newest state. Collective.

    Raises StateError, listing every difference, where settings or data are others; with `force` they are logged.
    """
    distributed.main_first(lambda: _check(run_dir, identity, state, defaults, force, log))


def write_identity(run_dir: Path, identity: dict[str, Any]) -> None:
    """Make the folder that of this run. For the main process."""
    path = run_dir / "run.json"
    if not path.exists() or _read(path) != identity:
        write_json(path, identity)


def _check(
    run_dir: Path,
    identity: dict[str, Any],
    state: dict[str, Any] | None,
    defaults: dict[str, Any],
    force: bool,
    log: Callable[[str], None],
) -> None:
    path = run_dir / "run.json"
    stored = _read(path) if path.exists() else (state or {}).get("identity")
    if stored is None:
        return
    try:
        stored = dict(json.loads(json.dumps(stored)))
    except (TypeError, ValueError, RecursionError):
        raise StateError(f"the newest training state of {run_dir} is damaged: it does not say whose it is") from None
    differences = _differences({**defaults, **stored}, identity)
    if differences and not force:
        raise StateError(
            f"{run_dir} holds a run with other settings ({'; '.join(differences)}): give the same options to resume "
            "it, --force-resume to go on with the new ones, or another --outdir"
        )
    if differences and distributed.is_main():
        log(f"resuming with other settings, as --force-resume asks: {'; '.join(differences)}")


def _differences(stored: dict[str, Any], wanted: dict[str, Any]) -> list[str]:
    fields = [k for k in sorted(stored.keys() | wanted.keys()) if stored.get(k) != wanted.get(k)]
    return [f"{k} is {_short(stored.get(k))}, now {_short(wanted.get(k))}" for k in fields]


def _short(value: Any) -> str:
    """A value in few characters: fingerprints are long."""
    text = str(value)
    return text if len(text) <= 40 else f"{text[:12]}…"


def _read(path: Path) -> dict[str, Any]:
    try:
        return read_json(path, _MAX_BYTES)
    except ValueError as error:
        raise StateError(f"{error}: restore it, or use another --outdir") from None
