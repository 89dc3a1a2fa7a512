import errno
import hashlib
import os

import pytest

from dnnlib.files import atomic_path, atomic_write, file_sha256, open_regular, read_regular


def test_atomic_write(tmp_path):
    path = tmp_path / "sub" / "x.txt"
    with atomic_write(path, "w", encoding="utf-8") as file:
        file.write("old")
    with pytest.raises(RuntimeError), atomic_write(path) as file:
        file.write(b"half of the new")
        raise RuntimeError
    assert path.read_text() == "old" and os.listdir(path.parent) == ["x.txt"]
    with atomic_write(path) as file:
        file.write(b"new")
        assert path.read_text() == "old"
    assert path.read_text() == "new" and os.listdir(path.parent) == ["x.txt"]
    plain = tmp_path / "plain"
    plain.write_text("")
    assert path.stat().st_mode == plain.stat().st_mode
    with pytest.raises(ValueError, match="mode"), atomic_write(path, "a"):
        pass


def test_errors_of_atomic_files_name_the_file_itself(tmp_path):
    (tmp_path / "folder").mkdir()
    with pytest.raises(IsADirectoryError) as caught, atomic_write(tmp_path / "folder") as file:
        file.write(b"new")
    assert (caught.value.filename, caught.value.filename2) == (str(tmp_path / "folder"), None)
    with pytest.raises(OSError) as caught, atomic_path(tmp_path / "x"):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert caught.value.filename == str(tmp_path / "x") and "No space" in str(caught.value)
    with pytest.raises(FileNotFoundError) as caught, atomic_path(tmp_path / "x") as temporary:
        temporary.unlink()
    assert caught.value.filename == str(tmp_path / "x")
    with pytest.raises(FileNotFoundError, match="other") as caught, atomic_write(tmp_path / "x"):
        (tmp_path / "other").read_bytes()
    with pytest.raises(OSError, match="no image"), atomic_write(tmp_path / "x"):
        raise OSError("no image")
    assert os.listdir(tmp_path) == ["folder"]


@pytest.mark.parametrize("read", [open_regular, lambda path: read_regular(path, 100), file_sha256])
def test_only_regular_files_are_read_and_nothing_waits(tmp_path, read):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "endless").symlink_to("/dev/zero")
    for name, kind, reason in [
        ("pipe", OSError, "not a regular file"),
        ("endless", OSError, "not a regular file"),
        (".", IsADirectoryError, "Is a directory"),
        ("none", FileNotFoundError, "No such file"),
    ]:
        with pytest.raises(kind, match=reason) as caught:
            read(tmp_path / name)
        assert caught.value.filename == os.fspath(tmp_path / name) and reason in caught.value.strerror


def test_no_more_is_read_than_the_open_file_held(tmp_path, monkeypatch):
    path = tmp_path / "x"
    path.write_bytes(b"12345")
    (tmp_path / "link").symlink_to(path)
    assert read_regular(tmp_path / "link", 5) == b"12345" and file_sha256(path) == hashlib.sha256(b"12345").hexdigest()
    with pytest.raises(OSError, match="5 bytes, and at most 4 are read") as caught:
        read_regular(path, 4)
    assert caught.value.filename == str(path)
    stat = os.fstat

    def grows(handle):
        found = stat(handle)
        with open(path, "ab") as file:
            file.write(b"more")
        return found

    monkeypatch.setattr(os, "fstat", grows)
    assert len(read_regular(path, 100)) < path.stat().st_size
