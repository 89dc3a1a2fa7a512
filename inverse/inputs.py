"""What an inverse problem starts from: images to be measured, or real measurements, from a folder or a ZIP archive."""

import contextlib
import io
import math
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import PurePosixPath

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps
from torch import Tensor

from data.archives import MAX_FILE_BYTES, FileSource, decode_pixels, is_image_name, read_labels
from data.pictures import to_array, to_picture
from dnnlib.files import PathLike, read_regular
from dnnlib.npy import read_npy

_MAX_HEADER_BYTES = 4096
_MAX_NAME_BYTES = 200  # of an image, so that every file named after it fits a file system


class InputError(ValueError):
    """An image or a measurement cannot be used; the message is one line that names the file."""


class Inputs(ABC):
    """The first `num` files (None = all) of a folder or archive, in order of their names."""

    def __init__(self, path: PathLike, num: int | None, what: str, *kinds: Callable[[str], bool]) -> None:
        """`kinds` tell files by their names; only the first kind that there is counts."""
        self._source = FileSource(path)
        files = next(filter(None, ([name for name in self._source.names if kind(name)] for kind in kinds)), [])
        if not files:
            raise InputError(f"{path}: holds no {what}")
        if num is not None and num > len(files):
            raise InputError(f"{path}: holds {len(files)} {what.partition(':')[0]}, fewer than the {num} asked for")
        self._files = name_files(files[:num], str(path))
        self.names = list(self._files)

    @abstractmethod
    def read(self, name: str) -> Tensor:
        """Return one of them, float32 [C,h,w]. Raises DatasetError or InputError."""


class ImageFolder(Inputs):
    """Images of any format as [C,H,W] in [-1, 1]: `channels` 1 or 3, `resolution` pixels high and wide. `resize` crops
    the centre of other sizes and resizes it; without it they are an error. Raises InputError or DatasetError where
    there are no images or fewer than `num`.
    """

    def __init__(
        self, path: PathLike, *, resolution: int, channels: int, resize: bool = False, num: int | None = None
    ) -> None:
        super().__init__(path, num, "images", is_image_name)
        self._channels, self._size, self._resize = channels, resolution, resize

    def read(self, name: str) -> Tensor:
        where, data = self._source.where(self._files[name]), self._source.read(self._files[name])
        pixels = upright(decode_pixels(data, where), data)
        if len(pixels) == 1 and self._channels == 3:
            pixels = pixels.repeat(3, axis=0)
        if len(pixels) == 3 and self._channels == 1:
            if not (pixels == pixels[:1]).all():
                raise InputError(f"{where}: a colour image, and the network takes grey ones; convert it first")
            pixels = pixels[:1]
        (height, width), size = pixels.shape[1:], self._size
        if not height == width == size:
            if not self._resize:
                found = f"{width}x{height} pixels, and the network takes {size}x{size}"
                raise InputError(f"{where}: {found}; --resize crops the centre and resizes it")
            side = min(height, width)
            left, top = (width - side) // 2, (height - side) // 2
            square = to_picture(pixels).crop((left, top, left + side, top + side))
            pixels = to_array(square.resize((size, size), Image.Resampling.LANCZOS))
        return pixels_to_image(pixels)

    def labels(self) -> dict[str, int]:
        """Return the class of every image from the folder's dataset.json. Raises InputError where there are none."""
        labels = read_labels(self._source, list(self._files.values()))
        if labels is None or labels.ndim != 1:
            raise InputError(f"{self._source.path}: dataset.json gives no classes; name one with --class")
        return dict(zip(self.names, labels.tolist(), strict=True))


