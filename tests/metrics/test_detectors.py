"""Detectors and their weights: where they are found, what is refused, and detectors of one's own."""

import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

from metrics.collect import evaluate_dataset
from metrics.features.demo import DEMO_CLASSIFIER
from metrics.features.detectors import DetectorError, load_custom_detector, load_detector
from metrics.features.inception import WEIGHTS as INCEPTION
from metrics.features.weights import FOLDER_VARIABLE, WeightFile, find_weights
from metrics.kinds import Metric, parse_metrics
from metrics.references import compute_metrics
from tests.metrics.feature_utils import Linear, pixels, reference_of

ROOT = Path(__file__).parents[2]


def one_line(error, *words):
    assert "\n" not in str(error.value)
    assert all(word in str(error.value) for word in words), str(error.value)


def test_missing_weights_are_explained(tmp_path, monkeypatch):
    monkeypatch.delenv(FOLDER_VARIABLE, raising=False)
    for place in (tmp_path, tmp_path / "missing.pth"):
        with pytest.raises(DetectorError) as error:
            load_detector("fid", place)
        one_line(error, INCEPTION.name, "96 MB", INCEPTION.url, "--detector-path", FOLDER_VARIABLE, str(place))
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path))
    weights = WeightFile("net.pth", "ftp://example.org/net.pth", "about 3 MB", "0123abcd")
    with pytest.raises(DetectorError) as error:
        find_weights(weights)
    one_line(error, "net.pth is missing", "about 3 MB", weights.url, "--detector-path", FOLDER_VARIABLE)


def test_wrong_weights_are_refused_wherever_they_lie(tmp_path, monkeypatch):
    (tmp_path / INCEPTION.name).write_bytes(b"other weights")
    for path, folder in ((tmp_path, None), (tmp_path / INCEPTION.name, None), (None, tmp_path)):
        monkeypatch.delenv(FOLDER_VARIABLE, raising=False)
        if folder is not None:
            monkeypatch.setenv(FOLDER_VARIABLE, str(folder))
        with pytest.raises(DetectorError) as error:
            load_detector("fid", path)
        one_line(error, "is not pt_inception-2015-12-05-6726825d.pth", "6726825d", INCEPTION.url)
    assert (tmp_path / INCEPTION.name).read_bytes() == b"other weights"


def test_wrong_downloads_do_not_stay(tmp_path, monkeypatch):
    monkeypatch.delenv(FOLDER_VARIABLE, raising=False)
    cached = tmp_path / "cached"
    monkeypatch.setattr("metrics.features.weights.open_url", lambda url: cached)
    weights = WeightFile("net.pth", "https://example.org/net.pth", "3 MB", "b94d27b9934d3e08")
    cached.write_bytes(b"hello")
    with pytest.raises(DetectorError, match="is not net.pth"):
        find_weights(weights)
    assert not cached.exists()
    cached.write_bytes(b"hello world")  # SHA-256 b94d27b9934d3e08…
    assert find_weights(weights)[0] == cached


def test_weights_come_from_the_path_before_the_folder(tmp_path, monkeypatch):
    weights = WeightFile("net.pth", "ftp://example.org/net.pth", "3 MB", "b94d27b9934d3e08")
    places = [tmp_path / "given" / "renamed.pth", tmp_path / "folder" / "net.pth"]
    for place in places:
        place.parent.mkdir()
        place.write_bytes(b"hello world")
    monkeypatch.setenv(FOLDER_VARIABLE, str(places[1].parent))
    assert find_weights(weights, places[0])[0] == places[0]
    assert find_weights(weights, places[1].parent)[0] == find_weights(weights)[0] == places[1]


def test_unknown_detectors_are_named():
    with pytest.raises(DetectorError, match="no detector is called 'vgg': use fid, fd_dinov2, fd_demo, or give a file"):
        load_detector("vgg")


@pytest.mark.filterwarnings("ignore:.torch.jit.(script|save):DeprecationWarning")
def test_a_script_of_ones_own_equals_its_module_and_has_a_name_of_its_own(tmp_path):
    path = tmp_path / "my-net.pt"
    module = Linear(64, 4)
    torch.jit.script(module).save(str(path))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # none of PyTorch's reaches the user
        detector = load_custom_detector(path)
    images = torch.from_numpy(np.stack([image for image, _ in pixels(5)]))
    torch.testing.assert_close(detector.module(images), module(images))
    assert detector.name == "my_net" and len(detector.sha256) == 64
    (metric,) = parse_metrics(detector.name, (detector.name,))
    assert metric.name == "fd_my_net"
    reference = reference_of(tmp_path / "ref.npz", pixels(50), [metric], {"my_net": detector})
    shifted = [(image + np.uint8(20), None) for image, _ in pixels(50)]
    collected = evaluate_dataset(shifted, [metric], {"my_net": detector})
    (value,), _ = compute_metrics([metric], collected, reference)
    assert value.value == pytest.approx(float((20 * module.weights.sum(dim=0)).square().sum()), rel=1e-4)
    with pytest.raises(ValueError, match=r"detector my_net fails on uint8 images \[5, 1, 4, 4\]") as error:
        detector.module(images[:, :, :4, :4])
    one_line(error)


def test_a_demo_classifier_of_ones_own(tmp_path):
    path = tmp_path / "mine.safetensors"
    path.write_bytes(DEMO_CLASSIFIER.read_bytes())
    detector = load_custom_detector(path)
    images = torch.randint(0, 256, (3, 1, 16, 16), dtype=torch.uint8)
    torch.testing.assert_close(detector.module(images), load_detector("fd_demo").module(images))
    assert detector.name == "mine" and load_custom_detector(path, "better").name == "better"


class Maps(torch.nn.Module):
    """Gives maps, and not features [N,D]."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.float()


@pytest.mark.filterwarnings("ignore:.torch.jit.(script|save):DeprecationWarning")
def test_files_that_are_no_detectors_are_refused(tmp_path):
    files = {
        "plain.pt": b"no archive",
        "weights.pt": None,
        "empty.safetensors": b"",
        "cut.pt": b"PK\5\6" + bytes(6) + b"\1\0\1\0" + b"\x2e" + bytes(7),  # an archive's end without its directory
        "net.safetensors": (ROOT / "assets" / "demo" / "student.safetensors").read_bytes(),
    }
    torch.save({"a": torch.ones(2)}, tmp_path / "weights.pt")
    for name, content in files.items():
        if content is not None:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(DetectorError) as error:
            load_custom_detector(tmp_path / name)
        one_line(error, str(tmp_path / name))
    with pytest.raises(DetectorError, match="no detector file"):
        load_custom_detector(tmp_path / "missing.pt")
    torch.jit.script(Maps()).save(str(tmp_path / "maps.pt"))
    for name in ("fid", "fd_demo", "dinov2", "kid", "is", "a b", "a:b"):
        with pytest.raises(DetectorError, match="cannot be called"):
            load_custom_detector(tmp_path / "maps.pt", name)
    detector = load_custom_detector(tmp_path / "maps.pt")
    with pytest.raises(ValueError, match=r"gives \[3, 1, 8, 8\] for 3 images; features \[N,D\] are needed"):
        evaluate_dataset(pixels(3), [Metric("fd_maps", "fd", "maps")], {"maps": detector})
