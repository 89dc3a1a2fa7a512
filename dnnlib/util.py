"""Number formatting, atomic files and a download cache. Imports no third-party package, so that scripts start fast."""

import hashlib
import json
import math
import os
import re
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
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


def parse_duration(text: str) -> float:
    """Parses a length of time into seconds: "11h30m", "90m", "2d", "1h 5m 30s", or a number of seconds.

    Raises ValueError for anything else.
    """
    compact = re.sub(r"\s+", "", str(text).lower())
    units = {"d": 86400, "h": 3600, "m": 60, "s": 1}
    number = r"\d{1,9}(?:\.\d{1,9})?"
    if re.fullmatch(number, compact):
        return float(compact)
    if not compact or not re.fullmatch("".join(f"(?:{number}{unit})?" for unit in units), compact):
        raise ValueError(f"{text!r} is not a length of time: write days, hours, minutes and seconds, as in 11h30m")
    return sum(float(value) * units[unit] for value, unit in re.findall(f"({number})([dhms])", compact))


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


# ---------------------------------------------------------------------------------------------------------------------
# Downloads


def cache_folder(cache_dir: str | os.PathLike[str] | None = None) -> Path:
    """The download cache: `cache_dir`, else the environment variable NCVSD_CACHE, else ~/.cache/ncvsd."""
    return Path(cache_dir or os.environ.get("NCVSD_CACHE") or Path.home() / ".cache" / "ncvsd").expanduser()


def cache_path(url: str, cache_dir: str | os.PathLike[str] | None = None) -> Path:
    """Where `open_url` keeps what it downloads from `url`."""
    base = re.sub(r"[^\w.-]+", "_", url.split("?")[0].split("#")[0].rstrip("/").rsplit("/", 1)[-1])[-80:]
    return cache_folder(cache_dir) / f"{hashlib.sha256(url.encode()).hexdigest()[:16]}-{base}"


def open_url(
    url_or_path: str | os.PathLike[str],
    cache_dir: str | os.PathLike[str] | None = None,
    sha256: str | None = None,
    quiet: bool = False,
    *,
    attempts: int = 5,  # tries in a row that bring no new byte before giving up
    timeout: float = 30.0,  # seconds without an answer before a try counts as failed
    backoff: float = 1.0,  # seconds before the second try, doubled for each further one
    max_bytes: int = 64 << 30,  # larger files are refused
) -> Path:
    """Returns a local path for a local file or an http(s) URL, downloading into the cache when needed.

    A download goes to a `.part` file, is resumed where it stopped (also by a later call) if the server says which
    version of the file it sends, is compared with `sha256` (64 hexadecimal digits) where given, and only then gets its
    name in the cache. A file with the wrong hash is removed if it came from the network; one whose length the server
    does not tell is refused without a hash, since nothing would show that it was cut off. Raises DownloadError (a
    ValueError) with one line that says what to do.
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
        raise DownloadError(f"{printable(text)}: only http:// and https:// URLs can be downloaded")
    if not re.fullmatch(r"[!-~]+", text):
        raise DownloadError(f"{printable(text)}: a URL is printable ASCII; write other characters as %XX")

    target = cache_path(text, cache_dir)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _lock(target.with_name(target.name + ".lock")):
            if target.is_file():
                if sha256 is None or file_sha256(target) == sha256.lower():
                    return target
                target.unlink()
            part = target.with_name(target.name + ".part")
            request = _Request(text, part, sha256 is not None, quiet, timeout, max_bytes)
            _download(request, attempts=attempts, backoff=backoff)
            if sha256 is not None and (found := file_sha256(part)) != sha256.lower():
                _discard(part)
                raise DownloadError(f"{text}: wrong SHA-256 {found}, expected {sha256}; the download was removed")
            os.replace(part, target)
            _discard(part)
    except OSError as error:
        place, advice = (target.parent, "") if cache_dir else (f"the cache {target.parent}", "; set NCVSD_CACHE")
        reason = f"cannot write to {place} ({printable(error)}){advice}"
        raise DownloadError(f"{text}: {reason}") from error
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


def printable(text: object) -> str:
    """One line of at most 300 characters that a terminal can show."""
    return "".join(c if c.isprintable() else " " for c in str(text))[:300].strip()


@dataclass(frozen=True)
class _Request:
    url: str
    part: Path  # where the content goes; continued if it exists and the file is still the same
    hash_known: bool  # whether a file cut off unnoticed will be noticed later
    quiet: bool
    timeout: float
    max_bytes: int

    @property
    def note(self) -> Path:
        """Holds the server's name for the version that `part` belongs to."""
        return self.part.with_name(self.part.name + ".version")