class MeasurementFolder(Inputs):
    """Real measurements of `shape` [C,h,w]: .npz (array y) or .npy files, or, if there are none and `pictures` can be
    measurements, images that stand for [-1, 1]. Raises InputError or DatasetError where there are no measurements or
    fewer than `num`.
    """

    def __init__(self, path: PathLike, *, shape: tuple[int, ...], pictures: bool, num: int | None = None) -> None:
        self._shape = tuple(shape)
        what = "measurements: .npz (array y), .npy" + ", images" * pictures
        super().__init__(path, num, what, lambda n: n.lower().endswith((".npz", ".npy")), *[is_image_name] * pictures)

    def read(self, name: str) -> Tensor:
        file = self._files[name]
        where, data = self._source.where(file), self._source.read(file)
        if is_image_name(file):
            found = pixels_to_image(decode_pixels(data, where))
            found = found.expand(self._shape[0], -1, -1).clone() if len(found) == 1 else found
        else:
            found = torch.from_numpy(_read_array(data, where, math.prod(self._shape)))
        if tuple(found.shape) != self._shape:
            wanted = f"{list(self._shape)} (channels, height, width)"
            raise InputError(f"{where}: a measurement of shape {list(found.shape)}, and the operator gives {wanted}")
        return found


def name_files(files: list[str], where: str) -> dict[str, str]:
    """Return {name: file}: a/b.png becomes a-b, and so do backslashes, colons and what cannot be printed. Raises
    InputError where two files would share a name, and for names that leave no room for an extension.
    """
    named: dict[str, str] = {}
    for file in files:
        stem = PurePosixPath(file).with_suffix("").as_posix()
        name = "".join(c if c.isprintable() and c not in "/\\:" else "-" for c in stem)
        if len(name.encode()) > _MAX_NAME_BYTES:
            most = f"at most {_MAX_NAME_BYTES} bytes, with its folders"
            raise InputError(f"{where}: {name[:60]}... is too long a name: {most}")
        if name in named:
            both = f"{file} and {named[name]}".encode(errors="replace").decode()  # names that are not UTF-8
            raise InputError(f"{where}: {both} would both be called {name}; rename one")
        named[name] = file
    return named


def upright(pixels: np.ndarray, data: bytes) -> np.ndarray:
    """Return the pixels [C,H,W] of an image file turned as its EXIF tag says, as viewers show them."""
    picture = to_picture(pixels)
    with contextlib.suppress(Exception):  # another format, no tag, or a damaged one
        with Image.open(io.BytesIO(data), formats=("JPEG", "PNG", "WEBP")) as file:  # Pillow turns TIFF itself
            picture.getexif()[ExifTags.Base.Orientation] = file.getexif()[ExifTags.Base.Orientation]
        picture = ImageOps.exif_transpose(picture)
    return to_array(picture)


def pixels_to_image(pixels: np.ndarray) -> Tensor:
    """Return uint8 pixels as float32 in [-1, 1]: 0 is -1 and 255 is 1."""
    return torch.from_numpy(pixels.astype(np.float32)) / 127.5 - 1


def read_mask(path: PathLike) -> np.ndarray:
    """Return a mask [H,W] from an image file, float32: 1 where it is lighter than half, measured, else 0, removed."""
    try:
        data = read_regular(path, MAX_FILE_BYTES)
    except OSError as error:
        raise InputError(f"{str(path) or 'no name'}: the mask cannot be read ({error.strerror})") from None
    return (decode_pixels(data, str(path)).mean(axis=0) > 127.5).astype(np.float32)


def _read_array(data: bytes, where: str, elements: int) -> np.ndarray:
    """The array of an .npy file, or array y of an .npz file. Raises InputError for anything larger than it can be."""
    most = 8 * elements + _MAX_HEADER_BYTES
    try:
        if zipfile.is_zipfile(io.BytesIO(data)):
            with zipfile.ZipFile(io.BytesIO(data)) as archive:
                if "y.npy" not in archive.namelist():
                    raise InputError(f"{where}: holds no array y")
                if archive.getinfo("y.npy").compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                    raise InputError(f"{where}: array y is packed in a way that numpy does not use")
                data = archive.open("y.npy").read(most + 1)
        if len(data) > most:
            raise InputError(f"{where}: larger than a measurement of this operator")
        array = read_npy(io.BytesIO(data), most)
    except InputError:
        raise
    except Exception as error:  # damaged archives and headers raise many kinds
        raise InputError(f"{where}: not a readable array ({' '.join(str(error).split())[:100]})") from None
    with np.errstate(over="ignore"):
        values = array.astype(np.float32) if array.dtype.kind in "fiu" else None
    if values is None or not np.isfinite(values).all():
        raise InputError(f"{where}: a measurement holds finite real numbers, this array of {array.dtype} does not")
    return values
