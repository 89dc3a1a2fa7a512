import builtins
import codecs
import collections
import io
import os
import pickle
import random
import struct
import sys
import zipfile

import numpy as np
import pytest
import torch

import networks
from metrics.references import load_reference
from tests.memory_utils import HAS_LIMITS, run_script
from torch_utils import pickle_machine
from torch_utils.safe_pickle import CheckpointError, Record, UnsafeCheckpointError, load

DATA = "tests/data/"
PICKLES = [
    "edm2-tiny-0000000-0.100.pkl", "edm2-tiny-latent-0000000-0.100.pkl", "ncvsd-tiny-0000000-0.050.pkl",
    "dataset-ref-tiny.pkl",
]  # fmt: skip
P4, STOP = b"\x80\x04", b"."


# Pieces of hand-written pickles.


def text(s):
    data = s.encode()
    return b"X" + struct.pack("<I", len(data)) + data


def blob(data):
    return b"B" + struct.pack("<I", len(data)) + data


def name(module, qualname):
    return text(module) + text(qualname) + b"\x93"


def call(module, qualname, *arguments):
    return name(module, qualname) + b"(" + b"".join(arguments) + b"tR"


def number(value):
    return b"J" + struct.pack("<i", value)


def storage(values):
    stream = io.BytesIO()
    torch.save(values.untyped_storage() if values.dtype == torch.uint8 else values.storage(), stream,
               _use_new_zipfile_serialization=False)  # fmt: skip
    return stream.getvalue()


def tensor(payload, offset=0, size=(2,), stride=(1,)):
    shape, steps = (b"(" + b"".join(map(number, values)) + b"t" for values in (size, stride))
    return call(
        "torch._utils", "_rebuild_tensor_v2", call("torch.storage", "_load_from_bytes", payload), number(offset),
        shape, steps, b"\x89", call("collections", "OrderedDict"),
    )  # fmt: skip


def reconstruct(cls):
    return call("numpy.core.multiarray", "_reconstruct", cls, b"K\x00\x85", blob(b"b"))


def array(shape, data, dtype="f4", state=None):
    kind = call("numpy", "dtype", text(dtype), b"\x89", b"\x88")
    state = state or b"(" + number(1) + shape + kind + b"\x89" + blob(data) + b"t"
    return reconstruct(name("numpy", "ndarray")) + state + b"b"


class Evil:
    """Pickles as a call of any function; `mark` is set if something runs it."""

    def __init__(self, function, *arguments):
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments


def shell(folder, protocol=4):
    return pickle.dumps(Evil(os.system, f"touch {folder}/mark"), protocol)


def zipped(content, size=0):
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", content)
        archive.writestr("archive/data/0", bytes(size))
        archive.writestr("archive/version", "3\n")
    return stream.getvalue()


def load_from_bytes(payload):
    return P4 + call("torch.storage", "_load_from_bytes", blob(payload)) + STOP


def laughs(levels):
    """A tuple of tuples, in which each level holds the previous one twice."""
    body = text("ha") + b"\x94"
    for level in range(levels):
        body += b"h" + bytes([level]) + b"h" + bytes([level]) + b"\x86\x94"
    return b"(" + body + b"t"


def shared_attributes(item):
    """A dictionary of 2,000 attributes and 2,000 times an item that begins with it."""
    keys = b"".join(text(f"{i}") + b"N" for i in range(2000))
    return P4 + b"}\x94(" + keys + b"u(" + item * 2000 + b"t\x86" + STOP


HONEST = storage(torch.arange(4.0))
KEY = pickle.loads(HONEST[HONEST.rindex(b"\x80\x02") : -24])[0].encode()  # of the storage, given twice

