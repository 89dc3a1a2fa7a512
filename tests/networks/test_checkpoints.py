import hashlib
import json
import os
import struct

import numpy as np
import pytest
import torch

import networks
from networks import published
from networks.encoders import RGBEncoder, StabilityVAEEncoder

DATA = "tests/data/"
EDM2, LATENT, NCVSD = (
    DATA + name
    for name in ("edm2-tiny-0000000-0.100.pkl", "edm2-tiny-latent-0000000-0.100.pkl", "ncvsd-tiny-0000000-0.050.pkl")
)
TINY = dict(
    img_resolution=8, img_channels=3, label_dim=4, model_channels=8, channel_mult=[1, 2], num_blocks=1,
    attn_resolutions=[4], channels_per_head=8,
)  # fmt: skip


@pytest.fixture(scope="module")
def expected():
    with np.load(DATA + "expected_pkl.npz") as file:
        return {key: torch.from_numpy(file[key]) for key in file}


def tiny(kind="Precond"):
    torch.manual_seed(0)
    if kind == "GenerativeDenoiser":
        return networks.GenerativeDenoiser(networks.PrecondCondition(**TINY), gamma=0.3, init_sigma=40)
    return {"Precond": networks.Precond, "Discriminator": networks.Discriminator}[kind](**TINY)


def close(a, b):
    return (a - b).abs().max() <= 1e-4 * b.abs().max()


# Published files


@torch.no_grad()
def test_edm2_pickle(expected):
    loaded = networks.load(EDM2)
    e = expected
    assert type(loaded.net) is networks.Precond and type(loaded.encoder) is RGBEncoder
    assert close(loaded.net(e["y"], e["sigma"], e["labels"]), e["edm2_denoised"])
    assert not loaded.net.training and not any(p.requires_grad for p in loaded.net.parameters())
    assert {p.dtype for p in loaded.net.state_dict().values()} == {torch.float32}
    assert loaded.config["kind"] == "Precond" and loaded.config["init_kwargs"]["channels_per_head"] == 16
    assert loaded.config["dataset"]["path"] == "datasets/img16.zip" and loaded.config["source"] == EDM2
    json.dumps(loaded.config)


@torch.no_grad()
def test_edm2_latent_pickle(expected):
    loaded = networks.load(LATENT)
    e = expected
    assert close(loaded.net(e["yl"], e["sigma"], e["labels"]), e["edm2_latent_denoised"])
    assert type(loaded.encoder) is StabilityVAEEncoder
    assert np.allclose(loaded.encoder.scale, 0.5 / np.array([4.17, 4.62, 3.71, 3.28]))
    json.dumps(loaded.config)


@torch.no_grad()
def test_ncvsd_pickle(expected):
    loaded = networks.load(NCVSD)
    e = expected
    assert type(loaded.net) is networks.GenerativeDenoiser
    found = loaded.net.model(e["x"], e["t"], e["y"], e["sigma"], e["labels"])
    assert close(found, e["ncvsd_cond_denoised"])
    assert (loaded.config["gamma"], loaded.config["init_sigma"]) == (0.414, 80.0)
    assert (loaded.net.gamma, loaded.net.init_sigma) == (0.414, 80.0)


def with_source(data, source):
    """A golden file with source code where the published files have theirs."""
    old = b"\x8c\x0amodule_src\x94\x8c\x00"
    assert data.count(old) == 1
    return data.replace(old, b"\x8c\x0amodule_src\x94X" + struct.pack("<I", len(source)) + source)


@pytest.mark.parametrize("filename", [EDM2, NCVSD])
def test_embedded_source_is_not_run(filename, tmp_path, expected):
    mark = tmp_path / "mark"
    source = f"open({str(mark)!r}, 'w')\nclass Precond:\n    def __setstate__(self, s): open({str(mark)!r}, 'w')\n"
    path = tmp_path / "net.pkl"
    path.write_bytes(with_source(open(filename, "rb").read(), source.encode()))
    loaded, honest = networks.load(path), networks.load(filename)
    assert not mark.exists()
    assert all(torch.equal(a, b) for a, b in zip(loaded.net.parameters(), honest.net.parameters(), strict=True))


