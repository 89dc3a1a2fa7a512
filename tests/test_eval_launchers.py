import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from data.dataset import ImageDataset
from metrics.collect import evaluate_dataset
from metrics.features.detectors import load_detector
from metrics.kinds import parse_metrics
from metrics.references import save_reference
from quick_start.launch import newest_snapshot
from tests import warm

ROOT = Path(__file__).parents[1]
STUDENT = ROOT / "assets" / "demo" / "student.safetensors"
VARIABLES = ("NET", "REF", "SEED", "NUM", "METRICS", "BATCH", "OUT")


def launch(*arguments, root=ROOT, preset="img64", python=Path(sys.executable).parent, **variables):
    """Run a launcher with `python` found in the given folder."""
    environment = {k: v for k, v in os.environ.items() if k not in VARIABLES}
    environment |= {"PATH": f"{python}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    environment |= {k: str(v) for k, v in variables.items()}
    command = ["bash", str(root / "quick_start" / f"eval-{preset}.sh"), *map(str, arguments)]
    return subprocess.run(command, env=warm.environment(environment), capture_output=True, text=True, timeout=240)


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """Statistics of 300 of the embedded images."""
    path = tmp_path_factory.mktemp("reference") / "demo.npz"
    dataset = ImageDataset(ROOT / "assets" / "fashion16.zip", use_labels=False, max_size=300)
    save_reference(path, evaluate_dataset(dataset, parse_metrics("fd_demo"), {"fd_demo": load_detector("fd_demo")}))
    return path


@pytest.fixture
def empty_root(tmp_path):
    """The launchers in a folder of their own, without any training run."""
    shutil.copytree(ROOT / "quick_start", tmp_path / "root" / "quick_start")
    shutil.copy(ROOT / "pyproject.toml", tmp_path / "root")
    return tmp_path / "root"


def test_one_process_on_the_cpu_from_network_to_report(reference, tmp_path):
    out = tmp_path / "new" / "report.json"
    result = launch(0, "12,39", STUDENT, "--quiet", REF=reference, METRICS="fd_demo", NUM=64, SEED=5, OUT=out)
    assert result.returncode == 0, result.stderr
    (record,) = json.loads(out.read_text())["results"]
    assert (record["ts"], record["num_images"], record["seeds"]) == ([12, 39], 64, [5, 68])
    assert [m["name"] for m in record["metrics"]] == ["fd_demo"] and 0 < record["metrics"][0]["value"] < 10
    assert "fd_demo" in result.stdout and str(STUDENT) in result.stdout


@pytest.mark.parametrize(
    ("preset", "ref", "metrics"),
    [("img64", "img64.pkl", "fid,fd_dinov2"), ("img512", "img512.pkl", "fid,fd_dinov2"), ("ffhq256", "my.npz", "fid")],
)
def test_gpus_get_a_process_each_and_the_published_settings(preset, ref, metrics, fake_python, tmp_path):
    given = tmp_path / "my.npz"
    given.touch()
    variables = {"REF": given} if preset == "ffhq256" else {}
    result = launch(8, "10,22,39", STUDENT, "--zeta", "0.5", preset=preset, python=fake_python, **variables)
    assert result.returncode == 0, result.stderr
    launched = (tmp_path / "launched").read_text().splitlines()
    script = launched.index(str(ROOT / "calculate_metrics.py"))
    assert launched[:script] == [str(ROOT / "quick_start/processes.py"), "--standalone", "--nproc-per-node", "8", "--"]
    options = dict(zip(launched[script + 2 :: 2], launched[script + 3 :: 2], strict=True))
    assert launched[script + 1] == "gen" and Path(options.pop("--ref")).name == ref
    assert options == {
        "--net": str(STUDENT),
        "--ts": "10,22,39",
        "--num-images": "50000",
        "--seed": "123456789",
        "--batch": "64",
        "--metrics": metrics,
        "--out": str(ROOT / "out" / f"eval-{preset}-10,22,39.json"),
        "--device": "cuda",
        "--zeta": "0.5",
    }


def test_torchrun_hands_every_option_on(fake_python, tmp_path):
    result = launch(1, "12,39", STUDENT, "--num", "100", python=fake_python)
    assert result.returncode == 0, result.stderr
    launched = (tmp_path / "launched").read_text().splitlines()
    script = launched.index(str(ROOT / "calculate_metrics.py"))
    printer = tmp_path / "printer.py"
    printer.write_text("import json, sys; print(json.dumps(sys.argv[1:]))")
    command = [sys.executable, *launched[:script], str(printer), *launched[script + 1 :]]
    result = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout) == launched[script + 1 :]


def test_network_comes_from_the_variable_where_no_argument_names_it(fake_python, tmp_path):
    for arguments in ([], ["--quiet"], [""]):
        result = launch(1, "12,39", *arguments, python=fake_python, NET=STUDENT)
        assert result.returncode == 0, result.stderr
        launched = (tmp_path / "launched").read_text().splitlines()
        assert launched[launched.index("--net") + 1] == str(STUDENT)


def write_snapshots(run, *names, mtime):
    run.mkdir(parents=True)
    for name in names:
        path = run / f"network-snapshot-{name}.safetensors"
        path.touch()
        os.utime(path, (mtime, mtime))


