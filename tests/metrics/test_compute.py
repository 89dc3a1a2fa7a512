import json
import os
import pickle
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch

from data.dataset import ImageDataset
from metrics.collect import Collected, FeatureCollector, evaluate_dataset
from metrics.distances import FeatureMoments, inception_score, kernel_distance, precision_recall
from metrics.features.detectors import DetectorError, LoadedDetector, load_detector
from metrics.kinds import KINDS, Kind, Metric, parse_metrics
from metrics.references import ReferenceFileError, check_reference, compute_metrics, load_reference
from tests import warm
from tests.metrics.feature_utils import Linear, linear_detector, pixels, reference_of

ROOT = Path(__file__).parents[2]

SHARED = """
import json, sys
import torch
import networks
from metrics.features.detectors import load_detector
from metrics.collect import evaluate_dataset, evaluate_network
from metrics.references import compute_metrics, load_reference
from metrics.kinds import parse_metrics
from torch_utils import distributed
from data.dataset import ImageDataset

data, net, reference, folder = sys.argv[1:]
distributed.init("cpu")
metrics = parse_metrics("fd_demo,kid:fd_demo,pr:fd_demo,is:fd_demo")
detectors = {"fd_demo": load_detector("fd_demo")}
dataset = ImageDataset(data, use_labels=False, max_size=50)
student = networks.load(net)
progress = []
collected = {
    "data": evaluate_dataset(dataset, metrics, detectors, batch=8, progress=progress.append),
    "one batch": evaluate_dataset(dataset, metrics, detectors, batch=64),
    "net": evaluate_network(
        student.net, student.encoder, metrics, detectors, range(3, 35), batch=8, ts=(12, 39)
    ).collected,
}
results = {"progress": sum(progress)}
for name, parts in collected.items():
    part = parts["fd_demo"]
    values, _ = compute_metrics(metrics, parts, load_reference(reference))
    results[name] = {
        "count": part.moments.count,
        "mean": part.moments.mean().tolist(),
        "features": part.features.tolist(),
        "values": [[v.value, *v.details.values()] for v in values],
    }
with open(f"{folder}/{distributed.world_size()}-{distributed.rank()}.json", "w") as file:
    json.dump(results, file)
if torch.distributed.is_initialized():
    torch.distributed.destroy_process_group()
"""


@pytest.fixture(scope="module")
def demo():
    return {"fd_demo": load_detector("fd_demo")}


@pytest.fixture(scope="module")
def fashion():
    return ImageDataset(ROOT / "assets" / "fashion16.zip", use_labels=False, max_size=160)


# ---------------------------------------------------------------------------------------------------------------------
# Which metrics


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("fid", [("fid", "fd", "fid")]),
        (" fid, fd_dinov2 ,", [("fid", "fd", "fid"), ("fd_dinov2", "fd", "fd_dinov2")]),
        ("kid,pr,is", [("kid", "kid", "fid"), ("pr", "pr", "fid"), ("is", "is", "fid")]),
        ("kid:fd_demo,is:fd_demo", [("kid:fd_demo", "kid", "fd_demo"), ("is:fd_demo", "is", "fd_demo")]),
        ("fid,fd:fid,kid:fid,kid", [("fid", "fd", "fid"), ("kid", "kid", "fid")]),
        ("mine,pr:mine,fd:mine", [("fd_mine", "fd", "mine"), ("pr:mine", "pr", "mine")]),
    ],
)
def test_lists_of_metrics(text, expected):
    metrics = parse_metrics(text, ("mine",))
    assert metrics == [Metric(*fields) for fields in expected]
    assert [m.needs == "features" for m in metrics] == [kind in ("kid", "pr") for _, kind, _ in expected]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "no metric is named"),
        (" , ", "no metric is named"),
        ("fidd", "no metric 'fidd': use fid, fd_dinov2, fd_demo, kid, pr, is"),
        ("fid;kid", "no metric 'fid;kid'"),
        ("fd", "no metric 'fd'"),
        ("mine", "no metric 'mine'"),
        ("kid:other", "no detector 'other'; there are fid, fd_dinov2, fd_demo"),
        ("fid:fd_demo", "no metric 'fid:fd_demo'"),
    ],
)
def test_unknown_metrics_are_named(text, words):
    with pytest.raises(ValueError, match=words) as error:
        parse_metrics(text)
    assert "\n" not in str(error.value)


# ---------------------------------------------------------------------------------------------------------------------
# What is collected


