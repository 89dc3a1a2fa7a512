"""Making data sets in the EDM2 layout out of folders and archives of images, and out of the IDX files of MNIST."""

import gzip
import io
import math
import os
import re
import struct
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from itertools import islice
from typing import Any, BinaryIO

import numpy as np
from PIL import Image
from tqdm import tqdm

from data.archives import MAX_PIXELS, DatasetError, FileSource, decode_pixels, is_image_name, read_labels
from data.pictures import SMALL, STORED, encode_png, to_array, to_picture
from data.writer import DatasetWriter, summary
from dnnlib.files import open_regular

TRANSFORMS = ("none", "center-crop", "center-crop-wide", "center-crop-dhariwal")
_SHARD = re.compile(r"\d{5}/img[^/]*$")
_IDX_IMAGES = re.compile(r"(.*)images([-.])idx3-ubyte(\.gz)?$")
_MAX_IDX_BYTES = 1 << 32  # unpacked

_Item = tuple[str, np.ndarray, Any]  # name for messages, uint8 [C,H,W], label


def convert_dataset(
    source: str,  # folder (searched recursively) or ZIP of images, or a folder or file in the IDX format of MNIST
    dest: str,  # folder, or archive where it ends in `.zip`
    *,
    size: tuple[int, int] | None = None,  # (width, height); None = as they are
    transform: str = "none",  # see `transform_image`, as for the next
    resample: str = "lanczos",
    pad: int = 0,  # black pixels to add on every side first
    rgb: bool = False,  # store grey images with three channels; otherwise they keep their one
    labels: str = "auto",  # none; json = the source's; folders = number of the top-level one; auto = as there is
    max_images: int | None = None,  # take the first so many in sorted order; None = all
    compress: bool = False,  # compress the PNG files (smaller, slower to read)
) -> str:
    """Write `source` as an EDM2 data set to `dest` and return a summary. Labels of IDX files stand beside them. Raises
    `DatasetError` (one line, naming the file) for damaged or mixed images, missing labels and a `dest` that exists;
    ValueError as `transform_image`. Nothing is left at `dest` then.
    """
    idx = _find_idx(source)
    opened = _open_idx(idx, labels) if idx else nullcontext(_open_images(source, labels))
    shape: list[int] = []
    written = skipped = 0
    with opened as (count, images), DatasetWriter(dest) as writer:
        total = min(count, max_images or count)
        for where, image, label in tqdm(islice(images, total), total=total, unit="img", dynamic_ncols=True):
            if rgb and image.shape[0] == 1:
                image = np.repeat(image, 3, axis=0)
            image = np.pad(image, ((0, 0), (pad, pad), (pad, pad)))
            try:
                result = transform_image(image, transform, size, resample)
            except DatasetError as error:
                raise DatasetError(f"{where}: {error}") from None
            if result is None:
                skipped += 1
                continue
            shape = shape or list(result.shape)
            _check_shape(result.shape, shape, where)
            png = encode_png(result, SMALL if compress else STORED)
            writer.add(f"{written // 1000:05d}/img{written:08d}.png", png, label)
            written += 1
        if not written:
            raise DatasetError(f"{source}: all {skipped} images are smaller than the resolution asked for")
    return summary(written, shape, label is not None, skipped)


