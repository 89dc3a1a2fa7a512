"""Where downloads end, what is refused, and what neither messages nor files tell of a URL."""

import hashlib
import subprocess
import sys

import numpy as np
import pytest
import requests

from dnnlib import download
from tests.dnnlib.file_server import CONTENT, Clock, fetch


def test_a_redirect_never_leads_from_https_to_http(server, tmp_path, monkeypatch):
    send = requests.adapters.HTTPAdapter.send

    def without_tls(self, request, **options):  # https://secure is the same server
        url, request.url = request.url, request.url.replace("https://secure", server.url)
        response = send(self, request, **options)
        response.url = request.url = url
        return response

    monkeypatch.setattr(requests.adapters.HTTPAdapter, "send", without_tls)
    digest = hashlib.sha256(CONTENT).hexdigest()
    server.redirect = "https://secure/file.bin"
    for start in ("https://secure", server.url):
        path = download.open_url(f"{start}/redirect1", tmp_path, quiet=True)
        assert path.read_bytes() == CONTENT
    server.redirect = f"{server.url}/file.bin"
    server.requests.clear()
    for sha256 in (None, digest):
        with pytest.raises(download.DownloadError, match="leads from https to http"):
            download.open_url("https://secure/redirect2", tmp_path, sha256, quiet=True)
    assert len(server.requests) == 2  # none for the file
    with pytest.raises(download.DownloadError, match="leads from https to http"):
        download.ask("https://secure/redirect2")


def test_the_body_of_a_redirect_is_not_read(server, tmp_path):
    for name in ("endless", "endless-chunks"):
        assert fetch(server, tmp_path, name).read_bytes() == CONTENT


def test_a_byte_per_connection_is_no_progress(server, tmp_path):
    server.cut = [1] * 1000
    with pytest.raises(download.DownloadError, match="is kept"):
        fetch(server, tmp_path, attempts=5)
    assert len(server.requests) == 5


def test_a_body_that_drips(server, tmp_path):
    clock = Clock(server)
    with pytest.raises(download.DownloadError, match=r"slower than 1.0 KiB/s \(the part received is kept") as caught:
        fetch(server, tmp_path, "drip-body", clock=clock, sleep=clock.sleep, attempts=2)
    assert caught.value.args[0].startswith(f"{server.url}/drip-body: ") and len(server.requests) == 2
    assert clock.naps == [1]


def test_all_tries_together_have_an_end(server, tmp_path):
    clock = Clock(server)
    with pytest.raises(download.DownloadError, match="not complete after 1m 40s"):
        fetch(server, tmp_path, "drip-body", clock=clock, sleep=clock.sleep, max_seconds=100, min_rate=0)
    assert 100 < clock.now < 110
    server.raw, clock = b"HTTP/1.1 503 x\r\nContent-Length: 0\r\n\r\n", Clock(server)
    with pytest.raises(download.DownloadError, match="503 Service Unavailable"):
        fetch(server, tmp_path, clock=clock, sleep=clock.sleep, max_seconds=300, attempts=10**6)
    assert clock.naps == [1, 2, 4, 8, 16, 32, 64, 64, 64] and clock.now <= 300


@pytest.mark.parametrize("what", ["header", "chunk"])
def test_what_drips_before_the_body(server, tmp_path, what):
    with pytest.raises(download.DownloadError, match="timed out"):
        fetch(server, tmp_path, f"drip-{what}", attempts=1, timeout=0.05)


@pytest.mark.parametrize(
    ("kind", "content"),
    [
        ("text/html; charset=utf-8", b"welcome"),
        ("Application/XHTML+xml", b"welcome"),
        ("", b"<!DOCTYPE html>"),
        ("application/octet-stream", b"\xef\xbb\xbf \r\n<!-- log\nin --> <HTML lang='en'>"),
    ],
)
def test_a_web_page_is_not_kept(server, tmp_path, kind, content):
    server.cut = [500_000]
    with pytest.raises(download.DownloadError, match="is kept"):
        fetch(server, tmp_path, attempts=0)
    server.kind, server.content, server.etag = kind, content, '"portal"'
    with pytest.raises(download.DownloadError, match="a web page came in place of a file: log in"):
        fetch(server, tmp_path)
    assert len(server.requests) == 2 and not [p for p in tmp_path.iterdir() if p.name.endswith("file.bin")]
    digest = hashlib.sha256(content).hexdigest()
    page = fetch(server, tmp_path, sha256=digest)
    assert page.read_bytes() == content  # somebody wants this very page
    server.kind, server.content, server.etag = "", CONTENT, '"one"'
    if content.startswith(b"<"):  # as versions of this program before kept it
        assert fetch(server, tmp_path).read_bytes() == CONTENT


def test_a_login_page_costs_no_part(server, tmp_path):
    server.cut = [500_000]
    with pytest.raises(download.DownloadError):
        fetch(server, tmp_path, attempts=0)
    server.raw = b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nContent-Length: 1\r\n\r\nx"
    with pytest.raises(download.DownloadError, match="web page"):
        fetch(server, tmp_path)
    server.raw = b""
    assert fetch(server, tmp_path).read_bytes() == CONTENT
    assert server.requests[-1] == "bytes=500000-"


def test_a_file_that_begins_like_a_page(server, tmp_path):
    server.content = b"<\0\0\0\0\0\0\0{"  # safetensors with a header of 60 bytes
    assert fetch(server, tmp_path).read_bytes() == server.content


