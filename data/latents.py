"""Turning data sets of images into those of autoencoder latents, and back."""

from collections.abc import Callable

import numpy as np
import torch
from tqdm import tqdm

from data.archives import DatasetError
from data.dataset import ImageDataset
from data.pictures import encode_png
from data.writer import DatasetWriter, encode_npy, summary
from networks.encoders import StabilityVAEEncoder
from torch_utils.distributed import device_for


def encode_dataset(
    source: str, dest: str, *, vae: str, batch: int = 16, device: str = "auto", max_images: int | None = None
) -> str:
    """Write the posteriors (mean, std; float32 [8,h,w]) of grey or RGB images as NPY files, labels kept. Raises
    `DatasetError` as `ImageDataset`, ValueError where the autoencoder is missing or does not divide the size.
    """
    encoder, dataset = StabilityVAEEncoder(vae, batch_size=batch).to(device_for(device)), ImageDataset(source)
    if dataset.num_channels not in (1, 3):
        raise DatasetError(f"{source}: {dataset.num_channels} channels; only pixels can be encoded")
    files = "img-mean-std-{:08d}.npy", encode_npy
    return _write(dataset, dest, *files, lambda x: encoder.encode_pixels(x.expand(-1, 3, -1, -1)), batch, max_images)


def decode_dataset(
    source: str, dest: str, *, vae: str, batch: int = 16, device: str = "auto", max_images: int | None = None
) -> str:
    """Write what the posterior means of a latent data set decode to as PNG files, labels kept. Return a summary. Raises
    `DatasetError` as `ImageDataset`, or for other data, ValueError where the autoencoder is missing.
    """
    encoder, dataset = StabilityVAEEncoder(vae, batch_size=batch).to(device_for(device)), ImageDataset(source)
    channels = encoder.scale.size
    if dataset.num_channels != 2 * channels:
        raise DatasetError(f"{source}: {dataset.num_channels} channels; latents have {2 * channels} (mean, std)")
    files = "img{:08d}.png", encode_png
    return _write(dataset, dest, *files, lambda x: encoder.decode_raw(x[:, :channels]), batch, max_images)


def _write(
    dataset: ImageDataset, dest: str, name: str, encode: Callable, turn: Callable, batch: int, max_images: int | None
) -> str:
    """A file, `name` filled with its number, as `encode` makes it of each result of `turn` on images [N,C,H,W]."""
    count = min(len(dataset), max_images or len(dataset))
    with DatasetWriter(dest) as writer:
        for start in tqdm(range(0, count, batch), unit="batch", dynamic_ncols=True):
            indices = range(start, min(start + batch, count))
            results = turn(torch.from_numpy(np.stack([dataset[i][0] for i in indices]))).cpu().numpy()
            for i, result in zip(indices, results, strict=True):
                writer.add(f"{i // 1000:05d}/{name.format(i)}", encode(result), dataset.get_raw_label(i))
    return summary(count, result.shape, dataset.label_dim > 0)