def _download(request: _Request, *, attempts: int, backoff: float) -> None:
    """Fetches the file, trying again where that can help."""
    import http.client
    import ssl
    import urllib.error

    part, failures = request.part, 0
    while True:
        size_before = part.stat().st_size if part.exists() else 0
        reason, permanent = "", False
        try:
            if _fetch(request):
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
        except DownloadError:
            raise
        except ValueError as error:  # UnicodeError among others, from addresses and headers that make no sense
            reason, permanent = f"the address or the answer is not valid ({error})", True
        size_after = part.stat().st_size if part.exists() else 0
        failures = 0 if size_after > size_before else failures + 1
        if permanent or failures >= attempts:
            kept = " (the part received is kept and will be continued)" if size_after and request.note.exists() else ""
            raise DownloadError(f"{request.url}: download failed: {printable(reason)}{kept}")
        time.sleep(backoff * 2 ** max(failures - 1, 0))


def _version(headers: Any) -> str:
    """What tells this version of a file from others: a strong ETag or a date; empty if there is neither."""
    version = headers.get("ETag", "")
    if not version or version.startswith("W/"):
        version = headers.get("Last-Modified", "")
    return version if re.fullmatch(r"[ -~]{1,200}", version) else ""


def _fetch(request: _Request) -> bool:
    """One request. Returns whether the file is now complete."""
    import urllib.error
    import urllib.request

    from dnnlib.remote import http_opener

    part, note = request.part, request.note
    if not note.exists():
        part.unlink(missing_ok=True)
    start = part.stat().st_size if part.exists() else 0
    headers = {"User-Agent": "ncvsd", "Accept-Encoding": "identity"}
    if start:
        headers |= {"Range": f"bytes={start}-", "If-Range": note.read_text()}
    try:
        response = http_opener().open(urllib.request.Request(request.url, headers=headers), timeout=request.timeout)
    except urllib.error.HTTPError as error:
        if error.code == 416 and error.headers.get("Content-Range", "").strip() == f"bytes */{start}":
            error.close()
            return True
        raise

    with response:
        number, version = r"([0-9]{1,18})", _version(response.headers)
        content_range = re.fullmatch(f"bytes {number}-{number}/{number}", response.headers.get("Content-Range", ""))
        if response.status == 206 and content_range and int(content_range[1]) == start > 0:
            total = int(content_range[3])
            if version and version != note.read_text():
                _discard(part)
                return False
        elif response.status == 200:  # the server sends all of it: it knows no ranges, or the file has changed
            start = 0
            length = re.fullmatch(number, response.headers.get("Content-Length", ""))
            total = int(length[1]) if length else None
            if total is None and not (response.chunked or request.hash_known):  # the end of chunks is marked
                raise DownloadError(
                    f"{request.url}: the server does not say how long the file is, so that a cut would go unnoticed: "
                    "give its SHA-256 (URL#sha256=HEX for a network)"
                )
            note.write_text(version) if version else note.unlink(missing_ok=True)
        else:
            _discard(part)
            return False

        received = start
        with open(part, "ab" if start else "wb") as file, _progress(request, start, total) as advance:
            while max(total or 0, received) <= request.max_bytes and (chunk := response.read(_CHUNK)):
                file.write(chunk)
                received += len(chunk)
                advance(len(chunk))
    if max(total or 0, received) > request.max_bytes:
        _discard(part)
        raise DownloadError(f"{request.url}: larger than the limit of {format_bytes(request.max_bytes)}")
    if total is not None and received > total:
        _discard(part)
        return False
    return total is None or received == total


@contextmanager
def _progress(request: _Request, start: int, total: int | None) -> Iterator[Any]:
    """Yields a function to call with each number of bytes received."""
    if request.quiet:
        yield lambda count: None
        return
    from tqdm import tqdm

    name = request.url.rsplit("/", 1)[-1][:40]
    with tqdm(total=total, initial=start, unit="B", unit_scale=True, unit_divisor=1024, desc=name) as bar:
        yield bar.update
