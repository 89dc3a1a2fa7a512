import errno
import hashlib
import os

import pytest

from dnnlib import util
from tests.servers import QuietHandler, serving

CONTENT = bytes(range(256)) * 8192  # 2 MiB


class Handler(QuietHandler):
    """Serves CONTENT. The server's `cut` gives how many bytes each coming answer may send before the line is cut."""

    protocol_version = "HTTP/1.1"

    def do_GET(self):
        server = self.server
        server.requests.append(self.headers.get("Range"))
        if server.raw:
            self.wfile.write(server.raw)
            self.close_connection = True
            return
        if self.path.startswith("/missing"):
            self.send_error(404)
            return
        if self.path.startswith("/busy") and len(server.requests) < 3:
            self.send_error(503)
            return
        if self.path.startswith("/redirect"):
            self.send_response(302)
            self.send_header("Location", server.redirect)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        start, wanted = 0, self.headers.get("Range")
        if wanted and server.ranges and self.headers.get("If-Range", server.etag) == server.etag:
            start = int(wanted.removeprefix("bytes=").removesuffix("-"))
        if start >= len(server.content) and start:
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(server.content)}")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        body = server.content[start:]
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(body)))
        if server.etag:
            self.send_header("ETag", server.etag)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(server.content) - 1}/{len(server.content)}")
        self.end_headers()
        if server.cut:
            self.wfile.write(body[: server.cut.pop(0)])
            self.close_connection = True
        else:
            self.wfile.write(body)


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with serving(Handler) as server:
        server.requests, server.cut, server.ranges = [], [], True
        server.content, server.etag, server.redirect = CONTENT, '"one"', ""
        server.raw = b""  # the whole of every answer
        yield server


def fetch(server, cache, name="file.bin", **kwargs):
    return util.open_url(f"{server.url}/{name}", cache_dir=cache, quiet=True, backoff=0.01, **kwargs)


def test_download_is_cached(server, tmp_path):
    path = fetch(server, tmp_path)
    assert path.read_bytes() == CONTENT
    assert path.name.endswith("-file.bin")
    assert fetch(server, tmp_path) == path
    assert len(server.requests) == 1
    assert fetch(server, tmp_path, "file.bin?v=2") != path
    assert not list(tmp_path.glob("*.part*"))


def test_cache_folder_from_environment(server, tmp_path, monkeypatch):
    monkeypatch.setenv("NCVSD_CACHE", str(tmp_path / "cache"))
    assert fetch(server, None).parent == tmp_path / "cache"


def test_progress_bar(server, tmp_path, capsys):
    util.open_url(f"{server.url}/file.bin", cache_dir=tmp_path)
    assert "file.bin" in capsys.readouterr().err


def test_resumes_after_cut_connections(server, tmp_path):
    server.cut = [500_000, 700_000]
    assert fetch(server, tmp_path).read_bytes() == CONTENT
    assert server.requests == [None, "bytes=500000-", "bytes=1200000-"]


def test_resumes_in_a_later_call(server, tmp_path):
    server.cut = [500_000, 0, 0]
    with pytest.raises(util.DownloadError, match="is kept"):
        fetch(server, tmp_path, attempts=2)
    assert not [path for path in tmp_path.iterdir() if path.name.endswith("file.bin")]
    server.requests.clear()
    assert fetch(server, tmp_path).read_bytes() == CONTENT
    assert server.requests == ["bytes=500000-"]


def test_server_without_ranges(server, tmp_path):
    server.ranges, server.cut = False, [500_000]
    assert fetch(server, tmp_path).read_bytes() == CONTENT


@pytest.mark.parametrize("etag", [None, 'W/"weak"', '"\x07"'])
def test_never_resumes_without_knowing_the_version(server, tmp_path, etag):
    server.etag, server.cut = etag, [500_000]
    assert fetch(server, tmp_path).read_bytes() == CONTENT
    server.cut = [500_000]
    with pytest.raises(util.DownloadError) as caught:
        fetch(server, tmp_path, "other.bin", attempts=0)
    assert "is kept" not in str(caught.value)
    assert fetch(server, tmp_path, "other.bin").read_bytes() == CONTENT
    assert server.requests == [None] * 4


def test_server_that_resumes_another_version(server, tmp_path):
    server.cut = [500_000]
    with pytest.raises(util.DownloadError):
        fetch(server, tmp_path, attempts=0)
    answer = "HTTP/1.1 206 OK\r\nContent-Range: bytes 500000-500000/500001\r\nContent-Length: 1\r\n{}\r\nx"
    server.raw = answer.format('ETag: "two"\r\n').encode()
    with pytest.raises(util.DownloadError):
        fetch(server, tmp_path, attempts=1)
    assert not list(tmp_path.glob("*.part*"))


