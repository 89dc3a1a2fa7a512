"""Keeps the images of an evaluation in one data set, from any number of processes."""

from __future__ import annotations

import os
from pathlib import Path

from data.pictures import encode_png
from data.writer import DatasetWriter
from dnnlib.files import discard, temporary_beside
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
        self._place = temporary_beside(os.path.realpath(path), folder=True)  # of the parts
        self._writer: DatasetWriter | None = None  # the main process's

    def __enter__(self) -> ImageArchive:
        distributed.main_first(self._open)
        self._parts = distributed.from_main(self._parts)
        return self

    def _open(self) -> None:
        if distributed.is_main():
            self._writer = DatasetWriter(self.path)  # refuses what stands there, before anything is drawn
            self._parts = self._place.__enter__()

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
            discard(self._parts)
            self._place.__exit__(None, None, None)


class _Abandoned(Exception):
    """Tells the writer to keep nothing."""
