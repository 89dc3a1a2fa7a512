"""quick_start/demo.sh ends where Ctrl-C is pressed, once or twice, at every stage, and never goes on with less."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests import warm
from tests.training.tiny_runs import load_newest_state

ROOT = Path(__file__).parents[1]
STAGES = {  # the demo's calls of Python before the first of each kind
    "environment": -1,
    "train_ncvsd.py": 0,
    "generate.py": 1,
    "calculate_metrics.py ref": 8,
    "calculate_metrics.py calc": 9,
    "calculate_metrics.py gen": 10,
    "posterior_sample.py": 13,
    "quick_start/demo_report.py": 15,
}
# In place of each script: notes its call, and at one of them tells the test and waits for so many Ctrl-C. It ends with
# code 0 then, as a script may that has saved its work.
STAND_IN = """
import os, pathlib, signal, sys
folder, wanted, presses = pathlib.Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
script, options = sys.argv[4], sys.argv[5:]
known = (folder / "calls").read_text().splitlines() if (folder / "calls").exists() else []
if script == "-c":
    number = -1
else:
    number = len(known)
    with open(folder / "calls", "a") as file:
        file.write(" ".join([script, *options]) + "\\n")
if number == wanted:
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    for press in range(presses):
        (folder / "waiting").write_text("now")
        signal.sigwait([signal.SIGINT])
elif script == "train_ncvsd.py":
    run = pathlib.Path(options[options.index("--outdir") + 1])
    run.mkdir(parents=True)
    for nimg in (0, 64):
        (run / f"network-snapshot-{nimg:09d}-0.050.safetensors").touch()
    (run / "log.txt").write_text("training\\n... " + os.environ.get("OUTCOME", "finished at 64 images") + "\\n")
"""


def start(python, **variables):
    """demo.sh in a process group of its own, with that folder's `python` first."""
    kept = {k: v for k, v in os.environ.items() if k not in ("OUT", "NUM", "DURATION", "RANK", "WORLD_SIZE")}
    return subprocess.Popen(
        ["bash", str(ROOT / "quick_start/demo.sh")],
        env=warm.environment(kept | {"PATH": f"{python}:{os.environ['PATH']}"} | variables, server=False),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # where pytest itself has it ignored
    )


@pytest.fixture
def demo(tmp_path):
    """Starts the demo with stand-ins; the call of that number waits for Ctrl-C."""
    os.mkfifo(tmp_path / "waiting")
    (tmp_path / "stand_in.py").write_text(STAND_IN)

    def begin(number, presses=1, **variables):
        stand_in = f'exec "{sys.executable}" "{tmp_path}/stand_in.py" "{tmp_path}" {number} {presses} "$@"'
        asked = stand_in if number == -1 else f'exec "{sys.executable}" "$@"'
        text = f'#!/bin/sh\ncase "$1" in *.py) {stand_in} ;; -c) {asked} ;; *) exec "{sys.executable}" "$@" ;; esac\n'
        (tmp_path / "bin").mkdir()
        (tmp_path / "bin/python").write_text(text)
        (tmp_path / "bin/python").chmod(0o755)
        return start(tmp_path / "bin", OUT=str(tmp_path / "out"), **variables)

    return begin


def calls(folder):
    return (folder / "calls").read_text().splitlines() if (folder / "calls").exists() else []


@pytest.mark.parametrize("presses", [1, 2])
@pytest.mark.parametrize("stage", STAGES)
def test_ctrl_c_ends_the_demo_at_every_stage(stage, presses, demo, tmp_path):
    with demo(STAGES[stage], presses) as process:
        for _ in range(presses):
            assert (tmp_path / "waiting").read_text() == "now"
            os.killpg(process.pid, signal.SIGINT)
        said, _ = process.communicate(timeout=60)
    assert process.returncode == 130, said
    assert len(calls(tmp_path)) == STAGES[stage] + 1
    assert stage == "environment" or calls(tmp_path)[-1].startswith(stage)


def test_undisturbed_every_stage_is_reached(demo, tmp_path):
    with demo(99) as process:
        said, _ = process.communicate(timeout=60)
    assert process.returncode == 0 and "Done in" in said
    assert len(calls(tmp_path)) == max(STAGES.values()) + 1


def test_the_demo_does_not_go_on_with_a_student_that_was_stopped_early(demo, tmp_path):
    with demo(99, OUTCOME="stopped (SIGTERM): the same command goes on at 64 images") as process:
        said, _ = process.communicate(timeout=60)
    assert process.returncode == 1 and "error: training was stopped early: the same command goes on" in said
    assert len(calls(tmp_path)) == 1


def test_ctrl_c_in_training_saves_and_ends_the_demo(tmp_path):
    with start(Path(sys.executable).parent, OUT=str(tmp_path / "out")) as process:
        for line in process.stdout:
            if "of 51200 images" in line:  # the first statistics
                break
        os.killpg(process.pid, signal.SIGINT)
        said, _ = process.communicate(timeout=120)
    assert process.returncode == 130 and "Traceback" not in said, said
    assert 0 < load_newest_state(tmp_path / "out/run")["nimg"] < 51200
    assert "stopped (SIGINT): the same command goes on" in (tmp_path / "out/run/log.txt").read_text()
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["run"]
