import json
import os
import signal
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner

import calculate_metrics
from metrics.references import load_reference
from tests import warm
from tests.conftest import write_images

ROOT = Path(__file__).parents[1]
DATA = str(ROOT / "assets" / "fashion16.zip")
STUDENT = str(ROOT / "assets" / "demo" / "student.safetensors")
TEACHER = str(ROOT / "assets" / "demo" / "teacher.safetensors")
ALL = "fd_demo,kid:fd_demo,pr:fd_demo,is:fd_demo"
QUIET = ["--quiet", "--device", "cpu"]


def call(*arguments, fails=False):
    result = CliRunner().invoke(calculate_metrics.cli, [str(a) for a in arguments])
    assert (result.exit_code != 0) == fails, result.output
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.output


@pytest.fixture(scope="module")
def reference(tmp_path_factory, some_fashion):
    """Statistics of some of the embedded data, with features."""
    path = tmp_path_factory.mktemp("reference") / "ref.npz"
    call("ref", "--data", some_fashion, "--dest", path, "--metrics", ALL, "--batch", 500, *QUIET)
    return path


def gen(reference, out, *arguments, **options):
    return call("gen", "--net", STUDENT, "--ref", reference, "--metrics", "fd_demo", "--num", 40, "--seed", 7, "--out",
                out, *arguments, *QUIET, **options)  # fmt: skip


def records(path):
    return json.loads(Path(path).read_text())["results"]


def test_the_data_set_against_itself_is_at_distance_zero(reference, some_fashion, tmp_path):
    call("calc", "--images", some_fashion, "--ref", reference, "--metrics", ALL, "--out", tmp_path / "o.json", *QUIET)
    (record,) = records(tmp_path / "o.json")
    values = {m["name"]: m["value"] for m in record["metrics"]}
    assert abs(values["fd_demo"]) < 1e-3 and abs(values["kid:fd_demo"]) < 5e-3 and values["pr:fd_demo"] == 1
    assert 5 < values["is:fd_demo"] < 10 and record["num_images"] == 2000 and not record["warnings"]
    assert record["metrics"][2]["details"]["recall"] == 1 and record["pixel_rounding"] is None  # as stored


def test_statistics_whose_writing_was_killed_leave_nothing_for_the_next_run(tmp_path):
    write_images(tmp_path / "data.zip", np.random.default_rng(0).integers(0, 256, [4, 16, 16], dtype=np.uint8))
    command = ["ref", "--data", tmp_path / "data.zip", "--dest", tmp_path / "ref.npz", "--metrics", "fd_demo", *QUIET]
    killed = f"""
import os, signal
from metrics import references

def half(file, **arrays):
    file.write(b"PK" + bytes(9999))
    file.flush()
    os.kill(os.getpid(), signal.SIGKILL)

references.np.savez = half
import calculate_metrics
calculate_metrics.cli({[str(argument) for argument in command]})
"""
    process = warm.run([sys.executable, "-c", killed], cwd=ROOT, capture_output=True, text=True)
    assert process.returncode == -signal.SIGKILL, process.stderr
    assert len(os.listdir(tmp_path)) == 2 and not (tmp_path / "ref.npz").exists()
    call(*command)
    assert sorted(os.listdir(tmp_path)) == ["data.zip", "ref.npz"]
    assert load_reference(tmp_path / "ref.npz").num_images == 4


def test_a_report_says_what_was_measured(reference, tmp_path):
    shown = gen(reference, tmp_path / "o.json", "--ts", "12,39", "--ts", "10,22", "--zeta", 0.5)
    first, second = records(tmp_path / "o.json")
    assert (first["ts"], second["ts"]) == ([12, 39], [10, 22, 39]) and first["evaluations"] == 1
    assert first["seeds"] == [7, 46] and first["num_images"] == 40 and first["zeta"] == 0.5
    for hashed in (first["net_sha256"], first["reference"]["sha256"], first["metrics"][0]["detector_sha256"]):
        assert len(hashed) == 64
    assert first["reference"]["num_images"] == 2000 and "truncated" in first["pixel_rounding"]
    assert "singular" in first["warnings"][0] and "warning: fd_demo: 40 images" in shown
    assert "10,22,39" in shown and f"{second['metrics'][0]['value']:.4g}" in shown


