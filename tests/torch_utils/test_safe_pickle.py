import codecs
import collections
import os
import pickle
import random
import sys

import numpy as np
import pytest
import torch

import networks
from metrics.references import load_reference
from tests.memory_utils import HAS_LIMITS, run_script
from tests.torch_utils.hand_written_pickles import (
    DAMAGED,
    DATA,
    HONEST,
    P4,
    PICKLES,
    STOP,
    UNSAFE,
    blob,
    call,
    laughs,
    name,
    shell,
    text,
)
from torch_utils import pickle_machine
from torch_utils.safe_pickle import CheckpointError, Record, UnsafeCheckpointError, load

# Pieces of hand-written pickles.


@pytest.fixture
def untouched(tmp_path):
    """Checks that a test leaves no file, no module and no variable behind."""
    load(DATA + PICKLES[0])  # imports what honest files need
    codecs.lookup("raw_unicode_escape")  # and what pickletools needs
    modules, environment = set(sys.modules), dict(os.environ)
    yield tmp_path
    assert list(tmp_path.iterdir()) == []
    assert set(sys.modules) == modules
    assert {**os.environ, "PYTEST_CURRENT_TEST": ""} == {**environment, "PYTEST_CURRENT_TEST": ""}


@pytest.mark.parametrize("case", UNSAFE)
def test_unsafe(case, untouched):
    with pytest.raises(UnsafeCheckpointError, match="refused at byte") as caught:
        load(UNSAFE[case](untouched))
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300


@pytest.mark.parametrize("case", DAMAGED)
def test_damaged(case, untouched):
    with pytest.raises(CheckpointError) as caught:
        load(DAMAGED[case])
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300


MEMORY = f"""
import pathlib
import networks
from metrics.references import load_reference
from tests.memory_utils import refuse_all
from tests.torch_utils.hand_written_pickles import DAMAGED, DATA, PICKLES, UNSAFE
from torch_utils.safe_pickle import load

files = DAMAGED | {{case: make(pathlib.Path("{os.devnull}")) for case, make in UNSAFE.items()}}
for name in PICKLES:
    load(DATA + name)  # imports what is needed
refuse_all(load, files)
"""


@pytest.mark.skipif(not HAS_LIMITS, reason="needs Linux")
def test_hostile_pickles_are_cheap():
    run_script(MEMORY)


def test_small_numbers_are_keys():
    data = {2**16 - 1: 1, 0: 2, True: 3, "0.5": 4, None: 5}
    assert load(pickle.dumps(data)) == data


def test_steps_within_nested_files_count(monkeypatch):
    monkeypatch.setattr(pickle_machine, "MAX_STEPS", 10_000)
    again = call("torch.storage", "_load_from_bytes", b"h\x00") * 500  # 3,000 instructions
    with pytest.raises(UnsafeCheckpointError, match="needs more than 10000 steps"):
        load(P4 + b"(" + blob(bytes(1 << 20)) + blob(HONEST) + b"\x94" + again + b"t" + STOP)


@pytest.mark.parametrize("read", [networks.load, load_reference, load])
def test_attributes_that_many_objects_share_are_refused_before_they_are_looked_at_often(tmp_path, monkeypatch, read):
    """450 KB: each of 34,400 objects takes the same dictionary of 20,000 attributes as its state."""

    def made(attributes, objects):
        shared = b"}\x94(" + b"".join(text(str(i)) + b"N" for i in range(attributes)) + b"u"
        build = b"h\x00)\x81h\x01b"
        return (
            P4
            + name("torch.nn.modules.container", "ModuleDict")
            + b"\x94"
            + shared
            + b"("
            + build * objects
            + b"t\x87."
        )

    looked, check = [], pickle_machine.attributes
    monkeypatch.setattr(pickle_machine, "attributes", lambda m, state: looked.append(len(state)) or check(m, state))
    _, shared, objects = load(made(20, 30))
    assert len(objects) == 30 and all(item.state is shared for item in objects) and looked == [20] * 30
    path = tmp_path / "shared.pkl"
    path.write_bytes(made(20_000, 34_400))
    assert 445_000 < path.stat().st_size < 455_000
    with pytest.raises(ValueError, match="refused at byte [0-9]+: needs more than 1000000 steps to be read$"):
        read(path)
    assert sum(looked) < 1_020_000


def test_the_offending_name_is_given(untouched):
    with pytest.raises(UnsafeCheckpointError, match=r"names (posix|nt)\.system"):
        load(shell(untouched))


def test_hostile_files_would_work_elsewhere(tmp_path):
    pickle.loads(shell(tmp_path))
    assert (tmp_path / "mark").exists()


def test_shared_values_cost_nothing(untouched):
    values = load(P4 + laughs(100) + STOP)
    assert len(values) == 101 and values[100][0] is values[99]


def test_deep_nesting(untouched):
    load(P4 + b"]" * 200_000 + b"a" * 199_999 + STOP)
    load(P4 + b")" + b"\x85" * 200_000 + STOP)


