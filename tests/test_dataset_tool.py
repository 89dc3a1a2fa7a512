"""dataset_tool.py: sources, labels, latents, and errors."""

import gzip
import hashlib
import io
import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

import dataset_tool
from data.convert import transform_image
from data.dataset import ImageDataset
from tests.image_utils import picture

ROOT = Path(__file__).parents[1]


def run(*args, code=0):
    result = CliRunner().invoke(dataset_tool.cli, [str(a) for a in args])
    assert result.exit_code == code, result.output
    if code:  # one clear line, nothing else
        assert result.exception is None or isinstance(result.exception, SystemExit)
        lines = [line for line in result.output.splitlines() if "Error" in line]
        assert len(lines) == 1 and result.output.rstrip().endswith(lines[0])
        return lines[0]
    return result.output


def save(path, image):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image[0] if len(image) == 1 else np.ascontiguousarray(image.transpose(1, 2, 0))).save(path)


def pixels_of(path):
    dataset = ImageDataset(path)
    return [dataset[i][0] for i in range(len(dataset))], [dataset.get_raw_label(i) for i in range(len(dataset))]


# ----------------------------------------------------------------------------
# convert


def image_folder(path, sizes, channels=3):
    """Class folders b, a, ... with one PNG each; returns images in sorted order."""
    images = {}
    for i, (height, width) in enumerate(sizes):
        name = f"{'ba'[i % 2]}/x{i}.png"
        images[name] = picture(height, width, channels, seed=i)
        save(path / name, images[name])
    return [images[name] for name in sorted(images)], [int(name[0] == "b") for name in sorted(images)]


@pytest.mark.parametrize("dest", ["out", "out.zip"])
@pytest.mark.parametrize("transform", ["center-crop", "center-crop-dhariwal", "none"])
def test_convert_folder(tmp_path, dest, transform):
    images, labels = image_folder(tmp_path / "in", [(20, 30), (30, 20), (16, 16), (40, 41)])
    output = run(
        "convert", "--source", tmp_path / "in", "--dest", tmp_path / dest,
        "--resolution", "16x16", "--transform", transform,
    )  # fmt: skip
    assert "4 files of 3x16x16" in output
    got, got_labels = pixels_of(tmp_path / dest)
    assert got_labels == labels == [0, 0, 1, 1]
    for image, result in zip(images, got, strict=True):
        assert np.array_equal(result, transform_image(image, transform, (16, 16)))
    names = ImageDataset(tmp_path / dest)._names
    assert names == [f"00000/img{i:08d}.png" for i in range(4)]
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


def test_archive_is_stored_uncompressed_and_deterministic(tmp_path):
    image_folder(tmp_path / "in", [(16, 16)] * 3)
    for name in ("a.zip", "b.zip"):
        run("convert", "--source", tmp_path / "in", "--dest", tmp_path / name)
        time.sleep(0.01)
    assert (tmp_path / "a.zip").read_bytes() == (tmp_path / "b.zip").read_bytes()
    with zipfile.ZipFile(tmp_path / "a.zip") as archive:
        pngs = [i for i in archive.infolist() if i.filename.endswith(".png")]
        assert len(pngs) == 3 and all(i.compress_type == zipfile.ZIP_STORED for i in pngs)
        assert min(i.file_size for i in pngs) > 16 * 16 * 3
    run("convert", "--source", tmp_path / "in", "--dest", tmp_path / "c.zip", "--compress")
    assert (tmp_path / "c.zip").stat().st_size < (tmp_path / "a.zip").stat().st_size
    for one, other in zip(pixels_of(tmp_path / "a.zip")[0], pixels_of(tmp_path / "c.zip")[0], strict=True):
        assert np.array_equal(one, other)


