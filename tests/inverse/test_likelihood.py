import pytest
import torch

from inverse import get_operator
from inverse.likelihood import LangevinDivergenceError, langevin_step, likelihood_std
from inverse.operators import Operator
from inverse.operators.base import gaussian_conditional
from sampling.seeds import SeededNoise
from tests.inverse.gaussian_utils import dense_matrix, moment_scores, posterior

SIZE = (8, 8)
PIXELS = 64
OPERATORS = [
    ("inpainting", {"box": (2, 1, 4, 5)}),
    ("inpainting", {"fraction": 0.7}),
    ("gaussian_blur_circ", {"kernel_size": 5, "std": 1.0}),
    ("motion_blur_circ", {"kernel_size": 7, "seed": 1}),
    ("super_resolution", {"factor": 2}),
    ("super_resolution", {"factor": 3}),
    ("super_resolution", {"factor": 4}),
]
each_operator = pytest.mark.parametrize(("name", "params"), OPERATORS)


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def problem(name, params, noise_std, rho):
    """Operator, prior mean, measurement, and the conditional's mean and covariance by dense linear algebra."""
    operator = get_operator(name, **params)
    matrix = dense_matrix(operator, SIZE)
    x = 0.5 * normal(1, 1, *SIZE, seed=1)
    y = operator.forward(x + rho * normal(1, 1, *SIZE, seed=2))
    y += noise_std * normal(*y.shape, seed=3)
    mean, cov = posterior(matrix, y, noise_std, x, torch.eye(PIXELS, dtype=torch.float64) / rho**2)
    return operator, x, y, mean, cov


@pytest.mark.parametrize(("noise_std", "rho"), [(0.05, 0.3), (0.3, 2.0), (0.02, 40.0), (0.05, 0.002)])
@each_operator
def test_exact_steps_against_dense_linear_algebra(name, params, noise_std, rho):
    operator, x, y, mean, cov = problem(name, params, noise_std, rho)
    u = operator.sample_conditional(x, y, noise_std, rho, torch.zeros_like)
    assert (u.flatten().double() - mean).abs().max() <= 1e-4 * max(1.0, mean.abs().max().item())

    # the draw is affine in its noise: unit impulses as noise give its square-root covariance, column by column
    x, y = (t.double().expand(PIXELS, *t.shape[1:]) for t in (x, y))
    impulses = torch.eye(PIXELS, dtype=torch.float64).reshape(-1, 1, *SIZE)
    root = (operator.sample_conditional(x, y, noise_std, rho, lambda x: impulses).flatten(1) - mean).T
    torch.testing.assert_close(root @ root.T, cov, rtol=0, atol=1e-8 * cov.max().item())


@each_operator
def test_exact_steps_have_the_covariance_of_the_conditional(name, params):
    operator, x, y, mean, cov = problem(name, params, 0.05, 0.3)
    generator = torch.Generator().manual_seed(5)
    n = 20_000
    x, y = (t.expand(n, *t.shape[1:]) for t in (x, y))
    draws = operator.sample_conditional(x, y, 0.05, 0.3, lambda x: torch.randn(x.shape, generator=generator))
    assert moment_scores(draws.flatten(1), mean, cov).worst < 5


def test_the_scores_reject_a_wrong_noise_level():
    operator, x, y, mean, cov = problem("super_resolution", {"factor": 2}, 0.05, 0.3)
    generator = torch.Generator().manual_seed(5)
    x, y = (t.expand(20_000, *t.shape[1:]) for t in (x, y))
    draws = operator.sample_conditional(x, y, 0.055, 0.3, lambda x: torch.randn(x.shape, generator=generator))
    assert moment_scores(draws.flatten(1), mean, cov).covariance > 5


def test_super_resolution_draws_its_null_space_from_the_prior():
    operator, x, y, _, _ = problem("super_resolution", {"factor": 4}, 0.05, 0.3)
    null = torch.linalg.svd(dense_matrix(operator, SIZE))[2][4:]  # 4 measurements, 64 pixels
    noise = normal(1, 1, *SIZE, seed=9)
    u = operator.sample_conditional(x, y, 0.05, 0.3, lambda x: noise)
    torch.testing.assert_close(
        null @ (u - x).double().flatten(), 0.3 * null @ noise.double().flatten(), atol=1e-5, rtol=0
    )


