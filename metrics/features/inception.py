"""Inception-v3 features, the space in which the Fréchet inception distance is defined.

The network is the TensorFlow graph `inception-2015-12-05` (Szegedy et al., "Rethinking the Inception Architecture for
Computer Vision", 2015), which FID (Heusel et al., "GANs Trained by a Two Time-Scale Update Rule Converge to a Local
Nash Equilibrium", 2017) is tied to: other weights, another resize or other pooling give numbers that compare with none.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metrics.features.weights import WeightFile, load_published

WEIGHTS = WeightFile(
    name="pt_inception-2015-12-05-6726825d.pth",
    url="https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth",
    size="about 96 MB",
    sha256_prefix="6726825d",  # the file's name says it
)

Layer = tuple[int, tuple[int, int]]  # output channels, kernel (height, width)
POINT, SQUARE, WIDE, ROW, COLUMN = (1, 1), (3, 3), (5, 5), (1, 7), (7, 1)
FORK = (1, 3), (3, 1)  # kernels of the two convolutions side by side at the end of a branch


def resize_bilinear_tf1(images: Tensor, size: int) -> Tensor:
    """Resize images [N,C,H,W] to float32 [N,C,size,size] as TensorFlow 1's `resize_bilinear` does by default.

    Output pixel i lies at source coordinate i * in / out (corners not aligned, no half-pixel centres), and the two
    pixels next to it are interpolated, whatever the scale: there is no antialiasing. The second is clamped to the edge.
    """
    images = images.to(torch.float32)
    for dim in (3, 2):
        length = images.shape[dim]
        position = torch.arange(size, dtype=torch.float32) * (length / size)
        lower = position.long().clamp(max=length - 1)
        shape = [-1 if d == dim else 1 for d in range(4)]
        weight = (position - lower).view(shape).to(images.device)
        left = images.index_select(dim, lower.to(images.device))
        right = images.index_select(dim, (lower + 1).clamp(max=length - 1).to(images.device))
        images = left + (right - left) * weight
    return images


class ConvNorm(nn.Module):
    """Convolution without bias, batch normalisation, ReLU; "same" padding at stride 1 unless `valid`."""

    def __init__(self, c_in: int, layer: Layer, stride: int = 1, valid: bool = False) -> None:
        super().__init__()
        c_out, kernel = layer
        padding = (0, 0) if valid or stride > 1 else (kernel[0] // 2, kernel[1] // 2)
        self.conv = nn.Conv2d(c_in, c_out, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(c_out, eps=0.001)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)), inplace=True)

    def fold(self) -> None:
        """Move the normalisation of eval mode into the convolution: the same function in one pass over memory."""
        scale = self.bn.weight.double() / (self.bn.running_var.double() + self.bn.eps).sqrt()
        bias = self.bn.bias.double() - self.bn.running_mean.double() * scale
        weight = self.conv.weight.double() * scale.view(-1, 1, 1, 1)
        self.conv.weight = nn.Parameter(weight.to(self.conv.weight), requires_grad=False)
        self.conv.bias = nn.Parameter(bias.to(self.conv.weight), requires_grad=False)
        self.bn = nn.Identity()


class Mixed(nn.Module):
    """Inception block: branches of convolutions and a pooled copy of the input, concatenated in channels.

    The convolutions of a branch are `name_1`, `name_2`, ..., or plain `name` if there is only one. A 3x3 branch may
    end in a fork: two convolutions of the same tensor, say `name_3a` and `name_3b`, whose outputs are both kept.
    """

    def __init__(
        self,
        c_in: int,
        branches: dict[str, list[Layer]],
        *,
        fork: int = 0,  # channels of each convolution of the fork that ends the 3x3 branches; 0 = no fork
        pool: str = "average",  # "average" leaves the padding out of the count; or "max"
        pool_width: int = 0,  # channels of the projection of the pooled input; 0 = no projection
        stride: int = 1,  # of the last convolution of each branch and of the pool
    ) -> None:
        super().__init__()
        self.paths: list[list[list[str]]] = []  # per branch and depth, the names of the convolutions side by side
        self.pool, self.stride = pool, stride
        for name, layers in branches.items():
            steps = [{"": layer} for layer in layers]
            if fork and name.startswith("branch3x3"):
                steps.append({letter: (fork, kernel) for letter, kernel in zip("ab", FORK, strict=True)})
            path: list[list[str]] = []
            width = c_in
            for depth, step in enumerate(steps, 1):
                stem = f"{name}_{depth}" if len(steps) > 1 else name
                for letter, layer in step.items():
                    self.add_module(stem + letter, ConvNorm(width, layer, stride if depth == len(steps) else 1))
                path.append([stem + letter for letter in step])
                width = next(iter(step.values()))[0]
            self.paths.append(path)
        if pool_width:
            self.branch_pool = ConvNorm(c_in, (pool_width, POINT))

    def forward(self, x: Tensor) -> Tensor:
        outputs = []
        for path in self.paths:
            parts = [x]
            for names in path:
                parts = [getattr(self, name)(parts[0]) for name in names]
            outputs += parts
        padding = 1 if self.stride == 1 else 0
        if self.pool == "max":
            pooled = F.max_pool2d(x, 3, self.stride, padding)
        else:
            pooled = F.avg_pool2d(x, 3, self.stride, padding, count_include_pad=False)
        outputs.append(self.branch_pool(pooled) if hasattr(self, "branch_pool") else pooled)
        return torch.cat(outputs, dim=1)


def _block_a(c_in: int, pool_width: int) -> Mixed:
    branches = {
        "branch1x1": [(64, POINT)],
        "branch5x5": [(48, POINT), (64, WIDE)],
        "branch3x3dbl": [(64, POINT), (96, SQUARE), (96, SQUARE)],
    }
    return Mixed(c_in, branches, pool_width=pool_width)


def _block_b(c_in: int) -> Mixed:
    branches = {"branch3x3": [(384, SQUARE)], "branch3x3dbl": [(64, POINT), (96, SQUARE), (96, SQUARE)]}
    return Mixed(c_in, branches, pool="max", stride=2)


def _block_c(c_in: int, width: int) -> Mixed:
    branches = {
        "branch1x1": [(192, POINT)],
        "branch7x7": [(width, POINT), (width, ROW), (192, COLUMN)],
        "branch7x7dbl": [(width, POINT), (width, COLUMN), (width, ROW), (width, COLUMN), (192, ROW)],
    }
    return Mixed(c_in, branches, pool_width=192)


def _block_d(c_in: int) -> Mixed:
    branches = {
        "branch3x3": [(192, POINT), (320, SQUARE)],
        "branch7x7x3": [(192, POINT), (192, ROW), (192, COLUMN), (192, SQUARE)],
    }
    return Mixed(c_in, branches, pool="max", stride=2)


def _block_e(c_in: int, pool: str) -> Mixed:
    branches = {
        "branch1x1": [(320, POINT)],
        "branch3x3": [(384, POINT)],
        "branch3x3dbl": [(448, POINT), (384, SQUARE)],
    }
    return Mixed(c_in, branches, fork=384, pool=pool, pool_width=192)


class InceptionV3(nn.Module):
    """Inception-v3 of 2015-12-05 as a fixed feature extractor, always in eval mode and in float32.

    Its state dict has the keys of the public PyTorch port, `WEIGHTS`, until `fold_batch_norm` is called.
    """

    name = "fid"
    feature_dim = 2048
    num_classes = 1008
    resolution = 299

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = ConvNorm(3, (32, SQUARE), stride=2)
        self.Conv2d_2a_3x3 = ConvNorm(32, (32, SQUARE), valid=True)
        self.Conv2d_2b_3x3 = ConvNorm(32, (64, SQUARE))
        self.Conv2d_3b_1x1 = ConvNorm(64, (80, POINT))
        self.Conv2d_4a_3x3 = ConvNorm(80, (192, SQUARE), valid=True)
        self.Mixed_5b = _block_a(192, 32)
        self.Mixed_5c = _block_a(256, 64)
        self.Mixed_5d = _block_a(288, 64)
        self.Mixed_6a = _block_b(288)
        self.Mixed_6b = _block_c(768, 128)
        self.Mixed_6c = _block_c(768, 160)
        self.Mixed_6d = _block_c(768, 160)
        self.Mixed_6e = _block_c(768, 192)
        self.Mixed_7a = _block_d(768)
        self.Mixed_7b = _block_e(1280, "average")
        self.Mixed_7c = _block_e(2048, "max")
        self.fc = nn.Linear(self.feature_dim, self.num_classes)
        self.eval().requires_grad_(False)

    def train(self, mode: bool = True) -> InceptionV3:
        """Stay in eval mode: batch statistics would make the features of an image depend on its neighbours."""
        return super().train(False)

    def forward(self, images: Tensor) -> Tensor:
        """Features float32 [N,2048] of uint8 images [N,3,H,W] in 0..255, or [N,1,H,W], whose grey fills all channels.

        Raises ValueError for any other type or shape.
        """
        fits = images.ndim == 4 and images.shape[1] in (1, 3) and min(images.shape[2:]) > 0
        if images.dtype != torch.uint8 or not fits:
            found = f"{images.dtype} {list(images.shape)}"
            raise ValueError(f"{self.name} takes uint8 images [N,3,H,W] or [N,1,H,W], got {found}")
        x = (resize_bilinear_tf1(images, self.resolution) - 128) / 128
        x = x.expand(-1, 3, -1, -1).contiguous(memory_format=torch.channels_last)
        with full_precision_convolutions():
            x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
            x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(F.max_pool2d(x, 3, 2)))
            x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(F.max_pool2d(x, 3, 2))))
            x = self.Mixed_6e(self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x)))))
            x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(x)))
        return x.mean(dim=(2, 3))

    def logits(self, features: Tensor) -> Tensor:
        """Class logits [N,1008] of features [N,2048], without the bias of the last layer.

        The inception score (Salimans et al., "Improved Techniques for Training GANs", 2016) takes the softmax of these:
        its reference code multiplies by the weight alone, and torch-fidelity follows it (`logits_unbiased`).
        """
        return F.linear(features, self.fc.weight)

    def fold_batch_norm(self) -> InceptionV3:
        """Fold every batch normalisation into its convolution, in place: faster, the same to about 1e-6 relative.

        The state dict changes its keys, so load weights first.
        """
        for module in self.modules():
            if isinstance(module, ConvNorm):
                module.fold()
        return self


@contextmanager
def full_precision_convolutions() -> Iterator[None]:
    """Keep cuDNN from rounding float32 convolutions to TF32 within the block."""
    allowed = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = allowed


def load_inception(
    path: str | os.PathLike[str] | None = None,  # the file or its folder; None = as `find_weights` finds it
    device: torch.device | str = "cpu",
    *,
    fold: bool = True,  # call `fold_batch_norm`
) -> tuple[InceptionV3, str]:
    """Return a network ready for use, with the weights of the public PyTorch port, and the SHA-256 of their file.

    The auxiliary classifier in the file (`AuxLogits.*`) plays no part in the features and is passed over. Raises
    DetectorError (a ValueError) where the file is missing, damaged or another one.
    """
    net = InceptionV3()
    digest = load_published(net, WEIGHTS, path, ignored=("AuxLogits.",))
    if fold:
        net.fold_batch_norm()
    return net.to(device, memory_format=torch.channels_last), digest
