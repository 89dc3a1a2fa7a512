"""dataset_tool.py: MNIST's files as a source, and latents."""

import struct

import numpy as np
import pytest

from data import latents
from data.dataset import ImageDataset
from tests.image_utils import picture
from tests.memory_utils import HAS_LIMITS, run_script
from tests.test_dataset_tool import idx_files, image_folder, pixels_of, run, save


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_idx(tmp_path, suffix):
    images = np.random.default_rng(0).integers(0, 256, [5, 28, 28], dtype=np.uint8)
    idx_files(tmp_path / "in", images, [3, 1, 4, 1, 5], suffix=suffix)
    idx_files(tmp_path / "in", images[:2], [0, 1], prefix="t10k-", suffix=suffix)
    options = ["--pad", 2, "--resolution", 16, "--filter", "box", "--max-images", 4]
    run("convert", "--source", tmp_path / "in", "--dest", tmp_path / "out.zip", *options)
    got, labels = pixels_of(tmp_path / "out.zip")
    sums = np.pad(images[:4].astype(int), ((0, 0), (2, 2), (2, 2))).reshape(4, 16, 2, 16, 2).sum((2, 4))
    assert np.array_equal(np.stack(got)[:, 0], (sums + 2) // 4) and labels == [3, 1, 4, 1]
    test_set = tmp_path / "in" / f"t10k-images-idx3-ubyte{suffix}"
    run("convert", "--source", test_set, "--dest", tmp_path / "test")
    assert pixels_of(tmp_path / "test")[1] == [0, 1]
    run("convert", "--source", test_set, "--dest", tmp_path / "plain", "--labels", "none")
    assert pixels_of(tmp_path / "plain")[1] == [None, None]


def test_idx_errors(tmp_path):
    images = np.zeros([3, 8, 8], dtype=np.uint8)
    cases = {
        "no labels": (images, None),
        "2 labels": (images, [1, 2]),
    }
    for expected, (array, labels) in cases.items():
        idx_files(tmp_path / expected, array, labels)
        assert expected in run("convert", "--source", tmp_path / expected, "--dest", tmp_path / "out", code=1)
    idx_files(tmp_path / "cut", images, [0, 1, 2], suffix="")
    path = tmp_path / "cut" / "train-images-idx3-ubyte"
    path.write_bytes(path.read_bytes()[:-1])
    assert str(path) in run("convert", "--source", tmp_path / "cut", "--dest", tmp_path / "out", code=1)
    path.write_bytes(struct.pack(">4i", 0x803, 2**31 - 1, 2**31 - 1, 2**31 - 1))
    assert str(path) in run("convert", "--source", path, "--dest", tmp_path / "out", code=1)
    path.write_bytes(b"text")
    assert str(path) in run("convert", "--source", path, "--dest", tmp_path / "out", code=1)
    idx_files(tmp_path / "two", images, [0, 1, 2], prefix="one-")
    idx_files(tmp_path / "two", images, [0, 1, 2], prefix="two-")
    assert "name one" in run("convert", "--source", tmp_path / "two", "--dest", tmp_path / "out", code=1)
    json_labels = ["--dest", tmp_path / "out", "--labels", "json"]
    assert "file beside it" in run("convert", "--source", tmp_path / "cut", *json_labels, code=1)


IDX_BOMBS = """
import gzip, pathlib, struct, sys
from tests.memory_utils import refuse_all
from data.convert import convert_dataset

folder = pathlib.Path(sys.argv[1])
files = {}
for name, shape, content in [
    ("many", (1 << 22, 28, 28), bytes(999)),
    ("large", (1, 1 << 16, 1 << 16), bytes(300 << 20)),
    ("labels", (1 << 28, 1, 1), b""),
    ("cut", (1 << 28, 1, 1), bytes(99)),
]:
    (folder / name).mkdir()
    files[name] = folder / name / "train-images-idx3-ubyte.gz"
    files[name].write_bytes(gzip.compress(struct.pack(">4i", 0x803, *shape) + content, 1))
    count = shape[0] + (name == "labels")
    labels = gzip.compress(struct.pack(">2i", 0x801, count) + bytes(300 << 20), 1)
    (folder / name / "train-labels-idx1-ubyte.gz").write_bytes(labels)
convert = lambda path: convert_dataset(str(path), str(folder / "out"))
try:
    convert(files["cut"])  # imports what is needed
except ValueError:
    pass
refuse_all(convert, files)
"""


@pytest.mark.skipif(not HAS_LIMITS, reason="needs Linux")
def test_idx_bombs_are_cheap(tmp_path):
    run_script(IDX_BOMBS, tmp_path)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("dest", ["latents", "latents.zip"])
def test_encode_and_decode(tmp_path, vae, dest):
    import torch

    from networks.encoders import StabilityVAEEncoder

    image_folder(tmp_path / "in", [(16, 16)] * 5)
    run("convert", "--source", tmp_path / "in", "--dest", tmp_path / "data.zip")
    common = ["--vae", vae, "--batch", 2, "--device", "cpu"]
    output = run("encode", "--source", tmp_path / "data.zip", "--dest", tmp_path / dest, *common)
    assert "5 files of 8x8x8" in output
    images, labels = pixels_of(tmp_path / "data.zip")
    latents, latent_labels = pixels_of(tmp_path / dest)
    assert latent_labels == labels and ImageDataset(tmp_path / dest)._names[4] == "00000/img-mean-std-00000004.npy"
    encoder = StabilityVAEEncoder(str(vae))
    expected = encoder.encode_pixels(torch.from_numpy(np.stack(images)))
    torch.testing.assert_close(torch.from_numpy(np.stack(latents)), expected, rtol=1e-4, atol=1e-5)

    run("decode", "--source", tmp_path / dest, "--dest", tmp_path / "decoded", *common, "--max-images", 3)
    decoded, decoded_labels = pixels_of(tmp_path / "decoded")
    assert decoded_labels == labels[:3] and decoded[0].shape == (3, 16, 16)
    with torch.no_grad():
        pixels = encoder.decode((expected[:3, :4]) * torch.tensor(encoder.scale).reshape(1, 4, 1, 1)
                                + torch.tensor(encoder.bias).reshape(1, 4, 1, 1))  # fmt: skip
    assert np.abs(np.stack(decoded).astype(int) - pixels.numpy()).max() <= 1


def test_encode_grey_and_errors(tmp_path, vae):
    for i in range(2):
        save(tmp_path / "in" / f"{i}.png", picture(8, 8, 1, seed=i))
    common = ["--vae", vae, "--device", "cpu"]
    run("encode", "--source", tmp_path / "in", "--dest", tmp_path / "latents", *common)
    assert ImageDataset(tmp_path / "latents").image_shape == [8, 4, 4]
    out = ["--dest", tmp_path / "out"]
    assert "pixels" in run("encode", "--source", tmp_path / "latents", *out, *common, code=1)
    assert "latents have 8" in run("decode", "--source", tmp_path / "in", *out, *common, code=1)
    missing = run("encode", "--source", tmp_path / "in", *out, "--vae", tmp_path / "none", "--device", "cpu", code=1)
    assert "no such folder" in missing
    save(tmp_path / "odd" / "0.png", picture(9, 9))
    assert "multiple of 2" in run("encode", "--source", tmp_path / "odd", *out, *common, code=1)
    assert "device" in run("encode", "--source", tmp_path / "in", *out, "--vae", vae, "--device", "toaster", code=1)
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*"))


@pytest.mark.parametrize("kind", ["torch", "memory"])
def test_out_of_memory_costs_one_line(tmp_path, monkeypatch, kind):
    import torch

    def fail(*args, **options):
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate") if kind == "torch" else MemoryError

    monkeypatch.setattr(latents, "StabilityVAEEncoder", fail)
    line = run("encode", "--source", tmp_path, "--dest", tmp_path / "out", code=1)
    assert "out of memory: try a smaller --batch" in line
