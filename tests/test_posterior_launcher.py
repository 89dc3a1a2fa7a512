import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests import warm

ROOT = Path(__file__).parents[1]
STUDENT = ROOT / "assets" / "demo" / "student.safetensors"
TASKS = (
    "gaussian_deblur_circ",
    "motion_deblur_circ",
    "super_resolution",
    "phase_retrieval",
    "box_inpainting",
    "random_inpainting",
    "high_dynamic_range",
    "nonlinear_deblur",
)
VARIABLES = ("DEMO", "NET", "DATA", "OUT", "NUM_GPUS", "BATCH", "NUM")


def launch(*arguments, root=ROOT, python=Path(sys.executable).parent, cwd=ROOT, **variables):
    """Run the launcher with `python` found in the given folder."""
    environment = {k: v for k, v in os.environ.items() if k not in VARIABLES}
    environment |= {"PATH": f"{python}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    environment |= {k: str(v) for k, v in variables.items()}
    command = ["bash", str(root / "quick_start" / "posterior-sample.sh"), *map(str, arguments)]
    return subprocess.run(
        command, env=warm.environment(environment), cwd=cwd, capture_output=True, text=True, timeout=240
    )


def launched(folder):
    """What went before the script, and the script's options."""
    words = (folder / "launched").read_text().splitlines()
    script = words.index(str(ROOT / "posterior_sample.py"))
    return words[:script], dict(zip(words[script + 1 :: 2], words[script + 2 :: 2], strict=True))


@pytest.mark.parametrize("task", TASKS)
def test_every_task_has_a_preset_of_either_size(task, fake_python, tmp_path):
    published = launch(task, python=fake_python, NET=STUDENT, DATA=tmp_path)
    assert published.returncode == 0, published.stderr
    before, options = launched(tmp_path)
    assert before == [] and options == {
        "--net": str(STUDENT),
        "--data": str(tmp_path),
        "--task": task,
        "--outdir": str(ROOT / "out" / "posterior" / task),
        "--batch": "25",
        "--num": "100",
    }
    assert launch(task, "--seed", 3, python=fake_python, DEMO=1).returncode == 0
    _, demo = launched(tmp_path)
    assert demo["--task"] == f"demo/{task}" and demo["--seed"] == "3" and Path(demo["--net"]).is_file()
    for name in (options["--task"], demo["--task"]):
        assert (ROOT / "presets" / "task" / f"{name}.yaml").is_file()


def test_paths_are_those_of_the_callers_folder(fake_python, tmp_path):
    (tmp_path / "photos").mkdir()
    shutil.copy(STUDENT, tmp_path / "net.safetensors")
    variables = dict(NET="net.safetensors", DATA="photos", OUT="results")
    assert launch("box_inpainting", cwd=tmp_path, python=fake_python, **variables).returncode == 0
    _, options = launched(tmp_path)
    assert (options["--net"], options["--data"], options["--outdir"]) == ("net.safetensors", "photos", "results")


def test_gpus_get_a_process_each(fake_python, tmp_path):
    result = launch("phase_retrieval", "--runs", 2, python=fake_python, NUM_GPUS="08", NET=STUDENT, DATA=tmp_path)
    assert result.returncode == 0, result.stderr
    before, options = launched(tmp_path)
    assert before == [str(ROOT / "quick_start/processes.py"), "--standalone", "--nproc-per-node", "8", "--"]
    assert options["--device"] == "cuda" and options["--runs"] == "2" and options["--num"] == "100"


@pytest.mark.parametrize(
    ("arguments", "variables", "wanted"),
    [
        ([], {}, ["usage: ", "one of box_inpainting, gaussian_deblur_circ,", "super_resolution"]),
        (["sharpen"], {}, ["there is no task 'sharpen'", "random_inpainting"]),
        (["../task/box_inpainting"], {}, ["there is no task"]),
        (["box_inpainting"], {}, ["no network", "ncvsd-ffhq256-xs.pkl", "NET", "DEMO=1 bash"]),
        (["box_inpainting"], {"NET": STUDENT}, ["no images", "ffhq_val", "DATA", "DEMO=1 bash"]),
        (["box_inpainting"], {"NET": f"{STUDENT}#sha256=00", "DATA": "/nowhere"}, ["no images /nowhere"]),
        (["box_inpainting"], {"DEMO": 1, "NUM_GPUS": "two"}, ["NUM_GPUS is 'two'"]),
    ],
)
def test_what_is_missing_is_told_in_one_line(arguments, variables, wanted, tmp_path):
    root = tmp_path / "project" / "root"  # without any model beside it
    shutil.copytree(ROOT / "quick_start", root / "quick_start")
    shutil.copytree(ROOT / "presets" / "task", root / "presets" / "task")
    result = launch(*arguments, root=root, python="/nowhere", **variables)
    assert result.returncode == 2 and result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    for part in wanted:
        assert part in result.stderr


def test_more_gpus_than_there_are_is_explained_before_any_process_starts(fake_python, tmp_path):
    result = launch("box_inpainting", python=fake_python, DEMO=1, NUM_GPUS=9)
    assert result.returncode == 2
    assert result.stderr == (
        "error: NUM_GPUS is 9, and PyTorch sees 8 CUDA device(s): give at most that many (0 is one process)\n"
    )
    assert not (tmp_path / "launched").exists()


def test_demo_runs_from_the_embedded_model_to_the_page(tmp_path):
    out = tmp_path / "results"
    options = ["--steps", 3, "--runs", 2, "--lpips", "off", "--quiet", "--device", "cpu"]
    result = launch("super_resolution", *options, cwd=tmp_path, DEMO=1, NUM=1, OUT=out)
    assert result.returncode == 0, result.stderr
    assert "PSNR" in result.stdout and "best by truth (oracle)" in result.stdout
    report = json.loads((out / "metrics.json").read_text())
    assert (report["num_images"], report["runs"], report["has_truth"]) == (1, 2, True)
    for file in ("report.html", "metrics.csv", "options.json", "samples/run_1", "measurements", "mean", "std"):
        assert (out / file).exists(), file
    assert sorted(path.name for path in tmp_path.iterdir()) == ["results"]
