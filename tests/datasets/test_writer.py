"""Where finished data sets go, and what is left where they cannot go there."""

import os
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from data.dataset import DatasetError, ImageDataset
from data.pictures import encode_png
from data.writer import DatasetWriter

ROOT = Path(__file__).parents[2]
PNG = encode_png(np.zeros([3, 8, 8], dtype=np.uint8))


def write(dest, count=3):
    with DatasetWriter(dest) as writer:
        for i in range(count):
            writer.add(f"00000/img{i:08d}.png", PNG, i)


def test_link_to_an_empty_or_a_future_folder(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk")
    (tmp_path / "dangling").symlink_to(tmp_path / "new")
    for name, target in (("link", "disk"), ("dangling", "new")):
        write(tmp_path / name)
        assert (tmp_path / name).is_symlink() and len(ImageDataset(tmp_path / target)) == 3
        with pytest.raises(DatasetError, match="exists already"):
            DatasetWriter(tmp_path / name)
    assert sorted(os.listdir(tmp_path)) == ["dangling", "disk", "link", "new"]


def test_folders_that_cannot_be_replaced_are_refused_at_once(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    (tmp_path / "mount").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr(os.path, "ismount", lambda path: path == str(tmp_path / "mount"))
    for dest in (".", tmp_path / "here", tmp_path / "mount"):
        with pytest.raises(DatasetError, match="name a new folder inside it"):
            DatasetWriter(dest)
    write("data")
    assert len(ImageDataset(tmp_path / "here" / "data")) == 3
    assert sorted(os.listdir(tmp_path)) == ["here", "mount"]


@pytest.mark.parametrize("name", ["data", "data.zip"])
def test_finished_work_is_kept_where_somebody_takes_the_name(tmp_path, name):
    dest = tmp_path / name
    with pytest.raises(DatasetError, match="finished data set is in") as caught:
        with DatasetWriter(dest) as writer:
            writer.add("00000/img00000000.png", PNG, 0)
            dest.write_text("precious")
    (kept,) = set(os.listdir(tmp_path)) - {name}
    assert str(caught.value).endswith(kept) and str(caught.value).startswith(str(dest))
    assert dest.read_text() == "precious"
    assert ImageDataset(tmp_path / kept).get_raw_label(0) == 0


@pytest.mark.parametrize("name", ["data", "data.zip"])
@pytest.mark.parametrize("when", ["adding", "finishing"])
def test_full_disk(tmp_path, name, when):
    """As far as a process can tell: no file may grow beyond a limit."""
    names = [f"00000/img{i:08d}.png" for i in range(9)]
    with DatasetWriter(tmp_path / "whole" / name) as writer:
        for file in names:
            writer.add(file, bytes(40), 0)
    last = tmp_path / "whole" / ("data/dataset.json" if name == "data" else name)
    limit = last.stat().st_size - 1

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        with pytest.raises(DatasetError, match="cannot be written") as caught:
            with DatasetWriter(tmp_path / name) as writer:
                for file in names:
                    writer.add(file, bytes(40 if when == "finishing" else 10_000), 0)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert str(caught.value).startswith(f"{tmp_path / name}: ") and "\n" not in str(caught.value)
    assert os.listdir(tmp_path) == ["whole"]


KILLED = """
import os, sys
from data.writer import DatasetWriter
with DatasetWriter(sys.argv[1]) as writer:
    writer.add("00000/img00000000.png", b"x" * 100000, 0)
    print("writing", flush=True)
    sys.stdin.read()
"""


@pytest.mark.parametrize("name", ["data", "data.zip", "x" * 250 + ".zip"])
def test_leftovers_of_killed_processes_go_and_those_of_living_ones_stay(tmp_path, name):
    def start():
        process = subprocess.Popen(
            [sys.executable, "-c", KILLED, tmp_path / name], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        assert process.stdout.readline() == b"writing\n"
        return process

    with start() as killed, start() as living:
        killed.kill()
        killed.wait()
        assert len(os.listdir(tmp_path)) == 2
        before = set(os.listdir(tmp_path))
        other = DatasetWriter(tmp_path / name)
        assert set(os.listdir(tmp_path)) == before  # what the killed one left is taken
        with pytest.raises(KeyError), other:
            raise KeyError
        assert len(os.listdir(tmp_path)) == 1
        living.stdin.close()
        assert living.wait() == 0 and os.listdir(tmp_path) == [name]


def test_a_finished_data_set_without_a_name_is_no_leftover(tmp_path):
    with pytest.raises(DatasetError), DatasetWriter(tmp_path / "data"):
        (tmp_path / "data").write_text("")
    (tmp_path / "data").unlink()
    (kept,) = os.listdir(tmp_path)
    write(tmp_path / "data")
    assert sorted(os.listdir(tmp_path)) == [kept, "data"]
