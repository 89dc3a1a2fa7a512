"""Files that are written whole or not at all, and hashes. Imports no third-party package: scripts start fast."""

import errno
import hashlib
import itertools
import json
import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import IO, Any, BinaryIO

from dnnlib.text import printable

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

PathLike = str | os.PathLike[str]

_BEGINNINGS = {".png": rb"\x89PNG", ".npz": b"PK", ".zip": b"PK", ".json": rb"\s*[{[]", ".safetensors": rb".{8}\{"}


def check_output(path: PathLike, suffix: str, reads: Iterable[PathLike | None] = ()) -> None:
    """Refuse, before any work is done, a file that could not be written at the end, does not end in `suffix`, or would
    destroy one that is of another kind or in `reads`, what the command reads. Raises ValueError.
    """
    try:
        reason = _reason_against(Path(path), suffix, reads)
    except OSError as error:
        reason = f"{error.strerror or error}: name another file"
    if reason is not None:
        raise ValueError(f"{printable(path) or 'the output'}: {reason}")


def _reason_against(path: Path, suffix: str, reads: Iterable[PathLike | None]) -> str | None:
    if path.is_dir() and path.name:
        return "is a folder: name a file"
    if not path.name.endswith(suffix) or path.name == suffix:
        return f"this is to be a {suffix} file: give a name that ends so"
    folder = next(parent for parent in path.absolute().parents if parent.exists())  # the rest will be made
    if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        return f"{folder} is no folder, or cannot be written to: name another place"
    with suppress(FileNotFoundError):
        path.lstat()
        if any(other is not None and os.path.exists(other) and os.path.samefile(path, other) for other in reads):
            return "is read by this command: name another file for the output"
        with open(path, "rb") if path.is_file() else nullcontext() as file:
            head = file.read(64) if file else b"none"  # an empty one may become anything
        if head and not re.match(_BEGINNINGS[suffix], head, re.DOTALL):
            return f"exists and is no {suffix} file: name another one, or remove it"
        if path.name == "dataset.json":
            return "has the name of a data set's labels: name another file"
    return None


@contextmanager
def atomic_path(path: PathLike) -> Iterator[Path]:
    """Yields an empty temporary file beside `path`, in a folder made if need be, that becomes `path` when the block
    ends without an error: flushed to the disk before the rename, so that after a crash `path` holds the old or the new
    content, entire. On an error it is removed; an OSError of the temporary file, or of no named one, names `path`.
    """
    with temporary_beside(path) as temporary:
        try:
            mode = temporary.stat().st_mode
            yield temporary
            os.chmod(temporary, mode)  # some writers leave a file that only its owner can read
            with open(temporary, "rb+") as file:
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException as error:
            discard(temporary)
            if isinstance(error, OSError) and error.errno is not None and error.filename in (None, str(temporary)):
                raise OSError(error.errno, error.strerror, str(path)) from error
            raise


@contextmanager
def temporary_beside(path: PathLike, folder: bool = False) -> Iterator[Path]:
    """An empty file or folder beside `path`, locked for as long as this process lives and the block lasts, which is to
    rename or remove it. One without a lock, which a killed process left, is taken, and others like it are removed; with
    a lock it is another process's, and the next name is tried. Where there are no locks, names are random.
    """
    path, random = Path(path), False
    make_folder(path.parent)
    name = f".{path.name[:50]}{{}}.{'dir' if folder else 'tmp'}"
    for number in itertools.count():
        middle = f".{secrets.token_hex(8)}" if random else f".{number}" if number else ""
        temporary = path.with_name(name.format(middle))
        try:
            temporary.mkdir(exist_ok=True) if folder else temporary.touch()
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(path)) from error
        with _lock(temporary) as locked:
            if locked or (locked is None and random):
                for entry in temporary.iterdir() if folder else ():
                    discard(entry)
                if not folder:
                    os.truncate(temporary, 0)
                for other in range(number + 1, number + 9) if locked else ():
                    with _lock(left := path.with_name(name.format(f".{other}"))) as unused:
                        if unused:
                            discard(left)
                yield temporary
                return
            if random := locked is None:
                discard(temporary)


@contextmanager
def _lock(path: Path) -> Iterator[bool | None]:
    """Yields True with the lock of a file or folder held, False where it is another's or gone, None without locks."""
    if fcntl is None:
        yield None
        return
    try:
        handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    except (FileNotFoundError, PermissionError):  # gone, or another user's
        yield False
        return
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        locked = os.path.samestat(os.fstat(handle), path.stat())
    except (BlockingIOError, FileNotFoundError):
        locked = False
    except OSError:
        locked = None
    try:
        yield locked
    finally:
        os.close(handle)


