"""Where a run writes what happens: terminal, log.txt, stats.jsonl, TensorBoard and a progress bar."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dnnlib.util import atomic_write
from torch_utils import distributed


class RunningMeans:
    """Means of named quantities since they were last read. Tensors stay on their device until then."""

    def __init__(self) -> None:
        self._sums: dict[str, tuple[Any, Any]] = {}

    def add(self, name: str, total: Any, count: Any = 1) -> None:
        """Take in a value, or the sum of `count` values."""
        old_total, old_count = self._sums.get(name, (0.0, 0))
        self._sums[name] = (old_total + total, old_count + count)

    def read(self) -> dict[str, float]:
        """Means over all processes by name, of those with any value; starts afresh. Collective."""
        own = {name: (float(total), float(count)) for name, (total, count) in self._sums.items()}
        self._sums = {}
        sums: dict[str, list[float]] = {}
        for part in _everyone(own):
            for name, pair in part.items():
                sums[name] = [a + b for a, b in zip(sums.get(name, (0.0, 0.0)), pair, strict=True)]
        return {name: total / count for name, (total, count) in sums.items() if count}


def _everyone(item: Any) -> list[Any]:
    if distributed.world_size() == 1:
        return [item]
    parts = [None] * distributed.world_size()
    torch.distributed.all_gather_object(parts, item)
    return parts


class Recorder:
    """Log, statistics and progress of one run in `run_dir`. Only the main process makes one that writes.

    A disk that refuses to be written to does not end training: what could not be written is missing, and said so.
    """

    def __init__(self, run_dir: Path, duration: int, start: int, *, active: bool = True, quiet: bool = False) -> None:
        self.run_dir = run_dir
        self.active = active
        self.duration = duration
        self.start = start
        if not active:
            return
        from tqdm import tqdm

        _drop_after(run_dir / "stats.jsonl", start)
        self._board: Any = None
        self._bar = tqdm(
            total=duration,
            initial=start,
            unit="img",
            unit_scale=True,
            dynamic_ncols=True,
            disable=quiet,
            smoothing=0.05,
        )

    def log(self, message: str) -> None:
        """One line to the terminal and to log.txt, with the time."""
        if not self.active:
            return
        self._bar.write(message)
        self._append("log.txt", f"{time.strftime('%Y-%m-%d %H:%M:%S')}  {message}\n")

    def progress(self, count: int) -> None:
        """Advance the bar by `count` images."""
        if self.active:
            self._bar.update(count)

    def stats(self, nimg: int, values: dict[str, float]) -> None:
        """One line of stats.jsonl, and the same numbers as TensorBoard scalars."""
        if not self.active:
            return
        affected = {k.split("/")[1]: v for k, v in values.items() if k.startswith("Nonfinite/") and v}
        if any(name.endswith("_updates") for name in affected):
            means = ", ".join(f"{name} {value:.3g}" for name, value in affected.items())
            self.log(f"at {nimg} images: non-finite gradients, mean per update and total: {means}")
        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
        self._append("stats.jsonl", json.dumps({"nimg": nimg, **finite}, allow_nan=False) + "\n")
        self._to_board(lambda board: [board.add_scalar(name, value, nimg) for name, value in values.items()])

    def image(self, nimg: int, name: str, sheet: np.ndarray) -> None:
        """A picture uint8 [C,H,W] for TensorBoard."""
        if self.active:
            self._to_board(lambda board: board.add_image(name, sheet, nimg))

    def close(self) -> None:
        """Finish the bar and what TensorBoard still holds back."""
        if self.active:
            self._bar.close()
            self._to_board(lambda board: board.close())

    def _append(self, name: str, text: str) -> None:
        try:
            with open(self.run_dir / name, "a", encoding="utf-8") as file:
                file.write(text)
        except OSError as error:
            self._bar.write(f"{self.run_dir / name} could not be written ({error.strerror or error})")

    def _to_board(self, write: Callable[[Any], Any]) -> None:
        """Use the TensorBoard writer; a new one where the last one failed."""
        from torch.utils.tensorboard import SummaryWriter

        try:
            if self._board is None:
                self._board = SummaryWriter(str(self.run_dir), purge_step=self.start + 1 if self.start else None)
            write(self._board)
            self._board.flush()
        except OSError as error:
            self._board = None
            self._bar.write(f"TensorBoard events could not be written ({error.strerror or error})")


def _drop_after(path: Path, nimg: int) -> None:
    """Remove from a statistics file the lines of a run that was cut off after the state it resumes from."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            entry: Any = json.loads(line)
        except ValueError:
            continue
        if entry.get("nimg", 0) <= nimg:
            kept.append(line + "\n")
    with atomic_write(path, "w") as file:
        file.writelines(kept)
