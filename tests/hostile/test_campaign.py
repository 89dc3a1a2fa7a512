"""Every line of the .txt files here is one wrong command, the exit code and the sentence that must answer it:

exit code | command as in a shell, {name} = a file of files.py | what its one error line says
"""

import importlib
import re
import shlex
from pathlib import Path

import pytest
from click.testing import CliRunner

from tests.hostile.files import make_files

HERE = Path(__file__).parent
COMMANDS = {"calculate_metrics": "cli", "dataset_tool": "cli"}  # others are called main
LINES = [
    pytest.param(line.strip(), id=f"{path.stem}:{number}")
    for path in sorted(HERE.glob("*.txt"))
    for number, line in enumerate(path.read_text().splitlines(), 1)
    if line.strip() and not line.startswith("#")
]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("f")
    return folder, make_files(folder)


@pytest.fixture
def place(tmp_path, monkeypatch):
    """An empty working folder and home, no processes beside this one, and no downloads from elsewhere."""
    (tmp_path / "home").mkdir()
    (tmp_path / "work").mkdir()
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "NCVSD_DETECTORS"):
        monkeypatch.delenv(name, raising=False)
    for name in ("HOME", "XDG_CACHE_HOME", "NCVSD_CACHE"):
        monkeypatch.setenv(name, str(tmp_path / "home"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "work"


def contents(folder):
    """Name, size and time of change of all in it."""
    return {str(p): (p.lstat().st_size, p.lstat().st_mtime_ns) for p in sorted(folder.rglob("*"))}


def filled(text, names):
    return re.sub(r"\{([\w.-]+)\}", lambda match: names[match[1]], text)


def call(command, names):
    """The result of the script, run in this process."""
    script, *arguments = [filled(word, names) for word in shlex.split(command)]
    module = script.removesuffix(".py").replace("/", ".")
    main = getattr(importlib.import_module(module), COMMANDS.get(module, "main"))
    return CliRunner().invoke(main, arguments, prog_name=script)


@pytest.mark.parametrize("line", LINES)
def test_wrong_input_is_told_in_one_line(line, prepared, place):
    code, command, sentence = line.split(" | ", 2)
    folder, names = prepared
    before = contents(folder)
    result = call(command, names)
    output = result.output
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exc_info
    told = [text for text in output.splitlines() if text.startswith("Error")]
    assert len(told) == 1 and filled(sentence, names) in told[0], output
    assert result.exit_code == int(code)
    assert "Traceback" not in output
    said = output[output.index("Error") :]
    assert len(said) - said.count(str(folder)) * len(str(folder)) <= 600
    assert contents(folder) == before  # also: nothing at {new}, and no program ran
    assert list(place.iterdir()) == []
