"""Feature extractors: from uint8 images to the features that distances are taken in. A detector is a module with
`name`, `feature_dim` and `detector(images uint8 [N,C,H,W]) -> float32 [N,feature_dim]`; one whose features lead to
class logits also has `logits(features) -> [N,classes]`. `load_detector` builds those that define a metric (`fid`,
`fd_dinov2`, `fd_demo`); any other module is welcome under a name of its own.
"""

import re
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from dnnlib.files import PathLike, file_sha256
from dnnlib.text import first_line
from metrics.features.demo import DEMO_CLASSIFIER, load_demo_classifier
from metrics.features.dinov2 import load_dinov2
from metrics.features.inception import load_inception
from metrics.features.weights import DetectorError, is_torchscript
from metrics.kinds import DETECTORS, KINDS


@dataclass(frozen=True)
class LoadedDetector:
    """A detector and what identifies it in a report."""

    module: nn.Module
    name: str
    feature_dim: int
    sha256: str  # of its file of weights


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


def load_detector(name: str, path: PathLike | None = None, device: torch.device | str = "cpu") -> LoadedDetector:
    """Return a detector that defines a metric (fid, fd_dinov2 or fd_demo), in eval mode; None = weights are found by
    $NCVSD_DETECTORS, or downloaded. Raises DetectorError (a ValueError), saying where to get them.
    """
    if name not in DETECTORS:
        raise DetectorError(f"no detector is called {name!r}: use {', '.join(DETECTORS)}, or give a file")
    if name == "fd_demo":
        path = DEMO_CLASSIFIER if path is None else path
        module, digest = load_demo_classifier(path), file_sha256(path)
    else:
        module, digest = load_inception(path) if name == "fid" else load_dinov2(path)
    return LoadedDetector(module.eval().requires_grad_(False).to(device), name, module.feature_dim, digest)


def load_custom_detector(path: PathLike, name: str | None = None, device: torch.device | str = "cpu") -> LoadedDetector:
    """Return a detector of one's own: a TorchScript file under `name` (default: the file's), or a safetensors file that
    states which detector it is (`detector` in its metadata), as the demo classifier's does. TorchScript is a program,
    in PyTorch's own language, and the only one that this project runs out of a file: name files that you trust. Raises
    DetectorError for other files, and for a name that belongs to a published metric.
    """
    file = Path(path)
    if not file.is_file():
        raise DetectorError(f"no detector file {path or repr(path)}")
    name = re.sub(r"\W+", "_", file.stem) if name is None else name
    if not re.fullmatch(r"\w+", name):
        raise DetectorError(f"a detector of your own cannot be called {name!r}: use letters, digits and _")
    if name in (*DETECTORS, "dinov2", "demo", *KINDS):
        raise DetectorError(f"a detector of your own cannot be called {name!r}, which means something else here")
    if file.suffix == ".safetensors":
        module = load_demo_classifier(file)
        module.name = name
    elif is_torchscript(file):
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
