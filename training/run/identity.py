"""Which run a folder holds: who is using it, settings, data and teacher."""

import dataclasses
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from data.dataset import InfiniteSampler
from dnnlib.files import lock_folder, read_json, write_json
from torch_utils import distributed
from training.presets import MAY_CHANGE, TrainingConfig
from training.run.state import Log, State, StateError

Identity = dict[str, Any]  # plain JSON data


def run_identity(config: TrainingConfig, seed: int, data: str, teacher: str | None) -> Identity:
    """Settings that shape the result, seed, order of the images, and fingerprints of data set and teacher."""
    end = {"duration": config.duration} if config.cooldown_mimg > 0 else {}  # where the learning rate falls to 0
    other = {"seed": seed, "data": data, "teacher": teacher, "image_order": InfiniteSampler.version}
    return {**settings(config), **end, **other}


def settings(config: TrainingConfig) -> Identity:
    """Those that must stay on resume."""
    return json.loads(json.dumps({k: v for k, v in dataclasses.asdict(config).items() if k not in MAY_CHANGE}))


@contextmanager
def sole_user(run_dir: Path, *, create: bool = True) -> Iterator[None]:
    """Keep other runs out of a folder, by a lock that ends with the main process at the latest. Collective. Raises
    ValueError where another run holds it; without `create`, a folder without lock is free.
    """
    wanted = distributed.is_main() and (create or (run_dir / ".lock").exists())
    held = distributed.main_first(lambda: lock_folder(run_dir) if wanted else None)
    try:
        yield
    finally:
        if held is not None:
            held.close()


def check_identity(
    run_dir: Path, identity: Identity, state: State | None, defaults: TrainingConfig, *, force: bool, log: Log
) -> None:
    """Compare a run with the one that the folder holds, by run.json or, without that, by its newest state; `defaults`
    are of settings that did not exist when it began. Raises StateError, listing every difference, where settings or
    data are others; with `force` they are logged. Collective.
    """

    def check() -> None:
        path = run_dir / "run.json"
        stored = _read(path) if path.exists() else (state or {}).get("identity")
        if stored is None:
            return
        try:
            stored = settings(defaults) | {"image_order": 1} | json.loads(json.dumps(stored))
        except (TypeError, ValueError, RecursionError):
            told = "is damaged: it does not say whose it is"
            raise StateError(f"the newest training state of {run_dir} {told}") from None
        if stored["image_order"] != identity["image_order"] and not force:
            raise StateError(
                f"{run_dir} holds a run that takes the training images in another order, of another version of this "
                "code: finish it with that version, give --force-resume to go on in the new order, or another --outdir"
            )
        found = "; ".join(
            f"{key} is {_short(stored.get(key))}, now {_short(identity.get(key))}"
            for key in sorted(stored.keys() | identity.keys())
            if stored.get(key) != identity.get(key)
        )
        if found and not force:
            raise StateError(
                f"{run_dir} holds a run with other settings ({found}): give the same options to resume it, "
                "--force-resume to go on with the new ones, or another --outdir"
            )
        if found and distributed.is_main():
            log(f"resuming with other settings, as --force-resume asks: {found}")

    distributed.main_first(check)


def write_identity(run_dir: Path, identity: Identity) -> None:
    """Make the folder that of this run. For the main process."""
    path = run_dir / "run.json"
    if not path.exists() or _read(path) != identity:
        write_json(path, identity)


def _short(value: Any) -> str:
    """A value in few characters: fingerprints are long."""
    text = str(value)
    return text if len(text) <= 40 else f"{text[:12]}…"


def _read(path: Path) -> Identity:
    try:
        return read_json(path, max_bytes=1 << 20)
    except ValueError as error:
        raise StateError(f"{error}: restore it, or use another --outdir") from None
