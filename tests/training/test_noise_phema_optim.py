"""Noise levels, the images' random streams, learning rates, power-function EMA, gradient checks."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from torch import nn

from tests.golden_utils import golden_arrays
from training.noise import LogNormalSigma, UniformKarrasSigma, training_noise
from training.optim import count_nonfinite, learning_rate, zero_nonfinite
from training.phema import PowerFunctionEMA, power_function_beta, solve_posthoc_coefficients, std_to_exp
from training.presets import EDM2Config, NCVSDConfig, load_config

GOLDEN = {key: value.numpy() for key, value in golden_arrays("schedules.npz").items()}


# ----------------------------------------------------------------------------
# noise


def test_training_noise_belongs_to_seed_and_position():
    whole = training_noise(5, range(8)).randn([8, 3])
    split = [training_noise(5, range(first, 8, 2)).randn([4, 3]) for first in (0, 1)]
    assert torch.equal(whole[0::2], split[0]) and torch.equal(whole[1::2], split[1])
    assert torch.equal(whole[3:5], training_noise(5, [3, 4]).randn([2, 3]))
    assert not torch.equal(whole, training_noise(6, range(8)).randn([8, 3]))
    assert len({tuple(row) for row in whole.tolist()}) == 8


def test_neighbouring_streams_are_uncorrelated():
    draws = torch.cat([training_noise(seed, range(2000)).randn([2000, 2]) for seed in (0, 1)], dim=1)
    shifted = torch.cat([draws[:-1], draws[1:]], dim=1)  # also against the next position's
    correlation = torch.corrcoef(shifted.T) - torch.eye(8)
    assert correlation.abs().max() < 0.1


def test_uniform_karras_levels():
    grid = GOLDEN["uniform_sigmas_1000"]
    levels = UniformKarrasSigma().sample(training_noise(0, range(4000)), 4000)
    assert levels.shape == (4000, 1, 1, 1)
    distance = np.abs(levels.flatten().numpy()[:, None] / grid[None] - 1)
    assert distance.min(1).max() <= 1e-5
    indices = distance.argmin(1)
    counts = np.bincount(indices // 100, minlength=10)  # uniform over the grid's points
    assert len(counts) == 10 and np.abs(counts - 400).max() < 5 * math.sqrt(400)
    assert len(np.unique(indices)) > 950
    few = UniformKarrasSigma(num_steps=2, sigma_max=10.0).sample(training_noise(0, range(64)), 64)
    assert torch.allclose(few.unique(), torch.tensor([0.002, 10.0]), rtol=1e-5)


def test_log_normal_levels():
    levels = LogNormalSigma(-0.8, 1.6).sample(training_noise(0, range(4000)), 4000)
    assert levels.shape == (4000, 1, 1, 1)
    assert levels.log().mean().item() == pytest.approx(-0.8, abs=0.1)
    assert levels.log().std().item() == pytest.approx(1.6, rel=0.05)


# ----------------------------------------------------------------------------
# learning rates


@pytest.mark.parametrize("preset", ["img64-s", "img512-m"])
def test_learning_rates_are_golden(preset):
    config = load_config(NCVSDConfig, preset)
    assert config.batch == 2048
    rates = [learning_rate(int(nimg), config) for nimg in GOLDEN["lr_nimg"]]
    np.testing.assert_allclose(rates, GOLDEN["lr_" + preset.replace("-", "_")], rtol=1e-6)


def test_learning_rates_of_ffhq_are_golden():
    config = load_config(NCVSDConfig, "ffhq256-xs")
    assert config.batch == 128
    rates = [learning_rate(int(nimg), config) for nimg in GOLDEN["lr_nimg"]]
    np.testing.assert_allclose(rates, GOLDEN["lr_ffhq"], rtol=1e-6)


def test_cooldown_is_a_line_to_zero():
    config = EDM2Config(
        duration=10_000, batch=100, batch_gpu=0, ref_batches=0, rampup_mimg=0, cooldown_mimg=0.004, ref_lr=0.02
    )
    assert learning_rate(0, config) == learning_rate(6000, config) == 0.02
    assert learning_rate(8000, config) == pytest.approx(0.01)
    assert learning_rate(10_000, config) == learning_rate(11_000, config) == 0


# ----------------------------------------------------------------------------
# power-function EMA


def test_exponents_are_golden_and_solve_the_equation():
    exponents = std_to_exp(GOLDEN["phema_std"])
    np.testing.assert_allclose(exponents, GOLDEN["phema_exp"], rtol=1e-6)
    back = np.sqrt((exponents + 1) / ((exponents + 2) ** 2 * (exponents + 3)))
    np.testing.assert_allclose(back, GOLDEN["phema_std"], rtol=1e-9)
    assert std_to_exp(0.05).shape == ()
    assert np.isfinite(std_to_exp([5e-324, 1e-200])).all()


@pytest.mark.parametrize("std", [0.0, -0.1, 0.3, float("nan")])
def test_impossible_widths_are_refused(std):
    with pytest.raises(ValueError, match=r"must lie in \(0, 0.2886\]"):
        std_to_exp(std)


def test_decays_are_golden():
    betas = [
        [power_function_beta(std, t_next, 2048) for t_next in GOLDEN["phema_beta_t_next"]]
        for std in GOLDEN["phema_std"]
    ]
    np.testing.assert_allclose(betas, GOLDEN["phema_beta"], rtol=1e-6, atol=1e-12)
    assert power_function_beta(0.1, 2048, 2048) == 0  # the first update forgets the start


def test_posthoc_coefficients_are_golden():
    coefficients = solve_posthoc_coefficients(
        GOLDEN["phema_in_ofs"], GOLDEN["phema_in_std"], 8e6, GOLDEN["phema_out_std"]
    )
    np.testing.assert_allclose(coefficients, GOLDEN["phema_coeff"], rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(coefficients.sum(0), 1, rtol=1e-9)


def test_a_stored_profile_reconstructs_itself():
    coefficients = solve_posthoc_coefficients([1e6, 1e6, 2e6, 2e6], [0.05, 0.1, 0.05, 0.1], [2e6], [0.1])
    np.testing.assert_allclose(coefficients[:, 0], [0, 0, 0, 1], atol=1e-6)


def test_ema_weights_follow_the_power_function():
    """A weight that jumps from 0 to 1 after s of T images averages to the profile's mass after s: 1 - (s/T)^(γ+1)."""
    net = nn.Linear(1, 1, bias=False)
    ema = PowerFunctionEMA(net, (0.05, 0.10))
    batch, total, jump = 10, 40_000, 30_000
    for nimg in range(batch, total + 1, batch):
        nn.init.constant_(net.weight, float(nimg > jump))
        ema.update(nimg, batch)
    for index, std in enumerate((0.05, 0.10)):
        average = ema.network(index)
        wanted = 1 - (jump / total) ** (float(std_to_exp(std)) + 1)
        assert average.weight.item() == pytest.approx(wanted, abs=1e-3)
        assert not average.weight.requires_grad


