import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch

import metrics
from metrics.distances import FeatureMoments, frechet_distance
from tests import warm

ROOT = Path(__file__).parents[2]

MERGE = """
import json, sys
import torch
from metrics.distances import FeatureMoments
from torch_utils import distributed

distributed.init("cpu")
results = {}
for name, bounds in json.loads(sys.argv[1]).items():  # rows of each process
    features = torch.randn(31, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 3 + 1e4
    first, last = bounds[distributed.rank()]
    moments = FeatureMoments(6)
    for part in features[first:last].split(4):
        moments.add(part)
    moments.merge_processes()
    if moments.count:
        results[name] = [moments.count, moments.mean().tolist(), moments.cov().tolist()]
    else:
        results[name] = [0, None, None]
with open(f"{sys.argv[2]}/{distributed.rank()}.json", "w") as file:
    json.dump(results, file)
torch.distributed.destroy_process_group()
"""


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


def random_statistics(dim, seed):
    """Two means and covariances, well-conditioned."""
    rng = np.random.default_rng(seed)
    a, b = rng.standard_normal((2, 3 * dim, dim)) * rng.uniform(0.5, 3, (2, 1, dim)) + rng.standard_normal((2, 1, dim))
    mix = np.eye(dim) + rng.standard_normal((dim, dim)) / np.sqrt(4 * dim)
    b = b @ mix  # the covariances do not commute
    return a.mean(0), np.cov(a, rowvar=False), b.mean(0), np.cov(b, rowvar=False)


@pytest.mark.parametrize("dim", [64, 512])
def test_distance_equals_scipy_square_root(dim):
    mu1, c1, mu2, c2 = random_statistics(dim, 1)
    root = scipy.linalg.sqrtm(c1 @ c2).real
    expected = ((mu1 - mu2) ** 2).sum() + np.trace(c1 + c2 - 2 * root)
    assert frechet_distance(mu1, c1, mu2, c2) == pytest.approx(expected, rel=1e-6)


def test_closed_forms():
    eye = torch.eye(4)
    zero, one = torch.zeros(4), torch.ones(4)
    assert frechet_distance(zero, eye, one, eye) == pytest.approx(4)
    assert frechet_distance(zero, 4 * eye, zero, 9 * eye) == pytest.approx(4 * (3 - 2) ** 2)


def test_closed_form_in_2048_dimensions():
    rng = np.random.default_rng(2)
    a, b = rng.uniform(0.1, 10, (2, 2048))
    mu = rng.standard_normal(2048)
    expected = (mu**2).sum() + ((np.sqrt(a) - np.sqrt(b)) ** 2).sum()
    assert frechet_distance(mu, np.diag(a), np.zeros(2048), np.diag(b)) == pytest.approx(expected, rel=1e-6)


def test_product_of_covariances_is_not_taken_for_a_symmetric_matrix():
    """In two dimensions tr (C1·C2)^½ = sqrt(tr(C1·C2) + 2·sqrt(det(C1·C2)))."""
    c1, c2 = np.array([[5.0, 2.0], [2.0, 1.0]]), np.array([[1.0, -1.5], [-1.5, 4.0]])
    root = np.sqrt(np.trace(c1 @ c2) + 2 * np.sqrt(np.linalg.det(c1) * np.linalg.det(c2)))
    distance = frechet_distance(np.zeros(2), c1, np.zeros(2), c2)
    assert distance == pytest.approx(np.trace(c1 + c2) - 2 * root, rel=1e-9)


def features_of_known_covariance(spectra, samples, dim, seed):
    """Sets of `samples` features [dim] whose covariances are Q·diag(spectrum)·Qᵀ, zeros added, with Q in common."""
    rng = np.random.default_rng(seed)
    basis, _ = np.linalg.qr(rng.standard_normal((dim, dim)))
    sets = []
    for spectrum in spectra:
        columns = np.column_stack([np.ones(samples), rng.standard_normal((samples, len(spectrum)))])
        orthonormal = np.linalg.qr(columns)[0][:, 1:]  # and orthogonal to a constant: the mean is 0
        sets.append(orthonormal * np.sqrt(np.asarray(spectrum) * (samples - 1)) @ basis[:, : len(spectrum)].T)
    return [torch.from_numpy(s) for s in sets]


