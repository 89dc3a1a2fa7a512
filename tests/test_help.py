"""Every script answers --help without what is slow to import. How long it takes is measured by bench/bench_help.py."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
HEAVY = {"torch", "numpy", "scipy", "PIL", "matplotlib", "requests", "tensorboard", "diffusers", "psutil", "yaml"}
COMMANDS = {  # module: name of its click command, subcommands
    "train_ncvsd": ("main", [""]),
    "train_edm2": ("main", [""]),
    "generate": ("main", [""]),
    "posterior_sample": ("main", [""]),
    "reconstruct_phema": ("main", [""]),
    "calculate_metrics": ("cli", ["", "gen", "calc", "ref"]),
    "dataset_tool": ("cli", ["", "convert", "encode", "decode"]),
    "toy_example": ("main", ["", "train", "check", "plot"]),
}


@pytest.mark.parametrize("script", COMMANDS)
def test_help_imports_nothing_heavy(script):
    name, subcommands = COMMANDS[script]
    code = f"""
import sys, {script}
for command in {subcommands}:
    {script}.{name}([*command.split(), "--help"], standalone_mode=False)
print(sorted({HEAVY!r} & set(sys.modules)), len(sys.modules) < 250)
"""
    said = subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, text=True)
    assert said.count("Usage: ") == len(subcommands) and said.splitlines()[-1] == "[] True"
