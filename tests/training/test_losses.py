"""The losses' mathematics: the score identity on Gaussian data, and who receives which gradient."""

import pytest
import torch
from torch import nn

from networks import Discriminator, GenerativeDenoiser, Precond, PrecondCondition
from sampling.seeds import SeededNoise
from tests.conftest import TINY_NET
from tests.golden_utils import fill_by_name
from training.losses import discriminator_loss, edm2_loss, generator_loss, score_loss

N = 4
SIGMA = torch.tensor([0.3, 1.0, 5.0, 40.0])
T = torch.tensor([2.0, 0.1, 5.0, 0.7])


def level(values):
    return values.reshape(-1, 1, 1, 1)


def noise(seed=0):
    return SeededNoise(range(100 * seed, 100 * seed + N))


def weight(t, sigma_data=0.5):
    return (t**2 + sigma_data**2) / (t * sigma_data) ** 2


class Fixed(nn.Module):
    """A network that returns given tensors, counts its calls and keeps its inputs."""

    sigma_data = 0.5

    def __init__(self, output, logvar=None):
        super().__init__()
        self.output, self.logvar, self.calls = output, logvar, []

    def forward(self, *inputs, return_logvar=False, randn_like=None):
        self.calls.append(inputs)
        return (self.output, self.logvar) if return_logvar else self.output


class GaussianTeacher(nn.Module):
    """E[x0 | x0 + sigma·n] for x0 ~ N(mean, std²), pixel by pixel."""

    def __init__(self, mean, std):
        super().__init__()
        self.mean, self.std = mean, std

    def forward(self, x, sigma, labels=None):
        return (self.std**2 * x + level(sigma) ** 2 * self.mean) / (self.std**2 + level(sigma) ** 2)


@pytest.fixture
def images():
    return 0.5 * noise(9).randn([N, 1, 8, 8])


@pytest.fixture
def nets():
    """teacher, generator, score net and discriminator with different random weights, in eval mode."""
    teacher = fill_by_name(Precond(**TINY_NET), 1).eval()
    generator = GenerativeDenoiser(fill_by_name(PrecondCondition(**TINY_NET), 2)).eval()
    score_net = fill_by_name(PrecondCondition(**TINY_NET), 3).eval()
    return teacher, generator, score_net, fill_by_name(Discriminator(**TINY_NET), 4).eval()


def test_score_identity_on_gaussian_data(images):
    """The exact E[x0 | x_t, y] of Gaussian data, by conditioning the joint Gaussian, zeroes the generator's loss."""
    mean, std = 0.4, 0.7
    draws = iter([noise(2).randn(images.shape)])
    y = images + level(SIGMA) * noise(1).randn(images.shape)
    x = 0.3 * noise(5).randn(images.shape)
    x_t = x + level(T) * noise(2).randn(images.shape)
    exact = torch.empty_like(x_t)
    for i in range(N):
        # x0, y, x_t jointly normal: E[x0 | y, x_t] = mean + cov(x0, ·) cov(·, ·)^-1 (· - mean)
        covariance = torch.full((2, 2), std**2, dtype=torch.float64)
        covariance += torch.diag(torch.stack([SIGMA[i], T[i]]).double() ** 2)
        gain = torch.linalg.solve(covariance, torch.full((2,), std**2, dtype=torch.float64)).float()
        exact[i] = mean + gain[0] * (y[i] - mean) + gain[1] * (x_t[i] - mean)

    u = level(torch.tensor([0.2, -0.5, 1.0, 0.0]))
    generator, score_net = Fixed(x, u), Fixed(exact)
    teacher = GaussianTeacher(mean, std)
    vsd, gan = generator_loss(generator, teacher, score_net, None, y, SIGMA, T, randn_like=lambda like: next(draws))
    squares = (vsd - u) * u.exp() / weight(level(T))
    assert gan is None and squares.shape == x.shape and squares.abs().max() < 1e-8
    seen_x_t, seen_t, seen_y, seen_sigma, _ = score_net.calls[0]
    assert torch.equal(seen_x_t, x_t) and torch.equal(seen_t.flatten(), T)
    assert seen_y is y and seen_sigma is SIGMA


