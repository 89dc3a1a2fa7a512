"""posterior_sample.py ended by signals while it writes, run again, and run twice at the same time."""

import json
import shutil
import signal
import subprocess
import sys

import pytest

from tests.test_posterior_sample import ROOT, contents, data, finished, nets, run, task  # noqa: F401

ENDED = """
import os, sys
number, left = int(sys.argv.pop(1)), int(sys.argv.pop(1))
import dnnlib.files
from posterior_sample import main
replace = os.replace
def end_before_a_rename(source, destination):
    global left
    left -= 1
    if left == 0:
        os.kill(os.getpid(), number)
    replace(source, destination)
os.replace = end_before_a_rename
main()
"""
HOLDS = (
    "import sys; from dnnlib.locks import lock_folder; held = lock_folder(sys.argv[1]); print(1, flush=True); input()"
)


@pytest.mark.parametrize(
    ("number", "renames"),  # options.json is the first; then each image takes 9, its record the last of them
    [(signal.SIGINT, 14), (signal.SIGTERM, 14), (signal.SIGKILL, 5), (signal.SIGKILL, 10), (signal.SIGKILL, 14)],
)
def test_what_is_finished_stays_and_the_same_command_goes_on(number, renames, finished, nets, data, task, tmp_path):  # noqa: F811
    out = tmp_path / "out"
    command = ["--net", nets / "plain", "--task", task, "--data", data, "--outdir", out, "--batch", 3]
    ended = subprocess.run(
        [*map(str, [sys.executable, "-c", ENDED, int(number), renames, *command]), "--device", "cpu", "--quiet"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=200,
    )
    code = ended.returncode if ended.returncode > 0 else 128 - ended.returncode  # as shells have it
    assert code == 128 + number and "Traceback" not in ended.stderr and len(ended.stderr.strip().splitlines()) <= 2
    before = contents(out, "*.png", "*.npz", "records/*.json")
    records = sorted((out / "records").glob("[!.]*")) if (out / "records").exists() else []
    assert len(records) == (renames > 10)
    kept = [path.stat().st_mtime_ns for path in records]
    text = run(*command)
    assert ("1 were finished before" in text) == (renames > 10)
    assert [path.stat().st_mtime_ns for path in records] == kept
    after = contents(out, "*.png", "*.npz", "records/*.json")
    assert {
        name: after[name] for name in before if not name.rpartition("/")[2].startswith(".")
    }.items() <= after.items()
    assert after.keys() == contents(finished[0], "*.png", "*.npz", "records/*.json").keys()
    assert not list(out.rglob("*.tmp")) and len(json.loads((out / "metrics.json").read_text())["images"]) == 3


def test_a_folder_in_use_by_another_process_is_left_alone(finished, nets, data, task, tmp_path):  # noqa: F811
    out = tmp_path / "out"
    shutil.copytree(finished[0], out)
    (out / "records" / "00000-img00000001.json").unlink()
    before = contents(out, "*.*")
    command = ["--net", nets / "plain", "--task", task, "--data", data, "--outdir", out]
    options = {"cwd": ROOT, "stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", HOLDS, str(out)], **options) as other:
        assert other.stdout.readline() == "1\n"
        text = run(*command, code=1)
        assert f"{out} is in use by another run (process {other.pid} on " in text and "another --outdir" in text
        other.communicate("\n")
    assert {name: data for name, data in contents(out, "*.*").items() if not name.startswith(".lock")} == {
        name: data for name, data in before.items() if not name.startswith(".lock")
    }
    assert "2 were finished before" in run(*command)
