"""What a run writes of itself: terminal, log.txt, stats.jsonl, TensorBoard, a progress bar; and what is worth it."""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import socket
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter
from torch import Tensor
from tqdm import tqdm

from data.pictures import encode_png
from dnnlib.files import atomic_write, read_regular
from dnnlib.streams import lead_nowhere
from dnnlib.text import format_bytes, format_time
from torch_utils import distributed
from training.optim import total_norm
from training.run.curves import MAX_STATISTICS, read_entry
from training.run.state import Trained
from training.tasks import LossTerms, Phase

Number = float | Tensor
Values = dict[str, float]


class RunningMeans:
    """Means of named quantities since they were last read. Tensors stay on their device until then."""

    def __init__(self) -> None:
        self._sums: dict[str, tuple[Number, Number]] = {}

    def add(self, name: str, total: Number, count: Number = 1) -> None:
        """Take in a value, or the sum of `count` values."""
        old_total, old_count = self._sums.get(name, (0.0, 0))
        self._sums[name] = (old_total + total, old_count + count)

    def add_all(self, values: Mapping[str, Number]) -> None:
        """Take in a value of each name."""
        for name, value in values.items():
            self.add(name, value)

    def add_losses(self, phase: Phase, terms: LossTerms) -> None:
        """Take in each reported loss, its parts by quarter of the noise levels' distribution, and the rates."""
        for name, value in terms.reported.items():
            per_image = value.detach().float().mean(dim=(1, 2, 3))
            self.add(f"Loss/{name}", per_image.mean())
            for label, total, count in by_level(per_image, terms.levels, phase.level_edges):
                self.add(f"Levels/{name}_{label}", total, count)
        for name, value in terms.rates.items():
            self.add(name, value.detach().float().mean())

    def read(self) -> Values:
        """Means over all processes by name, of those with any value; starts afresh. Collective."""
        own = {name: (float(total), float(count)) for name, (total, count) in self._sums.items()}
        self._sums = {}
        parts: list[dict[str, tuple[float, float]]] = [own]
        if distributed.world_size() > 1:
            parts = [{}] * distributed.world_size()
            torch.distributed.all_gather_object(parts, own)
        sums: dict[str, list[float]] = {}
        for name, pair in (item for part in parts for item in part.items()):
            sums[name] = [a + b for a, b in zip(sums.get(name, (0.0, 0.0)), pair, strict=True)]
        return {name: total / count for name, (total, count) in sums.items() if count}


def by_level(values: Tensor, levels: Tensor, edges: tuple[float, ...]) -> list[tuple[str, Tensor, Tensor]]:
    """Label, sum and number of the `values` [N] of images whose `levels` [N] lie between neighbouring edges."""
    bounds = [0.0, *edges, float("inf")]
    levels = levels.flatten()
    parts = []
    for low, high in zip(bounds, bounds[1:], strict=False):
        inside = (levels >= low) & (levels < high)
        parts.append((f"t{low:.2g}-{high:.2g}", torch.where(inside, values, 0).sum(), inside.sum()))
    return parts


def facts(trained: Trained, lr: float) -> Values:
    """Weight norms, the weights that blend in the control branches, learning rates, non-finite gradients so far."""
    values = {"Progress/lr": lr}
    for phase in trained.task.phases:
        values[f"Weights/{phase.name}_norm"] = float(total_norm(phase.net.parameters()))
        values[f"Rates/{phase.name}"] = lr * phase.rate(trained.nimg) if trained.nimg > phase.start else 0.0
        values[f"Nonfinite/{phase.name}_total"] = trained.health[phase.name].updates
        for key, p in phase.net.named_parameters():
            kind = key.rpartition(".")[2]
            if kind == "additional_x_weight":
                values[f"Control/{phase.name}_x"] = float(p.clamp(0, 1))  # as the network uses it
            elif kind == "additional_skips_weight":
                values |= {f"Control/{phase.name}_skip{i:02d}": w for i, w in enumerate(p.clamp(0, 1).tolist())}
    return values


def memory(device: torch.device) -> Values:
    """Resident memory of this process and, on CUDA, the peak of what tensors held since the last call, in GiB."""
    values = {"Memory/host_gib": psutil.Process().memory_info().rss / 2**30}
    if device.type == "cuda":
        values["Memory/gpu_gib"] = torch.cuda.max_memory_allocated(device) / 2**30
        torch.cuda.reset_peak_memory_stats(device)
    return values


def status_line(nimg: int, duration: int, values: Values) -> str:
    """Images seen, speed, time to go, memory and losses in one line."""
    rate = values["Progress/img_per_s"]
    parts = [f"{nimg} of {duration} images", f"{rate:.4g} img/s", f"ETA {format_time((duration - nimg) / rate)}"]
    for name, label in (("Memory/host_gib", "memory"), ("Memory/gpu_gib", "GPU")):
        if name in values:
            parts.append(f"{label} {format_bytes(values[name] * 2**30)}")
    parts += [f"{k.removeprefix('Loss/')} {v:.4g}" for k, v in values.items() if k.startswith("Loss/")]
    return "  ".join(parts)


