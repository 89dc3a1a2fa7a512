"""Encoders against measured numbers, and the autoencoder path with a tiny random stand-in."""

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from networks.encoders import RGBEncoder, StabilityVAEEncoder, encoder_from_config, load_autoencoder

WEIGHTS = "diffusion_pytorch_model.safetensors"
GOLDEN = Path(__file__).parents[1] / "data" / "schedules.npz"


@pytest.fixture(scope="module")
def golden():
    with np.load(GOLDEN, allow_pickle=False) as data:
        return {key: torch.from_numpy(data[key]) for key in data if key.startswith(("rgb_", "vae_"))}


def test_rgb_matches_golden(golden):
    encoder = RGBEncoder()
    pixels = golden["rgb_px"]
    assert torch.equal(encoder.encode_pixels(pixels), pixels)
    torch.testing.assert_close(encoder.encode(pixels), golden["rgb_latent"], rtol=0, atol=1e-6)
    assert torch.equal(encoder.decode(golden["rgb_decode_in"]), golden["rgb_decode_out"])


def test_rgb_round_trip_of_every_value():
    pixels = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16)
    encoder = RGBEncoder().to("cpu")
    assert torch.equal(encoder.decode(encoder.encode(pixels)), pixels)
    extremes = torch.tensor([-5.0, 5.0]).reshape(1, 2, 1, 1)
    assert encoder.decode(extremes).flatten().tolist() == [0, 255]
    assert encoder.latent_channels(1) == 1 and encoder.latent_channels(3) == 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.int64])
def test_rgb_takes_pixels_only(dtype):
    with pytest.raises(ValueError, match="needs uint8 pixels"):
        RGBEncoder().encode(torch.zeros(1, 1, 4, 4, dtype=dtype))


def test_latents_match_golden(golden):
    encoder = StabilityVAEEncoder()
    assert np.allclose(encoder.scale, golden["vae_scale"], rtol=1e-6)
    assert np.allclose(encoder.bias, golden["vae_bias"], rtol=1e-6)
    latents = encoder.encode(golden["vae_raw"], randn_like=lambda _: golden["vae_noise"])
    torch.testing.assert_close(latents, golden["vae_latent"], rtol=1e-6, atol=1e-6)


def test_config_round_trip():
    assert isinstance(encoder_from_config(RGBEncoder().to_config()), RGBEncoder)
    encoder = StabilityVAEEncoder("some/vae", scale=[1 / 3, 1 / 4], bias=[0.1 - 1 / 3, 0.1 - 2 / 4], batch_size=3)
    config = json.loads(json.dumps(encoder.to_config()))
    copy = encoder_from_config(config)
    assert copy.to_config() == encoder.to_config() and copy.vae_name == "some/vae" and copy.batch_size == 3
    assert np.array_equal(copy.scale, encoder.scale) and np.array_equal(copy.bias, encoder.bias)
    assert np.allclose(copy.scale, [1 / 3, 1 / 4]) and np.allclose(copy.bias, [0.1 - 1 / 3, 0.1 - 2 / 4])


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"type": "other"},
        {"type": ["rgb"]},
        {"type": "rgb", "vae_name": "x"},
        {"type": "sd-vae", "colour": 1},
        {"type": "sd-vae", "scale": [1.0]},
        {"type": "sd-vae", "scale": [1.0], "bias": [1.0, 2.0]},
        {"type": "sd-vae", "scale": [0.0], "bias": [1.0]},
        {"type": "sd-vae", "scale": [1.0], "bias": [float("nan")]},
        {"type": "sd-vae", "scale": "abc", "bias": "abc"},
        {"type": "sd-vae", "scale": [{}], "bias": [{}]},
        {"type": "sd-vae", "batch_size": 0},
        {"type": "sd-vae", "batch_size": 4097},
        {"type": "sd-vae", "batch_size": None},
    ],
)
def test_bad_config(config):
    with pytest.raises(ValueError):
        encoder_from_config(config)