def test_zip_and_folder_give_the_same(tmp_path):
    image_folder(tmp_path / "in", [(20, 30), (30, 20), (17, 17)])
    with zipfile.ZipFile(tmp_path / "in.zip", "w") as archive:
        for path in (tmp_path / "in").rglob("*.png"):
            archive.write(path, path.relative_to(tmp_path / "in"))
    for source in ("in", "in.zip"):
        run("convert", "--source", tmp_path / source, "--dest", tmp_path / f"{source}-out", "--resolution", 8)
    files = [
        {p.relative_to(d): p.read_bytes() for p in d.rglob("*") if p.is_file()}
        for d in (tmp_path / "in-out", tmp_path / "in.zip-out")
    ]
    assert files[0] == files[1] and len(files[0]) == 4


def test_jpeg_grey_rgb_and_max_images(tmp_path):
    for i in range(4):
        save(tmp_path / "in" / f"{i}.jpg", picture(16, 16, 1, seed=i))
    run("convert", "--source", tmp_path / "in", "--dest", tmp_path / "grey", "--max-images", 3)
    run("convert", "--source", tmp_path / "in", "--dest", tmp_path / "rgb", "--rgb")
    grey, labels = pixels_of(tmp_path / "grey")
    rgb, _ = pixels_of(tmp_path / "rgb")
    assert len(grey) == 3 and labels == [None] * 3 and grey[0].shape == (1, 16, 16)
    assert all(np.array_equal(np.repeat(g, 3, axis=0), c) for g, c in zip(grey, rgb, strict=False))
    assert json.loads((tmp_path / "grey" / "dataset.json").read_text()) == {"labels": None}


def test_labels_from_json_folders_and_none(tmp_path):
    _, by_folder = image_folder(tmp_path / "in", [(8, 8)] * 4)
    names = sorted(str(p.relative_to(tmp_path / "in")) for p in (tmp_path / "in").rglob("*.png"))
    (tmp_path / "in" / "dataset.json").write_text(json.dumps({"labels": [[n, 7 + i] for i, n in enumerate(names)]}))
    expected = {"auto": [7, 8, 9, 10], "json": [7, 8, 9, 10], "folders": by_folder, "none": [None] * 4}
    for labels, values in expected.items():
        run("convert", "--source", tmp_path / "in", "--dest", tmp_path / labels, "--labels", labels)
        assert pixels_of(tmp_path / labels)[1] == values
    run("convert", "--source", tmp_path / "json", "--dest", tmp_path / "again")
    assert pixels_of(tmp_path / "again")[1] == expected["json"]
    vectors = {"labels": [[n, [0.5, i]] for i, n in enumerate(names)]}
    (tmp_path / "in" / "dataset.json").write_text(json.dumps(vectors))
    run("convert", "--source", tmp_path / "in", "--dest", tmp_path / "vectors.zip")
    assert pixels_of(tmp_path / "vectors.zip")[1] == [[0.5, i] for i in range(4)]
    (tmp_path / "none" / "dataset.json").unlink()
    (tmp_path / "none" / "00000").rename(tmp_path / "none" / "00001")
    save(tmp_path / "none" / "00000" / "img00000000.png", picture(8, 8))
    run("convert", "--source", tmp_path / "none", "--dest", tmp_path / "shards")  # numbered folders are no classes
    assert pixels_of(tmp_path / "shards")[1] == [None] * 5


def idx_files(folder, images, labels, prefix="train-", suffix=".gz"):
    folder.mkdir(exist_ok=True)
    pack = gzip.compress if suffix else bytes
    header = struct.pack(">4i", 0x803, *images.shape)
    (folder / f"{prefix}images-idx3-ubyte{suffix}").write_bytes(pack(header + images.tobytes()))
    if labels is not None:
        header = struct.pack(">2i", 0x801, len(labels))
        (folder / f"{prefix}labels-idx1-ubyte{suffix}").write_bytes(pack(header + bytes(labels)))


