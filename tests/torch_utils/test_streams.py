"""Output that cannot be written costs no result: in processes of their own, as from a shell."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests import warm

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = """
import sys, click
from dnnlib.files import write_json
from torch_utils.errors import user_errors

@click.command()
@click.argument("out")
def main(out):
    with user_errors():
        for i in range(3000):
            print("a line on the way", file=sys.stderr)
        click.echo("told " * 50000)
        write_json(out, {"result": 1})
        print("told again")

main()
"""


def run(tmp_path, **streams):
    out = tmp_path / "r.json"
    process = warm.Popen([sys.executable, "-c", SCRIPT, str(out)], cwd=ROOT, **streams)
    return process, out


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_a_full_disk(tmp_path, stream):
    other = "stderr" if stream == "stdout" else "stdout"
    with open("/dev/full", "w") as full:
        process, out = run(tmp_path, **{stream: full, other: subprocess.PIPE}, text=True)
        told = dict(zip(("stdout", "stderr"), process.communicate(), strict=True))[other]
    assert json.loads(out.read_text()) == {"result": 1}
    assert process.returncode == (1 if stream == "stdout" else 0)
    assert "Traceback" not in told and "Exception ignored" not in told
    if stream == "stdout":
        assert told.endswith(
            "Error: standard output cannot be written (No space left on device); all files are complete\n"
        )


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_a_closed_pipe(tmp_path, stream):
    read, write = os.pipe()
    os.close(read)
    other = "stderr" if stream == "stdout" else "stdout"
    process, out = run(tmp_path, **{stream: write, other: subprocess.PIPE}, text=True)
    os.close(write)
    told = dict(zip(("stdout", "stderr"), process.communicate(), strict=True))[other]
    assert json.loads(out.read_text()) == {"result": 1}
    assert process.returncode == (1 if stream == "stdout" else 0)
    assert "Error" not in told and "Exception" not in told


def test_streams_that_are_closed_from_the_start(tmp_path):
    out = tmp_path / "r.json"
    command = 'exec "$0" -c "$1" "$2" >&- 2>&-'
    assert subprocess.run(["bash", "-c", command, sys.executable, SCRIPT, str(out)], cwd=ROOT).returncode == 0
    assert json.loads(out.read_text()) == {"result": 1}
