"""Reads the pickles of published checkpoints into plain data, without running anything they contain.

A pickle is a program for a small stack machine whose instructions may import and call anything. It is run here on a
machine that knows no importing (see `pickle_machine`), with the vocabulary at the end of this file: what a name stands
for is a function of this module, of the machine and the arguments found in the file, which it checks. Classes become
inert `Record`s; source code that a file carries is dropped unread.
"""

import io
import math
import os
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dnnlib.files import open_regular
from torch_utils import pickle_machine
from torch_utils.pickle_machine import CheckpointError, Machine, Name, Record, UnsafeCheckpointError, Vocabulary

__all__ = ["MAX_BYTES", "CheckpointError", "Record", "UnsafeCheckpointError", "load"]

MAX_BYTES = 16 * 2**30  # largest file read by default


def load(source: str | os.PathLike[str] | bytes, *, max_bytes: int = MAX_BYTES) -> Any:
    """Reads a pickle (protocols 2 to 5) from a path, or out of bytes. Returns dicts, lists, tuples, sets, strings,
    numbers, numpy arrays, CPU torch tensors (parameters become tensors) and `Record`s. Objects may be shared within the
    result and may contain themselves: walk it with care. Memory stays within a small multiple of the file's size.
    Raises UnsafeCheckpointError, naming the offending item, for anything outside the allowed set, and CheckpointError
    for damaged, truncated or too large input.
    """
    name = "pickle" if isinstance(source, bytes) else str(Path(source))
    try:
        file = io.BytesIO(source) if isinstance(source, bytes) else open_regular(name)
    except OSError as error:
        reason = "no such file" if isinstance(error, FileNotFoundError) else error.strerror
        raise CheckpointError(f"{name}: {reason}") from None
    with file:
        size = len(source) if isinstance(source, bytes) else os.fstat(file.fileno()).st_size
        if size > max_bytes:
            raise CheckpointError(f"{name}: larger than the limit of {max_bytes} bytes")
        machine = Machine(file, size, _VOCABULARY)
        try:
            return machine.run()
        except UnsafeCheckpointError as error:
            raise UnsafeCheckpointError(f"{name}: refused at byte {machine.position}: {error}") from None
        except Exception as error:  # whatever damaged input makes the reader stumble over
            reason = " ".join((str(error) or type(error).__name__).split())[:200]
            raise CheckpointError(f"{name}: damaged or not a checkpoint (byte {machine.position}): {reason}") from None


def _persistent_object(machine: Machine, meta: Any) -> Record:
    """Object of a class whose source travels in the file: its name and attributes are kept, the source is dropped."""
    if type(meta) is not dict or meta.get("type") != "class" or type(meta.get("class_name")) is not str:
        raise ValueError("a persistent object is not described as one")
    return Record(_PERSISTENT.module, meta["class_name"], pickle_machine.attributes(machine, meta.get("state")))


def _ordered_dict(machine: Machine, items: Any = ()) -> dict[Any, Any]:
    if not all(type(item) in (list, tuple) and len(item) == 2 for item in _listed(machine, items)):
        raise ValueError("an OrderedDict is not made of pairs")
    return {pickle_machine.scalar_key(key): value for key, value in items}


def _set(machine: Machine, items: Any = ()) -> set[Any]:
    return {pickle_machine.scalar_key(item) for item in _listed(machine, items)}


def _listed(machine: Machine, items: Any) -> Any:
    if type(items) not in (list, tuple):
        raise ValueError("a container is not made of a list")
    machine.spend(200 * len(items))
    return items


def _encode(machine: Machine, text: Any, encoding: Any) -> bytes:
    """How protocol 2 stores bytes."""
    if type(text) is not str or encoding != "latin1":
        raise UnsafeCheckpointError("encodes text in an unexpected way")
    machine.spend(len(text))
    return text.encode("latin1")


@dataclass(eq=False)
class _DType:
    """numpy.dtype under construction: the byte order arrives after the kind and size."""

    value: np.dtype