SECRET = "se-cret"


@pytest.mark.parametrize(
    ("name", "raw", "sha256", "limits"),
    [
        ("missing", b"", None, {}),
        ("file.bin", b"HTTP/1.1 200 OK\r\n\r\nhalf", None, {}),
        ("file.bin", b"HTTP/1.1 200 OK\r\nContent-Length: 14\r\n\r\n<!doctype html", None, {}),
        ("file.bin", b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\n\r\n", None, {}),
        ("file.bin", b"HTTP/1.1 302 x\r\nLocation: ftp://a:se-cret@h/?se-cret\r\n\r\n", None, {}),
        ("file.bin", b"HTTP/1.1 302 x\r\nLocation: http://a:se-cret@[/?se-cret\r\n\r\n", None, {}),
        ("file.bin", b"HTTP/1.1 302 x\r\nLocation: http://a:se-cret@127.0.0.1:9/?se-cret\r\n\r\n", None, {}),
        ("file.bin", b"HTTP/1.1 404 se-cret\r\n\r\n", None, {}),
        ("file.bin", b"se-cret\r\n\r\n", None, {}),
        ("file.bin", b"", "0" * 64, {}),
        ("file.bin", b"", None, {"max_bytes": 10}),
    ],
)
def test_messages_and_names_hold_no_secret(server, tmp_path, capsys, name, raw, sha256, limits):
    server.raw = raw
    address = server.url.removeprefix("http://")
    url = f"http://me:{SECRET}@{address}/{name}?token={SECRET}#{SECRET}"
    with pytest.raises(download.DownloadError, match=f"^http://{address}/{name}: ") as caught:
        download.open_url(url, tmp_path, sha256, limits=download.Limits(attempts=1, **limits))
    server.raw = b""
    with pytest.raises(download.DownloadError) as other:
        download.ask(url.replace(name, "missing"))
    assert server.users and all(user.startswith("Basic ") for user in server.users)
    told = [str(caught.value), str(other.value), capsys.readouterr().err, *map(str, tmp_path.iterdir())]
    assert SECRET not in "".join(told) and "token" not in "".join(told)


@pytest.mark.parametrize(
    "url", ["http://me:{}@127.0.0.1:9/?{}", "http://me:{}@h/\x01?{} x", "http://{}@[h/?{}", "ftp://a:{}@h"]
)
def test_urls_that_lead_nowhere_hold_no_secret(tmp_path, url):
    url = url.format(SECRET, SECRET)
    with pytest.raises(download.DownloadError) as caught:
        download.open_url(url, tmp_path, limits=download.Limits(attempts=1))
    assert SECRET not in str(caught.value) and SECRET not in str(download.cache_path(url, tmp_path))


def test_progress_bars_and_names_hold_no_secret(server, tmp_path, capsys):
    path = download.open_url(f"{server.url}?token=se/cret", cache_dir=tmp_path)
    assert path.is_file() and "cret" not in path.name + capsys.readouterr().err


def test_what_is_kept_of_a_url_holds_no_secret(server, tmp_path, tiny_teacher, monkeypatch):
    import networks
    from metrics.references import load_reference

    monkeypatch.setenv("NCVSD_CACHE", str(tmp_path))
    url = server.url.replace("://", f"://me:{SECRET}@")
    server.content = tiny_teacher.read_bytes()
    digest = hashlib.sha256(server.content).hexdigest()
    loaded = networks.load(f"{url}/net.safetensors?token={SECRET}#sha256={digest}", quiet=True)
    assert loaded.config["source"] == f"{server.url}/net.safetensors#sha256={digest}"
    with open(tmp_path / "ref.npz", "wb") as file:
        np.savez(file, mu=np.zeros(2), sigma=np.eye(2))
    server.content = (tmp_path / "ref.npz").read_bytes()
    assert load_reference(f"{url}/ref.npz?token={SECRET}", quiet=True).source == f"{server.url}/ref.npz"


def test_a_disk_that_fills(server, tmp_path):
    """A limit on the length of files, which ends a write in the middle as a full disk does."""
    resource = pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (700_000, limits[1]))
    try:
        with pytest.raises(
            download.DownloadError, match=f"cannot write to {tmp_path} .*is kept and will be cont"
        ) as caught:
            fetch(server, tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert len(str(caught.value).splitlines()) == 1
    assert fetch(server, tmp_path).read_bytes() == CONTENT
    assert server.requests == [None, "bytes=700000-"]


def test_without_a_home_folder(monkeypatch):
    import pwd

    def unknown(_):
        raise KeyError("uid not found")

    monkeypatch.delenv("HOME")
    monkeypatch.delenv("NCVSD_CACHE", raising=False)
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    for call in (download.open_url, download.cache_path):
        with pytest.raises(download.DownloadError, match="no home folder is known; set NCVSD_CACHE to a folder"):
            call("http://127.0.0.1:9/x")


def test_nothing_is_imported_before_the_first_download():
    code = "import sys, dnnlib.download; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"requests", "urllib3", "http.client", "tqdm", "ssl"} & set(loaded)


@pytest.mark.parametrize(("header", "known"), [("chunked", True), ("Chunked", True), ("identity, chunked", False)])
def test_only_what_is_decoded_counts_as_chunked(header, known):
    """http.client hands lists of encodings on as they come: their end would not be noticed."""
    response = requests.Response()
    response.headers["Transfer-Encoding"] = header
    assert download._is_chunked(response) == known
