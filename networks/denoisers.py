"""Teacher, conditional denoiser, generative denoiser and discriminator around one U-Net and one preconditioning."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn

from networks.layers import MPConv, MPFourier, mp_cat, mp_silu
from networks.unet import Decoder, Encoder, UNet, UNetConfig
from sampling.grids import few_step_sigmas
from sampling.posterior import RandnLike, combine_observations, expand_sigma, few_step_posterior

Sigma = float | Tensor  # a number, [N] or [N,1,1,1]
Labels = Tensor | None  # class weights [N,label_dim]; None = no class
POSITIONAL = ("img_resolution", "img_channels", "label_dim", "use_fp16", "sigma_data", "logvar_channels")


@dataclass(frozen=True)
class Scalings:
    """Coefficients of D(x, sigma) = c_skip·x + c_out·F(c_in·x, c_noise); c_noise is [N], the others [N,1,1,1]."""

    c_skip: Tensor
    c_out: Tensor
    c_in: Tensor
    c_noise: Tensor


def preconditioning(sigma: Tensor, sigma_data: float) -> Scalings:
    """EDM's preconditioning (EDM, Table 1) at noise levels [N,1,1,1]."""
    total = sigma.square() + sigma_data**2
    c_skip, c_out, c_in = sigma_data**2 / total, sigma * sigma_data / total.sqrt(), 1 / total.sqrt()
    return Scalings(c_skip, c_out, c_in, c_noise=sigma.flatten().log() / 4)


class PreconditionedNet(nn.Module):
    """What teacher, conditional denoiser and discriminator share. Data other than images set the three classes."""

    unet_class: type[nn.Module] = UNet
    encoder_class: type[nn.Module] = Encoder
    decoder_class: type[nn.Module] = Decoder

    def __init__(
        self,
        img_resolution: int,  # pixels
        img_channels: int,
        label_dim: int,  # 0 = unconditional
        use_fp16: bool = True,  # run the U-Net in float16 where the network is on a CUDA device
        sigma_data: float = 0.5,  # standard deviation of the data
        logvar_channels: int = 128,  # width of the uncertainty estimate; unused by the discriminator
        **unet_kwargs: Any,  # further fields of UNetConfig
    ) -> None:
        super().__init__()
        self.img_resolution, self.img_channels, self.label_dim = img_resolution, img_channels, label_dim
        self.use_fp16, self.sigma_data, self.logvar_channels = use_fp16, sigma_data, logvar_channels
        self.init_kwargs = {name: getattr(self, name) for name in POSITIONAL}
        self.init_kwargs |= {k: list(v) if isinstance(v, tuple) else v for k, v in unet_kwargs.items()}
        self._unet_config = UNetConfig(img_resolution, img_channels, label_dim, **unet_kwargs)
        self._compute_dtype: torch.dtype | None = None

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @property
    def compute_dtype(self) -> torch.dtype:
        """Of the U-Net alone. Until assigned (None undoes it): float16 where `use_fp16` and on CUDA, else float32."""
        default = torch.float16 if self.use_fp16 and self.device.type == "cuda" else torch.float32
        return self._compute_dtype or default

    @compute_dtype.setter
    def compute_dtype(self, dtype: torch.dtype | None) -> None:
        if dtype not in (None, torch.float32, torch.bfloat16, torch.float16):
            raise ValueError(f"compute dtype must be float32, bfloat16 or float16, not {dtype}")
        if dtype == torch.float16 and self.device.type not in ("cuda", "meta"):
            found = f"the network is on {self.device}"
            raise ValueError(f"float16 needs a CUDA device and {found}: use float32 or bfloat16")
        self._compute_dtype = dtype

    def _scaled(self, x: Tensor, sigma: Sigma) -> tuple[Scalings, Tensor]:
        """The scalings at sigma, and the U-Net's input in the compute dtype."""
        x = x.to(torch.float32)
        scalings = preconditioning(expand_sigma(sigma, x), self.sigma_data)
        return scalings, (scalings.c_in * x).to(self.compute_dtype)

    def _encode(
        self, x: Tensor, sigma: Sigma, y: Tensor, sigma_y: Sigma, labels: Labels
    ) -> tuple[Scalings, Tensor | None, list[Tensor], list[Tensor]]:
        """The scalings of x, class weights, and every output of `enc` for x and of `ctrl` for y."""
        (s, x_in), (s_y, y_in) = self._scaled(x, sigma), self._scaled(y, sigma_y)
        labels = self._prepare_labels(labels, len(x))
        control = self.ctrl(y_in, s_y.c_noise, labels)
        return s, labels, self.enc(x_in, s.c_noise, labels), control

    @torch.no_grad()
    def init_from_teacher(self, net: "Precond") -> "PreconditionedNet":
        """Copy the teacher's weights, for the teacher's output whatever y. Raises ValueError where they do not fit."""
        weights = net.unet.state_dict()
        branches = [part for name, part in self.named_children() if name in ("ctrl", "enc", "dec")]
        for name, tensor in (item for part in branches for item in part.state_dict().items()):
            if name not in ("additional_x_weight", "additional_skips_weight"):
                if name not in weights or weights[name].shape != tensor.shape:
                    found = list(weights[name].shape) if name in weights else "nothing"
                    differs = f"{name} is {list(tensor.shape)}, teacher has {found}"
                    raise ValueError(f"the teacher's architecture differs: {differs}")
                tensor.copy_(weights[name])
        return self

    def _prepare_labels(self, labels: Labels, batch: int) -> Labels:
        """Class weights in float32: zeros where a conditional net gets none, None for an unconditional one."""
        if labels is None and self.label_dim:
            return torch.zeros(batch, self.label_dim, device=self.device)
        return labels.to(torch.float32).reshape(-1, self.label_dim) if self.label_dim else None

    def _add_logvar(self) -> None:
        """The estimate of the loss's log variance (EDM2, Eq. 19 and 109), which the discriminator has not."""
        self.logvar_fourier = MPFourier(self.logvar_channels)
        self.logvar_linear = MPConv(self.logvar_channels, 1)

    def _denoised(self, x: Tensor, s: Scalings, output: Tensor, return_logvar: bool) -> Tensor | tuple[Tensor, Tensor]:
        denoised = s.c_skip * x.to(torch.float32) + s.c_out * output.to(torch.float32)
        if not return_logvar:
            return denoised
        return denoised, self.logvar_linear(self.logvar_fourier(s.c_noise)).reshape(-1, 1, 1, 1)


