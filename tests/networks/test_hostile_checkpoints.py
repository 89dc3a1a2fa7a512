import io
import json
import os
import pickle
import random
import struct
import sys
import zipfile

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import networks
from networks import published
from networks.encoders import RGBEncoder
from tests.memory_utils import HAS_LIMITS, run_script

DATA = "tests/data/"
EDM2, NCVSD = DATA + "edm2-tiny-0000000-0.100.pkl", DATA + "ncvsd-tiny-0000000-0.050.pkl"


class Evil:
    """Pickles as a shell command."""

    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


@pytest.fixture
def no_imports():
    networks.load(NCVSD)
    modules = set(sys.modules)
    yield
    assert set(sys.modules) == modules


def own_file(path):
    """Writes an honest file; returns its tensors, description and content."""
    net = networks.Precond(
        img_resolution=8, img_channels=3, label_dim=4, model_channels=8, channel_mult=[1, 2], num_blocks=1,
        attn_resolutions=[4], channels_per_head=8,
    )  # fmt: skip
    networks.save(path, net, RGBEncoder())
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    description = json.loads(header["__metadata__"]["ncvsd"])
    return {k: v.clone() for k, v in net.state_dict().items()}, description, data


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    return own_file(tmp_path_factory.mktemp("own") / "net")


def write(path, tensors, description):
    text = description if isinstance(description, str) else json.dumps(description)
    save_file(tensors, path, metadata={"ncvsd": text})
    return path


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_blocks": 10**9}, "num_blocks has a value"),
        ({"num_blocks": True}, "num_blocks has a value"),
        ({"model_channels": 8192, "channel_mult": [64] * 4, "num_blocks": 64}, "cannot hold|cannot be built"),
        ({"model_channels": 1e300}, "model_channels has a value"),
        ({"label_dim": -1}, "label_dim has a value"),
        ({"img_resolution": 2**40}, "img_resolution has a value"),
        ({"img_resolution": 8192}, "img_resolution has a value"),
        ({"img_resolution": 4096}, "attention between 2048x2048 pixels"),
        ({"img_resolution": 1024, "channel_mult": [1] * 5, "model_channels": 512}, "1024 pixels in 512 channels"),
        ({"img_resolution": 1024, "channel_mult": [1] * 5, "img_channels": 1024}, "would fill any memory"),
        ({"channel_mult": []}, "cannot be built"),
        ({"channel_mult": [1, [2, [3]]]}, "channel_mult has a value"),
        ({"channel_mult": [1] * 1000}, "channel_mult has a value"),
        ({"dropout": float("nan")}, "dropout has a value"),
        ({"use_fp16": "yes"}, "use_fp16 has a value"),
        ({"sigma_data": 0}, "sigma_data has a value"),
        ({"class_name": "os.system"}, "unknown architecture argument 'class_name'"),
        ({"self": 1}, "unknown architecture argument 'self'"),
        ({"__class__": "x"}, "unknown architecture argument"),
        ({"model_channels": 16}, "has the shape"),
        ({"label_dim": 0}, "unexpected weights: unet.emb_label.weight"),
        ({"num_blocks": 2}, "missing weights: .* and [0-9]+ more"),
    ],
)
def test_hostile_architecture(changes, message, own, tmp_path, no_imports):
    tensors, description, _ = own
    description = {**description, "init_kwargs": {**description["init_kwargs"], **changes}}
    with pytest.raises(networks.CheckpointError, match=message) as caught:
        networks.load(write(tmp_path / "net", tensors, description))
    assert str(caught.value).startswith(str(tmp_path / "net")) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "os.system"}, "unknown kind os.system"),
        ({"kind": ["Precond"]}, "unknown kind"),
        ({"kind": "GenerativeDenoiser"}, "gamma"),
        ({"kind": "GenerativeDenoiser", "gamma": 0.4, "init_sigma": float("inf")}, "init_sigma"),
        ({"kind": "GenerativeDenoiser", "gamma": 0.4, "init_sigma": 80}, "missing weights: model"),
        ({"init_kwargs": [1]}, "not a dictionary"),
        ({"init_kwargs": {}}, "arguments missing: img_resolution, img_channels, label_dim"),
        ({"encoder": {"type": "rgb", "batch_size": 1}}, "encoder"),
        ({"encoder": {"type": "os.system"}}, "encoder"),
        ({"encoder": None}, "encoder"),
        ({"encoder": {"type": "sd-vae", "vae_name": ["x"]}}, "encoder"),
        ({"encoder": {"type": "sd-vae", "scale": "x", "bias": "y"}}, "encoder"),
        ({"provenance": [1]}, "provenance is not a JSON object"),
        ({"format_version": 99}, "format version 99"),
    ],
)
def test_hostile_description(changes, message, own, tmp_path, no_imports):
    tensors, description, _ = own
    with pytest.raises(networks.CheckpointError, match=message):
        networks.load(write(tmp_path / "net", tensors, {**description, **changes}))


