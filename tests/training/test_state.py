"""Training states: round trip, damage at any point, hostile files, and how many are kept."""

import errno
import hashlib
import io
import os
import pickle
import threading
import zipfile

import pytest
import torch

from tests.training.tiny_runs import load_newest_state
from training.run import state as state_module
from training.run.memory import tensor_bytes
from training.run.parallel import to_host
from training.run.state import (
    StateError,
    StateWriter,
    list_states,
    load_state,
    newest_state,
    save_state,
    state_nimg,
)


def state_at(nimg):
    generator = torch.Generator().manual_seed(nimg)
    weights = {"weight": torch.randn(16, 16, generator=generator), "half": torch.ones(3, dtype=torch.float16)}
    optimizer = {"state": {0: {"step": torch.tensor(3.0), "exp_avg": torch.randn(16, generator=generator)}}}
    return {
        "nimg": nimg,
        "seconds": 1.5,
        "nets": {"gen": weights},
        "optimizers": {"gen": optimizer},
        "names": ["a", "b"],
    }


def same(a, b):
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    return a == b


def named_by_content(folder, nimg, data):
    """Write bytes as a state whose name vouches for them."""
    path = folder / f"training-state-{nimg:09d}-{hashlib.sha256(data).hexdigest()[:8]}.pt"
    path.write_bytes(data)
    return path


def test_round_trip(tmp_path):
    path = save_state(tmp_path, state_at(1000), 1000)
    assert list_states(tmp_path) == [path] and list(tmp_path.iterdir()) == [path]  # no temporary file is left
    assert same(load_state(path), state_at(1000))
    assert same(load_newest_state(tmp_path), state_at(1000))


def test_an_empty_folder_has_no_state(tmp_path):
    (tmp_path / "training-state-notes.txt").write_text("none of these is a state")
    (tmp_path / "training-state-000001000-zzzzzzzz.pt").write_text("nor this")
    assert load_newest_state(tmp_path) is None
    assert load_newest_state(tmp_path / "absent") is None


def test_the_newest_two_are_kept(tmp_path):
    for nimg in (100, 200, 1_000_000_000, 3_000_000_000):
        save_state(tmp_path, state_at(nimg), nimg)
    kept = list_states(tmp_path)
    assert [load_state(path)["nimg"] for path in kept] == [3_000_000_000, 1_000_000_000]  # by number, not by text
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.999])
def test_a_truncated_state_falls_back_to_the_one_before(tmp_path, share):
    old = save_state(tmp_path, state_at(100), 100)
    new = save_state(tmp_path, state_at(200), 200)
    data = new.read_bytes()
    new.write_bytes(data[: int(share * len(data))])
    with pytest.raises(StateError, match="is damaged"):
        load_state(new)
    warnings = []
    assert same(load_newest_state(tmp_path, warn=warnings.append), state_at(100))
    assert len(warnings) == 1 and new.name in warnings[0] and "\n" not in warnings[0]
    assert list_states(tmp_path) == [old]
    assert new.with_suffix(".damaged").read_bytes() == data[: int(share * len(data))]  # set aside, not lost


@pytest.mark.parametrize("position", [0.1, 0.6])
def test_one_flipped_bit_is_noticed(tmp_path, position):
    path = save_state(tmp_path, state_at(100), 100)
    data = bytearray(path.read_bytes())
    data[int(position * len(data))] ^= 1
    path.write_bytes(data)
    for _ in range(2):  # nor does a later attempt start afresh over the run
        with pytest.raises(StateError, match="no valid training state is left"):
            load_newest_state(tmp_path, warn=lambda message: None)
    assert [file.suffix for file in tmp_path.iterdir()] == [".damaged"]


def test_a_failed_write_leaves_the_state_before(tmp_path):
    old = save_state(tmp_path, state_at(100), 100)
    with pytest.raises(Exception, match="pickle"):
        save_state(tmp_path, {"net": lambda: None}, 200)
    assert list(tmp_path.iterdir()) == [old] and same(load_newest_state(tmp_path), state_at(100))