class Precond(PreconditionedNet):
    """The EDM2 denoiser D(x, sigma), an estimate of E[x0 | x] for x = x0 + sigma·n: the teacher."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.unet = self.unet_class(self._unet_config)
        self._add_logvar()

    def forward(self, x: Tensor, sigma: Sigma, labels: Labels = None, *, return_logvar: bool = False):
        """Denoised [N,C,H,W] for x [N,C,H,W] and class weights [N,label_dim]; with return_logvar also [N,1,1,1]."""
        s, x_in = self._scaled(x, sigma)
        return self._denoised(x, s, self.unet(x_in, s.c_noise, self._prepare_labels(labels, len(x))), return_logvar)


class PrecondCondition(PreconditionedNet):
    """The conditional denoiser D(x, sigma | y, sigma_y): the teacher's U-Net with a control branch that sees y. Two of
    them make NCVSD: inside the generative denoiser, and as the score network of its samples.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.ctrl, self.enc = self.encoder_class(self._unet_config), self.encoder_class(self._unet_config)
        self.dec = self.decoder_class(self._unet_config)
        self._add_logvar()

    def forward(
        self, x: Tensor, sigma: Sigma, y: Tensor, sigma_y: Sigma, labels: Labels = None, *, return_logvar: bool = False
    ):
        """Denoised [N,C,H,W] for x and y [N,C,H,W] at their noise levels; with return_logvar also [N,1,1,1]."""
        s, labels, features, control = self._encode(x, sigma, y, sigma_y, labels)
        return self._denoised(x, s, self.dec(features, control, s.c_noise, labels), return_logvar)