@each_operator
def test_exact_steps_draw_one_image_of_noise_per_image(name, params):
    operator, x, y, _, _ = problem(name, params, 0.05, 0.3)
    x = torch.cat([x, x + 0.1, x - 0.1])
    y = y.expand(3, *y.shape[1:])
    batch = operator.sample_conditional(x, y, 0.05, 0.3, SeededNoise([3, 4, 5]).randn_like)
    alone = operator.sample_conditional(x[1:2], y[1:2], 0.05, 0.3, SeededNoise([4]).randn_like)
    torch.testing.assert_close(batch[1:2], alone, atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("noise_std", "rho", "name"), [(0, 1, "likelihood_std"), (1, -1, "rho"), (1, torch.nan, "rho")]
)
def test_standard_deviations_must_be_positive(noise_std, rho, name):
    with pytest.raises(ValueError, match=f"{name} must be a positive number"):
        gaussian_conditional(torch.ones(1), noise_std, rho)


def test_beta_is_twice_the_variance():
    assert likelihood_std(2e-3) == pytest.approx(0.0316228, rel=1e-5)
    with pytest.raises(ValueError, match="beta must be a positive number, not 0"):
        likelihood_std(0)


# ---------------------------------------------------------------------------------------------------------------------
# Langevin


def test_one_langevin_step_is_the_published_formula():
    operator = get_operator("super_resolution", factor=2)
    x, y, noise = normal(2, 1, *SIZE), normal(2, 1, 4, 4, seed=1), normal(2, 1, *SIZE, seed=2)
    beta, sigma, c1, c2 = 1e-3, 0.2, 0.03, 0.4
    lr = c1 / (c2 / beta + 1 / sigma**2)
    gradient = 2 / beta * operator.adjoint(operator.forward(x) - y)  # the prior's gradient is 0 at the start
    wanted = x - lr * gradient + (2 * lr) ** 0.5 * noise
    draws = []

    def randn_like(x):
        draws.append(tuple(x.shape))
        return noise if x.shape == noise.shape else torch.zeros_like(x)

    result = langevin_step(operator, x, y, beta, sigma, steps=1, c1=c1, c2=c2, randn_like=randn_like)
    torch.testing.assert_close(result.sample, wanted)
    assert draws == [(2, 1, 1, 1), (2, 1, *SIZE)] and result.retries.tolist() == [0, 0]


@pytest.mark.parametrize(("name", "params"), OPERATORS[1:5])
def test_langevin_chains_have_their_exact_law(name, params):
    noise_std, rho, c1, c2, steps, n = 0.3, 0.5, 0.05, 0.1, 20, 4000
    operator, x, y, mean, cov = problem(name, params, noise_std, rho)
    beta = 2 * noise_std**2
    lr = c1 / (c2 / beta + rho**-2)
    # each step maps u - mean to (I - lr·cov⁻¹)(u - mean) + sqrt(2·lr)·n
    values, vectors = torch.linalg.eigh(torch.linalg.inv(cov))
    shrink = (1 - lr * values) ** steps
    law_mean = mean + vectors @ (shrink * (vectors.T @ (x.double().flatten() - mean)))
    law_cov = vectors @ ((2 * lr * (1 - shrink**2) / (1 - (1 - lr * values) ** 2))[:, None] * vectors.T)
    settings = dict(beta=beta, rho_sigma=rho, c1=c1, c2=c2, steps=steps)
    noiseless = langevin_step(operator, x, y, randn_like=torch.zeros_like, **settings).sample
    assert (noiseless.double().flatten() - law_mean).abs().max() < 1e-5

    generator = torch.Generator().manual_seed(6)
    x, y = (t.expand(n, *t.shape[1:]) for t in (x, y))
    result = langevin_step(operator, x, y, randn_like=lambda x: torch.randn(x.shape, generator=generator), **settings)
    assert moment_scores(result.sample.flatten(1), law_mean, law_cov).worst < 5


def test_long_langevin_chains_of_small_steps_reach_the_conditional():
    operator, x, y, mean, cov = problem("super_resolution", {"factor": 2}, 0.3, 0.5)
    x, y = (t.expand(1000, *t.shape[1:]) for t in (x, y))
    generator = torch.Generator().manual_seed(7)
    settings = dict(steps=400, c1=0.02, c2=0.1, randn_like=lambda x: torch.randn(x.shape, generator=generator))
    draws = langevin_step(operator, x, y, 2 * 0.3**2, 0.5, **settings).sample.flatten(1).double()
    w = torch.linalg.solve_triangular(torch.linalg.cholesky(cov), (draws - mean).T, upper=False).T
    assert w.square().mean().item() == pytest.approx(1, abs=0.04)  # 1 % error of discretisation, 0.6 % Monte Carlo
    assert w.mean(0).square().sum().item() < 64 / 1000 * 2


