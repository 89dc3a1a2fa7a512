"""What a run finds in its folder: another run that is using it, settings, and the newest valid state."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch_utils import distributed
from training.presets import TrainingConfig
from training.run.identity import check_identity, run_identity, settings, sole_user
from training.run.state import StateError, find_newest_state, read_state, remove_unfinished
from training.run.trained import Trained
from training.tasks import Task


def take_up(
    task: Task,
    data: str,  # fingerprint of the data set
    config: TrainingConfig,
    run: Any,  # training.loop.Run
    warn: Callable[[str], None],
    *,
    writing: bool = True,  # False = leave the folder as it is
) -> tuple[Trained, Path | None, dict[str, Any]]:
    """What is trained, as the newest valid state of the folder has it; that state's path; the run's identity.

    Raises StateError where the folder holds another run, or no state that can be used. Collective.
    """
    identity = run_identity(config, run.seed, data, task.teacher_digest)
    trained = Trained(task, config, run.seed, run.device, shard=run.shard, ema_device=run.ema_device)
    path, state = _newest_state(run.run_dir, warn, writing)
    defaults = settings(type(config)())
    check_identity(run.run_dir, identity, state, defaults=defaults, force=run.force_resume, log=warn)
    if state is not None:
        trained.load_state_dict(state, force=run.force_resume)
    return trained, path, identity


def dry_run(task: Task, data: str, config: TrainingConfig, run: Any) -> None:
    """Check all that `take_up` does, writing nothing, and print what a run would begin with. Collective."""
    with sole_user(run.run_dir, create=False):
        trained, path, _ = take_up(task, data, config, run, distributed.print0, writing=False)
    begins = f"it would resume at {trained.nimg} images" if path else "it would begin a new run"
    distributed.print0(f"dry run: nothing is written; {begins}")


def _newest_state(
    run_dir: Path, warn: Callable[[str], None], writing: bool
) -> tuple[Path | None, dict[str, Any] | None]:
    """Newest valid state. The main process verifies files and sets damaged ones aside; the others read the same.

    Raises StateError in a process that does not see that file. Collective.
    """

    def find() -> tuple[Path | None, dict[str, Any] | None]:
        if not distributed.is_main():
            return None, None
        if writing:
            remove_unfinished(run_dir)
        return find_newest_state(run_dir, warn, set_aside=writing)

    path, state = distributed.main_first(find)
    name = distributed.from_main(path.name if path else None)
    if path is None and name is not None:
        path = run_dir / name
        if not path.is_file():
            raise StateError(f"process {distributed.rank()} does not see {path}: all machines must share that folder")
        state = read_state(path)
    return path, state
