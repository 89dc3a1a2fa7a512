import functools
import subprocess
import sys

import pytest
import torch

import networks
from inverse import get_operator, pnp_sample
from inverse.likelihood import LangevinDivergenceError
from inverse.pnp import LangevinSettings
from sampling.grids import few_step_sigmas, karras_sigmas
from sampling.posterior import few_step_posterior
from sampling.seeds import SeededNoise
from tests.conftest import TINY_NET
from tests.golden_utils import fill_by_name
from tests.inverse.gaussian_utils import (
    GaussianPrior,
    dense_matrix,
    entry_scores,
    moment_scores,
    posterior,
    split_gibbs_law,
)

SIZE = 16
NOISE_STD = 0.3
BETA = 2 * NOISE_STD**2
CHAINS = 2000
PROBLEMS = [
    ("inpainting", {"fraction": 0.5}),
    ("gaussian_blur_circ", {"kernel_size": 7, "std": 1.0}),
    ("super_resolution", {"factor": 2}),
]
each_problem = pytest.mark.parametrize(("name", "params"), PROBLEMS)


def seeded_randn(seed):
    generator = torch.Generator().manual_seed(seed)
    return lambda x: torch.randn(x.shape, generator=generator)


@functools.cache
def gaussian_problem(name):
    """Prior, operator, its matrix, a measurement of a random image, and the closed-form posterior."""
    prior = GaussianPrior(SIZE)
    mean, cov = prior.moments()
    operator = get_operator(name, **dict(PROBLEMS)[name])
    matrix = dense_matrix(operator, (SIZE, SIZE))
    randn_like = seeded_randn(0)
    x = mean.float() + torch.linalg.cholesky(cov).float() @ randn_like(torch.empty(SIZE**2))
    y = operator.forward(x.reshape(1, 1, SIZE, SIZE))
    y = y + NOISE_STD * randn_like(y)
    return prior, operator, matrix, y, posterior(matrix, y, NOISE_STD, mean, torch.linalg.inv(cov))


def sample(name, levels, beta=BETA, chains=CHAINS, **options):
    prior, operator, _, y, _ = gaussian_problem(name)
    y = y.expand(chains, *y.shape[1:])
    return pnp_sample(prior, operator, y, levels, beta=beta, randn_like=seeded_randn(1), **options).images.flatten(1)


def slow_annealing(num):
    """Levels from 10 to 0.04 with 1/sigma² rising by equal amounts.

    A chain at level sigma moves by a fraction of about sigma²/NOISE_STD² per step, and the law it moves towards is that
    of measurement noise of variance NOISE_STD² + sigma². On this schedule what remains of both vanishes as 1/num.
    """
    return torch.linspace(10**-2, 0.04**-2, num, dtype=torch.float64).rsqrt().tolist()


# ---------------------------------------------------------------------------------------------------------------------
# A prior whose posterior is known


@each_problem
def test_samples_follow_the_closed_form_posterior(name, params):
    prior, _, matrix, y, (mean, cov) = gaussian_problem(name)
    levels = slow_annealing(240)
    scores = entry_scores(sample(name, levels), mean, cov)
    assert max(scores) < 5.5  # the largest of 33,000 errors; 4.3 is to be expected of independent exact draws

    # annealing at a finite pace leaves a bias: its exact size, in the same unit, is well below that bound
    law_mean, law_cov = split_gibbs_law(matrix, y, NOISE_STD, prior, levels)
    variance = cov.diagonal()
    assert ((law_mean - mean) / (variance / CHAINS).sqrt()).abs().max() < 2
    errors = ((variance[:, None] * variance + cov**2) / CHAINS).sqrt()
    assert ((law_cov - cov) / errors).abs().max() < 0.5


@each_problem
def test_a_beta_of_the_wrong_convention_fails_that_test(name, params):
    _, _, _, _, (mean, cov) = gaussian_problem(name)
    for wrong in (2 * BETA, BETA / 2):
        assert max(entry_scores(sample(name, slow_annealing(150), beta=wrong, chains=500), mean, cov)) > 5.5


