"""What posterior_sample.py promises: one image whatever the batch, limits, and nothing finished is lost."""

import json
import os
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from generation.pictures import read_image
from tests import warm
from tests.test_posterior_sample import ROOT, contents, data, finished, nets, run, task  # noqa: F401

# ruff: noqa: F811

ENDED = """
import os, sys
number, left = int(sys.argv.pop(1)), int(sys.argv.pop(1))
import dnnlib.files
from posterior_sample import main
replace = os.replace
def end_before_a_rename(source, destination):
    global left
    left -= 1
    if left == 0:
        os.kill(os.getpid(), number)
    replace(source, destination)
os.replace = end_before_a_rename
main()
"""
HOLDS = (
    "import sys; from dnnlib.files import lock_folder; held = lock_folder(sys.argv[1]); print(1, flush=True); input()"
)


@pytest.mark.parametrize(
    ("number", "renames"),  # options.json is the first; then each image takes 9, its record the last of them
    [(signal.SIGINT, 14), (signal.SIGTERM, 14), (signal.SIGKILL, 5), (signal.SIGKILL, 10), (signal.SIGKILL, 14)],
)
def test_what_is_finished_stays_and_the_same_command_goes_on(number, renames, finished, nets, data, task, tmp_path):
    out = tmp_path / "out"
    command = ["--net", nets / "plain", "--task", task, "--data", data, "--outdir", out, "--batch", 3]
    ended = warm.run(
        [*map(str, [sys.executable, "-c", ENDED, int(number), renames, *command]), "--device", "cpu", "--quiet"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=200,
    )
    code = ended.returncode if ended.returncode > 0 else 128 - ended.returncode  # as shells have it
    assert code == 128 + number and "Traceback" not in ended.stderr and len(ended.stderr.strip().splitlines()) <= 2
    before = contents(out, "*.png", "*.npz", "records/*.json")
    records = sorted((out / "records").glob("[!.]*")) if (out / "records").exists() else []
    assert len(records) == (renames > 10)
    kept = [path.stat().st_mtime_ns for path in records]
    text = run(*command)
    assert ("1 were finished before" in text) == (renames > 10)
    assert [path.stat().st_mtime_ns for path in records] == kept
    after = contents(out, "*.png", "*.npz", "records/*.json")
    assert {
        name: after[name] for name in before if not name.rpartition("/")[2].startswith(".")
    }.items() <= after.items()
    assert after.keys() == contents(finished[0], "*.png", "*.npz", "records/*.json").keys()
    assert not list(out.rglob("*.tmp")) and len(json.loads((out / "metrics.json").read_text())["images"]) == 3


def test_a_folder_in_use_by_another_process_is_left_alone(finished, nets, data, task, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(finished[0], out)
    (out / "records" / "00000-img00000001.json").unlink()
    before = contents(out, "*.*")
    command = ["--net", nets / "plain", "--task", task, "--data", data, "--outdir", out]
    options = {"cwd": ROOT, "stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", HOLDS, str(out)], **options) as other:
        assert other.stdout.readline() == "1\n"
        text = run(*command, code=1)
        assert f"{out} is in use by another run (process {other.pid} on " in text and "another --outdir" in text
        other.communicate("\n")
    assert {name: data for name, data in contents(out, "*.*").items() if not name.startswith(".lock")} == {
        name: data for name, data in before.items() if not name.startswith(".lock")
    }
    assert "2 were finished before" in run(*command)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", 10**9], "steps must be a whole number from 2 to 10000, not 1000000000"),
        (["--runs", 10**12], "runs must be a whole number from 1 to 1000, not 1000000000000"),
        (["--rho", 1e-3], "rho must be a number from 0.1 to 100, not 0.001"),
        (["--noise", 1e38], "noise must be a number from 0 to 1e+06, not 1e+38"),
        (["--beta", "inf"], "beta must be a number from 1e-12 to 1e+12, not inf"),
        (["--langevin-steps", 10**9], "langevin: steps must be a whole number from 1 to 100000"),
    ],
)
def test_settings_have_limits(arguments, message, nets, data, task, tmp_path):
    command = ["--net", nets / "plain", "--task", task, "--data", data, "--outdir", tmp_path / "out"]
    assert message in run(*command, *arguments, code=1) and not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["pipe", "damaged", "smaller", "colour"])
