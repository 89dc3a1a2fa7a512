import numpy as np
import pytest
import scipy.linalg
import torch

from metrics.frechet import FeatureMoments, frechet_distance


def moments_of(features):
    moments = FeatureMoments(features.shape[1])
    for part in features.split(7):
        moments.add(part)
    return moments


def test_streaming_moments_equal_numpy_far_from_the_origin():
    features = torch.randn(50, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 1e4
    moments = moments_of(features)
    np.testing.assert_allclose(moments.mean(), features.numpy().mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(moments.cov(), np.cov(features.numpy(), rowvar=False), rtol=1e-9, atol=1e-9)


def test_distance_equals_scipy_square_root():
    rng = np.random.default_rng(1)
    a, b = rng.standard_normal((2, 200, 32)) @ rng.standard_normal((32, 32)) + rng.standard_normal((2, 1, 32))
    mu1, mu2, c1, c2 = a.mean(0), b.mean(0), np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    root = scipy.linalg.sqrtm(c1 @ c2).real
    expected = ((mu1 - mu2) ** 2).sum() + np.trace(c1 + c2 - 2 * root)
    assert frechet_distance(mu1, c1, mu2, c2) == pytest.approx(expected, rel=1e-6)


def test_closed_forms():
    eye = torch.eye(4)
    zero, one = torch.zeros(4), torch.ones(4)
    assert frechet_distance(zero, eye, one, eye) == pytest.approx(4)
    assert frechet_distance(zero, 4 * eye, zero, 9 * eye) == pytest.approx(4 * (3 - 2) ** 2)


def test_singular_covariances_stay_real():
    features = torch.randn(5, 16, generator=torch.Generator().manual_seed(2))
    moments = moments_of(torch.cat([features, features], dim=1))
    mu, cov = moments.mean(), moments.cov()
    assert frechet_distance(mu, cov, mu, cov) == pytest.approx(0, abs=1e-6 * float(cov.trace()))


@pytest.mark.parametrize("features", [torch.zeros(3, 5), torch.zeros(4), torch.full((2, 4), torch.nan)])
def test_unusable_features_are_refused(features):
    with pytest.raises(ValueError):
        FeatureMoments(4).add(features)


def test_too_few_images_and_unequal_shapes_are_refused():
    moments = FeatureMoments(4)
    with pytest.raises(ValueError, match="no features"):
        moments.mean()
    moments.add(torch.ones(1, 4))
    with pytest.raises(ValueError, match="at least 2"):
        moments.cov()
    with pytest.raises(ValueError, match="shapes"):
        frechet_distance(torch.zeros(4), torch.eye(4), torch.zeros(3), torch.eye(3))
