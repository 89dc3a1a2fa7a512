import dataclasses

import numpy as np
import pytest
import torch

import metrics.features.inception
from dnnlib.files import file_sha256
from metrics.features.inception import WEIGHTS, InceptionV3, Mixed, load_inception, resize_bilinear_tf1
from metrics.features.weights import DetectorError


def hashed(shape, stream):
    """Numbers in [-1, 1) from the splitmix64 hash of their index: the same on every machine and version."""
    count = int(np.prod(shape))
    z = (np.arange(count, dtype=np.uint64) + np.uint64(stream << 32)) * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    z = z ^ (z >> np.uint64(31))
    return ((z >> np.uint64(11)).astype(np.float64) / 2.0**52 - 1).reshape(shape)


def hashed_images(shape, stream):
    return torch.from_numpy(np.floor((hashed(shape, stream) + 1) * 128).astype(np.uint8))


def hashed_weights(state):
    """Weights that keep activations near unit scale, from the keys in alphabetical order."""
    weights = {}
    for stream, key in enumerate(sorted(k for k in state if not k.endswith("num_batches_tracked")), 1):
        shape = tuple(state[key].shape)
        values = hashed(shape, stream)
        if len(shape) > 1:
            values *= np.sqrt(6 / np.prod(shape[1:]))
        elif key.endswith(("running_var", "bn.weight")):
            values = 1 + 0.3 * values
        else:
            values *= 0.2
        weights[key] = torch.from_numpy(values.astype(np.float32))
    return weights


@pytest.fixture(scope="module")
def net():
    net = InceptionV3()
    net.load_state_dict(hashed_weights(net.state_dict()), strict=False)
    return net


@pytest.fixture(scope="module")
def images():
    return hashed_images((1, 3, 40, 28), 900)


@pytest.fixture(scope="module")
def features(net, images):
    return net(images)


@pytest.fixture(scope="module")
def hollow():
    """A state dict of the right names and shapes that takes no room on disk."""
    return {k: torch.zeros((), dtype=v.dtype).expand(v.shape) for k, v in InceptionV3().state_dict().items()}


def test_features_and_logits_equal_torch_fidelity(net, images, features):
    # Measured with torch-fidelity 0.4.0, FeatureExtractorInceptionV3 in float64, outputs '2048' and 'logits_unbiased',
    # torch 2.13 on CPU, on the weights and the image of this file.
    expected = [
        1.0679666, 0.19587277, 0.31157106, 3.4700861, 2.7650373, 2.1764419, 0.49745095, 2.6669145,
        2.2159898, 0.15630047, 1.1119519, 0.028150888, 1.86608, 4.7950664, 2.3490613, 3.0065656,
    ]  # fmt: skip
    logits = [-1.6307847, -1.4289813, 0.80005318, -2.4835954, 2.5255659, -1.6311359, 1.7676601]
    assert features.shape == (1, 2048) and features.dtype == torch.float32
    np.testing.assert_allclose(features[0, 110::128], expected, rtol=1e-4)
    np.testing.assert_allclose(net.logits(features)[0, 60::144], logits, rtol=1e-4)
    assert features.norm().item() == pytest.approx(73.323410, rel=1e-5)
    assert net.logits(features).norm().item() == pytest.approx(71.015465, rel=1e-5)


@pytest.mark.parametrize(("height", "width", "size"), [(5, 7, 16), (16, 16, 16), (31, 20, 13), (1, 2, 9), (64, 3, 1)])
def test_resize_equals_the_formula(height, width, size):
    images = hashed_images((2, 3, height, width), 7)
    source = images.numpy().astype(np.float64)
    expected = np.zeros((2, 3, size, size))
    for i in range(size):
        for j in range(size):
            y, x = i * height / size, j * width / size
            top, left = int(y), int(x)
            bottom, right = min(top + 1, height - 1), min(left + 1, width - 1)
            upper = (1 - (x - left)) * source[..., top, left] + (x - left) * source[..., top, right]
            lower = (1 - (x - left)) * source[..., bottom, left] + (x - left) * source[..., bottom, right]
            expected[..., i, j] = (1 - (y - top)) * upper + (y - top) * lower
    result = resize_bilinear_tf1(images, size)
    assert result.dtype == torch.float32
    np.testing.assert_allclose(result, expected, atol=1e-3)


