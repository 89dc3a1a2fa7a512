import errno
import hashlib
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from dnnlib.files import (
    atomic_path,
    atomic_write,
    check_output,
    file_sha256,
    open_regular,
    parse_json,
    read_json,
    read_regular,
)

ROOT = Path(__file__).resolve().parents[2]


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


def test_what_killed_processes_left_is_removed_and_what_others_are_writing_is_not(tmp_path):
    script = (
        "import os, signal, sys\nfrom dnnlib.files import atomic_write\n"
        "with atomic_write(sys.argv[1]) as file:\n    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    path = tmp_path / "r.json"
    killed = subprocess.run([sys.executable, "-c", script, str(path)], cwd=ROOT)
    assert killed.returncode == -signal.SIGKILL
    assert os.listdir(tmp_path) == [".r.json.tmp"]
    (tmp_path / ".r.json.mine.tmp").write_text("not ours")
    with atomic_write(tmp_path / "other") as file:  # another file's leftovers stay
        file.write(b"other")
    with atomic_write(path) as outer:
        with atomic_write(path) as inner:  # as another process would
            inner.write(b"inner")
        assert path.read_bytes() == b"inner"
        outer.write(b"outer")
    assert path.read_bytes() == b"outer"
    assert sorted(os.listdir(tmp_path)) == [".r.json.mine.tmp", "other", "r.json"]
    (tmp_path / ".r.json.2.tmp").write_text("of a third process, killed beside two others")
    with atomic_write(path) as file:
        file.write(b"again")
    assert sorted(os.listdir(tmp_path)) == [".r.json.mine.tmp", "other", "r.json"]


def test_leftovers_of_other_users_stay(tmp_path, monkeypatch):
    left, really = tmp_path / ".a.1.tmp", os.open
    left.touch()

    def refuses(path, *options, **further):
        if str(path) == str(left):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return really(path, *options, **further)

    monkeypatch.setattr("dnnlib.files.os.open", refuses)
    with atomic_write(tmp_path / "a") as file:
        file.write(b"a")
    assert sorted(os.listdir(tmp_path)) == [".a.1.tmp", "a"]


def test_where_there_are_no_locks_temporary_names_are_random(tmp_path, monkeypatch):
    def refuses(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("dnnlib.files.fcntl.flock", refuses)
    with atomic_write(tmp_path / "a") as file:
        (name,) = os.listdir(tmp_path)
        assert re.fullmatch(r"\.a\.[0-9a-f]{16}\.tmp", name)
        file.write(b"a")
    assert os.listdir(tmp_path) == ["a"]


@pytest.mark.parametrize(
    ("name", "suffix", "message"),
    [
        ("stats.jsonl", ".png", "this is to be a .png file"),
        (".json", ".json", "this is to be a .json file"),
        ("", ".json", "this is to be a .json file"),
        ("x" * 300 + ".json", ".json", "File name too long"),
        ("folder.json", ".json", "is a folder"),
        ("file/sub/r.json", ".json", "file is no folder"),
        ("input.json", ".json", "is read by this command"),
        ("link.json", ".json", "is read by this command"),
        ("picture.json", ".json", "is no .json file"),
        ("pipe.json", ".json", "is no .json file"),
        ("dataset.json", ".json", "a data set's labels"),
        ("network.safetensors", ".safetensors", "is no .safetensors file"),
    ],
)
def test_outputs_that_would_destroy_something_are_refused(tmp_path, name, suffix, message):
    (tmp_path / "folder.json").mkdir()
    (tmp_path / "input.json").write_text("{}")
    (tmp_path / "link.json").symlink_to("input.json")
    (tmp_path / "dataset.json").write_text('{"labels": null}')
    (tmp_path / "picture.json").write_bytes(b"\x89PNG\r\n")
    (tmp_path / "network.safetensors").write_text("a long text without a header")
    (tmp_path / "file").write_text("")
    os.mkfifo(tmp_path / "pipe.json")
    with pytest.raises(ValueError, match=re.escape(message)):
        check_output(f"{tmp_path}/{name}" if name else "", suffix, [None, "https://host/x", tmp_path / "input.json"])


def test_outputs_that_may_be_written(tmp_path):
    (tmp_path / "r.json").write_text(' {"results": []}')
    (tmp_path / "empty.png").write_text("")
    for name, suffix in (("r.json", ".json"), ("empty.png", ".png"), ("new/deep/x.npz", ".npz")):
        check_output(tmp_path / name, suffix, [tmp_path / "input.json"])
    assert not (tmp_path / "new").exists()


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


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 100_000, "lists within lists, too deep"),
        ('{"a":' * 100_000, "lists within lists, too deep"),
        ("{", "not valid JSON .Expecting property name"),
        ("", "not valid JSON .Expecting value"),
        ("[1]", "not a JSON object but a list"),
        (b"\xff\xfe\x00", "not valid JSON .no text in UTF-8"),
    ],
)  # fmt: skip
def test_json_of_users_is_read_or_refused_in_one_line(text, message, tmp_path):
    path = tmp_path / "a.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=message) as error:
        read_json(path)
    assert str(error.value).startswith(f"{path}: ") and "\n" not in str(error.value)


def test_whole_numbers_never_overflow():
    text = f'{{"a": 18446744073709551615, "b": -{"1" * 30}, "c": {"9" * 400}}}'
    found = parse_json(text)
    assert found == {"a": 2**64 - 1, "b": -float("1" * 30), "c": float("inf")} and type(found["a"]) is int


def test_json_that_is_too_large_is_not_read(tmp_path):
    (tmp_path / "a.json").write_text('{"a": 12345678901234567890}')
    assert read_json(tmp_path / "a.json") == {"a": 12345678901234567890}
    with pytest.raises(OSError, match="too large: 27 bytes"):
        read_json(tmp_path / "a.json", 20)


def readers():
    """Everything that reads a single file of the user's, by name."""
    import networks
    from data.dataset import ImageDataset
    from generation.pictures import read_image
    from inverse.inputs import read_mask
    from inverse.results import read_object as read_output
    from inverse.tasks import load_task
    from metrics.features.demo import load_demo_classifier
    from metrics.references import load_reference
    from torch_utils import safe_pickle
    from toy.training import load_student
    from training.presets import NCVSDConfig, load_config
    from training.run.curves import read_curves

    return {
        "mask.png": read_mask,
        "results.json": lambda path: read_output(path, "again"),
        "task.yaml": load_task,
        "classifier.safetensors": load_demo_classifier,
        "reference.npz": load_reference,
        "image.png": read_image,
        "pickle.pkl": safe_pickle.load,
        "network.safetensors": networks.load,
        "student.safetensors": load_student,
        "data.zip": ImageDataset,
        "stats.jsonl": lambda path: read_curves(path.parent),
        "preset.json": lambda path: load_config(NCVSDConfig, str(path)),
    }


def test_no_reader_waits_for_a_pipe_or_reads_a_device(tmp_path):
    for name, read in readers().items():
        for kind in ("pipe", "device"):
            path = tmp_path / kind / name
            path.parent.mkdir(exist_ok=True)
            os.mkfifo(path) if kind == "pipe" else path.symlink_to("/dev/zero")
            with pytest.raises((ValueError, OSError)) as error:
                read(path)
            assert "\n" not in str(error.value)
