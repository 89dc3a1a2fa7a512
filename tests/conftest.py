"""One thread per process, so that tests behave the same on a busy machine, and what several tests start from."""

import io
import json
import os
import signal
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch  # noqa: E402

import tests.startup.sitecustomize  # noqa: E402, F401
from tests.train_commands import SMALL  # noqa: E402

torch.set_num_threads(1)
# Where the tests are started in the background or under nohup, these are ignored, in all processes that they start too.
for number, handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(number) == signal.SIG_IGN:
        signal.signal(number, handler)

ROOT = Path(__file__).parents[1]
TINY_NET = dict(
    img_resolution=8,
    img_channels=1,
    label_dim=3,
    model_channels=16,
    channel_mult=[1, 2],
    num_blocks=1,
    attn_resolutions=[4],
    channels_per_head=16,
)


def write_images(path, images, labels=None):
    """A data set in the EDM2 layout from uint8 images [N,H,W] or [N,H,W,3] and class indices."""
    with zipfile.ZipFile(path, "w") as archive:
        names = [f"00000/img{i:08d}.png" for i in range(len(images))]
        for name, image in zip(names, images, strict=True):
            buffer = io.BytesIO()
            Image.fromarray(image).save(buffer, "png")
            archive.writestr(name, buffer.getvalue())
        if labels is not None:
            pairs = [[name, int(label)] for name, label in zip(names, labels, strict=True)]
            archive.writestr("dataset.json", json.dumps({"labels": pairs}))
    return path


@pytest.fixture(scope="session")
def tiny_images():
    """Writes data sets: call it with a path, a shape [N,H,W] or [N,H,W,3], and the number of classes (0 = none)."""

    def write(path, shape, classes):
        rng = np.random.default_rng(0)
        images = rng.integers(0, 256, shape, dtype=np.uint8)
        return write_images(path, images, np.arange(shape[0]) % classes if classes else None)

    return write


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory, tiny_images):
    """Path of a ZIP of 20 random grey 8x8 images in 3 classes."""
    return tiny_images(tmp_path_factory.mktemp("data") / "tiny.zip", (20, 8, 8), 3)


@pytest.fixture(scope="session")
def some_fashion(tmp_path_factory):
    """Path of a ZIP of 2,000 of the embedded images with their labels."""
    path = tmp_path_factory.mktemp("data") / "some.zip"
    with zipfile.ZipFile(ROOT / "assets" / "fashion16.zip") as whole, zipfile.ZipFile(path, "w") as some:
        names = [name for name in whole.namelist() if name.endswith(".png")][:2000]
        for name in names:
            some.writestr(name, whole.read(name))
        labels = dict(json.loads(whole.read("dataset.json"))["labels"])
        some.writestr("dataset.json", json.dumps({"labels": [[name, labels[name]] for name in names]}))
    return path


@pytest.fixture(scope="session")
def tiny_teacher(tmp_path_factory):
    """Path of a random conditional teacher for `tiny_data`."""
    import networks
    from networks.encoders import RGBEncoder
    from tests.golden_utils import fill_by_name

    path = tmp_path_factory.mktemp("teacher") / "teacher.safetensors"
    networks.save(path, fill_by_name(networks.Precond(**TINY_NET), 11), RGBEncoder())
    return path


@pytest.fixture
def distil(tmp_path, tiny_data, tiny_teacher):
    """Arguments of a small distillation into tmp_path/run."""
    paths = ["--net", tiny_teacher, "--data", tiny_data, "--outdir", tmp_path / "run"]
    return [*paths, *SMALL, "--eval-ts=20,39", "--duration=8"]


@pytest.fixture(scope="session")
def vae(tmp_path_factory):
    """Folder of a stand-in for Stable Diffusion's autoencoder: same layout, 4 latent channels, random weights, half the
    resolution.
    """
    diffusers = pytest.importorskip("diffusers")
    import torch

    torch.manual_seed(0)
    net = diffusers.AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=8,
    )
    folder = tmp_path_factory.mktemp("vae")
    net.save_pretrained(folder, safe_serialization=True)
    return folder


@pytest.fixture
def fake_python(tmp_path):
    """Folder of a `python` that sees 8 GPUs, and writes down what it should launch instead of doing so."""
    folder = tmp_path / "bin"
    folder.mkdir()
    script = folder / "python"
    script.write_text(
        f"""#!/usr/bin/env bash
case "$1:$2" in
    */quick_start/processes.py:* | */posterior_sample.py:*) printf '%s\\n' "$@" >"{tmp_path}/launched" ;;
    -c:*torch*) echo 8 ;;
    *) exec "{sys.executable}" "$@" ;;
esac
"""
    )
    script.chmod(0o755)
    return folder
