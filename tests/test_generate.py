import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from generate import main
from generation.pictures import read_image
from networks import GenerativeDenoiser, Precond, PrecondCondition, save
from networks.encoders import RGBEncoder
from tests import warm
from tests.conftest import TINY_NET
from tests.golden_utils import fill_by_name

ROOT = Path(__file__).parents[1]
STUDENT_PICKLE = ROOT / "tests/data/ncvsd-tiny-0000000-0.050.pkl"


@pytest.fixture(scope="module")
def nets(tmp_path_factory):
    """Paths of a one-channel conditional teacher and a generative denoiser, both small and random."""
    folder = tmp_path_factory.mktemp("nets")
    teacher = fill_by_name(Precond(**TINY_NET), 1).eval()
    student = GenerativeDenoiser(fill_by_name(PrecondCondition(**TINY_NET), 2)).eval()
    save(folder / "teacher.safetensors", teacher, RGBEncoder())
    save(folder / "student.safetensors", student, RGBEncoder())
    return {"teacher": str(folder / "teacher.safetensors"), "student": str(folder / "student.safetensors")}


def run(*arguments):
    return CliRunner().invoke(main, [str(argument) for argument in arguments] + ["--device", "cpu", "--quiet"])


def images(folder):
    return {path.name: read_image(path) for path in sorted(folder.rglob("[0-9]*.png"))}


