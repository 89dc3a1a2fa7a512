"""The losses of teacher pretraining and of NCVSD as pure functions: networks and tensors in, elementwise losses out.

Noisy images y = x0 + sigma·n and x_t = x0 + t·n are [N,C,H,W]; noise levels are numbers, [N] or [N,1,1,1].
Which network is in training mode, and which receives gradients, is the caller's choice except where a loss says so.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from sampling.posterior import RandnLike, combine_observations, expand_sigma

Sigma = float | Tensor
Labels = Tensor | None  # class weights [N,label_dim]


def denoising_weight(t: Tensor, sigma_data: float) -> Tensor:
    """EDM's loss weight w(t) = (t² + sigma_data²)/(t·sigma_data)² (EDM, Table 1)."""
    return (t.square() + sigma_data**2) / (t * sigma_data).square()


def weighted_error(error: Tensor, t: Tensor, logvar: Tensor, sigma_data: float) -> Tensor:
    """Squared error weighted by w(t) and by the learned uncertainty u: w/exp(u)·error² + u (EDM2, Eq. 21)."""
    return denoising_weight(t, sigma_data) / logvar.exp() * error.square() + logvar


def edm2_loss(net, images: Tensor, sigma: Sigma, labels: Labels = None, *, randn_like: RandnLike) -> Tensor:
    """Denoising loss [N,C,H,W] of a teacher on clean images [N,C,H,W] (EDM2, Eq. 21)."""
    sigma = expand_sigma(sigma, images)
    noisy = images + sigma * randn_like(images)
    denoised, logvar = net(noisy, sigma, labels, return_logvar=True)
    return weighted_error(denoised - images, sigma, logvar, net.sigma_data)


def generator_loss(
    generator,  # GenerativeDenoiser being trained
    teacher,  # Precond
    score_net,  # PrecondCondition that follows the generator's distribution
    discriminator,  # Discriminator; None = no adversarial loss
    y: Tensor,
    sigma: Sigma,  # level of y
    t: Sigma,  # level of x_t
    labels: Labels = None,
    *,
    randn_like: RandnLike,
    combine: Callable[..., tuple[Tensor, Tensor]] = combine_observations,  # (y, sigma, x_t, t) -> teacher's (x, sigma)
    direction: str = "vsd",  # or "sid"
    alpha: float = 1.0,  # of SiD
    scale: str = "learned",  # or "abs", "square", "output", "unit": see `inverse_scale`
    divergence: str = "reverse-kl",  # or "forward-kl", "js": see `divergence_weight`
    balance: bool = False,  # give the adversarial loss a gradient of the same norm at x
) -> tuple[Tensor, Tensor | None]:
    """Distillation loss [N,C,H,W] and adversarial loss [N,1,1,1] or None (NCVSD, Section 4).

    The target score of p(x_t | y) is the teacher's at the combined observation of y and x_t: the score identity.
    Another `combine` gives another target, such as the score of p(x_t) from one that returns x_t and t.
    """
    t = expand_sigma(t, y)
    x, logvar = generator(y, sigma, labels, return_logvar=True, randn_like=randn_like)
    x_t = x + t * randn_like(x)
    with torch.set_grad_enabled(direction == "sid" and torch.is_grad_enabled()):
        combined, level = combine(y, sigma, x_t, t)
        target = teacher(combined, level, labels)
        estimate = score_net(x_t, t, y, sigma, labels)
    if scale == "learned":
        loss = weighted_error(x - (target - estimate + x).detach(), t, logvar, score_net.sigma_data)
    else:
        gap, step = (x - target).detach(), (target - estimate).detach()
        factor = inverse_scale(scale, gap, step, expand_sigma(level, y), expand_sigma(sigma, y), score_net.sigma_data)
        loss = distillation_error(direction, x, target, estimate, alpha) * factor
    if discriminator is None:
        return loss, None
    logits = discriminator(x_t, t, y, sigma, labels)
    loss = loss * divergence_weight(divergence, logits.detach(), t)
    adversarial = _bce(logits, 1.0)
    if balance:
        norms = [torch.autograd.grad(part.sum(), x, retain_graph=True)[0].norm() for part in (loss, adversarial)]
        adversarial = adversarial * (norms[0] / norms[1].clamp_min(1e-12))
    return loss, adversarial