def test_unknown_arguments_of_inner_parts(tmp_path):
    path = tmp_path / "net.pkl"
    data = open(NCVSD, "rb").read()
    assert data.count(b"has_controlnet") == 1
    path.write_bytes(data.replace(b"has_controlnet", b"has_hypernet_x"))
    with pytest.raises(networks.CheckpointError, match="unknown architecture argument 'has_hypernet_x'"):
        networks.load(path)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (b"GenerativeDenoiser", b"GenerativeDenoised", "training.networks_edm2.GenerativeDenoised"),
        (b"\x8c\x10PrecondCondition", b"\x8c\x10PrecondCondemned", "class PrecondCondemned"),
        (b"\x8c\x12StandardRGBEncoder", b"\x8c\x12StandardCMYEncoder", "encoder of class StandardCMYEncoder"),
        (b"model_channels\x94K\x10", b"model_channels\x94K\x18", "model_channels of the part .* differs"),
        (b"model_channels\x94K\x10", b"model_channels\x94K\x00", "model_channels has a value"),
        (b"num_blocks\x94K\x01", b"num_blocks\x94K\x02", "num_blocks of the part .* differs"),
        (b"model_channels", b"model_chunnels", "unknown architecture argument 'model_chunnels'"),
        (b"logvar_linear", b"logvar_square", "missing weights: model.logvar_linear.weight"),
        (b"\x8c\x05gamma", b"\x8c\x05gimme", "gamma"),
        (b"\x8c\x03ema", b"\x8c\x03emu", "without a network under 'ema'"),
    ],
)
def test_pickles_that_do_not_fit(old, new, message, tmp_path):
    data = open(NCVSD, "rb").read()
    assert old in data
    path = tmp_path / "net.pkl"
    path.write_bytes(data.replace(old, new))
    with pytest.raises(networks.CheckpointError, match=message):
        networks.load(path)


def test_positional_arguments():
    state = {"_init_args": (16, 3, 10, False, 0.4), "_init_kwargs": {"num_blocks": 2, "gradient_checkpoint": True}}
    found = published.kwargs_of_part(state, "net")
    assert found == dict(img_resolution=16, img_channels=3, label_dim=10, use_fp16=False, sigma_data=0.4, num_blocks=2)
    with pytest.raises(networks.CheckpointError, match="given twice"):
        published.kwargs_of_part({"_init_args": (16,), "_init_kwargs": {"img_resolution": 16}}, "net")
    with pytest.raises(networks.CheckpointError, match="damaged"):
        published.kwargs_of_part({"_init_args": tuple(range(9))}, "net")


def test_arguments_that_only_a_part_names():
    merged = published.merge_parts({"num_blocks": 2}, {"enc": {"num_blocks": 2, "dropout": 0.1}, "dec": {}})
    assert merged == {"num_blocks": 2, "dropout": 0.1}


# The project's own format