def _dtype(machine: Machine, code: Any, align: Any = False, copy: Any = False) -> _DType:
    if type(code) is not str or code not in _NUMPY_CODES:
        raise UnsafeCheckpointError("uses a numpy type that is not a plain number (such as objects or records)")
    return _DType(np.dtype(code))


def _set_byte_order(machine: Machine, target: _DType, state: Any) -> None:
    if type(state) is not tuple or len(state) < 5 or state[1] not in ("<", ">", "|", "="):
        raise ValueError("a numpy type has an unexpected state")
    if any(part is not None for part in state[2:5]):
        raise UnsafeCheckpointError("uses a numpy type with fields")
    target.value = target.value.newbyteorder(state[1])


def _array_values(machine: Machine, dtype: Any, shape: Any, data: Any) -> np.ndarray:
    """The elements of an array of the given shape, in the order of the file, native byte order."""
    if type(dtype) is not _DType or type(data) not in (bytes, bytearray):
        raise ValueError("a numpy array is not made of a type and bytes")
    if math.prod(_counts(shape)) * dtype.value.itemsize != len(data):
        raise ValueError("a numpy array does not have the size its shape says")
    machine.spend(2 * len(data))
    return np.frombuffer(data, dtype=dtype.value).astype(dtype.value.newbyteorder("="))  # a copy, writable


def _reconstruct(machine: Machine, cls: Any, shape: Any, code: Any) -> np.ndarray:
    if cls != Name("numpy", "ndarray") or shape != (0,) or code not in (b"b", "b"):
        raise UnsafeCheckpointError("reconstructs something other than a numpy array")
    return np.empty(0, dtype="b1")


def _fill_array(machine: Machine, target: np.ndarray, state: Any) -> None:
    if type(state) is not tuple or len(state) != 5 or target.size:
        raise ValueError("a numpy array has an unexpected state")
    _, shape, dtype, fortran, data = state
    values = _array_values(machine, dtype, shape, data)
    # In place, since other parts of the file may refer to this array already. Every part of the state is checked.
    target.__setstate__((1, shape, values.dtype, fortran is True, values.tobytes()))


def _frombuffer(machine: Machine, data: Any, dtype: Any, shape: Any, order: Any) -> np.ndarray:
    if order not in ("C", "F"):
        raise ValueError("a numpy array has an unexpected order")
    return _array_values(machine, dtype, shape, data).reshape(shape, order=order)


def _counts(values: Any) -> tuple[int, ...]:
    """A shape or strides, checked to be a short tuple of natural numbers."""
    if type(values) is not tuple or len(values) > 16:
        raise ValueError("a shape is not a short tuple")
    if not all(type(value) is int and 0 <= value < 2**48 for value in values):
        raise ValueError("a size, stride or offset is not a sensible number")
    return values


@dataclass(eq=False)
class _Storage:
    """A torch storage, as a one-dimensional tensor."""

    values: torch.Tensor


def _rebuild_tensor(
    machine: Machine, storage: Any, offset: Any, size: Any, stride: Any, requires_grad: Any, hooks: Any
) -> torch.Tensor:
    size, stride, (offset,) = _counts(size), _counts(stride), _counts((offset,))
    if type(storage) is not _Storage or len(size) != len(stride) or type(hooks) is not dict or hooks:
        raise UnsafeCheckpointError("rebuilds a tensor from something other than a storage, a shape and strides")
    available, wanted = storage.values.numel(), math.prod(size)
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    if wanted > available or offset > available or (wanted and last >= available):
        raise ValueError("a tensor reaches beyond its storage")
    return torch.as_strided(storage.values, size, stride, offset)


def _rebuild_parameter(machine: Machine, data: Any, requires_grad: Any, hooks: Any) -> torch.Tensor:
    if type(data) is not torch.Tensor or type(hooks) is not dict or hooks:
        raise UnsafeCheckpointError("rebuilds a parameter from something other than a tensor")
    return data


# How torch.save writes a storage in its format without ZIP: five pickles (magic number, version, system, object, list
# of storage keys), then the number of elements in 8 bytes, then the elements. This is the first two.
_STORAGE_START = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.\x80\x02M\xe9\x03."


