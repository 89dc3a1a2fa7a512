"""Files that download.sh fetches: what is compared, with what, and what it says where nothing can be."""

import errno
import hashlib

import pytest
from click.testing import CliRunner

from dnnlib import download
from dnnlib.download import ask
from quick_start import fetch
from tests.servers import QuietHandler, serving

CONTENT = bytes(range(256)) * 4
HASH = hashlib.sha256(CONTENT).hexdigest()


class Handler(QuietHandler):
    """Serves CONTENT; under /hub as the Hugging Face Hub does, from another address."""

    def do_HEAD(self):
        self.server.requests.append((self.command, self.path))
        if self.path == "/missing":
            return self.send_error(404)
        if self.path in ("/hub", "/redirect"):
            self.send_response(302)
            if self.path == "/hub":
                self.send_header("X-Linked-ETag", f'"{self.server.linked}"')
                self.send_header("X-Linked-Size", str(len(CONTENT)))
            self.send_header("Location", "/file")
            self.send_header("Content-Length", "0")
        else:
            self.send_response(200)
            if self.path != "/silent" or self.command == "GET":
                self.send_header("Content-Length", str(len(CONTENT)))
        self.end_headers()

    def do_GET(self):
        self.do_HEAD()
        if self.path not in ("/hub", "/redirect", "/missing"):
            self.wfile.write(CONTENT)


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with serving(Handler) as server:
        server.requests, server.linked = [], HASH
        yield server


@pytest.fixture
def dest(tmp_path):
    return tmp_path / "zoo" / "net.pkl"


def get(url, dest, size="-", sha256="-"):
    """Exit code and the one line that fetch.py says."""
    result = CliRunner().invoke(fetch.main, ["--url", url, "--dest", str(dest), "--bytes", size, "--sha256", sha256])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    errors = [line for line in result.stderr.splitlines() if line.startswith("Error: ")]  # without progress bars
    lines = result.stdout.splitlines() + errors
    assert len(lines) == 1, result.output
    return result.exit_code, lines[0]


def put(dest, content=CONTENT):
    dest.parent.mkdir(exist_ok=True)
    dest.write_bytes(content)
    return dest.with_name("net.pkl.sha256")


def test_what_servers_say(server):
    assert ask(f"{server.url}/file") == ask(f"{server.url}/redirect") == (len(CONTENT), None)
    assert {method for method, _ in server.requests} == {"HEAD"}
    server.requests.clear()
    assert ask(f"{server.url}/hub") == (len(CONTENT), HASH)
    assert server.requests == [("HEAD", "/hub")]
    server.linked = "0123456789abcdef0123456789abcdef01234567"  # of a small file: that of git
    assert ask(f"{server.url}/hub") == (len(CONTENT), None)
    assert ask(f"{server.url}/silent") == (None, None)
    with pytest.raises(download.DownloadError, match="/missing: the server answers 404"):
        ask(f"{server.url}/missing")
    for url in ("http://127.0.0.1:9/x", "http://[x/", "file:///etc/hostname"):
        with pytest.raises(download.DownloadError, match="no answer"):
            ask(url, timeout=2)


def test_a_file_that_is_there_without_a_note_has_the_servers_length(server, dest):
    note = put(dest, CONTENT[:-1])
    code, line = get(f"{server.url}/file", dest)
    assert code == 1 and "1023 bytes, expected 1024; remove the file" in line
    assert not note.exists() and dest.stat().st_size == 1023
    put(dest)
    code, line = get(f"{server.url}/file", dest)
    assert code == 0 and line.endswith("(none to compare with)") and note.read_text() == f"{HASH}  net.pkl\n"
    server.requests.clear()
    assert get(f"{server.url}/file", dest) == (0, f"{dest}: 1.0 KiB, SHA-256 {HASH}")
    assert server.requests == []  # the note is enough


@pytest.mark.parametrize("place", ["missing", "silent", "nowhere"])
def test_a_file_that_cannot_be_compared_is_kept_without_a_note(server, dest, place):
    note = put(dest, CONTENT[:-1])
    url = "http://127.0.0.1:9/x" if place == "nowhere" else f"{server.url}/{place}"
    code, line = get(url, dest)
    assert code == 0 and "neither length nor hash could be compared (" in line and not note.exists()


def test_the_hubs_hash_is_compared(server, dest):
    assert get(f"{server.url}/hub", dest) == (0, f"{dest}: 1.0 KiB, SHA-256 {HASH}")
    put(dest, CONTENT[::-1]).unlink()
    code, line = get(f"{server.url}/hub", dest)
    assert code == 1 and f"expected {HASH}" in line
    dest.unlink()
    server.linked = "0" * 64
    code, line = get(f"{server.url}/hub", dest)
    assert code == 1 and "wrong SHA-256" in line and not dest.exists()


@pytest.mark.parametrize(
    ("options", "note", "message"),
    [
        (dict(size="12x"), None, "net.pkl: its length must be a number of bytes, or - where unknown, not '12x'"),
        (dict(sha256="abc"), None, "net.pkl: its SHA-256 must be 64 hexadecimal digits"),
        ({}, b" \n", "net.pkl.sha256: holds no SHA-256; remove it"),
        ({}, b"", "net.pkl.sha256: holds no SHA-256; remove it"),
        ({}, b"\xff\xfe" * 40, "net.pkl.sha256: holds no SHA-256; remove it"),
    ],
)
def test_broken_lists_and_notes(server, dest, options, note, message):
    path = put(dest)
    if note is not None:
        path.write_bytes(note)
    code, line = get(f"{server.url}/file", dest, **options)
    assert code == 1 and message in line
    assert dest.read_bytes() == CONTENT and server.requests == []


def test_a_full_disk(server, dest, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(download.os, "replace", full)
    code, line = get(f"{server.url}/file", dest)
    assert code == 1 and "No space left on device" in line and "NCVSD_CACHE" not in line