def test_length_unknown(server, tmp_path):
    server.raw = b"HTTP/1.1 200 OK\r\n\r\nhalf"
    with pytest.raises(util.DownloadError, match=r"how long the file is.*URL#sha256=HEX"):
        fetch(server, tmp_path)
    assert fetch(server, tmp_path, sha256=hashlib.sha256(b"half").hexdigest()).read_bytes() == b"half"
    server.raw = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nhalf\r\n"
    with pytest.raises(util.DownloadError, match="download failed"):
        fetch(server, tmp_path, "chunks", attempts=1)
    server.raw += b"0\r\n\r\n"
    assert fetch(server, tmp_path, "chunks").read_bytes() == b"half"


@pytest.mark.parametrize("chunked", [False, True])
def test_largest_size(server, tmp_path, chunked):
    if chunked:
        server.raw = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nhalf\r\n0\r\n\r\n"
    size = 4 if chunked else len(CONTENT)
    with pytest.raises(util.DownloadError, match="larger than the limit of"):
        fetch(server, tmp_path, max_bytes=size - 1)
    assert not list(tmp_path.glob("*file.bin")) and not list(tmp_path.glob("*.part*"))
    assert fetch(server, tmp_path, max_bytes=size).stat().st_size == size


@pytest.mark.parametrize(
    "head",
    [
        b"HTTP/1.1 200 OK\r\nContent-Length: \xb2",
        b"HTTP/1.1 200 OK\r\nContent-Length: " + b"9" * 5000,
        b"HTTP/1.1 200 OK\r\nContent-Length: -1",
        b"HTTP/1.1 206 OK\r\nContent-Range: bytes 0-9/" + b"9" * 5000,
        b"HTTP/1.1 206 OK\r\nContent-Range: bytes \xb2-9/9",
        b"HTTP/1.1 404 \x1b[31mgone\x07 " + b"x" * 5000,
        b"HTTP/1.1 302 x\r\nLocation: http://" + b"a" * 70 + b"/",
        b"HTTP/1.1 302 x\r\nLocation: http://[x/",
        b"HTTP/1.1 302 x\r\nLocation: /\xff\x07",
        b"HTTP/9 \x1b[31m",
        b"\x1b[31m" * 100,
    ],
)
def test_hostile_headers(server, tmp_path, head):
    server.raw = head + b"\r\n\r\nx"
    with pytest.raises(util.DownloadError) as caught:
        fetch(server, tmp_path, attempts=1)
    message = str(caught.value)
    assert message.startswith(server.url) and message.isprintable() and len(message) < 500


@pytest.mark.parametrize("url", ["http://h/\x1b[31m", "http://h\n/", "http://ü/", "http://\udcff/", "http://h/ x"])
def test_urls_beyond_ascii(tmp_path, url):
    with pytest.raises(util.DownloadError, match="^http://.*%XX") as caught:
        util.open_url(url, cache_dir=tmp_path)
    assert str(caught.value).isprintable()


def test_file_that_changed_between_two_calls(server, tmp_path):
    server.cut = [500_000, 0]
    with pytest.raises(util.DownloadError):
        fetch(server, tmp_path, attempts=1)
    server.content, server.etag, server.cut = CONTENT[::-1], '"two"', []
    assert fetch(server, tmp_path).read_bytes() == CONTENT[::-1]


@pytest.mark.parametrize("kept", [CONTENT, CONTENT + b"too much"])
def test_part_at_or_beyond_the_end(server, tmp_path, kept):
    final = fetch(server, tmp_path)
    final.rename(final.with_name(final.name + ".part")).write_bytes(kept)
    final.with_name(final.name + ".part.version").write_text(server.etag)
    assert fetch(server, tmp_path).read_bytes() == CONTENT


def test_hash(server, tmp_path):
    digest = hashlib.sha256(CONTENT).hexdigest()
    path = fetch(server, tmp_path, sha256=digest.upper())
    with pytest.raises(util.DownloadError, match="wrong SHA-256"):
        fetch(server, tmp_path, "other.bin", sha256="0" * 64)
    assert not list(tmp_path.glob("*other.bin")) and not list(tmp_path.glob("*.part*"))
    path.write_bytes(b"spoilt")
    assert fetch(server, tmp_path, sha256=digest).read_bytes() == CONTENT
    with pytest.raises(util.DownloadError, match="another file"):
        util.open_url(path, sha256="0" * 64)
    assert path.exists()
    with pytest.raises(util.DownloadError, match="64 hexadecimal"):
        util.open_url(path, sha256="abc")


def test_errors_of_the_server(server, tmp_path):
    with pytest.raises(util.DownloadError, match="404"):
        fetch(server, tmp_path, "missing.bin")
    assert len(server.requests) == 1
    server.requests.clear()
    assert fetch(server, tmp_path, "busy.bin").read_bytes() == CONTENT
    assert len(server.requests) == 3


def test_redirects_stay_on_http(server, tmp_path):
    server.redirect = f"{server.url}/file.bin"
    assert fetch(server, tmp_path, "redirect1").read_bytes() == CONTENT
    for target in ("file:///etc/hostname", "ftp://127.0.0.1/x"):
        server.redirect = target
        with pytest.raises(util.DownloadError):
            fetch(server, tmp_path, "redirect2", attempts=1)


