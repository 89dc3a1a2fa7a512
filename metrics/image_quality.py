"""Image quality against a reference: PSNR, SSIM and LPIPS of images in [-1, 1], one value per image. All three see
images as a PNG would hold them, rounding aside: values outside [-1, 1] are clipped, and PSNR and SSIM are taken on [0,
1], (x + 1)/2. An image with values that are not finite gets NaN.
"""

import math
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from dnnlib import ROOT
from metrics.features.inception import full_precision_convolutions
from metrics.features.vgg import BACKBONE, BLOCKS, VGG16, WIDTHS
from metrics.features.weights import DetectorError, load_published

HEADS = ROOT / "assets" / "lpips" / "vgg-v0.1.safetensors"
VARIANTS = {"max": F.max_pool2d, "average": F.avg_pool2d}
SSIM_WINDOW, SSIM_STD, SSIM_K1, SSIM_K2 = 11, 1.5, 0.01, 0.03  # pixels, standard deviation, constants of the paper
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet's training images, RGB
LPIPS_MIN_SIZE = 2 ** (len(BLOCKS) - 1)  # pixels: each block but the first halves the image
_PIXELS_AT_ONCE = 8 * 256 * 256  # bounds the memory of LPIPS to about 1 GB, whatever the batch


def psnr(x: Tensor, y: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB, float64 [N], of images [N,C,H,W] in [-1,1]: -10·log10 of the mean squared error
    on [0,1] over channels and pixels; +inf for identical ones. Raises ValueError for images of other shapes or types.
    """
    x, y = _unit_range(x, y)
    return -10 * (x - y).square().mean(dim=(1, 2, 3)).log10()


def ssim(x: Tensor, y: Tensor) -> Tensor:
    """Structural similarity, float64 [N], of images [N,C,H,W] in [-1,1] of at least 11x11 pixels (Wang et al., "Image
    Quality Assessment: From Error Visibility to Structural Similarity", 2004), at full resolution on [0,1]; averaged
    over the positions where the Gaussian window lies inside the image, then over channels. Raises ValueError as `psnr`.
    """
    x, y = _unit_range(x, y)
    if min(x.shape[2:]) < SSIM_WINDOW:
        raise ValueError(f"SSIM needs images of at least {SSIM_WINDOW}x{SSIM_WINDOW} pixels, got {_size(x)}")
    window = [math.exp(-((i - SSIM_WINDOW // 2) ** 2) / (2 * SSIM_STD**2)) for i in range(SSIM_WINDOW)]
    window = [weight / sum(window) for weight in window]

    def local_mean(values: Tensor) -> Tensor:
        for dim in (2, 3):
            count = values.shape[dim] - SSIM_WINDOW + 1
            mean = values.narrow(dim, 0, count) * window[0]
            for i, weight in enumerate(window[1:], 1):
                mean.add_(values.narrow(dim, i, count), alpha=weight)
            values = mean
        return values

    mean_x, mean_y = local_mean(x), local_mean(y)
    var_x, var_y = local_mean(x * x) - mean_x**2, local_mean(y * y) - mean_y**2
    covariance = local_mean(x * y) - mean_x * mean_y
    c1, c2 = SSIM_K1**2, SSIM_K2**2
    luminance = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    return (luminance * (2 * covariance + c2) / (var_x + var_y + c2)).mean(dim=(1, 2, 3))


class LPIPS(nn.Module):
    """Learned perceptual image patch similarity, version 0.1, in the features of VGG16 (Zhang et al., "The Unreasonable
    Effectiveness of Deep Features as a Perceptual Metric", 2018). Smaller is more alike. `variant` says how VGG16
    pools: "max" as it was trained and as the metric was published; "average" as in piq's `LPIPS(replace_pooling=True)`,
    which the published tables of inverse problems use. Their values are not comparable, so state `name` with every
    figure. Raises ValueError for other variants.
    """

    def __init__(self, backbone: VGG16, variant: str = "max") -> None:
        super().__init__()
        if variant not in VARIANTS:
            raise ValueError(f"no LPIPS variant is called {variant!r}: use {' or '.join(VARIANTS)}")
        self.variant, self.name = variant, f"LPIPS-VGG v0.1, {variant} pooling"
        self.backbone = backbone
        try:
            heads = load_file(HEADS)  # lin0, lin1, ...: the weights float32 [C] of each block's channels
        except (OSError, SafetensorError) as error:
            raise DetectorError(f"cannot read the LPIPS heads {HEADS}: {error}") from None
        if {name: (*head.shape,) for name, head in heads.items()} != {f"lin{i}": (w,) for i, w in enumerate(WIDTHS)}:
            raise DetectorError(f"{HEADS} does not hold the LPIPS heads of VGG16")
        for name, values in {"mean": torch.tensor(_MEAN), "std": torch.tensor(_STD), **heads}.items():
            self.register_buffer(name, values.view(1, -1, 1, 1).to(next(backbone.parameters()).device))

    @torch.no_grad()
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Distances float64 [N] of images [N,3,H,W] in [-1,1], or grey [N,1,H,W], of at least 16x16 pixels, without
        gradients, in float32 on the network's own device. Raises ValueError for other sizes, shapes and types.
        """
        _check_images(x, y)
        if x.shape[1] not in (1, 3) or min(x.shape[2:]) < LPIPS_MIN_SIZE:
            needs = f"1 or 3 channels and at least {LPIPS_MIN_SIZE}x{LPIPS_MIN_SIZE} pixels"
            raise ValueError(f"LPIPS needs images of {needs}, got {x.shape[1]} channels and {_size(x)}")
        count = max(1, _PIXELS_AT_ONCE // (x.shape[2] * x.shape[3]))
        with full_precision_convolutions(), torch.autocast(self.mean.device.type, enabled=False):
            parts = [self._distances(a, b) for a, b in zip(x.split(count), y.split(count), strict=True)]
        return torch.cat(parts)

    def _distances(self, x: Tensor, y: Tensor) -> Tensor:
        x, y = self._network_input(x), self._network_input(y)
        pool = VARIANTS[self.variant]
        distances = []
        for block in range(len(BLOCKS)):
            if block:
                x, y = pool(x, 2), pool(y, 2)
            x, y = self.backbone.forward_block(block, x), self.backbone.forward_block(block, y)
            directions = [f / (torch.linalg.vector_norm(f, dim=1, keepdim=True) + 1e-10) for f in (x, y)]
            gap = directions[0].sub_(directions[1]).square_()
            local = (gap * self.get_buffer(f"lin{block}")).sum(dim=1)
            distances.append(_to_float64(local).mean(dim=(1, 2)))
        return sum(distances)

    def _network_input(self, images: Tensor) -> Tensor:
        x = _clip((images.to(self.mean.device, torch.float32) + 1) / 2)
        return (x.expand(-1, 3, -1, -1) - self.mean) / self.std


def load_lpips(
    path: str | Path | None = None, variant: str = "max", device: torch.device | str = "cpu", *, download: bool = True
) -> LPIPS:
    """Return LPIPS with the published backbone, found by `find_weights`; for both variants, give its `backbone` to a
    second `LPIPS`. Raises DetectorError (a ValueError), in one line, where the backbone is missing or not the right
    one.
    """
    lpips = LPIPS(VGG16(), variant)
    load_published(lpips.backbone, BACKBONE, path, ignored=("classifier.",), download=download)
    return lpips.to(device).eval()


def _unit_range(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    _check_images(x, y)
    x, y = _to_float64(x.detach()), _to_float64(y.detach())
    return _clip((x + 1) / 2), _clip((y.to(x.device) + 1) / 2)


def _check_images(x: Tensor, y: Tensor) -> None:
    fits = x.ndim == 4 and x.shape == y.shape and x.numel() and x.is_floating_point() and y.is_floating_point()
    if not fits:
        found = f"{x.dtype} {list(x.shape)} and {y.dtype} {list(y.shape)}"
        raise ValueError(f"image quality takes two float tensors of one shape [N,C,H,W] in [-1,1], got {found}")


def _to_float64(values: Tensor) -> Tensor:
    """In float64, on the CPU if the device (MPS) has none."""
    return values.cpu().double() if values.device.type == "mps" else values.double()


def _clip(values: Tensor) -> Tensor:
    """Clip to [0,1]; infinities become NaN instead of a valid colour."""
    return torch.where(values.isfinite(), values.clamp(0, 1), torch.nan)


def _size(x: Tensor) -> str:
    return f"{x.shape[3]}x{x.shape[2]}"
