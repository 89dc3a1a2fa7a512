"""Reading the files of an EDM2 data set: folders and ZIP archives, images, NPY latents, and `dataset.json`. Nothing
that a data set contains is ever executed: NPY headers are checked and read without pickling, labels are JSON.
"""

import bisect
import io
import json
import math
import os
import struct
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from data.pictures import to_array
from dnnlib.files import open_regular, parse_json, read_regular
from dnnlib.text import first_line

IMAGE_EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
_PILLOW_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")  # whatever the name: none starts a program
MAX_PIXELS = (1 << 30) // 12  # of one image, as many as Pillow takes without a warning
MAX_FILE_BYTES = 4 * MAX_PIXELS  # of one image; anything larger is a mistake or a bomb
_MAX_READ = 1 << 30  # bytes of an archive at a time; the directory of ImageNet-21k takes as many
_KEPT = ("header_offset", "compress_size", "file_size", "CRC", "compress_type", "flag_bits")  # of a zipfile.ZipInfo
_ROW = np.dtype(list(zip(_KEPT, ("u8", "u8", "u8", "u4", "u2", "u2"), strict=True)))
_LABEL_BYTES = 4096  # dataset.json may hold so many per image, and 1 MiB besides
_MAX_CLASSES = 1_000_000


class DatasetError(ValueError):
    """A data set cannot be used; the message is one line that names the file."""


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() else "?" for c in text)


def _reason(error: BaseException) -> str:
    """What an exception says, in one short line."""
    return _printable(first_line(getattr(error, "strerror", None) or error)[:120])


class ZipReader(io.BufferedReader):
    """An archive for zipfile, which reads its directory at once, whatever size that claims."""

    def read(self, size: int | None = -1) -> bytes:
        if size is not None and size > _MAX_READ:
            raise zipfile.BadZipFile(f"its directory or a file in it claims {size:,} bytes")
        return super().read(size)


class ZipMembers:
    """Files of an archive by name: its directory is read once, and kept in some 100 bytes for each, where Python's own
    takes half a kilobyte, in each process. The archive is opened on first use in each. Raises what zipfile does.
    """

    def __init__(self, path: str, keep: Callable[[str], bool]) -> None:
        with ZipReader(open_regular(path).detach()) as file, zipfile.ZipFile(file) as archive:
            infos = {i.filename: i for i in archive.infolist() if not i.is_dir() and keep(i.filename)}
        self.path = path
        self.names = sorted(infos)
        rows = (tuple(getattr(infos[name], key) for key in _KEPT) for name in self.names)
        try:
            self._rows = np.fromiter(rows, dtype=_ROW, count=len(self.names))
        except OverflowError:
            raise zipfile.BadZipFile("a file begins before the archive") from None
        del infos, archive, rows  # with new names the memory of the old ones, and of what lay between, goes back
        self.names = "\0".join(self.names).split("\0") if self.names else []
        self._file, self._pid = None, -1

    def signature(self, name: str) -> tuple[int, int]:
        """Size in bytes and CRC."""
        row = self._row(name)
        return int(row["file_size"]), int(row["CRC"])

    def readable(self, name: str) -> bool:
        """Whether a file is stored or deflated, and not encrypted."""
        row = self._row(name)
        return row["compress_type"] in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) and not row["flag_bits"] & 1

    def read(self, name: str) -> bytes:
        """Content of a readable file, of its stated size. Raises BadZipFile, EOFError or zlib.error for others."""
        start, packed, size, crc, method, _ = self._row(name).tolist()
        stored = method == zipfile.ZIP_STORED
        if packed != size if stored else packed > 2 * size + 4096:
            raise zipfile.BadZipFile("its sizes contradict one another")
        if self._file is None or self._pid != os.getpid():  # a forked child must not share the file's position
            self._file, self._pid = open_regular(self.path), os.getpid()
        file = self._file
        file.seek(start)
        header = file.read(30)  # what stands before the name
        if len(header) < 30 or header[:4] != b"PK\x03\x04":
            raise zipfile.BadZipFile("no file begins at its place")
        file.seek(sum(struct.unpack("<2H", header[26:])), os.SEEK_CUR)
        data = file.read(packed)
        if not stored and size:
            data = zlib.decompressobj(-zlib.MAX_WBITS).decompress(data, size)
        if len(data) < size:
            raise EOFError("the archive ends early")
        if zlib.crc32(data[:size]) != crc:
            raise zipfile.BadZipFile("Bad CRC-32")
        return data[:size]

    def _row(self, name: str) -> Any:
        i = bisect.bisect_left(self.names, name)
        if i == len(self.names) or self.names[i] != name:
            raise KeyError(f"there is no {name}")
        return self._rows[i]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_file": None, "_pid": -1}


