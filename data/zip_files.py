"""ZIP archives of a million small files, read by many processes."""

from __future__ import annotations

import bisect
import io
import os
import zipfile
import zlib
from collections.abc import Callable
from typing import Any, BinaryIO

import numpy as np

from dnnlib.files import open_regular

_MAX_READ = 1 << 30  # bytes at a time; the directory of ImageNet-21k takes as many
_LOCAL_HEADER = 30  # bytes before the name
_ROW = np.dtype([("offset", "u8"), ("packed", "u8"), ("size", "u8"), ("crc", "u4"), ("method", "u2"), ("flags", "u2")])
_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)


class ZipReader(io.BufferedReader):
    """An archive for zipfile, which reads its directory at once, whatever size that claims."""

    def read(self, size: int | None = -1) -> bytes:
        if size is not None and size > _MAX_READ:
            raise zipfile.BadZipFile(f"its directory or a file in it claims {size:,} bytes")
        return super().read(size)


class ZipMembers:
    """Files of an archive by name: its directory is read once, and kept in some 100 bytes for each.

    Python's own takes half a kilobyte per file, and each process would read it anew. Safe across processes: the archive
    is opened on first use in each.

    Raises what zipfile does where the archive cannot be used.
    """

    def __init__(self, path: str, keep: Callable[[str], bool]) -> None:
        with ZipReader(open_regular(path).detach()) as file, zipfile.ZipFile(file) as archive:
            infos = {i.filename: i for i in archive.infolist() if not i.is_dir() and keep(i.filename)}
        self.path = path
        self.names = sorted(infos)
        rows = (
            (i.header_offset, i.compress_size, i.file_size, i.CRC, i.compress_type, i.flag_bits)
            for i in map(infos.__getitem__, self.names)
        )
        try:
            self._rows = np.fromiter(rows, dtype=_ROW, count=len(self.names))
        except OverflowError:
            raise zipfile.BadZipFile("a file begins before the archive") from None
        del infos, archive, rows  # with new names the memory of the old ones, and of what lay between, goes back
        self.names = "\0".join(self.names).split("\0") if self.names else []
        self._file: BinaryIO | None = None
        self._pid = -1

    def signature(self, name: str) -> tuple[int, int]:
        """Size in bytes and CRC."""
        row = self._row(name)
        return int(row["size"]), int(row["crc"])

    def readable(self, name: str) -> bool:
        """Whether a file is stored or deflated, and not encrypted."""
        row = self._row(name)
        return row["method"] in _METHODS and not row["flags"] & 1

    def read(self, name: str) -> bytes:
        """Content of a readable file, never more than its stated size, whatever it unpacks to.

        Raises BadZipFile, EOFError or zlib.error for a damaged one.
        """
        row = self._row(name)
        packed, size = int(row["packed"]), int(row["size"])
        stored = row["method"] == zipfile.ZIP_STORED
        if packed != size if stored else packed > 2 * size + 4096:
            raise zipfile.BadZipFile("its sizes contradict one another")
        file = self._open()
        file.seek(int(row["offset"]))
        header = file.read(_LOCAL_HEADER)
        if len(header) < _LOCAL_HEADER or header[:4] != b"PK\x03\x04":
            raise zipfile.BadZipFile("no file begins at its place")
        skipped = int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
        file.seek(skipped, os.SEEK_CUR)
        data = file.read(packed)
        if not stored and size:
            data = zlib.decompressobj(-zlib.MAX_WBITS).decompress(data, size)
        if len(data) < size:
            raise EOFError("the archive ends early")
        if zlib.crc32(data[:size]) != row["crc"]:
            raise zipfile.BadZipFile("Bad CRC-32")
        return data[:size]

    def close(self) -> None:
        """Close the archive in this process, until it is used again."""
        if self._file is not None and self._pid == os.getpid():
            self._file.close()
        self._file = None

    def _open(self) -> BinaryIO:
        if self._file is None or self._pid != os.getpid():  # a forked child must not share the file's position
            self._file, self._pid = open_regular(self.path), os.getpid()
        return self._file

    def _row(self, name: str) -> Any:
        i = bisect.bisect_left(self.names, name)
        if i == len(self.names) or self.names[i] != name:
            raise KeyError(f"there is no {name}")
        return self._rows[i]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_file": None, "_pid": -1}
