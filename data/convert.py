"""Making data sets in the EDM2 layout out of images of any kind, and turning them into autoencoder latents and back."""

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from data.archives import MAX_PIXELS, DatasetError, FileSource, decode_pixels, is_image_name, read_labels
from data.dataset import ImageDataset
from data.idx_files import IdxImages, find_idx
from data.writer import DatasetWriter, encode_npy, encode_png

if TYPE_CHECKING:  # only names: converting needs no torch
    from networks.encoders import StabilityVAEEncoder

TRANSFORMS = ("none", "center-crop", "center-crop-wide", "center-crop-dhariwal")
_SHARD = re.compile(r"\d{5}/img[^/]*$")

Progress = Callable[[Iterable[Any]], Iterable[Any]]


@dataclass(frozen=True)
class ConversionResult:
    """What was written: number of images, shape [C,H,W] of each, images left out as too small, labelled or not."""

    num_images: int
    image_shape: list[int]
    num_skipped: int
    labelled: bool


# ----------------------------------------------------------------------------
# Crops and scaling; images are uint8 [C,H,W], sizes (width, height)


def _resize(image: np.ndarray, size: tuple[int, int], resample: str) -> np.ndarray:
    from PIL import Image

    if (image.shape[2], image.shape[1]) == size:
        return image
    if size[0] * max(size[1], image.shape[1]) > MAX_PIXELS:
        raise DatasetError(f"{image.shape[2]}x{image.shape[1]} scaled to {size[0]}x{size[1]} are too many pixels")
    picture = Image.fromarray(image[0] if image.shape[0] == 1 else np.ascontiguousarray(image.transpose(1, 2, 0)))
    factors = (picture.width // size[0], picture.height // size[1])
    if resample == "box" and (picture.width, picture.height) == (size[0] * factors[0], size[1] * factors[1]):
        picture = picture.reduce(factors)  # exact block means, rounded once
    else:
        filters = {"lanczos": Image.LANCZOS, "box": Image.BOX, "bicubic": Image.BICUBIC, "box-halve": Image.BOX}
        # Columns, then rows: left to choose, Pillow versions differ in the order, and so in the rounding between them.
        picture = picture.resize((size[0], picture.height), filters[resample]).resize(size, filters[resample])
    pixels = np.array(picture)
    return pixels[np.newaxis] if pixels.ndim == 2 else np.ascontiguousarray(pixels.transpose(2, 0, 1))


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

    `resample` (lanczos or box) is the filter of the first three. Raises ValueError for an unknown transform, or
    where one needs a size, or a square one, and does not get it; DatasetError for pictures so narrow, or sizes so
    large, that scaling gives more than MAX_PIXELS.
    """
    if transform not in TRANSFORMS:
        raise ValueError(f"unknown transform {transform!r}; known are {', '.join(TRANSFORMS)}")
    if size is None:
        if transform == "none":
            return image
        raise ValueError(f"transform {transform} needs a resolution, such as 256x256")
    width, height = size
    if transform == "none":
        return _resize(image, size, resample)
    if transform == "center-crop-wide":
        if height > width:
            raise ValueError(f"transform center-crop-wide needs a resolution wider than high, not {width}x{height}")
        rows = round(width * image.shape[1] / image.shape[2])
        if image.shape[2] < width or rows < height:
            return None
        canvas = np.zeros([image.shape[0], width, width], dtype=np.uint8)
        top = (width - height) // 2
        canvas[:, top : top + height] = _resize(_center(image, image.shape[2], rows), size, resample)
        return canvas
    if width != height:
        raise ValueError(f"transform {transform} needs a square resolution, not {width}x{height}")
    if transform == "center-crop":
        side = min(image.shape[1:])
        return _resize(_center(image, side, side), size, resample)
    while min(image.shape[1:]) >= 2 * width:
        image = _resize(image, (image.shape[2] // 2, image.shape[1] // 2), "box-halve")
    scale = width / min(image.shape[1:])
    image = _resize(image, (round(image.shape[2] * scale), round(image.shape[1] * scale)), "bicubic")
    return _center(image, width, width)


# ----------------------------------------------------------------------------
# Sources: (name for messages, uint8 [C,H,W], label) in a fixed order

_Item = tuple[str, np.ndarray, int | list[float] | None]


@dataclass(frozen=True)
class _Source:
    """Items by number; each is decoded only when it is asked for."""

    count: int
    get: Callable[[int], _Item]

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[_Item]:
        return map(self.get, range(self.count))


def _folder_labels(names: list[str], where: str, required: bool) -> list[int] | None:
    """Index of each file's top-level folder among all of them; None where folders say nothing about classes."""
    loose = [name for name in names if "/" not in name]
    folders = sorted({name.split("/")[0] for name in names})
    if required and loose:
        raise DatasetError(f"{where}: {loose[0]} is in no class folder, so it has no label")
    if not required and (loose or len(folders) < 2 or all(_SHARD.match(name) for name in names)):
        return None
    index = {folder: i for i, folder in enumerate(folders)}
    return [index[name.split("/")[0]] for name in names]


def _open_images(path: str, labels: str) -> _Source:
    source = FileSource(path)
    names = [name for name in source.names if is_image_name(name)]
    if not names:
        raise DatasetError(f"{path}: no image files found")
    values: Any = None
    if labels == "json" and "dataset.json" not in source.names:
        raise DatasetError(f"{path}: has no dataset.json to take labels from")
    if labels == "folders" or (labels == "auto" and "dataset.json" not in source.names):
        values = _folder_labels(names, path, required=labels == "folders")
    elif labels != "none":
        array = read_labels(source, names)
        if array is None and labels == "json":
            raise DatasetError(f"{source.where('dataset.json')}: holds no labels")
        values = None if array is None else array.tolist()

    def get(i: int) -> _Item:
        where = source.where(names[i])
        return where, decode_pixels(source.read(names[i]), where), None if values is None else values[i]

    return _Source(len(names), get)


# ----------------------------------------------------------------------------
# The three operations


def convert_dataset(
    source: str,
    dest: str,
    *,
    size: tuple[int, int] | None = None,
    transform: str = "none",
    resample: str = "lanczos",
    pad: int = 0,
    rgb: bool = False,
    labels: str = "auto",
    max_images: int | None = None,
    compress: bool = False,
    progress: Progress = iter,
) -> ConversionResult:
    """Write `source` as an EDM2 data set to `dest` (a folder, or an archive where it ends in `.zip`).

    Args:
        source: folder (searched recursively) or ZIP of images, or a folder or file in the IDX format of MNIST.
        size, transform, resample: see `transform_image`; size = (width, height), None = as they are.
        pad: black pixels to add on every side first.
        rgb: store grey images with three channels; otherwise they keep their one.
        labels: 'none'; 'json' = the source's `dataset.json`; 'folders' = index of the top-level folder in sorted
            order; 'auto' = json where there is one, else folders where there are several. IDX: the labels file.
        max_images: take the first so many in sorted order; None = all.
        compress: compress the PNG files (smaller, slower to read).
        progress: wraps the iteration, as tqdm does.

    Raises `DatasetError` (one line, naming the file) for damaged or mixed images, missing labels and a `dest` that
    exists; ValueError as `transform_image`. Nothing is left at `dest` then.
    """
    idx = find_idx(source)
    opened = IdxImages(idx, labels) if idx else _open_images(source, labels)
    count = min(len(opened), max_images or len(opened))
    shape: list[int] | None = None
    written = skipped = 0
    labelled = False
    with DatasetWriter(dest) as writer:
        for _, (where, image, label) in zip(progress(range(count)), opened, strict=False):
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
            writer.add(f"{written // 1000:05d}/img{written:08d}.png", encode_png(result, compress), label)
            labelled = label is not None
            written += 1
        if shape is None:
            raise DatasetError(f"{source}: all {skipped} images are smaller than the resolution asked for")
    return ConversionResult(written, shape, skipped, labelled)


def _check_shape(shape: tuple[int, ...], expected: list[int], where: str) -> None:
    channels, height, width = shape
    if height != width:
        raise DatasetError(f"{where}: {width}x{height} is not square; use --transform center-crop with --resolution")
    if [height, width] != expected[1:]:
        raise DatasetError(
            f"{where}: {width}x{height} differs from {expected[2]}x{expected[1]} before; set --resolution"
        )
    if channels != expected[0]:
        raise DatasetError(f"{where}: {channels} channels where images before have {expected[0]}; use --rgb")


def _batches(count: int, size: int) -> list[range]:
    return [range(start, min(start + size, count)) for start in range(0, count, size)]


def encode_dataset(
    source: str,
    dest: str,
    encoder: "StabilityVAEEncoder",
    *,
    batch_size: int = 16,
    max_images: int | None = None,
    progress: Progress = iter,
) -> ConversionResult:
    """Write the posteriors (mean, std; float32 [8,h,w]) of an image data set as NPY files, labels kept.

    Grey images are given three equal channels. Raises `DatasetError` as `ImageDataset` does, and ValueError where
    the autoencoder cannot be found or does not divide the image size.
    """
    import torch

    dataset = ImageDataset(source)
    if dataset.num_channels not in (1, 3):
        raise DatasetError(f"{source}: {dataset.num_channels} channels; only pixels can be encoded")
    count = min(len(dataset), max_images or len(dataset))
    shape: list[int] = []
    with DatasetWriter(dest) as writer:
        for indices in progress(_batches(count, batch_size)):
            pixels = torch.from_numpy(np.stack([dataset[i][0] for i in indices]))
            raw = encoder.encode_pixels(pixels.expand(-1, 3, -1, -1)).cpu().numpy()
            shape = list(raw.shape[1:])
            for i, latents in zip(indices, raw, strict=True):
                name = f"{i // 1000:05d}/img-mean-std-{i:08d}.npy"
                writer.add(name, encode_npy(latents), dataset.get_raw_label(i))
    return ConversionResult(count, shape, 0, dataset.has_labels)


def decode_dataset(
    source: str,
    dest: str,
    encoder: "StabilityVAEEncoder",
    *,
    batch_size: int = 16,
    max_images: int | None = None,
    progress: Progress = iter,
) -> ConversionResult:
    """Write the pixels that the posterior means of a latent data set decode to as PNG files, labels kept.

    Raises `DatasetError` as `ImageDataset` does or where the data are not latents, and ValueError where the
    autoencoder cannot be found.
    """
    import torch

    dataset = ImageDataset(source)
    channels = dataset.num_channels // 2
    if dataset.num_channels != 2 * encoder.scale.size:
        raise DatasetError(
            f"{source}: {dataset.num_channels} channels; latents have {2 * encoder.scale.size} (mean, std)"
        )
    count = min(len(dataset), max_images or len(dataset))
    shape: list[int] = []
    with DatasetWriter(dest) as writer:
        for indices in progress(_batches(count, batch_size)):
            means = torch.from_numpy(np.stack([dataset[i][0][:channels] for i in indices]))
            pixels = encoder.decode_raw(means).cpu().numpy()
            shape = list(pixels.shape[1:])
            for i, image in zip(indices, pixels, strict=True):
                writer.add(f"{i // 1000:05d}/img{i:08d}.png", encode_png(image), dataset.get_raw_label(i))
    return ConversionResult(count, shape, 0, dataset.has_labels)
