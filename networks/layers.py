"""Magnitude-preserving primitives of EDM2 ("config G", arXiv 2312.02696) and the U-Net block made of them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel


def normalize(x: Tensor, dims: Sequence[int] | None = None, eps: float = 1e-4) -> Tensor:
    """Scale each group of `x` to unit root-mean-square (EDM2, Eq. 65-66).

    dims are the dimensions of one group; None means all but the first. The magnitude is taken in float32.
    """
    group = tuple(dims or range(1, x.ndim))
    length = torch.linalg.vector_norm(x, dim=group, keepdim=True, dtype=torch.float32)
    rms = length * math.prod(x.shape[d] for d in group) ** -0.5
    return x * (1 / (rms + eps)).to(x.dtype)


MP_SILU_GAIN = 1 / 0.596


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
    """Bias-free convolution, or linear layer for kernel [], whose filters count by direction only (EDM2, Eq. 47).

    With `forced` (EDM2's forced weight normalisation, Eq. 66) a training-mode forward pass first replaces the stored
    weight by its normalised value, without gradient.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel: Sequence[int] = ()) -> None:
        super().__init__()
        self.forced = True
        self.fan_in = in_channels * math.prod(kernel)
        self.padding = tuple(size // 2 for size in kernel)
        self.weight = nn.Parameter(torch.randn(out_channels, in_channels, *kernel))

    def filters(self) -> Tensor:
        """The weight in float32, each filter of unit root-mean-square."""
        return normalize(self.weight.to(torch.float32))

    @torch.no_grad()
    def normalize_(self) -> None:
        """Store the filters in the weight's place."""
        self.weight.copy_(self.filters())

    def forward(self, x: Tensor, gain: float | Tensor = 1.0) -> Tensor:
        """[N,in_channels,...] to [N,out_channels,...]; uncorrelated inputs of unit variance keep it, times `gain`."""
        if self.training and self.forced:
            self.normalize_()
        weight = (self.filters() * (gain * self.fan_in**-0.5)).to(x.dtype)
        return F.conv2d(x, weight, padding=self.padding) if self.padding else F.linear(x, weight)


class Block(nn.Module):
    """One U-Net block of EDM2 config G (EDM2, Fig. 21): resample, residual branch with embedding gain, attention.

    [N,in_channels,H,W] and embedding [N,emb_channels] to [N,out_channels,H',W'].
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        emb_channels: int,
        *,
        flavor: str,  # "enc" normalises its input per pixel, "dec" does not
        resample_mode: str = "keep",  # "keep", "up" or "down"
        resample_filter: Sequence[float] = (1, 1),
        attention: bool = False,
        channels_per_head: int = 64,
        dropout: float = 0.0,
        res_balance: float = 0.3,  # share of the residual branch
        attn_balance: float = 0.3,  # share of the attention branch
        clip_act: float | None = 256.0,  # bound on the output's magnitude; None = unbounded
    ) -> None:
        super().__init__()
        self.recompute = False  # activations in the backward pass, see `networks.unet.run_block`
        self.flavor, self.resample_mode, self.resample_filter = flavor, resample_mode, tuple(resample_filter)
        self.num_heads = out_channels // channels_per_head if attention else 0
        self.dropout, self.clip_act = dropout, clip_act
        self.res_balance, self.attn_balance = res_balance, attn_balance
        self.emb_gain = nn.Parameter(torch.zeros([]))
        self.conv_res0 = MPConv(out_channels if flavor == "enc" else in_channels, out_channels, (3, 3))
        self.emb_linear = MPConv(emb_channels, out_channels)
        self.conv_res1 = MPConv(out_channels, out_channels, (3, 3))
        self.conv_skip = MPConv(in_channels, out_channels, (1, 1)) if in_channels != out_channels else None
        self.attn_qkv = MPConv(out_channels, 3 * out_channels, (1, 1)) if self.num_heads else None
        self.attn_proj = MPConv(out_channels, out_channels, (1, 1)) if self.num_heads else None

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        x = resample(x, self.resample_mode, self.resample_filter)
        main = x if self.conv_skip is None else self.conv_skip(x)
        if self.flavor == "enc":
            main = x = normalize(main, dims=(1,))
        keep, take = mp_sum_weights(self.res_balance)
        main = torch.add(self._residual(x, emb, take), main, alpha=keep)
        if self.num_heads:
            keep, take = mp_sum_weights(self.attn_balance)
            main = torch.add(self._attention(main, take), main, alpha=keep)
        return main if self.clip_act is None else F.hardtanh(main, -self.clip_act, self.clip_act)

    def _residual(self, x: Tensor, emb: Tensor, gain: float) -> Tensor:
        """Two convolutions, between them one gain per channel from the embedding; the result times `gain`.

        The constant factors of mp_silu and mp_sum ride on the weights: fewer passes over activations.
        """
        h = self.conv_res0(F.silu(x), gain=MP_SILU_GAIN)
        channel_gain = 1 + self.emb_linear(emb, gain=self.emb_gain)
        h = F.silu(h * channel_gain[..., None, None].to(h.dtype))
        h = F.dropout(h, self.dropout, training=self.training)
        return self.conv_res1(h, gain=MP_SILU_GAIN * gain)

    @contextmanager
    def weights_kept(self) -> Iterator[None]:
        """Context in which no forward pass of this block replaces its weights."""
        forced = [m for m in self.modules() if isinstance(m, MPConv) and m.forced]
        for module in forced:
            module.forced = False
        try:
            yield
        finally:
            for module in forced:
                module.forced = True

    def _attention(self, x: Tensor, gain: float) -> Tensor:
        """Self-attention over pixels with normalised queries, keys and values (EDM2, Section 2.3)."""
        n, c, height, width = x.shape
        qkv = self.attn_qkv(x).reshape(n, self.num_heads, c // self.num_heads, 3, height * width)
        qkv = qkv.permute(3, 0, 1, 4, 2).contiguous()  # channels last, as the fused attention kernels need
        q, k, v = normalize(qkv, dims=(4,)).unbind(0)
        training_on_cpu = q.device.type == "cpu" and q.requires_grad and torch.is_grad_enabled()
        # The fused backward pass costs more than it saves on the CPU.
        with sdpa_kernel(SDPBackend.MATH) if training_on_cpu else nullcontext():
            h = F.scaled_dot_product_attention(q, k, v)
        return self.attn_proj(h.transpose(2, 3).reshape(n, c, height, width), gain=gain)
