import io
import os
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from data.archives import DatasetError
from inverse.inputs import ImageFolder, InputError, MeasurementFolder, name_files, read_mask, upright


def test_names_are_unique_and_flat():
    assert name_files(["a/b.png", "c.jpg"], "x") == {"a-b": "a/b.png", "c": "c.jpg"}
    with pytest.raises(InputError, match="a.png and a.jpg would both be called a"):
        name_files(["a.jpg", "a.png"], "x")
    with pytest.raises(InputError, match="both be called a-b"):
        name_files(["a-b.png", "a/b.png"], "x")
    assert list(name_files(["C:\\a b.png", "é\x00\udcff.png"], "x")) == ["C--a b", "é--"]
    with pytest.raises(InputError, match="too long a name: at most 200 bytes") as caught:
        name_files(["日" * 67 + ".png"], "x")
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize("orientation", range(1, 9))
def test_photos_stand_upright_as_viewers_show_them(orientation, tmp_path):
    pixels = np.arange(12, dtype=np.uint8).reshape(3, 4) * 20
    exif = Image.Exif()
    exif[274] = orientation
    Image.fromarray(pixels).save(tmp_path / "photo.png", exif=exif)
    data = (tmp_path / "photo.png").read_bytes()
    shown = np.asarray(ImageOps.exif_transpose(Image.open(tmp_path / "photo.png")))
    assert np.array_equal(upright(pixels[None], data), shown[None])


def test_pixels_and_colours(tmp_path):
    ramp = np.arange(256, dtype=np.uint8).reshape(16, 16)
    Image.fromarray(ramp).save(tmp_path / "grey.png")
    Image.fromarray(np.stack([ramp] * 3, axis=-1)).save(tmp_path / "rgb.png")
    grey = ImageFolder(tmp_path, resolution=16, channels=1)
    assert grey.names == ["grey", "rgb"]
    torch.testing.assert_close(grey.read("grey"), torch.from_numpy(ramp / 127.5 - 1).float()[None])
    assert torch.equal(grey.read("rgb"), grey.read("grey"))
    assert ImageFolder(tmp_path, resolution=16, channels=3).read("grey").shape == (3, 16, 16)
    with pytest.raises(InputError, match="holds 2 images, fewer than the 3"):
        ImageFolder(tmp_path, resolution=16, channels=1, num=3)
    with pytest.raises(InputError, match="gives no classes"):
        grey.labels()


def test_damaged_and_missing_images(tmp_path):
    with pytest.raises(InputError, match="holds no images"):
        ImageFolder(tmp_path, resolution=16, channels=1)
    (tmp_path / "a.png").write_bytes(b"no image")
    with pytest.raises(DatasetError, match="a.png: damaged"):
        ImageFolder(tmp_path, resolution=16, channels=1).read("a")


def npz(**arrays):
    data = io.BytesIO()
    np.savez(data, **arrays)
    return data.getvalue()


def npy(array, **kwargs):
    data = io.BytesIO()
    np.save(data, array, **kwargs)
    return data.getvalue()


def bomb(size=1 << 24, packing=zipfile.ZIP_DEFLATED):
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w", packing) as archive:
        archive.writestr("y.npy", bytes(size))
    return data.getvalue()


def test_measurements_in_their_formats(tmp_path):
    y = np.random.default_rng(0).normal(size=(1, 4, 4))
    (tmp_path / "a.npz").write_bytes(npz(y=y, extra=np.zeros(3)))
    (tmp_path / "b.npy").write_bytes(npy(y.astype(np.float32)))
    Image.fromarray(np.zeros((4, 4), np.uint8)).save(tmp_path / "picture.png")
    folder = MeasurementFolder(tmp_path, shape=(1, 4, 4), pictures=True)
    assert folder.names == ["a", "b"]  # arrays go before pictures of them
    assert torch.equal(folder.read("a"), torch.from_numpy(y).float()) and torch.equal(
        folder.read("b"), folder.read("a")
    )
    (tmp_path / "a.npz").unlink()
    (tmp_path / "b.npy").unlink()
    assert (MeasurementFolder(tmp_path, shape=(3, 4, 4), pictures=True).read("picture") == -1).all()
    with pytest.raises(InputError, match="holds no measurements: .npz"):
        MeasurementFolder(tmp_path, shape=(1, 4, 4), pictures=False)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (npz(x=np.zeros((1, 4, 4))), "no array y"),
        (npz(y=np.zeros((1, 4, 5))), r"shape \[1, 4, 5\], and the operator gives \[1, 4, 4\]"),
        (npz(y=np.full((1, 4, 4), np.nan)), "finite real numbers"),
        (npz(y=np.full((1, 4, 4), 1e300)), "finite real numbers"),
        (npz(y=np.zeros((1, 4, 4), complex)), "finite real numbers|larger"),
        (npz(y=np.array([[["a"] * 4] * 4])), "finite real numbers"),
        (npy(np.array([print, None], dtype=object), allow_pickle=True), "not a readable array"),
        (npz(y=np.zeros((1, 400, 400))), "larger than a measurement"),
        (bomb(), "larger than a measurement"),
        (bomb(100, zipfile.ZIP_BZIP2), "packed in a way that numpy does not use"),
        (npz(y=np.zeros((1, 4, 4)))[:100], "not a readable array"),
        (b"\x93NUMPY\x01\x00\xff\xff", "not a readable array"),
        (b"\x93NUMPY\x01\x00" + (200).to_bytes(2, "little") + b"{'descr':" * 20, "not a readable array"),
        (b"", "not a readable array"),
    ],
)
def test_hostile_and_broken_measurements_are_refused(data, message, tmp_path):
    (tmp_path / "y.npz").write_bytes(data)
    with pytest.raises(InputError, match=message) as caught:
        MeasurementFolder(tmp_path, shape=(1, 4, 4), pictures=True).read("y")
    assert "y.npz" in str(caught.value) and "\n" not in str(caught.value)


def test_masks(tmp_path):
    Image.fromarray(np.array([[0, 255], [100, 200]], np.uint8)).save(tmp_path / "mask.png")
    assert np.array_equal(read_mask(tmp_path / "mask.png"), [[0, 1], [0, 1]])
    with pytest.raises(InputError, match="cannot be read"):
        read_mask(tmp_path / "none.png")
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "zero.png").symlink_to("/dev/zero")
    for name in ("pipe.png", "zero.png"):
        with pytest.raises(InputError, match=f"{name}: the mask cannot be read .not a regular file."):
            read_mask(tmp_path / name)