def test_memo_entries_are_replaced():
    assert load(P4 + b"(K\x01q\x00K\x02q\x01K\x03q\x00h\x00h\x01t" + STOP) == (1, 2, 3, 3, 2)


def test_source_code_is_dropped(untouched):
    source = f"open('{untouched}/mark', 'w')"
    meta = b"}(" + b"".join(
        [text("type"), text("class"), text("version"), b"K\x06", text("module_src"), text(source), text("class_name"),
         text("Precond"), text("state"), b"}", text("a"), b"K\x01s", b"u"]
    )  # fmt: skip
    record = load(P4 + call("torch_utils.persistence", "_reconstruct_persistent_obj", meta) + STOP)
    assert (type(record), record.qualname, record.state) == (Record, "Precond", {"a": 1})
    assert vars(record) == {"module": "torch_utils.persistence", "qualname": "Precond", "state": {"a": 1}}


def test_attributes_of_records_stay_data(untouched):
    state = b"}" + text("__class__") + b"K\x01s" + text("__setstate__") + b"K\x02s"
    record = load(P4 + name("training.networks_edm2", "GenerativeDenoiser") + b")\x81" + state + b"b" + STOP)
    assert type(record) is Record and record.state == {"__class__": 1, "__setstate__": 2}


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_plain_data(protocol):
    values = np.arange(6.0).reshape(2, 3)
    matrix = torch.arange(6.0).reshape(2, 3)
    parameter = torch.nn.Parameter(torch.ones(3, dtype=torch.float16))
    data = {
        "plain": [1, -5, 2**40, 1.5, True, None, "é", b"\x00\xff", b"", (1, (2,)), {1, "a"}, set()],
        "ordered": collections.OrderedDict(a=1),
        "arrays": [values, values.T, values.astype(">f4"), np.array(3), np.zeros((0, 2)), np.arange(3) > 1],
        "scalar": np.float32(0.25),
        "same": values,
        "tensors": [matrix, matrix.T, matrix[1, 1:], torch.tensor(2.0), torch.zeros(0, 3), torch.arange(3)],
        "half": [parameter, torch.ones(2, dtype=torch.bfloat16)],
    }
    found = load(pickle.dumps(data, protocol))
    assert found.keys() == data.keys() and found["plain"] == data["plain"] and found["ordered"] == {"a": 1}
    assert all(np.array_equal(a, b) for a, b in zip(found["arrays"], data["arrays"], strict=True))
    assert [a.dtype for a in found["arrays"]] == [np.dtype(t) for t in ("f8", "f8", "f4", "i8", "f8", "?")]
    assert found["same"] is found["arrays"][0] and found["same"].flags.writeable
    assert found["scalar"] == 0.25 and type(found["scalar"]) is np.float32
    assert all(torch.equal(a, b) for a, b in zip(found["tensors"], data["tensors"], strict=True))
    assert torch.equal(found["half"][0], parameter.data) and found["half"][1].dtype == torch.bfloat16
    assert type(found["half"][0]) is torch.Tensor and not found["half"][0].requires_grad


def test_reference_statistics():
    data = load(DATA + "dataset-ref-tiny.pkl")
    assert data.keys() == {"fid", "num_images"} and data["num_images"] == 64
    assert data["fid"]["mu"].shape == (32,) and data["fid"]["sigma"].shape == (32, 32)
    assert np.allclose(data["fid"]["sigma"], data["fid"]["sigma"].T)


@pytest.mark.parametrize("filename", PICKLES)
def test_truncated(filename, untouched):
    data = open(DATA + filename, "rb").read()
    for length in [0, 1, 2, 3, 10, 11, 50, *range(100, len(data), len(data) // 20), len(data) - 1]:
        with pytest.raises(CheckpointError):
            load(data[:length])


def test_random_bytes(untouched):
    rng = random.Random(0)
    for start in (b"", b"\x80\x02", b"\x80\x04", b"\x80\x04\x95"):
        for _ in range(200):
            with pytest.raises(CheckpointError):
                load(start + rng.randbytes(200) + b"\xff")


@pytest.mark.parametrize("filename", PICKLES)
def test_flipped_bytes(filename, untouched):
    rng = random.Random(1)
    data = open(DATA + filename, "rb").read()
    for _ in range(75):
        spoilt = bytearray(data)
        for _ in range(3):
            spoilt[rng.randrange(rng.choice([len(data), 8000]))] = rng.randrange(256)
        try:
            load(bytes(spoilt))
        except ValueError as error:
            assert isinstance(error, CheckpointError)


def test_sizes_and_missing_files(tmp_path):
    with pytest.raises(CheckpointError, match="larger than the limit"):
        load(DATA + PICKLES[0], max_bytes=1000)
    with pytest.raises(CheckpointError, match="larger than the limit"):
        load(bytes(2000), max_bytes=1000)
    with pytest.raises(CheckpointError, match="no such file"):
        load(tmp_path / "none.pkl")
