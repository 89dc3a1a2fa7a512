import pytest
import torch

from sampling.ode import guided_denoiser, heun_sampler

MEAN, STD = 0.2, 0.5


def gaussian_denoiser(x, sigma):
    """E[x0 | x] for data N(MEAN, STD²)."""
    return (STD**2 * x + sigma**2 * MEAN) / (STD**2 + sigma**2)


def error(num_steps):
    """Largest error against the exact flow x(0) = MEAN + (x(80) - MEAN)·STD/sqrt(STD² + 80²)."""
    noise = torch.linspace(-2, 2, 8, dtype=torch.float64).reshape(2, 1, 2, 2)
    exact = MEAN + (80 * noise - MEAN) * STD / (STD**2 + 80**2) ** 0.5
    drawn = heun_sampler(gaussian_denoiser, noise, num_steps=num_steps)
    return (drawn - exact).abs().max().item()


def test_heun_converges_to_the_exact_flow():
    errors = [error(n) for n in (16, 32, 64, 128)]
    ratios = [a / b for a, b in zip(errors, errors[1:], strict=False)]
    assert errors[1] < 0.02 and min(ratios) > 3  # second order: about 4 per doubling


def test_number_of_evaluations():
    levels = []

    def denoiser(x, sigma):
        levels.append(sigma.item())
        return torch.zeros_like(x)

    heun_sampler(denoiser, torch.zeros(1, 1, 2, 2))
    assert len(levels) == 63
    assert levels[0] == pytest.approx(80) and levels[-1] == pytest.approx(0.002)


class Net:
    def __init__(self, value, label_dim):
        self.value, self.label_dim, self.calls = value, label_dim, []

    def __call__(self, x, sigma, labels=None):
        self.calls.append(labels)
        return torch.full_like(x, self.value)


def test_guidance_one_is_the_network_alone():
    net, gnet, labels = Net(2.0, 3), Net(1.0, 3), torch.eye(3)
    out = guided_denoiser(net, gnet, 1.0, labels)(torch.zeros(3, 1, 2, 2), 1.0)
    assert torch.equal(out, torch.full_like(out, 2.0))
    assert net.calls == [labels] and gnet.calls == []


@pytest.mark.parametrize(
    ("gnet_classes", "gnet_labels", "sees_labels"), [(3, True, True), (3, False, False), (0, True, False)]
)
def test_guidance_extrapolates_from_the_guiding_network(gnet_classes, gnet_labels, sees_labels):
    net, gnet, labels = Net(2.0, 3), Net(1.5, gnet_classes), torch.eye(3)
    out = guided_denoiser(net, gnet, 3.0, labels, gnet_labels=gnet_labels)(torch.zeros(3, 1, 2, 2), 1.0)
    assert torch.equal(out, torch.full_like(out, 1.5 + 3 * 0.5))
    assert net.calls == [labels] and gnet.calls == [labels if sees_labels else None]


def test_a_network_guides_itself_without_labels():
    net, labels = Net(2.0, 3), torch.eye(3)
    guided_denoiser(net, None, 2.0, labels, gnet_labels=False)(torch.zeros(3, 1, 2, 2), 1.0)
    assert net.calls == [None, labels]