def make_folder(path: Path) -> None:
    """Make a folder, and those around it, unless it is there. Raises OSError; a file in its place is no folder."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(path)) from None


def discard(path: Path) -> None:
    """Remove a file, or a folder with what it holds, as far as that can be done."""
    with suppress(OSError):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def lock_folder(folder: PathLike) -> IO[bytes] | None:
    """Lock `.lock` in a folder until the file returned is closed; None where there are no locks: others are trusted.
    Raises ValueError where another process holds it.
    """
    if fcntl is None:
        return None
    file = os.fdopen(os.open(Path(folder) / ".lock", os.O_RDWR | os.O_CREAT, 0o666), "r+b", buffering=0)
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # of the process: loader processes do not inherit it
    except OSError as error:
        holder = file.read(200).decode(errors="replace").strip() or "unknown"
        file.close()
        if error.errno not in (errno.EACCES, errno.EAGAIN):
            return None
        advice = "stop it, or use another --outdir"
        raise ValueError(f"{folder} is in use by another run ({holder}): {advice}") from None
    with suppress(OSError):  # a full disk: the lock holds without a name
        file.truncate(0)
        file.write(f"process {os.getpid()} on {os.uname().nodename}\n".encode())
    return file


@contextmanager
def atomic_write(path: PathLike, mode: str = "wb", **open_kwargs: Any) -> Iterator[IO[Any]]:
    """Opens a file ("wb" or "w"; further arguments are `open`'s) that replaces `path`, see `atomic_path`."""
    if mode not in ("w", "wb"):
        raise ValueError(f"atomic_write: mode must be 'w' or 'wb', not {mode!r}")
    with atomic_path(path) as temporary, open(temporary, mode, **open_kwargs) as file:
        yield file


def parse_json(text: str | bytes) -> Any:
    """The data in a JSON text. Raises ValueError, with a reason in one line, for any other text and for too deep ones.
    Whole numbers of more than 20 digits, which would overflow wherever they are used, become floating-point ones.
    """
    try:
        return json.loads(text, parse_int=lambda digits: int(digits) if len(digits) <= 20 else float(digits))
    except RecursionError:
        raise ValueError("lists within lists, too deep") from None
    except UnicodeDecodeError:
        raise ValueError("no text in UTF-8") from None


def read_json(path: PathLike, max_bytes: int = 1 << 28) -> dict[str, Any]:
    """The JSON object in a file. Raises ValueError, in a line that names it, for others, OSError as `read_regular`."""
    try:
        content = parse_json(read_regular(path, max_bytes))
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: not a JSON object but a {type(content).__name__}")
    return content


def write_json(path: PathLike, content: Any) -> None:
    """Write JSON data, infinities and NaN as null, into a folder that is made if need be; whole or not at all."""
    finite = json.loads(json.dumps(content), parse_constant=lambda name: None)
    with atomic_write(path, "w", encoding="utf-8") as file:
        json.dump(finite, file, indent=1, allow_nan=False)
        file.write("\n")


def open_regular(path: PathLike) -> BinaryIO:
    """Opens a file "rb" without ever waiting. Raises OSError, with `filename`, for pipes, devices and folders too."""
    handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    if stat.S_ISREG(mode := os.fstat(handle).st_mode):
        return os.fdopen(handle, "rb")
    os.close(handle)
    folder = stat.S_ISDIR(mode)  # OSError makes an IsADirectoryError of that number
    number, reason = (errno.EISDIR, os.strerror(errno.EISDIR)) if folder else (errno.EINVAL, "not a regular file")
    raise OSError(number, reason, os.fspath(path))


def read_regular(path: PathLike, max_bytes: int) -> bytes:
    """A regular file's bytes when opened, however it grows. Raises OSError as `open_regular`, or beyond `max_bytes`."""
    with open_regular(path) as file:
        if (size := os.fstat(file.fileno()).st_size) > max_bytes:
            reason = f"too large: {size} bytes, and at most {max_bytes} are read"
            raise OSError(errno.EFBIG, reason, os.fspath(path))
        return file.read(size)


def file_sha256(path: PathLike) -> str:
    """SHA-256 of a regular file's content, as 64 lower-case hexadecimal digits. Raises OSError as `open_regular`."""
    digest = hashlib.sha256()
    with open_regular(path) as file:
        left = os.fstat(file.fileno()).st_size
        while chunk := file.read(min(left, 1 << 20)):
            digest.update(chunk)
            left -= len(chunk)
    return digest.hexdigest()