def test_few_steps_from_an_official_style_checkpoint(tmp_path):
    result = run("--net", STUDENT_PICKLE, "--ts", "10,22", "--seeds", "0-3,7", "--grid", "--outdir", tmp_path)
    assert result.exit_code == 0, result.output
    assert "2 steps at noise levels 16.78, 1.382" in result.output and "was added: --ts 10,22,39" in result.output
    drawn = images(tmp_path)
    assert list(drawn) == ["000000.png", "000001.png", "000002.png", "000003.png", "000007.png"]
    sheet, (_, height, width) = read_image(tmp_path / "grid.png"), drawn["000000.png"].shape
    scale = -(-64 // width)
    pitch = scale * width + 2
    last = sheet[:, pitch + 2 : pitch + 2 + scale * height : scale, pitch + 2 : pitch + 2 + scale * width : scale]
    assert np.array_equal(last, drawn["000007.png"])


def test_batch_and_ts_with_its_end_change_nothing(tmp_path, nets):
    for name, options in {"a": ["--ts", "10"], "b": ["--ts", "10,39", "--batch", "3"]}.items():
        result = run("--net", nets["student"], "--seeds", "0-7", "--outdir", tmp_path / name, *options)
        assert result.exit_code == 0, result.output
    a, b = images(tmp_path / "a"), images(tmp_path / "b")
    assert len(a) == 8 and list(a) == list(b)
    assert max(np.abs(a[name].astype(int) - b[name]).max() for name in a) <= 1


def test_two_processes_draw_what_one_draws(tmp_path, nets):
    options = ["--net", nets["student"], "--seeds", "0-6", "--batch", "2", "--device", "cpu", "--subdirs", "--grid"]
    options += ["--ts", "10,22,39"]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launcher, "generate.py", *options, "--outdir", str(tmp_path / "two")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = warm.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stderr
    assert run(*options, "--outdir", tmp_path / "one").exit_code == 0
    one, two = images(tmp_path / "one/000000"), images(tmp_path / "two/000000")
    assert len(one) == 7 and list(one) == list(two)
    assert max(np.abs(one[name].astype(int) - two[name]).max() for name in one) <= 1
    assert (tmp_path / "two/grid.png").is_file()


@pytest.mark.parametrize(("net", "options", "message"), [("student", ["--class", "7"], "class 7 is not available")])
def test_an_error_ends_every_process_and_is_told_once(tmp_path, nets, net, options, message):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "generate.py", "--net", nets.get(net, net), "--device", "cpu", *options]
    processes = [
        warm.Popen(
            [*command, "--outdir", str(tmp_path / "out")],
            cwd=ROOT,
            env={**os.environ, **shared, "RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    errors = [process.communicate(timeout=240)[1] for process in processes]
    assert [process.returncode for process in processes] == [1, 1], errors
    assert not any("Traceback" in error for error in errors)
    told = [line for error in errors for line in error.splitlines() if line.startswith("Error")]
    assert len(told) == 1 and message in told[0] and told[0] in errors[0]


def test_teacher_guided_by_itself_without_labels(tmp_path, nets):
    options = ["--net", nets["teacher"], "--seeds", "0-1", "--steps", "3", "--class", "1"]
    guided = run(*options, "--guidance", "2", "--gnet-no-labels", "--outdir", tmp_path / "a")
    plain = run(*options, "--outdir", tmp_path / "b")
    assert guided.exit_code == plain.exit_code == 0, guided.output + plain.output
    assert "5 evaluations of each network, guidance 2" in guided.output
    a, b = images(tmp_path / "a"), images(tmp_path / "b")
    assert any(not np.array_equal(a[name], b[name]) for name in a)


def test_without_ts_the_student_takes_one_step(tmp_path, nets):
    result = run("--net", nets["student"], "--seeds", "3", "--outdir", tmp_path)
    assert result.exit_code == 0 and "1 step, directly at noise level 80" in result.output


@pytest.mark.parametrize(
    ("net", "options", "message"),
    [
        ("student", ["--seeds", "5-2"], "runs backwards"),
        ("student", ["--seeds", "x"], "neither a number nor a range"),
        ("student", ["--ts", "22,10"], "must increase strictly"),
        ("student", ["--ts", "10,40"], "integer from 0 to 39"),
        ("student", ["--ts", "ten"], "whole numbers"),
        ("student", ["--zeta", "2"], "0<=x<=1"),
        ("student", ["--batch", "0"], "x>=1"),
        ("student", ["--class", "3"], "classes 0 to 2"),
        ("student", ["--steps", "8"], "apply to teachers only"),
        ("student", ["--dtype", "fp16"], "--dtype fp16 needs a CUDA device"),
        ("teacher", ["--ts", "10,39"], "this network is a teacher"),
        ("teacher", ["--gnet-no-labels"], "no effect at guidance 1: give --guidance"),
        ("teacher", ["--guidance", "2"], "needs a guiding network"),
        ("teacher", ["--guidance", "2", "--gnet", "missing.pkl"], "missing.pkl"),
        ("/no/such/net.pkl", [], "/no/such/net.pkl"),
    ],
)
def test_mistakes_cost_one_line_and_leave_nothing(tmp_path, nets, net, options, message):
    outdir = tmp_path / "out"
    result = run("--net", nets.get(net, net), "--outdir", outdir, *options)
    assert result.exit_code != 0 and isinstance(result.exception, SystemExit)
    error = [line for line in result.output.splitlines() if line.startswith("Error")]
    assert len(error) == 1 and message in error[0]
    assert not outdir.exists()


def test_unknown_device_and_an_outdir_that_is_a_file(tmp_path, nets):
    arguments = ["--net", nets["student"], "--seeds", "0", "--outdir"]
    result = CliRunner().invoke(main, [*arguments, str(tmp_path / "out"), "--device", "tpu"])
    assert result.exit_code == 1 and "tpu" in result.output
    (tmp_path / "file").write_text("kept")
    result = run(*arguments, tmp_path / "file")
    assert result.exit_code == 2 and "is a file" in result.output
    assert (tmp_path / "file").read_text() == "kept"


def test_two_processes_with_one_folder_leave_the_images_of_one(tmp_path, nets):
    options = ["--net", nets["student"], "--seeds", "0-31", "--grid", "--batch", "4", "--device", "cpu", "--quiet"]
    command = [sys.executable, str(ROOT / "generate.py"), *options, "--outdir"]
    both = [warm.Popen([*command, str(tmp_path / "both")], cwd=ROOT) for _ in range(2)]
    assert [process.wait(timeout=120) for process in both] == [0, 0]
    assert run(*options, "--outdir", tmp_path / "one").exit_code == 0
    one, found = images(tmp_path / "one"), images(tmp_path / "both")
    assert list(one) == list(found) and all(np.array_equal(one[name], found[name]) for name in one)
    assert sorted(path.name for path in (tmp_path / "both").iterdir()) == sorted([*one, "grid.png"])


def test_generate_images_is_there_on_first_use():
    import generate
    from generation.images import generate_images

    assert generate.generate_images is generate_images
    with pytest.raises(AttributeError, match="module 'generate' has no attribute 'nothing'"):
        generate.nothing  # noqa: B018
