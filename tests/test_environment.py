"""The interpreter that the launchers choose, and how requests to stop reach the processes that train."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from quick_start import environment
from quick_start.processes import children

ROOT = Path(__file__).parents[1]
PROJECT = (ROOT / "pyproject.toml").read_text()


def test_requirements_are_those_of_pyproject():
    run, dev = (environment.requirements(kind, PROJECT) for kind in ("run", "dev"))
    assert (
        run["torch"] == "2.5"
        and "pytest" not in run
        and len(run) == PROJECT.split("]\n\n[project.opt")[0].count(">=") - 2
    )
    assert dev.items() > run.items() and {"pytest", "pytest-timeout", "scipy", "matplotlib", "ruff"} <= set(dev)
    pinned = (ROOT / "requirements-dev.txt").read_text() + (ROOT / "requirements.txt").read_text()
    assert all(f"\n{name}==" in f"\n{pinned}" for name in dev)


def test_what_is_lacking_is_absent_or_too_old(monkeypatch):
    versions = {name: "99.1" for name in environment.requirements("dev", PROJECT)}
    monkeypatch.setattr(environment, "version", lambda name: versions[name])
    assert environment.lacking("dev") == []
    versions |= {"torch": "2.4.1+cpu", "pytest": "7"}
    assert environment.lacking("run") == ["torch"] and environment.lacking("dev") == ["torch", "pytest"]

    def absent(name):
        raise environment.PackageNotFoundError(name)

    monkeypatch.setattr(environment, "version", absent)
    assert "numpy" in environment.lacking("run")


def make_python(folder, code):
    """A `python3` and `python` that is none but for this code of the shell."""
    folder.mkdir()
    for name in ("python", "python3"):
        (folder / name).write_text(f"#!/bin/sh\n{code}\n")
        (folder / name).chmod(0o755)
    return str(folder)


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A clone of nothing but the lists of requirements, for `use_environment`; no suitable interpreter is active."""
    root = tmp_path / "clone"
    root.mkdir()
    for name in ("pyproject.toml", "requirements.txt", "requirements-dev.txt"):
        (root / name).write_text((ROOT / name).read_text())
    monkeypatch.setattr(environment, "ROOT", root)
    monkeypatch.setenv("PATH", make_python(tmp_path / "bin", "exit 1"))
    return root


def test_an_environment_is_made_once_and_again_when_the_lists_change(project, monkeypatch, capsys):
    calls, suits = [], []
    python = project / ".venv/bin/python"

    def run(*command):
        calls.append([str(word) for word in command])
        if "venv" in command:
            python.parent.mkdir(parents=True)
        return "venv" in command or (str(python) == str(command[0]) and bool(suits))

    monkeypatch.setattr(environment, "runs", run)
    monkeypatch.setattr(environment.subprocess, "call", lambda command: calls.append(command) or 0)
    assert environment.use_environment("dev") == str(python)
    assert "installing requirements-dev.txt into .venv" in capsys.readouterr().out
    assert (
        calls[-1][-2:] == ["-r", project / "requirements-dev.txt"] and (project / ".venv/installed-dev.txt").is_file()
    )
    suits.append(True)
    assert environment.use_environment("dev") == str(python) and capsys.readouterr().out == "environment: .venv\n"
    (project / "requirements.txt").write_text("numpy\n")
    environment.use_environment("dev")
    assert "installing" in capsys.readouterr().out


@pytest.mark.parametrize(("venv", "message"), [(False, "-m venv' failed: install"), (True, "pip could not install")])
def test_what_cannot_be_made_is_told_in_one_line(venv, message, project, monkeypatch):
    (project / ".venv").mkdir()
    (project / ".venv/installed-run.txt").write_text("of another time")
    monkeypatch.setattr(environment, "runs", lambda *command: venv and "venv" in command)
    monkeypatch.setattr(environment.subprocess, "call", lambda command: 1)
    with pytest.raises(SystemExit, match=message):
        environment.use_environment("run")
    assert (project / ".venv/installed-run.txt").exists() != venv  # no mark of what was not installed


@pytest.mark.parametrize(
    "script", ["train-img64-s.sh", "eval-img64.sh", "posterior-sample.sh", "test.sh", "download.sh"]
)
def test_without_a_recent_python_one_line_says_so(script, tmp_path):
    folder = make_python(tmp_path / "bin", "echo Python 3.8.1; exit 1")
    for name in ("bash", "dirname", "head"):
        (Path(folder) / name).symlink_to(subprocess.check_output(["which", name], text=True).strip())
    for minor in range(10, 14):
        (Path(folder) / f"python3.{minor}").symlink_to("python3")
    command = ["bash", str(ROOT / "quick_start" / script)]
    result = subprocess.run(command, env={"PATH": folder}, capture_output=True, text=True)
    assert result.returncode == 1 and result.stdout == "", result.stdout
    assert result.stderr.startswith("error: Python 3.10 or newer is needed (found: Python 3.8.1)")
    assert result.stderr.count("\n") == 1


SUPERVISED = """
import sys
sys.path.insert(0, sys.argv[1])
from quick_start.processes import supervise
sys.exit(supervise([sys.executable, "-c", sys.argv[2]], repeat=0.05))
"""
WORKER = """
import signal, sys
def stop(*_):
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # as training does: Python's end would restore the default
    sys.exit({code})
signal.signal(signal.SIGUSR1, stop)
print("ready", flush=True)
while True:
    signal.pause()
"""
TORCHRUN = f"""
import subprocess, sys
sys.exit(subprocess.call([sys.executable, "-c", {WORKER!r}]))
"""


@pytest.mark.parametrize(
    ("numbers", "worker", "code"),
    [
        ([signal.SIGTERM], 0, 0),
        ([signal.SIGHUP], 3, 3),
        ([signal.SIGUSR1], 0, 0),
        ([signal.SIGINT], 0, 130),
        ([signal.SIGTERM, signal.SIGINT], 0, 130),
    ],
)
def test_requests_reach_the_grandchildren_and_the_code_comes_back(numbers, worker, code):
    command = [sys.executable, "-c", SUPERVISED, str(ROOT), TORCHRUN.format(code=worker)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "ready\n"
        for number in numbers:
            process.send_signal(number)
        assert process.wait(timeout=60) == code


def test_a_second_ctrl_c_ends_what_does_not_listen():
    deaf = "import signal, time; print('ready', flush=True); time.sleep(600)"
    with subprocess.Popen([sys.executable, "-c", SUPERVISED, str(ROOT), deaf], stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"ready\n"
        for _ in range(2):
            process.send_signal(signal.SIGINT)
            os.sched_yield()
        while process.poll() is None:  # two that come at once are one
            process.send_signal(signal.SIGINT)
        assert process.returncode in (130, -signal.SIGINT)  # the latter where one came while it was ending


def test_children_of_a_process():
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        assert process.pid in children(os.getpid())
        process.communicate(b"\n")
    assert children(process.pid) == []
