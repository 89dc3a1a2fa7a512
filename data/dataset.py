"""Image data sets in the EDM2 layout: a folder or a ZIP of PNG pixels or NPY latents with an optional `dataset.json`.
The data set yields plain numpy arrays, and neither it nor the sampler needs torch; `torch.utils.data.DataLoader` takes
both as they are.
"""

import hashlib
import json
import os
import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np

from data.archives import DatasetError, FileSource, decode_latents, decode_pixels, is_image_name, read_labels

_FINGERPRINT_BYTES = 256 << 20  # of a folder, to be read


def one_line(error: DatasetError) -> str:
    """The message alone, without the traceback that PyTorch puts before it when a loader process raised the error."""
    last = str(error).rstrip().rpartition("\n")[2]
    return last.removeprefix(f"{DatasetError.__module__}.{DatasetError.__qualname__}: ")


class ImageDataset:
    """Map-style data set over a folder or ZIP in the EDM2 layout. `ds[i]` is image, label: uint8 [C,H,W] for pixels or
    float32 [C,H,W] for latents, and float32 [label_dim], one-hot for class indices, of length 0 without labels. Raises
    `DatasetError` (one line, naming the file) for anything that cannot be used; images other than the first are checked
    against it when they are read.
    """

    def __init__(
        self,
        path: str | os.PathLike,  # folder or ZIP of PNG (or other image) files, or of NPY latents
        *,
        resolution: int | None = None,  # height and width that the images must have; None = that of the first
        use_labels: bool = True,  # read `dataset.json`; False = unconditional
        xflip: bool = False,  # append a mirrored copy of every image, which doubles the length
        max_size: int | None = None,  # keep a random subset of so many (before mirroring); None = all
        random_seed: int = 0,  # of that subset
        cache: bool = False,  # decode everything once and keep it in memory (for small data sets)
    ):
        self._source = FileSource(path)
        self.path = self._source.path
        base = os.path.basename(os.path.normpath(self.path))
        self.name = os.path.splitext(base)[0] if self._source.is_zip else base
        self.xflip, self.max_size = bool(xflip), max_size
        images = [n for n in self._source.names if is_image_name(n)]
        latents = [n for n in self._source.names if n.lower().endswith(".npy")]
        if images and latents:
            raise DatasetError(f"{self.path}: mixes images ({images[0]}) and latents ({latents[0]}); keep one kind")
        self._names = images or latents
        if not self._names:
            raise DatasetError(f"{self.path}: no images (PNG) or latents (NPY) found")
        self._decode = decode_latents if latents else decode_pixels
        self._labels = read_labels(self._source, self._names) if use_labels else None
        self.has_onehot_labels = self._labels is not None and self._labels.ndim == 1  # classes rather than vectors
        self.label_dim = 0  # of all images, also where a subset lacks some classes
        if self._labels is not None:
            self.label_dim = int(self._labels.max()) + 1 if self.has_onehot_labels else self._labels.shape[1]
        if max_size is not None and max_size < 1:
            raise DatasetError(f"{self.path}: max_size is {max_size}; it must be at least 1")
        if max_size is not None and max_size < len(self._names):  # drawn without replacement; their order stays
            drawn = np.random.RandomState(random_seed % (1 << 31)).permutation(len(self._names))[:max_size]
            drawn.sort()
            self._names = [self._names[i] for i in drawn]
            self._labels = None if self._labels is None else self._labels[drawn]
        self._cache = self._fingerprint = self.image_shape = None
        self.image_shape = list(self._read(0).shape)
        self.num_channels, self.resolution, width = self.image_shape
        found = f"{self._source.where(self._names[0])}: {width}x{self.resolution} pixels"
        if self.resolution != width:
            raise DatasetError(f"{found}; images must be square (see dataset_tool.py)")
        if resolution is not None and self.resolution != resolution:
            raise DatasetError(f"{found}, but {resolution}x{resolution} are needed")
        if cache:
            self._cache = np.stack([self._read(i) for i in range(len(self._names))])

    def _read(self, number: int) -> np.ndarray:
        """One file's image."""
        if self._cache is not None:
            return self._cache[number].copy()
        name = self._names[number]
        return self._decode(self._source.read(name), self._source.where(name), self.image_shape)

    def _locate(self, index: int) -> tuple[bool, int]:
        """Whether image `index` is a mirrored one (they follow all the others), and the number of its file."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"index {index} is out of range for {len(self)} images")
        mirrored, number = divmod(int(index) % len(self), len(self._names))
        return bool(mirrored), number

    def __len__(self) -> int:
        return len(self._names) * (1 + self.xflip)

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        mirrored, number = self._locate(index)
        image = self._read(number)
        return np.flip(image, axis=2).copy() if mirrored else image, self.get_label(index)

    def get_label(self, index: int) -> np.ndarray:
        """Label of image `index`: float32 [label_dim]."""
        label = self.get_raw_label(index)
        if isinstance(label, int):
            return np.eye(1, self.label_dim, label, dtype=np.float32)[0]
        return np.array(label or [], dtype=np.float32)

    def get_raw_label(self, index: int) -> int | list[float] | None:
        """Label of image `index` as `dataset.json` stores it: class index, vector, or None without labels."""
        number = self._locate(index)[1]
        return None if self._labels is None else self._labels[number].tolist()

    def facts(self) -> dict[str, Any]:
        """What to record beside a model trained on these images; JSON-able. num_images is without mirrored copies."""
        images = {"num_images": len(self._names), "resolution": self.resolution, "channels": self.num_channels}
        return dict(name=self.name, **images, label_dim=self.label_dim, xflip=self.xflip, max_size=self.max_size)

    def fingerprint(self) -> str:
        """SHA-256 hex digest over names, sizes, labels, mirroring and CRCs: of all files of a ZIP, whose directory has
        them; of a folder, those of evenly spaced files, 256 MiB and at least 256 of them: all of a small one.
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


class InfiniteSampler:
    """Endless order of images for training: each epoch takes every image once, in a sequence of its own. Epoch e sorts
    the images by 64-bit keys, the output of the Philox generator with the key (seed, e): a function of seed and epoch
    alone, whatever the release of NumPy. The processes take entries in turn, process r of w the entries r, r + w, ...
    of the endless order, so that it can be taken up at any position, by any number of them: `start_index` counts the
    images that all have consumed so far. Raises ValueError for numbers out of range.
    """

    version = 2  # of the order; a run that resumes keeps to the one it began with

    def __init__(self, dataset_size: int, *, rank: int = 0, num_replicas: int = 1, seed: int = 0, start_index: int = 0):
        if dataset_size < 1 or not 0 <= rank < num_replicas or seed < 0 or start_index < 0:
            given = f"{dataset_size} images, rank {rank} of {num_replicas}, seed {seed}, start_index {start_index}"
            raise ValueError(f"out of range: {given} (needed: an image, a rank below their number, nothing negative)")
        self.size, self.seed = dataset_size, seed
        self.first, self.stride = start_index + rank, num_replicas

    def epoch(self, number: int) -> np.ndarray:
        """All images [dataset_size] in the sequence of one epoch."""
        key = np.array([self.seed, number], dtype=np.uint64)
        return np.argsort(np.random.Philox(key=key).random_raw(self.size), kind="stable")

    def __iter__(self) -> Iterator[int]:
        position = self.first
        while True:
            number, passed = divmod(position, self.size)
            mine = self.epoch(number)[passed :: self.stride]
            yield from map(int, mine)
            position += len(mine) * self.stride
