import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch

import metrics.features.weights
import metrics.image_quality as image_quality
from dnnlib.download import DownloadError
from dnnlib.files import file_sha256
from metrics.features.vgg import BACKBONE, VGG16
from metrics.features.weights import FOLDER_VARIABLE, DetectorError
from metrics.image_quality import LPIPS, load_lpips, psnr, ssim

# Values of other implementations, named in the file, for `image_pair` and for `random_backbone`.
GOLDENS = json.loads((Path(__file__).parents[1] / "data" / "image_quality" / "goldens.json").read_text())["cases"]
CONVOLUTIONS = {0: 64, 2: 64, 5: 128, 7: 128, 10: 256, 12: 256, 14: 256, **dict.fromkeys((17, 19, 21, 24, 26, 28), 512)}


def image_pair(seed, shape):
    """Smooth random images and the same with noise, clipped to [-1,1]."""
    generator = torch.Generator().manual_seed(seed)
    n, c, h, w = shape
    x = (torch.nn.functional.avg_pool2d(torch.rand((n, c, h + 4, w + 4), generator=generator), 5, 1) - 0.5) * 4
    y = x + (torch.rand(shape, generator=generator) - 0.5) * 0.4
    return x.clamp(-1, 1), y.clamp(-1, 1)


@pytest.fixture(scope="module")
def random_backbone():
    """VGG16 with uniform weights that keep the activations' scale."""
    generator, net = torch.Generator().manual_seed(0), VGG16()
    for _, parameter in sorted(net.named_parameters()):
        bound = math.sqrt(6 / parameter[0].numel()) if parameter.ndim == 4 else 0.1
        parameter.copy_((torch.rand(parameter.shape, generator=generator) * 2 - 1) * bound)
    return net


@pytest.fixture
def hollow():
    """The published file's names and shapes, the i-th tensor filled with i; takes no room on disk."""
    state, channels = {}, 3
    for index, width in CONVOLUTIONS.items():
        state |= {f"features.{index}.weight": (width, channels, 3, 3), f"features.{index}.bias": (width,)}
        channels = width
    widths = (25088, 4096, 4096, 1000)
    for index, c_in, c_out in zip((0, 3, 6), widths, widths[1:], strict=False):
        state |= {f"classifier.{index}.weight": (c_out, c_in), f"classifier.{index}.bias": (c_out,)}
    return {key: torch.tensor(float(i)).expand(shape) for i, (key, shape) in enumerate(state.items())}


@pytest.fixture
def publish(tmp_path, monkeypatch):
    """Writes a file in the place of the published weights and has its hash accepted."""

    def write(content, **kwargs):
        path = tmp_path / BACKBONE.name
        path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path, **kwargs)
        prefix = file_sha256(path)[:8]
        monkeypatch.setattr(image_quality, "BACKBONE", dataclasses.replace(BACKBONE, sha256_prefix=prefix))
        return path

    return write


@pytest.mark.parametrize("case", GOLDENS, ids=lambda case: "x".join(map(str, case["shape"])))
def test_psnr_and_ssim_agree_with_scikit_image(case):
    x, y = image_pair(case["seed"], case["shape"])
    for measure in (psnr, ssim):
        values = measure(x, y)
        assert values.dtype == torch.float64
        assert values.tolist() == pytest.approx(case[measure.__name__], rel=1e-9)


@pytest.mark.parametrize("variant", ["max", "average"])
@pytest.mark.parametrize("case", GOLDENS, ids=lambda case: "x".join(map(str, case["shape"])))
def test_lpips_agrees_with_other_implementations_on_shared_random_weights(case, variant, random_backbone):
    lpips = LPIPS(random_backbone, variant)
    assert lpips.name == f"LPIPS-VGG v0.1, {variant} pooling"
    values = lpips(*image_pair(case["seed"], case["shape"]))
    assert values.dtype == torch.float64 and not values.requires_grad
    assert values.tolist() == pytest.approx(case[f"lpips_{variant}"], rel=1e-5)