def test_nobody_answers(tmp_path):
    with pytest.raises(util.DownloadError, match="download failed"):
        util.open_url("http://127.0.0.1:9/x", cache_dir=tmp_path, attempts=1, timeout=2)


@pytest.mark.parametrize("url", ["file:///etc/hostname", "ftp://host/x", "data://x", "http:///x"])
def test_other_schemes_are_refused(url, tmp_path):
    with pytest.raises(util.DownloadError, match="only http"):
        util.open_url(url, cache_dir=tmp_path)


def test_local_paths(tmp_path):
    (tmp_path / "x").write_bytes(b"1")
    assert util.open_url(tmp_path / "x") == tmp_path / "x"
    with pytest.raises(util.DownloadError, match="no such file"):
        util.open_url(tmp_path / "y")


def test_atomic_write(tmp_path):
    path = tmp_path / "sub" / "x.txt"
    with util.atomic_write(path, "w", encoding="utf-8") as file:
        file.write("old")
    with pytest.raises(RuntimeError), util.atomic_write(path) as file:
        file.write(b"half of the new")
        raise RuntimeError
    assert path.read_text() == "old" and os.listdir(path.parent) == ["x.txt"]
    with util.atomic_write(path) as file:
        file.write(b"new")
        assert path.read_text() == "old"
    assert path.read_text() == "new" and os.listdir(path.parent) == ["x.txt"]
    plain = tmp_path / "plain"
    plain.write_text("")
    assert path.stat().st_mode == plain.stat().st_mode
    with pytest.raises(ValueError, match="mode"), util.atomic_write(path, "a"):
        pass


def test_errors_of_atomic_files_name_the_file_itself(tmp_path):
    (tmp_path / "folder").mkdir()
    with pytest.raises(IsADirectoryError) as caught, util.atomic_write(tmp_path / "folder") as file:
        file.write(b"new")
    assert (caught.value.filename, caught.value.filename2) == (str(tmp_path / "folder"), None)
    with pytest.raises(OSError) as caught, util.atomic_path(tmp_path / "x"):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert caught.value.filename == str(tmp_path / "x") and "No space" in str(caught.value)
    with pytest.raises(FileNotFoundError) as caught, util.atomic_path(tmp_path / "x") as temporary:
        temporary.unlink()
    assert caught.value.filename == str(tmp_path / "x")
    with pytest.raises(FileNotFoundError, match="other") as caught, util.atomic_write(tmp_path / "x"):
        (tmp_path / "other").read_bytes()
    with pytest.raises(OSError, match="no image"), util.atomic_write(tmp_path / "x"):
        raise OSError("no image")
    assert os.listdir(tmp_path) == ["folder"]


def test_a_cache_that_cannot_be_written(server, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(util.DownloadError, match=f"cannot write to {tmp_path / 'file'} ") as caught:
        fetch(server, tmp_path / "file")
    assert "NCVSD_CACHE" not in str(caught.value)  # the caller chose the folder
    monkeypatch.setenv("NCVSD_CACHE", str(tmp_path / "file"))
    with pytest.raises(util.DownloadError, match="set NCVSD_CACHE"):
        fetch(server, None)


@pytest.mark.parametrize(
    ("text", "value"),
    [("200", 200), (7, 7), ("64Mi", 64 * 2**20), ("16ki", 16384), ("1Gi", 2**30), ("2k", 2000), ("1.5M", 1_500_000),
     ("0.5Ki", 512), ("0", 0), (" 3 ", 3)],
)  # fmt: skip
def test_parse_si(text, value):
    assert util.parse_si(text) == value


@pytest.mark.parametrize("text", ["", "Ki", "-1", "1.5", "1e3", "0.3Ki", "5T", "1 Ki", "1.", "²", "9" * 40, "nan"])
def test_parse_si_refuses(text):
    with pytest.raises(ValueError, match="whole number"):
        util.parse_si(text)


def test_formats():
    times = [0.4, 42, 187, 18120, 86400 * 2 + 4 * 3600]
    assert [util.format_time(t) for t in times] == ["0s", "42s", "3m 07s", "5h 02m", "2d 04h"]
    sizes = [0, 512, 1536, 2.3 * 2**30, 5 * 2**40]
    assert [util.format_bytes(n) for n in sizes] == ["0 B", "512 B", "1.5 KiB", "2.3 GiB", "5.0 TiB"]


def test_easy_dict():
    d = util.EasyDict(a=1)
    d.b = 2
    assert d == {"a": 1, "b": 2} and d.a == 1
    del d.a
    with pytest.raises(AttributeError):
        d.a  # noqa: B018
    with pytest.raises(AttributeError):
        del d.a


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("11h30m", 41400),
        ("90m", 5400),
        ("2d", 172800),
        ("1h 5m 30s", 3930),
        ("45", 45),
        ("0.5h", 1800),
        ("1D2H", 93600),
    ],
)
def test_lengths_of_time(text, seconds):
    assert util.parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "h", "11:30", "30m11h", "1h1h", "-5m", "5x", "1e3"])
def test_what_is_no_length_of_time(text):
    with pytest.raises(ValueError, match="as in 11h30m"):
        util.parse_duration(text)
