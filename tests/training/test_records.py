"""What a run leaves of its statistics: damaged files, full disks, runs that were cut off and go on."""

import json
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

from tests import warm
from training.run.record import Recorder

SHEET = np.arange(3 * 4 * 6, dtype=np.uint8).reshape(3, 4, 6)


def record(folder, start, stop, value=0.0):
    """A run in `folder` that writes statistics every 8 images after `start`; one without a state also at 0."""
    recorder = Recorder(folder, 100, start, quiet=True)
    for nimg in range(start + 8 if start else 0, stop + 1, 8):
        recorder.stats(nimg, {"Loss/score": value + nimg})
    recorder.image(stop, "Samples/sheet", SHEET)
    recorder.close()


def lines(folder):
    return [json.loads(line) for line in (folder / "stats.jsonl").read_text().splitlines()]


def board(folder):
    """What TensorBoard reads."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    return accumulator.EventAccumulator(str(folder)).Reload()


def scalars(folder):
    return [(event.step, event.value) for event in board(folder).Scalars("Loss/score")]


def limit_files(size):
    """Let no file of this process grow beyond so many bytes: to a writer, a full disk."""
    resource = pytest.importorskip("resource")
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


@pytest.fixture
def limited():
    yield limit_files
    limit_files(-1)


def test_a_run_that_resumes_keeps_what_its_state_has_seen(tmp_path):
    record(tmp_path, 0, 32)
    events = next(tmp_path.glob("events.*"))
    events.rename(events.with_name("events.out.tfevents.0000000001.host.1"))  # of an earlier process
    record(tmp_path, 16, 40, value=0.5)
    expected = [(0, 0), (8, 8), (16, 16), (24, 24.5), (32, 32.5), (40, 40.5)]
    assert [(line["nimg"], line["Loss/score"]) for line in lines(tmp_path)] == expected
    assert scalars(tmp_path) == expected


def test_a_run_without_a_state_begins_anew(tmp_path):
    record(tmp_path, 0, 24)
    events = next(tmp_path.glob("events.*"))
    events.rename(events.with_name("events.out.tfevents.0000000001.host.1"))
    record(tmp_path, 0, 8, value=0.5)
    assert [(line["nimg"], line["Loss/score"]) for line in lines(tmp_path)] == [(0, 0.5), (8, 8.5)]
    assert scalars(tmp_path) == [(0, 0.5), (8, 8.5)]


def test_pictures_come_back(tmp_path):
    from io import BytesIO

    from PIL import Image

    recorder = Recorder(tmp_path, 100, 0, quiet=True)
    recorder.image(8, "Samples/colour", SHEET)
    recorder.image(8, "Samples/gray", SHEET[:1])
    recorder.stats(16, {"Loss/score": float("nan"), "Loss/huge": 1e300})
    recorder.close()
    read = board(tmp_path)
    for name, expected in (("colour", SHEET.transpose(1, 2, 0)), ("gray", SHEET[0])):
        (event,) = read.Images(f"Samples/{name}")
        assert (event.step, event.width, event.height) == (8, 6, 4)
        assert np.array_equal(np.asarray(Image.open(BytesIO(event.encoded_image_string))), expected)
    assert np.isnan(read.Scalars("Loss/score")[0].value) and lines(tmp_path)[0]["Loss/score"] is None


@pytest.mark.parametrize(
    "bad",
    [
        b"[1,2]",
        b"5",
        b'{"nimg":"x"}',
        b'{"nimg":null}',
        b'{"nimg":true}',
        b'{"nimg":-8}',
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"nimg": 8, "Lo',
    ],
    ids=range(9),
)
@pytest.mark.parametrize("place", [0, 1, 2])
def test_bad_lines_leave_and_good_ones_stay(tmp_path, bad, place, capsys):
    good = [b'{"nimg": 8, "a": 1}', b'{"nimg": 16, "a": "caf\xc3\xa9 \xe2\x80\xa8 \xff"}']
    (tmp_path / "stats.jsonl").write_bytes(b"\n".join([*good[:place], bad, *good[place:]]))
    Recorder(tmp_path, 100, 16, quiet=True).stats(24, {"a": 3})
    assert (tmp_path / "stats.jsonl").read_bytes().splitlines() == [*good, b'{"nimg": 24, "a": 3}']
    output = "".join(capsys.readouterr())
    assert output.count("\n") == 1 and f"{tmp_path / 'stats.jsonl'}: left out 1 damaged or foreign line" in output
    assert output.strip() in (tmp_path / "log.txt").read_text()


@pytest.mark.parametrize("start", [0, 16])
def test_statistics_that_are_a_folder_do_not_stop_the_run(tmp_path, start, capsys):
    (tmp_path / "stats.jsonl").mkdir()
    record(tmp_path, start, 40)
    output = "".join(capsys.readouterr())
    assert output.count(f"{tmp_path / 'stats.jsonl'}") == 2 and output.count("\n") == 2  # at the start, and once after
    assert scalars(tmp_path)[-1] == (40, 40)


def test_a_full_disk_costs_only_what_is_written_meanwhile(tmp_path, limited, capsys):
    recorder = Recorder(tmp_path, 1000, 0, quiet=True)
    recorder.stats(8, {"Loss/score": 8})
    limited((tmp_path / "stats.jsonl").stat().st_size + 10)  # the next line does not fit
    for nimg in range(16, 80, 8):
        recorder.stats(nimg, {"Loss/score": nimg})
        recorder.image(nimg, "Samples/sheet", SHEET)
    limited(-1)
    recorder.stats(80, {"Loss/score": 80})
    recorder.close()
    assert [line["nimg"] for line in lines(tmp_path)] == [8, 80]
    assert scalars(tmp_path) == [(8, 8), (80, 80)]
    assert len(list(tmp_path.glob("events.*"))) == 1
    output = "".join(capsys.readouterr())
    assert output.count("stats.jsonl could not be written") == output.count("could not be written") - 1 == 1
    assert output.count("\n") == 2 and "Traceback" not in output


def test_a_disk_full_from_the_start(tmp_path, limited, capsys):
    (tmp_path / "stats.jsonl").write_text('{"nimg": 8}\n{"nimg": 16}\n{"nimg": 24}\n{"nimg": 3')
    limited(0)
    recorder = Recorder(tmp_path, 1000, 16, quiet=True)
    recorder.log("one")
    recorder.stats(24, {"Loss/score": 1})
    limited(-1)
    recorder.log("two")
    recorder.stats(32, {"Loss/score": 2})
    recorder.close()
    assert [line["nimg"] for line in lines(tmp_path)] == [8, 16, 32]
    assert scalars(tmp_path) == [(32, 2)]
    assert (tmp_path / "log.txt").read_text().endswith("  two\n") and capsys.readouterr().out.count("log.txt") == 1
    assert len((tmp_path / "log.txt").read_text().splitlines()) == 1


def test_only_the_main_process_writes(tmp_path):
    recorder = Recorder(tmp_path, 100, 0, active=False)
    recorder.log("x")
    recorder.progress(8)
    recorder.stats(8, {"a": 1})
    recorder.image(8, "a", SHEET)
    recorder.close()
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_gone_does_not_stop_the_run(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    recorder = Recorder(folder, 100, 0, quiet=True)
    recorder.stats(8, {"a": 1})
    shutil.rmtree(folder)
    recorder.stats(16, {"a": 1})
    recorder.log("on")
    recorder.close()
    assert not folder.exists()


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs Linux")
def test_a_terminal_that_is_gone_does_not_end_training(tmp_path):
    code = """
import os, sys
from pathlib import Path
from training.run.record import Recorder
recorder = Recorder(Path(sys.argv[1]), 100, 0)
for stream in (1, 2):
    os.dup2(os.open("/dev/full", os.O_WRONLY), stream)
for nimg in range(3):
    recorder.log("a line")
    recorder.progress(10)
    recorder.stats(nimg, {"a": 1.0})
recorder.close()
"""
    root = Path(__file__).parents[2]
    assert warm.run([sys.executable, "-c", code, tmp_path], cwd=root, timeout=60).returncode == 0
    assert (tmp_path / "log.txt").read_text().count("a line") == 3
    assert len((tmp_path / "stats.jsonl").read_text().splitlines()) == 3
