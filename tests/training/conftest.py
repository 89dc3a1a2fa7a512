"""What the tests of training share: small sample sheets, and the tiny data set."""

import pytest

from training import loop
from training.dataset import ImageDataset


@pytest.fixture(autouse=True)
def few_samples(monkeypatch):
    monkeypatch.setattr(loop, "GRID_SEEDS", range(2))


@pytest.fixture
def dataset(tiny_data):
    return ImageDataset(tiny_data)
