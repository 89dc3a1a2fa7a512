"""Where a run writes what happens: terminal, log.txt, stats.jsonl, TensorBoard and a progress bar."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

import numpy as np

from dnnlib.util import atomic_write


class RunningMeans:
    """Means of named quantities since they were last read. Tensors stay on their device until then."""

    def __init__(self) -> None:
        self._sums: dict[str, tuple[Any, int]] = {}

    def add(self, name: str, value: Any) -> None:
        total, count = self._sums.get(name, (0.0, 0))
        self._sums[name] = (total + value, count + 1)

    def read(self) -> dict[str, float]:
        """Means by name; starts afresh."""
        means = {name: float(total) / count for name, (total, count) in self._sums.items()}
        self._sums = {}
        return means


class Recorder:
    """Log, statistics and progress of one run in `run_dir`. Only the main process makes one that writes."""

    def __init__(self, run_dir: Path, duration: int, start: int, *, active: bool = True, quiet: bool = False) -> None:
        self.run_dir = run_dir
        self.active = active
        if not active:
            return
        from torch.utils.tensorboard import SummaryWriter
        from tqdm import tqdm

        _drop_after(run_dir / "stats.jsonl", start)
        self._board = SummaryWriter(str(run_dir), purge_step=start + 1 if start else None)
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
        with open(self.run_dir / "log.txt", "a", encoding="utf-8") as file:
            file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')}  {message}\n")

    def progress(self, count: int) -> None:
        """Advance the bar by `count` images."""
        if self.active:
            self._bar.update(count)

    def stats(self, nimg: int, values: dict[str, float]) -> None:
        """One line of stats.jsonl, the same numbers as TensorBoard scalars, and the losses beside the bar."""
        if not self.active:
            return
        losses = {k.removeprefix("Loss/"): f"{v:.4g}" for k, v in values.items() if k.startswith("Loss/")}
        self._bar.set_postfix(losses)
        affected = {k.split("/")[1]: v for k, v in values.items() if k.startswith("Nonfinite/") and v}
        if affected:
            means = ", ".join(f"{name} {value:.3g}" for name, value in affected.items())
            self.log(f"at {nimg} images: non-finite gradients, mean per update: {means}")
        with open(self.run_dir / "stats.jsonl", "a", encoding="utf-8") as file:
            finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
            file.write(json.dumps({"nimg": nimg, **finite}, allow_nan=False) + "\n")
        for name, value in values.items():
            self._board.add_scalar(name, value, nimg)
        self._board.flush()

    def image(self, nimg: int, name: str, sheet: np.ndarray) -> None:
        """A picture uint8 [C,H,W] for TensorBoard."""
        if self.active:
            self._board.add_image(name, sheet, nimg)

    def close(self) -> None:
        if self.active:
            self._bar.close()
            self._board.close()


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