def test_seeds_stay_below_2_to_the_63(reference):
    arguments = ["gen", "--net", STUDENT, "--ref", reference, "--metrics", "fd_demo", "--num", 40, "--seed"]
    assert "not in the range" in call(*arguments, 1 << 63, fails=True)
    assert "seeds must lie between 0 and 2^63 - 1" in call(*arguments, (1 << 63) - 39, fails=True)


def test_saved_images_give_the_same_distance(reference, tmp_path):
    gen(reference, tmp_path / "a.json", "--ts", "12,39", "--save-images", tmp_path / "images.zip")
    archive = zipfile.ZipFile(tmp_path / "images.zip")
    assert len(json.loads(archive.read("dataset.json"))["labels"]) == 40 and sorted(os.listdir(tmp_path)) == [
        "a.json",
        "images.zip",
    ]
    call("calc", "--images", tmp_path / "images.zip", "--ref", reference, "--metrics", "fd_demo", "--out",
         tmp_path / "b.json", *QUIET)  # fmt: skip
    a, b = (records(tmp_path / f"{name}.json")[0]["metrics"][0]["value"] for name in "ab")
    assert a == pytest.approx(b, rel=1e-9)
    before = (tmp_path / "images.zip").read_bytes()
    output = gen(reference, tmp_path / "c.json", "--save-images", tmp_path / "images.zip", fails=True)
    assert "exists already" in output and (tmp_path / "images.zip").read_bytes() == before
    assert not (tmp_path / "c.json").exists()


def test_the_teacher_is_sampled_with_heun(reference, tmp_path):
    call("gen", "--net", TEACHER, "--ref", reference, "--metrics", "fd_demo", "--num", 4, "--steps", 3, "--sampler",
         "heun", "--out", tmp_path / "o.json", *QUIET)  # fmt: skip
    (record,) = records(tmp_path / "o.json")
    assert record["evaluations"] == 5 and record["sampler"] == "heun" and record["ts"] is None


def test_two_processes_agree_with_one(reference, tmp_path):
    command = ["calculate_metrics.py", "gen", "--net", STUDENT, "--ref", str(reference), "--metrics", ALL,
               "--num-images", "70", "--ts", "12,39", "--batch", "10", *QUIET,
               "--out", str(tmp_path / "two.json")]  # fmt: skip
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = dict(os.environ, OMP_NUM_THREADS="1")
    result = warm.run([*launcher, *command], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    call(*[str(tmp_path / "one.json") if "two.json" in part else part for part in command[1:]])
    one, two = (records(tmp_path / f"{name}.json")[0] for name in ("one", "two"))
    assert (one["processes"], two["processes"]) == (1, 2)
    for a, b in zip(one["metrics"], two["metrics"], strict=True):
        assert a["value"] == pytest.approx(b["value"], rel=1e-6, abs=1e-9)


def test_a_detector_of_ones_own_is_reported_under_its_name(tmp_path):
    class Means(torch.nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return images.float().mean(dim=(1, 3))[:, :4]

    torch.jit.script(Means()).save(str(tmp_path / "rows.pt"))
    own = ["--detector", tmp_path / "rows.pt"]  # in place of the default metric
    call("ref", "--data", DATA, "--dest", tmp_path / "ref.npz", *own, *QUIET)
    call("calc", "--images", DATA, "--ref", tmp_path / "ref.npz", "--num", 2000, *own, "--out", tmp_path / "o.json",
         *QUIET)  # fmt: skip
    (metric,) = records(tmp_path / "o.json")[0]["metrics"]
    assert metric["name"] == "fd_rows" and 0 < metric["value"] < 50


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--metrics", "fvd"], "no metric 'fvd'"),
        (["--metrics", "fd_dinov2"], "holds statistics for fd_demo, not for fd_dinov2"),
        (["--ts", "5,3"], "--ts"),
        (["--sampler", "heun"], "does not fit a generative denoiser"),
        (["--steps", 8], "teachers only"),
        (["--num", 1], "--num"),
        (["--net", "missing.safetensors"], "missing.safetensors"),
        (["--ref", "missing.npz"], "missing.npz"),
        (["--detector-path", "nowhere", "--metrics", "fd_demo"], "nowhere"),
        (["--zeta", 0.5], "zeta applies to few-step"),
        (["--detector-name", "mine"], "give that as well"),
    ],
)
def test_bad_requests_are_refused_in_one_line(reference, tmp_path, arguments, message):
    output = gen(reference, tmp_path / "o.json", *arguments, fails=True)
    assert message in output and "Traceback" not in output and not (tmp_path / "o.json").exists()
    assert len([line for line in output.splitlines() if line.startswith("Error")]) == 1


