"""Data sets made to harm: programs, bombs and formats that have no place in one."""

import io
import json
import os
import shutil
import struct
import subprocess
import zipfile
import zlib

import numpy as np
import pytest
import torch
from PIL import EpsImagePlugin, Image

from data import archives as dataset_files
from data.archives import ZipMembers
from data.dataset import DatasetError, ImageDataset, one_line
from tests.memory_utils import HAS_LIMITS, run_script

EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nquit\n%%EOF\n"


def png(*shape):
    stream = io.BytesIO()
    Image.fromarray(np.zeros(shape, dtype=np.uint8)).save(stream, format="png")
    return stream.getvalue()


def npy(array):
    stream = io.BytesIO()
    np.save(stream, array)
    return stream.getvalue()


def archive(path, files, compression=zipfile.ZIP_DEFLATED):
    with zipfile.ZipFile(path, "w", compression) as file:
        for name, data in files.items():
            file.writestr(name, data)
    return path


def error(path):
    """The one-line message of the DatasetError that opening and reading everything raises."""
    with pytest.raises(DatasetError) as info:
        dataset = ImageDataset(path)
        for i in range(len(dataset)):
            dataset[i]
    assert str(info.value).isprintable() and len(str(info.value)) < 400
    return str(info.value)


def test_postscript_starts_no_program(tmp_path, monkeypatch):
    started = []

    def start(*args, **kwargs):
        started.append(args)
        raise OSError("started")

    monkeypatch.setattr(EpsImagePlugin, "gs_binary", "gs")
    monkeypatch.setattr(shutil, "which", lambda *args, **kwargs: "gs")
    for name in ("check_call", "call", "run", "Popen"):
        monkeypatch.setattr(subprocess, name, start)
    assert "a.png" in error(archive(tmp_path / "a.zip", {"a.png": EPS}))
    assert started == []
    with pytest.raises(OSError, match="started"):  # what would have happened
        Image.open(io.BytesIO(EPS)).load()


def test_size_is_compared_before_decoding(tmp_path, monkeypatch):
    bomb = archive(tmp_path / "a.zip", {"a.png": png(8, 8), "b.png": png(3000, 3000)})
    dataset = ImageDataset(bomb)
    monkeypatch.setattr(Image.Image, "convert", None)
    with pytest.raises(DatasetError, match=r"b.png: shape \[1, 3000, 3000\] differs from \[1, 8, 8\]"):
        dataset[1]


@pytest.mark.parametrize("shape", [b"(True, 8, 8)", b"(8, 8, -8)", b"(8, 8, 0x" + b"f" * 5000 + b")", b"(8.0, 8, 8)"])
def test_npy_shapes(tmp_path, shape):
    honest = npy(np.zeros([1, 8, 8], dtype=np.float32))
    start, length = 10, int.from_bytes(honest[8:10], "little")
    header = honest[start : start + length].replace(b"(1, 8, 8)", shape)
    data = honest[:8] + len(header).to_bytes(2, "little") + header + honest[start + length :]
    assert "b.npy" in error(archive(tmp_path / "a.zip", {"a.npy": honest, "b.npy": data}))


def test_npy_of_another_shape_is_not_decoded(tmp_path, monkeypatch):
    files = {"a.npy": npy(np.zeros([1, 8, 8], dtype=np.float32)), "b.npy": npy(np.zeros([8, 64, 64], dtype=np.float32))}
    dataset = ImageDataset(archive(tmp_path / "a.zip", files))
    monkeypatch.setattr(np, "frombuffer", None)
    with pytest.raises(DatasetError, match=r"b.npy: shape \[8, 64, 64\] differs"):
        dataset[1]


@pytest.mark.parametrize("method", [zipfile.ZIP_LZMA, zipfile.ZIP_BZIP2, 99])
def test_compression_methods(tmp_path, method):
    path = archive(tmp_path / "a.zip", {"a.png": png(8, 8)}, zipfile.ZIP_STORED if method == 99 else method)
    if method == 99:
        data = bytearray(path.read_bytes())
        for offset in (data.index(b"PK\x03\x04") + 8, data.index(b"PK\x01\x02") + 10):
            data[offset] = method
        path.write_bytes(data)
    assert "a.zip:a.png: neither stored nor deflated" in error(path)


