"""What the tests of training share."""

import pytest

from data.dataset import ImageDataset


@pytest.fixture
def dataset(tiny_data):
    return ImageDataset(tiny_data)
