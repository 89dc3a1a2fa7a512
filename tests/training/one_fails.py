"""What each process of `test_failures.py` does: train_ncvsd.py with data that the second process cannot read on."""

import train_ncvsd
from data import dataset
from torch_utils import distributed

read = dataset.ImageDataset.__getitem__


def fail(self, index):
    fail.count += 1
    if distributed.rank() == 1 and fail.count > 8:
        raise dataset.DatasetError("nope.zip: damaged")
    return read(self, index)


fail.count = 0

if __name__ == "__main__":
    dataset.ImageDataset.__getitem__ = fail
    train_ncvsd.main()