class FileSource:
    """Read-only view of the files in a folder (recursively) or a ZIP archive; safe across processes. Names are
    relative, with forward slashes, sorted. Hidden files and macOS resource forks are left out. Raises `DatasetError`
    where the path is missing or is not a folder or ZIP archive.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = os.fspath(path)
        self.is_zip = not os.path.isdir(self.path)
        try:
            self._zip = ZipMembers(self.path, keep=lambda name: not _is_hidden(name)) if self.is_zip else None
        except FileNotFoundError:
            shown = self.path or "''"
            raise DatasetError(f"{shown}: no such folder or ZIP file; check the path of the data set") from None
        except (zipfile.BadZipFile, OSError, RuntimeError, ValueError, MemoryError, struct.error) as error:
            raise DatasetError(f"{self.path}: not a readable ZIP archive or folder ({_reason(error)})") from None
        self.names = sorted(self._walk()) if self._zip is None else self._zip.names

    def _walk(self) -> Iterator[str]:
        for folder, subfolders, files in os.walk(self.path):
            subfolders[:] = [s for s in subfolders if not _is_hidden(s)]
            relative = os.path.relpath(folder, self.path).replace(os.sep, "/") + "/"
            yield from (f"{relative}{name}".removeprefix("./") for name in files if not _is_hidden(name))

    def where(self, name: str) -> str:
        """The name to show in messages, such as `faces.zip:00000/img00000000.png`."""
        return _printable(f"{self.path}:{name}" if self.is_zip else os.path.join(self.path, name))

    def signature(self, name: str) -> tuple[int, ...]:
        """Size in bytes, and the CRC where the archive's directory has it."""
        return self._zip.signature(name) if self._zip else (os.stat(os.path.join(self.path, name)).st_size,)

    def read(self, name: str, max_bytes: int = MAX_FILE_BYTES) -> bytes:
        """Content of one file. Raises `DatasetError` where it cannot be read, is damaged, or exceeds `max_bytes`."""
        try:
            if self._zip is None:
                return read_regular(os.path.join(self.path, name), max_bytes)
            if (size := self.signature(name)[0]) > max_bytes:
                raise DatasetError(f"{self.where(name)}: {size:,} bytes where at most {max_bytes:,} make sense")
            if not self._zip.readable(name):
                raise DatasetError(f"{self.where(name)}: neither stored nor deflated; pack the archive again")
            return self._zip.read(name)
        except (OSError, EOFError, KeyError, RuntimeError, MemoryError, zipfile.BadZipFile, zlib.error) as error:
            raise DatasetError(f"{self.where(name)}: cannot be read ({_reason(error)})") from None


def _is_hidden(name: str) -> bool:
    return any(part.startswith(".") or part == "__MACOSX" for part in name.split("/") if part)


def is_image_name(name: str) -> bool:
    """Whether the extension is that of a pixel format."""
    return name.lower().endswith(IMAGE_EXTENSIONS)


def _check_shape(shape: list[int], expected: Sequence[int] | None, where: str) -> None:
    if expected is not None and shape != list(expected):
        first = f"{list(expected)} of the first image (channels, height, width)"
        raise DatasetError(f"{where}: shape {shape} differs from {first}; convert with dataset_tool.py")