def test_a_missing_weight_file_is_explained(tmp_path, monkeypatch):
    np.savez(tmp_path / "edm.npz", mu=np.zeros(2048), sigma=np.eye(2048))
    monkeypatch.setenv("NCVSD_DETECTORS", str(tmp_path))
    monkeypatch.setenv("NCVSD_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("metrics.features.weights.open_url", _no_network)
    output = call("calc", "--images", DATA, "--ref", tmp_path / "edm.npz", "--num", 4, *QUIET, fails=True)
    for part in ("pt_inception-2015-12-05-6726825d.pth", "96 MB", "github.com", "--detector-path", "NCVSD_DETECTORS"):
        assert part in output


def _no_network(*_, **__):
    from dnnlib.download import DownloadError

    raise DownloadError("no route to host")


def test_a_report_that_cannot_be_written_is_refused_before_any_work(reference, tmp_path):
    assert "is a folder" in gen(reference, tmp_path, fails=True)
    (tmp_path / "file").write_text("")
    assert "cannot be written to" in gen(reference, tmp_path / "file" / "o.json", fails=True)
    before = reference.read_bytes()
    assert "this is to be a .json file" in gen(reference, reference, fails=True) and reference.read_bytes() == before


def test_a_data_sets_labels_and_what_is_read_are_not_replaced(reference, tmp_path):
    folder = tmp_path / "data"
    (folder / "00000").mkdir(parents=True)
    labels = folder / "dataset.json"
    labels.write_text('{"labels": null}')
    output = call("calc", "--images", folder, "--ref", reference, "--metrics", "fd_demo", "--out", labels, fails=True)
    assert "the name of a data set's labels" in output and labels.read_text() == '{"labels": null}'
    call("ref", "--data", reference, "--dest", reference, *QUIET, fails=True)
    assert np.load(reference)["num_images"] > 0


def test_a_full_disk_behind_the_output_costs_no_report(reference, tmp_path):
    out = tmp_path / "o.json"
    command = [
        sys.executable,
        "calculate_metrics.py",
        "gen",
        "--net",
        STUDENT,
        "--ref",
        reference,
        "--metrics",
        "fd_demo",
    ]
    command += ["--num", "8", "--device", "cpu", "--out", out]
    with open("/dev/full", "w") as full:
        done = warm.run(command, cwd=ROOT, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 1 and "No space left on device" in done.stderr and "Traceback" not in done.stderr
    assert json.loads(out.read_text())["results"][0]["num_images"] == 8


def test_a_reference_of_another_size_is_refused_before_any_work(tmp_path, monkeypatch):
    statistics = {"fd_demo/mu": np.zeros(64), "fd_demo/sigma": np.eye(64), "num_images": np.array(100)}
    np.savez(tmp_path / "ref.npz", **statistics)
    monkeypatch.setattr("metrics.commands.evaluate_network", None)  # would fail
    assert "64 feature dimensions and the detector 128" in gen(tmp_path / "ref.npz", tmp_path / "o.json", fails=True)
