"""Between arrays and pictures: uint8 [C,H,W], grey for one channel and RGB for three."""

import io
from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL import Image

STORED: Mapping[str, Any] = {"compress_level": 0}  # uncompressed: fast to read
SMALL: Mapping[str, Any] = {"optimize": True, "compress_type": 0}


def to_picture(image: np.ndarray) -> Image.Image:
    """Pillow's picture of uint8 [C,H,W], C = 1 or 3."""
    return Image.fromarray(image[0] if len(image) == 1 else np.ascontiguousarray(image.transpose(1, 2, 0)))


def to_array(picture: Image.Image) -> np.ndarray:
    """uint8 [C,H,W] of a picture of mode L or RGB."""
    array = np.array(picture)
    return array[None] if array.ndim == 2 else np.ascontiguousarray(array.transpose(2, 0, 1))


def encode_png(image: np.ndarray, options: Mapping[str, Any] = STORED) -> bytes:
    """PNG file of uint8 [C,H,W], C = 1 or 3; `options` are those of Pillow's writer, {} its defaults."""
    to_picture(image).save(stream := io.BytesIO(), format="PNG", **options)
    return stream.getvalue()
