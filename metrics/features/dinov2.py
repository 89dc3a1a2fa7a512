"""DINOv2 features of images (Oquab et al. 2023, arXiv 2304.07193), in which `fd_dinov2` is measured. The detector is
that of Stein et al. (2023, arXiv 2306.04675) and of EDM2 (arXiv 2312.02696): ViT-L/14 at 224 pixels, class token after
the last layer norm. The network comes from the optional package transformers, its weights from a safetensors file; no
configuration, code or pickle is read from the place that the weights come from.
"""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dnnlib.files import PathLike, file_sha256
from dnnlib.text import first_line
from metrics.features.weights import FOLDER_VARIABLE, DetectorError

HUB_ID = "facebook/dinov2-large"
WEIGHTS_FILE = "model.safetensors"
IMAGE_SIZE = 224  # pixels; 16 x 16 patches
# The published network; its positions were trained for 518 pixels, 37 x 37 patches.
VIT_L14 = dict(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, image_size=518, patch_size=14)
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet's training images, RGB
_ADVICE = (
    f"get {WEIGHTS_FILE} (1.2 GB) with: hf download {HUB_ID} {WEIGHTS_FILE} --local-dir FOLDER, and keep FOLDER as "
    f"dinov2-large in the folder named by the environment variable {FOLDER_VARIABLE}, or name FOLDER with "
    "--detector-path where the script has that option"
)


def prepare_images(images: Tensor) -> Tensor:
    """Network inputs float32 [N,3,224,224] of uint8 images [N,C,H,W], C = 1 (grey) or 3 (RGB), of any size. Bicubic
    resize, antialiased and not rounded, then (x/255 - mean)/std with ImageNet's mean and standard deviation. Raises
    ValueError for any other shape or type.
    """
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] not in (1, 3) or 0 in images.shape:
        found = f"{images.dtype} {list(images.shape)}"
        raise ValueError(f"{DINOv2.name} takes uint8 images [N,C,H,W] with 1 or 3 channels, got {found}")
    x = F.interpolate(images.to(torch.float32), (IMAGE_SIZE, IMAGE_SIZE), mode="bicubic", antialias=True)
    mean, std = (torch.tensor(v, device=x.device).view(1, 3, 1, 1) for v in (_MEAN, _STD))
    return (x.expand(-1, 3, -1, -1) / 255 - mean) / std


def resize_positions(positions: Tensor, size: int) -> Tensor:
    """Position embeddings [1,1+M·M,D], class token first, for a grid of size x size patches: float32 [1,1+size²,D]. As
    in the original network: bicubic with the scale (size + 0.1)/M in place of size/M, so that output i is read at (i +
    0.5)·M/(size + 0.1) - 0.5; not antialiased. A grid that has this size already is returned as it is. Raises
    ValueError where the grid is not square.
    """
    positions, count = positions.to(torch.float32), positions.shape[1] - 1
    m = round(count**0.5)
    if m * m != count:
        raise ValueError(f"{count} position embeddings do not form a square grid")
    if m == size:
        return positions
    grid = positions[:, 1:].unflatten(1, (m, m)).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, scale_factor=(size + 0.1) / m, mode="bicubic", align_corners=False)
    return torch.cat([positions[:, :1], grid.flatten(2).transpose(1, 2)], dim=1)


class DINOv2(nn.Module):
    """Class token of a DINOv2 transformer after its last layer norm. Takes over a `transformers.Dinov2Model`, given
    the position embeddings of the 224-pixel grid: transformers would interpolate them with the scale 16/37, which
    shifts features away from the original network's.
    """

    name = "fd_dinov2"

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model.eval().requires_grad_(False).to(torch.float32)
        self.feature_dim = int(model.config.hidden_size)  # 1024 for ViT-L/14
        trained = model.embeddings.position_embeddings.detach()
        grid = resize_positions(trained, IMAGE_SIZE // int(model.config.patch_size))
        model.embeddings.position_embeddings = nn.Parameter(grid, requires_grad=False)

    def forward(self, images: Tensor) -> Tensor:
        """Features float32 [N,feature_dim] of uint8 images [N,C,H,W], C = 1 or 3. Raises ValueError for others."""
        return self.model(prepare_images(images)).last_hidden_state[:, 0].to(torch.float32)


def load_dinov2(source: PathLike | None = None, *, architecture: Mapping[str, Any] = VIT_L14) -> tuple[DINOv2, str]:
    """Return the detector and the SHA-256 of its weight file: `source` is that file, its folder, or a Hub id
    owner/name[@revision]; by default dinov2-large/model.safetensors in the folder $NCVSD_DETECTORS, or else
    `facebook/dinov2-large`. Raises DetectorError (a ValueError), with how to get the file, where it is missing, damaged
    or of another network, and where transformers is not installed.
    """
    try:
        from transformers import Dinov2Config, Dinov2Model
        from transformers.utils import logging
    except ImportError:
        raise DetectorError(f"{DINOv2.name} needs the package transformers: pip install 'transformers>=4.57'") from None
    path = _find_weights(source)
    verbosity, progress = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)  # the one-line errors below say it all
    logging.disable_progress_bar()
    try:
        digest = file_sha256(path)
        weights = safetensors.torch.load_file(path)
        config = Dinov2Config(**architecture, attn_implementation="sdpa")
        model, report = Dinov2Model.from_pretrained(None, config=config, state_dict=weights, output_loading_info=True)
    except Exception as error:  # OSError, SafetensorError, and what transformers raises for shapes that do not fit
        raise DetectorError(f"{DINOv2.name}: cannot read the weights {path}: {first_line(error)}") from None
    finally:
        logging.set_verbosity(verbosity)
        if progress:
            logging.enable_progress_bar()
    missing, unknown = len(report["missing_keys"]), len(report["unexpected_keys"])
    if missing or unknown:
        found = f"{missing} of this one's weights are missing, {unknown} are unknown"
        raise DetectorError(f"{DINOv2.name}: {path} holds another network: {found}; {_ADVICE}")
    return DINOv2(model), digest


def _find_weights(source: PathLike | None) -> Path:
    if source is None:
        folder = os.environ.get(FOLDER_VARIABLE)
        own = Path(folder or "").expanduser() / "dinov2-large" / WEIGHTS_FILE
        source = own if folder and own.is_file() else HUB_ID
    source = os.fspath(source)
    path = Path(source).expanduser()
    if path.is_dir() and not (path / WEIGHTS_FILE).is_file():
        raise DetectorError(f"{DINOv2.name}: the folder {path} holds no {WEIGHTS_FILE}; {_ADVICE}")
    if path.exists():
        return path / WEIGHTS_FILE if path.is_dir() else path
    match = re.fullmatch(r"(\w[\w.-]*/\w[\w.-]*)(?:@([\w./-]+))?", source)
    if match is None or source.endswith((".safetensors", ".bin", ".pth", ".pt")):
        raise DetectorError(f"{DINOv2.name}: no file or folder {source}; {_ADVICE}")
    import huggingface_hub

    try:
        return Path(huggingface_hub.hf_hub_download(match[1], WEIGHTS_FILE, revision=match[2]))
    except Exception as error:  # the Hub's client, its HTTP library and its cache have no common error
        reason = f"is neither a folder here nor reachable on the Hub ({first_line(error)})"
        raise DetectorError(f"{DINOv2.name}: {source} {reason}; {_ADVICE}") from None
