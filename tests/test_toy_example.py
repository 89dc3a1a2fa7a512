"""The script, and what the student in `assets/` is worth."""

import json
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from PIL import Image, ImageColor

from toy.check import Bench, identity_errors
from toy.figure import LINES
from toy.mixture import spiral_arms
from toy.training import load_student
from toy_example import STUDENT, main

ROOT = Path(__file__).parents[1]
TINY = "--iterations 40 --pretraining 20 --batch 32 --width 16 --quiet".split()


def run(*arguments):
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def test_train_check_and_plot(tmp_path, monkeypatch):
    monkeypatch.setattr("toy.check.PROBE_SAMPLES", 16)
    net = tmp_path / "new/student.safetensors"
    result = run("train", "--out", net, *TINY, "--no-adversarial", "--gamma", "0.2")
    assert result.exit_code == 0, result.output
    settings = load_student(net).settings
    assert settings.gamma == 0.2 and not settings.adversarial and settings.control and settings.width == 16
    result = run("check", "--net", net, "--points", 4, "--samples", 16, "--out", tmp_path / "out/check.json")
    assert result.exit_code == 0, result.output
    numbers = json.loads((tmp_path / "out/check.json").read_text())
    assert numbers["points"] == 4 and numbers["settings"]["gamma"] == 0.2
    assert {row["denoiser"] for row in numbers["pnp"]} == {"true posterior", "exact denoiser", "1 step", "4 steps"}
    assert any(not target["met"] for target in numbers["targets"]) and "missed" in result.output
    result = run("plot", "--net", net, "--out", tmp_path / "figure.png")
    assert result.exit_code == 0, result.output
    with Image.open(tmp_path / "figure.png") as figure:
        colors = torch.tensor([color for _, color in figure.convert("RGB").getcolors(1 << 20)])
        assert figure.width > 1000 and len(colors) > 100
    for line in LINES.values():  # the palette keeps the curves apart
        assert (colors - torch.tensor(ImageColor.getrgb(line))).abs().amax(1).min() <= 12
    (tmp_path / "figure.png").unlink()
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    result = run("plot", "--net", net, "--out", tmp_path / "figure.png")
    assert result.exit_code == 1 and "pip install matplotlib" in result.output and result.output.count("\n") == 1
    assert not (tmp_path / "figure.png").exists()


def test_what_is_wrong_comes_in_one_line(tmp_path):
    (tmp_path / "note.txt").write_text("hello")
    cases = [
        ["check", "--net", tmp_path / "absent.safetensors"],
        ["plot", "--net", tmp_path / "note.txt", "--out", tmp_path / "a.png"],
        ["train", "--out", tmp_path / "a.safetensors", "--lr", "-1"],
        ["train", "--out", tmp_path / "note.txt/a.safetensors", *TINY],
    ]
    for arguments in cases:
        result = run(*arguments)
        assert result.exit_code == 1 and isinstance(result.exception, SystemExit), arguments
        assert result.output.startswith("Error: ") and result.output.count("\n") == 1, result.output
    assert sorted(path.name for path in tmp_path.iterdir()) == ["note.txt"]


def test_a_folder_that_cannot_be_written_stops_a_training_before_it_begins(tmp_path, monkeypatch):
    monkeypatch.setattr("dnnlib.files.os.access", lambda path, mode: False)
    monkeypatch.setattr("toy.training.train", lambda *_, **__: pytest.fail("trained"))
    result = run("train", "--out", tmp_path / "a.safetensors", *TINY)
    assert result.exit_code == 1 and "cannot be written to: name another place" in result.output


def test_student_in_the_repository_samples_the_true_posterior():
    mixture, student = spiral_arms(), load_student(ROOT / STUDENT)
    bench = Bench(mixture, sigmas=(0.1, 0.3, 1.0, 10.0, 80.0), points=24, samples=192, seed=99)
    for sigma in bench.sigmas:
        before = bench.row(sigma, bench.draw(student.start, sigma), "before")
        one = bench.row(sigma, bench.draw(student.generator, sigma), "1 step")
        four = bench.row(sigma, bench.draw(student.generator, sigma, ts=(0, 10, 20, 30, 39)), "4 steps")
        assert one.energy_ratio < 6 and four.energy_ratio < 4, sigma
        share = 0.7 if sigma < 0.2 else 0.4  # at low levels the start is not far off
        assert one.energy < share * before.energy and four.energy < share * before.energy, sigma
        assert 0.9 < one.spread_ratio < 1.1 and 0.9 < four.spread_ratio < 1.1, sigma
    assert max(row["largest_relative_error"] for row in identity_errors(mixture)) < 1e-5
