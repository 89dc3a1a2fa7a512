"""What a server says about a file without sending it, and how it is asked."""

import http.client
import re
import urllib.error
import urllib.request
from dataclasses import dataclass
from typing import Any

from dnnlib.download import DownloadError
from dnnlib.text import printable


@dataclass(frozen=True)
class RemoteFile:
    """Length in bytes and SHA-256 (lower-case hexadecimal digits) of a file; None = the server does not say."""

    size: int | None
    sha256: str | None


def http_opener(redirects: urllib.request.BaseHandler | None = None) -> urllib.request.OpenerDirector:
    """Opener for http and https alone, also after a redirect; `redirects` is a handler in place of urllib's."""
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler(), urllib.request.HTTPHandler(), urllib.request.HTTPSHandler(),
        redirects or urllib.request.HTTPRedirectHandler(), urllib.request.HTTPDefaultErrorHandler(),
        urllib.request.HTTPErrorProcessor(), urllib.request.UnknownHandler(),
    ):  # fmt: skip
        opener.add_handler(handler)
    return opener


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Asks for headers after a redirect too, and stops where the Hugging Face Hub has told length and hash."""

    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
        if _linked_hash(headers):
            return None
        following = super().redirect_request(req, fp, code, msg, headers, newurl)
        if following is not None:
            following.method = "HEAD"
        return following


def ask(url: str, timeout: float = 30.0) -> RemoteFile:
    """Length and hash of the file behind an http(s) URL, from the headers that a HEAD request brings.

    Raises DownloadError, in one line, where there is no answer.
    """
    identity = {"User-Agent": "ncvsd", "Accept-Encoding": "identity"}
    try:
        request = urllib.request.Request(url, headers=identity, method="HEAD")
        with http_opener(_Redirects()).open(request, timeout=timeout) as response:
            headers = response.headers
    except urllib.error.HTTPError as error:
        error.close()
        headers = error.headers
        if not _linked_hash(headers):
            raise DownloadError(printable(f"{url}: the server answers {error.code} {error.reason}")) from None
    except (http.client.HTTPException, OSError, ValueError) as error:
        raise DownloadError(printable(f"{url}: no answer ({getattr(error, 'reason', error)})")) from None
    sha256 = _linked_hash(headers)
    size = headers.get("X-Linked-Size" if sha256 else "Content-Length", "")
    return RemoteFile(int(size) if re.fullmatch("[0-9]{1,18}", size) else None, sha256)


def _linked_hash(headers: Any) -> str | None:
    """SHA-256 of the file that an answer of the Hugging Face Hub leads to."""
    match = re.fullmatch('"?([0-9a-f]{64})"?', headers.get("X-Linked-ETag", ""))
    return match[1] if match else None
