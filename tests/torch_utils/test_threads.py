"""OMP_WAIT_POLICY is set by every script before PyTorch is there, and by no import."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

from torch_utils.options import wait_passively

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


def test_the_users_choice_stays(monkeypatch):
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    wait_passively()
    assert os.environ["OMP_WAIT_POLICY"] == "PASSIVE"
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    wait_passively()
    assert os.environ["OMP_WAIT_POLICY"] == "ACTIVE"


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_script_sets_it_before_anything_else(path):
    tree = ast.parse(path.read_text())
    imported = {alias.name for node in tree.body if isinstance(node, ast.Import) for alias in node.names}
    assert not imported & {"torch", "torch.nn"}
    calls = [node for node in tree.body[-1].body if isinstance(node, ast.Expr)]
    assert calls[0].value.func.id == "wait_passively" and len(calls) == 2


def test_scripts_can_be_imported_without_effect_and_without_torch():
    names = [path.stem for path in SCRIPTS if path.parent == ROOT]
    code = f"import os, sys, {', '.join(names)}; print('torch' in sys.modules, os.environ.get('OMP_WAIT_POLICY'))"
    environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    said = subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, env=environment, text=True)
    assert len(names) >= 8 and said == "False None\n"
