"""Downloads: continued, checked, cached. `requests` is imported with the first one, so that scripts start fast."""

import hashlib
import os
import re
import threading
import time
from collections.abc import Callable, Iterator
from concurrent import futures
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from dnnlib.files import PathLike, fcntl, file_sha256
from dnnlib.text import format_bytes, format_time, printable, redact

_CHUNK = 1 << 18  # bytes read from the network at a time, at most
_NUMBER, _VERSION = "([0-9]{1,18})", "[ -~]{1,200}"
_HTML = rb"(\xef\xbb\xbf)?\s*(<!--.*?-->\s*)?(<!doctype html|<(html|head|body|title|meta|script)[\s>])"
_PAGE = "a web page came in place of a file: log in to the network, or check the address"


class DownloadError(ValueError):
    """A file could not be fetched, or what was fetched is not the expected file."""


class _Failure(Exception):
    """A try that failed; whether another one would too."""

    def __init__(self, reason: str, permanent: bool = False) -> None:
        super().__init__(printable(reason))
        self.permanent = permanent


@dataclass(frozen=True)
class Limits:
    """When a download is given up."""

    attempts: int = 5  # tries in a row that bring less than `timeout` seconds bring at `min_rate`
    timeout: float = 30.0  # seconds without an answer before a try counts as failed
    min_rate: float = 1024.0  # bytes per second, mean over `timeout` seconds; a slower try counts as failed
    max_seconds: float = 86400.0  # for all tries together
    max_bytes: int = 64 << 30  # larger files are refused
    clock: Callable[[], float] = time.monotonic
    sleep: Callable[[float], None] = time.sleep


LIMITS = Limits()


def cache_path(url: str, cache_dir: PathLike | None = None) -> Path:
    """Where `open_url` keeps a URL: in `cache_dir`, else in the environment's NCVSD_CACHE, else in ~/.cache/ncvsd."""
    base = re.sub(r"[^\w.-]+", "_", redact(url).split("#")[0].rstrip("/").rsplit("/", 1)[-1])[-80:]
    folder = Path(cache_dir or os.environ.get("NCVSD_CACHE") or "~/.cache/ncvsd")
    try:
        return folder.expanduser() / f"{hashlib.sha256(url.encode()).hexdigest()[:16]}-{base}"
    except RuntimeError:
        raise DownloadError(f"{folder}: no home folder is known; set NCVSD_CACHE to a folder for downloads") from None


def open_url(
    url: PathLike,
    cache_dir: Path | None = None,
    sha256: str | None = None,
    quiet: bool = False,
    limits: Limits = LIMITS,
) -> Path:
    """Returns a local path for a local file or an http(s) URL, downloading into the cache when needed. A download goes
    to a `.part` file, is resumed where it stopped (also by a later call) if the server tells the file's version, and is
    compared with `sha256` where given. Without a hash, web pages are refused, and files of untold length, which could
    be cut off unnoticed. Redirects never lead from https to http. Raises DownloadError (a ValueError) with a line that
    says what to do and shows neither password nor query of the URL.
    """
    text = os.fspath(url)
    if sha256 is not None and not re.fullmatch(r"[0-9a-fA-F]{64}", sha256):
        raise DownloadError(f"sha256 must be 64 hexadecimal digits, not {sha256!r}")
    if "://" not in text:
        path = Path(text)
        if not path.is_file():
            raise DownloadError(f"{text or repr(text)}: {'no regular file' if path.exists() else 'no such file'}")
        if sha256 is not None and file_sha256(path) != sha256.lower():
            raise DownloadError(f"{text}: the SHA-256 differs from the expected {sha256}; this is another file")
        return path
    shown = printable(redact(re.sub(r"[^!-~]", "_", text)))
    if not re.match(r"https?://[^/]", text, re.IGNORECASE):
        raise DownloadError(f"{shown}: only http:// and https:// URLs can be downloaded")
    if not re.fullmatch(r"[!-~]+", text):
        raise DownloadError(f"{shown}: a URL is printable ASCII; write other characters as %XX")
    target = cache_path(text, cache_dir)
    part = target.with_name(target.name + ".part")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with open(target.with_name(target.name + ".lock"), "w") as lock:
            if fcntl is not None:  # one process at a time, where the platform has locks
                fcntl.flock(lock, fcntl.LOCK_EX)
            if target.is_file() and not _fault(target, sha256):
                return target
            _download(text, part, sha256 is not None, quiet, limits)
            if reason := _fault(part, sha256):
                _discard(part)
                raise DownloadError(f"{shown}: {reason}; the download was removed")
            os.replace(part, target)
            _discard(part)
    except OSError as error:
        place, advice = (target.parent, "") if cache_dir else (f"the cache {target.parent}", "; set NCVSD_CACHE")
        raise DownloadError(f"{shown}: cannot write to {place} ({printable(error)}){advice}{_kept(part)}") from error
    return target


