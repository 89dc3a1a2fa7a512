"""Files that are written whole or not at all, and hashes. Imports no third-party package: scripts start fast."""

import errno
import hashlib
import json
import math
import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, BinaryIO

_CHUNK = 1 << 20  # bytes read for hashing at a time


@contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yields an empty temporary file beside `path` that becomes `path` when the block ends without an error.

    The folder is created if missing. The content is flushed to the disk before the rename, so after a crash `path`
    holds either the old or the new content, entire. On an error the temporary file is removed and `path` untouched; an
    OSError of the temporary file, or of no named one, names `path`.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name[:100]}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        temporary.open("xb").close()
        mode = temporary.stat().st_mode
        yield temporary
        os.chmod(temporary, mode)  # some writers leave a file that only its owner can read
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        if error.errno is None or error.filename not in (None, str(temporary)):
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_write(path: str | os.PathLike[str], mode: str = "wb", **open_kwargs: Any) -> Iterator[IO[Any]]:
    """Opens a file for writing that replaces `path` when the block ends without an error (see `atomic_path`).

    `mode` is "wb" or "w"; further keyword arguments go to `open`. Raises ValueError for any other mode.
    """
    if mode not in ("w", "wb"):
        raise ValueError(f"atomic_write: mode must be 'w' or 'wb', not {mode!r}")
    with atomic_path(path) as temporary:
        with open(temporary, mode, **open_kwargs) as file:
            yield file


def write_json(path: str | os.PathLike[str], content: Any) -> None:
    """Write JSON data, infinities and NaN as null, into a folder that is made if need be; whole or not at all."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path, "w", encoding="utf-8") as file:
        json.dump(_finite(content), file, indent=1, allow_nan=False)
        file.write("\n")


def _finite(value: Any) -> Any:
    """JSON has no infinities: null instead."""
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def open_regular(path: str | os.PathLike[str]) -> BinaryIO:
    """Opens a regular file for reading in binary mode. Links are followed; nothing waits for the other end of a pipe.

    Raises OSError, with `strerror` and `filename`, where it cannot be opened and for pipes, devices and folders.
    """
    handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    try:
        mode = os.fstat(handle).st_mode
        if stat.S_ISDIR(mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), os.fspath(path))
        if not stat.S_ISREG(mode):
            raise OSError(errno.EINVAL, "not a regular file", os.fspath(path))
    except OSError:
        os.close(handle)
        raise
    return os.fdopen(handle, "rb")


def read_regular(path: str | os.PathLike[str], max_bytes: int) -> bytes:
    """Reads a regular file: as many bytes as it holds when it is opened, however it grows.

    Raises OSError as `open_regular`, and for files larger than `max_bytes`.
    """
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > max_bytes:
            reason = f"too large: {size} bytes, and at most {max_bytes} are read"
            raise OSError(errno.EFBIG, reason, os.fspath(path))
        return file.read(size)


def file_sha256(path: str | os.PathLike[str]) -> str:
    """SHA-256 of a regular file's content, as 64 lower-case hexadecimal digits. Raises OSError as `open_regular`."""
    digest = hashlib.sha256()
    with open_regular(path) as file:
        left = os.fstat(file.fileno()).st_size
        while chunk := file.read(min(left, _CHUNK)):
            digest.update(chunk)
            left -= len(chunk)
    return digest.hexdigest()