class Recorder:
    """Log, statistics and progress of one run in `run_dir`. Only the main process makes one that writes.

    A disk that refuses to be written to does not end training: what could not be written is missing, and each file is
    named once, until it can be written again. A run that starts from nothing (`start` 0) begins its statistics anew;
    one that resumes removes those of images after `start`.
    """

    def __init__(self, run_dir: Path, duration: int, start: int, *, active: bool = True, quiet: bool = False) -> None:
        self.run_dir = run_dir
        self.active = active
        self.duration = duration
        self.start = start
        if not active:
            return
        self._failing: set[str] = set()  # files that could not be written the last time
        self._events = f"events.out.tfevents.{int(time.time()):010d}.{socket.gethostname()}.{os.getpid()}"
        self._events_begun = False
        options = dict(unit="img", unit_scale=True, dynamic_ncols=True, smoothing=0.05)
        self._bar = tqdm(total=duration, initial=start, disable=quiet, **options)
        statistics = run_dir / "stats.jsonl"
        try:
            bad = _drop_after(statistics, start)
        except OSError as error:
            self.log(f"{statistics} keeps what it holds of an earlier start ({error.strerror or error})")
        else:
            if bad:
                self.log(f"{statistics}: left out {bad} damaged or foreign {'line' if bad == 1 else 'lines'}")

    def log(self, message: str, *, terminal: bool = True) -> None:
        """One line to the terminal and to log.txt, with the time."""
        if not self.active:
            return
        if terminal:
            self._show(lambda: self._bar.write(message))
        self._append("log.txt", f"{time.strftime('%Y-%m-%d %H:%M:%S')}  {message}\n".encode(errors="replace"))

    def progress(self, count: int) -> None:
        """Advance the bar by `count` images."""
        if self.active:
            self._show(lambda: self._bar.update(count))

    def stats(self, nimg: int, values: Values) -> None:
        """One line of stats.jsonl, and the same numbers as TensorBoard scalars."""
        if not self.active:
            return
        affected = {k.split("/")[1]: v for k, v in values.items() if k.startswith("Nonfinite/") and v}
        if any(name.endswith("_updates") for name in affected):
            means = ", ".join(f"{name} {value:.3g}" for name, value in affected.items())
            self.log(f"at {nimg} images: non-finite gradients, mean per update and total: {means}")
        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
        self._append("stats.jsonl", json.dumps({"nimg": nimg, **finite}, allow_nan=False).encode() + b"\n")
        self._to_board(nimg, [{"tag": name, "simple_value": value} for name, value in values.items()])

    def image(self, nimg: int, name: str, sheet: np.ndarray) -> None:
        """A picture uint8 [C,H,W] for TensorBoard."""
        if not self.active:
            return
        channels, height, width = sheet.shape
        picture = dict(height=height, width=width, colorspace=channels, encoded_image_string=encode_png(sheet, {}))
        self._to_board(nimg, [{"tag": name, "image": picture}])

    def close(self) -> None:
        """Finish the bar."""
        if self.active:
            self._show(self._bar.close)

    @staticmethod
    def _show(write: Callable[[], object]) -> None:
        """Write to the terminal. One that is closed must not end training: what fails leads nowhere from then on."""
        try:
            write()
            sys.stdout.flush()
        except OSError:
            for stream in (sys.stdout, sys.stderr):
                lead_nowhere(stream)

    def _append(self, name: str, data: bytes) -> bool:
        """Write to the end of a file, all or nothing. Whether that worked."""
        path, size = self.run_dir / name, None
        try:
            with open(path, "ab") as file:
                size = file.tell()
                file.write(data)
        except OSError as error:
            if size is not None:
                with contextlib.suppress(OSError):
                    os.truncate(path, size)
            reason = error.strerror or error
            if name not in self._failing:
                self._show(lambda: self._bar.write(f"{path} could not be written ({reason})"))
            self._failing.add(name)
            return False
        self._failing.discard(name)
        return True

    def _to_board(self, nimg: int, values: list[dict[str, Any]]) -> None:
        """Values for TensorBoard, which drops what earlier starts wrote for images that this one sees again."""
        # Not by SummaryWriter: where a disk is full its thread dies with a traceback, and half a record stays behind.
        now = time.time()
        events = [Event(wall_time=now, step=nimg, summary=Summary(value=[Summary.Value(**value) for value in values]))]
        if not self._events_begun:
            first = self.start + 1 if self.start else 0
            session = Event(wall_time=now, step=first, session_log=SessionLog(status=SessionLog.START))
            events = [Event(wall_time=now, step=first, file_version="brain.Event:2"), session, *events]
        data = io.BytesIO()
        for event in events:
            RecordWriter(data).write(event.SerializeToString())
        self._events_begun = self._append(self._events, data.getvalue()) or self._events_begun


def _drop_after(path: Path, nimg: int) -> int:
    """Remove from a statistics file the lines of a run that was cut off after the state it resumes from, or all of them
    where there is none. How many others were removed because they are no statistics.
    """
    if not nimg:
        path.unlink(missing_ok=True)
        return 0
    if not path.exists():
        return 0
    data = read_regular(path, MAX_STATISTICS)
    lines = [line for line in data.splitlines() if line.strip()]
    entries = [read_entry(line) for line in lines]
    kept = b"".join(
        line + b"\n" for line, entry in zip(lines, entries, strict=True) if entry is not None and entry["nimg"] <= nimg
    )
    if data.startswith(kept):
        os.truncate(path, len(kept))  # also on a full disk
    else:
        with atomic_write(path) as file:
            file.write(kept)
    return entries.count(None)
