"""Magnitude-preserving layers: unit magnitude, resampling, forced normalisation, attention, precision."""

import math

import pytest
import torch
import torch.nn.functional as F

from networks import Discriminator, GenerativeDenoiser, Precond, PrecondCondition
from networks.layers import MPConv, MPFourier, mp_cat, mp_silu, mp_sum, normalize, resample
from networks.unet import Block, UNetConfig
from tests.conftest import TINY_NET
from tests.golden_utils import fill_by_name

TINY = TINY_NET | {"img_channels": 3, "label_dim": 4}


def rms(x):
    return x.square().mean().sqrt().item()


def unit_noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dims", [None, (1,), (2, 3), (0, 1, 2, 3)])
def test_normalize_gives_each_group_unit_rms(dims):
    x = 37 * unit_noise(4, 6, 5, 5)
    group = (1, 2, 3) if dims is None else dims
    assert torch.allclose(normalize(x, dims).square().mean(group).sqrt(), torch.ones(1), atol=1e-4)


def test_normalize_of_zero_is_zero_and_its_norm_does_not_overflow():
    assert torch.equal(normalize(torch.zeros(2, 3)), torch.zeros(2, 3))
    big = torch.full((2, 3), 3000.0, dtype=torch.float16)  # float16 cannot hold the square
    assert torch.equal(normalize(big), torch.ones(2, 3, dtype=torch.float16))


def test_sums_concatenation_and_silu_preserve_magnitude():
    a, b = unit_noise(64, 48, 8, 8, seed=1), unit_noise(64, 16, 8, 8, seed=2)
    c = unit_noise(64, 48, 8, 8, seed=3)
    for t in (0.0, 0.3, 0.5, 0.9, 1.0):
        assert rms(mp_sum(a, c, t)) == pytest.approx(1, rel=0.01)
        assert torch.allclose(mp_sum(a, c, torch.tensor(t)), mp_sum(a, c, t), atol=1e-5)
        assert rms(mp_cat(a, b, t)) == pytest.approx(1, rel=0.01)
    assert rms(mp_silu(unit_noise(1 << 18))) == pytest.approx(1, rel=0.01)


@pytest.mark.parametrize("t", [0.3, 0.5])
def test_concatenation_balances_its_inputs_whatever_their_widths(t):
    joined = mp_cat(unit_noise(64, 48, 8, 8, seed=1), unit_noise(64, 16, 8, 8, seed=2), t)
    energy_a, energy_b = joined[:, :48].square().sum(), joined[:, 48:].square().sum()
    assert (energy_b / energy_a).sqrt().item() == pytest.approx(t / (1 - t), rel=0.02)


def test_mp_sum_passes_gradients_to_a_learned_balance():
    t = torch.zeros(1, requires_grad=True)
    a, b = unit_noise(8, 4, seed=1), unit_noise(8, 4, seed=2)
    (mp_sum(a, b, t.clamp(0, 1)) * b).sum().backward()
    assert t.grad.item() == pytest.approx(((b - a) * b + a * b).sum().item(), rel=1e-4)  # d/dt of 1/norm at 0 is 1


@pytest.mark.parametrize("kernel", [(), (1, 1), (3, 3)])
def test_convolution_preserves_magnitude_and_ignores_the_scale_of_its_weights(kernel):
    torch.manual_seed(0)
    layer = MPConv(48, 64, kernel).eval()
    x = unit_noise(*([64, 48, 12, 12] if kernel else [4096, 48]), seed=1)
    out = layer(x)
    inner = out[..., 1:-1, 1:-1] if kernel else out
    assert rms(inner.detach()) == pytest.approx(1, rel=0.02)
    with torch.no_grad():
        layer.weight.mul_(9.0)
    assert torch.allclose(layer(x), out, atol=1e-3)
    assert torch.allclose(layer(x, gain=0.25), out / 4, atol=1e-3)


def test_fourier_features_have_unit_magnitude_and_are_the_cosines():
    torch.manual_seed(0)
    layer = MPFourier(256)
    x = unit_noise(128)
    assert rms(layer(x)) == pytest.approx(1, rel=0.02)
    wanted = math.sqrt(2) * torch.cos(x[5] * layer.freqs[7] + layer.phases[7])
    assert torch.allclose(layer(x)[5, 7], wanted, atol=1e-5)
    assert layer(x.to(torch.bfloat16)).dtype == torch.bfloat16
    assert not list(layer.parameters())