def _load_storage(machine: Machine, data: Any) -> _Storage:
    """One storage of the size that it claims, and nothing else."""
    if type(data) is not bytes or not data.startswith(_STORAGE_START):
        raise UnsafeCheckpointError("holds a nested file that is not one torch storage in the format without ZIP")
    stream = io.BytesIO(data)
    stream.seek(len(_STORAGE_START))
    described: list[tuple[torch.dtype, int, Any]] = []

    def describe(item: Any) -> Any:
        if type(item) is not tuple or len(item) != 6 or item[0] != "storage" or item[5] is not None or described:
            raise UnsafeCheckpointError("a nested file holds something other than one torch storage")
        if type(item[1]) is not Name or item[1] not in _STORAGE_TYPES:
            raise UnsafeCheckpointError("a nested file holds a storage of an unknown type")
        described.append((_STORAGE_TYPES[item[1]], *_counts((item[4],)), item[2]))
        return described

    machine.spend(len(data))
    parts = [Machine(stream, len(data), _STORAGE_VOCABULARY, describe) for _ in range(3)]
    system, content, keys = (part.run() for part in parts)
    machine.work(sum(part.steps for part in parts))
    if content is not described or type(keys) is not list or [type(key) for key in keys] != [str]:
        raise UnsafeCheckpointError("a nested file holds something other than one torch storage")
    if type(system) is not dict or system.get("little_endian") is not True:
        raise ValueError("a storage was not written on a little-endian machine")
    dtype, numel, key = described[0]
    if type(key) is not str or key != keys[0]:
        raise ValueError("a storage is not the one that its file lists")
    if int.from_bytes(stream.read(8), "little") != numel or len(data) - stream.tell() != numel * dtype.itemsize:
        raise ValueError("a storage does not have the size it claims")
    values = bytearray(memoryview(data)[stream.tell() :])  # a copy, writable
    return _Storage(torch.frombuffer(values, dtype=dtype) if numel else torch.empty(0, dtype=dtype))


_PERSISTENT = Name("torch_utils.persistence", "_reconstruct_persistent_obj")
_NUMPY_CODES = frozenset("b1 i1 i2 i4 i8 u1 u2 u4 u8 f2 f4 f8".split())
_STORAGES = "Float:float32 Half:float16 BFloat16:bfloat16 Double:float64 Long:int64 Int:int32 Short:int16 Char:int8"
_STORAGES = [pair.split(":") for pair in f"{_STORAGES} Byte:uint8 Bool:bool".split()]
_STORAGE_TYPES = {Name("torch", f"{name}Storage"): getattr(torch, dtype) for name, dtype in _STORAGES}
_VOCABULARY = Vocabulary(
    functions={
        _PERSISTENT: _persistent_object,
        Name("collections", "OrderedDict"): _ordered_dict,
        Name("builtins", "set"): _set,
        Name("__builtin__", "set"): _set,
        Name("__builtin__", "bytes"): lambda machine: b"",
        Name("_codecs", "encode"): _encode,
        Name("numpy", "dtype"): _dtype,
        **{Name(f"numpy.{core}.multiarray", "_reconstruct"): _reconstruct for core in ("core", "_core")},
        **{Name(f"numpy.{core}.multiarray", "scalar"): lambda m, kind, data: _array_values(m, kind, (), data)[0]
           for core in ("core", "_core")},
        **{Name(f"numpy.{core}.numeric", "_frombuffer"): _frombuffer for core in ("core", "_core")},
        Name("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
        Name("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
        Name("torch.storage", "_load_from_bytes"): _load_storage,
    },
    classes={Name("dnnlib.util", "EasyDict"): dict} | {Name(*names): partial(Record, *names) for names in (
        ("torch.nn.modules.container", "ModuleDict"), ("training.networks_edm2", "GenerativeDenoiser"),
        ("training.training_loop", "LogNormalNoiseSampler"))},
    words=frozenset({Name("numpy", "ndarray")}),
    builders={_DType: _set_byte_order, np.ndarray: _fill_array},
)  # fmt: skip
_STORAGE_VOCABULARY = Vocabulary(words=frozenset(_STORAGE_TYPES))
