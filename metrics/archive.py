"""Keeps the images of an evaluation in one data set, from any number of processes."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from data.writer import DatasetWriter, encode_png, make_temporary
from generation.images import GeneratedBatch
from torch_utils import distributed


class ImageArchive:
    """Every process leaves its images in a folder beside `path`; at the end they become one EDM2 data set there.

    A context manager, collective at both ends. Images stand in the order of their seeds, with their classes as labels.
    On error nothing remains. Raises DatasetError (a ValueError) where `path` exists already or cannot be written.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._parts = Path()  # known when entered
        self._lock: int | None = None  # of the parts
        self._writer: DatasetWriter | None = None  # the main process's

    def __enter__(self) -> ImageArchive:
        distributed.main_first(self._open)
        self._parts = distributed.from_main(self._parts)
        return self

    def _open(self) -> None:
        if distributed.is_main():
            self._writer = DatasetWriter(self.path)  # refuses what stands there, before anything is drawn
            parts, self._lock = make_temporary(os.path.realpath(self.path), folder=True)
            self._parts = Path(parts)

    def add(self, batch: GeneratedBatch) -> None:
        """Keep a batch."""
        classes = [None] * len(batch.seeds) if batch.labels is None else batch.labels.argmax(dim=1).tolist()
        for seed, image, label in zip(batch.seeds, batch.images.cpu().numpy(), classes, strict=True):
            name = f"{seed:020d}.png" if label is None else f"{seed:020d}-{label}.png"
            (self._parts / name).write_bytes(encode_png(image))

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        if kind is None:
            distributed.barrier()
        if self._writer is None:
            return
        try:
            with self._writer as writer:
                if kind is not None:
                    raise _Abandoned
                for i, file in enumerate(sorted(self._parts.iterdir())):
                    _, dash, label = file.stem.partition("-")
                    writer.add(f"{i // 1000:05d}/img{i:08d}.png", file.read_bytes(), int(label) if dash else None)
        except _Abandoned:
            pass
        finally:
            shutil.rmtree(self._parts, ignore_errors=True)
            if self._lock is not None:
                os.close(self._lock)


class _Abandoned(Exception):
    """Tells the writer to keep nothing."""