def test_newest_snapshot_is_of_the_run_that_wrote_last_and_of_the_narrow_profile(tmp_path):
    runs = tmp_path / "training runs"
    assert newest_snapshot(runs, "img64") == ""
    runs.mkdir()
    assert newest_snapshot(runs, "img64") == ""
    write_snapshots(runs / "a", "000000900-0.050", "000000900-0.100", mtime=1000)
    write_snapshots(runs / "b" / "c", "000000080-0.050", "000000100-0.100", "000000100-0.050", mtime=2000)
    assert newest_snapshot(runs, "img64") == str(runs / "b/c/network-snapshot-000000100-0.050.safetensors")
    write_snapshots(runs / "img64-s", "000000008-0.100", mtime=500)
    assert newest_snapshot(runs, "img64") == str(runs / "img64-s/network-snapshot-000000008-0.100.safetensors")
    assert newest_snapshot(runs, "img512") == str(runs / "b/c/network-snapshot-000000100-0.050.safetensors")


def test_newest_snapshot_in_a_folder_whose_name_looks_like_a_pattern(tmp_path):
    runs = tmp_path / "try [1]*" / "training-runs"
    write_snapshots(runs / "one", "000000100-0.050", mtime=1000)
    assert newest_snapshot(runs, "img64") == str(runs / "one/network-snapshot-000000100-0.050.safetensors")


def test_launcher_takes_the_newest_snapshot(empty_root, fake_python, tmp_path):
    write_snapshots(empty_root / "training-runs" / "one", "000000100-0.050", mtime=1000)
    result = launch(2, "12,39", root=empty_root, python=fake_python)
    assert result.returncode == 0, result.stderr
    snapshot = str(empty_root / "training-runs/one/network-snapshot-000000100-0.050.safetensors")
    assert f"network: {snapshot}" in result.stdout
    launched = (tmp_path / "launched").read_text().splitlines()
    assert launched[launched.index("--net") + 1] == snapshot


@pytest.mark.parametrize(
    ("arguments", "variables", "words"),
    [
        ([], {}, "eval-img64.sh NUM_GPUS TS [NET]"),
        ([8], {}, "as in: bash quick_start/eval-img64.sh 8 12,39"),
        (["eight", "12,39"], {}, "NUM_GPUS is 'eight'"),
        (["-1", "12,39"], {}, "NUM_GPUS is '-1'"),
        ([1, "12,39"], {}, "name the network as the third argument or in NET"),
        ([1, "12,39", "missing.safetensors"], {}, "no network missing.safetensors"),
        ([1, "12,39"], {"NET": "missing.safetensors"}, "no network missing.safetensors"),
        ([1, "12,39", STUDENT], {"REF": "missing.npz"}, "no reference statistics missing.npz"),
        ([1, "12,39", STUDENT], {"NUM": "1"}, "NUM is '1'"),
        ([1, "12,39", STUDENT], {"NUM": "5e4"}, "NUM is '5e4'"),
        ([1, "12,39", STUDENT], {"SEED": "-3"}, "SEED is '-3'"),
        ([1, "12,39", STUDENT], {"BATCH": "0"}, "BATCH is '0'"),
        ([1, "12,39", STUDENT], {"OUT": "/"}, "OUT=/ is a folder"),
        ([1, "12,39", STUDENT], {"OUT": "net.safetensors"}, "the report is a .json file"),
    ],
)
def test_mistakes_are_explained_in_one_line_before_any_process_starts(arguments, variables, words, empty_root):
    result = launch(*arguments, root=empty_root, python="/nowhere", **variables)
    assert result.returncode == 2 and result.stdout == ""
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    assert words in result.stderr


@pytest.mark.parametrize(
    ("gpus", "ts", "words"),
    [
        (1, "39", "ts 39: at least two entries are needed"),
        (1, "12;39", "ts '12;39': write whole numbers"),
        (0, "12;39", "ts '12;39': write whole numbers"),
    ],
)
def test_a_wrong_schedule_is_told_once(gpus, ts, words, tmp_path):
    result = launch(gpus, ts, STUDENT, REF=__file__, OUT=tmp_path / "report.json")
    assert result.returncode == 2 and words in result.stderr, result.stderr
    told = [line for line in result.stderr.splitlines() if line.lower().startswith("error")]
    assert len(told) == 1 and result.stderr.rstrip().endswith(told[0]) and not any(tmp_path.iterdir())


def test_ffhq_needs_a_reference_of_ones_own(empty_root):
    result = launch(1, "0,14,39", STUDENT, root=empty_root, preset="ffhq256", python="/nowhere")
    assert result.returncode == 2 and result.stderr.count("\n") == 1
    assert "calculate_metrics.py ref" in result.stderr and "REF" in result.stderr


def test_more_gpus_than_there_are_is_explained_before_any_process_starts(fake_python, tmp_path):
    result = launch(9, "12,39", STUDENT, python=fake_python)
    assert result.returncode == 2
    assert result.stderr == (
        "error: NUM_GPUS is 9, and PyTorch sees 8 CUDA device(s): give at most that many (0 runs on the CPU)\n"
    )
    assert not (tmp_path / "launched").exists()
