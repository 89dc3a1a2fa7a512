import math
import sys

import numpy as np
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from metrics.features.dinov2 import DINOv2, load_dinov2, prepare_images, resize_positions

TINY = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 518, "patch_size": 14}


def random_images(shape, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8))


def bicubic_matrix(old, new, scale):
    """Weights [new,old] of bicubic interpolation with a = -0.75 and clamped edges."""
    a, matrix = -0.75, np.zeros((new, old))
    for i in range(new):
        position = (i + 0.5) / scale - 0.5
        for tap in range(math.floor(position) - 1, math.floor(position) + 3):
            d = abs(position - tap)
            near = (a + 2) * d**3 - (a + 3) * d**2 + 1
            far = a * d**3 - 5 * a * d**2 + 8 * a * d - 4 * a
            matrix[i, min(max(tap, 0), old - 1)] += near if d <= 1 else far
    return matrix


def brute_force_positions(positions, scale=16.1 / 37):
    m = bicubic_matrix(37, 16, scale)
    grid = np.einsum("ai,bj,ijd->abd", m, m, positions[0, 1:].reshape(37, 37, -1).astype(np.float64))
    return np.concatenate([positions[0, :1], grid.reshape(256, -1)])


def test_position_grid_is_read_with_the_scale_of_the_original_network():
    positions = torch.randn(1, 1 + 37 * 37, 6, generator=torch.Generator().manual_seed(0))
    result = resize_positions(positions, 16)
    assert result.shape == (1, 257, 6)
    np.testing.assert_allclose(result[0], brute_force_positions(positions.numpy()), atol=2e-5)
    plain = brute_force_positions(positions.numpy(), scale=16 / 37)
    assert np.abs(result[0].numpy() - plain).max() > 0.1


def test_position_grid_of_the_right_size_is_kept_and_one_that_is_not_square_refused():
    positions = torch.randn(1, 257, 4, generator=torch.Generator().manual_seed(0))
    assert torch.equal(resize_positions(positions, 16), positions)
    with pytest.raises(ValueError, match="255 position embeddings"):
        resize_positions(positions[:, :256], 16)


@pytest.mark.parametrize("size", [(300, 500), (64, 64), (224, 224)])
def test_images_are_resized_as_pillow_does_it_without_rounding(size):
    images = random_images((1, 3, *size))
    mean, std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    for c in range(3):
        channel = Image.fromarray(images[0, c].numpy().astype(np.float32))
        expected = (np.asarray(channel.resize((224, 224), Image.Resampling.BICUBIC)) / 255 - mean[c]) / std[c]
        np.testing.assert_allclose(prepare_images(images)[0, c], expected, atol=1e-3)


def test_grey_images_are_those_with_three_equal_channels():
    grey = random_images((2, 1, 32, 32))
    assert torch.equal(prepare_images(grey), prepare_images(grey.expand(-1, 3, -1, -1).contiguous()))


@pytest.mark.parametrize(
    "images",
    [
        torch.zeros(1, 3, 8, 8),
        torch.zeros(1, 4, 8, 8, dtype=torch.uint8),
        torch.zeros(3, 8, 8, dtype=torch.uint8),
        torch.zeros(0, 3, 8, 8, dtype=torch.uint8),
    ],
)
def test_other_images_are_refused(images):
    with pytest.raises(ValueError, match="uint8 images"):
        prepare_images(images)