@pytest.mark.parametrize("kind", ["Precond", "GenerativeDenoiser", "Discriminator"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_round_trip(kind, dtype, tmp_path):
    net, path = tiny(kind), tmp_path / "sub" / "net.safetensors"
    provenance = {"command": "train", "images": 2**20, "ema_std": 0.05, "seed": 0}
    networks.save(path, net, RGBEncoder(), dtype=dtype, dataset={"name": "shoes"}, provenance=provenance)
    rng = torch.random.get_rng_state()
    loaded = networks.load(path)
    assert torch.equal(rng, torch.random.get_rng_state())
    assert os.listdir(path.parent) == [path.name]
    assert type(loaded.net) is type(net) and type(loaded.encoder) is RGBEncoder
    assert loaded.config["kind"] == kind and loaded.config["provenance"] == provenance
    assert loaded.config["dataset"] == {"name": "shoes"}
    generative = kind == "GenerativeDenoiser"
    assert loaded.config["gamma"] == (0.3 if generative else None)
    assert loaded.config["init_kwargs"] == (net.model if generative else net).init_kwargs
    assert not loaded.net.training and not any(p.requires_grad for p in loaded.net.parameters())
    for key, value in net.state_dict().items():
        found = loaded.net.state_dict()[key]
        half = dtype == torch.float16 and value.ndim >= 2
        assert torch.equal(found, value.to(torch.float16).float() if half else value), key


def test_latent_encoder_round_trip(tmp_path):
    net = networks.Precond(**{**TINY, "img_channels": 4})
    networks.save(tmp_path / "net", net, StabilityVAEEncoder(vae_name="somewhere/vae"))
    loaded = networks.load(tmp_path / "net")
    assert loaded.encoder.to_config() == StabilityVAEEncoder(vae_name="somewhere/vae").to_config()
    networks.save(tmp_path / "bad", tiny(), StabilityVAEEncoder())
    with pytest.raises(networks.CheckpointError, match="encoder gives 4 channels, its network takes 3"):
        networks.load(tmp_path / "bad")


def test_resaved_pickle_is_the_same_network(tmp_path):
    honest = networks.load(NCVSD)
    networks.save(tmp_path / "net", honest.net, honest.encoder, dtype=torch.float16)
    loaded = networks.load(tmp_path / "net")
    assert all(torch.equal(v, honest.net.state_dict()[k]) for k, v in loaded.net.state_dict().items())
    assert loaded.config["init_kwargs"] == honest.config["init_kwargs"]


def test_save_refuses_and_keeps_the_old_file(tmp_path):
    path, net = tmp_path / "net", tiny()
    networks.save(path, net, RGBEncoder())
    before = path.read_bytes()
    with pytest.raises(networks.CheckpointError, match="float32 or float16"):
        networks.save(path, net, RGBEncoder(), dtype=torch.bfloat16)
    with pytest.raises(networks.CheckpointError, match="cannot store a Linear"):
        networks.save(path, torch.nn.Linear(1, 1), RGBEncoder())
    with pytest.raises(networks.CheckpointError, match="JSON"):
        networks.save(path, net, RGBEncoder(), provenance={"a": object()})
    with pytest.raises(networks.CheckpointError, match="JSON"):
        networks.save(path, net, RGBEncoder(), dataset={"a": float("nan")})
    net.unet.out_conv.weight.data[0] = 1e6
    with pytest.raises(networks.CheckpointError, match="unet.out_conv.weight overflows float16"):
        networks.save(path, net, RGBEncoder(), dtype=torch.float16)
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["net"]


# Where files come from


def test_sources(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="no such file"):
        networks.load(tmp_path / "none.pkl")
    with pytest.raises(ValueError, match="another file"):
        networks.load(EDM2, sha256="0" * 64)
    for text in ("hf://", "hf://owner/repo", "hf://owner/../x@"):
        with pytest.raises(networks.CheckpointError, match="hf://owner/repository"):
            networks.load(text)

    digest = hashlib.sha256(open(EDM2, "rb").read()).hexdigest()
    assert networks.load(f"{EDM2}#sha256={digest.upper()}", sha256=digest).config["kind"] == "Precond"
    with pytest.raises(ValueError, match="another file"):
        networks.load(f"{EDM2}#sha256={'0' * 64}")
    with pytest.raises(networks.CheckpointError, match="64 hexadecimal digits"):
        networks.load(f"{EDM2}#sha256=abc")
    with pytest.raises(networks.CheckpointError, match="differs from the SHA-256"):
        networks.load(f"{EDM2}#sha256={digest}", sha256="0" * 64)

    asked = []

    def download(repository, filename, revision):
        asked.append((repository, filename, revision))
        if filename == "gone":
            raise OSError("404\nnot there")
        return EDM2

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    assert networks.load("hf://owner/repo/folder/net.pkl@v1").config["source"] == "hf://owner/repo/folder/net.pkl@v1"
    networks.load("hf://owner/repo/net.pkl")
    networks.load(f"hf://owner/repo/net.pkl#sha256={digest}")
    with pytest.raises(ValueError, match="another file"):
        networks.load(f"hf://owner/repo/net.pkl#sha256={'0' * 64}")
    assert asked[2:] == asked[1:2] * 2
    assert asked[:2] == [("owner/repo", "folder/net.pkl", "v1"), ("owner/repo", "net.pkl", None)]
    with pytest.raises(networks.CheckpointError, match="Hub: 404$"):
        networks.load("hf://owner/repo/gone")