def test_gradient_of_the_generators_loss_at_its_sample(images):
    """Without the adversarial part it is w/exp(u)·2·(S - D_teacher): no derivative of either network enters."""
    x = images.clone().requires_grad_(True)
    u = level(torch.tensor([0.2, -0.5, 1.0, 0.0]))
    target, estimate = noise(1).randn(images.shape), noise(2).randn(images.shape)
    vsd, _ = generator_loss(
        Fixed(x, u), Fixed(target), Fixed(estimate), None, images, SIGMA, T, randn_like=noise(3).randn_like
    )
    wanted_loss = weight(level(T)) / u.exp() * (estimate - target) ** 2 + u
    assert torch.allclose(vsd, wanted_loss, rtol=1e-4, atol=1e-4)
    vsd.sum().backward()
    wanted = weight(level(T)) / u.exp() * 2 * (estimate - target)
    assert torch.allclose(x.grad, wanted, rtol=1e-4, atol=1e-4)


def test_gradient_of_the_adversarial_loss_reaches_the_sample_through_x_t(nets, images):
    _, _, _, discriminator = nets
    x = images.clone().requires_grad_(True)
    labels = torch.eye(3)[[0, 1, 2, 0]]
    flat = Fixed(torch.zeros_like(images))
    _, gan = generator_loss(
        Fixed(x, level(torch.zeros(N))),
        flat,
        flat,
        discriminator,
        images,
        SIGMA,
        T,
        labels,
        randn_like=noise(3).randn_like,
    )
    assert gan.shape == (N, 1, 1, 1)
    gan.sum().backward()
    x_t = (images + level(T) * noise(3).randn(images.shape)).requires_grad_(True)
    logits = discriminator(x_t, T, images, SIGMA, labels)
    wanted_loss = torch.log1p((-logits).exp())  # -log sigmoid
    assert torch.allclose(gan.flatten(), wanted_loss, atol=1e-5)
    wanted_loss.sum().backward()
    assert torch.allclose(x.grad, x_t.grad, atol=1e-6) and x.grad.abs().max() > 0


def test_without_a_discriminator_there_is_no_adversarial_loss(nets, images):
    teacher, generator, score_net, discriminator = nets
    labels = torch.eye(3)[[0, 1, 2, 0]]
    arguments = (generator, teacher, score_net)
    called = []
    discriminator.register_forward_hook(lambda *_: called.append(1))
    vsd, gan = generator_loss(*arguments, None, images, SIGMA, T, labels, randn_like=noise(1).randn_like)
    assert gan is None and not called
    both, gan = generator_loss(*arguments, discriminator, images, SIGMA, T, labels, randn_like=noise(1).randn_like)
    assert torch.equal(vsd, both) and gan is not None and called == [1]


def gradients_and_changes(trained, frozen, loss):
    """Frozen networks that were rewritten or got gradients, and the trained one's parameters that got none."""
    for net in [trained, *frozen]:
        net.requires_grad_(True)
    trained.train()
    before = [{key: value.clone() for key, value in net.state_dict().items()} for net in frozen]
    loss().sum().backward()
    touched = []
    for net, weights in zip(frozen, before, strict=True):
        same = all(torch.equal(value, weights[key]) for key, value in net.state_dict().items())
        if not same or any(p.grad is not None for p in net.parameters()):
            touched.append(type(net).__name__)
    return touched, [key for key, p in trained.named_parameters() if p.grad is None]


