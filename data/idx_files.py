"""Images and labels in the IDX format of MNIST, gzipped or not, read one by one: a file's claims take no memory."""

import gzip
import io
import math
import os
import re
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import BinaryIO

import numpy as np

from data.archives import MAX_PIXELS, DatasetError
from dnnlib.files import open_regular

_IMAGES = re.compile(r"(.*)images([-.])idx3-ubyte(\.gz)?$")
_MAX_BYTES = 1 << 32  # unpacked


class IdxImages:
    """An IDX file of images, and the file of their labels beside it."""

    def __init__(self, path: str, labels: str) -> None:
        """`labels` is 'auto' or 'none'. Raises `DatasetError` where header, size or labels are not those of images."""
        if labels in ("folders", "json"):
            raise DatasetError(f"{path}: an IDX source has its labels in a file beside it; use labels auto or none")
        self.path, self._labels = path, _find_labels(path) if labels == "auto" else None
        with _opened(path, 3) as (_, shape):
            self._count, *self._size = shape
        if self._labels is not None:
            with _opened(self._labels, 1) as (_, shape):
                if shape[0] != self._count:
                    raise DatasetError(f"{self._labels}: {shape[0]} labels for {self._count} images")

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[tuple[str, np.ndarray, int | None]]:
        """Yields name, uint8 [1,H,W] and label. Raises `DatasetError` where a file is damaged."""
        labels = nullcontext((None, None)) if self._labels is None else _opened(self._labels, 1)
        with _opened(self.path, 3) as (file, _), labels as (label_file, _):
            for i in range(self._count):
                pixels = np.frombuffer(_read(file, math.prod(self._size), self.path), dtype=np.uint8)
                label = None if label_file is None else _read(label_file, 1, self._labels)[0]
                yield f"{self.path}[{i}]", pixels.reshape(1, *self._size), label


def find_idx(path: str) -> str | None:
    """Path of an MNIST-style image file: `path` itself, or the training set's in folder `path`."""
    if os.path.isfile(path):
        return path if _IMAGES.match(os.path.basename(path)) else None
    found = sorted(n for n in os.listdir(path) if _IMAGES.match(n)) if os.path.isdir(path) else []
    train = [n for n in found if n.startswith("train")]
    if not found:
        return None
    if len(train or found) > 1:
        raise DatasetError(f"{path}: holds {', '.join(train or found)}; name one of them as the source")
    return os.path.join(path, (train or found)[0])


def _find_labels(path: str) -> str:
    folder, base = os.path.split(path)
    stem, separator, suffix = _IMAGES.match(base).groups()
    candidates = [os.path.join(folder, f"{stem}labels{separator}idx1-ubyte{s}") for s in (suffix or "", ".gz", "")]
    existing = [c for c in candidates if os.path.exists(c)]
    if not existing:
        raise DatasetError(f"{path}: no labels beside it ({candidates[0]}); choose labels none to do without")
    return existing[0]


@contextmanager
def _opened(path: str, dims: int) -> Iterator[tuple[BinaryIO, list[int]]]:
    """An IDX file of bytes after its header, and the shape that this claims."""
    try:
        packed = open_regular(path)
    except OSError as error:
        raise DatasetError(f"{path}: cannot be read ({error.strerror})") from None
    with packed, io.BufferedReader(gzip.GzipFile(fileobj=packed)) if path.endswith(".gz") else packed as file:
        magic, *shape = struct.unpack(f">{1 + dims}i", _read(file, 4 + 4 * dims, path))
        if magic != 0x800 + dims or min(shape) < 1:
            raise DatasetError(f"{path}: not an IDX file of bytes with {dims} dimensions")
        size = math.prod(shape)
        if size > _MAX_BYTES or math.prod(shape[1:]) > MAX_PIXELS:
            raise DatasetError(f"{path}: claims shape {shape}, more than {_MAX_BYTES:,} bytes or {MAX_PIXELS:,} pixels")
        if file is packed and os.fstat(packed.fileno()).st_size < file.tell() + size:
            raise DatasetError(f"{path}: damaged: its size does not fit shape {shape}")
        yield file, shape


def _read(file: BinaryIO, count: int, path: str) -> bytes:
    try:
        data = file.read(count)
    except (OSError, EOFError, zlib.error) as error:
        raise DatasetError(f"{path}: cannot be read ({error})") from None
    if len(data) != count:
        raise DatasetError(f"{path}: damaged: it ends early")
    return data
