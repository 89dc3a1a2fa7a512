"""Pickles written by hand: honest pieces, and files that are unsafe or damaged."""

import builtins
import io
import os
import pickle
import struct
import zipfile

import numpy as np
import torch

P4, STOP = b"\x80\x04", b"."
DATA = "tests/data/"


PICKLES = [
    "edm2-tiny-0000000-0.100.pkl", "edm2-tiny-latent-0000000-0.100.pkl", "ncvsd-tiny-0000000-0.050.pkl",
    "dataset-ref-tiny.pkl",
]  # fmt: skip


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