def convolution_resample(x, mode, taps):
    """The definition: a depthwise convolution of stride 2, or its transpose with four times the filter."""
    taps = torch.tensor(taps, dtype=x.dtype) / sum(taps)
    kernel = taps.outer(taps)[None, None].repeat(x.shape[1], 1, 1, 1)
    padding = (len(taps) - 1) // 2
    if mode == "down":
        return F.conv2d(x, kernel, stride=2, padding=padding, groups=x.shape[1])
    return F.conv_transpose2d(x, 4 * kernel, stride=2, padding=padding, groups=x.shape[1])


@pytest.mark.parametrize("taps", [(1, 1), (3, 3), (1, 3, 3, 1), (1, 2)])
@pytest.mark.parametrize("mode", ["down", "up"])
def test_resampling_is_the_convolution(mode, taps):
    x = unit_noise(2, 3, 8, 8)
    out = resample(x, mode, taps)
    assert out.shape[-1] == {"down": 4, "up": 16}[mode]
    assert torch.allclose(out, convolution_resample(x, mode, taps), atol=1e-6)


@pytest.mark.parametrize("taps", [(1, 1), (1, 3, 3, 1), (1, 5, 10, 10, 5, 1)])
@pytest.mark.parametrize("mode", ["down", "up"])
def test_resampling_keeps_a_constant_image_in_the_interior(mode, taps):
    out = resample(torch.full((1, 2, 16, 16), 3.0), mode, taps)
    edge = 2 * len(taps)
    inner = out[..., edge // 2 : -edge // 2, edge // 2 : -edge // 2] if mode == "up" else out[..., 2:-2, 2:-2]
    assert inner.numel() and torch.allclose(inner, torch.full_like(inner, 3.0), atol=1e-6)


def test_resampling_keeps_or_refuses():
    x = unit_noise(1, 1, 4, 4)
    assert resample(x, "keep", (1, 3, 3, 1)) is x
    with pytest.raises(ValueError, match="even number of taps"):
        resample(x, "down", (1, 2, 1))


@pytest.mark.parametrize("taps", [(1, 1), (1, 3, 3, 1)])
def test_resample_compiles_without_a_break(taps):
    x = torch.randn(1, 2, 8, 8)
    compiled = torch.compile(resample, backend="eager", fullgraph=True)
    assert torch.equal(compiled(x, "down", taps), resample(x, "down", taps))


def test_forced_normalisation_happens_in_training_mode_only():
    layer = MPConv(8, 4, (3, 3))
    with torch.no_grad():
        layer.weight.mul_(5)
    before = layer.weight.detach().clone()
    x = unit_noise(2, 8, 4, 4)
    out = layer.eval()(x)
    assert torch.equal(layer.weight, before)
    trained = layer.train()(x)
    assert torch.allclose(layer.weight, normalize(before))
    assert torch.allclose(trained, out, atol=1e-3)  # the eps of the normalisation enters twice


def test_gradients_of_a_normalised_weight_are_orthogonal_to_it():
    layer = MPConv(8, 4, (3, 3)).train()
    (layer(unit_noise(2, 8, 4, 4)) * unit_noise(2, 4, 4, 4, seed=1)).sum().backward()
    dot = (layer.weight * layer.weight.grad).flatten(1).sum(1)
    length = layer.weight.flatten(1).norm(dim=1) * layer.weight.grad.flatten(1).norm(dim=1)
    assert (dot.abs() <= 1e-3 * length).all() and (length > 0).all()


def test_every_layer_is_forced_except_in_the_discriminator():
    x, y, labels = unit_noise(2, 3, 8, 8), unit_noise(2, 3, 8, 8, seed=1), torch.eye(4)[:2]

    def changed(net, *inputs):
        fill_by_name(net, 3).train()
        before = {key: tensor.clone() for key, tensor in net.state_dict().items()}
        net(*inputs)
        return {key for key, tensor in net.state_dict().items() if not torch.equal(tensor, before[key])}

    def weights(net):
        return {key for key in net.state_dict() if key.endswith(".weight")}

    teacher, conditional, discriminator = Precond(**TINY), PrecondCondition(**TINY), Discriminator(**TINY)
    assert changed(teacher, x, 1.0, labels) == {k for k in weights(teacher) if not k.startswith("logvar")}
    wanted = {k for k in weights(conditional) if not k.startswith("logvar")}
    assert changed(conditional, x, 1.0, y, 2.0, labels) == wanted
    assert changed(discriminator, x, 1.0, y, 2.0, labels) == set()


def test_blend_weights_are_clipped_when_used_and_when_stored_in_training():
    net = fill_by_name(PrecondCondition(**TINY), 3)
    x, y, labels = unit_noise(2, 3, 8, 8), unit_noise(2, 3, 8, 8, seed=1), torch.eye(4)[:2]
    with torch.no_grad():
        net.dec.additional_x_weight.fill_(1.5)
        net.dec.additional_skips_weight.fill_(-0.5)
        outside = net.eval()(x, 1.0, y, 2.0, labels)
        assert net.dec.additional_x_weight.item() == 1.5
        net.train()(x, 1.0, y, 2.0, labels)
        assert net.dec.additional_x_weight.item() == 1 and not net.dec.additional_skips_weight.any()
        clipped = fill_by_name(PrecondCondition(**TINY), 3).eval()
        clipped.dec.additional_x_weight.fill_(1)
        clipped.dec.additional_skips_weight.zero_()
        assert torch.equal(clipped(x, 1.0, y, 2.0, labels), outside)


@pytest.mark.parametrize("heads", [1, 2, 3])
def test_attention_against_explicit_softmax(heads):
    channels = 8 * heads
    balances = dict(res_balance=0.0, attn_balance=1.0)  # the output is the attention branch of the input
    config = UNetConfig(8, 1, 0, model_channels=16, channel_mult=[1], channels_per_head=8, **balances)
    block = Block(config, channels, channels, flavor="dec", attention=True)
    fill_by_name(block, 4).eval()
    assert block.num_heads == heads
    x = unit_noise(2, channels, 3, 5)
    qkv = block.attn_qkv(x)  # output channel (head·8 + channel)·3 + {0: q, 1: k, 2: v}
    pixels = torch.zeros(2, channels, 15)
    for head in range(heads):
        parts = [qkv[:, [(head * 8 + channel) * 3 + i for channel in range(8)]].reshape(2, 8, 15) for i in range(3)]
        q, k, v = (part / (1e-4 + part.square().mean(1, keepdim=True).sqrt()) for part in parts)
        weights = torch.einsum("ncq,nck->nqk", q, k / math.sqrt(8)).softmax(dim=2)
        pixels[:, head * 8 : head * 8 + 8] = torch.einsum("nqk,nck->ncq", weights, v)
    wanted = block.attn_proj(pixels.reshape(2, channels, 3, 5))
    assert torch.allclose(block(x, unit_noise(2, 16)), wanted, atol=1e-5)


def test_activations_are_clipped_and_no_heads_means_no_attention():
    config = UNetConfig(8, 1, 0, model_channels=4, channel_mult=[1], channels_per_head=64, clip_act=0.5)
    block = Block(config, 8, 8, flavor="dec", attention=True)
    fill_by_name(block, 1).eval()
    assert block.num_heads == 0 and not any("attn" in key for key in block.state_dict())
    out = block(3 * unit_noise(1, 8, 4, 4), unit_noise(1, 4))
    assert out.abs().max() == 0.5


def test_dropout_acts_in_training_mode_only():
    config = UNetConfig(8, 1, 0, model_channels=4, channel_mult=[1], dropout=0.5)
    block = fill_by_name(Block(config, 8, 8, flavor="enc"), 1)
    x, emb = unit_noise(2, 8, 4, 4), unit_noise(2, 4)
    block.eval()
    assert torch.equal(block(x, emb), block(x, emb))
    block.train()
    assert not torch.equal(block(x, emb), block(x, emb))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"img_resolution": 6, "channel_mult": [1, 2, 2]}, "cannot be halved 2 times"),
        ({"channel_mult": []}, "channel_mult"),
        ({"label_dim": -1}, "label_dim"),
        ({"model_channels": 0}, "model_channels must be at least 1"),
        ({"resample_filter": []}, "even number of taps"),
        ({"resample_filter": [1, 2, 1]}, "even number of taps"),
        ({"resample_filter": [1, -1]}, "sum is not 0"),
        ({"resample_filter": [1, float("nan")]}, "sum is not 0"),
        ({"channels_per_head": 10}, r"32 channels at 4x4 do not divide into 3 .* \(32 // 10\): change channels_per"),
        ({"attn_resolutions": [], "channels_per_head": 10}, "32 channels at 4x4"),  # the lowest level has one anyway
        ({"attn_resolutions": [8], "channels_per_head": 5}, "16 channels at 8x8 do not divide into 3"),
    ],
)
def test_impossible_architectures_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        UNetConfig(**{**TINY, **change})


