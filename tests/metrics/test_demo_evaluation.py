import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import networks
from metrics.detectors import DEMO_CLASSIFIER, DemoClassifier, load_demo_classifier, save_demo_classifier
from metrics.evaluate import dataset_moments, evaluate
from metrics.frechet import frechet_distance
from training.dataset import ImageDataset

ROOT = Path(__file__).parents[2]
DATA = ROOT / "assets" / "fashion16.zip"


@pytest.fixture(scope="module")
def dataset():
    return ImageDataset(DATA, max_size=1200)


def test_classifier_knows_the_embedded_data(dataset):
    classifier = load_demo_classifier()
    images = torch.stack([torch.from_numpy(dataset[i][0]) for i in range(1000)])
    classes = torch.tensor([dataset.get_raw_label(i) for i in range(1000)])
    assert (classifier.logits(images).argmax(dim=1) == classes).float().mean() > 0.85


def test_features_do_not_depend_on_the_batch(dataset):
    classifier = load_demo_classifier()
    images = torch.stack([torch.from_numpy(dataset[i][0]) for i in range(8)])
    together = classifier(images)
    assert together.shape == (8, classifier.feature_dim)
    torch.testing.assert_close(torch.cat([classifier(image[None]) for image in images]), together)


def test_distance_grows_with_corruption(dataset):
    classifier = load_demo_classifier()
    halves = [dataset_moments(dataset, classifier, range(k * 600, k * 600 + 600)) for k in range(2)]
    images = torch.stack([torch.from_numpy(dataset[i][0]) for i in range(600)])
    distances = [frechet_distance(halves[0].mean(), halves[0].cov(), halves[1].mean(), halves[1].cov())]
    for noise in (20, 60):
        disturbed = images + noise * torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
        features = classifier(disturbed.clamp(0, 255).to(torch.uint8))
        cov = features.double().T.cov()
        distances.append(frechet_distance(features.mean(0), cov, halves[1].mean(), halves[1].cov()))
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

    classifier = load_demo_classifier()
    reference = dataset_moments(dataset, classifier)
    teacher = networks.load(ROOT / "assets" / "demo" / "teacher.safetensors")
    student = networks.load(ROOT / "assets" / "demo" / "student.safetensors")
    untrained, _, _ = build_student(teacher.net, NCVSDConfig())
    arguments = dict(seeds=range(300), batch=100, ts=(12, 39))
    before = evaluate(untrained, teacher.encoder, classifier, reference, **arguments)
    after = evaluate(student.net, student.encoder, classifier, reference, **arguments)
    assert after.evaluations == 1 and after.num_images == 300
    assert after.distance < 0.2 * before.distance


def test_report_writes_table_and_page(tmp_path):
    assets = ROOT / "assets"
    command = [sys.executable, str(ROOT / "quick_start" / "demo_report.py"), "--num", "20", "--batch", "20"]
    command += ["--teacher", str(assets / "demo" / "teacher.safetensors"), "--data", str(assets / "fashion16.zip")]
    command += ["--after", str(assets / "demo" / "student.safetensors"), "--outdir", str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    rows = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert [row["key"] for row in rows] == ["after-1", "after-2", "after-4", "teacher", "data"]
    assert [row["evaluations"] for row in rows] == [1, 2, 4, 63, None]
    page = (tmp_path / "index.html").read_text()
    assert all(row["title"] in page and row["title"] in result.stdout for row in rows)
