"""`pip install -e .` finds everything from any folder; what would pack the project stops with one sentence."""

import importlib.util
import os
import re
import subprocess
import sys
import zipfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
HOOK = """
import sys
sys.path.insert(0, ".ci")
import build_backend
print(getattr(build_backend, sys.argv[1])(*sys.argv[2:]))
"""
FINDS = """
import site, sys
site.addsitedir(sys.argv[1])
import generate, toy_example, train_ncvsd  # scripts too
import inverse.operators, training.run.state
from inverse.tasks import load_task, task_names
from metrics.features.detectors import load_detector
from dnnlib import ROOT
from training.presets import NCVSDConfig, load_config
assert load_config(NCVSDConfig, "fashion16", {}).batch > 0
assert "box_inpainting" in task_names() and load_task("demo/box_inpainting")
assert load_detector("fd_demo") and (ROOT / "assets/lpips/vgg-v0.1.safetensors").is_file()
print(generate.__file__)
"""


def hook(name, *arguments, cwd=ROOT):
    """Call one of the backend's hooks as pip does: in a process of its own, in the folder of the project."""
    command = [sys.executable, "-c", HOOK, name, *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True)


def listed(name):
    """A list of pyproject.toml's."""
    return set(
        re.findall(r'"([^"]+)"', re.search(rf"^{name} = \[(.*)\]", (ROOT / "pyproject.toml").read_text(), re.M)[1])
    )


def test_all_packages_and_scripts_are_listed():
    folders = [path.parent.relative_to(ROOT).parts for path in ROOT.rglob("*/__init__.py")]
    rooms = {".".join(parts) for parts in folders if parts[0].isidentifier() and parts[0] not in ("tests", "venv")}
    assert listed("packages") == rooms
    assert listed("py-modules") == {path.stem for path in ROOT.glob("*.py")}


def test_an_editable_installation_finds_everything_from_elsewhere(tmp_path):
    try:  # not imported: other tests may have imported distutils, which setuptools replaces
        found = version("setuptools")
    except PackageNotFoundError:
        found = "0"
    if int(found.partition(".")[0]) < 77:
        pytest.skip(f"needs setuptools 77, found {found}")
    clone, place = tmp_path / "clone", tmp_path / "site"
    clone.mkdir()
    for path in ROOT.iterdir():  # what setuptools writes goes beside the links
        if path.name not in (".git", "ncvsd.egg-info", "build"):
            (clone / path.name).symlink_to(path)
    result = hook("build_editable", tmp_path, cwd=clone)
    assert result.returncode == 0, result.stderr
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(place)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "-c", FINDS, str(place)]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert Path(result.stdout.strip()).resolve() == ROOT / "generate.py"


@pytest.mark.parametrize(
    "name", ["get_requires_for_build_wheel", "prepare_metadata_for_build_wheel", "build_wheel", "build_sdist"]
)
def test_packing_is_refused_in_one_sentence(name, tmp_path):
    result = hook(name, tmp_path)
    assert result.returncode == 1 and result.stdout == "" and not any(tmp_path.iterdir())
    assert result.stderr.startswith("error: ncvsd runs from its clone") and result.stderr.count("\n") == 1
    assert "pip install -e ." in result.stderr


@pytest.mark.skipif(importlib.util.find_spec("pip") is None, reason="needs pip")
def test_pip_shows_the_sentence(tmp_path):
    command = [sys.executable, "-m", "pip", "wheel", str(ROOT), "--no-deps", "--no-build-isolation", "--no-index"]
    result = subprocess.run([*command, "-w", str(tmp_path)], capture_output=True, text=True)
    assert result.returncode != 0 and "install it from there with: pip install -e ." in result.stdout + result.stderr
    assert "Traceback" not in result.stdout + result.stderr and not any(tmp_path.iterdir())