def decode_pixels(data: bytes, where: str, expected: Sequence[int] | None = None) -> np.ndarray:
    """Decode an image file to uint8 [C,H,W] with C = 1 (grey) or 3 (RGB); palettes are expanded, alpha is dropped.
    Raises `DatasetError`, naming `where`, for damaged files, more than 8 bits per channel, and, before anything is
    decoded, more than MAX_PIXELS and another shape than `expected` [C,H,W].
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of damaged tags, and of many pixels, which the next lines refuse
            file = Image.open(io.BytesIO(data), formats=_PILLOW_FORMATS)
        with file:
            if file.width * file.height > MAX_PIXELS:
                raise Image.DecompressionBombError
            if file.mode.startswith(("I", "F")):
                raise DatasetError(f"{where}: {file.mode} pixels; convert the image to 8 bits per channel")
            mode = "L" if file.mode in ("1", "L", "LA", "La") else "RGB"
            _check_shape([1 if mode == "L" else 3, file.height, file.width], expected, where)
            # A palette by way of RGBA: a transparent entry keeps its colour.
            return to_array((file.convert("RGBA") if file.mode == "P" else file).convert(mode))
    except DatasetError:
        raise
    except Image.DecompressionBombError:
        raise DatasetError(f"{where}: more than {MAX_PIXELS:,} pixels, too many for an image") from None
    except UnidentifiedImageError:
        raise DatasetError(f"{where}: damaged or not an image") from None
    except Exception as error:  # Pillow's decoders raise many kinds for damaged data
        raise DatasetError(f"{where}: damaged image ({_reason(error)})") from None


def decode_latents(data: bytes, where: str, expected: Sequence[int] | None = None) -> np.ndarray:
    """Decode an NPY file to float32 [C,H,W]; float16 and float32 are accepted. Raises `DatasetError`, naming `where`,
    for damaged files, other dtypes, shapes (also than `expected`) and NaN.
    """
    stream = io.BytesIO(data)
    try:
        major, minor = np.lib.format.read_magic(stream)
        if (major, minor) not in ((1, 0), (2, 0)):
            raise ValueError(f"NPY version {major}.{minor}")
        read_header = np.lib.format.read_array_header_1_0 if major == 1 else np.lib.format.read_array_header_2_0
        shape, fortran_order, dtype = read_header(stream)
    except Exception as error:  # the header is a Python literal: SyntaxError, RecursionError, ... when damaged
        raise DatasetError(f"{where}: damaged or not an NPY file ({_reason(error)})") from None
    if dtype.kind != "f" or dtype.itemsize not in (2, 4):
        raise DatasetError(f"{where}: dtype {str(dtype)[:40]}; latents must be float16 or float32")
    if len(shape) != 3 or not all(type(n) is int and 1 <= n < 1 << 31 for n in shape):
        raise DatasetError(f"{where}: latents must have three dimensions [C,H,W], all at least 1")
    _check_shape(list(shape), expected, where)
    if len(data) - stream.tell() != math.prod(shape) * dtype.itemsize:
        raise DatasetError(f"{where}: damaged NPY file: its size does not fit shape {list(shape)}")
    flat = np.frombuffer(data, dtype=dtype, offset=stream.tell())
    try:
        array = flat.reshape(shape, order="F" if fortran_order else "C").astype(np.float32, order="C")
        finite = np.isfinite(array).all()
    except MemoryError:
        raise DatasetError(f"{where}: latents of shape {list(shape)} do not fit into memory") from None
    if not finite:
        raise DatasetError(f"{where}: holds NaN or infinite values")
    return array


def read_labels(source: FileSource, names: list[str]) -> np.ndarray | None:
    """Labels of `names` from the source's `dataset.json`: int64 [N] classes, float32 [N, D] vectors, or None. Raises
    `DatasetError` for invalid JSON, more than 4 KiB of it per image (and 1 MiB), files without a label, and labels that
    are neither a class index >= 0 nor a vector of numbers of one common length.
    """
    if "dataset.json" not in source.names:
        return None
    where, text = source.where("dataset.json"), source.read("dataset.json", (1 << 20) + _LABEL_BYTES * len(names))
    try:
        content = parse_json(text)
    except (ValueError, MemoryError) as error:
        raise DatasetError(f"{where}: not valid JSON ({_reason(error)})") from None
    entries = content.get("labels") if isinstance(content, dict) else 0
    if entries is not None and not isinstance(entries, list):
        raise DatasetError(f'{where}: must be {{"labels": [[name, label], ...]}} or {{"labels": null}}')
    if not entries:
        return None
    for number, entry in enumerate(entries):
        if not isinstance(entry, list) or len(entry) != 2 or not isinstance(entry[0], str):
            raise DatasetError(f"{where}: entry {number} of labels is not a pair [name, label]")
    by_name = {name.replace("\\", "/"): label for name, label in entries}
    if missing := [name for name in names if by_name.get(name) is None]:
        raise DatasetError(f"{where}: no label for {missing[0]} ({len(missing)} of {len(names)} files have none)")
    labels = [by_name[name] for name in names]
    size = len(labels[0]) if isinstance(labels[0], list) else None  # of a vector; None = class indices
    for name, label in zip(names, labels, strict=True):
        if size is None and (type(label) is not int or not 0 <= label < _MAX_CLASSES):
            reason = f"label {json.dumps(label)[:40]} of {name} is not a class index from 0 to {_MAX_CLASSES - 1}"
        elif size is not None and not (isinstance(label, list) and len(label) == size > 0):
            reason = f"label of {name} is not a vector of {size} numbers like the first"
        elif size is not None and not all(type(value) in (int, float) and abs(value) < 1e30 for value in label):
            reason = f"label of {name} holds something that is not a finite number"
        else:
            continue
        raise DatasetError(f"{where}: {reason}")
    return np.array(labels, dtype=np.int64 if size is None else np.float32)
