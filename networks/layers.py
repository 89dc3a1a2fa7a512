"""Magnitude-preserving primitives of EDM2 ("config G", arXiv 2312.02696)."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MP_SILU_GAIN = 1 / 0.596


def normalize(x: Tensor, dims: Sequence[int] | None = None, eps: float = 1e-4) -> Tensor:
    """Scale groups of `x` over `dims` (None = all but the first) to unit root-mean-square (EDM2, Eq. 65-66)."""
    group = tuple(dims or range(1, x.ndim))
    length = torch.linalg.vector_norm(x, dim=group, keepdim=True, dtype=torch.float32)
    rms = length * math.prod(x.shape[d] for d in group) ** -0.5
    return x * (1 / (rms + eps)).to(x.dtype)


def mp_silu(x: Tensor) -> Tensor:
    """SiLU scaled to keep unit magnitude on unit-variance input (EDM2, Eq. 81)."""
    return F.silu(x) * MP_SILU_GAIN


def mp_sum_weights(t: float) -> tuple[float, float]:
    """Factors of `a` and `b` in the magnitude-preserving sum (EDM2, Eq. 88)."""
    scale = math.hypot(1 - t, t)
    return (1 - t) / scale, t / scale


def mp_sum(a: Tensor, b: Tensor, t: float | Tensor = 0.5) -> Tensor:
    """Blend of uncorrelated `a` and `b` that preserves magnitude (EDM2, Eq. 88). A tensor `t` receives gradients."""
    if isinstance(t, Tensor):
        return (a * (1 - t) + b * t) / ((1 - t) ** 2 + t**2).sqrt()
    weight_a, weight_b = mp_sum_weights(t)
    return torch.add(a * weight_a, b, alpha=weight_b)


def mp_cat(a: Tensor, b: Tensor, t: float = 0.5) -> Tensor:
    """Channel concatenation in which the inputs contribute in the ratio (1-t):t (EDM2, Eq. 103)."""
    n_a, n_b = a.shape[1], b.shape[1]
    c = math.sqrt((n_a + n_b) / ((1 - t) ** 2 + t**2))
    return torch.cat([a * (c * (1 - t) / math.sqrt(n_a)), b * (c * t / math.sqrt(n_b))], dim=1)


def resample(x: Tensor, mode: str = "keep", filter_taps: Sequence[float] = (1, 1)) -> Tensor:
    """Halve ('down') or double ('up') the resolution of [N,C,H,W] with a separable filter, or 'keep' it."""
    if mode == "keep":
        return x
    if len(filter_taps) % 2 != 0:
        raise ValueError(f"resample filter must have an even number of taps, got {list(filter_taps)}")
    if len(filter_taps) == 2 and filter_taps[0] == filter_taps[1]:  # equal to what is below, and much faster on CPU
        return F.avg_pool2d(x, 2) if mode == "down" else F.interpolate(x, scale_factor=2, mode="nearest")
    taps = torch.tensor(filter_taps, dtype=torch.float64) / sum(filter_taps)
    kernel = torch.outer(taps, taps).to(x.device, x.dtype).expand(x.shape[1], 1, -1, -1)
    options = dict(stride=2, padding=(len(filter_taps) - 1) // 2, groups=x.shape[1])
    return F.conv2d(x, kernel, **options) if mode == "down" else F.conv_transpose2d(x, kernel * 4, **options)


class MPFourier(nn.Module):
    """Random Fourier features of a scalar, [N] to [N,num_channels] (EDM2, Eq. 75). `freqs` and `phases` are buffers."""

    def __init__(self, num_channels: int) -> None:
        super().__init__()
        self.register_buffer("freqs", 2 * math.pi * torch.randn(num_channels))
        self.register_buffer("phases", 2 * math.pi * torch.rand(num_channels))

    def forward(self, x: Tensor) -> Tensor:
        angle = torch.outer(x.to(torch.float32), self.freqs.to(torch.float32)) + self.phases.to(torch.float32)
        return (angle.cos() * math.sqrt(2)).to(x.dtype)


class MPConv(nn.Module):
    """Bias-free convolution, or linear layer for kernel [], whose filters count by direction only (EDM2, Eq. 47). Where
    `forced` (EDM2, Eq. 66) a training-mode forward pass first stores the normalised weight, without gradient.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel: Sequence[int] = ()) -> None:
        super().__init__()
        self.forced = True
        self.fan_in = in_channels * math.prod(kernel)
        self.padding = tuple(size // 2 for size in kernel)
        self.weight = nn.Parameter(torch.randn(out_channels, in_channels, *kernel))

    def forward(self, x: Tensor, gain: float | Tensor = 1.0) -> Tensor:
        """[N,in_channels,...] to [N,out_channels,...]; uncorrelated inputs of unit variance keep it, times `gain`."""
        if self.training and self.forced:
            with torch.no_grad():
                self.weight.copy_(normalize(self.weight.to(torch.float32)))
        weight = (normalize(self.weight.to(torch.float32)) * (gain * self.fan_in**-0.5)).to(x.dtype)
        return F.conv2d(x, weight, padding=self.padding) if self.padding else F.linear(x, weight)
