"""Keeps the images of an evaluation in one data set, from any number of processes."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from data.pictures import encode_png
from data.writer import DatasetWriter
from dnnlib.files import discard, temporary_beside
from generation.images import GeneratedBatch
from torch_utils import distributed


@contextmanager
def image_archive(path: str | Path) -> Iterator[Callable[[GeneratedBatch], None]]:
    """Give a function that keeps a batch; at the end all processes' images become one EDM2 data set at `path`.

    Collective at both ends: every process leaves its images in a folder beside `path`. They stand in the order of
    their seeds, with their classes as labels. On error nothing remains. Raises DatasetError (a ValueError) where `path`
    exists already or cannot be written.
    """
    with ExitStack() as stack:

        def begin() -> tuple[DatasetWriter | None, Path | None]:
            if not distributed.is_main():
                return None, None
            writer = stack.enter_context(DatasetWriter(path))  # refuses what stands there, before anything is drawn
            parts = stack.enter_context(temporary_beside(os.path.realpath(path), folder=True))
            stack.callback(discard, parts)
            return writer, parts

        writer, parts = distributed.main_first(begin)
        parts = distributed.from_main(parts)

        def add(batch: GeneratedBatch) -> None:
            classes = [None] * len(batch.seeds) if batch.labels is None else batch.labels.argmax(dim=1).tolist()
            for seed, image, label in zip(batch.seeds, batch.images.cpu().numpy(), classes, strict=True):
                name = f"{seed:020d}.png" if label is None else f"{seed:020d}-{label}.png"
                (parts / name).write_bytes(encode_png(image))

        yield add
        distributed.barrier()
        for i, file in enumerate(sorted(parts.iterdir()) if writer is not None else ()):
            _, dash, label = file.stem.partition("-")
            writer.add(f"{i // 1000:05d}/img{i:08d}.png", file.read_bytes(), int(label) if dash else None)