def distillation_error(direction: str, x: Tensor, target: Tensor, estimate: Tensor, alpha: float = 1.0) -> Tensor:
    """What drives x from the score network's `estimate` to the `target`, elementwise, both of E[x0 | x_t, y].

    "vsd": a square whose gradient at x is estimate - target. "sid": SiD's loss, whose gradient passes through x_t
    and both networks (SiD, arXiv 2404.04057, Eq. 23).
    """
    if direction == "vsd":
        return 0.5 * (x - (target - estimate + x).detach()).square()
    difference = target - estimate
    return difference * (target - x - alpha * difference)


def inverse_scale(scale: str, gap: Tensor, step: Tensor, level: Tensor, sigma: Tensor, sigma_data: float) -> Tensor:
    """Factor [N,1,1,1] on the distillation loss of images whose target is `gap`, and estimate `step`, away [N,C,H,W].

    "abs": 1/mean |gap| (DMD, SiD). "square": 1/mean gap². "output": 1/(c_out(level)·c_out(sigma)) with EDM's c_out: the
    errors of networks at the combined level, and steps of the generator at sigma, in units of the U-Nets' output.
    "unit": 1/(c_out(sigma)·rms step), a gradient of one size at the generator's raw output for every image.
    """
    if scale == "unit":
        size = step.square().mean(dim=(1, 2, 3), keepdim=True).sqrt().clamp_min(1e-6)
        return denoising_weight(sigma, sigma_data).sqrt() / size
    if scale == "output":
        return (denoising_weight(level, sigma_data) * denoising_weight(sigma, sigma_data)).sqrt()
    size = (gap.abs() if scale == "abs" else gap.square()).mean(dim=(1, 2, 3), keepdim=True)
    return 1 / size.clamp_min(1e-8)


def divergence_weight(divergence: str, logits: Tensor, t: Tensor, bins: int = 4) -> Tensor:
    """Weight [N,1,1,1] of each image by the density ratio r = exp(logit) of real to generated (f-distill, 2502.15681).

    f''(r)·r² of the divergence: 1 for the reverse KL, r for the forward KL, r/(r+1) for Jensen-Shannon; clipped to
    0.1..20 and divided by its mean within bins of equal numbers of t.
    """
    if divergence == "reverse-kl":
        return torch.ones_like(t)
    logit = logits.reshape(len(t), -1).mean(1)
    weight = (logit.exp() if divergence == "forward-kl" else logit.sigmoid()).clamp(0.1, 20)
    for part in t.flatten().argsort().tensor_split(bins):
        weight[part] = weight[part] / weight[part].mean()
    return weight.reshape(t.shape)


def score_loss(
    generator, score_net, y: Tensor, sigma: Sigma, t: Sigma, labels: Labels = None, *, randn_like: RandnLike
) -> Tensor:
    """Denoising loss [N,C,H,W] of the score network on the generator's samples (NCVSD, Section 4)."""
    t = expand_sigma(t, y)
    with torch.no_grad():
        x = generator(y, sigma, labels, randn_like=randn_like)
    denoised, logvar = score_net(x + t * randn_like(x), t, y, sigma, labels, return_logvar=True)
    return weighted_error(denoised - x, t, logvar, score_net.sigma_data)


def discriminator_loss(
    generator, discriminator, images, y: Tensor, sigma: Sigma, t: Sigma, labels: Labels = None, *, randn_like: RandnLike
) -> tuple[Tensor, Tensor]:
    """Cross-entropies [N,1,1,1] on generated and on real images, the clean ones [N,C,H,W] that y was made of; the
    discriminator's loss is half their sum (SiDA).
    """
    t = expand_sigma(t, y)
    with torch.no_grad():
        x = generator(y, sigma, labels, randn_like=randn_like)
        real_t = images + t * randn_like(images)
        fake_t = x + t * randn_like(x)
    real = _bce(discriminator(real_t, t, y, sigma, labels), 1.0)
    return _bce(discriminator(fake_t, t, y, sigma, labels), 0.0), real


def _bce(logits: Tensor, target: float) -> Tensor:
    loss = F.binary_cross_entropy_with_logits(logits, torch.full_like(logits, target), reduction="none")
    return loss.reshape(len(loss), -1).mean(1).reshape(-1, 1, 1, 1)