def test_identical_images_are_perfect(random_backbone):
    x, _ = image_pair(0, (2, 3, 16, 20))
    assert psnr(x, x).tolist() == [math.inf, math.inf]
    assert ssim(x, x).tolist() == pytest.approx([1, 1], abs=1e-12)
    assert LPIPS(random_backbone)(x, x).tolist() == [0, 0]


def test_constant_images_have_closed_forms():
    a, b = 0.75, 0.5  # on [0,1]
    x, y = torch.full((1, 3, 12, 11), 2 * a - 1), torch.full((1, 3, 12, 11), 2 * b - 1)
    assert psnr(x, y).item() == pytest.approx(-10 * math.log10((a - b) ** 2))
    assert ssim(x, y).item() == pytest.approx((2 * a * b + 1e-4) / (a * a + b * b + 1e-4))


def test_images_are_seen_clipped_and_not_finite_ones_get_nan_alone(random_backbone):
    x, y = image_pair(3, (3, 1, 20, 20))
    beyond = torch.where(y == y.amax(), 7.0, y)
    clipped = beyond.clamp(-1, 1)
    damaged = y.clone()
    damaged[0, 0, 3, 4], damaged[2, 0, 8, 8] = torch.nan, torch.inf
    for measure in (psnr, ssim, LPIPS(random_backbone)):
        assert torch.equal(measure(x, beyond), measure(x, clipped))
        assert not torch.equal(measure(x, clipped), measure(x, y))
        assert measure(x, damaged).isnan().tolist() == [True, False, True]
        assert measure(x, damaged)[1] == pytest.approx(measure(x, y)[1].item())


def test_lpips_of_a_batch_is_that_of_its_images_whatever_is_taken_at_once(random_backbone, monkeypatch):
    x, y = image_pair(5, (5, 3, 16, 24))
    lpips, sizes = LPIPS(random_backbone), []
    expected = torch.cat([lpips(a, b) for a, b in zip(x.split(1), y.split(1), strict=True)])
    forward = VGG16.forward_block
    monkeypatch.setattr(VGG16, "forward_block", lambda net, block, x: [sizes.append(len(x)), forward(net, block, x)][1])
    monkeypatch.setattr(image_quality, "_PIXELS_AT_ONCE", 2 * 16 * 24 + 100)
    assert lpips(x, y).tolist() == pytest.approx(expected.tolist(), rel=1e-5)
    assert set(sizes) == {1, 2}


def test_lpips_keeps_float32_under_autocast(random_backbone):
    x, y = image_pair(5, (1, 3, 16, 16))
    lpips = LPIPS(random_backbone)
    with torch.autocast("cpu", torch.bfloat16):
        result = lpips(x, y)
    assert torch.equal(result, lpips(x, y))


@pytest.mark.parametrize("measure", ["psnr", "ssim", "lpips"])
@pytest.mark.parametrize(
    "x, y",
    [
        (torch.zeros(1, 3, 16, 16), torch.zeros(1, 1, 16, 16)),
        (torch.zeros(3, 16, 16), torch.zeros(3, 16, 16)),
        (torch.zeros(0, 3, 16, 16), torch.zeros(0, 3, 16, 16)),
        (torch.zeros(1, 3, 16, 16, dtype=torch.uint8), torch.zeros(1, 3, 16, 16)),
    ],
    ids=["shapes differ", "no batch", "empty", "uint8"],
)
def test_other_tensors_are_refused(measure, x, y, random_backbone):
    call = LPIPS(random_backbone) if measure == "lpips" else {"psnr": psnr, "ssim": ssim}[measure]
    with pytest.raises(ValueError, match="two float tensors of one shape"):
        call(x, y)


def test_small_images_and_other_channel_counts_are_refused(random_backbone):
    x = torch.zeros(1, 3, 10, 20)
    with pytest.raises(ValueError, match="at least 11x11 pixels, got 20x10"):
        ssim(x, x)
    with pytest.raises(ValueError, match="at least 16x16 pixels, got 3 channels and 20x10"):
        LPIPS(random_backbone)(x, x)
    x = torch.zeros(1, 2, 16, 16)
    with pytest.raises(ValueError, match="got 2 channels"):
        LPIPS(random_backbone)(x, x)