def test_ema_state_round_trip_and_other_profiles():
    net = nn.Linear(2, 2)
    ema = PowerFunctionEMA(net, (0.05, 0.10))
    ema.update(10, 10)
    nn.init.zeros_(net.weight)
    ema.update(20, 10)
    other = PowerFunctionEMA(nn.Linear(2, 2), (0.05, 0.10))
    other.load_state_dict(ema.state_dict())
    for index in range(2):
        a, b = ema.network(index), other.network(index)
        assert torch.equal(a.weight, b.weight) and a.weight.abs().max() > 0
    with pytest.raises(ValueError, match="EMA profiles"):
        PowerFunctionEMA(net, (0.05,)).load_state_dict(ema.state_dict())


# ----------------------------------------------------------------------------
# non-finite gradients


def test_nonfinite_entries_are_counted_and_zeroed():
    net = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2))
    assert count_nonfinite(net.parameters()) == 0
    for p in net[0].parameters():
        p.grad = torch.ones_like(p)
    assert count_nonfinite(net.parameters()) == 0
    net[0].weight.grad[0, 1] = float("nan")
    net[0].weight.grad[1, 2] = float("-inf")
    net[0].bias.grad[0] = float("inf")
    assert count_nonfinite(net.parameters()) == 3
    zero_nonfinite(net.parameters())
    assert count_nonfinite(net.parameters()) == 0
    assert net[0].weight.grad.tolist() == [[1, 0, 1], [1, 1, 0]] and net[0].bias.grad.tolist() == [0, 1]
    assert net[1].weight.grad is None


def test_large_finite_gradients_are_not_mistaken_for_infinite():
    p = nn.Parameter(torch.zeros(4))
    p.grad = torch.full((4,), 3e38)  # the norm overflows, no entry does
    assert count_nonfinite([p]) == 0
    zero_nonfinite([p])
    assert torch.equal(p.grad, torch.full((4,), 3e38))


def test_every_rate_scales_with_its_own_reference():
    config = load_config(NCVSDConfig, "img64-s")
    doubled = dataclasses.replace(config, ref_lr=2 * config.ref_lr)
    for nimg in (2048, 10**7, 10**9):
        assert learning_rate(nimg, doubled) == pytest.approx(2 * learning_rate(nimg, config))
