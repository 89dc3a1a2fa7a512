import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

import calculate_metrics
import networks
from data.dataset import ImageDataset
from metrics.collect import Collected, evaluate_dataset, evaluate_network
from metrics.distances import frechet_distance
from metrics.features.demo import DEMO_CLASSIFIER, DemoClassifier, load_demo_classifier, save_demo_classifier
from metrics.features.detectors import load_detector
from metrics.kinds import parse_metrics
from quick_start import demo_report

ROOT = Path(__file__).parents[2]
DATA = ROOT / "assets" / "fashion16.zip"
METRICS = parse_metrics("fd_demo")


def distance(a: Collected, b: Collected) -> float:
    return frechet_distance(a.moments.mean(), a.moments.cov(), b.moments.mean(), b.moments.cov())


@pytest.fixture(scope="module")
def dataset():
    return ImageDataset(DATA, max_size=1200)


def test_classifier_knows_the_embedded_data(dataset):
    classifier = load_demo_classifier()
    images = torch.stack([torch.from_numpy(dataset[i][0]) for i in range(1000)])
    classes = torch.tensor([dataset.get_raw_label(i) for i in range(1000)])
    assert (classifier.logits(classifier(images)).argmax(dim=1) == classes).float().mean() > 0.85


def test_features_do_not_depend_on_the_batch(dataset):
    classifier = load_demo_classifier()
    images = torch.stack([torch.from_numpy(dataset[i][0]) for i in range(8)])
    together = classifier(images)
    assert together.shape == (8, classifier.feature_dim)
    torch.testing.assert_close(torch.cat([classifier(image[None]) for image in images]), together)


def test_distance_grows_with_corruption(dataset):
    detectors = {"fd_demo": load_detector("fd_demo")}
    first, second = (
        evaluate_dataset(dataset, METRICS, detectors, indices=range(k * 600, k * 600 + 600))["fd_demo"]
        for k in range(2)
    )
    distances = [distance(first, second)]
    images = torch.stack([torch.from_numpy(dataset[i][0]) for i in range(600)])
    for noise in (20, 60):
        disturbed = images + noise * torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
        pairs = [(image, None) for image in disturbed.clamp(0, 255).to(torch.uint8).numpy()]
        distances.append(distance(evaluate_dataset(pairs, METRICS, detectors)["fd_demo"], second))
    assert 0 < distances[0] * 3 < distances[1] < distances[2]


def test_classifier_round_trip_and_errors(tmp_path):
    torch.manual_seed(0)
    classifier = DemoClassifier().eval()
    save_demo_classifier(tmp_path / "c.safetensors", classifier, {})
    image = torch.randint(0, 256, (2, 1, 16, 16), dtype=torch.uint8)
    torch.testing.assert_close(load_demo_classifier(tmp_path / "c.safetensors")(image), classifier(image))
    with pytest.raises(ValueError, match="uint8 images"):
        classifier(image.float())
    with pytest.raises(ValueError, match="missing.safetensors"):
        load_demo_classifier(tmp_path / "missing.safetensors")
    assert DEMO_CLASSIFIER.is_file()


def test_committed_networks_beat_their_start(dataset):
    """Distilled student, one step, against the same student before distillation: 300 images tell them apart."""
    from training.presets import NCVSDConfig
    from training.tasks import build_student

    detectors = {"fd_demo": load_detector("fd_demo")}
    reference = evaluate_dataset(dataset, METRICS, detectors)["fd_demo"]
    teacher = networks.load(ROOT / "assets" / "demo" / "teacher.safetensors")
    student = networks.load(ROOT / "assets" / "demo" / "student.safetensors")
    untrained, _, _ = build_student(teacher.net, NCVSDConfig())
    arguments = dict(seeds=range(300), batch=100, ts=(12, 39))
    before = evaluate_network(untrained, teacher.encoder, METRICS, detectors, **arguments)
    after = evaluate_network(student.net, student.encoder, METRICS, detectors, **arguments)
    assert after.seconds_per_image > 0 and after.collected["fd_demo"].moments.count == 300
    assert distance(after.collected["fd_demo"], reference) < 0.2 * distance(before.collected["fd_demo"], reference)


def test_report_writes_table_and_page(tmp_path, some_fashion):
    """The demo's measurements and page, as demo.sh makes them, with few images and the 1- and 4-step settings."""
    assets = ROOT / "assets"
    common = ["--metrics", "fd_demo", "--device", "cpu", "--quiet"]
    data = str(some_fashion)

    def call(command, *arguments):
        result = CliRunner().invoke(command, list(map(str, arguments)))
        assert result.exit_code == 0, result.output
        return result.output

    ref = ["--ref", tmp_path / "ref.npz", "--num", 20, "--seed", 0]
    call(calculate_metrics.cli, "ref", "--data", data, "--dest", tmp_path / "ref.npz", *common)
    call(calculate_metrics.cli, "calc", "--images", data, "--out", tmp_path / "real.json", *ref, *common)
    for name, settings in (("student", ("--ts", "12,39", "--ts", "0,10,20,30,39")), ("teacher", ())):
        net = assets / "demo" / f"{name}.safetensors"
        out = ["--out", tmp_path / f"{name}.json"]
        call(calculate_metrics.cli, "gen", "--net", net, *settings, *out, *ref, *common)
    reports = ["--after", tmp_path / "student.json", "--teacher", tmp_path / "teacher.json"]
    reports += ["--real", tmp_path / "real.json", "--data", data, "--outdir", tmp_path]
    shown = call(demo_report.main, *reports)
    rows = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert [row["key"] for row in rows] == ["after-1", "after-4", "teacher", "data"]
    assert [row["evaluations"] for row in rows] == [1, 4, 63, None]
    page = (tmp_path / "index.html").read_text()
    assert all(row["title"] in page and row["title"] in shown for row in rows)
