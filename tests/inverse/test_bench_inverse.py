import itertools
import sys
from pathlib import Path

import pytest
import torch

from inverse import get_operator

BENCH = str(Path(__file__).parents[2] / "bench")


@pytest.fixture(scope="module")
def bench():
    sys.path.insert(0, BENCH)
    try:
        import reconstruction

        yield reconstruction
    finally:
        sys.path.remove(BENCH)


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_gradient_adjoint(bench):
    u, g = randn(2, 5, 7), randn(2, 2, 5, 7, seed=1)
    assert (bench.gradient(u) * g).sum().item() == pytest.approx((u * bench.gradient_adjoint(g)).sum().item())
    assert bench.gradient(torch.ones(1, 4, 4)).abs().max() == 0


@pytest.mark.parametrize("bounded", [False, True])
def test_tv_prox_of_a_step_has_a_closed_form(bench, bounded):
    # two halves of height 4, width 3: each moves towards the other by weight · (edge length / area)
    b = torch.zeros(1, 4, 6, dtype=torch.float64)
    b[:, :, 3:] = 3.0
    u, _ = bench.tv_prox(b, 0.3, torch.zeros(2, *b.shape, dtype=b.dtype), 2000, bounded)
    assert u[0, :, :3].sub(0.1).abs().max() < 1e-4
    assert u[0, :, 3:].sub(1.0 if bounded else 2.9).abs().max() < 1e-4


def test_tv_prox_agrees_with_scikit_image(bench):
    restoration = pytest.importorskip("skimage.restoration")
    b = randn(1, 8, 8)
    u, _ = bench.tv_prox(b, 0.4, torch.zeros(2, *b.shape, dtype=b.dtype), 2000, False)
    theirs = restoration.denoise_tv_chambolle(b[0].numpy(), weight=0.4, eps=0, max_num_iter=20000)
    assert (u[0] - torch.from_numpy(theirs)).abs().max() < 1e-3


@pytest.mark.parametrize(
    ("name", "params"),
    [
        ("inpainting", {"box": [2, 2, 3, 3]}),
        ("super_resolution", {"factor": 2}),
        ("gaussian_blur_circ", {"kernel_size": 5, "std": 0.8}),
    ],
)
def test_total_variation_minimises_its_objective(bench, name, params):
    operator = get_operator(name, **params)
    matrix = bench.dense_matrix(operator, 8, 8)
    truth = randn(2, 1, 8, 8).cumsum(-1).tanh()
    y = operator.measure(truth, 0.05, lambda x: randn(*x.shape, seed=1))
    assert torch.allclose((truth.flatten(1) @ matrix.T).view(y.shape), operator.forward(truth))
    weight = 0.02

    def objective(u):
        roughness = bench.gradient(u.flatten(0, 1)).square().sum(0).sqrt().sum()
        return 0.5 * (operator.forward(u) - y).square().sum() + weight * roughness

    u = bench.total_variation(matrix, y, weight, truth.shape, iterations=400, inner=20)
    least = objective(u)
    assert least < objective(truth)
    for seed, size in itertools.product(range(5), (1e-1, 1e-2)):
        assert objective(u + size * randn(*u.shape, seed=seed)) > least
    for scale in (0.97, 1.03):
        assert objective(scale * u) > least


def test_linear_baselines(bench):
    operator = get_operator("super_resolution", factor=2)
    matrix = bench.dense_matrix(operator, 8, 8)
    y = randn(2, 3, 4, 4)
    u = bench.pseudo_inverse(matrix, y, (2, 3, 8, 8))
    assert (operator.forward(u) - y).abs().max() < 1e-10
    x = bench.tikhonov(matrix, y, 0.1, u.shape).flatten(0, 1)
    slope = operator.adjoint(operator.forward(x[:, None]) - y.flatten(0, 1)[:, None])[:, 0]
    assert (slope + 0.1 * bench.gradient_adjoint(bench.gradient(x))).abs().max() < 1e-10


def test_pseudo_inverse_of_inpainting_leaves_removed_pixels_at_zero(bench):
    operator = get_operator("inpainting", fraction=0.5, seed=0)
    x = randn(1, 1, 6, 6)
    u = bench.pseudo_inverse(bench.dense_matrix(operator, 6, 6), operator.forward(x), x.shape)
    assert torch.allclose(u, operator.mask(6, 6) * x)


@pytest.mark.parametrize("name", ["inpainting", "super_resolution"])
def test_interpolation_of_a_ramp(bench, name):
    ramp = torch.linspace(-1, 1, 16, dtype=torch.float64).expand(2, 1, 16, 16)
    operator = get_operator(name, **({"box": [4, 4, 8, 8]} if name == "inpainting" else {"factor": 2}))
    found = bench.interpolate(operator, operator.forward(ramp), ramp.shape)
    assert (found - ramp)[..., 4:-4].abs().max() < 0.02


@pytest.mark.parametrize("best", [0.003, 1.0, 40.0])
def test_weight_is_the_best_of_its_grid(bench, best):
    weight, scores = bench.tune_weight(lambda w: -abs(torch.tensor(w / best).log().item()), 0.05)
    assert abs(torch.tensor(weight / best).log()) <= torch.tensor(1.5).log() / 2 + 1e-6
    assert 2 <= sorted(scores).index(weight) <= len(scores) - 3
