"""A small classifier of the embedded 16x16 images, whose features define `fd_demo`."""

from __future__ import annotations

import json
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from dnnlib import ROOT
from dnnlib.files import atomic_write, open_regular, parse_json
from dnnlib.text import first_line
from metrics.features.weights import DetectorError

DEMO_CLASSIFIER = ROOT / "assets" / "demo" / "classifier.safetensors"


class DemoClassifier(nn.Module):
    """A small convolutional classifier of the embedded 16x16 grey images; its pooled features define `fd_demo`.

    Distances in its features compare models on that data with one another and with nothing else: they are no FID.
    """

    name = "fd_demo"
    feature_dim = 128

    def __init__(self, num_classes: int = 10, resolution: int = 16) -> None:
        super().__init__()
        self.resolution = resolution
        widths = (32, 64, self.feature_dim)
        self.convs = nn.ModuleList(
            nn.Conv2d(a, b, 3, padding=1, bias=False) for a, b in zip((1, *widths), widths, strict=False)
        )
        self.norms = nn.ModuleList(nn.BatchNorm2d(b) for b in widths)
        self.head = nn.Linear(self.feature_dim, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Features float32 [N,128] of uint8 images [N,1,H,W]. Raises ValueError for any other shape or type."""
        expected = (1, self.resolution, self.resolution)
        if images.dtype != torch.uint8 or images.shape[1:] != expected:
            found = f"{images.dtype} {list(images.shape)}"
            raise ValueError(f"{self.name} takes uint8 images [N,{','.join(map(str, expected))}], got {found}")
        x = images.to(torch.float32) / 127.5 - 1
        for i, (conv, norm) in enumerate(zip(self.convs, self.norms, strict=True)):
            x = F.relu(norm(conv(x)))
            x = F.avg_pool2d(x, 2) if i < 2 else x.mean(dim=(2, 3))
        return x

    def logits(self, features: Tensor) -> Tensor:
        """Class logits [N,num_classes] of features [N,128]."""
        return self.head(features)


def save_demo_classifier(path: str | Path, classifier: DemoClassifier, facts: dict) -> None:
    """Write the classifier as safetensors with its training facts as metadata, atomically."""
    metadata = {
        "detector": classifier.name,
        "config": json.dumps({"resolution": classifier.resolution}),
        "training": json.dumps(facts),
    }
    with atomic_write(path) as file:
        file.write(save({k: v.contiguous() for k, v in classifier.state_dict().items()}, metadata))


def load_demo_classifier(path: str | Path = DEMO_CLASSIFIER, device: torch.device | str = "cpu") -> DemoClassifier:
    """Read the classifier, in eval mode. Raises DetectorError naming the file if it is missing or something else."""
    try:
        with open_regular(path), safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
            weights = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise DetectorError(f"cannot read the demo classifier {path or repr(path)}: {reason}") from None
    if metadata.get("detector") != DemoClassifier.name:
        raise DetectorError(f"{path} is not a {DemoClassifier.name} classifier")
    try:
        config = parse_json(metadata["config"])
        classifier = DemoClassifier(num_classes=len(weights["head.bias"]), resolution=int(config["resolution"]))
        classifier.load_state_dict(weights)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise DetectorError(f"the demo classifier {path} is damaged: {first_line(error)}") from None
    return classifier.eval().requires_grad_(False).to(device)