def test_resize_to_the_same_size_changes_nothing():
    images = hashed_images((1, 1, 299, 299), 8)
    assert torch.equal(resize_bilinear_tf1(images, 299), images.float())


def test_state_dict_has_the_names_of_the_public_port():
    state = InceptionV3().state_dict()
    shapes = {
        "Conv2d_1a_3x3.conv.weight": (32, 3, 3, 3),
        "Conv2d_4a_3x3.bn.running_var": (192,),
        "Mixed_5b.branch1x1.conv.weight": (64, 192, 1, 1),
        "Mixed_5b.branch5x5_2.conv.weight": (64, 48, 5, 5),
        "Mixed_5d.branch_pool.bn.bias": (64,),
        "Mixed_6a.branch3x3.conv.weight": (384, 288, 3, 3),
        "Mixed_6a.branch3x3dbl_3.conv.weight": (96, 96, 3, 3),
        "Mixed_6c.branch7x7_2.conv.weight": (160, 160, 1, 7),
        "Mixed_6e.branch7x7dbl_2.conv.weight": (192, 192, 7, 1),
        "Mixed_7a.branch7x7x3_4.conv.weight": (192, 192, 3, 3),
        "Mixed_7b.branch3x3_2a.conv.weight": (384, 384, 1, 3),
        "Mixed_7c.branch3x3dbl_3b.conv.weight": (384, 384, 3, 1),
        "fc.weight": (1008, 2048),
        "fc.bias": (1008,),
    }
    assert {key: tuple(state[key].shape) for key in shapes} == shapes
    assert len(state) == 94 * 6 + 2
    assert sum(v.numel() for v in state.values()) == 23_885_486


def pooled_input(block, x):
    """What the pool of a block hands to its projection."""
    seen = []
    handle = block.branch_pool.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    block(x)
    handle.remove()
    return seen[0]


@pytest.mark.parametrize(
    ("block", "channels"),
    [("5b", 192), ("5c", 256), ("5d", 288), ("6b", 768), ("6c", 768), ("6d", 768), ("6e", 768), ("7b", 1280)],
)
def test_average_pools_leave_the_padding_out(net, block, channels):
    ones = torch.ones(1, channels, 4, 4)
    torch.testing.assert_close(pooled_input(net.get_submodule(f"Mixed_{block}"), ones), ones)


def test_last_block_takes_the_maximum(net):
    x = torch.zeros(1, 2048, 5, 5)
    x[:, :, 2, 1] = 1
    expected = torch.zeros(1, 2048, 5, 5)
    expected[:, :, 1:4, 0:3] = 1
    assert torch.equal(pooled_input(net.Mixed_7c, x), expected)


def test_reduction_blocks_keep_the_maximum_of_the_input():
    x = torch.arange(49.0).view(1, 1, 7, 7)
    pooled = Mixed(1, {}, pool="max", stride=2)(x)
    assert pooled.flatten().tolist() == [16, 18, 20, 30, 32, 34, 44, 46, 48]


def test_grey_equals_the_same_image_in_three_channels(net):
    grey = hashed_images((1, 1, 16, 16), 9)
    torch.testing.assert_close(net(grey), net(grey.repeat(1, 3, 1, 1)), rtol=0, atol=0)


@pytest.mark.parametrize(
    "images",
    [
        torch.zeros(1, 3, 8, 8),
        torch.zeros(1, 2, 8, 8, dtype=torch.uint8),
        torch.zeros(1, 8, 8, 3, dtype=torch.uint8),
        torch.zeros(3, 8, 8, dtype=torch.uint8),
        torch.zeros(1, 3, 0, 8, dtype=torch.uint8),
    ],
)
def test_other_types_and_shapes_are_refused(net, images):
    with pytest.raises(ValueError, match="fid takes uint8 images"):
        net(images)


