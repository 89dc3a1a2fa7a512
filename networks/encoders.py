"""Encoders: how stored images become the latents that a network sees, and how its latents become pixels.

`raw` is what a data set stores: uint8 pixels [N,C,H,W], or for Stable-Diffusion latents float32 [N,8,h,w], mean then
standard deviation of the autoencoder's posterior. Latents are float32 with standard deviation about 0.5.
"""

import inspect
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch

from dnnlib.files import read_json
from dnnlib.text import first_line, printable
from sampling.posterior import RandnLike

_FILES = ("config.json", "diffusion_pytorch_model.safetensors")  # of an autoencoder


class RGBEncoder:
    """Pixels as latents, as in EDM2: x = px/127.5 - 1; px = x·127.5 + 128, clipped to [0, 255] and truncated."""

    name = "rgb"

    def to(self, device: torch.device | str) -> "RGBEncoder":
        return self

    def encode_pixels(self, pixels: torch.Tensor) -> torch.Tensor:
        """What is stored of uint8 pixels [N,C,H,W]: themselves."""
        return pixels

    def encode(self, raw: torch.Tensor, *, randn_like: RandnLike = torch.randn_like) -> torch.Tensor:
        """Latents, float32 [N,C,H,W] in [-1, 1], of uint8 pixels; no noise. Raises ValueError for another dtype."""
        if raw.dtype != torch.uint8:
            raise ValueError(f"rgb encoder: needs uint8 pixels, got {raw.dtype} {list(raw.shape)}")
        return raw.to(torch.float32) / 127.5 - 1

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Pixels, uint8 [N,C,H,W], of latents [N,C,H,W]."""
        return (latents.to(torch.float32) * 127.5 + 128).clamp(0, 255).to(torch.uint8)

    def latent_channels(self, raw_channels: int) -> int:
        """Of the latents of a data set with `raw_channels` channels."""
        return raw_channels

    def to_config(self) -> dict[str, Any]:
        """JSON-able description, see `encoder_from_config`."""
        return {"type": self.name}


class StabilityVAEEncoder:
    """Latents of Stable Diffusion's autoencoder, rescaled per channel. It sees pixels in [0, 1]; its posterior
    (mean, std) is stored, and a draw from it becomes latents = scale·(mean + std·n) + bias (EDM2, arXiv 2312.02696).
    The weights are read, from safetensors only, on the first operation on pixels, which raises ValueError where they
    cannot be found; training on stored posteriors never needs them. Raises ValueError for unfit scale and bias.
    """

    name = "sd-vae"

    def __init__(
        self,
        vae_name: str = "stabilityai/sd-vae-ft-mse",  # a folder in the layout of diffusers, or an id of the Hub
        scale: Sequence[float] | None = None,  # per channel; None = to mean 0 and standard deviation 0.5, as in EDM2
        bias: Sequence[float] | None = None,
        batch_size: int = 8,  # images per pass of the autoencoder
    ):
        if (scale is None) != (bias is None):
            raise ValueError("sd-vae encoder: give both scale and bias, or neither")
        if scale is None:
            mean, std = np.float32((5.81, 3.25, 0.12, -2.15)), np.float32((4.17, 4.62, 3.71, 3.28))  # of its latents
            scale = np.float32(0.5) / std
            bias = -scale * mean
        self.vae_name, self.batch_size = str(vae_name), int(batch_size)
        self.scale, self.bias = np.array(scale, dtype=np.float32), np.array(bias, dtype=np.float32)
        if self.scale.ndim != 1 or self.scale.shape != self.bias.shape or not self.scale.size:
            raise ValueError("sd-vae encoder: scale and bias must be two lists of one length, the latent channels")
        if not (np.isfinite(self.scale).all() and np.isfinite(self.bias).all() and (self.scale > 0).all()):
            raise ValueError("sd-vae encoder: scale must be positive and bias finite")
        if not 1 <= self.batch_size <= 4096:
            raise ValueError("sd-vae encoder: batch_size must be from 1 to 4096")
        self.device, self._vae = torch.device("cpu"), None

    def to(self, device: torch.device | str) -> "StabilityVAEEncoder":
        """Move the autoencoder, now or once it is loaded, to `device`."""
        self.device = torch.device(device)
        if self._vae is not None:
            self._vae.to(self.device)
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_vae": None}

    def _autoencoder(self) -> torch.nn.Module:
        if self._vae is None:
            vae = load_autoencoder(self.vae_name).to(self.device)
            if (channels := vae.config.latent_channels) != self.scale.size:
                raise ValueError(f"autoencoder {self.vae_name}: {channels} latent channels, not {self.scale.size}")
            self._vae = vae
        return self._vae

    def _affine(self, like: torch.Tensor) -> Iterator[torch.Tensor]:
        return (torch.from_numpy(v).to(like.device).reshape(1, -1, 1, 1) for v in (self.scale, self.bias))

    @torch.no_grad()
    def encode_pixels(self, pixels: torch.Tensor) -> torch.Tensor:
        """Posterior, float32 [N,8,h,w] (mean, std), of uint8 pixels [N,3,H,W]. Raises ValueError for any others."""
        if pixels.dtype != torch.uint8 or pixels.ndim != 4 or pixels.shape[1] != 3:
            raise ValueError(f"sd-vae encoder: needs uint8 pixels [N,3,H,W], got {pixels.dtype} {list(pixels.shape)}")
        vae = self._autoencoder()
        factor = 2 ** (len(vae.config.block_out_channels) - 1)
        if pixels.shape[2] % factor or pixels.shape[3] % factor:
            raise ValueError(f"sd-vae encoder: image size {list(pixels.shape[2:])} is not a multiple of {factor}")
        parts = []
        for chunk in pixels.split(self.batch_size):
            posterior = vae.encode(chunk.to(self.device, torch.float32) / 255).latent_dist
            parts.append(torch.cat([posterior.mean, posterior.std], dim=1))
        return torch.cat(parts)

    def encode(self, raw: torch.Tensor, *, randn_like: RandnLike = torch.randn_like) -> torch.Tensor:
        """Latents, float32 [N,4,h,w], drawn from posteriors [N,8,h,w] or uint8 pixels. Raises ValueError for others."""
        if raw.dtype == torch.uint8:
            raw = self.encode_pixels(raw)
        if raw.ndim != 4 or raw.shape[1] != 2 * self.scale.size:
            raise ValueError(f"sd-vae encoder: needs [N,{2 * self.scale.size},h,w] (mean, std), got {list(raw.shape)}")
        mean, std = raw.to(torch.float32).chunk(2, dim=1)
        scale, bias = self._affine(mean)
        return (mean + std * randn_like(mean)) * scale + bias

    @torch.no_grad()
    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Pixels, uint8 [N,3,H,W], of latents [N,4,h,w], on the encoder's device."""
        scale, bias = self._affine(latents)
        return self.decode_raw((latents.to(torch.float32) - bias) / scale)

    @torch.no_grad()
    def decode_raw(self, raw: torch.Tensor) -> torch.Tensor:
        """Pixels, uint8 [N,3,H,W], of the autoencoder's own (not rescaled) latents [N,4,h,w]."""
        vae = self._autoencoder()
        parts = [vae.decode(c.to(self.device, torch.float32)).sample for c in raw.split(self.batch_size)]
        return (torch.cat(parts).clamp(0, 1) * 255).to(torch.uint8)

    def latent_channels(self, raw_channels: int) -> int:
        """4 for a data set with 8 channels, of posteriors, or 3, of pixels. Raises ValueError for any other number."""
        if raw_channels not in (3, 2 * self.scale.size):
            needs = f"{2 * self.scale.size} (mean and std of latents; see dataset_tool.py encode) or 3 (pixels)"
            raise ValueError(f"sd-vae encoder: the data has {raw_channels} channels, but needs {needs}")
        return int(self.scale.size)

    def to_config(self) -> dict[str, Any]:
        """JSON-able description, see `encoder_from_config`."""
        scale, bias = self.scale.tolist(), self.bias.tolist()
        return dict(type=self.name, vae_name=self.vae_name, scale=scale, bias=bias, batch_size=self.batch_size)


