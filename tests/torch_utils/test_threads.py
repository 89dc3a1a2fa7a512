"""OMP_WAIT_POLICY is set by every script before PyTorch is there, where others are busy, and by no import."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

from torch_utils import options

ROOT = Path(__file__).resolve().parents[2]
NO_TORCH = {
    "environment.py",
    "fetch.py",
    "launch.py",
    "processes.py",
    "bench_busy.py",
    "bench_help.py",
}  # or none that computes
SCRIPTS = [
    path
    for room in (".", "bench", "quick_start", "metrics", "training", "toy")
    for path in sorted((ROOT / room).glob("*.py"))
    if '__name__ == "__main__"' in path.read_text() and path.name not in NO_TORCH
]


@pytest.mark.parametrize(
    ("cores", "first", "now", "policy"),
    [
        (2, 1, 1, None),
        (2, 3, 1, None),
        (2, 1, 2, None),
        (2, 2, 2, "PASSIVE"),
        (8, 5, 2, "PASSIVE"),
        (64, 2, 2, None),
        (64, 9, 9, "PASSIVE"),
    ],
)
def test_threads_sleep_where_others_are_busy_all_the_time(cores, first, now, policy, monkeypatch):
    monkeypatch.setattr(options.os, "cpu_count", lambda: cores)
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    monkeypatch.setattr(options, "AT_FIRST", first)
    monkeypatch.setattr(options, "running", lambda: now)
    options.set_wait_policy()
    assert os.environ.get("OMP_WAIT_POLICY") == policy
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")  # a user's choice stays
    options.set_wait_policy()
    assert os.environ["OMP_WAIT_POLICY"] == "ACTIVE"


@pytest.mark.parametrize("content", [None, "", "0.1 0.2 0.3 none 5"])
def test_where_the_system_does_not_say_others_are_taken_for_busy(content, tmp_path, monkeypatch):
    path = tmp_path / "loadavg"
    if content is not None:
        path.write_text(content)
    monkeypatch.setattr(options, "Path", lambda _: path)
    assert options.running() > 1000


@pytest.mark.skipif(sys.platform != "linux", reason="the system does not say")
def test_a_busy_process_is_seen():
    with subprocess.Popen(
        [sys.executable, "-c", "print(1, flush=True)\nwhile True: pass"], stdout=subprocess.PIPE
    ) as busy:
        busy.stdout.readline()
        assert options.running() >= 2
        busy.kill()


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_script_sets_it_before_anything_else(path):
    tree = ast.parse(path.read_text())
    imported = {alias.name for node in tree.body if isinstance(node, ast.Import) for alias in node.names}
    assert not imported & {"torch", "torch.nn"}
    calls = [node for node in tree.body[-1].body if isinstance(node, ast.Expr)]
    assert calls[0].value.func.id == "set_wait_policy" and len(calls) == 2


def test_scripts_can_be_imported_without_effect_and_without_torch():
    names = [path.stem for path in SCRIPTS if path.parent == ROOT]
    code = f"import os, sys, {', '.join(names)}; print('torch' in sys.modules, os.environ.get('OMP_WAIT_POLICY'))"
    environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    said = subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, env=environment, text=True)
    assert len(names) >= 8 and said == "False None\n"
