"""Image data sets in the EDM2 layout: a folder or a ZIP of PNG pixels or NPY latents with an optional `dataset.json`.

The data set yields plain numpy arrays, and neither it nor the sampler needs torch; `torch.utils.data.DataLoader`
takes both as they are.
"""

import hashlib
import json
import os
import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np

from data.archives import (
    LATENT_EXTENSION,
    DatasetError,
    FileSource,
    decode_latents,
    decode_pixels,
    is_image_name,
    one_line,
    read_labels,
)

_FINGERPRINT_BYTES = 256 << 20  # of a folder, to be read

__all__ = ["DatasetError", "ImageDataset", "InfiniteSampler", "one_line"]


class ImageDataset:
    """Map-style data set over a folder or ZIP in the EDM2 layout, for use with `torch.utils.data.DataLoader`.

    `ds[i]` is (image, label): image uint8 [C,H,W] for pixels or float32 [C,H,W] for latents; label float32
    [label_dim], one-hot for class indices, as stored for vectors, of length 0 without labels.

    Args:
        path: folder or ZIP of PNG (or other image) files, or of NPY latents.
        resolution: height and width that the images must have; None = that of the first image.
        use_labels: read `dataset.json`; False = unconditional.
        xflip: append a mirrored copy of every image, which doubles the length.
        max_size: keep a random subset of this many images (before mirroring); None = all.
        random_seed: seed of that subset.
        cache: decode everything once and keep it in memory (for small data sets).

    Raises `DatasetError` (one line, naming the file) for anything that cannot be used; images other than the first
    are checked against it when they are read.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        *,
        resolution: int | None = None,
        use_labels: bool = True,
        xflip: bool = False,
        max_size: int | None = None,
        random_seed: int = 0,
        cache: bool = False,
    ):
        self._source = FileSource(path)
        self.path = self._source.path
        base = os.path.basename(os.path.normpath(self.path))
        self.name = os.path.splitext(base)[0] if self._source.is_zip else base
        self.xflip = bool(xflip)
        self.max_size = max_size
        names = [n for n in self._source.names if is_image_name(n)]
        latents = [n for n in self._source.names if n.lower().endswith(LATENT_EXTENSION)]
        if names and latents:
            raise DatasetError(f"{self.path}: mixes images ({names[0]}) and latents ({latents[0]}); keep one kind")
        names = names or latents
        if not names:
            raise DatasetError(f"{self.path}: no images (PNG) or latents (NPY) found")
        self._decode = decode_latents if latents else decode_pixels
        labels = read_labels(self._source, names) if use_labels else None
        self.label_dim = 0
        if labels is not None:
            self.label_dim = int(labels.max()) + 1 if labels.ndim == 1 else labels.shape[1]

        order = np.arange(len(names))
        if max_size is not None:
            if max_size < 1:
                raise DatasetError(f"{self.path}: max_size is {max_size}; it must be at least 1")
            if max_size < len(names):
                np.random.RandomState(random_seed % (1 << 31)).shuffle(order)
                order = np.sort(order[:max_size])
        self._names = [names[i] for i in order]
        self._labels = None if labels is None else labels[order]

        self._cache: np.ndarray | None = None
        self.image_shape: list[int] | None = None
        self.image_shape = list(self._decode_file(0).shape)
        _, height, width = self.image_shape
        if height != width:
            raise DatasetError(
                f"{self._where(0)}: {width}x{height} pixels; images must be square (see dataset_tool.py)"
            )
        if resolution is not None and height != resolution:
            raise DatasetError(f"{self._where(0)}: {width}x{height} pixels, but {resolution}x{resolution} are needed")
        if cache:
            self._cache = np.stack([self._read_raw(i) for i in range(len(self._names))])
        self._fingerprint: str | None = None

    def _where(self, raw_index: int) -> str:
        return self._source.where(self._names[raw_index])

    def _decode_file(self, raw_index: int) -> np.ndarray:
        return self._decode(self._source.read(self._names[raw_index]), self._where(raw_index), self.image_shape)

    def _read_raw(self, raw_index: int) -> np.ndarray:
        if self._cache is not None:
            return self._cache[raw_index].copy()
        return self._decode_file(raw_index)

    def __len__(self) -> int:
        return len(self._names) * (2 if self.xflip else 1)

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        image = self._read_raw(self._raw_index(index))
        if index % len(self) >= len(self._names):  # the second half is mirrored
            image = np.ascontiguousarray(image[:, :, ::-1])
        return image, self.get_label(index)

    def _raw_index(self, index: int) -> int:
        if not -len(self) <= index < len(self):
            raise IndexError(f"index {index} is out of range for {len(self)} images")
        return int(index) % len(self._names)

    def get_label(self, index: int) -> np.ndarray:
        """Label of image `index`: float32 [label_dim]."""
        raw_index = self._raw_index(index)
        if self._labels is None:
            return np.zeros([0], dtype=np.float32)
        if self._labels.ndim == 2:
            return self._labels[raw_index].copy()
        onehot = np.zeros([self.label_dim], dtype=np.float32)
        onehot[self._labels[raw_index]] = 1
        return onehot

    def get_raw_label(self, index: int) -> int | list[float] | None:
        """Label of image `index` as `dataset.json` stores it: class index, vector, or None without labels."""
        raw_index = self._raw_index(index)
        return None if self._labels is None else self._labels[raw_index].tolist()

    @property
    def resolution(self) -> int:
        """Height = width in pixels."""
        return self.image_shape[1]

    @property
    def num_channels(self) -> int:
        return self.image_shape[0]

    @property
    def label_shape(self) -> list[int]:
        return [self.label_dim]

    @property
    def has_labels(self) -> bool:
        return self._labels is not None

    @property
    def has_onehot_labels(self) -> bool:
        """Whether labels are classes rather than stored vectors."""
        return self._labels is not None and self._labels.ndim == 1

    def facts(self) -> dict[str, Any]:
        """What to record beside a model trained on these images; JSON-able. num_images is without mirrored copies."""
        return {
            "name": self.name,
            "num_images": len(self._names),
            "resolution": self.resolution,
            "channels": self.num_channels,
            "label_dim": self.label_dim,
            "xflip": self.xflip,
            "max_size": self.max_size,
        }

    def fingerprint(self) -> str:
        """SHA-256 hex digest over names, sizes, labels, mirroring and CRCs, without reading all images.

        A ZIP's directory holds the CRCs of all files; of a folder, evenly spaced files are read for theirs, 256 MiB of
        them and at least 256: all of a small one.
        """
        if self._fingerprint is None:
            digest = hashlib.sha256(json.dumps([self.image_shape, self.label_dim, self.xflip]).encode())
            signatures = [self._source.signature(name) for name in self._names]
            for name, signature in zip(self._names, signatures, strict=True):
                digest.update(json.dumps([name, *signature]).encode())
            if not self._source.is_zip:
                share = _FINGERPRINT_BYTES / max(sum(size for size, *_ in signatures), 1)
                count = min(max(int(share * len(self._names)), 256), len(self._names))
                for name in self._names[:: len(self._names) // count]:
                    digest.update(zlib.crc32(self._source.read(name)).to_bytes(4, "big"))
            if self._labels is not None:
                digest.update(self._labels.tobytes())
            self._fingerprint = digest.hexdigest()
        return self._fingerprint

    def close(self) -> None:
        self._source.close()


class InfiniteSampler:
    """Endless stream of image indices whose n-th entry depends on (seed, n) alone, so that any position can be resumed.

    Entry n is item n mod size of epoch n div size; an epoch's order is a permutation drawn from
    `numpy.random.default_rng([seed, epoch])`. Rank r yields every num_replicas-th entry, from start_index + r on.

    Args:
        dataset_size: number of images, mirrored copies included.
        rank, num_replicas: this process and the number of processes.
        shuffle: False = 0, 1, 2, ... in every epoch.
        seed: non-negative.
        start_index: position of the first entry, counted over all ranks (images consumed so far).

    Raises ValueError for numbers out of range.
    """

    def __init__(
        self,
        dataset_size: int,
        *,
        rank: int = 0,
        num_replicas: int = 1,
        shuffle: bool = True,
        seed: int = 0,
        start_index: int = 0,
    ):
        if dataset_size < 1:
            raise ValueError(f"dataset_size is {dataset_size}; a sampler needs at least one image")
        if not 0 <= rank < num_replicas:
            raise ValueError(f"rank {rank} is not below num_replicas {num_replicas}")
        if seed < 0 or start_index < 0:
            raise ValueError(f"seed ({seed}) and start_index ({start_index}) must not be negative")
        self.dataset_size = dataset_size
        self.rank = rank
        self.num_replicas = num_replicas
        self.shuffle = shuffle
        self.seed = seed
        self.start_index = start_index

    def __iter__(self) -> Iterator[int]:
        position = self.start_index + self.rank
        order, epoch = np.arange(self.dataset_size), -1
        while True:
            if self.shuffle and position // self.dataset_size != epoch:
                epoch = position // self.dataset_size
                order = np.random.default_rng([self.seed, epoch]).permutation(self.dataset_size)
            yield int(order[position % self.dataset_size])
            position += self.num_replicas