Encoder: TypeAlias = RGBEncoder | StabilityVAEEncoder


def encoder_from_config(config: Mapping[str, Any]) -> Encoder:
    """Rebuild an encoder from its `to_config()`. Raises ValueError for an unknown type, entries unknown or unfit."""
    options = dict(config)
    kind = options.pop("type", None)
    if kind not in ("rgb", "sd-vae"):
        raise ValueError(f"unknown encoder type {kind!r}; known are 'rgb' and 'sd-vae'")
    allowed = {"vae_name", "scale", "bias", "batch_size"} if kind == "sd-vae" else set()
    if unknown := sorted(map(str, options.keys() - allowed)):
        raise ValueError(f"unknown entries of the {kind} encoder: {', '.join(unknown)}")
    try:
        return StabilityVAEEncoder(**options) if kind == "sd-vae" else RGBEncoder()
    except TypeError as error:
        raise ValueError(f"sd-vae encoder: bad entry ({error})") from None


def load_autoencoder(vae_name: str) -> torch.nn.Module:
    """diffusers' `AutoencoderKL`, float32, in eval mode, of a folder or the Hub. Raises ValueError with advice."""
    try:
        from diffusers import AutoencoderKL
        from diffusers.utils import logging
        from huggingface_hub import snapshot_download
    except ImportError:
        raise ValueError("the Stable-Diffusion autoencoder needs diffusers: pip install diffusers") from None
    looks_local = vae_name.startswith((".", "/", "~")) or vae_name.count("/") != 1
    fetch = f"hf download {'stabilityai/sd-vae-ft-mse' if looks_local else vae_name} --local-dir FOLDER"
    advice = f"put {' and '.join(_FILES)} into a folder ({fetch}) and name that"
    if looks_local and not os.path.isdir(vae_name):
        raise ValueError(f"autoencoder {vae_name or repr(vae_name)}: no such folder; {advice}")
    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)  # the one-line error below says it all
    try:
        folder = vae_name if os.path.isdir(vae_name) else snapshot_download(vae_name, allow_patterns=list(_FILES))
        _check_folder(Path(folder), AutoencoderKL)
        vae, report = AutoencoderKL.from_pretrained(
            folder, torch_dtype=torch.float32, use_safetensors=True, output_loading_info=True, local_files_only=True
        )
        if report["missing_keys"]:
            raise ValueError(f"the file lacks {len(report['missing_keys'])} of its weights")
        if bad := nonfinite_weights(vae):
            raise ValueError(f"NaN or infinite weights in {bad[0]}")
    except Exception as error:  # network, Hub, file and JSON errors of several libraries
        reason = first_line(getattr(error, "strerror", None) or error)
        what = "not a usable folder" if os.path.isdir(vae_name) else "neither a folder nor to be had from the Hub"
        raise ValueError(f"autoencoder {vae_name}: {what} ({reason[:200]}); {advice}") from None
    finally:
        logging.set_verbosity(verbosity)
    return vae.eval().requires_grad_(False)


