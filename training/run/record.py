"""What a run writes of itself: terminal, log.txt, stats.jsonl, TensorBoard, a progress bar; and what is worth it."""

import contextlib
import io
import json
import math
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
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
from dnnlib.text import format_bytes, format_time
from torch_utils import distributed
from torch_utils.errors import lead_nowhere
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
        parts = [{name: (float(total), float(count)) for name, (total, count) in self._sums.items()}]
        self._sums = {}
        if distributed.world_size() > 1:
            own, parts = parts[0], [{}] * distributed.world_size()
            torch.distributed.all_gather_object(parts, own)
        sums: dict[str, tuple[float, float]] = {}
        for name, (total, count) in (item for part in parts for item in part.items()):
            old = sums.get(name, (0.0, 0.0))
            sums[name] = (old[0] + total, old[1] + count)
        return {name: total / count for name, (total, count) in sums.items() if count}


def by_level(values: Tensor, levels: Tensor, edges: tuple[float, ...]) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Label, sum and number of the `values` [N] of images whose `levels` [N] lie between neighbouring edges."""
    levels = levels.flatten()
    for low, high in pairwise((0.0, *edges, math.inf)):
        inside = (levels >= low) & (levels < high)
        yield f"t{low:.2g}-{high:.2g}", torch.where(inside, values, 0).sum(), inside.sum()


def facts(trained: Trained, lr: float, device: torch.device) -> Values:
    """Weight norms, the weights that blend in the control branches, learning rates, non-finite gradients so far. Also
    memory in GiB: of this process and, on CUDA, the peak of what tensors held since the last call.
    """
    values = {"Progress/lr": lr, "Memory/host_gib": psutil.Process().memory_info().rss / 2**30}
    if device.type == "cuda":
        values["Memory/gpu_gib"] = torch.cuda.max_memory_allocated(device) / 2**30
        torch.cuda.reset_peak_memory_stats(device)
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


def status_line(nimg: int, duration: int, values: Values) -> str:
    """Images seen, speed, time to go, memory and losses in one line."""
    rate = values["Progress/img_per_s"]
    parts = [f"{nimg} of {duration} images", f"{rate:.4g} img/s", f"ETA {format_time((duration - nimg) / rate)}"]
    places = {"memory": "Memory/host_gib", "GPU": "Memory/gpu_gib"}
    parts += [f"{label} {format_bytes(values[k] * 2**30)}" for label, k in places.items() if k in values]
    parts += [f"{k.removeprefix('Loss/')} {v:.4g}" for k, v in values.items() if k.startswith("Loss/")]
    return "  ".join(parts)


class Recorder:
    """Log, statistics and progress of one run in `run_dir`. Only the main process makes one that writes.

    A disk that refuses to be written to does not end training: what could not be written is missing, and each file is
    named once, until it can be written again. A run that starts from nothing (`start` 0) begins its statistics anew;
    one that resumes removes those of images after `start`.
    """

    def __init__(self, run_dir: Path, duration: int, start: int, *, active: bool = True, quiet: bool = False) -> None:
        self.run_dir, self.active, self.start = run_dir, active, start
        self._failing: set[str] = set()  # files that could not be written the last time
        self._events = f"events.out.tfevents.{int(time.time()):010d}.{socket.gethostname()}.{os.getpid()}"
        self._events_begun = False
        options = dict(unit="img", unit_scale=True, dynamic_ncols=True, smoothing=0.05)
        self._bar = tqdm(total=duration, initial=start, disable=quiet or not active, **options)
        statistics = run_dir / "stats.jsonl"
        try:
            if active and (bad := _drop_after(statistics, start)):
                self.log(f"{statistics}: left out {bad} damaged or foreign {'line' if bad == 1 else 'lines'}")
        except OSError as error:
            self.log(f"{statistics} keeps what it holds of an earlier start ({error.strerror or error})")

    def log(self, message: str, *, terminal: bool = True) -> None:
        """One line to the terminal and to log.txt, with the time."""
        if terminal:
            self._show(lambda: self._bar.write(message))
        self._append("log.txt", f"{time.strftime('%Y-%m-%d %H:%M:%S')}  {message}\n".encode(errors="replace"))

    def progress(self, count: int) -> None:
        """Advance the bar by `count` images."""
        self._show(lambda: self._bar.update(count))

    def stats(self, nimg: int, values: Values) -> None:
        """One line of stats.jsonl, and the same numbers as TensorBoard scalars."""
        affected = {k.split("/")[1]: v for k, v in values.items() if k.startswith("Nonfinite/") and v}
        if any(name.endswith("_updates") for name in affected):
            means = ", ".join(f"{name} {value:.3g}" for name, value in affected.items())
            self.log(f"at {nimg} images: non-finite gradients, mean per update and total: {means}")
        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
        self._append("stats.jsonl", json.dumps({"nimg": nimg, **finite}, allow_nan=False).encode() + b"\n")
        self._to_board(nimg, [{"tag": name, "simple_value": value} for name, value in values.items()])

    def image(self, nimg: int, name: str, sheet: np.ndarray) -> None:
        """A picture uint8 [C,H,W] for TensorBoard."""
        channels, height, width = sheet.shape
        picture = dict(height=height, width=width, colorspace=channels, encoded_image_string=encode_png(sheet, {}))
        self._to_board(nimg, [{"tag": name, "image": picture}])

    def close(self) -> None:
        """Finish the bar."""
        self._show(self._bar.close)

    def _show(self, write: Callable[[], object]) -> None:
        """Write to the terminal. One that is closed must not end training: what fails leads nowhere from then on."""
        try:
            if self.active:
                write()
                sys.stdout.flush()
        except OSError:
            for stream in (sys.stdout, sys.stderr):
                lead_nowhere(stream)

    def _append(self, name: str, data: bytes) -> bool:
        """Write to the end of a file, all or nothing. Whether that worked."""
        if not self.active:
            return False
        path, size = self.run_dir / name, None
        try:
            with open(path, "ab") as file:
                size = file.tell()
                file.write(data)
        except OSError as error:
            if size is not None:
                with contextlib.suppress(OSError):
                    os.truncate(path, size)
            message = f"{path} could not be written ({error.strerror or error})"
            if name not in self._failing:
                self._show(lambda: self._bar.write(message))
            self._failing.add(name)
            return False
        self._failing.discard(name)
        return True

    def _to_board(self, nimg: int, values: list[dict[str, Any]]) -> None:
        """Values for TensorBoard, which drops what earlier starts wrote for images that this one sees again."""
        # Not by SummaryWriter: where a disk is full its thread dies with a traceback, and half a record stays behind.
        now, first = time.time(), self.start + 1 if self.start else 0
        events = [
            Event(wall_time=now, step=first, file_version="brain.Event:2"),
            Event(wall_time=now, step=first, session_log=SessionLog(status=SessionLog.START)),
            Event(wall_time=now, step=nimg, summary=Summary(value=[Summary.Value(**value) for value in values])),
        ]
        data = io.BytesIO()
        for event in events[2 if self._events_begun else 0 :]:
            RecordWriter(data).write(event.SerializeToString())
        self._events_begun |= self._append(self._events, data.getvalue())


def _drop_after(path: Path, nimg: int) -> int:
    """Remove from a statistics file the lines of a run that was cut off after the state it resumes from, or all of them
    where there is none. How many others were removed because they are no statistics.
    """
    if not nimg:
        path.unlink(missing_ok=True)
    if not path.exists():
        return 0
    data = read_regular(path, MAX_STATISTICS)
    entries = [(line, read_entry(line)) for line in data.splitlines() if line.strip()]
    kept = b"".join(line + b"\n" for line, entry in entries if entry is not None and entry["nimg"] <= nimg)
    if data.startswith(kept):
        os.truncate(path, len(kept))  # also on a full disk
    else:
        with atomic_write(path) as file:
            file.write(kept)
    return sum(entry is None for _, entry in entries)