def test_without_transformers_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ValueError, match="pip install 'transformers"):
        load_dinov2()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Folder with a tiny random network in the public format."""
    transformers = pytest.importorskip("transformers")
    model = transformers.Dinov2Model(transformers.Dinov2Config(**TINY))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    folder = tmp_path_factory.mktemp("dinov2")
    model.save_pretrained(folder)
    return folder


def plain_transformer(weights, x, heads=2, layers=2):
    """Features of inputs [N,3,224,224], written out from the architecture's description and the file's keys."""

    def linear(x, key):
        return F.linear(x, weights[f"{key}.weight"], weights[f"{key}.bias"])

    def norm(x, key):
        centered = x - x.mean(dim=-1, keepdim=True)
        scaled = centered / (centered.square().mean(dim=-1, keepdim=True) + 1e-6).sqrt()
        return scaled * weights[f"{key}.weight"] + weights[f"{key}.bias"]

    key = "embeddings.patch_embeddings.projection"
    patches = x.unfold(2, 14, 14).unfold(3, 14, 14).permute(0, 2, 3, 1, 4, 5).reshape(len(x), 256, -1)
    x = patches @ weights[f"{key}.weight"].flatten(1).T + weights[f"{key}.bias"]
    x = torch.cat([weights["embeddings.cls_token"].expand(len(x), -1, -1), x], dim=1)
    x = x + torch.from_numpy(brute_force_positions(weights["embeddings.position_embeddings"].numpy()))
    for i in range(layers):
        layer = f"encoder.layer.{i}"
        h = norm(x, f"{layer}.norm1")
        q, k, v = (
            linear(h, f"{layer}.attention.attention.{name}").unflatten(2, (heads, -1)).transpose(1, 2)
            for name in ("query", "key", "value")
        )
        h = (q @ k.transpose(2, 3) / q.shape[3] ** 0.5).softmax(dim=3) @ v
        h = linear(h.transpose(1, 2).flatten(2), f"{layer}.attention.output.dense")
        x = x + h * weights[f"{layer}.layer_scale1.lambda1"]
        h = linear(norm(x, f"{layer}.norm2"), f"{layer}.mlp.fc1")
        h = linear(h * (1 + torch.erf(h / 2**0.5)) / 2, f"{layer}.mlp.fc2")
        x = x + h * weights[f"{layer}.layer_scale2.lambda1"]
    return norm(x, "layernorm")[:, 0]


def test_features_equal_a_transformer_written_out(checkpoint, capfd):
    from dnnlib.files import file_sha256

    detector, digest = load_dinov2(checkpoint, architecture=TINY)
    assert capfd.readouterr() == ("", "")
    file = checkpoint / "model.safetensors"
    assert (detector.name, detector.feature_dim) == ("fd_dinov2", 32)
    assert digest == file_sha256(file)
    weights = {key: value.double() for key, value in safetensors.torch.load_file(file).items()}
    images = random_images((3, 3, 48, 40))
    features = detector(images)
    assert features.dtype == torch.float32
    assert not features.requires_grad
    np.testing.assert_allclose(features, plain_transformer(weights, prepare_images(images).double()), atol=1e-4)
    np.testing.assert_allclose(features[1:2], detector(images[1:2]), atol=1e-5)


def test_position_embeddings_are_interpolated_once_at_load_time(checkpoint, monkeypatch):
    detector, _ = load_dinov2(checkpoint / "model.safetensors", architecture=TINY)
    assert detector.model.embeddings.position_embeddings.shape == (1, 257, 32)
    interpolated = []
    resize = F.interpolate
    monkeypatch.setattr(nn.functional, "interpolate", lambda x, *a, **k: interpolated.append(x) or resize(x, *a, **k))
    detector(random_images((1, 1, 16, 16)))
    assert [list(x.shape) for x in interpolated] == [[1, 1, 16, 16]]  # the image alone


def test_half_precision_weights_give_float32_features(checkpoint, tmp_path):
    weights = safetensors.torch.load_file(checkpoint / "model.safetensors")
    safetensors.torch.save_file({k: v.half() for k, v in weights.items()}, tmp_path / "half.safetensors")
    images = random_images((1, 3, 24, 24))
    half, _ = load_dinov2(tmp_path / "half.safetensors", architecture=TINY)
    whole, _ = load_dinov2(checkpoint, architecture=TINY)
    assert half(images).dtype == torch.float32
    np.testing.assert_allclose(half(images), whole(images), atol=0.02)


def test_the_hub_is_asked_for_the_weight_file_alone(checkpoint, monkeypatch):
    asked = []

    def download(*args, **kwargs):
        asked.append((args, kwargs))
        return str(checkpoint / "model.safetensors")

    monkeypatch.setenv("NCVSD_DETECTORS", str(checkpoint))  # holds no folder dinov2-large
    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    detector, _ = load_dinov2(architecture=TINY)
    assert isinstance(detector, DINOv2)
    load_dinov2("somebody/network@v1.0", architecture=TINY)
    assert asked == [
        (("facebook/dinov2-large", "model.safetensors"), {"revision": None}),
        (("somebody/network", "model.safetensors"), {"revision": "v1.0"}),
    ]


def test_a_folder_of_detectors_comes_before_the_hub(checkpoint, tmp_path, monkeypatch):
    from dnnlib.files import file_sha256

    (tmp_path / "dinov2-large").symlink_to(checkpoint)
    monkeypatch.setenv("NCVSD_DETECTORS", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.hf_hub_download", None)
    _, digest = load_dinov2(architecture=TINY)
    assert digest == file_sha256(checkpoint / "model.safetensors")


def test_an_unreachable_hub_is_one_line_with_advice(checkpoint, monkeypatch):
    def download(*args, **kwargs):
        raise OSError("no network\nand much more")

    monkeypatch.delenv("NCVSD_DETECTORS", raising=False)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    with pytest.raises(ValueError, match=r"facebook/dinov2-large is neither.*\(no network\).*1\.2 GB") as error:
        load_dinov2()
    assert "\n" not in str(error.value)


def other_files(checkpoint, folder):
    """Files that are not the network asked for, with a part of the error for each."""
    weights = safetensors.torch.load_file(checkpoint / "model.safetensors")
    whole = (checkpoint / "model.safetensors").read_bytes()
    safetensors.torch.save_file({k: v for k, v in weights.items() if "fc1" not in k}, folder / "part.safetensors")
    registers = {**weights, "embeddings.register_tokens": torch.zeros(1, 4, 32)}
    safetensors.torch.save_file(registers, folder / "registers.safetensors")
    (folder / "cut.safetensors").write_bytes(whole[: len(whole) // 2])
    torch.save(weights, folder / "weights.pth")
    return {
        "part.safetensors": "4 of this one's weights are missing, 0 are unknown",
        "registers.safetensors": "0 of this one's weights are missing, 1 are unknown",
        "cut.safetensors": "cannot read the weights",
        "weights.pth": "cannot read the weights",
        ".": "holds no model.safetensors",
        "absent.safetensors": "no file or folder",
    }


def test_other_files_are_refused_in_one_line(checkpoint, tmp_path):
    for name, message in other_files(checkpoint, tmp_path).items():
        with pytest.raises(ValueError, match=message) as error:
            load_dinov2(tmp_path / name, architecture=TINY)
        assert "\n" not in str(error.value)
        assert str(tmp_path) in str(error.value)


def test_a_network_of_another_size_is_refused_in_one_line(checkpoint):
    with pytest.raises(ValueError, match="cannot read the weights") as error:
        load_dinov2(checkpoint, architecture={**TINY, "hidden_size": 64})
    assert "\n" not in str(error.value)