@each_problem
def test_samples_on_the_published_schedule_have_the_law_of_split_gibbs(name, params):
    prior, _, matrix, y, (mean, cov) = gaussian_problem(name)
    levels = karras_sigmas(50, rho=2, dtype=torch.float64)
    samples = sample(name, levels)
    assert moment_scores(samples, *split_gibbs_law(matrix, y, NOISE_STD, prior, levels.tolist())).worst < 5
    assert moment_scores(samples, mean, cov).worst > 20  # 50 levels end before a Gaussian prior's chains have settled


def test_few_step_prior_draws_leave_the_law_of_split_gibbs_unchanged():
    prior, _, matrix, y, _ = gaussian_problem("super_resolution")
    levels = karras_sigmas(50, rho=2, dtype=torch.float64)
    samples = sample("super_resolution", levels, ts=(0, 14, 39), zeta=0.5)
    assert moment_scores(samples, *split_gibbs_law(matrix, y, NOISE_STD, prior, levels.tolist())).worst < 5


@pytest.mark.parametrize(("ts", "zeta"), [((0, 14, 39), 1.0), ((0, 10, 20, 30, 39), 0.3)])
@pytest.mark.parametrize("sigma", [0.3, 3.0])
def test_few_step_sampling_alone_has_the_posterior_moments(sigma, ts, zeta):
    prior = GaussianPrior(SIZE)
    prior_mean, prior_cov = prior.moments()
    eye = torch.eye(SIZE**2, dtype=torch.float64)
    randn_like = seeded_randn(2)
    y = 0.2 + 0.5 * randn_like(torch.empty(1, 1, SIZE, SIZE))
    mean, cov = posterior(eye, y, sigma, prior_mean, torch.linalg.inv(prior_cov))

    def draws(noise_level):
        return few_step_posterior(
            lambda y, level: prior.draw(y, noise_level * level, randn_like),
            y.expand(4 * CHAINS, 1, SIZE, SIZE),
            sigma,
            few_step_sigmas(ts),
            zeta=zeta,
            randn_like=randn_like,
        ).flatten(1)

    assert moment_scores(draws(1.0), mean, cov).worst < 5
    assert moment_scores(draws(1.3), mean, cov).worst > 5  # a prior that mistakes the level by 30 % is noticed


def test_langevin_likelihood_steps_come_near_the_posterior_too():
    _, _, _, _, (mean, cov) = gaussian_problem("super_resolution")
    samples = sample(
        "super_resolution",
        slow_annealing(60),
        chains=100,
        likelihood="langevin",
        langevin=LangevinSettings(steps=20, c1=0.2),
    )
    assert (samples.mean(0) - mean).square().mean().sqrt() < 0.2 * cov.diagonal().mean().sqrt()
    assert samples.var(0).mean().item() == pytest.approx(cov.diagonal().mean().item(), rel=0.1)


# ---------------------------------------------------------------------------------------------------------------------
# The loop


class Counter:
    """A "denoiser" that returns 1, 2, 3, … and needs no noise."""

    img_channels, img_resolution = 1, 8

    def __init__(self):
        self.calls = []

    def __call__(self, y, sigma, labels=None, *, ts=None, zeta=1.0, randn_like=torch.randn_like):
        self.calls.append((y, sigma, labels, ts, zeta))
        return torch.full_like(y, len(self.calls))