def test_wide_heads_mean_no_attention():
    UNetConfig(**{**TINY, "channels_per_head": 33})
    UNetConfig(**{**TINY, "attn_resolutions": [], "model_channels": 10, "channels_per_head": 10})


def test_an_untrained_student_is_the_teacher():
    teacher = fill_by_name(Precond(**TINY), 1).eval()
    conditional = PrecondCondition(**TINY).init_from_teacher(teacher).eval()
    generator = GenerativeDenoiser(conditional, gamma=0.3).eval()
    y, z, labels = 2 * unit_noise(2, 3, 8, 8), unit_noise(2, 3, 8, 8, seed=1), torch.eye(4)[1:3]
    sigma = torch.tensor([0.5, 3.0])
    hat = 1.3 * sigma
    noisier = y + (hat**2 - sigma**2).sqrt().reshape(-1, 1, 1, 1) * z
    drawn = generator(y, sigma, labels, randn_like=lambda x: z)
    assert torch.allclose(drawn, teacher(noisier, hat, labels), atol=1e-5)
    discriminator = Discriminator(**TINY).init_from_teacher(teacher)
    assert torch.equal(discriminator.enc.enc["8x8_conv"].weight, teacher.unet.enc["8x8_conv"].weight)
    assert torch.equal(discriminator.ctrl.emb_noise.weight, teacher.unet.emb_noise.weight)


