"""The EDM2 U-Net in parts: block, embedding, encoder, decoder, and the whole network."""

import itertools
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from networks.layers import (
    MP_SILU_GAIN,
    MPConv,
    MPFourier,
    mp_cat,
    mp_silu,
    mp_sum,
    mp_sum_weights,
    normalize,
    resample,
)

_MAX_ATTENTION = 128  # pixels in each direction; EDM2 has 16
_MAX_FEATURES = 1 << 28  # numbers that a layer holds of one image; EDM2 needs a fiftieth


@dataclass(frozen=True)
class UNetConfig:
    """Architecture of a U-Net. Raises ValueError where the numbers do not describe one."""

    img_resolution: int  # height and width of the input, in pixels
    img_channels: int  # image or latent channels
    label_dim: int  # number of classes; 0 = unconditional
    model_channels: int = 192  # base width
    channel_mult: Sequence[int] = (1, 2, 3, 4)  # width of each level, in units of the base width
    channel_mult_noise: int | None = None  # width of the noise features; None = channel_mult[0]
    channel_mult_emb: int | None = None  # width of the embedding; None = max(channel_mult)
    num_blocks: int = 3  # blocks per level of the encoder; the decoder has one more
    attn_resolutions: Sequence[int] = (16, 8)  # levels with self-attention
    label_balance: float = 0.5  # share of the class embedding
    concat_balance: float = 0.5  # share of the skip connection
    channels_per_head: int = 64
    dropout: float = 0.0
    resample_filter: Sequence[float] = (1, 1)
    res_balance: float = 0.3  # share of the residual branch
    attn_balance: float = 0.3  # share of the attention branch
    clip_act: float | None = 256  # bound on a block's output; None = unbounded

    def __post_init__(self) -> None:
        for name in ("img_resolution", "img_channels", "model_channels", "num_blocks", "channels_per_head"):
            if int(getattr(self, name)) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.label_dim < 0:
            raise ValueError(f"label_dim must be 0 (unconditional) or a number of classes, got {self.label_dim}")
        if not self.channel_mult or min(self.channel_mult) < 1:
            raise ValueError(f"channel_mult must list one positive width per level, got {self.channel_mult}")
        if self.img_resolution % 2 ** (halvings := len(self.channel_mult) - 1):
            told = f"img_resolution {self.img_resolution} cannot be halved {halvings} times"
            raise ValueError(f"{told}, once for each level of channel_mult after the first")
        if any(res * res * max(width, self.img_channels) > _MAX_FEATURES for res, width in self.levels):
            raise ValueError(f"{self.img_resolution} pixels in {self.model_channels} channels would fill any memory")
        taps = self.resample_filter
        if not taps or len(taps) % 2 or not abs(sum(taps)) > 1e-6:
            raise ValueError(f"resample_filter needs an even number of taps whose sum is not 0, got {list(taps)}")
        for res, width in [level for level in self.levels if level[0] in self.attn_resolutions] + self.levels[-1:]:
            heads = width // self.channels_per_head  # 0 = no attention
            if heads and res > _MAX_ATTENTION:
                raise ValueError(f"attention between {res}x{res} pixels, and at most {_MAX_ATTENTION} are possible")
            if heads and width % heads:
                told = f"the {width} channels at {res}x{res} do not divide into {heads} attention heads"
                raise ValueError(f"{told} ({width} // {self.channels_per_head}): change channels_per_head")

    @property
    def levels(self) -> list[tuple[int, int]]:
        """(resolution, width) of each level, finest first."""
        return [(self.img_resolution >> i, self.model_channels * mult) for i, mult in enumerate(self.channel_mult)]

    @property
    def noise_channels(self) -> int:
        return self.model_channels * (self.channel_mult_noise or self.channel_mult[0])

    @property
    def emb_channels(self) -> int:
        return self.model_channels * (self.channel_mult_emb or max(self.channel_mult))

    @property
    def skip_channels(self) -> list[int]:
        """Width of each skip connection in the order in which the encoder produces them."""
        widths = [self.levels[0][1]]
        for i, (_, channels) in enumerate(self.levels):
            widths += [widths[-1]] * (i > 0) + [channels] * self.num_blocks
        return widths