def test_no_images_give_no_features(net):
    assert net(torch.zeros(0, 3, 8, 8, dtype=torch.uint8)).shape == (0, 2048)


def test_stays_in_eval_mode(net):
    net.train()
    assert not any(module.training for module in net.modules())


def test_convolutions_run_in_full_precision_and_the_setting_comes_back(net, images, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    seen = []
    handle = net.Mixed_7c.register_forward_hook(lambda *_: seen.append(torch.backends.cudnn.allow_tf32))
    net(images)
    handle.remove()
    assert seen == [False] and torch.backends.cudnn.allow_tf32


@pytest.fixture
def publish(tmp_path, monkeypatch):
    """Writes a file in the place of the published weights and has its hash accepted."""

    def write(content, **kwargs):
        path = tmp_path / WEIGHTS.name
        path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path, **kwargs)
        accepted = dataclasses.replace(WEIGHTS, sha256_prefix=file_sha256(path)[:8])
        monkeypatch.setattr(metrics.features.inception, "WEIGHTS", accepted)
        return path

    return write


def test_load_gives_the_same_features(net, images, features, publish):
    aux = {"AuxLogits.fc.weight": torch.zeros(1008, 768), "AuxLogits.conv0.bn.bias": torch.zeros(128)}
    path = publish({k: v for k, v in net.state_dict().items() if not k.endswith("num_batches_tracked")} | aux)
    loaded, digest = load_inception(path, fold=False)
    assert torch.equal(loaded(images), features) and digest == file_sha256(path)
    folded, _ = load_inception(str(path))
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in folded.modules())
    assert (folded(images) - features).norm() < 2e-6 * features.norm()
    assert not any(p.requires_grad for p in folded.parameters())


def test_load_reads_a_full_state_dict_of_old_format(hollow, publish):
    net, _ = load_inception(publish(hollow, _use_new_zipfile_serialization=False), fold=False)
    assert all(p.count_nonzero() == 0 for p in net.parameters())


FAULTS = {
    "missing key": lambda s: s.pop("fc.bias"),
    "foreign key": lambda s: s.update({"head.weight": torch.zeros(1)}),
    "shape": lambda s: s.update({"fc.weight": torch.zeros(1000, 2048)}),
    "no tensor": lambda s: s.update({"fc.bias": 1.0}),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_other_state_dicts_are_refused(hollow, publish, fault):
    state = dict(hollow)
    FAULTS[fault](state)
    path = publish(state)
    with pytest.raises(DetectorError, match="damaged or not the InceptionV3 weights") as caught:
        load_inception(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


class Planted:
    """Unpickles by calling a function, as a hostile file would."""

    def __reduce__(self):
        return print, ("planted",)


def test_damaged_and_hostile_files_are_refused(hollow, publish, tmp_path, capsys, recwarn):
    whole = tmp_path / "whole.pth"
    torch.save(hollow, whole)
    script = tmp_path / "script.pth"
    torch.jit.trace(torch.nn.Linear(2, 2), torch.zeros(1, 2)).save(script)
    capsys.readouterr()
    for content, message in [
        (whole.read_bytes()[:-1000], "is damaged or not the InceptionV3 weights"),
        (hashed_images((5000,), 10).numpy().tobytes(), "is damaged or not the InceptionV3 weights"),
        ({"fc.bias": Planted()}, "is damaged or not the InceptionV3 weights"),
        (torch.zeros(3), "is damaged or not the InceptionV3 weights"),
        (script.read_bytes(), "is a TorchScript program, not the InceptionV3 weights"),
    ]:
        path = publish(content)
        with pytest.raises(DetectorError, match=message) as caught:
            load_inception(path)
        assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(DetectorError, match="no pt_inception.* at"):
        load_inception(tmp_path / "absent.pth")
    assert not [w for w in recwarn if "TorchScript archive" in str(w.message)]  # torch.load never took it up
    assert "planted" not in capsys.readouterr().out
