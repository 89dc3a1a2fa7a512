"""data_prep.sh: what is checked before hours of conversion, and what counts as there already."""

import zipfile

import numpy as np
import pytest
from PIL import Image

from tests.test_train_launchers import launch


@pytest.fixture
def pictures(tmp_path):
    folder = tmp_path / "pictures"
    for i in range(2):
        (folder / f"n{i}").mkdir(parents=True)
        Image.fromarray(np.full([20, 24, 3], 80 * i, dtype=np.uint8)).save(folder / f"n{i}" / "0.png")
    return folder


@pytest.fixture
def data(tmp_path):
    return tmp_path / "data"


def archive(path):
    path.parent.mkdir(exist_ok=True)
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("x", "x")


def refused(result, message, code=2):
    assert result.returncode == code and message in result.stderr, result.stdout + result.stderr
    assert "Traceback" not in result.stderr
    return result.stderr.splitlines()


def test_the_autoencoder_is_checked_before_the_conversion(pictures, data, vae, tmp_path):
    variables = dict(DATA_DIR=data, RESOLUTION=16)
    refused(launch("data_prep.sh", "img512", pictures, VAE=tmp_path / "vae", **variables), "no such folder", code=1)
    result = launch("data_prep.sh", "img512", pictures, VAE=vae, DATA_DIR=data, RESOLUTION=15)
    refused(result, "image size [15, 15] is not a multiple of 2", code=1)
    assert not data.exists()
    result = launch("data_prep.sh", "img64", pictures, VAE=tmp_path / "vae", **variables)  # needs none
    assert result.returncode == 0 and (data / "img64.zip").is_file(), result.stderr


def test_options_once_the_archive_is_there(pictures, data):
    archive(data / "img512.zip")
    archive(data / "img512-sd.zip")
    call = ("data_prep.sh", "img512", pictures)
    result = launch(*call, "--labels=none", DATA_DIR=data)
    assert result.returncode == 0, result.stderr
    assert "img512.zip is there" in result.stdout and "img512-sd.zip is there" in result.stdout
    assert "options of its conversion, without effect on what is there: --labels=none" in result.stdout
    assert "without effect" not in launch(*call, DATA_DIR=data).stdout
    refused(launch(*call, "--lables=none", DATA_DIR=data), "No such option")
    refused(launch(*call, "--labels=some", DATA_DIR=data), "'some' is not one of")


@pytest.mark.parametrize("name", ["img512.zip", "img512-sd.zip"])
@pytest.mark.parametrize("kind", ["empty", "folder", "cut"])
def test_what_only_has_the_name_of_an_archive(pictures, data, name, kind):
    archive(data / "img512.zip")
    archive(data / name)
    content = (data / name).read_bytes()
    (data / name).unlink()
    (data / name).mkdir() if kind == "folder" else (data / name).write_bytes(content[:20] if kind == "cut" else b"")
    lines = refused(launch("data_prep.sh", "img512", pictures, DATA_DIR=data), f"{data / name} is no ZIP archive")
    assert len(lines) == 1


def test_mistakes_in_the_call(pictures, data, tmp_path):
    (tmp_path / "file").write_text("x")
    for arguments, variables, message in (
        ([], {}, "usage: bash quick_start/data_prep.sh"),
        (["img32", pictures], {}, "there is no data set 'img32'"),
        (["img64", tmp_path / "absent"], {}, "no images"),
        (["img64", pictures], {"DATA_DIR": tmp_path / "file"}, "file is a file: name a folder"),
        (["img64", pictures], {"DATA_DIR": tmp_path / "file" / "data"}, "cannot be made: name another one in DATA_DIR"),
        (["img64", pictures], {"BATCH": "many"}, "BATCH is 'many'"),
    ):
        assert len(refused(launch("data_prep.sh", *arguments, **{"DATA_DIR": data} | variables), message)) == 1
    assert not data.exists() and (tmp_path / "file").read_text() == "x"


@pytest.mark.parametrize("script", ["data_prep.sh", "download.sh"])
def test_help(script):
    for arguments in (["--help"], ["img64", "-h"]):
        result = launch(script, *arguments)
        assert result.returncode == 0 and f"  bash quick_start/{script} " in result.stdout and not result.stderr


def test_a_zoo_that_is_a_file(tmp_path):
    (tmp_path / "zoo").write_text("x")
    refused(launch("download.sh", "edm2-ffhq256-xs", MODEL_ZOO=tmp_path / "zoo"), "zoo is a file: name a folder")
