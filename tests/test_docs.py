"""README and docs: Python blocks run, commands name scripts and options that exist, links lead somewhere."""

import importlib
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import click
import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "assets" / "README.md", ROOT / "presets" / "README.md", *ROOT.glob("docs/*.md")]
ROOMS = (
    "dnnlib torch_utils sampling networks data generation metrics inverse training toy bench quick_start tests".split()
)
PAGES += [ROOT / "CONTRIBUTING.md", *(ROOT / room / "README.md" for room in ROOMS)]
# what a Python block may find defined: the page says where it comes from
GIVEN = """
import torch, networks
net = networks.load("assets/demo/student.safetensors").net
images, labels = torch.zeros(2, 1, 16, 16), torch.eye(10)[:2]
"""
OTHERS = ("bash", "torchrun", "cd", "git", "pip", "srun", "export", "source", "tensorboard", "#SBATCH")


def blocks(language):
    found = []
    for page in PAGES:
        for i, text in enumerate(re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.S | re.M)):
            found.append(pytest.param(text, id=f"{page.relative_to(ROOT)}-{i}"))
    return found


@pytest.mark.parametrize("code", blocks("python"))
def test_python_runs(code, monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    shorter = code.replace("seeds=range(32)", "seeds=range(2)").replace("karras_sigmas(50,", "karras_sigmas(3,")
    (tmp_path / "block.py").write_text(GIVEN + shorter)
    runpy.run_path(str(tmp_path / "block.py"))


def commands(text):
    """The words of each command of a block, without assignments before it and what comments on it."""
    for line in text.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=not line.startswith("#SBATCH"))
        while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
            words = words[1:]
        if words:
            yield words


def find_command(words):
    """The click command that the words start, and the words behind it; None for a script of the shell."""
    if words[0] == "torchrun":
        script = next(i for i, word in enumerate(words) if word.endswith(".py"))
        words = ["python", *words[script:]]
    if words[0] != "python":
        assert words[0] in OTHERS, words
        if words[0] == "bash":
            assert (ROOT / words[1]).is_file(), words
        return None, []
    words = words[1:]
    name = words[1] if words[0] == "-m" else words[0].removesuffix(".py").replace("/", ".")
    rest = words[2:] if words[0] == "-m" else words[1:]
    if name.startswith("bench."):
        assert (ROOT / f"{name.replace('.', '/')}.py").is_file(), words
        return None, []
    module = importlib.import_module(name)
    command = getattr(module, "cli", None) or module.main
    if isinstance(command, click.Group):
        command, rest = command.commands[rest[0]], rest[1:]
    return command, rest


@pytest.mark.parametrize("text", blocks("bash"))
def test_commands_exist_with_their_options(text):
    for words in commands(text):
        command, rest = find_command(words)
        if command is None:
            continue
        known = {name for option in command.params for name in (*option.opts, *option.secondary_opts)}
        used = {word.split("=")[0] for word in rest if word.startswith("--")}
        assert used <= known, (words, used - known)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)", page.read_text()):
        assert "://" in target or (page.parent / target).exists(), target


@pytest.mark.parametrize("room", ROOMS)
def test_a_rooms_page_names_its_files(room):
    text = (ROOT / room / "README.md").read_text()
    scripts = {path.name for path in (ROOT / room).glob("*.py")} if room != "tests" else set()
    assert scripts - {"__init__.py"} <= set(re.findall(r"[\w.]+\.py", text)) and "May import: " in text


def test_readme_is_short():
    assert len((ROOT / "README.md").read_text().split()) <= 900


def test_the_ten_second_command(tmp_path):
    text = (ROOT / "README.md").read_text()
    (line,) = re.findall(r"^python generate.py .*$", text, re.M)
    words = shlex.split(line.replace("out/two-steps", str(tmp_path)).replace("0-63", "0-3"))
    subprocess.run([sys.executable, *words[1:], "--quiet"], cwd=ROOT, check=True)
    assert (tmp_path / "grid.png").is_file()