def noisy_measurement(operator, x, std, seed=4):
    y = operator.forward(x)
    return y + std * normal(*y.shape, seed=seed)


def test_diverged_chains_are_repeated_and_reported():
    operator = get_operator("super_resolution", factor=1)
    x = 0.5 * normal(3, 1, *SIZE)
    y = noisy_measurement(operator, x, 0.05)
    beta, c2 = 2 * 0.05**2, 0.1
    c1 = 0.15  # lr·2/beta = 3: each step multiplies the error by -2; a quarter of it is stable
    result = langevin_step(operator, x, y, beta, 1.0, c1=c1, c2=c2, randn_like=SeededNoise([1, 2, 3]).randn_like)
    assert result.retries.tolist() == [1, 1, 1]
    assert (result.sample - y).square().mean().sqrt().item() < 3 * 0.05
    assert (result.sample - y).std(dim=0).min() > 0  # not replaced by a constant


def test_chains_stuck_beyond_the_clip_count_as_diverged():
    operator = get_operator("high_dynamic_range")
    x = (0.2 * normal(2, 1, *SIZE)).clamp(-0.4, 0.4)
    y = noisy_measurement(operator, x, 0.02)
    result = langevin_step(operator, x, y, 2 * 0.02**2, 1.0, randn_like=SeededNoise([1, 2]).randn_like)
    assert (result.retries >= 1).all()
    assert (result.sample - x).square().mean().sqrt().item() < 0.1
    calm = langevin_step(operator, x, y, 2 * 0.02**2, 1.0, c1=0.0125, randn_like=SeededNoise([1, 2]).randn_like)
    assert calm.retries.tolist() == [0, 0]


def test_chains_that_never_settle_are_an_error():
    operator = get_operator("super_resolution", factor=1)
    x = normal(2, 1, *SIZE)
    with pytest.raises(LangevinDivergenceError, match="diverged for 2 of 2 images at noise level 0.5.*make c1 smaller"):
        langevin_step(operator, x, x, 1e-3, 0.5, c1=1e8, max_retries=2, randn_like=torch.randn_like)


class Cube(Operator):
    """x³: stable for small images and explosive for large ones."""

    def forward(self, x):
        return x**3


def test_an_image_does_not_depend_on_the_others_that_diverge():
    x = torch.stack([0.1 * normal(1, *SIZE), 20 * torch.ones(1, *SIZE), 0.1 * normal(1, *SIZE, seed=1)])
    y = x**3

    def run(index):
        noise = SeededNoise([10 + i for i in index])
        step = langevin_step(
            Cube(), x[index], y[index], 0.1, 0.05, steps=20, max_retries=12, randn_like=noise.randn_like
        )
        return step.sample, step.retries.tolist()

    together, retries = run([0, 1, 2])
    assert retries[0] == retries[2] == 0 and retries[1] > 1
    for i in range(3):
        alone, alone_retries = run([i])
        torch.testing.assert_close(together[i : i + 1], alone)
        assert alone_retries == retries[i : i + 1]


def test_langevin_refuses_numbers_that_are_not_finite():
    operator = get_operator("super_resolution")
    x, y = torch.zeros(1, 1, *SIZE), torch.zeros(1, 1, 2, 2)
    with pytest.raises(ValueError, match="not finite"):
        langevin_step(operator, x, y * torch.nan, 1e-3, 0.5)
    with pytest.raises(ValueError, match=r"up to: x 0, A\(x\) 0, y 1e\+30, beta 0.001; check the measurements' scale"):
        langevin_step(operator, x, y + 1e30, 1e-3, 0.5)


def test_langevin_refuses_measurements_that_would_broadcast():
    with pytest.raises(ValueError, match="do not fit"):
        langevin_step(get_operator("super_resolution"), torch.zeros(2, 1, *SIZE), torch.zeros(1, 1, 2, 2), 1e-3, 0.5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 0}, "steps >= 1"),
        ({"c1": 0}, "c1 must be a positive number"),
        ({"c2": -1}, "c2 must be a positive number"),
        ({"beta": 0}, "beta must be a positive number"),
        ({"rho_sigma": 0}, "rho_sigma must be a positive number"),
    ],
)
def test_langevin_settings_that_make_no_sense(settings, message):
    operator = get_operator("super_resolution")
    settings = {"beta": 1e-3, "rho_sigma": 0.5} | settings
    with pytest.raises(ValueError, match=message):
        langevin_step(operator, torch.zeros(1, 1, *SIZE), torch.zeros(1, 1, 2, 2), **settings)