@pytest.mark.parametrize("copies", [1, 2])
def test_fewer_samples_than_dimensions_and_duplicate_features(copies):
    spectra = [4.0, 9.0, 1.0, 0.0, 16.0], [1.0, 9.0, 0.0, 4.0]
    a, b = features_of_known_covariance(spectra, samples=6, dim=40, seed=3)
    shift = torch.linspace(0, 1, 40)
    first, second = moments_of(a.repeat(1, copies)), moments_of((b + shift).repeat(1, copies))
    expected = (2 - 1) ** 2 + 0 + 1 + 2**2 + 4**2 + float(shift.square().sum())
    distance = frechet_distance(first.mean(), first.cov(), second.mean(), second.cov())
    assert distance == pytest.approx(copies * expected, rel=1e-6)
    assert frechet_distance(first.mean(), first.cov(), first.mean(), first.cov()) == pytest.approx(0, abs=1e-5)


def test_equal_features_of_all_images_have_no_covariance():
    flat, spread = moments_of(torch.full((9, 4), 3.0)), moments_of(torch.eye(4).repeat(2, 1))
    expected = 4 * (3 - 0.25) ** 2 + float(spread.cov().trace())
    for first, second in ((flat, spread), (spread, flat)):
        distance = frechet_distance(first.mean(), first.cov(), second.mean(), second.cov())
        assert distance == pytest.approx(expected, rel=1e-6)


def test_rounding_below_zero_is_zero_and_more_is_not_hidden():
    for seed in range(8):
        features = torch.randn(20, 64, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        mean, cov = features.mean(dim=0), torch.cov(features.T)
        assert 0 <= frechet_distance(mean, cov, mean, cov) < 1e-5
    mean, indefinite = torch.zeros(2), torch.diag(torch.tensor([1.0, -0.01]))
    assert frechet_distance(mean, indefinite, mean, torch.eye(2)) == pytest.approx(0.99 + 2 - 2)
    assert frechet_distance(mean, indefinite, mean, torch.diag(torch.tensor([1.0, 0.0]))) == pytest.approx(-0.01)


def test_distance_is_offered_by_the_package():
    assert metrics.frechet_distance is frechet_distance


def test_two_processes_merge_into_one(tmp_path):
    cases = {
        "even": [[0, 15], [15, 31]],
        "uneven": [[0, 2], [2, 31]],
        "first has none": [[0, 0], [0, 31]],
        "last has none": [[0, 31], [0, 0]],
        "nobody has any": [[0, 0], [0, 0]],
    }
    script = tmp_path / "merge.py"
    script.write_text(MERGE)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    result = warm.run(
        [*command, json.dumps(cases), str(tmp_path)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    features = torch.randn(31, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 3 + 1e4
    alone = moments_of(features)
    for rank in range(2):
        results = json.loads((tmp_path / f"{rank}.json").read_text())
        assert results.pop("nobody has any") == [0, None, None]
        assert len(results) == 4
        for count, mean, cov in results.values():
            assert count == 31
            np.testing.assert_allclose(mean, alone.mean(), rtol=1e-9)
            np.testing.assert_allclose(cov, alone.cov(), rtol=1e-9, atol=1e-9)


def test_merging_in_a_single_process_changes_nothing():
    moments = moments_of(torch.arange(12.0).reshape(4, 3))
    before = moments.mean(), moments.cov()
    moments.merge_processes()
    assert moments.count == 4 and torch.equal(moments.mean(), before[0]) and torch.equal(moments.cov(), before[1])


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
    with pytest.raises(ValueError, match="finite"):
        frechet_distance(torch.zeros(2), torch.eye(2) * torch.nan, torch.zeros(2), torch.eye(2))