def ask(url: str, timeout: float = LIMITS.timeout) -> tuple[int | None, str | None]:
    """Bytes and SHA-256 behind a URL, as a HEAD request tells, else None. Raises DownloadError without an answer."""
    try:
        with _request("HEAD", url, timeout, hash_known=False) as response:
            sha256 = _linked_hash(response)
            size = response.headers.get("X-Linked-Size" if sha256 else "Content-Length", "")
    except _Failure as error:
        raise DownloadError(f"{printable(redact(url))}: {error}") from None
    return int(size) if re.fullmatch(_NUMBER, size) else None, sha256


def _linked_hash(response: Any) -> str | None:
    """SHA-256 of the file that an answer of the Hugging Face Hub leads to."""
    match = re.fullmatch('"?([0-9a-f]{64})"?', response.headers.get("X-Linked-ETag", ""))
    return match[1] if match else None


def _fault(path: Path, sha256: str | None) -> str:
    """Why a file is not what was asked for; empty if it may be."""
    if sha256 is not None:
        return "" if (found := file_sha256(path)) == sha256.lower() else f"wrong SHA-256 {found}, expected {sha256}"
    with open(path, "rb") as file:
        return _PAGE if re.match(_HTML, file.read(4096), re.IGNORECASE | re.DOTALL) else ""


def _received(part: Path) -> tuple[int, str]:
    """Bytes of `part` that can be continued, and the server's name for the version of the file they belong to."""
    note = part.with_suffix(".part.version")
    version = note.read_text(errors="replace") if part.is_file() and note.is_file() else ""
    return (part.stat().st_size, version) if re.fullmatch(_VERSION, version) else (0, "")


def _kept(part: Path) -> str:
    return " (the part received is kept and will be continued)" if _received(part)[0] else ""


def _discard(part: Path) -> None:
    part.unlink(missing_ok=True)
    part.with_suffix(".part.version").unlink(missing_ok=True)


def _download(url: str, part: Path, hash_known: bool, quiet: bool, limits: Limits) -> None:
    """Completes `part`, trying again where that can help. Only a try that brings it well forward starts a new count."""
    end = limits.clock() + limits.max_seconds
    longest, failures = _received(part)[0], 0
    while True:
        try:
            return _attempt(url, part, hash_known, quiet, limits, end)
        except _Failure as failure:
            error = failure
        size = _received(part)[0]
        failures = 0 if size - longest >= max(limits.min_rate * limits.timeout, 1) else failures + 1
        longest = max(longest, size)
        wait = 2.0 ** min(max(failures - 1, 0), 6)
        if error.permanent or failures >= limits.attempts or limits.clock() + wait > end:
            raise DownloadError(f"{redact(url)}: download failed: {error}{_kept(part)}")
        limits.sleep(wait)


def _attempt(url: str, part: Path, hash_known: bool, quiet: bool, limits: Limits, end: float) -> None:
    """One request, after which `part` is complete. Raises _Failure where it is not."""
    from tqdm import tqdm

    start, version = _received(part)
    headers = {"Range": f"bytes={start}-", "If-Range": version} if start else {}
    with _request("GET", url, limits.timeout, hash_known, headers) as response:
        if start and response.headers.get("Content-Range", "").strip() == f"bytes */{start}":
            return
        start, total = _begin(response, part, hash_known)
        received, since, mark = start, limits.clock(), start
        name = redact(url).rsplit("/", 1)[-1][:40]
        bar = tqdm(total=total, initial=start, unit="B", unit_scale=True, unit_divisor=1024, desc=name, disable=quiet)
        with open(part, "ab") as file, bar:
            while max(total or 0, received) <= limits.max_bytes and (chunk := _read(response, limits.timeout)):
                received += file.write(chunk)
                bar.update(len(chunk))
                now = limits.clock()
                if now > end:
                    raise _Failure(f"not complete after {format_time(limits.max_seconds)}", permanent=True)
                if now - since >= limits.timeout:
                    if received - mark < limits.min_rate * (now - since):
                        raise _Failure(f"it comes slower than {format_bytes(limits.min_rate)}/s")
                    since, mark = now, received
    if max(total or 0, received) > limits.max_bytes:
        _discard(part)
        raise _Failure(f"larger than the limit of {format_bytes(limits.max_bytes)}", permanent=True)
    if received < (total or 0):
        raise _Failure("the connection was cut")
    if received > (total or received):
        _discard(part)
        raise _Failure("the server sends more than it told")


