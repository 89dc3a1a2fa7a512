import io

import numpy as np
import pytest
from PIL import Image

from data.pictures import SMALL, STORED, encode_png, to_array, to_picture


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (3, "RGB")])
def test_arrays_and_pictures_are_the_same_both_ways(channels, mode):
    image = np.random.default_rng(0).integers(0, 256, (channels, 5, 7), dtype=np.uint8)
    picture = to_picture(image)
    assert picture.mode == mode and picture.size == (7, 5)
    assert np.array_equal(to_array(picture), image) and to_array(picture).flags.c_contiguous


def test_a_png_holds_its_image_whatever_the_compression():
    image = np.zeros((3, 40, 30), np.uint8)
    files = [encode_png(image, options) for options in (STORED, {}, SMALL)]
    assert len(files[0]) > image.size > len(files[1]) >= len(files[2])
    assert all(np.array_equal(to_array(Image.open(io.BytesIO(file))), image) for file in files)