def test_convert_reads_nothing_but_regular_files(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    images = np.zeros([3, 8, 8], dtype=np.uint8)
    for target in (tmp_path / "pipe", Path("/dev/zero")):
        for name in ("x/a.png", "x/dataset.json", "x/train-images-idx3-ubyte.gz", "x/train-labels-idx1-ubyte"):
            idx_files(tmp_path / "x", images, None if "labels" in name else [0, 1, 2], suffix="")
            save(tmp_path / "x" / "b.png", picture(8, 8))
            if "labels" not in name:
                (tmp_path / "x" / "train-images-idx3-ubyte").unlink()
            (tmp_path / name).symlink_to(target)
            line = run("convert", "--source", tmp_path / "x", "--dest", tmp_path / "out", code=1)
            assert f"{tmp_path / name}: cannot be read (not a regular file)" in line
            shutil.rmtree(tmp_path / "x")


@pytest.mark.parametrize("transform", ["none", "center-crop-dhariwal"])
def test_scaling_makes_no_giants_of_narrow_pictures(tmp_path, transform):
    save(tmp_path / "in" / "a.png", np.zeros([1, 500_000, 1], dtype=np.uint8))
    options = ["--transform", transform, "--resolution", 256]
    line = run("convert", "--source", tmp_path / "in", "--dest", tmp_path / "out", *options, code=1)
    assert f"{tmp_path / 'in' / 'a.png'}: 1x500000 scaled to " in line and "too many pixels" in line


def test_convert_errors_leave_nothing(tmp_path):
    image_folder(tmp_path / "in", [(16, 16)] * 4)

    def message(*options, source="in", code=1):
        line = run("convert", "--source", tmp_path / source, "--dest", tmp_path / "out.zip", *options, code=code)
        assert not (tmp_path / "out.zip").exists() and not list(tmp_path.glob(".out*"))
        run("convert", "--source", tmp_path / source, "--dest", tmp_path / "out", *options, code=code)
        assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*"))
        return line

    assert "missing" in message(source="missing")
    (tmp_path / "empty").mkdir()
    assert "no image" in message(source="empty")
    assert "needs a resolution" in message("--transform", "center-crop")
    assert "square" in message("--transform", "center-crop-dhariwal", "--resolution", "16x8")
    assert "wider" in message("--transform", "center-crop-wide", "--resolution", "8x16")
    assert "smaller than the resolution" in message("--transform", "center-crop-wide", "--resolution", "64x32")
    assert "not a size" in message("--resolution", "big", code=2)
    assert "dataset.json" in message("--labels", "json")
    assert "16x8 is not square" in message("--resolution", "16x8")
    bad = tmp_path / "in" / "b" / "x2.png"
    good = bad.read_bytes()
    bad.write_bytes(good[:50])
    assert str(bad) in message()
    save(bad, picture(17, 17))
    assert str(bad) in message() and "17x17 differs from 16x16" in message()
    save(bad, picture(16, 16, 1))
    assert str(bad) in message() and "--rgb" in message()
    bad.write_bytes(good)
    names = sorted(str(p.relative_to(tmp_path / "in")) for p in (tmp_path / "in").rglob("*.png"))
    (tmp_path / "in" / "dataset.json").write_text(json.dumps({"labels": [[n, 0] for n in names[:-1]]}))
    assert names[-1] in message()
    (tmp_path / "in" / "dataset.json").unlink()
    save(tmp_path / "in" / "loose.png", picture(16, 16))
    assert "loose.png" in message("--labels", "folders")


@pytest.mark.parametrize("dest", ["out", "out.zip"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_convert_stopped_by_a_signal_leaves_nothing_for_the_next_run(tmp_path, dest, number):
    image_folder(tmp_path / "in", [(16, 16)] * 4)
    stop = f"""
import os, signal
from data import convert as dataset_convert
encode, encoded = dataset_convert.encode_png, []

def stop(*args):
    encoded.append(0)
    if len(encoded) == 3:
        os.kill(os.getpid(), {int(number)})
    return encode(*args)

dataset_convert.encode_png = stop
"""
    arguments = ["convert", "--source", str(tmp_path / "in"), "--dest", str(tmp_path / dest)]
    code = f"{stop}\nimport dataset_tool\ndataset_tool.cli({arguments})"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    if number == signal.SIGKILL:
        assert result.returncode == -number and len(os.listdir(tmp_path)) == 2
    else:
        assert result.returncode == 128 + number and os.listdir(tmp_path) == ["in"], result.stderr
        assert "Traceback" not in result.stderr and f"Error: stopped by {number.name}" in result.stderr
    run(*arguments)
    assert sorted(os.listdir(tmp_path)) == ["in", dest] and len(ImageDataset(tmp_path / dest)) == 4


def test_existing_destination_is_kept(tmp_path):
    image_folder(tmp_path / "in", [(16, 16)] * 2)
    (tmp_path / "out.zip").write_text("precious")
    (tmp_path / "out").mkdir()
    run("convert", "--source", tmp_path / "in", "--dest", tmp_path / "out")  # empty: accepted
    for name in ("out", "out.zip"):
        assert "exists" in run("convert", "--source", tmp_path / "in", "--dest", tmp_path / name, code=1)
    assert (tmp_path / "out.zip").read_text() == "precious" and len(ImageDataset(tmp_path / "out")) == 2
    (tmp_path / "file").write_text("")
    run("convert", "--source", tmp_path / "in", "--dest", tmp_path / "file" / "x", code=1)


def test_names_that_are_not_utf8_cost_no_data_set(tmp_path):
    image_folder(tmp_path / "in", [(16, 16)] * 2)
    source, dest = (os.fsencode(tmp_path) + name for name in (b"/caf\xe9", b"/caf\xe9.zip"))
    os.rename(tmp_path / "in", source)
    command = [sys.executable, "dataset_tool.py", "convert", "--source", source, "--dest", dest]
    options = dict(cwd=ROOT, capture_output=True, env={**os.environ, "PYTHONIOENCODING": "utf-8:strict"})
    result = subprocess.run(command, **options)
    assert result.returncode == 0 and b"\\udce9.zip: 2 files of 3x16x16" in result.stdout, result.stderr
    assert len(ImageDataset(os.fsdecode(dest))) == 2
    result = subprocess.run(command, **options)
    assert result.returncode == 1 and result.stderr.endswith(
        b"exists already and is kept; choose another destination or remove it\n"
    )


def test_asset_is_what_its_readme_says():
    """The record of how the data were made: checksum, number of images, licence."""
    readme = (ROOT / "assets" / "README.md").read_text()
    assert hashlib.sha256((ROOT / "assets" / "fashion16.zip").read_bytes()).hexdigest() in readme
    assert "Zalando" in (ROOT / "assets" / "fashion16-LICENSE.txt").read_text()


# ----------------------------------------------------------------------------
# encode and decode, with a tiny random stand-in for Stable Diffusion's autoencoder


def test_png_of_an_image_is_read_back(tmp_path):
    image = picture(8, 8)
    stream = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(image.transpose(1, 2, 0))).save(stream, format="webp", lossless=True)
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.webp").write_bytes(stream.getvalue())
    run("convert", "--source", tmp_path / "in", "--dest", tmp_path / "out")
    assert np.array_equal(pixels_of(tmp_path / "out")[0][0], image)


@pytest.mark.parametrize("dest", ["out", "out.zip"])
def test_two_conversions_to_one_destination_leave_one_whole_data_set(tmp_path, dest):
    image_folder(tmp_path / "in", [(16, 16)] * 40)
    command = [sys.executable, str(ROOT / "dataset_tool.py"), "convert", "--source", str(tmp_path / "in"), "--dest"]
    both = [subprocess.Popen([*command, str(tmp_path / dest)], stderr=subprocess.PIPE, text=True) for _ in range(2)]
    said = [process.communicate(timeout=120)[1] for process in both]
    assert min(process.returncode for process in both) == 0, said
    for process, text in zip(both, said, strict=True):
        assert process.returncode in (0, 1) and "Traceback" not in text, text
    assert len(ImageDataset(tmp_path / dest)) == 40