def test_a_teacher_of_another_architecture_is_refused():
    teacher = Precond(**{**TINY, "model_channels": 32})
    with pytest.raises(ValueError, match="teacher's architecture differs"):
        PrecondCondition(**TINY).init_from_teacher(teacher)


def test_missing_labels_are_the_zero_vector():
    net = fill_by_name(Precond(**TINY), 1).eval()
    x = unit_noise(2, 3, 8, 8)
    assert torch.equal(net(x, 1.0), net(x, 1.0, torch.zeros(2, 4)))
    assert not torch.equal(net(x, 1.0), net(x, 1.0, torch.eye(4)[:2]))


def test_preconditioning_limits():
    net = fill_by_name(Precond(**TINY), 1).eval()
    x = unit_noise(2, 3, 8, 8)
    assert torch.allclose(net(x, 1e-5), x, atol=1e-3)  # c_skip -> 1
    with torch.no_grad():
        net.unet.out_gain.zero_()
    assert torch.allclose(net(x, 2.0), 0.25 / 4.25 * x, atol=1e-6)  # c_skip·x
    far = net(80 * x, 80.0)
    assert torch.allclose(far, 80 * x * 0.25 / 6400.25, atol=1e-5)


@pytest.mark.parametrize("kind", [Precond, PrecondCondition, Discriminator])
def test_half_precision_on_cpu_is_refused_in_one_line(kind):
    net = kind(**TINY)
    assert net.compute_dtype == torch.float32
    with pytest.raises(ValueError, match="float16 needs a CUDA device") as error:
        net.compute_dtype = torch.float16
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="must be float32, bfloat16 or float16"):
        net.compute_dtype = torch.float64
    assert net.compute_dtype == torch.float32


def error_of(dtype, device):
    """Relative error of the teacher's and the student's network part at `dtype`, both with float32 around the U-Net."""
    worst = 0.0
    x, y, labels = unit_noise(4, 3, 8, 8), 3 * unit_noise(4, 3, 8, 8, seed=1), torch.eye(4)
    inputs = [tensor.to(device) for tensor in (x, y, labels)]
    x, y, labels = inputs
    for net, call in (
        (fill_by_name(Precond(**TINY), 1), (x, 1.0, labels)),
        (fill_by_name(PrecondCondition(**TINY), 2), (x, 1.0, y, 3.0, labels)),
    ):
        net = net.eval().to(device)
        with torch.no_grad():
            net.compute_dtype = torch.float32
            wanted = net(*call)
            net.compute_dtype = dtype
            out = net(*call)
        assert net.compute_dtype == dtype and out.dtype == torch.float32 and not torch.equal(out, wanted)
        worst = max(worst, ((out - wanted).norm() / wanted.norm()).item())
    return worst


def test_bfloat16_is_close_to_float32():
    assert error_of(torch.bfloat16, "cpu") < 0.02


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float16, 0.004), (torch.bfloat16, 0.02)])
def test_half_precision_on_a_gpu_is_close_to_float32(dtype, bound):
    assert error_of(dtype, "cuda") < bound


def test_a_generative_denoiser_passes_its_precision_on():
    generator = GenerativeDenoiser(PrecondCondition(**TINY))
    generator.compute_dtype = torch.bfloat16
    assert generator.model.compute_dtype == generator.compute_dtype == torch.bfloat16
    generator.compute_dtype = None
    assert generator.compute_dtype == torch.float32