def test_unknown_variants_are_refused_before_weights_are_sought(tmp_path, random_backbone):
    for build in (lambda: load_lpips(tmp_path, "min"), lambda: LPIPS(random_backbone, "min")):
        with pytest.raises(ValueError, match="no LPIPS variant is called 'min': use max or average"):
            build()


@pytest.mark.parametrize("zipped", [False, True])
def test_published_names_are_read_and_the_classifier_is_passed_over(zipped, hollow, publish):
    path = publish(hollow, _use_new_zipfile_serialization=zipped)
    before = torch.get_rng_state()
    lpips = load_lpips(path.parent, "average")
    assert torch.equal(torch.get_rng_state(), before)
    assert lpips.variant == "average" and not lpips.training
    state = lpips.backbone.state_dict()
    assert set(state) == {key for key in hollow if key.startswith("features.")}
    assert all(torch.equal(value, hollow[key]) for key, value in state.items())
    assert not any(parameter.requires_grad for parameter in lpips.parameters())


def damaged_states():
    yield "not tensors", {"features.0.weight": "text"}, "damaged or not the VGG16 weights"
    yield "a list", [torch.zeros(3)], "damaged or not the VGG16 weights"
    yield "text", b"<html>not found</html>", "damaged or not the VGG16 weights"
    yield "an object", {"features.0.weight": Path("x")}, "damaged or not the VGG16 weights"


@pytest.mark.parametrize("content, message", [c[1:] for c in damaged_states()], ids=[c[0] for c in damaged_states()])
def test_other_files_are_refused_in_one_line(content, message, publish):
    path = publish(content)
    with pytest.raises(DetectorError, match=message) as caught:
        load_lpips(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "key, value",
    [("features.28.weight", None), ("features.14.bias", torch.zeros(255))],
    ids=["missing", "shape"],
)
def test_faulty_states_are_refused(key, value, hollow, publish):
    hollow = {k: v for k, v in hollow.items() if k != key} | ({} if value is None else {key: value})
    with pytest.raises(DetectorError, match="damaged or not the VGG16 weights"):
        load_lpips(publish(hollow))


def test_programs_are_refused(publish, tmp_path):
    torch.jit.save(torch.jit.script(torch.nn.Identity()), str(tmp_path / "program.pt"))
    with pytest.raises(DetectorError, match="TorchScript program"):
        load_lpips(publish((tmp_path / "program.pt").read_bytes()))


def test_a_file_with_another_hash_is_refused(tmp_path, hollow):
    torch.save(hollow, tmp_path / BACKBONE.name)
    with pytest.raises(DetectorError, match="is not vgg16-397923af.pth: its SHA-256 starts with"):
        load_lpips(tmp_path)


@pytest.mark.parametrize("download", [False, True])
def test_missing_weights_say_where_to_get_them(download, tmp_path, monkeypatch):
    tried = []

    def refuse(url, **kwargs):
        tried.append(url)
        raise DownloadError("no connection")

    monkeypatch.setattr(metrics.features.weights, "open_url", refuse)
    monkeypatch.setenv("NCVSD_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path))
    for path in (None, tmp_path):
        with pytest.raises(DetectorError) as caught:
            load_lpips(path, download=download)
        message = str(caught.value)
        assert all(part in message for part in (BACKBONE.name, BACKBONE.url, "--lpips-path", FOLDER_VARIABLE))
        assert "\n" not in message
    assert tried == [BACKBONE.url] * download


def test_missing_or_foreign_heads_are_named(tmp_path, monkeypatch, random_backbone):
    from safetensors.torch import save_file

    monkeypatch.setattr(image_quality, "HEADS", tmp_path / "heads.safetensors")
    with pytest.raises(DetectorError, match="cannot read the LPIPS heads"):
        LPIPS(random_backbone)
    save_file({f"lin{i}": torch.zeros(3) for i in range(5)}, tmp_path / "heads.safetensors")
    with pytest.raises(DetectorError, match="does not hold the LPIPS heads"):
        LPIPS(random_backbone)