def test_running_estimate_and_what_the_network_is_given():
    operator = get_operator("inpainting", box=(0, 0, 8, 4))
    y = operator.forward(torch.full((2, 1, 8, 8), 10.0))
    net, shapes, seen = Counter(), [], []
    labels = torch.eye(2)

    def randn_like(x):
        shapes.append(tuple(x.shape))
        return torch.full_like(x, len(shapes) == 1)

    result = pnp_sample(
        net, operator, y, [8.0, 4.0, 2.0, 1.0, 0.5], beta=2.0, ema_decay=0.25, ema_sigma=4.0,
        labels=labels, ts=(10, 39), zeta=0.7, randn_like=randn_like, progress=lambda *state: seen.append(state),
    )  # fmt: skip
    assert [call[1] for call in net.calls] == [8.0, 4.0, 2.0, 1.0]
    assert all(call[2] is labels and call[3:] == ((10, 39), 0.7) for call in net.calls)
    assert torch.equal(net.calls[0][0], torch.full_like(y, 8.0))  # starts at sigma_0·n
    # the second prior step sees the conditional mean at sigma_1 = 4 and noise variance 1: 16/17 towards the measurement
    wanted = torch.ones(8, 8)
    wanted[:, 4:] += 16 / 17 * 9
    torch.testing.assert_close(net.calls[1][0][0, 0], wanted)
    # averaging is on strictly below 4: x = 1, 2, then 0.25·2 + 0.75·3 = 2.75, then 0.25·2.75 + 0.75·4
    assert torch.equal(result.images, torch.full_like(y, 3.6875))
    assert len(shapes) == 1 + 3  # the start, and a likelihood step after every prior step but the last
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert result.likelihood == "exact" and result.retries.tolist() == [0, 0]


def test_no_averaging_at_the_first_level():
    operator = get_operator("inpainting", fraction=0)
    options = dict(beta=1.0, ema_decay=0.9, ema_sigma=100.0)
    images = pnp_sample(Counter(), operator, torch.zeros(1, 1, 8, 8), [2.0, 1.0], **options).images
    assert torch.equal(images, torch.ones(1, 1, 8, 8))


@pytest.mark.parametrize(
    ("name", "params", "likelihood"),
    [
        ("super_resolution", {}, "exact"),
        ("gaussian_blur_circ", {"kernel_size": 5, "std": 1.0}, "exact"),
        ("inpainting", {"fraction": 0.7}, "exact"),
        ("super_resolution", {}, "langevin"),
        ("phase_retrieval", {}, "langevin"),
    ],
)
def test_an_image_does_not_depend_on_its_batch(name, params, likelihood):
    operator, prior = get_operator(name, **params), GaussianPrior(8)
    y = operator.forward(0.3 * seeded_randn(3)(torch.empty(3, 1, 8, 8)))
    settings = LangevinSettings(steps=5)
    options = dict(beta=1e-2, ema_decay=0.5, ema_sigma=10.0, ts=(0, 14, 39), likelihood=likelihood, langevin=settings)
    levels = karras_sigmas(6, rho=2)

    def run(index):
        noise = SeededNoise([7 + i for i in index])
        return pnp_sample(prior, operator, y[index], levels, randn_like=noise.randn_like, **options)

    together = run([0, 1, 2])
    assert together.likelihood == likelihood
    for i in range(3):
        torch.testing.assert_close(together.images[i : i + 1], run([i]).images, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", ["phase_retrieval", "high_dynamic_range", "nonlinear_blur", "super_resolution"])
def test_a_conditional_network_on_every_kind_of_likelihood(name):
    net = networks.GenerativeDenoiser(fill_by_name(networks.PrecondCondition(**TINY_NET), 5)).eval()
    params = {"kernel_size": 5} if name == "nonlinear_blur" else {}
    operator = get_operator(name, **params)
    y = operator.forward(torch.zeros(2, 1, 8, 8))
    settings = LangevinSettings(steps=5, c1=0.01)
    options = dict(labels=torch.eye(3)[:2], ts=(0, 14, 39), randn_like=SeededNoise([0, 1]).randn_like)
    result = pnp_sample(net, operator, y, karras_sigmas(5, rho=2), beta=1e-2, langevin=settings, **options)
    assert result.images.shape == (2, 1, 8, 8) and result.images.isfinite().all()
    assert not result.images.requires_grad
    assert result.likelihood == ("exact" if operator.has_exact_step else "langevin")


def test_images_need_not_be_square_if_their_shape_is_given():
    prior = GaussianPrior(8)
    prior.draw = lambda y, sigma, randn_like: y / (1 + sigma**2)
    operator = get_operator("super_resolution", factor=3)
    y = torch.zeros(1, 1, 3, 4)
    assert pnp_sample(prior, operator, y, [1.0, 0.5], beta=1e-2, shape=(1, 1, 8, 11)).images.shape == (1, 1, 8, 11)
    with pytest.raises(ValueError, match=r"measurements \[1, 1, 3, 4\] do not fit: images \[1, 1, 8, 8\] give"):
        pnp_sample(prior, operator, y, [1.0, 0.5], beta=1e-2)


def test_repeated_langevin_chains_are_reported():
    operator, prior = get_operator("super_resolution", factor=1), GaussianPrior(8)
    options = dict(beta=1e-3, likelihood="langevin", randn_like=SeededNoise([0, 1]).randn_like)
    y, levels = torch.zeros(2, 1, 8, 8), [2.0, 1.0, 0.5]
    with pytest.warns(UserWarning, match="repeated with a smaller step size 2 times, in 2 of 2 images; a smaller c1"):
        result = pnp_sample(prior, operator, y, levels, langevin=LangevinSettings(c1=0.15), **options)
    assert result.retries.tolist() == [1, 1] and result.images.isfinite().all()
    with pytest.raises(LangevinDivergenceError, match="2 of 2 images at noise level 1,"):
        pnp_sample(prior, operator, y, levels, langevin=LangevinSettings(c1=1e6, max_retries=1), **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sigmas": [1.0]}, "at least two, positive and decreasing, not 1 levels"),
        ({"sigmas": []}, "not 0 levels"),
        ({"sigmas": [1.0, 2.0]}, "not 2 levels from 1 to 2"),
        ({"sigmas": [1.0, 0.0]}, "positive and decreasing"),
        ({"sigmas": [torch.inf, torch.nan]}, "positive and decreasing"),
        ({"beta": 0.0}, "beta must be a positive number"),
        ({"ema_decay": 1.0}, r"ema_decay .* must lie in \[0, 1\)"),
        ({"likelihood": "exakt"}, "must be one of auto, exact, langevin, not 'exakt'"),
        ({"likelihood": "exact"}, "no exact likelihood step: use likelihood langevin or auto"),
        ({"y": torch.zeros(1, 1, 4, 4)}, r"measurements \[1, 1, 4, 4\] do not fit: images \[1, 1, 8, 8\]"),
    ],
)
def test_settings_that_make_no_sense(options, message):
    options = {"y": torch.zeros(1, 1, 16, 16), "sigmas": [2.0, 1.0], "beta": 1.0} | options
    with pytest.raises(ValueError, match=message) as error:
        pnp_sample(Counter(), get_operator("phase_retrieval"), **options)
    assert "\n" not in str(error.value)