def test_out_of_memory_is_an_error_of_the_file(tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise MemoryError

    path = archive(tmp_path / "a.zip", {"a.png": png(8, 8), "dataset.json": b'{"labels": null}'})
    monkeypatch.setattr(json, "loads", fail)
    assert "dataset.json: not valid JSON (MemoryError)" in error(path)
    monkeypatch.undo()
    monkeypatch.setattr(ZipMembers, "read", fail)
    assert "dataset.json: cannot be read (MemoryError)" in error(path)


def test_labels_beyond_reason_are_not_parsed(tmp_path, monkeypatch):
    text = b'{"labels": [' + b" " * ((1 << 20) + 2 * 4096)
    path = archive(tmp_path / "a.zip", {"a.png": png(8, 8), "b.png": png(8, 8), "dataset.json": text})
    monkeypatch.setattr(json, "loads", None)
    assert "dataset.json: 1,056,780 bytes where at most 1,056,768 make sense" in error(path)


def lying_archive(path):
    """Its member unpacks to 256 MiB, and says that it unpacks to the size of a small PNG."""
    archive(path, {"a.png": png(8, 8) + bytes(256 << 20)})
    data = bytearray(path.read_bytes())
    for offset in (data.index(b"PK\x03\x04") + 22, data.index(b"PK\x01\x02") + 24):
        data[offset : offset + 4] = (100).to_bytes(4, "little")
    path.write_bytes(data)
    return path


def claims(width, height):
    """A PNG whose header claims a size."""
    data = bytearray(png(8, 8))
    data[16:24] = struct.pack(">2I", width, height)
    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    return bytes(data)


def webp(width, height):
    stream = io.BytesIO()
    Image.new("RGBA", (8, 8)).save(stream, format="webp", exif=b"Exif\0\0")  # in the form that states a canvas
    data = bytearray(stream.getvalue())
    data[24:30] = (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    return bytes(data)


def large_directory(path):
    """A sparse file of 64 GiB, whose end says that the rest is a directory."""
    size = 64 << 30
    with open(path, "wb") as file:
        file.seek(size)
        file.write(struct.pack("<4sQ2H2I4Q", b"PK\x06\x06", 44, 45, 45, 0, 0, 9, 9, size, 0))
        file.write(struct.pack("<4sIQI", b"PK\x06\x07", 0, size, 1))
        file.write(struct.pack("<4s4H2IH", b"PK\x05\x06", 0, 0, 0xFFFF, 0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0))
    return path


def test_nothing_but_regular_files_is_read(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    assert "not a regular file" in error(tmp_path / "pipe") and "not a regular file" in error("/dev/zero")
    for number, target in enumerate([tmp_path / "pipe", "/dev/zero", tmp_path]):
        for name in ("a.png", "a.npy", "dataset.json"):
            folder = tmp_path / f"{number}-{name}"
            folder.mkdir()
            (folder / "b.png").write_bytes(png(8, 8))
            (folder / name).symlink_to(target)
            if name == "a.npy":
                (folder / "b.png").unlink()
            if target != tmp_path:
                assert f"{folder / name}: cannot be read (not a regular file)" in error(folder)


@pytest.mark.parametrize("size", [(60000, 60000), (1, 2**31 - 1), (12000, 12000)])
def test_pictures_of_too_many_pixels_are_not_decoded(tmp_path, size, monkeypatch):
    path = archive(tmp_path / "a.zip", {"a.png": claims(*size)})
    monkeypatch.setattr(Image.Image, "convert", None)
    assert "a.zip:a.png: more than 89,478,485 pixels, too many for an image" in error(path)


MEMORY = """
import pathlib, sys
from tests.memory_utils import refuse_all
from tests.datasets.test_hostile_datasets import archive, large_directory, lying_archive, png, webp
from data.dataset import ImageDataset

folder = pathlib.Path(sys.argv[1])
first = png(8, 8)
labels = b"[" + b"[]," * (80 << 20) + b"[]]"
files = {
    "size of a member": lying_archive(folder / "lie.zip"),
    "labels": archive(folder / "labels.zip", {"a.png": first, "dataset.json": labels}),
    "image unlike the first": archive(folder / "image.zip", {"a.png": first, "b.png": png(12000, 12000, 3)}),
    "directory": large_directory(folder / "directory.zip"),
    "first image": archive(folder / "bomb.zip", {"a.png": bytes(400 << 20)}),
    "canvas": archive(folder / "canvas.zip", {"a.webp": webp(16383, 16383)}),
}
del labels
ImageDataset(archive(folder / "good.zip", {"a.png": first}))[0]  # imports what is needed
refuse_all(lambda path: [ImageDataset(path)[i] for i in range(2)], files)
"""


@pytest.mark.skipif(not HAS_LIMITS, reason="needs Linux")
def test_bombs_are_cheap(tmp_path):
    run_script(MEMORY, tmp_path)


def test_names_are_shown_in_one_line(tmp_path):
    assert "a?[31m?b.png" in error(archive(tmp_path / "a.zip", {"a\x1b[31m\nb.png": b"x"}))


def test_one_line_of_an_error_in_a_loader_process(tmp_path):
    path = archive(tmp_path / "a.zip", {"a.png": png(8, 8), "b.png": b"text"})
    wanted = f"{path}:b.png: damaged or not an image"
    dataset = ImageDataset(path)
    for workers in (0, 1):
        with pytest.raises(DatasetError) as info:
            list(torch.utils.data.DataLoader(dataset, num_workers=workers))
        assert one_line(info.value) == wanted
    assert "Traceback" in str(info.value)
    assert one_line(DatasetError("")) == "" and dataset_files.DatasetError is DatasetError
