import math

import numpy as np
import pytest
import torch

from metrics.distances import inception_score, kernel_distance, precision_recall


def two_sets(n, m, dim, shift=0.0, seed=0):
    rng = np.random.default_rng(seed)
    return rng.standard_normal((n, dim)), rng.standard_normal((m, dim)) + shift


def brute_force_mmd(x, y):
    def kernel(a, b):
        return (sum(p * q for p, q in zip(a, b, strict=True)) / len(a) + 1) ** 3

    n, m = len(x), len(y)
    xx = sum(kernel(x[i], x[j]) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    yy = sum(kernel(y[i], y[j]) for i in range(m) for j in range(m) if i != j) / (m * (m - 1))
    return xx + yy - 2 * sum(kernel(a, b) for a in x for b in y) / (n * m)


def brute_force_precision_recall(real, fake, k):
    def inside(points, manifold):
        radii = [sorted(math.dist(a, b) for b in manifold)[k] for a in manifold]
        return sum(any(math.dist(p, a) <= r for a, r in zip(manifold, radii, strict=True)) for p in points)

    return inside(fake, real) / len(fake), inside(real, fake) / len(real)


@pytest.mark.parametrize("as_features", [np.asarray, torch.as_tensor])
def test_kernel_distance_equals_double_loops(as_features):
    x, y = two_sets(9, 9, 4, shift=0.5)
    mean, std = kernel_distance(as_features(x), as_features(y), num_subsets=2, subset_size=9)
    assert mean == pytest.approx(brute_force_mmd(x, y), rel=1e-10)
    assert std == pytest.approx(0, abs=1e-12)


def test_kernel_distance_averages_seeded_subsets():
    x, y = two_sets(12, 10, 3, shift=1.0)
    rng = np.random.default_rng(5)
    values = []
    for _ in range(3):
        rows = [rng.choice(len(f), 6, replace=False) for f in (x, y)]
        values.append(brute_force_mmd(x[rows[0]], y[rows[1]]))
    result = kernel_distance(x, y, num_subsets=3, subset_size=6, seed=5)
    assert result.mean == pytest.approx(np.mean(values), rel=1e-10)
    assert result.std == pytest.approx(np.std(values), rel=1e-8)
    assert result == kernel_distance(x, y, num_subsets=3, subset_size=6, seed=5)
    assert result != kernel_distance(x, y, num_subsets=3, subset_size=6, seed=6)


def test_kernel_distance_is_unbiased():
    draws = [kernel_distance(*two_sets(16, 16, 4, seed=s), num_subsets=1).mean for s in range(400)]
    error = np.std(draws) / math.sqrt(len(draws))
    assert abs(np.mean(draws)) < 4 * error  # a biased estimate is above 0 by more than 50 times this error
    assert min(draws) < 0 < max(draws)


def test_kernel_distance_of_gaussians_far_apart_has_its_closed_form():
    dim, shift = 4, 2.0
    x, y = two_sets(1500, 1500, dim, shift=shift)

    def expected_kernel(mean):  # E[(z + c)³] for z = x·y/dim, x ~ N(mean, 1), y ~ N(mean', 1), c = 1
        a, b = mean
        m = a * b
        second = (dim + dim * (a * a + b * b)) / dim**2 + m * m  # E[z²]
        third = m**3 + 3 * m * (second - m * m) + 6 * a * b / dim**2
        return third + 3 * second + 3 * m + 1

    expected = expected_kernel((0, 0)) + expected_kernel((shift, shift)) - 2 * expected_kernel((0, shift))
    assert kernel_distance(x, y, num_subsets=1, subset_size=1500).mean == pytest.approx(expected, rel=0.05)


def test_kernel_distance_takes_float32_and_smaller_sets_than_asked_for():
    x, y = two_sets(20, 7, 3, shift=0.3)
    single = [f.astype(np.float32) for f in (x, y)]
    a = kernel_distance(*single, num_subsets=4)
    b = kernel_distance(*single, num_subsets=4, subset_size=7)
    assert a == b
    assert a.mean == pytest.approx(kernel_distance(x, y, num_subsets=4).mean, rel=1e-5)


@pytest.mark.parametrize("chunk", [1, 3, 64])
@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("shift", [0.0, 0.8])
def test_precision_recall_equals_double_loops(k, chunk, shift):
    real, fake = two_sets(17, 11, 3, shift=shift)
    result = precision_recall(real, fake, k=k, chunk=chunk)
    assert (result.precision, result.recall) == pytest.approx(brute_force_precision_recall(real, fake, k))
    assert 0 < result.precision + result.recall < 2


def test_precision_is_of_the_fakes_and_recall_of_the_reals():
    rng = np.random.default_rng(1)
    real = rng.standard_normal((60, 2))
    real[30:] += 100  # two modes, of which the fakes reach one
    fake = rng.standard_normal((40, 2)) * 0.1
    result = precision_recall(real, fake)
    assert result.precision == 1
    assert result.recall <= 0.5


@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_precision_recall_of_identical_and_of_disjoint_sets(offset):
    features = torch.randn(30, 5, generator=torch.Generator().manual_seed(0)) + offset
    same = precision_recall(features, features, chunk=7)
    assert (same.precision, same.recall) == (1, 1)
    order = torch.randperm(30, generator=torch.Generator().manual_seed(1))
    shuffled = precision_recall(features, features[order], chunk=7)
    assert (shuffled.precision, shuffled.recall) == (1, 1)
    apart = precision_recall(features, features + 1000)
    assert (apart.precision, apart.recall) == (0, 0)


@pytest.mark.parametrize("chunk", [7, 4096])
def test_repeated_samples_count_as_inside_balls_of_radius_zero(chunk):
    generator = torch.Generator().manual_seed(2)
    points = torch.randn(40, 301, generator=generator) * 50
    fake = points.repeat(4, 1)[torch.randperm(160, generator=generator)]
    result = precision_recall(points.repeat(5, 1), fake, k=3, chunk=chunk)
    assert (result.precision, result.recall) == (1, 1)


@pytest.mark.parametrize("splits", [1, 3])
def test_inception_score_equals_double_loops(splits):
    logits = np.random.default_rng(0).standard_normal((10, 4)) * 2
    scores = []
    for i in range(splits):
        part = logits[i * 10 // splits : (i + 1) * 10 // splits]
        p = [[math.exp(v) / sum(math.exp(w) for w in row) for v in row] for row in part]
        q = [sum(row[c] for row in p) / len(p) for c in range(4)]
        divergence = [sum(row[c] * math.log(row[c] / q[c]) for c in range(4)) for row in p]
        scores.append(math.exp(sum(divergence) / len(divergence)))
    result = inception_score(logits, splits=splits)
    assert result.mean == pytest.approx(np.mean(scores), rel=1e-10)
    assert result.std == pytest.approx(np.std(scores), abs=1e-10)


def test_inception_score_of_certain_and_of_ignorant_classifiers():
    classes = 6
    certain = torch.eye(classes).repeat(5, 1) * 1e4  # all other probabilities underflow to 0
    assert inception_score(certain, splits=5) == pytest.approx((classes, 0))
    assert inception_score(torch.full((20, classes), 3.5)) == pytest.approx((1, 0))
    one_class = torch.zeros(20, classes)
    one_class[:, 2] = 1e4
    assert inception_score(one_class, splits=2) == pytest.approx((1, 0))


def good():
    return torch.ones(5, 2)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: kernel_distance(good(), good()[:1]), "at least 2 samples"),
        (lambda: kernel_distance(good(), good(), subset_size=1), "at least 1 of 2"),
        (lambda: kernel_distance(good(), good(), num_subsets=0), "at least 1 of 2"),
        (lambda: kernel_distance(good(), torch.ones(5, 3)), "2 dimensions, features2 3"),
        (lambda: kernel_distance(good(), good() * torch.nan), "features2 are not finite"),
        (lambda: kernel_distance(torch.ones(5), good()), "shape"),
        (lambda: kernel_distance(good().long(), good()), "floating-point"),
        (lambda: precision_recall(good(), good()[:3]), "4 fake samples or more, got 3"),
        (lambda: precision_recall(good()[:2], good(), k=2), "3 real samples or more, got 2"),
        (lambda: precision_recall(good(), good(), k=0), "at least 1"),
        (lambda: precision_recall(good(), good() / 0), "fake are not finite"),
        (lambda: inception_score(good()), "10 splits"),
        (lambda: inception_score(good(), splits=0), "0 splits"),
        (lambda: inception_score(good() * torch.inf, splits=1), "logits are not finite"),
    ],
)
def test_unusable_input_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