class Amplifier:
    def __init__(self, factor, dtype):
        self.factor, self.compute_dtype = factor, dtype

    def __call__(self, y, sigma, labels=None, **options):
        return y * self.factor


@pytest.mark.parametrize(
    ("factor", "dtype", "y", "message"),
    [
        (torch.inf, torch.bfloat16, 0.0, "level 3 is not finite: it was computed in bfloat16: try float32"),
        (torch.inf, torch.float32, 0.0, "level 3 is not finite: .* in float32: the network's weights must be damaged"),
        (
            10,
            torch.float32,
            1e38,
            r"level 2 .* reaches .*e\+3[78] .*; y reaches 1e\+38, and beta is 1: check the measure",
        ),
        (
            10,
            torch.bfloat16,
            1e38,
            r"level 2 .* reaches .*e\+3[78] .*; y reaches 1e\+38, and beta is 1: check the measure",
        ),
    ],
)
def test_the_cause_of_numbers_that_are_not_finite_is_named(factor, dtype, y, message):
    operator = get_operator("inpainting", fraction=0.5)
    options = {"beta": 1.0, "shape": (1, 1, 8, 8)}
    with pytest.raises(ValueError, match=message):
        pnp_sample(Amplifier(factor, dtype), operator, torch.full((1, 1, 8, 8), y), [3.0, 2.0, 1.0], **options)


def test_the_package_is_imported_without_torch():
    code = "import sys, inverse; sys.exit('torch' in sys.modules or not inverse.__all__)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    import inverse

    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = inverse.nothing
