"""Feature extractors: from uint8 images to the features that distances are taken in.

A detector is a module with `name`, `feature_dim` and `detector(images uint8 [N,C,H,W]) -> float32 [N,feature_dim]`;
one whose features lead to class logits also has `logits(features) -> [N,classes]`. `load_detector` builds those that
define a metric (`fid`, `fd_dinov2`, `fd_demo`); any other module is welcome under a name of its own.
"""

from __future__ import annotations

import json
import os
import re
import warnings
import zipfile
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dnnlib import ROOT
from dnnlib.files import file_sha256, open_regular, parse_json
from dnnlib.text import first_line
from metrics.features.weights import DetectorError, find_weights
from metrics.specs import KINDS

DEMO_CLASSIFIER = ROOT / "assets" / "demo" / "classifier.safetensors"
STANDARD_DETECTORS = ("fid", "fd_dinov2", "fd_demo")


@dataclass(frozen=True)
class LoadedDetector:
    """A detector and what identifies it in a report."""

    module: nn.Module
    name: str
    feature_dim: int
    sha256: str  # of its file of weights


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


class ScriptedDetector(nn.Module):
    """A TorchScript module from uint8 images to features [N,D], under the name that its file has or the user gives."""

    def __init__(self, script: torch.jit.ScriptModule, name: str) -> None:
        super().__init__()
        self.script, self.name = script, name
        self.feature_dim = 0  # found at the first batch

    def forward(self, images: Tensor) -> Tensor:
        """Features float32 [N,D] of uint8 images [N,C,H,W]. Raises ValueError where the module does not give that."""
        try:
            features = self.script(images)
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[-1]
            raise ValueError(f"detector {self.name} fails on uint8 images {list(images.shape)}: {reason}") from None
        if not isinstance(features, Tensor) or features.ndim != 2 or len(features) != len(images):
            shape = list(features.shape) if isinstance(features, Tensor) else type(features).__name__
            raise ValueError(f"detector {self.name} gives {shape} for {len(images)} images; features [N,D] are needed")
        self.feature_dim = features.shape[1]
        return features.to(torch.float32)


def load_detector(
    name: str,  # fid, fd_dinov2 or fd_demo
    path: str | os.PathLike[str] | None = None,  # its weights; None = found by $NCVSD_DETECTORS, or downloaded
    device: torch.device | str = "cpu",
) -> LoadedDetector:
    """Return a detector that defines a metric, in eval mode.

    Raises DetectorError (a ValueError) where its weights are missing or not the right ones, saying where to get them.
    """
    if name == "fd_demo":
        file = Path(path) if path is not None else DEMO_CLASSIFIER
        module: nn.Module = load_demo_classifier(file)
        digest = file_sha256(file)
    elif name == "fid":
        from metrics.features.inception import WEIGHTS, load_inception

        file = find_weights(WEIGHTS, path)
        module, digest = load_inception(file), file_sha256(file)
    elif name == "fd_dinov2":
        from metrics.features.dinov2 import load_dinov2

        module, digest = load_dinov2(path)
    else:
        raise DetectorError(f"no detector is called {name!r}: use {', '.join(STANDARD_DETECTORS)}, or give a file")
    module = module.eval().requires_grad_(False).to(device)
    return LoadedDetector(module, name, module.feature_dim, digest)


def load_custom_detector(
    path: str | os.PathLike[str], name: str | None = None, device: torch.device | str = "cpu"
) -> LoadedDetector:
    """Return a detector of one's own: a TorchScript file under `name` (default: the file's), or a safetensors file that
    states which detector it is (`detector` in its metadata), as the demo classifier's does.

    TorchScript is a program, in PyTorch's own language, and the only one that this project runs out of a file: name
    files that you trust. Raises DetectorError for other files, and for a name that belongs to a published metric.
    """
    file = Path(path)
    if not file.is_file():
        raise DetectorError(f"no detector file {path}")
    name = name or re.sub(r"\W+", "_", file.stem)
    if not re.fullmatch(r"\w+", name):
        raise DetectorError(f"a detector of your own cannot be called {name!r}: use letters, digits and _")
    if name in (*STANDARD_DETECTORS, "dinov2", "demo", *KINDS):
        raise DetectorError(f"a detector of your own cannot be called {name!r}, which means something else here")
    if file.suffix == ".safetensors":
        module: nn.Module = load_demo_classifier(file)
        module.name = name
    elif zipfile.is_zipfile(file):
        try:
            with warnings.catch_warnings():  # PyTorch's plans for TorchScript are no concern of the user's
                warnings.filterwarnings("ignore", r".*torch\.jit\.load", DeprecationWarning)
                module = ScriptedDetector(torch.jit.load(str(file), map_location="cpu"), name)
        except (RuntimeError, ValueError) as error:
            raise DetectorError(f"{file} is not a TorchScript module: {first_line(error)}") from None
    else:
        raise DetectorError(f"{file} is neither a TorchScript module nor a safetensors file")
    module = module.eval().requires_grad_(False).to(device)
    return LoadedDetector(module, name, module.feature_dim, file_sha256(file))


def save_demo_classifier(path: str | Path, classifier: DemoClassifier, facts: dict) -> None:
    """Write the classifier as safetensors with its training facts as metadata, atomically."""
    from safetensors.torch import save

    from dnnlib.files import atomic_write

    metadata = {
        "detector": classifier.name,
        "config": json.dumps({"resolution": classifier.resolution}),
        "training": json.dumps(facts),
    }
    with atomic_write(path) as file:
        file.write(save({k: v.contiguous() for k, v in classifier.state_dict().items()}, metadata))


def load_demo_classifier(path: str | Path = DEMO_CLASSIFIER, device: torch.device | str = "cpu") -> DemoClassifier:
    """Read the classifier, in eval mode. Raises DetectorError naming the file if it is missing or something else."""
    from safetensors import SafetensorError, safe_open

    try:
        with open_regular(path), safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
            weights = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise DetectorError(f"cannot read the demo classifier {path}: {error}") from None
    if metadata.get("detector") != DemoClassifier.name:
        raise DetectorError(f"{path} is not a {DemoClassifier.name} classifier")
    try:
        config = parse_json(metadata["config"])
        classifier = DemoClassifier(num_classes=len(weights["head.bias"]), resolution=int(config["resolution"]))
        classifier.load_state_dict(weights)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise DetectorError(f"the demo classifier {path} is damaged: {first_line(error)}") from None
    return classifier.eval().requires_grad_(False).to(device)