# Each makes one file, given a folder in which nothing may appear.
UNSAFE = {
    **{f"os.system, protocol {p}": lambda f, p=p: shell(f, p) for p in (2, 3, 4, 5)},
    "builtins.eval": lambda f: pickle.dumps(Evil(eval, f"open('{f}/mark','w')")),
    "builtins.exec": lambda f: pickle.dumps(Evil(exec, f"open('{f}/mark','w')")),
    "builtins.__import__": lambda f: pickle.dumps(Evil(builtins.__import__, "antigravity")),
    "builtins.getattr": lambda f: P4
        + call("builtins", "getattr", name("collections", "OrderedDict"), text("fromkeys")) + STOP,
    "getattr as a bare name": lambda f: P4 + name("builtins", "getattr") + STOP,
    "class of a class": lambda f: P4 + name("torch.nn", "Module.__class__") + STOP,
    "dotted name": lambda f: P4 + name("collections", "OrderedDict.__init__.__globals__") + STOP,
    "dotted name of a record class": lambda f: P4
        + name("training.training_loop", "LogNormalNoiseSampler.os.system") + STOP,
    "allowed name, other module": lambda f: P4 + call("evil", "OrderedDict") + STOP,
    "allowed module, other name": lambda f: P4 + call("collections", "namedtuple", text("x"), text("y")) + STOP,
    "text global with spaces": lambda f: b"\x80\x02ccollections\nOrderedDict x\n.",
    "global named by a tuple": lambda f: P4 + b")" + text("OrderedDict") + b"\x93" + STOP,
    "instance opcode": lambda f: b"\x80\x02(" + text(f"touch {f}/mark") + b"ios\nsystem\n.",
    "object opcode": lambda f: b"\x80\x02(cos\nsystem\n" + text(f"touch {f}/mark") + b"o.",
    "extension registry": lambda f: b"\x80\x02\x82\x01.",
    "extension registry, 4 bytes": lambda f: b"\x80\x02\x84\x01\x00\x00\x00.",
    "persistent id": lambda f: P4 + text("x") + b"Q.",
    "text persistent id": lambda f: b"\x80\x02Px\n.",
    "next buffer": lambda f: b"\x80\x05\x97.",
    "newobj with keywords": lambda f: P4
        + name("training.training_loop", "LogNormalNoiseSampler") + b")}\x92" + STOP,
    "newobj with arguments": lambda f: P4 + name("dnnlib.util", "EasyDict") + b"}\x85\x81" + STOP,
    "newobj of a function": lambda f: P4 + name("torch.storage", "_load_from_bytes") + b")\x81" + STOP,
    "call of a record class": lambda f: P4 + call("training.training_loop", "LogNormalNoiseSampler") + STOP,
    "call of text": lambda f: P4 + text("os.system") + b")R" + STOP,
    "state with slots": lambda f: P4 + name("training.networks_edm2", "GenerativeDenoiser") + b")\x81}}\x86b" + STOP,
    "state with odd keys": lambda f: P4
        + name("training.networks_edm2", "GenerativeDenoiser") + b")\x81}K\x01Nsb" + STOP,
    "state of a list": lambda f: P4 + b"]}" + text("__class__") + b"Nsb" + STOP,
    "state of a dict": lambda f: P4 + b"}}" + text("__setstate__") + b"Nsb" + STOP,
    "state of a function": lambda f: P4
        + name("torch.storage", "_load_from_bytes") + b"}" + text("__code__") + b"Nsb" + STOP,
    "persistent object with a tuple state": lambda f: P4
        + call("torch_utils.persistence", "_reconstruct_persistent_obj", b"}(" + text("type") + text("class")
               + text("class_name") + text("Precond") + text("state") + b")u") + STOP,
    "codec that is not latin1": lambda f: P4 + call("_codecs", "encode", text("x"), text("rot13")) + STOP,
    "numpy array of objects": lambda f: pickle.dumps(np.array([Evil(os.system, f"touch {f}/mark")], dtype=object)),
    "numpy dtype of objects": lambda f: P4 + call("numpy", "dtype", text("O")) + STOP,
    "numpy record dtype": lambda f: pickle.dumps(np.zeros(1, dtype=[("a", "f4")])),
    "numpy reconstruct of another class": lambda f: P4
        + reconstruct(name("collections", "OrderedDict")) + STOP,
    "nested file, hostile, without ZIP": lambda f: load_from_bytes(HONEST[:21] + shell(f, 2) * 3),
    "nested file, hostile, with ZIP": lambda f: load_from_bytes(zipped(shell(f, 2))),
    "nested file, ZIP bomb": lambda f: load_from_bytes(zipped(b"\x80\x02N.", 256 << 20)),
    "nested file, plain pickle": lambda f: load_from_bytes(shell(f, 2)),
    "nested file, a tensor": lambda f: load_from_bytes(_legacy(torch.zeros(2))),
    "nested file, another class": lambda f: load_from_bytes(HONEST.replace(b"FloatStorage", b"EvilStorages")),
    "payload unfolded again and again": lambda f: P4 + blob(storage(torch.zeros(1 << 20))) + b"\x94"
        + b"(" + call("torch.storage", "_load_from_bytes", b"h\x00") * 100 + b"t\x86" + STOP,
    "attributes looked at again and again": lambda f: shared_attributes(
        name("torch.nn.modules.container", "ModuleDict") + b")\x81h\x00b"),
    "state of a class looked at again and again": lambda f: shared_attributes(
        call("torch_utils.persistence", "_reconstruct_persistent_obj", b"}(" + text("type") + text("class")
             + text("class_name") + text("Precond") + text("state") + b"h\x00u")),
    "too many instructions": lambda f: P4 + b"]" * 1_000_010 + STOP,
}  # fmt: skip


def _legacy(value):
    stream = io.BytesIO()
    torch.save(value, stream, _use_new_zipfile_serialization=False)
    return stream.getvalue()