def test_pictures_of_a_finished_image_that_others_changed_are_named(kind, finished, nets, data, task, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(finished[0], out)
    file = out / "samples/run_1/00000-img00000001.png"
    if kind == "damaged":
        file.write_bytes(file.read_bytes()[:50])
    elif kind == "pipe":
        file.unlink()
        os.mkfifo(file)
    else:
        Image.new(*(("L", (4, 4)) if kind == "smaller" else ("RGB", (16, 16)))).save(file)
    text = run("--net", nets / "plain", "--task", task, "--data", data, "--outdir", out, code=1)
    assert f"Error: {file}: " in text and len(text.strip().splitlines()) == 2


BATCH_TASK = ["--task", "demo/phase_retrieval", "--steps", 6, "--langevin-steps", 50, "--runs", 2, "--class", 3]
BATCH_TASK += ["--net", ROOT / "assets" / "demo" / "student.safetensors"]


@pytest.mark.parametrize("dtype", ["float32", "bf16"])
def test_with_batch_1_an_image_is_the_same_bit_for_bit_whatever_else_is_drawn(dtype, data, tmp_path):
    command = [*BATCH_TASK, "--data", data, "--noise", 0.44, "--dtype", dtype, "--batch", 1]
    run(*command, "--outdir", tmp_path / "all")
    run(*command, "--outdir", tmp_path / "first", "--num", 1)
    first = contents(tmp_path / "first", "samples/*/*.png", "records/*.json")
    assert len(first) == 3 and first.items() <= contents(tmp_path / "all", "samples/*/*.png", "records/*.json").items()


def test_in_float32_other_batches_change_less_than_a_grey_level_where_beta_fits_the_noise(data, tmp_path):
    for batch in (1, 4):
        run(*BATCH_TASK, "--data", data, "--dtype", "float32", "--batch", batch, "--outdir", tmp_path / str(batch))
    paths = sorted(path.relative_to(tmp_path / "1") for path in (tmp_path / "1" / "samples").rglob("*.png"))
    for path in paths:
        one, four = (read_image(tmp_path / batch / path).astype(int) for batch in "14")
        assert np.abs(one - four).max() <= 1
    assert len(paths) == 6


@pytest.mark.parametrize("runs", [1, 2])
def test_a_residual_beyond_all_numbers_is_null(runs, nets, task, tmp_path):
    out, y = tmp_path / "out", tmp_path / "y"
    y.mkdir()
    np.savez(y / "a.npz", y=np.full((1, 8, 8), 1e30))
    run("--net", nets / "plain", "--task", task, "--measurements", y, "--runs", runs, "--outdir", out)
    (image,) = json.loads((out / "metrics.json").read_text())["images"]
    assert image["runs"][0]["residual"] is None
    assert (out / "report.html").exists()


def test_phase_retrieval_from_measured_magnitudes(nets, data, tmp_path):
    settings = ["--task", "phase_retrieval", "--steps", 3, "--runs", 2, "--langevin-steps", 5]
    run("--net", nets / "plain", "--data", data, "--num", 1, "--outdir", tmp_path / "first", *settings)
    y = tmp_path / "first" / "measurements"
    run("--net", nets / "plain", "--measurements", y, "--outdir", tmp_path / "second", *settings)
    for j in range(2):
        file = f"samples/run_{j}/00000-img00000000.png"
        first, second = (read_image(tmp_path / folder / file).astype(int) for folder in ("first", "second"))
        assert np.abs(first - second).max() <= 1
    text = (tmp_path / "second" / "report.html").read_text()
    assert "No ground truth" in text and "noise 0.05" not in text and "The noise is" not in text