class Discriminator(PreconditionedNet):
    """Logits that x0 + sigma·n is real rather than generated, given y (SiDA, arXiv 2410.14919, made conditional)."""

    def __init__(self, *args: Any, head: str = "linear", **kwargs: Any) -> None:
        """`head` is "linear" as published, "joint" or "local", see `DiscriminatorHead`."""
        super().__init__(*args, **kwargs)
        self.local = head == "local"
        self.ctrl, self.enc = self.encoder_class(self._unet_config), self.encoder_class(self._unet_config)
        channels = 2 * self._unet_config.skip_channels[-1]
        self.out_conv = MPConv(channels, 1) if head == "linear" else DiscriminatorHead(channels, local=self.local)
        for module in self.modules():
            if isinstance(module, MPConv):
                module.forced = False

    def forward(self, x: Tensor, sigma: Sigma, y: Tensor, sigma_y: Sigma, labels: Labels = None) -> Tensor:
        """Logits [N] for x and y [N,C,H,W] at their noise levels; with a local head [N,P], one for each of P places."""
        *_, features, control = self._encode(x, sigma, y, sigma_y, labels)
        joined = mp_cat(control[-1], features[-1])
        if self.local:
            return self.out_conv(joined.to(torch.float32))
        return self.out_conv(joined.mean(dim=(2, 3), dtype=torch.float32)).flatten()


class Wrapper(nn.Module):
    """What stands around a `PrecondCondition` called `model`, and answers for it."""

    img_resolution, img_channels, label_dim, sigma_data, device = (
        property(attrgetter(f"model.{name}"))
        for name in ("img_resolution", "img_channels", "label_dim", "sigma_data", "device")
    )
    compute_dtype = property(attrgetter("model.compute_dtype"), lambda self, t: setattr(self.model, "compute_dtype", t))

    def __init__(self, model: PrecondCondition) -> None:
        super().__init__()
        self.model = model


class CombinedScore(Wrapper):
    """A score network S(x_t, t | y, sigma) on the combined observation of y and x_t. The published one is
    preconditioned for x_t alone: where y is much the better observation, its output is a small difference of large
    terms. Here the error shrinks with sigma, and it starts as the true posterior's score.
    """

    def forward(self, x: Tensor, sigma: Sigma, y: Tensor, sigma_y: Sigma, labels: Labels = None, **options: Any):
        """As `PrecondCondition`: denoised [N,C,H,W], with return_logvar also [N,1,1,1]."""
        return self.model(*combine_observations(y, sigma_y, x, sigma), y, sigma_y, labels, **options)


class DiscriminatorHead(nn.Module):
    """Logits from the features of x and y together, through two hidden layers: [N,1], or [N,H·W] one for each place.
    The published head is linear: a term of x plus a term of y. It sees whether x looks real, not whether x goes with y.
    """

    def __init__(self, channels: int, *, local: bool = False) -> None:
        super().__init__()
        kernel = (1, 1) if local else ()
        self.layers = nn.ModuleList(MPConv(channels, channels, kernel) for _ in range(2))
        self.output = MPConv(channels, 1, kernel)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = mp_silu(layer(x))
        return self.output(x).flatten(1)


class GenerativeDenoiser(Wrapper):
    """G(y, sigma): a sample of p(x0 | y) for y = x0 + sigma·n, in one network evaluation (NCVSD, Section 4). y is first
    noised a little further, to (1 + gamma)·sigma: that noise is the sample's source of randomness.
    """

    def __init__(self, model: PrecondCondition, gamma: float = 0.414, init_sigma: float = 80.0) -> None:
        super().__init__(model)
        self.gamma, self.init_sigma = gamma, init_sigma

    def forward(
        self,
        y: Tensor,  # noisy images [N,C,H,W]
        sigma: Sigma,  # their noise level
        labels: Labels = None,
        *,
        ts: Sequence[int] | None = None,  # grid indices of a few-step draw; None = one evaluation
        zeta: float = 1.0,  # share of fresh noise between steps
        return_logvar: bool = False,  # also return u [N,1,1,1]; one-step calls only
        randn_like: RandnLike = torch.randn_like,
    ):
        """A draw of x0 [N,C,H,W] given y. Raises ValueError for invalid ts, or ts with return_logvar."""
        if ts is not None:
            if return_logvar:
                raise ValueError("the log variance belongs to a one-step draw: leave out ts")
            levels = few_step_sigmas(ts, sigma_max=self.init_sigma, device=y.device)
            one_step = partial(self, labels=labels, randn_like=randn_like)
            return few_step_posterior(one_step, y, sigma, levels, zeta=zeta, randn_like=randn_like)

        y = y.to(torch.float32)
        sigma = expand_sigma(sigma, y)
        sigma_hat = (1 + self.gamma) * sigma
        y_hat = y + (sigma_hat.square() - sigma.square()).sqrt() * randn_like(y)
        return self.model(y_hat, sigma_hat, y, sigma, labels, return_logvar=return_logvar)