def test_channels_of_latents():
    encoder = StabilityVAEEncoder()
    assert encoder.latent_channels(8) == 4 and encoder.latent_channels(3) == 4
    with pytest.raises(ValueError, match="1 channels"):
        encoder.latent_channels(1)
    with pytest.raises(ValueError, match="got"):
        encoder.encode(torch.zeros(2, 4, 4, 4))


def test_autoencoder_sees_pixels_in_unit_range(vae):
    from diffusers import AutoencoderKL

    net = AutoencoderKL.from_pretrained(vae, use_safetensors=True).eval()
    pixels = torch.from_numpy(np.random.default_rng(0).integers(0, 256, [5, 3, 8, 8], dtype=np.uint8))
    encoder = StabilityVAEEncoder(str(vae), batch_size=2)
    raw = encoder.encode_pixels(pixels)
    with torch.no_grad():
        posterior = net.encode(pixels.float() / 255).latent_dist
        torch.testing.assert_close(raw, torch.cat([posterior.mean, posterior.std], dim=1), rtol=1e-4, atol=1e-5)
        raw_latents = posterior.mean
        image = (net.decode(raw_latents).sample.clamp(0, 1) * 255).to(torch.uint8)
    scale = 0.5 / torch.tensor([4.17, 4.62, 3.71, 3.28]).reshape(1, 4, 1, 1)
    latents = (raw_latents - torch.tensor([5.81, 3.25, 0.12, -2.15]).reshape(1, 4, 1, 1)) * scale
    decoded = encoder.decode(latents)
    assert decoded.dtype == torch.uint8 and decoded.shape == (5, 3, 8, 8)
    assert (decoded.int() - image.int()).abs().max() <= 1  # truncation at a boundary
    assert image.float().std() > 0
    noise = torch.ones(5, 4, 4, 4)
    torch.testing.assert_close(
        encoder.encode(pixels, randn_like=lambda _: noise), encoder.encode(raw, randn_like=lambda _: noise)
    )


def test_batch_size_does_not_matter_and_weights_stay_out_of_pickles(vae):
    pixels = torch.from_numpy(np.random.default_rng(1).integers(0, 256, [5, 3, 8, 8], dtype=np.uint8))
    one = StabilityVAEEncoder(str(vae), batch_size=1)
    raw = one.encode_pixels(pixels)
    torch.testing.assert_close(StabilityVAEEncoder(str(vae)).encode_pixels(pixels), raw, rtol=1e-4, atol=1e-5)
    assert len(pickle.dumps(one)) < 2000
    torch.testing.assert_close(pickle.loads(pickle.dumps(one)).encode_pixels(pixels), raw)


def test_loading_the_autoencoder_says_nothing(vae, capfd):
    from diffusers.utils import logging

    handler = logging.logging.StreamHandler()  # the library's own keeps the stderr of before the test
    logging.add_handler(handler)
    try:
        StabilityVAEEncoder(str(vae)).decode(torch.zeros(1, 4, 4, 4))
    finally:
        logging.remove_handler(handler)
    assert capfd.readouterr().err == ""


def test_wrong_pixels(vae):
    encoder = StabilityVAEEncoder(str(vae))
    with pytest.raises(ValueError, match="uint8"):
        encoder.encode_pixels(torch.zeros(1, 3, 8, 8))
    with pytest.raises(ValueError, match="N,3,H,W"):
        encoder.encode_pixels(torch.zeros(1, 1, 8, 8, dtype=torch.uint8))
    with pytest.raises(ValueError, match="multiple of 2"):
        encoder.encode_pixels(torch.zeros(1, 3, 9, 8, dtype=torch.uint8))
    with pytest.raises(ValueError, match="4 latent channels, not 2"):
        StabilityVAEEncoder(str(vae), scale=[1, 1], bias=[0, 0]).decode(torch.zeros(1, 2, 4, 4))


