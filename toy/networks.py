"""Small multilayer perceptrons behind the image networks' interfaces: points are images of one pixel, [N,2,1,1].

Preconditioning, control branch, uncertainty and discriminator head are the image networks' own; only the U-Net inside
is replaced by layers without convolutions.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from networks.denoisers import Discriminator, Precond, PrecondCondition
from networks.layers import MPConv, mp_silu, mp_sum, normalize
from networks.unet import EmbeddedNet, UNetConfig

COORDINATE_FEATURES = 64


class PointBlock(nn.Module):
    """A residual block of two linear layers whose hidden channels are scaled by the embedding (EDM2, Fig. 21)."""

    def __init__(self, config: UNetConfig, channels: int) -> None:
        super().__init__()
        self.emb_gain = nn.Parameter(torch.zeros([]))
        self.emb_linear = MPConv(config.emb_channels, channels)
        self.res0 = MPConv(channels, channels)
        self.res1 = MPConv(channels, channels)
        self.balance = config.res_balance

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        x = normalize(x, dims=(1,))
        gain = self.emb_linear(emb, gain=self.emb_gain) + 1
        return mp_sum(x, self.res1(mp_silu(self.res0(mp_silu(x)) * gain)), self.balance)


class CoordinateFeatures(nn.Module):
    """Coordinates, a one and random waves of them: [N,C,1,1] to [N, C + 1 + COORDINATE_FEATURES]."""

    def __init__(self, channels: int, bandwidth: float = 0.5) -> None:
        super().__init__()
        self.width = channels + 1 + COORDINATE_FEATURES
        self.register_buffer("freqs", 2 * math.pi * bandwidth * torch.randn(channels, COORDINATE_FEATURES))
        self.register_buffer("phases", 2 * math.pi * torch.rand(COORDINATE_FEATURES))

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1)
        waves = (x @ self.freqs + self.phases).cos() * math.sqrt(2)
        return torch.cat([x, torch.ones_like(x[:, :1]), waves], 1)


class PointEncoder(EmbeddedNet):
    """Features of a point at a noise level, as the list of [N,C,1,1] that an image encoder would return."""

    def __init__(self, config: UNetConfig) -> None:
        super().__init__(config)
        self.coordinates = CoordinateFeatures(config.img_channels)
        self.input = MPConv(self.coordinates.width, config.model_channels)
        self.enc = build_blocks(config)

    def forward(self, x: Tensor, c_noise: Tensor, labels: Tensor | None) -> list[Tensor]:
        return [self.encode(x, self.embed(c_noise, labels))[:, :, None, None]]

    def encode(self, x: Tensor, emb: Tensor) -> Tensor:
        """Features [N,C] of points [N,2,1,1]."""
        h = self.input(self.coordinates(x))
        for block in self.enc:
            h = block(h, emb)
        return h


class PointDecoder(EmbeddedNet):
    """Output [N,2,1,1] from a point's features and those of the control branch, which start without effect."""

    def __init__(self, config: UNetConfig) -> None:
        super().__init__(config)
        self.dec = build_blocks(config)
        self.output = MPConv(config.model_channels, config.img_channels)
        self.out_gain = nn.Parameter(torch.zeros([]))
        self.additional_x_weight = nn.Parameter(torch.zeros(1))

    def forward(self, features: list[Tensor], control: list[Tensor], c_noise: Tensor, labels: Tensor | None) -> Tensor:
        if self.training:
            with torch.no_grad():
                self.additional_x_weight.clamp_(0, 1)
        h = mp_sum(features[-1].flatten(1), control[-1].flatten(1), self.additional_x_weight.clamp(0, 1))
        emb = self.embed(c_noise, labels)
        for block in self.dec:
            h = block(h, emb)
        return self.output(h, gain=self.out_gain)[:, :, None, None]


class PointNet(PointEncoder):
    """Encoder and decoder with one embedding: what takes the U-Net's place in a plain denoiser."""

    def __init__(self, config: UNetConfig) -> None:
        super().__init__(config)
        self.dec = build_blocks(config)
        self.output = MPConv(config.model_channels, config.img_channels)
        self.out_gain = nn.Parameter(torch.zeros([]))

    def forward(self, x: Tensor, c_noise: Tensor, labels: Tensor | None) -> Tensor:
        emb = self.embed(c_noise, labels)
        h = self.encode(x, emb)
        for block in self.dec:
            h = block(h, emb)
        return self.output(h, gain=self.out_gain)[:, :, None, None]


def build_blocks(config: UNetConfig) -> nn.ModuleList:
    """The blocks of an encoder or a decoder."""
    return nn.ModuleList(PointBlock(config, config.model_channels) for _ in range(config.num_blocks))


class PointPrecond(Precond):
    """A denoiser D(x, sigma) of points, whose weights the others start from."""

    unet_class = PointNet


class PointCondition(PrecondCondition):
    """The conditional denoiser D(x, sigma | y, sigma_y) of points."""

    encoder_class, decoder_class = PointEncoder, PointDecoder


class PointDiscriminator(Discriminator):
    """The discriminator of points."""

    encoder_class = PointEncoder


def architecture(width: int, blocks: int) -> dict[str, Any]:
    """Arguments of the three networks."""
    return dict(
        img_resolution=1,
        img_channels=2,
        label_dim=0,
        use_fp16=False,
        model_channels=width,
        channel_mult=[1],
        num_blocks=blocks,
        attn_resolutions=[],
    )