def _begin(response: Any, part: Path, hash_known: bool) -> tuple[int, int | None]:
    """Makes `part` what the body continues. Returns its length so far, and that of the whole file where it is told."""
    headers, (start, version) = response.headers, _received(part)
    tag = headers.get("ETag", "")  # only a strong one names these very bytes
    told = headers.get("Last-Modified", "") if not tag or tag.startswith("W/") else tag
    if response.status_code == 206:
        span = re.fullmatch(f"bytes {_NUMBER}-{_NUMBER}/{_NUMBER}", headers.get("Content-Range", ""))
        if start and span and int(span[1]) == start and told in ("", version):
            return start, int(span[3])
    _discard(part)
    if response.status_code != 200:
        raise _Failure("what is here does not belong to the server's file")
    length = re.fullmatch(_NUMBER, headers.get("Content-Length", ""))
    if length is None and not hash_known and not _is_chunked(response):  # the end of chunks is marked
        reason = "the server does not say how long the file is, so that a cut would go unnoticed: give its SHA-256"
        raise _Failure(f"{reason} (URL#sha256=HEX for a network)", permanent=True)
    if re.fullmatch(_VERSION, told):
        part.with_suffix(".part.version").write_text(told)
    return 0, int(length[1]) if length else None


def _is_chunked(response: Any) -> bool:
    return response.headers.get("Transfer-Encoding", "").lower() == "chunked"  # nothing else is decoded


def _read(response: Any, timeout: float) -> bytes:
    """What has arrived, once something has; empty at the end."""
    read = partial(response.raw.read1, _CHUNK, decode_content=False)
    try:
        return _within(timeout, read) if _is_chunked(response) else read()  # lines between chunks may trickle in
    except futures.TimeoutError:
        with suppress(OSError, ValueError, RuntimeError):
            response.raw.shutdown()  # ends the reading, which closing would wait for
        raise


def _within(seconds: float, function: Callable[[], Any]) -> Any:
    """The function's result. Raises futures.TimeoutError where it takes longer, however it blocks."""
    result: futures.Future[Any] = futures.Future()

    def work() -> None:
        try:
            result.set_result(function())
        except Exception as error:
            result.set_exception(error)

    threading.Thread(target=work, daemon=True).start()
    return result.result(seconds)


@contextmanager
def _request(method: str, url: str, timeout: float, hash_known: bool, headers: dict | None = None) -> Iterator[Any]:
    """Yields the `requests.Response` that brings the file, its body unread; it may be 416 to a Range. What goes wrong
    with the network, in the block too, becomes a _Failure; errors of the disk pass.
    """
    import http.client

    import requests
    import urllib3

    def settle(response: Any, **_: Any) -> None:
        if response.url.startswith("https:"):
            session.adapters.pop("http://", None)  # no way back to http
        if method == "HEAD" and _linked_hash(response):
            response.headers.pop("Location", None)  # the Hub has told what is asked
            response.status_code = 200
        if response.is_redirect:
            response.close()  # its body, which would be read, may be endless

    try:
        with requests.Session() as session:
            session.headers.update({"User-Agent": "ncvsd", "Accept-Encoding": "identity"})
            session.hooks["response"], session.max_redirects = [settle], 10
            send = partial(session.request, method, url, headers=headers, timeout=timeout, stream=True)
            with _within(4 * timeout, partial(send, allow_redirects=True)) as response:
                code = response.status_code
                if code not in (200, 206, 416):
                    reason = f"the server answers {code} {http.client.responses.get(code, '')}"
                    raise _Failure(reason, permanent=400 <= code < 500 and code not in (408, 425, 429))
                kind = response.headers.get("Content-Type", "").lower()
                if code != 416 and not hash_known and re.match(r"text/html|application/xhtml", kind):
                    raise _Failure(_PAGE, permanent=True)
                yield response
    except (OSError, ValueError, urllib3.exceptions.HTTPError, futures.TimeoutError) as error:
        if getattr(error, "errno", None) is not None:
            raise
        if isinstance(error, ValueError):
            reason = "no answer: the address, or one that it redirects to, is not valid or leads from https to http"
            raise _Failure(reason, permanent=True) from None
        raise _Failure(f"no answer: {_reason(error)}") from None


def _reason(error: BaseException) -> str:
    """What an error of the network comes from, without the texts of `requests`, which quote the URL."""
    for inner in (error.__cause__, getattr(error, "reason", None), *error.args[-1:]):
        if isinstance(inner, BaseException):
            return _reason(inner)
    if isinstance(error, (TimeoutError, futures.TimeoutError)):
        return "timed out"
    return (error.strerror or str(error)) if isinstance(error, OSError) else type(error).__name__