def test_missing_autoencoder_is_one_clear_line(vae, tmp_path, monkeypatch):
    from safetensors.torch import load_file, save_file

    def message(name):
        with pytest.raises(ValueError) as info:
            StabilityVAEEncoder(str(name)).decode(torch.zeros(1, 4, 4, 4))
        assert "\n" not in str(info.value) and str(name) in str(info.value)
        return str(info.value)

    assert "no such folder" in message(tmp_path / "missing")
    (tmp_path / "config.json").write_text((vae / "config.json").read_text())
    assert "no file named diffusion_pytorch_model.safetensors" in message(tmp_path)
    torch.save({}, tmp_path / "diffusion_pytorch_model.bin")  # a pickle: must not be taken instead
    assert "no file named diffusion_pytorch_model.safetensors" in message(tmp_path)
    weights = load_file(vae / "diffusion_pytorch_model.safetensors")
    weights.pop("decoder.conv_in.weight")
    save_file(weights, tmp_path / "diffusion_pytorch_model.safetensors")
    assert "lacks" in message(tmp_path)
    monkeypatch.setattr("huggingface_hub.snapshot_download", _unreachable)
    assert "no network" in message("stabilityai/sd-vae-ft-mse")


BROKEN = {  # of config.json, as text or as changed entries -> what is said
    "cut off": ("{", "config.json: not valid JSON (Expecting"),
    "brackets": ("[" * 60_000, "config.json: not valid JSON (lists within lists, too deep)"),
    "too large": (" " * 100_000, "too large: 100000 bytes"),
    "a list": ('["owner/repository"]', "config.json: not a JSON object but a list"),
    "another class": ({"_class_name": "UNet2DModel"}, "its config.json is not that of an AutoencoderKL"),
    "other packages": ({"quantization_config": {"quant_method": "x"}}, "unknown entry 'quantization_config'"),
    "wide": ({"block_out_channels": [8, 8_000_000]}, "block_out_channels in config.json has a value"),
    "wider than the file": ({"block_out_channels": [8, 8192]}, "cannot hold the"),
    "deep": ({"layers_per_block": 10**9}, "layers_per_block in config.json has a value"),
    "long": ({"down_block_types": ["DownEncoderBlock2D"] * 1000}, "down_block_types in config.json has a value"),
    "negative": ({"latent_channels": -1}, "latent_channels in config.json has a value"),
    "text": ({"latent_channels": "x"}, "describes nothing that can be built"),
    "unknown blocks": ({"down_block_types": ["os.system"] * 2}, "describes nothing that can be built"),
    "not a number": ({"scaling_factor": float("nan")}, "scaling_factor in config.json has a value"),
    "other shapes": ({"latent_channels": 3}, "expected shape"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_descriptions_of_an_autoencoder_are_told_in_one_line(case, vae, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.snapshot_download", _unreachable)
    change, expected = BROKEN[case]
    whole = json.loads((vae / "config.json").read_text())
    text = change if isinstance(change, str) else json.dumps({**whole, **change})
    (tmp_path / "config.json").write_text(text)
    (tmp_path / WEIGHTS).write_bytes((vae / WEIGHTS).read_bytes())
    with pytest.raises(ValueError, match="not a usable folder") as info:
        load_autoencoder(str(tmp_path))
    message = str(info.value)
    assert expected in message and str(tmp_path) in message and "\n" not in message and len(message) < 700


def test_an_autoencoder_with_weights_that_are_no_numbers(vae, tmp_path):
    from safetensors.torch import load_file, save_file

    weights = load_file(vae / WEIGHTS)
    weights["decoder.conv_in.bias"][1] = float("nan")
    save_file(weights, tmp_path / WEIGHTS, metadata={"format": "pt"})
    (tmp_path / "config.json").write_text((vae / "config.json").read_text())
    with pytest.raises(ValueError, match="NaN or infinite weights in decoder.conv_in.bias"):
        load_autoencoder(str(tmp_path))


def _unreachable(*_, **__):
    raise ConnectionError("no network\nsecond line")