@pytest.mark.parametrize("text", ["", "{", "[1]", "null", "[" * 100_000, "1" * 100_000, '{"format_version": 1}'])
def test_description_that_is_none(text, own, tmp_path):
    with pytest.raises(networks.CheckpointError):
        networks.load(write(tmp_path / "net", own[0], text))


def test_safetensors_of_somebody_else(own, tmp_path):
    save_file(own[0], tmp_path / "net", metadata={"format": "pt"})
    with pytest.raises(networks.CheckpointError, match="not written by NCVSD"):
        networks.load(tmp_path / "net")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e300])
@pytest.mark.parametrize("key", ["unet.out_gain", "unet.out_conv.weight", "unet.emb_fourier.freqs"])
def test_weights_that_are_not_finite(value, key, own, tmp_path):
    tensors, description, _ = own
    spoilt = tensors[key].clone().double()
    spoilt.view(-1)[-1] = value  # 1e300 becomes infinite in float32
    path = write(tmp_path / "net", {**tensors, key: spoilt}, description)
    with pytest.raises(networks.NonFiniteError, match=f"infinite weights in {key}: the file") as caught:
        networks.load(path)
    assert str(caught.value).startswith(f"{path}: NaN or infinite weights in") and "\n" not in str(caught.value)
    found = networks.load(path, check_finite=False).net.state_dict()[key]
    assert not found.isfinite().all()


def test_the_largest_numbers_of_float16_are_finite(own, tmp_path):
    tensors = {k: torch.full(v.shape, 65504.0, dtype=torch.float16) for k, v in own[0].items()}
    networks.load(write(tmp_path / "net", tensors, own[1]))


def test_published_weights_that_are_not_finite(tmp_path):
    data = open(EDM2, "rb").read()
    at = data.index(networks.load(EDM2).net.state_dict()["unet.out_conv.weight"].half().numpy().tobytes())
    data = data[:at] + b"\xff\x7f" + data[at + 2 :]  # NaN in float16
    (tmp_path / "net.pkl").write_bytes(data)
    with pytest.raises(networks.NonFiniteError, match="infinite weights in unet.out_conv.weight: the file"):
        networks.load(tmp_path / "net.pkl")


def test_a_folder_instead_of_a_file(own, tmp_path):
    with pytest.raises(networks.CheckpointError, match="this is a folder: give a file, .safetensors or .pkl"):
        networks.load(tmp_path)
    for name in ("network-snapshot-000000008-0.100.safetensors", "network-snapshot-000000016-0.100.safetensors"):
        write(tmp_path / name, *own[:2])
    with pytest.raises(networks.CheckpointError, match="give a network in it, such as network-snapshot-000000016"):
        networks.load(tmp_path)


def test_weights_that_are_not_floats(own, tmp_path):
    tensors, description, _ = own
    tensors = {**tensors, "unet.out_gain": torch.tensor(3)}
    with pytest.raises(networks.CheckpointError, match="unet.out_gain is stored as torch.int64"):
        networks.load(write(tmp_path / "net", tensors, description))


def rewritten(data, change):
    """A safetensors file with a changed header."""
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data[8 + length :]


def shift(key, begin, end):
    def change(header):
        offsets = header[key]["data_offsets"]
        header[key]["data_offsets"] = [offsets[0] + begin, offsets[1] + end]

    return change


def deflated(size):
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(size))
    return stream.getvalue()


def nested(payload):
    """A pickle whose 'ema' unpacks bytes as torch.save wrote them."""
    return (
        b"\x80\x04}X\x03\x00\x00\x00emaX\x0d\x00\x00\x00torch.storageX\x10\x00\x00\x00_load_from_bytes\x93B"
        + struct.pack("<I", len(payload)) + payload + b"\x85Rs."
    )  # fmt: skip


