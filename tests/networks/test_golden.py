"""Networks and losses against numbers of the public implementations, and the published parameter counts."""

import pytest
import torch

from networks import Discriminator, GenerativeDenoiser, Precond, PrecondCondition
from tests.golden_utils import fill_by_name, golden_arrays, golden_config, golden_json
from training.losses import discriminator_loss, edm2_loss, generator_loss, score_loss

DATA = golden_arrays()
FACTS = golden_json()


def drawing(*indices):
    """A randn_like that returns the given golden noise tensors in turn."""
    draws = iter(indices)
    return lambda x: DATA["noise"][next(draws)].to(x.dtype)


def build(kind, offset):
    return fill_by_name(kind(**golden_config()), FACTS["seed"] + offset).eval()


@pytest.fixture
def teacher():
    return build(Precond, 0)


@pytest.fixture
def generator():
    return GenerativeDenoiser(build(PrecondCondition, 1)).eval()


@pytest.fixture
def discriminator():
    return build(Discriminator, 2)


@pytest.fixture
def score_net():
    return build(PrecondCondition, 3)


@pytest.fixture
def at():
    """Golden inputs: images, y, sigma, t, labels, and x_t = images + n[1]·t."""
    images, sigma, t = DATA["images"], DATA["sigma"], DATA["t"]
    y = images + DATA["noise"][0] * sigma.reshape(-1, 1, 1, 1)
    x_t = images + DATA["noise"][1] * t.reshape(-1, 1, 1, 1)
    return dict(images=images, y=y, sigma=sigma, t=t, labels=DATA["labels"], x_t=x_t)


def assert_golden(name, value):
    wanted = DATA[name]
    assert value.numel() == wanted.numel(), f"{name}: {list(value.shape)} against {list(wanted.shape)}"
    error = (value.detach().reshape(wanted.shape) - wanted).abs().max()
    assert error <= 1e-4 * wanted.abs().max(), f"{name} is off by {error:.2e}"


def assert_golden_gradients(name, net, loss):
    (loss.sum() / len(DATA["images"])).backward()
    norms = {key: parameter.grad.norm().item() for key, parameter in net.named_parameters()}
    assert norms.keys() == FACTS[name].keys()
    for key, wanted in FACTS[name].items():
        assert norms[key] == pytest.approx(wanted, rel=1e-3), key


def test_inputs_are_the_golden_ones(at):
    for name, value in (("y", at["y"]), ("cond_x", at["x_t"])):
        assert_golden(name, value)


@pytest.mark.parametrize(
    ("kind", "name"),
    [(Precond, "teacher"), (PrecondCondition, "cond"), (Discriminator, "disc")],
)
def test_checkpoint_keys_and_shapes(kind, name):
    wanted = FACTS[f"{name}_shapes"]
    assert {key: list(tensor.shape) for key, tensor in kind(**golden_config()).state_dict().items()} == wanted


def test_keys_of_a_generative_denoiser_have_a_prefix():
    inner = PrecondCondition(**golden_config())
    assert list(GenerativeDenoiser(inner).state_dict()) == [f"model.{key}" for key in inner.state_dict()]


@torch.no_grad()
def test_teacher(teacher, at):
    denoised, logvar = teacher(at["y"], at["sigma"], at["labels"], return_logvar=True)
    assert_golden("teacher_denoised", denoised)
    assert_golden("teacher_logvar", logvar)
    assert logvar.shape == (len(at["y"]), 1, 1, 1)


@torch.no_grad()
def test_conditional_denoiser(generator, at):
    net = generator.model
    denoised, logvar = net(at["x_t"], at["t"], at["y"], at["sigma"], at["labels"], return_logvar=True)
    assert_golden("cond_denoised", denoised)
    assert_golden("cond_logvar", logvar)


@torch.no_grad()
def test_discriminator(discriminator, at):
    logits = discriminator(at["x_t"], at["t"], at["y"], at["sigma"], at["labels"])
    assert logits.shape == (len(at["y"]),)
    assert_golden("disc_logits", logits)