class Block(nn.Module):
    """One U-Net block of EDM2 config G (EDM2, Fig. 21): [N,in_channels,H,W] and embedding to [N,out_channels,H',W'].
    Where `recompute` is set and gradients are wanted, only the inputs are kept; the backward pass computes the rest
    again, with the weights as they are: their forced normalisation is not repeated.
    """

    def __init__(
        self,
        config: UNetConfig,
        in_channels: int,
        out_channels: int,
        flavor: str,  # "enc" normalises its input per pixel, "dec" does not
        mode: str = "keep",  # of the resolution: "keep", "up" or "down"
        attention: bool = False,
    ) -> None:
        super().__init__()
        self.config, self.flavor, self.mode, self.recompute = config, flavor, mode, False
        self.num_heads = out_channels // config.channels_per_head if attention else 0
        self.emb_gain = nn.Parameter(torch.zeros([]))
        self.conv_res0 = MPConv(out_channels if flavor == "enc" else in_channels, out_channels, (3, 3))
        self.emb_linear = MPConv(config.emb_channels, out_channels)
        self.conv_res1 = MPConv(out_channels, out_channels, (3, 3))
        self.conv_skip = MPConv(in_channels, out_channels, (1, 1)) if in_channels != out_channels else None
        self.attn_qkv = MPConv(out_channels, 3 * out_channels, (1, 1)) if self.num_heads else None
        self.attn_proj = MPConv(out_channels, out_channels, (1, 1)) if self.num_heads else None

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        if not (self.recompute and torch.is_grad_enabled()):
            return self._run(x, emb)
        calls = itertools.count()

        def run(x: Tensor, emb: Tensor) -> Tensor:
            with self._unforced() if next(calls) else nullcontext():
                return self._run(x, emb)

        return checkpoint(run, x, emb, use_reentrant=False)

    @contextmanager
    def _unforced(self) -> Iterator[None]:
        """Context in which no forward pass of this block replaces its weights."""
        forced = [m for m in self.modules() if isinstance(m, MPConv) and m.forced]
        for module in forced:
            module.forced = False
        try:
            yield
        finally:
            for module in forced:
                module.forced = True

    def _run(self, x: Tensor, emb: Tensor) -> Tensor:
        x = resample(x, self.mode, self.config.resample_filter)
        main = x if self.conv_skip is None else self.conv_skip(x)
        if self.flavor == "enc":
            main = x = normalize(main, dims=(1,))
        keep, take = mp_sum_weights(self.config.res_balance)
        main = torch.add(self._residual(x, emb, take), main, alpha=keep)
        if self.num_heads:
            keep, take = mp_sum_weights(self.config.attn_balance)
            main = torch.add(self._attention(main, take), main, alpha=keep)
        bound = self.config.clip_act
        return main if bound is None else F.hardtanh(main, -bound, bound)

    def _residual(self, x: Tensor, emb: Tensor, gain: float) -> Tensor:
        """Convolutions, between them a gain per channel; the factors of mp_silu and mp_sum ride on the weights."""
        h = self.conv_res0(F.silu(x), gain=MP_SILU_GAIN)
        channel_gain = 1 + self.emb_linear(emb, gain=self.emb_gain)
        h = F.silu(h * channel_gain[..., None, None].to(h.dtype))
        h = F.dropout(h, self.config.dropout, training=self.training)
        return self.conv_res1(h, gain=MP_SILU_GAIN * gain)

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


def set_recompute(net: nn.Module, recompute: bool) -> None:
    """Choose for all blocks of a network whether activations are kept or computed again in the backward pass."""
    for module in net.modules():
        if isinstance(module, Block):
            module.recompute = recompute


