"""The exact quantities of the mixture against quadrature on a fine grid and against automatic differentiation."""

import pytest
import torch

from toy.check import identity_errors
from toy.inverse import NOISE_STD, FirstCoordinate
from toy.measures import energy_distance, sliced_wasserstein, spread
from toy.mixture import ExactDenoiser, GaussianMixture, spiral_arms

CELLS = 500


@pytest.fixture(scope="module")
def mixture():
    return spiral_arms()


@pytest.fixture(scope="module")
def grid(mixture):
    """Points [CELLS²,2] over the data, and the probability of each cell."""
    axis = (torch.arange(CELLS, dtype=torch.float64) + 0.5) / CELLS * 4 - 2
    points = torch.cartesian_prod(axis, axis)
    log_prob = torch.cat([mixture.prior().log_prob(part.reshape(-1, 2, 1, 1)) for part in points.split(25000)])
    return points, log_prob.exp() * (4 / CELLS) ** 2


def points(count, seed=0):
    return torch.randn(count, 2, 1, 1, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_density_integrates_to_one_and_has_the_promised_spread(grid):
    where, weight = grid
    assert weight.sum() == pytest.approx(1, abs=1e-6)
    assert (where * weight[:, None]).sum(0).abs().max() < 1e-6
    assert ((where**2 * weight[:, None]).sum() / 2).sqrt() == pytest.approx(0.5, abs=1e-4)


@pytest.mark.parametrize("sigma", [0.05, 0.3, 2.0, 80.0])
def test_posterior_mean_and_spread_agree_with_quadrature(mixture, grid, sigma):
    where, weight = grid
    y = mixture.sample(6, dtype=torch.float64) + sigma * points(6)
    posterior = mixture.posterior(y, sigma)
    for i in range(len(y)):
        likelihood = (-0.5 * (where - y[i, :, 0, 0]).square().sum(1) / sigma**2).exp() * weight
        likelihood /= likelihood.sum()
        mean = (where * likelihood[:, None]).sum(0)
        covariance = torch.einsum("n,nd,ne->de", likelihood, where - mean, where - mean)
        weights = posterior.log_weights[i].exp()[:, None]
        deviation = posterior.means[i] - mean
        found = (weights[..., None] * (posterior.covariances[i] + deviation[:, :, None] * deviation[:, None])).sum(0)
        assert torch.allclose(mixture(y, sigma)[i, :, 0, 0], mean, atol=1e-5)
        assert torch.allclose((weights * posterior.means[i]).sum(0), mean, atol=1e-5)
        assert torch.allclose(found, covariance, atol=1e-5)


def test_posterior_of_one_coordinate_agrees_with_quadrature(mixture, grid):
    where, weight = grid
    values = torch.tensor([-0.6, 0.1, 0.45], dtype=torch.float64)
    posterior = mixture.posterior_of_coordinate(values, NOISE_STD)
    for i, value in enumerate(values):
        likelihood = (-0.5 * (where[:, 0] - value) ** 2 / NOISE_STD**2).exp() * weight
        likelihood /= likelihood.sum()
        exact = (where * likelihood[:, None]).sum(0), (where**2 * likelihood[:, None]).sum(0)
        weights = posterior.log_weights[i].exp()[:, None]
        second = posterior.means[i] ** 2 + posterior.covariances[i].diagonal(dim1=-2, dim2=-1)
        assert torch.allclose((weights * posterior.means[i]).sum(0), exact[0], atol=1e-5)
        assert torch.allclose((weights * second).sum(0), exact[1], atol=1e-5)


@pytest.mark.parametrize("sigma", [0.01, 1.0, 80.0])
def test_score_is_the_gradient_of_the_log_density(mixture, sigma):
    x = (mixture.sample(20, dtype=torch.float64) + sigma * points(20)).requires_grad_(True)
    (gradient,) = torch.autograd.grad(mixture.prior(20).log_prob(x, sigma).sum(), x)
    assert torch.allclose(mixture.score(x.detach(), sigma), gradient, rtol=1e-8)


def test_draws_of_the_posterior_have_its_mean_and_spread(mixture):
    torch.manual_seed(0)
    y = torch.tensor([[0.3, -0.2], [0.0, 0.6]], dtype=torch.float64).reshape(2, 2, 1, 1)
    posterior = mixture.posterior(y, 0.4)
    draws = posterior.sample(40000)
    assert torch.allclose(draws.mean(1), mixture(y, 0.4).flatten(1), atol=0.01)
    second = (
        posterior.log_weights.exp()[..., None] * (posterior.means**2 + posterior.covariances.diagonal(0, 2, 3))
    ).sum(1)
    assert torch.allclose(draws.square().mean(1), second, atol=0.01)
    exact = ExactDenoiser(mixture)(y.repeat_interleave(4000, 0), 0.4).reshape(2, 4000, 2)
    assert (energy_distance(exact, draws[:, :4000]) < 0.003).all()


def test_score_identity_holds_at_every_pair_of_noise_levels(mixture):
    rows = identity_errors(mixture, points=64)
    assert {row["sigma"] for row in rows} == {row["t"] for row in rows} and len(rows) == 64
    assert max(row["largest_relative_error"] for row in rows) < 1e-9


def test_score_identity_fails_for_the_unconditional_score(mixture, monkeypatch):
    monkeypatch.setattr("toy.check.combine_observations", lambda y, sigma, x_t, t: (x_t, t))
    rows = identity_errors(mixture, (0.3,), points=64)
    assert rows[0]["largest_relative_error"] > 0.1


def test_single_precision_denoiser_agrees_with_double(mixture):
    for sigma in (0.002, 0.3, 80.0):
        x = mixture.sample(200, dtype=torch.float64) + sigma * points(200)
        error = (mixture(x.float(), sigma) - mixture(x, sigma)).abs().max()
        assert error < 1e-4 * min(1, sigma * 10)


def test_energy_distance_and_projections_of_known_sets():
    a, b = torch.zeros(1, 5, 2), torch.tensor([3.0, 4.0]).expand(1, 7, 2)
    assert energy_distance(a, b).item() == pytest.approx(10)
    cloud = torch.randn(2, 300, 2)
    assert energy_distance(cloud, cloud).abs().max() < 1e-6
    shifted = cloud + torch.tensor([0.6, 0.8])
    assert sliced_wasserstein(cloud, shifted, 360).tolist() == pytest.approx([2 / torch.pi] * 2, rel=1e-3)
    assert torch.allclose(spread(3 * cloud), 3 * spread(cloud))


def test_first_coordinate_operator():
    operator, x, v = FirstCoordinate(), points(50), points(50, 1)[:, :1]
    assert (operator.forward(x) * v).sum().item() == pytest.approx((x * operator.adjoint(v)).sum().item())
    mean = operator.sample_conditional(x, v, 0.2, 0.5, torch.zeros_like)
    precision = 1 / 0.2**2 + 1 / 0.5**2
    assert torch.allclose(mean[:, :1], (v / 0.2**2 + x[:, :1] / 0.5**2) / precision)
    assert torch.equal(mean[:, 1:], x[:, 1:])
    noise = operator.sample_conditional(x, v, 0.2, 0.5, torch.ones_like) - mean
    assert torch.allclose(noise[:, 0], torch.tensor(precision**-0.5, dtype=torch.float64))
    assert torch.allclose(noise[:, 1], torch.tensor(0.5, dtype=torch.float64))


def test_mixture_weights_need_not_be_normalised(mixture):
    double = GaussianMixture(2 * mixture.log_weights.exp(), mixture.means, mixture.axes, mixture.variances)
    assert torch.allclose(double.log_weights, mixture.log_weights)
