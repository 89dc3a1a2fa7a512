"""Plug-and-play posterior sampling: annealed split Gibbs with a generative denoiser as the prior."""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any, NamedTuple

import torch
from torch import Tensor

from inverse.likelihood import langevin_step, likelihood_std
from inverse.operators.base import Operator
from inverse.tasks import LIKELIHOODS, LangevinSettings
from sampling.posterior import RandnLike


class LangevinWarning(UserWarning):
    """Langevin chains diverged and were run again with a smaller step size."""


class PnPResult(NamedTuple):
    """Posterior samples, and how their likelihood steps were drawn."""

    images: Tensor  # [N,C,H,W] in [-1, 1] up to the network's overshoot: the running estimate at the end
    likelihood: str  # "exact" or "langevin"
    retries: Tensor  # [N] int64: Langevin chains of this image that were run again with a smaller step size


def resolve_likelihood(operator: Operator, likelihood: str) -> str:
    """Return "exact" or "langevin": "auto" is exact where the operator allows it. Raises ValueError where none is."""
    if likelihood not in LIKELIHOODS:
        raise ValueError(f"likelihood must be one of {', '.join(LIKELIHOODS)}, not {likelihood!r}")
    if likelihood == "exact" and not operator.has_exact_step:
        raise ValueError("this operator has no exact likelihood step: use likelihood langevin or auto")
    return ("exact" if operator.has_exact_step else "langevin") if likelihood == "auto" else likelihood


@torch.no_grad()
def pnp_sample(
    net: Callable[..., Tensor],  # generative denoiser: net(u, sigma, labels, ts=, zeta=, randn_like=) -> draw of x0
    operator: Operator,
    y: Tensor,  # measurements A(x) + noise [N,...]
    sigmas: Sequence[float] | Tensor,  # decreasing noise levels [L]; published: 50 from 80 to 0.002 with rho 2
    *,
    beta: float,  # 2·(measurement noise std)²; larger = the measurement is trusted less
    ema_decay: float = 0.0,  # share of the previous running estimate; 0 = no averaging
    ema_sigma: float = 0.0,  # averaging is on below this noise level
    likelihood: str = "auto",  # auto, exact or langevin
    langevin: LangevinSettings | None = None,  # None = the published settings
    labels: Tensor | None = None,  # class weights [N,label_dim]
    ts: Sequence[int] | None = None,  # grid indices of a few-step draw of the prior step; None = one evaluation
    zeta: float = 1.0,  # share of fresh noise between the few steps
    shape: Sequence[int] | None = None,  # of the images, [N,C,H,W]; None = from y and the network's resolution
    randn_like: RandnLike = torch.randn_like,
    progress: Callable[[int, int], Any] | None = None,  # called after each level with (levels done, levels in all)
) -> PnPResult:
    """Draw an image from p(x | y) for each measurement, batched (NCVSD, arXiv 2506.09416; PnP-DM, arXiv 2405.18782).

    From u = sigma_0·n, for each level i but the last: x ~ p(x0 | u) by the generative denoiser at sigma_i, averaged
    into a running estimate where sigma_i < ema_sigma; then u ~ p(u | x, y) at sigma_{i+1}, but after the last x. The
    estimate is returned. Noise is drawn on y's device in that order: start, then per level the network's own and the
    likelihood step's. With a random stream per image (`SeededNoise`), an image does not depend on its batch, up to
    rounding. Warns (LangevinWarning) where Langevin chains were repeated with a smaller step size. Raises ValueError
    for settings, shapes and outputs that do not fit, LangevinDivergenceError if repeating did not help.
    """
    levels = torch.as_tensor(sigmas, dtype=torch.float64).flatten().tolist()
    if len(levels) < 2 or not all(a > b > 0 for a, b in zip(levels, levels[1:], strict=False)):
        shown = f"{len(levels)} levels" + (f" from {levels[0]:.4g} to {levels[-1]:.4g}" if levels else "")
        raise ValueError(f"the noise levels must be at least two, positive and decreasing, not {shown}")
    kind = resolve_likelihood(operator, likelihood)
    settings, noise_std = asdict(langevin or LangevinSettings()), likelihood_std(beta)
    if not 0 <= ema_decay < 1:
        raise ValueError(f"ema_decay is the share of the previous estimate and must lie in [0, 1), not {ema_decay}")
    if shape is None:
        shape = (y.shape[0], net.img_channels, net.img_resolution, net.img_resolution)
    start = torch.empty(tuple(shape), dtype=y.dtype, device=y.device)
    operator.check_pair(start, y)
    estimate = u = levels[0] * randn_like(start)
    retries = torch.zeros(len(y), dtype=torch.int64)
    for i, sigma in enumerate(levels[:-1]):
        x = net(u, sigma, labels, ts=ts, zeta=zeta, randn_like=randn_like)
        if not x.isfinite().all():
            raise ValueError(_why_not_finite(net, u, sigma, y, beta))
        averaged = i > 0 and sigma < ema_sigma
        estimate = ema_decay * estimate + (1 - ema_decay) * x if averaged else x
        if i < len(levels) - 2:
            if kind == "exact":
                u = operator.sample_conditional(x, y, noise_std, levels[i + 1], randn_like)
            else:
                step = langevin_step(operator, x, y, beta, levels[i + 1], randn_like=randn_like, **settings)
                u, retries = step.sample, retries + step.retries
        if progress is not None:
            progress(i + 1, len(levels) - 1)
    if retries.any():
        count, images = int(retries.sum()), f"{int((retries > 0).sum())} of {len(retries)} images"
        text = f"Langevin diverged and was repeated with a smaller step size {count} times, in {images}"
        warnings.warn(f"{text}; a smaller c1 avoids this", LangevinWarning, stacklevel=3)  # the caller, beyond no_grad
    return PnPResult(estimate, kind, retries)


def _why_not_finite(net: Any, u: Tensor, sigma: float, y: Tensor, beta: float) -> str:
    """The cause why the network's output for the input u is not finite."""
    failed = f"the network's output at noise level {sigma:.4g} is not finite: "
    dtype = getattr(net, "compute_dtype", torch.float32)
    u_max, y_max = u.abs().max().item(), y.abs().max().item()
    if not u_max < 100 * (1 + sigma):
        likelihood = f"its input, from the likelihood step before, reaches {u_max:.3g} where images lie in [-1, 1]"
        given = f"y reaches {y_max:.3g}, and beta is {beta:g}: check the measurements' scale, beta and the operator"
        return f"{failed}{likelihood}; {given}"
    if dtype != torch.float32:
        return f"{failed}it was computed in {str(dtype).removeprefix('torch.')}: try float32"
    return f"{failed}its input is, and it was computed in float32: the network's weights must be damaged"
