import hashlib

import pytest

from dnnlib import download
from tests.dnnlib.file_server import CONTENT, fetch


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
    download.open_url(f"{server.url}/file.bin", cache_dir=tmp_path)
    assert "file.bin" in capsys.readouterr().err


def test_resumes_after_cut_connections(server, tmp_path):
    server.cut = [500_000, 700_000]
    assert fetch(server, tmp_path).read_bytes() == CONTENT
    assert server.requests == [None, "bytes=500000-", "bytes=1200000-"]


def test_resumes_in_a_later_call(server, tmp_path):
    server.cut = [500_000, 0, 0]
    with pytest.raises(download.DownloadError, match="is kept"):
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
    with pytest.raises(download.DownloadError) as caught:
        fetch(server, tmp_path, "other.bin", attempts=0)
    assert "is kept" not in str(caught.value)
    assert fetch(server, tmp_path, "other.bin").read_bytes() == CONTENT
    assert server.requests == [None] * 4


def test_server_that_resumes_another_version(server, tmp_path):
    server.cut = [500_000]
    with pytest.raises(download.DownloadError):
        fetch(server, tmp_path, attempts=0)
    answer = "HTTP/1.1 206 OK\r\nContent-Range: bytes 500000-500000/500001\r\nContent-Length: 1\r\n{}\r\nx"
    server.raw = answer.format('ETag: "two"\r\n').encode()
    with pytest.raises(download.DownloadError):
        fetch(server, tmp_path, attempts=1)
    assert not list(tmp_path.glob("*.part*"))


def test_length_unknown(server, tmp_path):
    server.raw = b"HTTP/1.1 200 OK\r\n\r\nhalf"
    with pytest.raises(download.DownloadError, match=r"how long the file is.*URL#sha256=HEX"):
        fetch(server, tmp_path)
    assert fetch(server, tmp_path, sha256=hashlib.sha256(b"half").hexdigest()).read_bytes() == b"half"
    server.raw = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nhalf\r\n"
    with pytest.raises(download.DownloadError, match="download failed"):
        fetch(server, tmp_path, "chunks", attempts=1)
    server.raw += b"0\r\n\r\n"
    assert fetch(server, tmp_path, "chunks").read_bytes() == b"half"


@pytest.mark.parametrize("chunked", [False, True])
def test_largest_size(server, tmp_path, chunked):
    if chunked:
        server.raw = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nhalf\r\n0\r\n\r\n"
    size = 4 if chunked else len(CONTENT)
    with pytest.raises(download.DownloadError, match="larger than the limit of"):
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
    with pytest.raises(download.DownloadError) as caught:
        fetch(server, tmp_path, attempts=1)
    message = str(caught.value)
    assert message.startswith(server.url) and message.isprintable() and len(message) < 500


@pytest.mark.parametrize("url", ["http://h/\x1b[31m", "http://h\n/", "http://ü/", "http://\udcff/", "http://h/ x"])
def test_urls_beyond_ascii(tmp_path, url):
    with pytest.raises(download.DownloadError, match="^http://.*%XX") as caught:
        download.open_url(url, cache_dir=tmp_path)
    assert str(caught.value).isprintable()


def test_file_that_changed_between_two_calls(server, tmp_path):
    server.cut = [500_000, 0]
    with pytest.raises(download.DownloadError):
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
    with pytest.raises(download.DownloadError, match="wrong SHA-256"):
        fetch(server, tmp_path, "other.bin", sha256="0" * 64)
    assert not list(tmp_path.glob("*other.bin")) and not list(tmp_path.glob("*.part*"))
    path.write_bytes(b"spoilt")
    assert fetch(server, tmp_path, sha256=digest).read_bytes() == CONTENT
    with pytest.raises(download.DownloadError, match="another file"):
        download.open_url(path, sha256="0" * 64)
    assert path.exists()
    with pytest.raises(download.DownloadError, match="64 hexadecimal"):
        download.open_url(path, sha256="abc")


def test_errors_of_the_server(server, tmp_path):
    with pytest.raises(download.DownloadError, match="404"):
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
        with pytest.raises(download.DownloadError):
            fetch(server, tmp_path, "redirect2", attempts=1)


def test_nobody_answers(tmp_path):
    with pytest.raises(download.DownloadError, match="download failed"):
        download.open_url("http://127.0.0.1:9/x", cache_dir=tmp_path, limits=download.Limits(attempts=1))


@pytest.mark.parametrize("url", ["file:///etc/hostname", "ftp://host/x", "data://x", "http:///x"])
def test_other_schemes_are_refused(url, tmp_path):
    with pytest.raises(download.DownloadError, match="only http"):
        download.open_url(url, cache_dir=tmp_path)


def test_local_paths(tmp_path):
    (tmp_path / "x").write_bytes(b"1")
    assert download.open_url(tmp_path / "x") == tmp_path / "x"
    with pytest.raises(download.DownloadError, match="no such file"):
        download.open_url(tmp_path / "y")


def test_a_cache_that_cannot_be_written(server, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(download.DownloadError, match=f"cannot write to {tmp_path / 'file'} ") as caught:
        fetch(server, tmp_path / "file")
    assert "NCVSD_CACHE" not in str(caught.value)  # the caller chose the folder
    monkeypatch.setenv("NCVSD_CACHE", str(tmp_path / "file"))
    with pytest.raises(download.DownloadError, match="set NCVSD_CACHE"):
        fetch(server, None)