def test_moments_and_features_of_a_data_set(fashion, demo):
    metrics = parse_metrics("fd_demo,kid:fd_demo,is:fd_demo")
    part = evaluate_dataset(fashion, metrics, demo, indices=range(10, 33), batch=7)["fd_demo"]
    images = torch.stack([torch.from_numpy(fashion[i][0]) for i in range(10, 33)])
    expected = demo["fd_demo"].module(images)
    torch.testing.assert_close(part.features, expected)
    torch.testing.assert_close(part.logits, demo["fd_demo"].module.logits(expected))
    np.testing.assert_allclose(part.moments.cov(), np.cov(expected.double().numpy(), rowvar=False), atol=1e-6)


def test_single_features_are_kept_only_where_a_metric_needs_them():
    detectors = linear_detector() | {"other": LoadedDetector(Linear(64, 2).eval(), "other", 2, "cd" * 32)}
    metrics = [Metric("fd_lin", "fd", "lin"), Metric("fd_other", "fd", "other"), Metric("pr:other", "pr", "other")]
    collected = evaluate_dataset(pixels(20), metrics, detectors)
    assert collected["lin"].features is None and collected["other"].features.shape == (20, 2)
    assert collected["lin"].logits is None and collected["other"].logits is None
    assert collected["lin"].moments.count == collected["other"].moments.count == 20


def test_single_features_of_a_random_part_and_moments_of_all():
    metrics, data = [Metric("kid:lin", "kid", "lin")], pixels(50)
    whole = evaluate_dataset(data, metrics, linear_detector())["lin"]
    part, again = (evaluate_dataset(data, metrics, linear_detector(), batch=n, max_features=20)["lin"] for n in (7, 50))
    assert part.features.shape == (20, 4) and part.moments.count == 50
    torch.testing.assert_close(part.moments.mean(), whole.moments.mean())
    torch.testing.assert_close(part.features, again.features)
    rows = [int((whole.features - row).abs().sum(dim=1).argmin()) for row in part.features]
    torch.testing.assert_close(part.features, whole.features[rows])
    assert rows == sorted(set(rows)) and rows != list(range(20))


def test_features_return_to_the_order_of_their_images():
    collector = FeatureCollector([Metric("kid:lin", "kid", "lin")], linear_detector())
    images = torch.from_numpy(np.stack([image for image, _ in pixels(6)]))
    for indices in ([4, 1], [5], [0, 2, 3]):
        collector.add(images[indices], indices)
    collector.add(images[:0], [])
    features = collector.gather()["lin"].features
    torch.testing.assert_close(features, linear_detector()["lin"].module(images))


def test_what_cannot_be_collected_is_refused():
    metrics = [Metric("fd_lin", "fd", "lin")]
    with pytest.raises(ValueError, match="at least 2 images are needed, got 1"):
        evaluate_dataset(pixels(1), metrics, linear_detector())
    with pytest.raises(ValueError, match="no images"):
        FeatureCollector(metrics, linear_detector()).gather()
    latents = [(np.zeros((4, 4, 4), np.float32), None)] * 3
    with pytest.raises(ValueError, match="latents: decode"):
        evaluate_dataset(latents, metrics, linear_detector())
    with pytest.raises(DetectorError, match="needs class logits, and detector lin has none"):
        FeatureCollector([Metric("is:lin", "is", "lin")], linear_detector())
    broken = linear_detector()
    broken["lin"].module.weights.fill_(torch.nan)
    with pytest.raises(ValueError, match="not finite"):
        evaluate_dataset(pixels(3), metrics, broken)


def test_two_processes_agree_with_one(tmp_path, fashion, demo):
    metrics = parse_metrics("fd_demo,kid:fd_demo")
    reference_of(tmp_path / "ref.npz", fashion, metrics, demo)
    script = tmp_path / "shared.py"
    script.write_text(SHARED)
    student = ROOT / "assets" / "demo" / "student.safetensors"
    arguments = [str(script), fashion.path, str(student), str(tmp_path / "ref.npz"), str(tmp_path)]
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    for command in ([sys.executable, *arguments], [sys.executable, *launcher, *arguments]):
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        result = warm.run(command, env=environment, capture_output=True, text=True, timeout=200)
        assert result.returncode == 0, result.stderr
    alone, first, second = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("1-0", "2-0", "2-1"))
    assert alone.pop("progress") == first.pop("progress") == second.pop("progress") == 50
    assert {name: part["count"] for name, part in alone.items()} == {"data": 50, "one batch": 50, "net": 32}
    for together in (first, second):
        for name, part in alone.items():
            assert together[name]["count"] == part["count"]
            np.testing.assert_allclose(together[name]["mean"], part["mean"], rtol=1e-9, atol=1e-12)
            np.testing.assert_allclose(together[name]["features"], part["features"], rtol=1e-6, atol=1e-6)
            for values, expected in zip(together[name]["values"], part["values"], strict=True):
                assert values == pytest.approx(expected, rel=1e-6, abs=1e-9)


