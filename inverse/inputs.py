"""What an inverse problem starts from: images to be measured, or real measurements, from a folder or a ZIP archive."""

from __future__ import annotations

import io
import math
import os
import re
import zipfile
from pathlib import PurePosixPath

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from data.archives import MAX_FILE_BYTES, FileSource, decode_pixels, is_image_name, read_labels
from data.pictures import to_array, to_picture
from dnnlib.files import read_regular
from dnnlib.npy import read_npy

_ARRAY_EXTENSIONS = (".npz", ".npy")
_MAX_HEADER_BYTES = 4096
_MAX_NAME_BYTES = 200  # of an image, so that every file named after it fits a file system
_ORIENTATION = 274  # EXIF tag: how a camera was held
_UPRIGHT = {  # its values: first transposed, then flipped along (rows, columns)
    2: (False, False, True),
    3: (False, True, True),
    4: (False, True, False),
    5: (True, False, False),
    6: (True, False, True),
    7: (True, True, True),
    8: (True, True, False),
}


class InputError(ValueError):
    """An image or a measurement cannot be used; the message is one line that names the file."""


class ImageFolder:
    """Images of any format, in a network's resolution and channels, as [C,H,W] in [-1, 1]."""

    def __init__(
        self,
        path: str | os.PathLike,
        *,
        resolution: int,  # pixels
        channels: int,  # 1 or 3
        resize: bool = False,  # centre-crop and resize other sizes; without it they are an error
        num: int | None = None,  # the first so many in order of their names; None = all
    ) -> None:
        """Raises InputError or DatasetError where there are no images or fewer than `num`."""
        self._source = FileSource(path)
        self._shape = (channels, resolution, resolution)
        self._resize = resize
        files = [name for name in self._source.names if is_image_name(name)]
        if not files:
            raise InputError(f"{path}: holds no images")
        if num is not None and num > len(files):
            raise InputError(f"{path}: holds {len(files)} images, fewer than the {num} asked for")
        self._files = name_files(files[:num], str(path))
        self.names = list(self._files)

    def read(self, name: str) -> Tensor:
        """Return one image [C,H,W], float32 in [-1, 1]. Raises DatasetError or InputError."""
        file = self._files[name]
        where = self._source.where(file)
        data = self._source.read(file)
        return pixels_to_image(self.fit(upright(decode_pixels(data, where), data), where))

    def check(self) -> None:
        """Read every image once. Raises DatasetError or InputError for the first that cannot be used."""
        for name in self.names:
            self.read(name)

    def fit(self, pixels: np.ndarray, where: str) -> np.ndarray:
        """Return uint8 pixels [C,H,W] as the network takes them. Raises InputError where they need `resize`."""
        channels, height, width = self._shape
        if pixels.shape[0] == 1 and channels == 3:
            pixels = pixels.repeat(3, axis=0)
        if pixels.shape[0] == 3 and channels == 1:
            if not (pixels == pixels[:1]).all():
                raise InputError(f"{where}: a colour image, and the network takes grey ones; convert it first")
            pixels = pixels[:1]
        if pixels.shape[1:] == (height, width):
            return pixels
        if not self._resize:
            raise InputError(
                f"{where}: {pixels.shape[2]}x{pixels.shape[1]} pixels, and the network takes {width}x{height}; "
                "--resize crops the centre and resizes it"
            )
        side = min(pixels.shape[1:])
        top, left = ((size - side) // 2 for size in pixels.shape[1:])
        square = to_picture(pixels[:, top : top + side, left : left + side])
        return to_array(square.resize((width, height), Image.Resampling.LANCZOS))

    def labels(self) -> dict[str, int]:
        """Return the class of every image from the folder's dataset.json. Raises InputError where there are none."""
        labels = read_labels(self._source, list(self._files.values()))
        if labels is None or labels.ndim != 1:
            raise InputError(f"{self._source.path}: dataset.json gives no classes; name one with --class")
        return dict(zip(self.names, labels.tolist(), strict=True))


class MeasurementFolder:
    """Real measurements: .npz (array y) or .npy files of floats, or pictures that stand for [-1, 1]."""

    def __init__(
        self,
        path: str | os.PathLike,
        *,
        shape: tuple[int, ...],  # of one measurement [C,h,w]
        pictures: bool,  # whether pictures can be measurements
        num: int | None = None,
    ) -> None:
        """Raises InputError or DatasetError where there are no measurements or fewer than `num`."""
        self._source = FileSource(path)
        self._shape, kinds = tuple(shape), _ARRAY_EXTENSIONS
        files = [name for name in self._source.names if name.lower().endswith(kinds)]
        if not files and pictures:
            files = [name for name in self._source.names if is_image_name(name)]
        if not files:
            raise InputError(f"{path}: holds no measurements: .npz (array y), .npy" + (", images" if pictures else ""))
        if num is not None and num > len(files):
            raise InputError(f"{path}: holds {len(files)} measurements, fewer than the {num} asked for")
        self._files = name_files(files[:num], str(path))
        self.names = list(self._files)

    def read(self, name: str) -> Tensor:
        """Return one measurement [C,h,w], float32. Raises DatasetError or InputError."""
        file = self._files[name]
        where, data = self._source.where(file), self._source.read(file)
        if is_image_name(file):
            measurement = pixels_to_image(decode_pixels(data, where))
            if measurement.shape[0] == 1:
                measurement = measurement.expand(self._shape[0], -1, -1).clone()
        else:
            measurement = torch.from_numpy(_read_array(data, where, math.prod(self._shape)))
        if tuple(measurement.shape) != self._shape:
            raise InputError(
                f"{where}: a measurement of shape {list(measurement.shape)}, and the operator gives "
                f"{list(self._shape)} (channels, height, width)"
            )
        return measurement

    def check(self) -> None:
        """Read every measurement once. Raises DatasetError or InputError for the first that cannot be used."""
        for name in self.names:
            self.read(name)


def name_files(files: list[str], where: str) -> dict[str, str]:
    """Return {name: file}: a/b.png becomes a-b, and so do backslashes, colons and what cannot be printed.

    Raises InputError where two files would share a name, and for names that leave no room for an extension.
    """
    named: dict[str, str] = {}
    for file in files:
        name = re.sub(r"[/\\:]", "-", PurePosixPath(file).with_suffix("").as_posix())
        name = "".join(c if c.isprintable() else "-" for c in name)
        if len(name.encode()) > _MAX_NAME_BYTES:
            raise InputError(
                f"{where}: {name[:60]}... is too long a name: at most {_MAX_NAME_BYTES} bytes, with its folders"
            )
        if name in named:
            raise InputError(f"{where}: {file} and {named[name]} would both be called {name}; rename one")
        named[name] = file
    return named


def upright(pixels: np.ndarray, data: bytes) -> np.ndarray:
    """Return the pixels [C,H,W] of an image file turned as its EXIF tag says, as viewers show them."""
    try:
        with Image.open(io.BytesIO(data), formats=("JPEG", "PNG", "WEBP")) as picture:  # Pillow turns TIFF itself
            orientation = picture.getexif().get(_ORIENTATION)
    except Exception:  # another format, or a damaged tag
        orientation = None
    transposed, *flipped = _UPRIGHT.get(orientation, (False, False, False))
    pixels = pixels.transpose(0, 2, 1) if transposed else pixels
    return np.ascontiguousarray(np.flip(pixels, tuple(axis for axis, flip in enumerate(flipped, 1) if flip)))


def pixels_to_image(pixels: np.ndarray) -> Tensor:
    """Return uint8 pixels as float32 in [-1, 1]: 0 is -1 and 255 is 1."""
    return torch.from_numpy(pixels.astype(np.float32)) / 127.5 - 1


def read_mask(path: str | os.PathLike) -> np.ndarray:
    """Return a mask [H,W] from an image file, float32: 1 where it is lighter than half, measured, else 0, removed."""
    try:
        data = read_regular(path, MAX_FILE_BYTES)
    except OSError as error:
        raise InputError(f"{path}: the mask cannot be read ({error.strerror})") from None
    return (decode_pixels(data, str(path)).mean(axis=0) > 127.5).astype(np.float32)


def _read_array(data: bytes, where: str, elements: int) -> np.ndarray:
    """The array of an .npy file, or array y of an .npz file. Raises InputError for anything larger than it can be."""
    most = 8 * elements + _MAX_HEADER_BYTES
    try:
        if zipfile.is_zipfile(io.BytesIO(data)):
            with zipfile.ZipFile(io.BytesIO(data)) as archive:
                if "y.npy" not in archive.namelist():
                    raise InputError(f"{where}: holds no array y")
                member = archive.getinfo("y.npy")
                if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                    raise InputError(f"{where}: array y is packed in a way that numpy does not use")
                if member.file_size > most:
                    raise InputError(f"{where}: array y is larger than a measurement of this operator")
                data = archive.read("y.npy")
        if len(data) > most:
            raise InputError(f"{where}: larger than a measurement of this operator")
        array = read_npy(io.BytesIO(data), most)
    except InputError:
        raise
    except Exception as error:  # damaged archives and headers raise many kinds
        raise InputError(f"{where}: not a readable array ({' '.join(str(error).split())[:100]})") from None
    kind = array.dtype.kind
    with np.errstate(over="ignore"):
        values = array.astype(np.float32) if kind in "fiu" else None
    if values is None or not np.isfinite(values).all():
        raise InputError(f"{where}: a measurement holds finite real numbers, this array of {array.dtype} does not")
    return values
