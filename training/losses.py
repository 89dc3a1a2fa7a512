"""The losses of teacher pretraining and of NCVSD as pure functions: networks and tensors in, elementwise losses out.

Noisy images y = x0 + sigma·n and x_t = x0 + t·n are [N,C,H,W]; noise levels are numbers, [N] or [N,1,1,1].
Which network is in training mode, and which receives gradients, is the caller's choice except where a loss says so.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from networks.posterior import combine_observations, expand_sigma

RandnLike = Callable[[Tensor], Tensor]
Sigma = float | Tensor


def denoising_weight(t: Tensor, sigma_data: float) -> Tensor:
    """EDM's loss weight w(t) = (t² + sigma_data²)/(t·sigma_data)² (EDM, Table 1)."""
    return (t.square() + sigma_data**2) / (t * sigma_data).square()


def weighted_error(error: Tensor, t: Tensor, logvar: Tensor, sigma_data: float) -> Tensor:
    """Squared error weighted by w(t) and by the learned uncertainty u: w/exp(u)·error² + u (EDM2, Eq. 21)."""
    return denoising_weight(t, sigma_data) / logvar.exp() * error.square() + logvar


def edm2_loss(net, images: Tensor, sigma: Sigma, labels: Tensor | None = None, *, randn_like: RandnLike) -> Tensor:
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
    labels: Tensor | None = None,  # class weights [N,label_dim]
    *,
    randn_like: RandnLike,
    combine: Callable[..., tuple[Tensor, Tensor]] = combine_observations,  # (y, sigma, x_t, t) -> teacher's (x, sigma)
) -> tuple[Tensor, Tensor | None]:
    """Variational score distillation loss [N,C,H,W] and adversarial loss [N,1,1,1] or None (NCVSD, Section 4).

    The target score of p(x_t | y) is the teacher's at the combined observation of y and x_t: the score identity.
    Another `combine` gives another target, such as the score of p(x_t) from one that returns x_t and t.
    """
    t = expand_sigma(t, y)
    x, logvar = generator(y, sigma, labels, return_logvar=True, randn_like=randn_like)
    x_t = x + t * randn_like(x)
    with torch.no_grad():
        target = teacher(*combine(y, sigma, x_t, t), labels)
        estimate = score_net(x_t, t, y, sigma, labels)
        direction = target - estimate
    error = x - (direction + x).detach()
    vsd = weighted_error(error, t, logvar, score_net.sigma_data)
    if discriminator is None:
        return vsd, None
    logits = discriminator(x_t, t, y, sigma, labels)
    return vsd, _bce(logits, 1.0)


def score_loss(
    generator, score_net, y: Tensor, sigma: Sigma, t: Sigma, labels: Tensor | None = None, *, randn_like: RandnLike
) -> Tensor:
    """Denoising loss [N,C,H,W] of the score network on the generator's samples (NCVSD, Section 4)."""
    t = expand_sigma(t, y)
    with torch.no_grad():
        x = generator(y, sigma, labels, randn_like=randn_like)
    denoised, logvar = score_net(x + t * randn_like(x), t, y, sigma, labels, return_logvar=True)
    return weighted_error(denoised - x, t, logvar, score_net.sigma_data)


def discriminator_loss(
    generator,
    discriminator,
    images: Tensor,  # clean images [N,C,H,W], those that y was made of
    y: Tensor,
    sigma: Sigma,
    t: Sigma,
    labels: Tensor | None = None,
    *,
    randn_like: RandnLike,
) -> tuple[Tensor, Tensor]:
    """Cross-entropies [N,1,1,1] on generated and on real images; the discriminator's loss is half their sum (SiDA)."""
    t = expand_sigma(t, y)
    with torch.no_grad():
        x = generator(y, sigma, labels, randn_like=randn_like)
        real_t = images + t * randn_like(images)
        fake_t = x + t * randn_like(x)
    real = _bce(discriminator(real_t, t, y, sigma, labels), 1.0)
    fake = _bce(discriminator(fake_t, t, y, sigma, labels), 0.0)
    return fake, real


def _bce(logits: Tensor, target: float) -> Tensor:
    loss = F.binary_cross_entropy_with_logits(logits, torch.full_like(logits, target), reduction="none")
    return loss.reshape(-1, 1, 1, 1)