# ---------------------------------------------------------------------------------------------------------------------
# From features to numbers


def test_a_data_set_against_itself_and_against_a_shifted_copy(tmp_path, fashion, demo):
    metrics, detectors = [Metric("fd_lin", "fd", "lin")], linear_detector()
    data = pixels(100)
    reference = reference_of(tmp_path / "ref.npz", data, metrics, detectors)
    order = np.random.default_rng(1).permutation(100)
    (same,), warnings = compute_metrics(metrics, evaluate_dataset(data, metrics, detectors, indices=order), reference)
    assert abs(same.value) < 1e-3 and warnings == []

    shifted = [(image + np.uint8(55), None) for image, _ in data]
    (moved,), _ = compute_metrics(metrics, evaluate_dataset(shifted, metrics, detectors), reference)
    shift = 55 * detectors["lin"].module.weights.sum(dim=0)
    assert moved.value == pytest.approx(float(shift.square().sum()), rel=1e-4)
    assert asdict(moved) == {
        "name": "fd_lin",
        "value": moved.value,
        "detector": "lin",
        "detector_sha256": "ab" * 32,
        "details": {},
    }

    metrics = parse_metrics("fd_demo")
    reference = reference_of(tmp_path / "demo.npz", fashion, metrics, demo)
    (same,), _ = compute_metrics(metrics, evaluate_dataset(fashion, metrics, demo, batch=9), reference)
    assert abs(same.value) < 1e-3


def test_all_kinds_of_metrics_equal_their_definitions(tmp_path, fashion, demo):
    metrics = parse_metrics("kid:fd_demo,pr:fd_demo,is:fd_demo,fd_demo")
    reference = reference_of(tmp_path / "ref.npz", fashion, metrics, demo)
    collected = evaluate_dataset(fashion, metrics, demo, indices=range(0, 160, 2))
    features = [
        demo["fd_demo"].module(torch.stack([torch.from_numpy(fashion[i][0]) for i in range(0, 160, step)]))
        for step in (1, 2)
    ]
    (kid, pr, score, fd), _ = compute_metrics(metrics, collected, reference)
    expected = kernel_distance(features[1], features[0])
    assert (kid.value, kid.details["std"]) == pytest.approx(expected, rel=1e-4)
    assert kid.details["subset_size"] == 80
    assert (pr.value, pr.details["recall"]) == tuple(vars(precision_recall(*features)).values())
    assert pr.details["reference_features"] == 160
    logits = demo["fd_demo"].module.logits(features[1])
    shuffled = logits[torch.randperm(80, generator=torch.Generator().manual_seed(0))]
    assert (score.value, score.details["std"]) == pytest.approx(tuple(inception_score(shuffled)), rel=1e-4)
    assert 1 < score.value < 10 and fd.value > 0
    json.dumps([asdict(value) for value in (kid, pr, score, fd)])


def test_inception_score_needs_no_reference(fashion, demo):
    metrics = parse_metrics("is:fd_demo")
    collected = evaluate_dataset(fashion, metrics, demo, indices=range(20))
    (score,), warnings = compute_metrics(metrics, collected, None)
    assert 1 < score.value < 10 and warnings == []
    with pytest.raises(ReferenceFileError, match="--ref"):
        compute_metrics(parse_metrics("fd_demo"), collected, None)
    with pytest.raises(ValueError, match="10 splits"):
        compute_metrics(metrics, evaluate_dataset(fashion, metrics, demo, indices=range(9)), None)


def test_inception_score_does_not_depend_on_the_order_of_classes(demo):
    sorted_logits = 50 * torch.eye(4).repeat_interleave(250, dim=0)
    collected = {"fd_demo": Collected(demo["fd_demo"], FeatureMoments(2), None, sorted_logits)}
    (score,), _ = compute_metrics(parse_metrics("is:fd_demo"), collected, None)
    assert inception_score(sorted_logits).mean < 2 and score.value == pytest.approx(4, rel=0.05)


