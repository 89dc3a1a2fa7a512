import numpy as np
import pytest
import torch
from PIL import Image

from generation.pictures import image_grid, read_image, save_grid, save_image


def test_grid_places_images_row_by_row():
    images = np.arange(5, dtype=np.uint8)[:, None, None, None].repeat(3, 1).repeat(4, 2).repeat(4, 3)
    sheet = image_grid(torch.from_numpy(images), columns=2, padding=1, scale=1)
    assert sheet.shape == (3, 16, 11)
    corners = [[sheet[0, 1 + 5 * row, 1 + 5 * column] for column in range(2)] for row in range(3)]
    assert corners == [[0, 1], [2, 3], [4, 255]]
    assert (sheet[:, 0] == 255).all() and (sheet[:, :, 5] == 255).all()


def test_small_images_are_magnified_and_square_sheets_preferred():
    assert image_grid(np.zeros((10, 1, 16, 16), np.uint8), padding=0).shape == (1, 3 * 64, 4 * 64)
    assert image_grid(np.zeros((2, 1, 80, 80), np.uint8), padding=0).shape == (1, 80, 160)


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (3, "RGB")])
def test_png_round_trip(tmp_path, channels, mode):
    image = np.random.default_rng(0).integers(0, 256, (channels, 9, 7), dtype=np.uint8)
    save_image(tmp_path / "a.png", image)
    with Image.open(tmp_path / "a.png") as picture:
        assert picture.mode == mode and picture.size == (7, 9)
    assert np.array_equal(read_image(tmp_path / "a.png"), image)
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


def test_save_grid(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (4, 3, 8, 8), dtype=np.uint8)
    save_grid(tmp_path / "sheet.png", images, scale=1, padding=0)
    assert np.array_equal(read_image(tmp_path / "sheet.png")[:, :8, 8:], images[1])


@pytest.mark.parametrize(
    "image", [np.zeros((4, 8, 8), np.uint8), np.zeros((8, 8), np.uint8), np.zeros((3, 8, 8), np.float32)]
)
def test_what_is_not_an_image_is_refused_and_nothing_written(tmp_path, image):
    with pytest.raises(ValueError, match="channels|uint8"):
        save_image(tmp_path / "a.png", image)
    assert list(tmp_path.iterdir()) == []


def test_an_empty_sheet_is_refused():
    with pytest.raises(ValueError, match="N > 0"):
        image_grid(np.zeros((0, 3, 8, 8), np.uint8))