@torch.no_grad()
def test_generative_denoiser(generator, at):
    y, sigma, labels = at["y"], at["sigma"], at["labels"]
    assert_golden("gd_onestep", generator(y, sigma, labels, randn_like=drawing(0)))
    noise = DATA["gd_multistep_init"]
    assert torch.equal(noise, DATA["noise"][7])
    few = generator(80 * noise, 80.0, labels, ts=[10, 22, 39], randn_like=drawing(0, 1, 2, 3))
    assert_golden("gd_multistep_ts_10_22_39", few)
    few = generator(y, sigma, labels, ts=[0, 14, 39], randn_like=drawing(0, 1, 2, 3))
    assert_golden("gd_multistep_y_ts_0_14_39", few)


def test_score_loss(generator, score_net, at):
    score_net.train()
    loss = score_loss(generator, score_net, at["y"], at["sigma"], at["t"], at["labels"], randn_like=drawing(1, 2))
    assert_golden("dsm_loss", loss)
    assert_golden_gradients("dsm_gradnorm", score_net, loss)


def test_discriminator_loss(generator, discriminator, at):
    discriminator.train()
    fake, real = discriminator_loss(
        generator,
        discriminator,
        at["images"],
        at["y"],
        at["sigma"],
        at["t"],
        at["labels"],
        randn_like=drawing(1, 2, 3),
    )
    assert_golden("fake_loss", fake)
    assert_golden("real_loss", real)
    assert_golden_gradients("disc_gradnorm", discriminator, (0.5 * (fake + real)).expand_as(at["images"]))


def test_generator_loss(generator, teacher, score_net, discriminator, at):
    generator.train()
    vsd, gan = generator_loss(
        generator,
        teacher,
        score_net,
        discriminator,
        at["y"],
        at["sigma"],
        at["t"],
        at["labels"],
        randn_like=drawing(1, 2),
    )
    assert_golden("vsd_loss", vsd)
    assert_golden("gan_loss", gan)
    assert_golden_gradients("gen_gradnorm", generator.model, vsd + gan)


@torch.no_grad()
def test_edm2_loss_is_the_weighted_error_of_the_golden_denoiser(teacher, at):
    loss = edm2_loss(teacher, at["images"], at["sigma"], at["labels"], randn_like=drawing(0))
    sigma = at["sigma"].reshape(-1, 1, 1, 1)
    u = DATA["teacher_logvar"].reshape(-1, 1, 1, 1)
    error = DATA["teacher_denoised"] - at["images"]
    wanted = (sigma**2 + 0.25) / (0.5 * sigma) ** 2 / u.exp() * error**2 + u
    assert (loss - wanted).abs().max() <= 1e-4 * wanted.abs().max()


# img_resolution, img_channels, label_dim, model_channels, parameters of Precond and of PrecondCondition
PUBLISHED = {
    "img512-xs": (64, 4, 1000, 128, 124_713_253, 164_147_141),
    "img512-s": (64, 4, 1000, 192, 280_212_837, 368_166_725),
    "img512-m": (64, 4, 1000, 256, 497_807_781, 653_483_717),
    "img512-l": (64, 4, 1000, 320, 777_498_085, 1_020_098_117),
    "img64-s": (64, 3, 1000, 192, 280_209_381, 368_161_541),
    "ffhq256-xs": (256, 3, 0, 128, 112_730_149, 146_223_685),
}


@pytest.mark.parametrize("size", PUBLISHED)
def test_published_parameter_counts(size):
    resolution, channels, classes, width, teacher_count, conditional_count = PUBLISHED[size]
    with torch.device("meta"):
        teacher = Precond(resolution, channels, classes, model_channels=width)
        conditional = PrecondCondition(resolution, channels, classes, model_channels=width)
    assert sum(p.numel() for p in teacher.parameters()) == teacher_count
    assert sum(p.numel() for p in conditional.parameters()) == conditional_count
