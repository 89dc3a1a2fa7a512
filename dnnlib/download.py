"""Downloads into a cache. Imports no third-party package before the first one, so that scripts start fast."""

import hashlib
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dnnlib.files import file_sha256
from dnnlib.text import format_bytes, printable

_CHUNK = 1 << 20  # bytes read from the network at a time


class DownloadError(ValueError):
    """A file could not be fetched, or what was fetched is not the expected file."""


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