def _check_folder(folder: Path, kind: Any) -> None:
    """Compare the description of an autoencoder with what one can be, and with the size of its weights. Raises
    ValueError before diffusers acts on it: it takes memory, other packages or files of the Hub as it is told to.
    """
    if missing := [name for name in _FILES if not (folder / name).is_file()]:
        raise ValueError(f"no file named {missing[0]} in it")
    config = read_json(folder / _FILES[0], 1 << 16)
    if config.get("_class_name") != kind.__name__:
        raise ValueError(f"its config.json is not that of an {kind.__name__}")
    known = inspect.signature(kind.__init__).parameters
    for name, value in config.items():
        if name not in known and not name.startswith("_"):
            raise ValueError(f"unknown entry {printable(name)[:60]!r} in config.json")
        values = value if isinstance(value, list) else [value]
        limit = 16 if name == "layers_per_block" else 8192
        numbers = [v for v in values if isinstance(v, (int, float))]
        if len(values) > 32 or not all(abs(v) <= limit and (v >= 0 or type(v) is float) for v in numbers):
            raise ValueError(f"{name} in config.json has a value that no autoencoder uses")
    try:
        with torch.device("meta"):
            count = sum(p.numel() for p in kind.from_config(config).parameters())
    except Exception:  # whatever values of wrong types lead to
        raise ValueError("its config.json describes nothing that can be built") from None
    size = (folder / _FILES[1]).stat().st_size
    if 2 * count > size:
        raise ValueError(f"its weights file of {size} bytes cannot hold the {count} weights that config.json asks for")


def nonfinite_weights(net: torch.nn.Module) -> list[str]:
    """Names of weights and buffers that hold NaN or infinities; one pass (both show in the extremes), one exchange."""
    state = {key: tensor for key, tensor in net.state_dict().items() if tensor.numel()}
    finite = torch.stack([torch.stack(tensor.aminmax()) for tensor in state.values()]).isfinite().all(dim=1).tolist()
    return [key for key, good in zip(state, finite, strict=True) if not good]