class EmbeddedNet(nn.Module):
    """A network with an embedding of noise level and, where conditional, class; layers are keyed as in EDM2's files."""

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        self.config = config
        self.emb_fourier = MPFourier(config.noise_channels)
        self.emb_noise = MPConv(config.noise_channels, config.emb_channels)
        self.emb_label = MPConv(config.label_dim, config.emb_channels) if config.label_dim else None

    def embed(self, c_noise: Tensor, labels: Tensor | None) -> Tensor:
        """Embedding [N,emb_channels] in float32 of c_noise [N] and class weights [N,label_dim]."""
        emb = self.emb_noise(self.emb_fourier(c_noise))
        if self.emb_label is not None:
            emb = mp_sum(emb, self.emb_label(labels * math.sqrt(self.config.label_dim)), self.config.label_balance)
        return mp_silu(emb)

    def add_encoder(self) -> None:
        """Layers from the image (with its channel of ones) down to the lowest level."""
        self.enc, config, above = nn.ModuleDict(), self.config, None  # the width of the finer level
        for res, width in config.levels:
            if above is None:
                self.enc[f"{res}x{res}_conv"] = MPConv(config.img_channels + 1, width, (3, 3))
            else:
                self.enc[f"{res}x{res}_down"] = Block(config, above, above, "enc", mode="down")
            for i in range(config.num_blocks):
                channels, attention = width if i else above or width, res in config.attn_resolutions
                self.enc[f"{res}x{res}_block{i}"] = Block(config, channels, width, "enc", attention=attention)
            above = width

    def add_decoder(self) -> None:
        """Layers from the lowest level up to the image."""
        self.dec, config, below, skips = nn.ModuleDict(), self.config, None, self.config.skip_channels
        for res, width in reversed(config.levels):
            if below is None:  # the width of the coarser level
                self.dec[f"{res}x{res}_in0"] = Block(config, width, width, "dec", attention=True)
                self.dec[f"{res}x{res}_in1"] = Block(config, width, width, "dec")
            else:
                self.dec[f"{res}x{res}_up"] = Block(config, below, below, "dec", mode="up")
            for i in range(config.num_blocks + 1):
                channels, attention = (width if i else below or width) + skips.pop(), res in config.attn_resolutions
                self.dec[f"{res}x{res}_block{i}"] = Block(config, channels, width, "dec", attention=attention)
            below = width
        self.out_conv = MPConv(config.model_channels * config.channel_mult[0], config.img_channels, (3, 3))
        self.out_gain = nn.Parameter(torch.zeros([]))

    def encode(self, x: Tensor, emb: Tensor) -> list[Tensor]:
        """Every output of the encoder for image [N,C,H,W] and embedding [N,emb_channels], finest first."""
        entry, *blocks = self.enc.values()
        outputs = [entry(F.pad(x, (0, 0, 0, 0, 0, 1), value=1.0))]  # a channel of ones stands for the bias
        for block in blocks:
            outputs.append(block(outputs[-1], emb))
        return outputs

    def decode(self, x: Tensor, skips: list[Tensor], emb: Tensor) -> Tensor:
        """Output [N,C,H,W] from the lowest features and the skips in the encoder's order, which are used up."""
        for name, layer in self.dec.items():
            x = layer(mp_cat(x, skips.pop(), self.config.concat_balance) if "_block" in name else x, emb)
        return self.out_conv(x, gain=self.out_gain)


class Encoder(EmbeddedNet):
    """A U-Net's encoder with an embedding of its own."""

    def __init__(self, config: UNetConfig) -> None:
        super().__init__(config)
        self.add_encoder()

    def forward(self, x: Tensor, c_noise: Tensor, labels: Tensor | None) -> list[Tensor]:
        return self.encode(x, self.embed(c_noise, labels))


class Decoder(EmbeddedNet):
    """A U-Net's decoder with an embedding of its own, which blends a control encoder's features into the encoder's. The
    blend weights start at 0, where the control branch has no effect, and are kept within [0, 1].
    """

    def __init__(self, config: UNetConfig) -> None:
        super().__init__(config)
        self.add_decoder()
        self.additional_x_weight = nn.Parameter(torch.zeros(1))
        self.additional_skips_weight = nn.Parameter(torch.zeros(len(config.skip_channels)))

    def forward(self, skips: list[Tensor], control: list[Tensor], c_noise: Tensor, labels: Tensor | None) -> Tensor:
        blends = (self.additional_x_weight, self.additional_skips_weight)
        with torch.no_grad():
            for weight in blends if self.training else ():
                weight.clamp_(0, 1)
        x_weight, skip_weights = (weight.clamp(0, 1).to(skips[0].dtype) for weight in blends)
        x = mp_sum(skips[-1], control[-1], x_weight)
        blended = [mp_sum(a, b, w) for a, b, w in zip(skips, control, skip_weights, strict=True)]
        return self.decode(x, blended, self.embed(c_noise, labels))


class UNet(EmbeddedNet):
    """The EDM2 U-Net: raw network output [N,C,H,W] for a scaled image, c_noise [N] and class weights."""

    def __init__(self, config: UNetConfig) -> None:
        super().__init__(config)
        self.add_encoder()
        self.add_decoder()

    def forward(self, x: Tensor, c_noise: Tensor, labels: Tensor | None) -> Tensor:
        emb = self.embed(c_noise, labels)
        skips = self.encode(x, emb)
        return self.decode(skips[-1], skips, emb)
