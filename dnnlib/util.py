"""Number formatting, atomic files and a download cache. Imports no third-party package, so that scripts start fast."""

import hashlib
import os
import re
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

_SI_FACTORS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "ki": 2**10, "mi": 2**20, "gi": 2**30}
_CHUNK = 1 << 20  # bytes read from the network or for hashing at a time


class DownloadError(ValueError):
    """A file could not be fetched, or what was fetched is not the expected file."""


class EasyDict(dict):
    """Dictionary whose items are also attributes: `d.key` is `d["key"]`."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None

    def __setattr__(self, name: str, value: Any) -> None:
        self[name] = value

    def __delattr__(self, name: str) -> None:
        try:
            del self[name]
        except KeyError:
            raise AttributeError(name) from None


# ---------------------------------------------------------------------------------------------------------------------
# Numbers


def parse_si(text: str | int) -> int:
    """Parses an integer with an optional suffix: Ki, Mi, Gi are powers of 1024; K, M, G are powers of 1000.

    "64Mi" is 67108864, "0.5Ki" is 512, "2k" is 2000. Upper and lower case are the same.
    Raises ValueError for anything else, for negative numbers and for fractions that do not come out whole.
    """
    match = re.fullmatch(r"(\d{1,18}(?:\.(\d{1,18}))?)([kmg]i?)?", str(text).strip().lower())
    if match is None:
        raise ValueError(f"{text!r} is not a count: write a whole number such as 200, 16Ki, 64Mi or 2K")
    digits, fraction, suffix = match[1].replace(".", ""), match[2] or "", match[3] or ""
    value, rest = divmod(int(digits) * _SI_FACTORS[suffix], 10 ** len(fraction))
    if rest:
        raise ValueError(f"{text!r} is not a whole number")
    return value


def format_time(seconds: float) -> str:
    """Formats a duration with its two leading units: 42s, 3m 07s, 5h 02m, 2d 04h."""
    s = max(int(round(seconds)), 0)
    if s < 60:
        return f"{s}s"
    if s < 3600:
        return f"{s // 60}m {s % 60:02d}s"
    if s < 86400:
        return f"{s // 3600}h {s // 60 % 60:02d}m"
    return f"{s // 86400}d {s // 3600 % 24:02d}h"


def format_bytes(count: float) -> str:
    """Formats a number of bytes in powers of 1024: 512 B, 1.5 KiB, 2.3 GiB."""
    if abs(count) < 1024:
        return f"{int(count)} B"
    for unit in ("KiB", "MiB", "GiB"):
        count /= 1024
        if abs(count) < 1024:
            return f"{count:.1f} {unit}"
    return f"{count / 1024:.1f} TiB"


# ---------------------------------------------------------------------------------------------------------------------
# Atomic files


@contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yields an empty temporary file beside `path` that becomes `path` when the block ends without an error.

    The folder is created if missing. The content is flushed to the disk before the rename, so after a crash `path`
    holds either the old or the new content, entire. On an error the temporary file is removed and `path` untouched.
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


# ---------------------------------------------------------------------------------------------------------------------
# Downloads


def cache_folder(cache_dir: str | os.PathLike[str] | None = None) -> Path:
    """The download cache: `cache_dir`, else the environment variable NCVSD_CACHE, else ~/.cache/ncvsd."""
    return Path(cache_dir or os.environ.get("NCVSD_CACHE") or Path.home() / ".cache" / "ncvsd").expanduser()


def open_url(
    url_or_path: str | os.PathLike[str],
    cache_dir: str | os.PathLike[str] | None = None,
    sha256: str | None = None,
    quiet: bool = False,
    *,
    attempts: int = 5,  # tries in a row that bring no new byte before giving up
    timeout: float = 30.0,  # seconds without an answer before a try counts as failed
    backoff: float = 1.0,  # seconds before the second try, doubled for each further one
) -> Path:
    """Returns a local path for a local file or an http(s) URL, downloading into the cache when needed.

    A download goes to a `.part` file, is resumed where it stopped (also by a later call), is compared with `sha256`
    (64 hexadecimal digits) where given, and only then gets its name in the cache. A file with the wrong hash is removed
    if it came from the network. Raises DownloadError (a ValueError) with one line that says what to do.
    """
    text = os.fspath(url_or_path)
    if sha256 is not None and not re.fullmatch(r"[0-9a-fA-F]{64}", sha256):
        raise DownloadError(f"sha256 must be 64 hexadecimal digits, not {sha256!r}")
    if "://" not in text:
        path = Path(text)
        if not path.is_file():
            raise DownloadError(f"{text}: no such file")
        if sha256 is not None and file_sha256(path) != sha256.lower():
            raise DownloadError(f"{text}: the SHA-256 differs from the expected {sha256}; this is another file")
        return path
    if not re.match(r"https?://[^/]", text, re.IGNORECASE):
        raise DownloadError(f"{text}: only http:// and https:// URLs can be downloaded")

    base = re.sub(r"[^\w.-]+", "_", text.split("?")[0].split("#")[0].rstrip("/").rsplit("/", 1)[-1])[-80:]
    target = cache_folder(cache_dir) / f"{hashlib.sha256(text.encode()).hexdigest()[:16]}-{base}"
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _lock(target.with_name(target.name + ".lock")):
            if target.is_file():
                if sha256 is None or file_sha256(target) == sha256.lower():
                    return target
                target.unlink()
            part = target.with_name(target.name + ".part")
            _download(text, part, quiet=quiet, attempts=attempts, timeout=timeout, backoff=backoff)
            if sha256 is not None and (found := file_sha256(part)) != sha256.lower():
                _discard(part)
                raise DownloadError(f"{text}: wrong SHA-256 {found}, expected {sha256}; the download was removed")
            os.replace(part, target)
            _discard(part)
    except OSError as error:
        raise DownloadError(f"{text}: cannot write to the cache {target.parent} ({error}); set NCVSD_CACHE") from error
    return target


def file_sha256(path: str | os.PathLike[str]) -> str:
    """SHA-256 of a file's content, as 64 lower-case hexadecimal digits."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Lets one process at a time into the block, where the platform has file locks."""
    try:
        import fcntl
    except ImportError:
        yield
        return
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _discard(part: Path) -> None:
    """Removes a partial download and the note of which version of the remote file it belongs to."""
    part.unlink(missing_ok=True)
    part.with_name(part.name + ".version").unlink(missing_ok=True)


