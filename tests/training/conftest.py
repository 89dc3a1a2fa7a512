"""What the tests of training share: small sample sheets, and the tiny data set."""

import pytest

from data.dataset import ImageDataset
from training.run import session


@pytest.fixture(autouse=True)
def few_samples(monkeypatch):
    monkeypatch.setattr(session, "GRID_SEEDS", range(2))


@pytest.fixture
def dataset(tiny_data):
    return ImageDataset(tiny_data)
