import math

import pytest
import torch

from sampling.grids import describe_ts, few_step_sigmas, karras_sigmas, parse_ts
from sampling.posterior import combine_observations, expand_sigma, few_step_posterior
from tests.golden_utils import golden_arrays


@pytest.mark.parametrize(
    ("entry", "num", "rho"), [("karras_40_rho7", 40, 7), ("karras_50_rho2", 50, 2), ("uniform_sigmas_1000", 1000, 7)]
)
def test_karras_grid_matches_golden(entry, num, rho):
    wanted = golden_arrays("schedules.npz")[entry]
    torch.testing.assert_close(karras_sigmas(num, rho=rho), wanted, rtol=1e-5, atol=0)


def test_karras_grid_in_float64_hits_its_ends():
    grid = karras_sigmas(18, 0.01, 50, 3, dtype=torch.float64)
    assert grid[0].item() == pytest.approx(50, rel=1e-12) and grid[-1].item() == pytest.approx(0.01, rel=1e-12)
    assert (grid.diff() < 0).all()


@pytest.mark.parametrize("kwargs", [{"num": 1}, {"num": 5, "sigma_min": 90.0}, {"num": 5, "rho": 0.0}])
def test_karras_grid_rejects_impossible_ranges(kwargs):
    with pytest.raises(ValueError, match="Karras grid needs"):
        karras_sigmas(**kwargs)


def test_few_step_sigmas_are_the_published_levels():
    levels = few_step_sigmas([0, 10, 12, 14, 20, 22, 30, 39])
    wanted = torch.tensor([80, 16.780, 11.719, 8.026, 2.2404, 1.3824, 0.1312, 0.002])
    torch.testing.assert_close(levels, wanted, rtol=5e-4, atol=0)


@pytest.mark.parametrize("ts", [[], [39], [10], [10, 10, 39], [22, 10], [-1, 39], [10, 40], [10.5, 39], [True, 39]])
def test_few_step_sigmas_rejects_bad_indices(ts):
    with pytest.raises(ValueError, match="^ts "):
        few_step_sigmas(ts)


def test_parse_ts_adds_the_end():
    assert parse_ts(" 10, 22,39") == ((10, 22, 39), False)
    assert parse_ts("10,22") == ((10, 22, 39), True)
    assert parse_ts("0") == ((0, 39), True)
    assert parse_ts([0, 14, 39]) == ((0, 14, 39), False)


@pytest.mark.parametrize("text", ["", "a", "10;39", "10,,39", "39", "22,10", "10,99", "-3,39", "1.5"])
def test_parse_ts_rejects(text):
    with pytest.raises(ValueError, match="^ts "):
        parse_ts(text)


def test_describe_ts_names_the_evaluated_levels():
    assert describe_ts([10, 22, 39]) == "2 steps at noise levels 16.78, 1.382"
    assert describe_ts([0, 39], sigma_max=40.0) == "1 step at noise level 40"


def test_combined_observation_is_the_precision_weighted_mean():
    generator = torch.Generator().manual_seed(0)
    y, x = (torch.randn(3, 2, 4, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    sigma, t = torch.tensor([0.3, 2.0, 80.0]), 1.7
    y_eff, sigma_eff = combine_observations(y, sigma, x, t)
    s, t = sigma.double().reshape(3, 1, 1, 1), torch.tensor(t, dtype=torch.float64)
    wanted = (s**-2 + t**-2) ** -0.5
    torch.testing.assert_close(sigma_eff.double(), wanted, rtol=1e-6, atol=0)
    torch.testing.assert_close(y_eff.double(), wanted**2 * (y / s**2 + x / t**2), rtol=1e-5, atol=1e-6)


def test_combined_observation_stays_exact_at_extreme_levels():
    y, x = torch.full((1, 1, 1, 1), 3.0), torch.full((1, 1, 1, 1), 5.0)
    y_eff, sigma_eff = combine_observations(y, 1e-20, x, 80.0)  # the squares underflow in float32
    assert y_eff.item() == 3 and sigma_eff.item() == pytest.approx(1e-20)
    y_eff, sigma_eff = combine_observations(y, 80.0, x, 80.0)
    assert y_eff.item() == pytest.approx(4) and sigma_eff.item() == pytest.approx(80 / math.sqrt(2), rel=1e-6)


def test_sigma_shapes():
    x = torch.zeros(3, 2, 4, 4)
    per_sample = torch.tensor([1.0, 2.0, 3.0])
    for sigma in (per_sample, per_sample.reshape(3, 1, 1, 1)):
        assert torch.equal(expand_sigma(sigma, x).flatten(), per_sample)
        assert expand_sigma(sigma, x).shape == (3, 1, 1, 1)
    for sigma in (2.0, torch.tensor(2.0), torch.tensor([2.0]), torch.full((1, 1, 1, 1), 2.0)):
        assert torch.equal(expand_sigma(sigma, x), torch.full((3, 1, 1, 1), 2.0))
    for sigma in (torch.ones(2), torch.ones(1, 3), torch.ones(3, 2, 4, 4)):
        with pytest.raises(ValueError, match="does not fit"):
            expand_sigma(sigma, x)


def gaussian_posterior(mean, std, randn_like):
    """Exact draws of p(x0 | y) for data N(mean, std²)."""

    def denoiser(y, sigma):
        variance = 1 / (1 / std**2 + 1 / sigma**2)
        return variance * (mean / std**2 + y / sigma**2) + variance.sqrt() * randn_like(y)

    return denoiser


@pytest.mark.parametrize("zeta", [0.0, 0.3, 0.7, 1.0])
@pytest.mark.parametrize("sigma", [0.6, 80.0])
def test_few_step_draws_have_the_exact_posterior_moments(zeta, sigma):
    mean, std, y_value, n = 0.25, 0.5, 0.9, 60_000
    generator = torch.Generator().manual_seed(3)

    def randn_like(x):
        return torch.randn(x.shape, generator=generator)

    y = torch.full((n, 1, 1, 1), y_value)
    levels = few_step_sigmas([0, 20, 24, 30, 39])
    x0 = few_step_posterior(
        gaussian_posterior(mean, std, randn_like), y, sigma, levels, zeta=zeta, randn_like=randn_like
    )
    variance = 1 / (1 / std**2 + 1 / sigma**2)
    assert x0.mean().item() == pytest.approx(variance * (mean / std**2 + y_value / sigma**2), abs=5 * std / n**0.5)
    assert x0.var().item() == pytest.approx(variance, rel=5 * (2 / n) ** 0.5)


def test_draws_come_in_order_and_none_after_the_last_evaluation():
    events = []

    def randn_like(x):
        events.append("noise")
        return torch.zeros_like(x)

    def denoiser(y, sigma):
        events.append(round(sigma.flatten()[0].item(), 3))
        return torch.zeros_like(y)

    few_step_posterior(denoiser, torch.zeros(2, 1, 4, 4), 1e6, [80.0, 2.0, 0.002], randn_like=randn_like)
    assert events == ["noise", 80.0, "noise", 2.0]


@pytest.mark.parametrize("zeta", [-0.1, 1.1, math.nan])
def test_zeta_outside_its_range(zeta):
    with pytest.raises(ValueError, match="zeta"):
        few_step_posterior(lambda y, sigma: y, torch.zeros(1, 1, 4, 4), 80.0, [80.0, 0.002], zeta=zeta)


def test_a_single_level_is_no_schedule():
    with pytest.raises(ValueError, match="two noise levels"):
        few_step_posterior(lambda y, sigma: y, torch.zeros(1, 1, 4, 4), 80.0, [80.0])
