"""Images and contact sheets as PNG files."""

import math
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from data.pictures import encode_png, to_array
from dnnlib.files import atomic_write, open_regular


def save_image(path: str | Path, image: np.ndarray | torch.Tensor) -> None:
    """Write uint8 [C,H,W], C = 1 or 3, as PNG; it appears whole or not. Raises ValueError for another shape or type."""
    array = _as_uint8(image)
    if array.ndim != 3 or array.shape[0] not in (1, 3):
        raise ValueError(f"{path}: a PNG needs 1 or 3 channels, not an array of shape {list(array.shape)}")
    with atomic_write(path) as file:
        file.write(encode_png(array, {}))


def read_image(path: str | Path) -> np.ndarray:
    """Return a PNG as uint8 [C,H,W], one channel for grey files and three otherwise. Raises OSError."""
    with open_regular(path) as file, Image.open(file, formats=["PNG"]) as picture:
        return to_array(picture if picture.mode in ("L", "RGB") else picture.convert("RGB"))


def image_grid(
    images: np.ndarray | torch.Tensor,  # uint8 [N,C,H,W]
    *,
    columns: int | None = None,  # None = as square as possible
    padding: int = 2,  # white pixels between and around images
    scale: int | None = None,  # whole-number magnification; None = images of at least 64 pixels where they are smaller
) -> np.ndarray:
    """Return a contact sheet, uint8 [C,H',W'], row by row in the order given; white where there is no image."""
    array = _as_uint8(images)
    if array.ndim != 4 or len(array) == 0:
        raise ValueError(f"a contact sheet needs images of shape [N,C,H,W] with N > 0, not {list(array.shape)}")
    scale = scale or max(1, math.ceil(64 / max(array.shape[2:])))
    array = array.repeat(scale, axis=2).repeat(scale, axis=3)
    columns = min(columns or math.ceil(math.sqrt(len(array))), len(array))
    cells = np.pad(array, [(0, -len(array) % columns), (0, 0), (0, padding), (0, padding)], constant_values=255)
    _, channels, height, width = cells.shape
    sheet = cells.reshape(-1, columns, channels, height, width).transpose(2, 0, 3, 1, 4)
    sheet = sheet.reshape(channels, -1, columns * width)
    return np.pad(sheet, [(0, 0), (padding, 0), (padding, 0)], constant_values=255)


def save_grid(path: str | Path, images: np.ndarray | torch.Tensor, **layout: int | None) -> None:
    """Write a contact sheet of uint8 images [N,C,H,W] as PNG; `layout` are the other arguments of `image_grid`."""
    save_image(path, image_grid(images, **layout))


def _as_uint8(images: np.ndarray | torch.Tensor) -> np.ndarray:
    array = images.detach().cpu().numpy() if isinstance(images, torch.Tensor) else np.asarray(images)
    if array.dtype != np.uint8:
        raise ValueError(f"images must be uint8 (0 to 255), not {array.dtype}: decode them first")
    return array
