"""Arrays in NPY files, whose headers are read and compared before their data."""

import io
import math
from typing import BinaryIO

import numpy as np

_MAX_HEADER = 4096  # bytes; those of plain arrays have 118
_CHUNK = 1 << 24  # bytes read at a time


def read_npy_header(file: BinaryIO) -> tuple[tuple[int, ...], np.dtype, bool]:
    """Shape, dtype and Fortran order of the array that begins here. Raises ValueError where none does."""
    start = file.read(10)
    length = int.from_bytes(start[8:], "little")
    if len(start) < 10 or start[:8] != b"\x93NUMPY\x01\x00" or length > _MAX_HEADER:
        raise ValueError("not an array in an NPY file of version 1.0")
    try:
        stream = io.BytesIO(start[8:] + file.read(length))
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(stream)
    except Exception as error:  # a Python literal: SyntaxError, RecursionError, ... when damaged
        raise ValueError(f"damaged NPY header ({error})") from None
    if dtype.hasobject:
        raise ValueError("Object arrays cannot be loaded: they hold programs")
    if not all(type(n) is int and n >= 0 for n in shape):
        raise ValueError(f"damaged NPY header: shape {str(shape)[:40]}")
    return shape, dtype, fortran


def read_npy(file: BinaryIO, max_bytes: int) -> np.ndarray:
    """The array that begins here. Raises ValueError for over `max_bytes`, unread, or fewer than its shape needs."""
    shape, dtype, fortran = read_npy_header(file)
    size = math.prod(shape) * dtype.itemsize
    if size > max_bytes:
        raise ValueError(f"an array of shape {str(list(shape))[:60]}, larger than the {max_bytes} bytes it can have")
    data, done = np.empty(size, np.uint8), 0
    while done < size and (count := file.readinto(memoryview(data)[done : done + _CHUNK])):
        done += count
    if done != size:
        raise ValueError(f"damaged: its data do not fit shape {str(list(shape))[:60]}")
    return data.view(dtype).reshape(shape, order="F" if fortran else "C")
