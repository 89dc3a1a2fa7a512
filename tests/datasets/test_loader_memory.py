"""The data path over several epochs: memory does not grow, whatever the number of loader processes."""

import gc

import numpy as np
import pytest
import torch

from data.dataset import ImageDataset, InfiniteSampler
from data.pictures import encode_png
from data.writer import DatasetWriter, encode_npy

COUNT, BATCH = 2000, 50


@pytest.fixture(scope="module", params=["pixels", "latents"])
def archive(request, tmp_path_factory):
    """An uncompressed ZIP: 2,000 images of 3 KiB, or latents of 8 KiB."""
    path, rng = tmp_path_factory.mktemp("loader") / f"{request.param}.zip", np.random.default_rng(0)
    with DatasetWriter(path) as writer:
        for i in range(COUNT):
            if request.param == "pixels":
                writer.add(f"img{i:08d}.png", encode_png(rng.integers(0, 256, (3, 32, 32), dtype=np.uint8)), i % 10)
            else:
                writer.add(f"img{i:08d}.npy", encode_npy(rng.standard_normal((8, 16, 16), dtype=np.float32)), i % 10)
    return path


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("workers", [0, 2])
def test_memory_does_not_grow_over_three_epochs(archive, workers):
    psutil = pytest.importorskip("psutil")
    dataset = ImageDataset(archive)
    options = dict(batch_size=BATCH, sampler=InfiniteSampler(len(dataset)), num_workers=workers)
    loader = iter(torch.utils.data.DataLoader(dataset, prefetch_factor=2 if workers else None, **options))
    process = psutil.Process()

    def resident():
        gc.collect()
        return sum(p.memory_full_info().uss for p in [process, *process.children()])

    sizes = []
    for _ in range(5):  # the first two warm up: forked workers come to own the pages that they touch
        for _ in range(COUNT // BATCH):
            next(loader)
        sizes.append(resident())
    epoch = COUNT * dataset[0][0].nbytes  # what would stay if every image of an epoch were kept
    assert sizes[-1] - sizes[1] < epoch, [size >> 20 for size in sizes]
