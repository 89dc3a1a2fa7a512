"""A small metric of every snapshot: the losses of distillation oscillate and say little about the samples."""

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from data.dataset import ImageDataset
from metrics.collect import evaluate_dataset, evaluate_network
from metrics.features.detectors import load_detector
from metrics.kinds import parse_metrics
from metrics.references import check_reference, compute_metrics, load_reference, save_reference
from networks.encoders import Encoder
from torch_utils import distributed

REFERENCE_IMAGES = 50_000  # of the data set at most, where no statistics are given
FIRST_SEED = 1 << 24  # apart from those of sample sheets


def snapshot_metrics(
    names: str,  # such as fd_demo or fid
    num: int,  # images to draw
    dataset: ImageDataset,
    device: torch.device,
    *,
    reference: str | None = None,  # statistics to compare with; None = of the training data, kept in `run_dir`
    run_dir: Path,
    batch: int,  # per process
    schedules: Mapping[str, dict[str, Any]],  # name -> arguments of generate_images, each measured on its own
    writing: bool = True,  # False = check everything, with two images for the reference, and write nothing
) -> Callable[[nn.Module, Encoder], dict[str, float]]:
    """Function of a network and its encoder that returns metrics by name, METRIC_SCHEDULE. Both are collective. Raises
    ValueError for unknown metrics, missing detectors, fewer than 2 images, and latents without statistics.
    """
    metrics = distributed.main_first(lambda: parse_metrics(names))
    if num < 2:
        raise ValueError(f"--eval-num must be at least 2, got {num}")
    detectors = distributed.main_first(lambda: {m.detector: load_detector(m.detector, device=device) for m in metrics})
    if reference is None:
        if dataset.num_channels not in (1, 3):
            raise ValueError("the data are latents: give statistics of the images in --eval-ref")
        shown = hashlib.sha256(f"{sorted(m.name for m in metrics)} {dataset.fingerprint()}".encode()).hexdigest()
        path = run_dir / f"eval-reference-{distributed.from_main(shown)[:8]}.npz"  # of these data, for these metrics
        there = distributed.from_main(path.exists())
        if not there:
            indices = np.random.default_rng(0).permutation(len(dataset))[: REFERENCE_IMAGES if writing else 2].tolist()
            collected = evaluate_dataset(dataset, metrics, detectors, indices=indices, batch=batch, device=device)
            if writing and distributed.is_main():
                path.parent.mkdir(parents=True, exist_ok=True)
                save_reference(path, collected)
            distributed.barrier()
        reference = str(path) if there or writing else None
    known = distributed.main_first(lambda: load_reference(reference)) if reference else None
    if known is not None:
        distributed.main_first(lambda: check_reference(metrics, known, detectors))

    def evaluate(net: nn.Module, encoder: Encoder) -> dict[str, float]:
        measured, seeds = {}, range(FIRST_SEED, FIRST_SEED + num)
        for name, sampling in schedules.items():
            found = evaluate_network(net, encoder, metrics, detectors, seeds, batch=batch, **sampling)
            values, _ = compute_metrics(metrics, found.collected, known)
            measured |= {f"{value.name}_{name}": value.value for value in values}
        return measured

    return evaluate