def _resize(image: np.ndarray, size: tuple[int, int], resample: str) -> np.ndarray:
    """uint8 [C,H,W] scaled to (width, height)."""
    if (image.shape[2], image.shape[1]) == size:
        return image
    if size[0] * max(size[1], image.shape[1]) > MAX_PIXELS:
        raise DatasetError(f"{image.shape[2]}x{image.shape[1]} scaled to {size[0]}x{size[1]} are too many pixels")
    picture = to_picture(image)
    if resample == "box" and picture.width % size[0] == picture.height % size[1] == 0:
        # Exact block means, rounded once.
        return to_array(picture.reduce((picture.width // size[0], picture.height // size[1])))
    kernel = {"lanczos": Image.LANCZOS, "bicubic": Image.BICUBIC}.get(resample, Image.BOX)
    # Columns, then rows: left to choose, Pillow versions differ in the order, and so in the rounding between them.
    return to_array(picture.resize((size[0], picture.height), kernel).resize(size, kernel))


def _center(image: np.ndarray, width: int, height: int) -> np.ndarray:
    top, left = (image.shape[1] - height) // 2, (image.shape[2] - width) // 2
    return image[:, top : top + height, left : left + width]


def transform_image(
    image: np.ndarray, transform: str, size: tuple[int, int] | None, resample: str = "lanczos"
) -> np.ndarray | None:
    """Crop and scale uint8 [C,H,W] to `size` = (width, height), as the data tool of EDM2 (arXiv 2312.02696) does.

    - none: scale to `size` without regard to proportions; unchanged where `size` is None.
    - center-crop: cut the largest centred square, then scale.
    - center-crop-wide: keep the central round(width·H/W) rows, scale to `size`, and centre that on black of
      width x width. Meant for pictures about `width` wide; None where it is smaller than `size`.
    - center-crop-dhariwal: halve by 2x2 means while the short side is at least twice the target, scale it to the
      target (bicubic), cut the central square (the preparation of ImageNet by Dhariwal and Nichol).

    `resample` (lanczos or box) is the filter of the first three. Raises ValueError for an unknown transform and a size
    that does not fit it; DatasetError where scaling gives more than MAX_PIXELS.
    """
    if transform not in TRANSFORMS:
        raise ValueError(f"unknown transform {transform!r}; known are {', '.join(TRANSFORMS)}")
    if size is None:
        if transform == "none":
            return image
        raise ValueError(f"transform {transform} needs a resolution, such as 256x256")
    (width, height), (channels, rows, columns) = size, image.shape
    if transform == "center-crop-wide":
        if height > width:
            raise ValueError(f"transform center-crop-wide needs a resolution wider than high, not {width}x{height}")
        kept = round(width * rows / columns)
        if columns < width or kept < height:
            return None
        canvas = np.zeros([channels, width, width], dtype=np.uint8)
        _center(canvas, width, height)[:] = _resize(_center(image, columns, kept), size, resample)
        return canvas
    if transform != "none" and width != height:
        raise ValueError(f"transform {transform} needs a square resolution, not {width}x{height}")
    if transform == "none":
        return _resize(image, size, resample)
    if transform == "center-crop":
        return _resize(_center(image, min(rows, columns), min(rows, columns)), size, resample)
    while min(image.shape[1:]) >= 2 * width:
        image = _resize(image, (image.shape[2] // 2, image.shape[1] // 2), "box-halve")
    scale = width / min(image.shape[1:])
    image = _resize(image, (round(image.shape[2] * scale), round(image.shape[1] * scale)), "bicubic")
    return _center(image, width, width)


def _check_shape(shape: tuple[int, ...], expected: list[int], where: str) -> None:
    channels, height, width = shape
    if height != width:
        raise DatasetError(f"{where}: {width}x{height} is not square; use --transform center-crop with --resolution")
    if [height, width] != expected[1:]:
        before = f"{expected[2]}x{expected[1]} before"
        raise DatasetError(f"{where}: {width}x{height} differs from {before}; set --resolution")
    if channels != expected[0]:
        raise DatasetError(f"{where}: {channels} channels where images before have {expected[0]}; use --rgb")


def _open_images(path: str, labels: str) -> tuple[int, Iterable[_Item]]:
    """Number of images, and those in a fixed order, each decoded only when it is asked for."""
    source = FileSource(path)
    names = [name for name in source.names if is_image_name(name)]
    if not names:
        raise DatasetError(f"{path}: no image files found")
    values: Any = None
    if labels in ("json", "auto") and "dataset.json" in source.names:
        values = read_labels(source, names)
        if values is None and labels == "json":
            raise DatasetError(f"{source.where('dataset.json')}: holds no labels")
        values = values if values is None else values.tolist()
    elif labels == "json":
        raise DatasetError(f"{path}: has no dataset.json to take labels from")
    elif labels != "none":  # the number of each file's top-level folder, unless folders say nothing about classes
        loose = [name for name in names if "/" not in name]
        index = {folder: i for i, folder in enumerate(sorted({name.split("/")[0] for name in names}))}
        if labels == "folders" and loose:
            raise DatasetError(f"{path}: {loose[0]} is in no class folder, so it has no label")
        if labels == "folders" or not (loose or len(index) < 2 or all(_SHARD.match(name) for name in names)):
            values = [index[name.split("/")[0]] for name in names]

    def read(name: str, label: Any) -> _Item:
        where = source.where(name)
        return where, decode_pixels(source.read(name), where), label

    return len(names), map(read, names, values or [None] * len(names))


@contextmanager
def _open_idx(path: str, labels: str) -> Iterator[tuple[int, Iterable[_Item]]]:
    """An IDX file of images, and the file of their labels beside it; read one by one: their claims take no memory."""
    if labels in ("folders", "json"):
        raise DatasetError(f"{path}: an IDX source has its labels in a file beside it; use labels auto or none")
    beside = _find_labels(path) if labels == "auto" else None
    with _opened(path, 3) as (file, (count, *size)):
        with _opened(beside, 1) if beside else nullcontext((None, [count])) as (label_file, (label_count,)):
            if label_count != count:
                raise DatasetError(f"{beside}: {label_count} labels for {count} images")

            def read(i: int) -> _Item:
                pixels = np.frombuffer(_read(file, math.prod(size), path), dtype=np.uint8).reshape(1, *size)
                return f"{path}[{i}]", pixels, _read(label_file, 1, beside)[0] if beside else None

            yield count, map(read, range(count))


def _find_idx(path: str) -> str | None:
    """Path of an MNIST-style image file: `path` itself, or the training set's in folder `path`."""
    if os.path.isfile(path):
        return path if _IDX_IMAGES.match(os.path.basename(path)) else None
    found = sorted(n for n in os.listdir(path) if _IDX_IMAGES.match(n)) if os.path.isdir(path) else []
    found = [n for n in found if n.startswith("train")] or found
    if len(found) > 1:
        raise DatasetError(f"{path}: holds {', '.join(found)}; name one of them as the source")
    return os.path.join(path, found[0]) if found else None


def _find_labels(path: str) -> str:
    folder, base = os.path.split(path)
    stem, separator, suffix = _IDX_IMAGES.match(base).groups()
    candidates = [os.path.join(folder, f"{stem}labels{separator}idx1-ubyte{s}") for s in (suffix or "", ".gz", "")]
    for candidate in filter(os.path.exists, candidates):
        return candidate
    raise DatasetError(f"{path}: no labels beside it ({candidates[0]}); choose labels none to do without")


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
        size, limits = math.prod(shape), f"{_MAX_IDX_BYTES:,} bytes or {MAX_PIXELS:,} pixels"
        if size > _MAX_IDX_BYTES or math.prod(shape[1:]) > MAX_PIXELS:
            raise DatasetError(f"{path}: claims shape {shape}, more than {limits}")
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