def _download(url: str, part: Path, *, quiet: bool, attempts: int, timeout: float, backoff: float) -> None:
    """Fetches `url` into `part`, continuing what `part` already holds."""
    import http.client
    import ssl
    import urllib.error

    failures = 0
    while True:
        size_before = part.stat().st_size if part.exists() else 0
        reason, permanent = "", False
        try:
            if _fetch(url, part, quiet=quiet, timeout=timeout):
                return
            reason = "the connection was cut"
        except urllib.error.HTTPError as error:
            error.close()
            reason = f"the server answers {error.code} {error.reason}"
            permanent = 400 <= error.code < 500 and error.code not in (408, 416, 425, 429)
            if error.code == 416:  # what is here does not belong to the remote file: start over
                _discard(part)
        except urllib.error.URLError as error:
            reason = str(error.reason)
        except (http.client.HTTPException, ConnectionError, TimeoutError, ssl.SSLError) as error:
            reason = str(error) or type(error).__name__
        size_after = part.stat().st_size if part.exists() else 0
        failures = 0 if size_after > size_before else failures + 1
        if permanent or failures >= attempts:
            kept = " (the part received is kept and will be continued)" if size_after else ""
            raise DownloadError(f"{url}: download failed: {reason}{kept}")
        time.sleep(backoff * 2 ** max(failures - 1, 0))


def _fetch(url: str, part: Path, *, quiet: bool, timeout: float) -> bool:
    """One request. Returns whether `part` is now complete."""
    import urllib.error
    import urllib.request

    opener = urllib.request.OpenerDirector()  # without the handlers for file:, ftp: and data:, also after a redirect
    for handler in (
        urllib.request.ProxyHandler, urllib.request.HTTPHandler, urllib.request.HTTPSHandler,
        urllib.request.HTTPRedirectHandler, urllib.request.HTTPDefaultErrorHandler,
        urllib.request.HTTPErrorProcessor, urllib.request.UnknownHandler,
    ):  # fmt: skip
        opener.add_handler(handler())

    note = part.with_name(part.name + ".version")
    start = part.stat().st_size if part.exists() else 0
    headers = {"User-Agent": "ncvsd", "Accept-Encoding": "identity"}
    if start:
        headers["Range"] = f"bytes={start}-"
        if note.exists():
            headers["If-Range"] = note.read_text()
    try:
        response = opener.open(urllib.request.Request(url, headers=headers), timeout=timeout)
    except urllib.error.HTTPError as error:
        if error.code == 416 and error.headers.get("Content-Range", "").strip() == f"bytes */{start}":
            error.close()
            return True
        raise

    with response:
        content_range = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", response.headers.get("Content-Range", "").strip())
        if response.status == 206 and content_range and int(content_range[1]) == start:
            total = int(content_range[2]) if content_range[2] != "*" else None
        elif response.status == 200:  # the server sends all of it: it knows no ranges, or the file has changed
            start = 0
            length = response.headers.get("Content-Length", "")
            total = int(length) if length.isdigit() else None
            version = response.headers.get("ETag", "")
            if not version or version.startswith("W/"):
                version = response.headers.get("Last-Modified", "")
            note.write_text(version) if version else note.unlink(missing_ok=True)
        else:
            _discard(part)
            return False

        received = start
        with open(part, "ab" if start else "wb") as file, _progress(url, start, total, quiet) as advance:
            while chunk := response.read(_CHUNK):
                file.write(chunk)
                received += len(chunk)
                advance(len(chunk))
    if total is not None and received > total:
        _discard(part)
        return False
    return total is None or received == total


@contextmanager
def _progress(url: str, start: int, total: int | None, quiet: bool) -> Iterator[Any]:
    """Yields a function to call with each number of bytes received."""
    if quiet:
        yield lambda count: None
        return
    from tqdm import tqdm

    with tqdm(
        total=total, initial=start, unit="B", unit_scale=True, unit_divisor=1024, desc=url.rsplit("/", 1)[-1][:40]
    ) as bar:
        yield bar.update
