import errno
import os

import pytest

from dnnlib.files import atomic_path, atomic_write


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