DAMAGED = {
    "empty": b"",
    "protocol 0": pickle.dumps([1], 0),
    "protocol 1": pickle.dumps([1], 1),
    "protocol 6": b"\x80\x06N.",
    "no end": P4 + b"N",
    "empty stack": P4 + STOP,
    "values left over": P4 + b"NN" + STOP,
    "pop from nothing": P4 + b"\x87" + STOP,
    "mark as a value": P4 + b"(" + STOP,
    "unknown memo entry": P4 + b"h\x05" + STOP,
    "items for a number": P4 + b"K\x01(NNu" + STOP,
    "odd number of items": P4 + b"}(NNNu" + STOP,
    "bytes of 2^60": P4 + b"\x8e" + struct.pack("<Q", 2**60) + b"x" + STOP,
    "bytes of 4 GiB": P4 + b"B" + struct.pack("<I", 2**32 - 1) + b"x" + STOP,
    "text of 2^62": P4 + b"\x8d" + struct.pack("<Q", 2**62) + b"x" + STOP,
    "bytearray of 2^63": b"\x80\x05\x96" + struct.pack("<Q", 2**63) + b"x" + STOP,
    "integer of 2 GiB": P4 + b"\x8b" + struct.pack("<i", 2**31 - 1) + b"x" + STOP,
    "integer of 200 bytes": P4 + b"\x8a\xc8" + b"\x7f" * 200 + STOP,
    "endless line": b"\x80\x02c" + b"a" * 10_000_000,
    "bad utf-8": P4 + b"X\x02\x00\x00\x00\xff\xff" + STOP,
    "nested tuples as a key": P4 + b"}" + laughs(100) + b"Ns" + STOP,
    "nested tuples in a set": P4 + b"\x8f(" + laughs(100) + b"\x90" + STOP,
    "long integer as a key": P4 + b"}\x8a\x05" + bytes(4) + b"\x01Ns" + STOP,
    "long negative integer in a set": P4 + b"\x8f(\x8a\x08" + b"\x80" * 8 + b"\x90" + STOP,
    "long integer in a frozen set": P4 + b"(\x8a\x10" + b"\x7f" * 16 + b"\x91" + STOP,
    "floating-point number as a key": P4 + b"}G" + struct.pack(">d", 2.0**61) + b"Ns" + STOP,
    "number beyond 16 bits as a key": P4 + b"}" + number(1 << 16) + b"Ns" + STOP,
    "negative number as a key": P4 + b"}" + number(-1) + b"Ns" + STOP,
    "memo entries out of order": P4 + b"Nr" + struct.pack("<I", 2**32 - 1) + STOP,
    "list as a key": P4 + b"}]Ns" + STOP,
    "array smaller than its shape": P4 + array(number(9) + b"\x85", bytes(8)) + STOP,
    "array of negative size": P4 + array(number(-1) + b"\x85", bytes(4)) + STOP,
    "array of 2^62 nothing": P4 + array(b"\x8a\x08" + struct.pack("<q", 2**62) + b"K\x00\x86", b"") + STOP,
    "array with a damaged state": P4 + array(b"", b"", state=b"]") + STOP,
    "array state without a type": P4 + array(b"", b"", state=b"(" + number(1) + b")N\x89" + blob(b"x") + b"t") + STOP,
    "storage beyond its bytes": load_from_bytes(HONEST[:-4]),
    "storage with more bytes": load_from_bytes(HONEST + b"xxxx"),
    "storage that claims 2^40": load_from_bytes(HONEST.replace(b"K\x04N", b"\x8a\x06\x00\x00\x00\x00\x00\x01N")),
    "storage under another key": load_from_bytes(HONEST.replace(KEY, b"x" * len(KEY), 1)),
    "storage cut in its head": load_from_bytes(HONEST[:40]),
    "tensor beyond its storage": P4 + tensor(blob(HONEST), size=(5,)) + STOP,
    "tensor behind its storage": P4 + tensor(blob(HONEST), offset=3) + STOP,
    "tensor before its storage": P4 + tensor(blob(HONEST), offset=-1) + STOP,
    "tensor with negative strides": P4 + tensor(blob(HONEST), offset=3, stride=(-1,)) + STOP,
    "tensor that repeats its storage": P4 + tensor(blob(HONEST), size=(1 << 30,), stride=(0,)) + STOP,
    "tensor of strange rank": P4 + tensor(blob(HONEST), size=(1,) * 40, stride=(1,) * 40) + STOP,
    "call with too many arguments": P4 + call("torch.storage", "_load_from_bytes", b"NN") + STOP,
    "OrderedDict of no pairs": P4 + call("collections", "OrderedDict", b"](K\x01K\x02e") + STOP,
}


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
from tests.torch_utils.test_safe_pickle import DAMAGED, DATA, PICKLES, UNSAFE, load

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