@pytest.mark.parametrize("phase", ["score", "discriminator", "generator"])
def test_only_the_trained_network_is_touched(nets, images, phase):
    teacher, generator, score_net, discriminator = nets
    y = images + level(SIGMA) * noise(1).randn(images.shape)
    at = (y, SIGMA, T, torch.eye(3)[[0, 1, 2, 0]])
    draw = dict(randn_like=noise(2).randn_like)
    everyone = {"teacher": teacher, "generator": generator, "score": score_net, "discriminator": discriminator}
    losses = {
        "score": lambda: score_loss(generator, score_net, *at, **draw),
        "discriminator": lambda: sum(discriminator_loss(generator, discriminator, images, *at, **draw)),
        "generator": lambda: generator_loss(generator, teacher, score_net, None, *at, **draw)[0],
    }
    frozen = [net for name, net in everyone.items() if name != phase]
    touched, without = gradients_and_changes(everyone[phase], frozen, losses[phase])
    assert touched == []
    assert [key for key in without if "logvar" not in key] == [], "parameters without gradient"


def test_the_adversarial_loss_does_not_train_a_frozen_discriminator(nets, images):
    teacher, generator, score_net, discriminator = nets
    discriminator.requires_grad_(False)
    before = {key: value.clone() for key, value in discriminator.state_dict().items()}
    generator.train()
    vsd, gan = generator_loss(
        generator, teacher, score_net, discriminator, images, SIGMA, T, None, randn_like=noise(1).randn_like
    )
    (vsd + gan).sum().backward()
    assert all(torch.equal(value, before[key]) for key, value in discriminator.state_dict().items())
    assert all(p.grad is None for p in [*discriminator.parameters(), *score_net.parameters(), *teacher.parameters()])
    assert all(p.grad is not None for p in generator.parameters())


def test_score_loss_is_the_weighted_denoising_error(images):
    x, denoised = noise(1).randn(images.shape), noise(2).randn(images.shape)
    u = level(torch.tensor([0.3, -0.1, 0.0, 2.0]))
    score_net = Fixed(denoised, u)
    loss = score_loss(Fixed(x), score_net, images, SIGMA, T, randn_like=noise(3).randn_like)
    wanted = weight(level(T)) / u.exp() * (denoised - x) ** 2 + u
    assert torch.allclose(loss, wanted, rtol=1e-5)
    x_t = x + level(T) * noise(3).randn(images.shape)
    assert torch.equal(score_net.calls[0][0], x_t)


def test_discriminator_loss_sees_real_and_generated_images_at_the_same_level(images):
    x = noise(1).randn(images.shape)
    logits = torch.tensor([0.5, -1.0, 2.0, 0.0])
    discriminator = Fixed(logits)
    fake, real = discriminator_loss(Fixed(x), discriminator, images, images, SIGMA, T, randn_like=noise(3).randn_like)
    assert torch.allclose(real.flatten(), -logits.sigmoid().log(), atol=1e-6)
    assert torch.allclose(fake.flatten(), -(1 - logits.sigmoid()).log(), atol=1e-6)
    inputs = {name: call for name, call in zip(("real", "fake"), discriminator.calls, strict=True)}
    draws = noise(3)
    n_real, n_fake = draws.randn(images.shape), draws.randn(images.shape)
    assert torch.equal(inputs["real"][0], images + level(T) * n_real)
    assert torch.equal(inputs["fake"][0], x + level(T) * n_fake)
    assert torch.equal(inputs["real"][1].flatten(), T) and torch.equal(inputs["fake"][1].flatten(), T)


def test_edm2_loss_is_least_at_the_true_uncertainty(images):
    """For a fixed error e, w/exp(u)·e² + u has its minimum at u = ln(w·e²)."""
    sigma = torch.full((N,), 0.7)
    u = level(torch.full((N,), 0.1)).requires_grad_(True)
    loss = edm2_loss(Fixed(images + 0.3, u), images, sigma, randn_like=noise(1).randn_like)
    assert torch.allclose(loss, weight(level(sigma)) / u.exp() * 0.09 + u, atol=1e-5)
    best = (weight(level(sigma)) * 0.09).log().requires_grad_(True)
    edm2_loss(Fixed(images + 0.3, best), images, sigma, randn_like=noise(1).randn_like).sum().backward()
    assert best.grad.abs().max() < 1e-3
