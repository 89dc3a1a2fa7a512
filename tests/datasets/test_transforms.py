"""Crops and scaling of images against an independent resampler.

That one stretches the filter by the reduction factor, normalises its weights, and takes columns, then rows.
"""

import numpy as np
import pytest

from data.convert import transform_image
from tests.image_utils import picture


def lanczos(x):
    return np.where(np.abs(x) < 3, np.sinc(x) * np.sinc(x / 3), 0)


def box(x):
    return ((x > -0.5) & (x <= 0.5)).astype(float)


def bicubic(x, a=-0.5):
    x = np.abs(x)
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = ((x - 5) * x + 8) * x * a - 4 * a
    return np.where(x < 1, near, np.where(x < 2, far, 0))


def resize_axis(image, size, kernel, axis):
    length = image.shape[axis]
    factor = length / size
    stretch = max(factor, 1)
    centres = (np.arange(size) + 0.5) * factor
    weights = kernel((np.arange(length)[None] + 0.5 - centres[:, None]) / stretch)
    weights /= weights.sum(1, keepdims=True)
    moved = np.moveaxis(image.astype(np.float64), axis, -1) @ weights.T
    return np.clip(np.floor(np.moveaxis(moved, -1, axis) + 0.5), 0, 255)


def resize(image, width, height, kernel):
    return resize_axis(resize_axis(image, width, kernel, 2), height, kernel, 1)


def assert_close(image, expected):
    assert image.dtype == np.uint8 and image.shape == expected.shape
    assert np.abs(image.astype(float) - expected).max() <= 1  # rounding


@pytest.mark.parametrize(("height", "width"), [(40, 61), (61, 40), (33, 33)])
@pytest.mark.parametrize("channels", [1, 3])
def test_none_scales_with_lanczos(height, width, channels):
    image = picture(height, width, channels)
    assert_close(transform_image(image, "none", (16, 16)), resize(image, 16, 16, lanczos))
    assert np.array_equal(transform_image(image, "none", None), image)


@pytest.mark.parametrize(("height", "width"), [(40, 61), (61, 40), (33, 33), (8, 21)])
def test_center_crop(height, width):
    image = picture(height, width)
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    expected = resize(image[:, top : top + side, left : left + side], 16, 16, lanczos)
    assert_close(transform_image(image, "center-crop", (16, 16)), expected)


@pytest.mark.parametrize(("height", "width"), [(48, 64), (52, 66), (100, 70), (150, 200)])
def test_center_crop_wide(height, width):
    image = picture(height, width)
    rows = int(np.rint(64 * height / width))
    top = (height - rows) // 2
    expected = np.zeros([3, 64, 64])
    expected[:, 8:56] = resize(image[:, top : top + rows], 64, 48, lanczos)
    result = transform_image(image, "center-crop-wide", (64, 48))
    assert_close(result, expected)
    assert not result[:, :8].any() and not result[:, 56:].any()
    assert transform_image(picture(48, 63), "center-crop-wide", (64, 48)) is None  # too narrow
    assert transform_image(picture(47, 64), "center-crop-wide", (64, 48)) is None  # too flat


@pytest.mark.parametrize(("height", "width"), [(20, 31), (31, 20), (48, 72), (96, 64), (131, 200), (9, 14)])
def test_center_crop_dhariwal(height, width):
    image = picture(height, width)
    expected = image.astype(float)
    while min(expected.shape[1:]) >= 32:
        expected = resize(expected, expected.shape[2] // 2, expected.shape[1] // 2, box)
    scale = 16 / min(expected.shape[1:])
    expected = resize(expected, round(expected.shape[2] * scale), round(expected.shape[1] * scale), bicubic)
    top, left = (expected.shape[1] - 16) // 2, (expected.shape[2] - 16) // 2
    assert_close(
        transform_image(image, "center-crop-dhariwal", (16, 16)), expected[:, top : top + 16, left : left + 16]
    )


def test_box_filter_is_the_exact_block_mean():
    image = np.random.default_rng(0).integers(0, 256, [1, 32, 32], dtype=np.uint8)
    sums = image.astype(int).reshape(1, 16, 2, 16, 2).sum((2, 4))
    assert np.array_equal(transform_image(image, "none", (16, 16), "box"), (sums + 2) // 4)
