"""Mixtures of Gaussians in the plane: density, exact denoiser, exact posterior and samples, all in closed form.

Points are [N,2,1,1], images of one pixel with two channels, so that losses and samplers take them as they are.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from networks.denoisers import Sigma
from sampling.posterior import RandnLike, expand_sigma


@dataclass(frozen=True)
class Conditionals:
    """One mixture for each of N conditions: what is known of x0 after an observation."""

    log_weights: Tensor  # [N,K], normalised
    means: Tensor  # [N,K,2]
    covariances: Tensor  # [N,K,2,2]

    def log_prob(self, x: Tensor, t: Sigma = 0.0) -> Tensor:
        """Log density [N] of x0 + t·n at x [N,2,1,1], the i-th point under the i-th mixture."""
        eye = torch.eye(2, dtype=x.dtype, device=x.device)
        covariances = self.covariances + expand_sigma(t, x).square() * eye
        return torch.logsumexp(self.log_weights + gaussian_log_prob(x.flatten(1)[:, None] - self.means, covariances), 1)

    def sample(self, count: int, randn_like: RandnLike = torch.randn_like) -> Tensor:
        """Draw [N,count,2]; two calls of `randn_like`, one choosing components, one placing the points in them."""
        shape = (len(self.means), count, 2)
        choice = randn_like(self.means.new_empty(shape))[..., 0]
        uniform = torch.special.ndtr(choice.to(torch.float64))
        edges = self.log_weights.to(torch.float64).exp().cumsum(1)
        index = torch.searchsorted(edges, uniform * edges[:, -1:]).clamp_max(edges.shape[1] - 1)
        rows = torch.arange(len(index), device=index.device)[:, None]
        factors = torch.linalg.cholesky(self.covariances)[rows, index]
        noise = randn_like(self.means.new_empty(shape))
        return self.means[rows, index] + (factors @ noise[..., None])[..., 0]


def gaussian_log_prob(difference: Tensor, covariance: Tensor) -> Tensor:
    """Log density [...] of 2-D Gaussians at difference [...,2] from their means, covariance [...,2,2]."""
    a, b, c = covariance[..., 0, 0], covariance[..., 0, 1], covariance[..., 1, 1]
    determinant = a * c - b * b
    dx, dy = difference[..., 0], difference[..., 1]
    mahalanobis = (c * dx * dx - 2 * b * dx * dy + a * dy * dy) / determinant
    return -0.5 * (mahalanobis + determinant.log()) - math.log(2 * math.pi)


class GaussianMixture(nn.Module):
    """A mixture in the plane, and as a module the exact denoiser D(x, sigma) = E[x0 | x0 + sigma·n = x].

    Stands wherever the losses and samplers take a teacher. Computes in the precision of its input.
    """

    img_resolution, img_channels, label_dim = 1, 2, 0

    def __init__(
        self,
        weights: Tensor,  # [K], positive
        means: Tensor,  # [K,2]
        axes: Tensor,  # [K,2,2], orthonormal columns: the principal axes
        variances: Tensor,  # [K,2] along the axes
        sigma_data: float = 0.5,  # standard deviation that networks for this data assume
    ) -> None:
        super().__init__()
        self.sigma_data = sigma_data
        self.register_buffer("log_weights", (weights / weights.sum()).log())
        self.register_buffer("means", means)
        self.register_buffer("axes", axes)
        self.register_buffer("variances", variances)

    def forward(self, x: Tensor, sigma: Sigma, labels: Tensor | None = None) -> Tensor:
        """Posterior mean [N,2,1,1] for x [N,2,1,1] (Tweedie's formula needs no score here: Gaussian conditioning)."""
        log_weights, _, projected, gains = self._observe(x, sigma)
        means = self.means.to(x.dtype) + torch.einsum("kde,nke->nkd", self.axes.to(x.dtype), gains * projected)
        return torch.einsum("nk,nkd->nd", log_weights.softmax(1), means).reshape(x.shape)

    def score(self, x: Tensor, sigma: Sigma) -> Tensor:
        """Gradient [N,2,1,1] of the log density of x0 + sigma·n at x (Tweedie: (D(x, sigma) - x)/sigma²)."""
        return (self(x, sigma) - x) / expand_sigma(sigma, x).square()

    def posterior(self, y: Tensor, sigma: Sigma) -> Conditionals:
        """p(x0 | y) for observations y = x0 + sigma·n [N,2,1,1]."""
        log_weights, total, projected, gains = self._observe(y, sigma)
        axes, variances = self.axes.to(y.dtype), self.variances.to(y.dtype)
        means = self.means.to(y.dtype) + torch.einsum("kde,nke->nkd", axes, gains * projected)
        left = variances * (expand_sigma(sigma, y)[:, :, 0] ** 2 / total)  # along each axis
        return Conditionals(log_weights.log_softmax(1), means, torch.einsum("kde,nke,kfe->nkdf", axes, left, axes))

    def posterior_of_coordinate(self, value: Tensor, std: float) -> Conditionals:
        """p(x0 | value) for noisy observations [N] of the first coordinate, noise of standard deviation std."""
        covariances, means = self.covariances().to(value.dtype), self.means.to(value.dtype)
        total = covariances[:, 0, 0] + std**2
        innovation = value[:, None] - means[:, 0]
        log_weights = self.log_weights.to(value.dtype) - 0.5 * (innovation.square() / total + total.log())
        gain = covariances[:, :, 0] / total[:, None]
        left = covariances - gain[:, :, None] * covariances[:, None, :, 0]
        return Conditionals(
            log_weights.log_softmax(1),
            means + gain * innovation[..., None],
            left.expand(len(value), *left.shape),
        )

    def prior(self, count: int = 1) -> Conditionals:
        """The mixture itself, `count` times."""
        tensors = (self.log_weights, self.means, self.covariances())
        return Conditionals(*(tensor.expand(count, *tensor.shape) for tensor in tensors))

    def sample(self, count: int, randn_like: RandnLike = torch.randn_like, dtype=torch.float32) -> Tensor:
        """Draw points [count,2,1,1]."""
        return self.prior().sample(count, randn_like)[0].to(dtype).reshape(count, 2, 1, 1)

    def covariances(self) -> Tensor:
        """Covariance of each component [K,2,2]."""
        return torch.einsum("kde,ke,kfe->kdf", self.axes, self.variances, self.axes)

    def responsibilities(self, x: Tensor) -> Tensor:
        """Probability [N,K] that clean points x [N,2,1,1] came from each component."""
        log_weights, *_ = self._observe(x, 0.0)
        return log_weights.softmax(1)

    def _observe(self, y: Tensor, sigma: Sigma) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Unnormalised log weights [N,K]; variance of y, distance to the means and gain, along the axes [N,K,2]."""
        variances = self.variances.to(y.dtype)
        total = variances + expand_sigma(sigma, y)[:, :, 0].square()
        offset = (self.means[:, :, None] * self.axes).sum(1).to(y.dtype)
        projected = torch.einsum("nd,kde->nke", y.flatten(1), self.axes.to(y.dtype)) - offset
        log_density = -0.5 * (projected.square() / total + total.log()).sum(2)
        return self.log_weights.to(y.dtype) + log_density, total, projected, variances / total


class ExactDenoiser:
    """The generative denoiser that distillation aims at: exact draws of p(x0 | y), called like the trained one."""

    img_resolution, img_channels, label_dim = 1, 2, 0

    def __init__(self, mixture: GaussianMixture) -> None:
        self.mixture = mixture

    def __call__(self, y: Tensor, sigma: Sigma, labels: Tensor | None = None, *, randn_like=torch.randn_like, **_):
        """Draw x0 [N,2,1,1] given y. Few-step arguments are accepted and change nothing: one draw is exact."""
        return self.mixture.posterior(y, sigma).sample(1, randn_like).reshape(y.shape)


def spiral_arms(
    components: int = 40,  # per arm
    turns: float = 1.1,  # of each arm
    inner: float = 0.22,  # inner radius, outer = 1 before scaling
    width: float = 0.05,  # standard deviation across an arm, outer radius = 1
    sigma_data: float = 0.5,  # standard deviation per coordinate after scaling
) -> GaussianMixture:
    """Two interleaved spiral arms of equally long, thin components, of mean 0 and standard deviation sigma_data."""
    fine = torch.linspace(0, 1, 4001, dtype=torch.float64)

    def curve(u: Tensor) -> Tensor:
        radius, angle = inner + (1 - inner) * u, 2 * math.pi * turns * u
        return torch.stack([radius * angle.cos(), radius * angle.sin()], 1)

    lengths = (curve(fine)[1:] - curve(fine)[:-1]).norm(dim=1).cumsum(0)
    wanted = (torch.arange(components, dtype=torch.float64) + 0.5) / components * lengths[-1]
    u = fine[1:][torch.searchsorted(lengths, wanted)]
    means = curve(u)
    tangents = torch.nn.functional.normalize(curve(u + 1e-4) - curve(u - 1e-4), dim=1)
    normals = torch.stack([-tangents[:, 1], tangents[:, 0]], 1)
    axes = torch.stack([tangents, normals], 2)
    along = 0.5 * lengths[-1] / components
    variances = torch.tensor([float(along) ** 2, width**2], dtype=torch.float64).expand(components, 2)
    second_moment = (means.square().sum(1).mean() + variances[0].sum()) / 2
    scale = sigma_data / second_moment.sqrt()
    both = [
        torch.cat([part, part * sign]) for part, sign in ((means * scale, -1), (axes, -1), (variances * scale**2, 1))
    ]
    return GaussianMixture(torch.ones(2 * components, dtype=torch.float64), *both, sigma_data=sigma_data)