KEY = "unet.out_conv.weight"
HOSTILE = {
    "header of 2^63 bytes": lambda d, m: struct.pack("<Q", 2**63) + b"{" + d,
    "header of 4 GiB": lambda d, m: struct.pack("<Q", 2**32) + b"{" + d,
    "header beyond the file": lambda d, m: struct.pack("<Q", len(d) + 1) + d[8:],
    "header that is not JSON": lambda d, m: d[:8] + b"{" * 200 + d[208:],
    "offsets out of range": lambda d, m: rewritten(d, shift(KEY, 2**40, 2**40)),
    "offsets that overlap": lambda d, m: rewritten(d, shift(KEY, -64, -64)),
    "offsets backwards": lambda d, m: rewritten(d, shift(KEY, 10**6, 0)),
    "size unlike the shape": lambda d, m: rewritten(d, lambda h: h[KEY].update(shape=[2**31, 2**31])),
    "unknown type": lambda d, m: rewritten(d, lambda h: h[KEY].update(dtype="OBJECT")),
    "safetensors, truncated": lambda d, m: d[:-1],
    "safetensors, half": lambda d, m: d[: len(d) // 2],
    "nothing": lambda d, m: b"",
    "one byte": lambda d, m: b"\x80",
    "web page": lambda d, m: b"<!DOCTYPE html><html>",
    "text": lambda d, m: b"version https://git-lfs.github.com/spec/v1",
    "random bytes": lambda d, m: random.Random(0).randbytes(10_000),
    "random bytes after a pickle's start": lambda d, m: b"\x80\x04\x95" + random.Random(0).randbytes(10_000),
    "ZIP bomb": lambda d, m: deflated(256 << 20),
    "ZIP bomb in a pickle": lambda d, m: nested(deflated(256 << 20)),
    "hostile pickle in a pickle": lambda d, m: nested(pickle.dumps(Evil(f"touch {m}"))),
    "os.system as the network": lambda d, m: pickle.dumps({"ema": Evil(f"touch {m}")}),
    "os.system beside the network": lambda d, m: open(EDM2, "rb").read()[:-2] + pickle.dumps(Evil(f"touch {m}"))[2:],
    "object array": lambda d, m: pickle.dumps({"ema": np.array([Evil(f"touch {m}")], dtype=object)}),
    "pickle of a list": lambda d, m: pickle.dumps([1, 2, 3]),
    "pickle of statistics": lambda d, m: open(DATA + "dataset-ref-tiny.pkl", "rb").read(),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_file(case, own, tmp_path, no_imports):
    path, mark = tmp_path / "net.pkl", tmp_path / "mark"
    path.write_bytes(HOSTILE[case](own[2], mark))
    environment = dict(os.environ)
    with pytest.raises(networks.CheckpointError) as caught:
        networks.load(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value) and len(str(caught.value)) < 500
    assert os.listdir(tmp_path) == ["net.pkl"] and dict(os.environ) == environment


MEMORY = """
import pathlib, sys
import networks
from tests.memory_utils import refuse_all
from tests.networks.test_hostile_checkpoints import HOSTILE, NCVSD, own_file, write

folder = pathlib.Path(sys.argv[1])
tensors, description, honest = own_file(folder / "own")
files = {}
for number, (case, make) in enumerate(HOSTILE.items()):
    files[case] = folder / str(number)
    files[case].write_bytes(make(honest, folder / "mark"))
for changes in ({"model_channels": 8192, "channel_mult": [8] * 4, "num_blocks": 8}, {"label_dim": 1_000_000}):
    kwargs = {**description["init_kwargs"], **changes}
    files[str(changes)] = write(folder / f"net{len(files)}", tensors, {**description, "init_kwargs": kwargs})
networks.load(folder / "own"), networks.load(NCVSD)  # imports what is needed
refuse_all(networks.load, files)
"""


@pytest.mark.skipif(not HAS_LIMITS, reason="needs Linux")
def test_hostile_files_are_cheap(tmp_path):
    run_script(MEMORY, tmp_path)


@pytest.mark.parametrize("case", ["os.system as the network", "hostile pickle in a pickle", "ZIP bomb in a pickle"])
def test_unsafe_is_told_apart(case, own, tmp_path):
    (tmp_path / "net").write_bytes(HOSTILE[case](own[2], tmp_path / "mark"))
    with pytest.raises(networks.UnsafeCheckpointError, match="refused"):
        networks.load(tmp_path / "net")


def test_modules_that_contain_themselves():
    record = published.Record("torch_utils.persistence", "Precond")
    record.state = {"_modules": {"unet": record}}
    with pytest.raises(networks.CheckpointError, match="not a tree"):
        published._collect_tensors(record)


@pytest.mark.parametrize("part", ["_parameters", "_buffers", "_modules"])
def test_modules_that_share_a_large_dictionary(part):
    shared = {f"x{i}": None for i in range(1000)}
    blocks = {f"b{i}": published.Record("torch_utils.persistence", "Block", {part: shared}) for i in range(1000)}
    record = published.Record("torch_utils.persistence", "Precond", {"_modules": blocks})
    with pytest.raises(networks.CheckpointError, match="more than 100000 weights and modules"):
        published._collect_tensors(record)


@pytest.mark.parametrize("seed", range(3))
def test_flipped_bytes(seed, own, tmp_path):
    rng = random.Random(seed)
    data = [open(EDM2, "rb").read(), open(NCVSD, "rb").read(), own[2]][seed]
    for _ in range(40):
        spoilt = bytearray(data)
        for _ in range(3):
            spoilt[rng.randrange(rng.choice([len(data), 8000]))] = rng.randrange(256)
        (tmp_path / "net").write_bytes(spoilt)
        try:
            networks.load(tmp_path / "net")
        except ValueError as error:
            assert isinstance(error, networks.CheckpointError)
