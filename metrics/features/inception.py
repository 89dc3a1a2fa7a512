"""Inception-v3 features, the space in which the Fréchet inception distance is defined. The network is the TensorFlow
graph `inception-2015-12-05` (Szegedy et al., "Rethinking the Inception Architecture for Computer Vision", 2015), which
FID (Heusel et al., "GANs Trained by a Two Time-Scale Update Rule Converge to a Local Nash Equilibrium", 2017) is tied
to: other weights, another resize or other pooling give numbers that compare with none.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dnnlib.files import PathLike
from metrics.features.weights import WeightFile, load_published

WEIGHTS = WeightFile(
    name="pt_inception-2015-12-05-6726825d.pth",
    url="https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth",
    size="about 96 MB",
    sha256_prefix="6726825d",  # the file's name says it
)

Layer = tuple[int, tuple[int, int]]  # output channels, kernel (height, width)
POINT, SQUARE, WIDE, ROW, COLUMN = (1, 1), (3, 3), (5, 5), (1, 7), (7, 1)
FORK = (384, (1, 3)), (384, (3, 1))  # two convolutions of the same tensor, side by side at the end of a branch
DOUBLE = [(64, POINT), (96, SQUARE), (96, SQUARE)]
BLOCK_A = {"branch1x1": [(64, POINT)], "branch5x5": [(48, POINT), (64, WIDE)], "branch3x3dbl": DOUBLE}
BLOCK_B = {"branch3x3": [(384, SQUARE)], "branch3x3dbl": DOUBLE}
BLOCK_D = {
    "branch3x3": [(192, POINT), (320, SQUARE)],
    "branch7x7x3": [(192, POINT), (192, ROW), (192, COLUMN), (192, SQUARE)],
}
BLOCK_E = {
    "branch1x1": [(320, POINT)],
    "branch3x3": [(384, POINT), FORK],
    "branch3x3dbl": [(448, POINT), (384, SQUARE), FORK],
}


def _block_c(width: int) -> dict[str, list[Layer]]:
    return {
        "branch1x1": [(192, POINT)],
        "branch7x7": [(width, POINT), (width, ROW), (192, COLUMN)],
        "branch7x7dbl": [(width, POINT), (width, COLUMN), (width, ROW), (width, COLUMN), (192, ROW)],
    }


def resize_bilinear_tf1(images: Tensor, size: int) -> Tensor:
    """Resize images [N,C,H,W] to float32 [N,C,size,size] as TensorFlow 1's `resize_bilinear` does by default. Output
    pixel i lies at source coordinate i·in/out (corners not aligned, no half-pixel centres); the two pixels next to it
    are interpolated, the second clamped to the edge, whatever the scale: there is no antialiasing.
    """
    images = images.to(torch.float32)
    for dim in (3, 2):
        length = images.shape[dim]
        position = torch.arange(size, dtype=torch.float32) * (length / size)
        lower = position.long().clamp(max=length - 1)
        weight = (position - lower).view(-1, *[1] * (3 - dim)).to(images.device)
        pair = lower, (lower + 1).clamp(max=length - 1)
        left, right = (images.index_select(dim, index.to(images.device)) for index in pair)
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


class Mixed(nn.Module):
    """Inception block: branches, each of Layers and FORKs in turn, and a pooled copy of the input (projected to
    `pool_width` channels unless that is 0), concatenated in channels. The pool is "max", or "average", which leaves the
    padding out; `stride` is its own and each branch's last. The convolutions of a branch are `name_1`, `name_2`, ...,
    or plain `name` if there is only one; those of a fork `name_3a` and `name_3b`, say.
    """

    def __init__(
        self, c_in: int, branches: dict[str, list], *, pool: str = "average", pool_width: int = 0, stride: int = 1
    ) -> None:
        super().__init__()
        self.paths: list[list[list[str]]] = []  # per branch and depth, the names of the convolutions side by side
        self.pool, self.stride = pool, stride
        for name, steps in branches.items():
            path, width = [], c_in
            for depth, step in enumerate(steps, 1):
                stem = f"{name}_{depth}" if len(steps) > 1 else name
                layers = {f"{stem}a": step[0], f"{stem}b": step[1]} if step is FORK else {stem: step}
                for key, layer in layers.items():
                    self.add_module(key, ConvNorm(width, layer, stride if depth == len(steps) else 1))
                path.append(list(layers))
                width = step[0]
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
        window = dict(kernel_size=3, stride=self.stride, padding=1 if self.stride == 1 else 0)
        pooled = F.max_pool2d(x, **window) if self.pool == "max" else F.avg_pool2d(x, **window, count_include_pad=False)
        outputs.append(self.branch_pool(pooled) if hasattr(self, "branch_pool") else pooled)
        return torch.cat(outputs, dim=1)


class InceptionV3(nn.Module):
    """Inception-v3 of 2015-12-05 as a feature extractor, in eval mode and in float32. Its state dict has the keys of
    the public PyTorch port, `WEIGHTS`, until `fold_batch_norm` is called.
    """

    name = "fid"
    feature_dim = 2048

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = ConvNorm(3, (32, SQUARE), stride=2)
        self.Conv2d_2a_3x3 = ConvNorm(32, (32, SQUARE), valid=True)
        self.Conv2d_2b_3x3 = ConvNorm(32, (64, SQUARE))
        self.Conv2d_3b_1x1 = ConvNorm(64, (80, POINT))
        self.Conv2d_4a_3x3 = ConvNorm(80, (192, SQUARE), valid=True)
        self.Mixed_5b = Mixed(192, BLOCK_A, pool_width=32)
        self.Mixed_5c = Mixed(256, BLOCK_A, pool_width=64)
        self.Mixed_5d = Mixed(288, BLOCK_A, pool_width=64)
        self.Mixed_6a = Mixed(288, BLOCK_B, pool="max", stride=2)
        self.Mixed_6b = Mixed(768, _block_c(128), pool_width=192)
        self.Mixed_6c = Mixed(768, _block_c(160), pool_width=192)
        self.Mixed_6d = Mixed(768, _block_c(160), pool_width=192)
        self.Mixed_6e = Mixed(768, _block_c(192), pool_width=192)
        self.Mixed_7a = Mixed(768, BLOCK_D, pool="max", stride=2)
        self.Mixed_7b = Mixed(1280, BLOCK_E, pool_width=192)
        self.Mixed_7c = Mixed(2048, BLOCK_E, pool="max", pool_width=192)
        self.fc = nn.Linear(self.feature_dim, 1008)
        self.eval().requires_grad_(False)

    def train(self, mode: bool = True) -> "InceptionV3":
        """Stay in eval mode: batch statistics would make the features of an image depend on its neighbours."""
        return super().train(False)

    def forward(self, images: Tensor) -> Tensor:
        """Features float32 [N,2048] of uint8 images [N,3,H,W], or grey [N,1,H,W]. Raises ValueError for any others."""
        found = f"{images.dtype} {list(images.shape)}"
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] not in (1, 3) or 0 in images.shape[1:]:
            raise ValueError(f"{self.name} takes uint8 images [N,3,H,W] or [N,1,H,W], got {found}")
        x = (resize_bilinear_tf1(images, 299) - 128) / 128
        x = x.expand(-1, 3, -1, -1).contiguous(memory_format=torch.channels_last)
        with full_precision_convolutions():
            x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
            x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(F.max_pool2d(x, 3, 2)))
            x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(F.max_pool2d(x, 3, 2))))
            x = self.Mixed_6e(self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x)))))
            x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(x)))
        return x.mean(dim=(2, 3))

    def logits(self, features: Tensor) -> Tensor:
        """Class logits [N,1008] of features [N,2048], without the bias of the last layer: the reference code of the
        inception score multiplies by the weight alone, and torch-fidelity follows it (`logits_unbiased`).
        """
        return F.linear(features, self.fc.weight)

    def fold_batch_norm(self) -> "InceptionV3":
        """Fold every batch normalisation into its convolution, in place: faster, the same to about 1e-6 relative. The
        state dict changes its keys, so load weights first.
        """
        for module in [module for module in self.modules() if isinstance(module, ConvNorm)]:
            conv, bn = module.conv, module.bn
            scale = bn.weight.double() / (bn.running_var.double() + bn.eps).sqrt()
            weight = conv.weight.double() * scale.view(-1, 1, 1, 1)
            bias = bn.bias.double() - bn.running_mean.double() * scale
            conv.weight = nn.Parameter(weight.to(conv.weight), requires_grad=False)
            conv.bias = nn.Parameter(bias.to(conv.weight), requires_grad=False)
            module.bn = nn.Identity()
        return self


@contextmanager
def full_precision_convolutions() -> Iterator[None]:
    """Keep cuDNN from rounding float32 convolutions to TF32 within the block."""
    allowed, torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.allow_tf32, False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = allowed


def load_inception(path: PathLike | None = None, *, fold: bool = True) -> tuple[InceptionV3, str]:
    """Return a network with the weights of the public PyTorch port, found by `find_weights`, and the SHA-256 of their
    file, whose auxiliary classifier (`AuxLogits.*`) is passed over. Raises DetectorError.
    """
    net = InceptionV3()
    digest = load_published(net, WEIGHTS, path, ignored=("AuxLogits.",))
    return (net.fold_batch_norm() if fold else net).to(memory_format=torch.channels_last), digest