def test_numbers_that_mean_less_than_they_seem_come_with_a_warning(tmp_path):
    metrics, detectors = [Metric("fd_lin", "fd", "lin")], linear_detector(dim=6)
    many = reference_of(tmp_path / "many.npz", pixels(40), metrics, detectors)
    few = reference_of(tmp_path / "few.npz", pixels(6), metrics, detectors)
    enough, barely = (evaluate_dataset(pixels(n, seed=1), metrics, detectors) for n in (7, 6))
    assert compute_metrics(metrics, enough, many)[1] == []
    values, (warning,) = compute_metrics(metrics, barely, many)
    assert "6 images for 6 feature dimensions" in warning and "singular" in warning and np.isfinite(values[0].value)
    (warning,) = compute_metrics(metrics, enough, few)[1]
    assert "the reference has 6 images for 6 feature dimensions" in warning
    other = {"lin": LoadedDetector(detectors["lin"].module, "lin", 6, "cd" * 32)}
    (warning,) = compute_metrics(metrics, evaluate_dataset(pixels(20), metrics, other), many)[1]
    assert "other weights of lin (abababab, here cdcdcdcd)" in warning


def test_references_without_what_a_metric_needs_are_refused_before_any_image(tmp_path):
    metrics, detectors = [Metric("fd_lin", "fd", "lin")], linear_detector()
    reference = reference_of(tmp_path / "ref.npz", pixels(20), metrics, detectors)
    check_reference([*metrics, Metric("is", "is", "fid")], reference)
    with pytest.raises(ReferenceFileError, match=r"holds statistics for lin, not for fid \(fid\).* ref --metrics fid"):
        check_reference(parse_metrics("fid"), reference)
    with pytest.raises(ReferenceFileError, match="no single features of lin, which kid:lin needs.* --metrics kid:lin"):
        check_reference([Metric("kid:lin", "kid", "lin")], reference)
    check_reference(metrics, reference, detectors)
    with pytest.raises(ReferenceFileError, match="the reference has 4 feature dimensions and the detector 3"):
        check_reference(metrics, reference, linear_detector(dim=3))
    smaller = evaluate_dataset(pixels(20), metrics, linear_detector(dim=3))
    with pytest.raises(ReferenceFileError, match="the reference has 4 feature dimensions and the detector 3"):
        compute_metrics(metrics, smaller, reference)


def test_one_image_is_an_error(tmp_path):
    metrics, detectors = [Metric("fd_lin", "fd", "lin")], linear_detector()
    reference = reference_of(tmp_path / "ref.npz", pixels(20), metrics, detectors)
    moments = FeatureMoments(4)
    moments.add(torch.ones(1, 4))
    with pytest.raises(ValueError, match="at least 2 images, got 1"):
        compute_metrics(metrics, {"lin": Collected(detectors["lin"], moments, None, None)}, reference)


def test_a_new_metric_is_a_function_and_an_entry_in_the_table(tmp_path, monkeypatch):
    def gap(images, reference):
        return float((images.mean(dim=0) - reference.mean(dim=0)).norm()), {"images": len(images)}

    monkeypatch.setitem(KINDS, "gap", Kind("features", gap))
    metrics, detectors = parse_metrics("gap:lin,lin", ("lin",)), linear_detector()
    assert [metric.name for metric in metrics] == ["gap:lin", "fd_lin"]
    reference = reference_of(tmp_path / "ref.npz", pixels(20), metrics, detectors)
    check_reference(metrics, reference)
    (same, _), _ = compute_metrics(metrics, evaluate_dataset(pixels(20), metrics, detectors), reference)
    (other, _), _ = compute_metrics(metrics, evaluate_dataset(pixels(20, seed=1), metrics, detectors), reference)
    assert same.value == 0 < other.value and same.details == {"images": 20}
    with pytest.raises(ValueError, match="no metric 'gaps': use fid, fd_dinov2, fd_demo, kid, pr, is, gap"):
        parse_metrics("gaps")


def test_shapes_in_a_pickle_are_compared_before_arrays_are_copied(tmp_path, monkeypatch):
    content = {"fid": {"mu": np.zeros(9, np.uint8), "sigma": np.zeros(9, np.uint8)}}
    (tmp_path / "ref.pkl").write_bytes(pickle.dumps(content))
    monkeypatch.setattr(np, "asarray", None)
    with pytest.raises(ReferenceFileError, match=r"mu has shape \[9\], sigma \[9\]"):
        load_reference(tmp_path / "ref.pkl")