class Touch:
    """Unpickles by creating a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("kind", ["torch.save", "legacy torch.save", "pickle", "pickle in a zip", "text"])
def test_hostile_states_are_refused_and_leave_no_mark(tmp_path, kind):
    mark = tmp_path / "mark"
    buffer = io.BytesIO()
    if kind == "torch.save":
        torch.save({"nimg": 1, "nets": Touch(mark)}, buffer)
    elif kind == "legacy torch.save":
        torch.save({"nets": Touch(mark)}, buffer, _use_new_zipfile_serialization=False)
    elif kind == "pickle":
        buffer.write(pickle.dumps(Touch(mark), protocol=2))
    elif kind == "pickle in a zip":
        with zipfile.ZipFile(buffer, "w") as archive:
            archive.writestr("archive/data.pkl", pickle.dumps(Touch(mark), protocol=2))
            archive.writestr("archive/version", "3")
    else:
        buffer.write(b"not a state")
    path = named_by_content(tmp_path, 500, buffer.getvalue())
    with pytest.raises(StateError, match="is cut off, damaged or no training state") as error:
        load_state(path)
    assert "\n" not in str(error.value)
    good = save_state(tmp_path, state_at(100), 100)
    assert same(load_newest_state(tmp_path, warn=lambda message: None), state_at(100))
    assert not mark.exists() and list_states(tmp_path) == [good]


@pytest.mark.parametrize("content", [[1, 2], torch.zeros(3), {"nets": {}}, {"nimg": torch.tensor(3)}, None])
def test_files_that_hold_something_else_are_told_and_passed_over(tmp_path, content):
    good = save_state(tmp_path, state_at(100), 100)
    path = save_state(tmp_path, content, 500)
    with pytest.raises(StateError, match="is no training state: it holds a") as error:
        load_state(path)
    assert "\n" not in str(error.value)
    assert load_newest_state(tmp_path, warn=lambda message: None)["nimg"] == 100 and list_states(tmp_path) == [good]


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9, 0.999])
def test_a_cut_off_state_is_called_so(tmp_path, share):
    data = save_state(tmp_path, state_at(1000), 1000).read_bytes()
    path = named_by_content(tmp_path, 2000, data[: int(len(data) * share)])
    with pytest.raises(StateError) as error:
        load_state(path, verified=True)
    assert str(error.value) == f"{path} is cut off, damaged or no training state"


def test_some_states_are_kept_for_good(tmp_path):
    for nimg in (30, 60, 90, 120, 150, 180, 210, 240, 270):
        save_state(tmp_path, state_at(nimg), nimg, keep_every=100)
    kept = [load_state(path)["nimg"] for path in list_states(tmp_path)]
    assert kept == [270, 240, 210, 120]  # the newest two, and the first of each hundred


def test_an_old_state_that_cannot_be_removed_is_no_failure(tmp_path, monkeypatch):
    old = save_state(tmp_path, state_at(100), 100)

    def refuse(path, missing_ok=False):
        raise OSError(errno.EBUSY, os.strerror(errno.EBUSY), str(path))

    messages = []
    writer = StateWriter(tmp_path, log=messages.append)
    for nimg in (200, 300):
        with monkeypatch.context() as patch:
            patch.setattr(type(old), "unlink", lambda p, missing_ok=False: refuse(p) if p == old else None)
            writer.start(state_at(nimg), nimg)
            writer.wait()
    assert writer.failures == 0 and state_nimg(writer.last_good) == 300
    assert messages == [f"{old} could not be removed (Device or resource busy)"]
    save_state(tmp_path, state_at(400), 400)
    assert [state_nimg(path) for path in list_states(tmp_path)] == [400, 300]  # made up for


def test_a_full_disk_leaves_the_state_before(tmp_path):
    resource = pytest.importorskip("resource")
    old = save_state(tmp_path, state_at(100), 100)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    for size in (0, 100, 2000):
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
        try:
            with pytest.raises(OSError, match="too large"):
                save_state(tmp_path, state_at(200), 200)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert list(tmp_path.iterdir()) == [old] and same(load_newest_state(tmp_path), state_at(100))


def test_copies_in_host_memory_are_copies():
    state = state_at(1)
    copy = to_host(state)
    assert same(copy, state) and tensor_bytes(copy) == 16 * 16 * 4 + 3 * 2 + 4 + 16 * 4
    state["nets"]["gen"]["weight"].zero_()
    assert same(copy, state_at(1))


def test_what_a_killed_write_left_is_removed(tmp_path):
    save_state(tmp_path, state_at(100), 100)
    (tmp_path / ".training-state-000000200-77.new").write_bytes(b"half")
    newest_state(tmp_path, print)
    assert [path.name[:24] for path in tmp_path.iterdir()] == ["training-state-000000100"]


# ----------------------------------------------------------------------------
# in the background


def test_training_does_not_wait_for_the_disk(tmp_path, monkeypatch):
    may_end, written = threading.Event(), []

    def slow(run_dir, state, nimg, **options):
        assert may_end.wait(60)
        written.append(nimg)
        return run_dir / f"{nimg}"

    monkeypatch.setattr(state_module, "save_state", slow)
    writer = StateWriter(tmp_path, expected=500 << 20)
    assert writer.reserve == writer.seconds == 10
    writer.start(state_at(1), 1)
    writer.poll()
    assert written == [] and writer.last_good is None  # it came back while the write goes on
    assert writer.reserve == 20  # its end, and another one
    may_end.set()
    writer.start(state_at(2), 2, sound=False)  # one after the other
    writer.wait()
    assert written == [1, 2] and writer.last_good == tmp_path / "1" and writer.failures == 0


def test_three_failures_in_a_row_are_too_many(tmp_path, monkeypatch):
    outcomes = iter([OSError(28, "No space left on device")] * 2 + [None] + [OSError(30, "Read-only file system")] * 3)

    def write(run_dir, state, nimg, **options):
        outcome = next(outcomes)
        if outcome:
            raise outcome
        return run_dir / f"{nimg}"

    monkeypatch.setattr(state_module, "save_state", write)
    messages = []
    writer = StateWriter(tmp_path, log=messages.append)
    counts = []
    for nimg in range(1, 7):
        writer.start(state_at(1), nimg)
        writer.wait()
        counts.append((writer.failures, writer.exhausted))
    assert counts == [(1, False), (2, False), (0, False), (1, False), (2, False), (3, True)]
    assert "No space left on device" in messages[0] and "none so far" in messages[0]
    assert "failure 3 of 3: the previous one stays (3)" in messages[-1] and "\n" not in "".join(messages)
    assert (
        "Read-only" in messages[-1] and "tries again" not in messages[-1] and str(tmp_path / "3") in str(writer.error())
    )
