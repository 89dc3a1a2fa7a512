"""Linear-Gaussian problems in dense linear algebra, and test scores for samples of a known Gaussian."""

from __future__ import annotations

from typing import NamedTuple

import torch

from sampling.grids import few_step_sigmas
from sampling.posterior import expand_sigma, few_step_posterior


def dense_matrix(operator, size):
    """The operator's matrix [m, H·W] on one-channel images, float64."""
    columns = torch.eye(size[0] * size[1], dtype=torch.float64).reshape(-1, 1, *size)
    return operator.forward(columns).flatten(1).T


def posterior(matrix, y, noise_std, prior_mean, prior_precision):
    """Mean and covariance of u given y = matrix·u + noise_std·n and a Gaussian prior, float64."""
    cov = torch.linalg.inv(matrix.T @ matrix / noise_std**2 + prior_precision)
    cov = (cov + cov.T) / 2
    return cov @ (matrix.T @ y.double().flatten() / noise_std**2 + prior_precision @ prior_mean.double().flatten()), cov


class Scores(NamedTuple):
    """How far sample moments are from the stated ones, in standard deviations of their Monte-Carlo error."""

    mean: float  # squared length of the whitened mean
    covariance: float  # Frobenius distance of the whitened covariance from the identity
    scale: float  # its trace

    @property
    def worst(self):
        return max(abs(self.mean), abs(self.covariance), abs(self.scale))


def moment_scores(samples, mean, cov):
    """Scores of samples [n,d] under the hypothesis that they are independent draws of N(mean, cov).

    With w the whitened samples and C = wᵀw/n: n·|mean of w|² is chi-squared with d degrees of freedom, |C - I|² has
    mean d(d+1)/n and standard deviation 2·sqrt(d(d+1))/n, and trace(C)/d has standard deviation sqrt(2/(n·d)).
    """
    n, d = samples.shape
    w = torch.linalg.solve_triangular(torch.linalg.cholesky(cov), (samples.double() - mean).T, upper=False).T
    c = w.T @ w / n
    distance = (c - torch.eye(d, dtype=c.dtype)).square().sum()
    return Scores(
        ((n * w.mean(0).square().sum() - d) / (2 * d) ** 0.5).item(),
        ((distance - d * (d + 1) / n) * n / (2 * (d * (d + 1)) ** 0.5)).item(),
        ((c.trace() / d - 1) / (2 / (n * d)) ** 0.5).item(),
    )


def entry_scores(samples, mean, cov):
    """Largest error of any pixel's sample mean, and of any entry of the sample covariance, in standard errors."""
    n = len(samples)
    centred = samples.double() - mean
    variance = cov.diagonal()
    return (
        (centred.mean(0) / (variance / n).sqrt()).abs().max().item(),
        ((centred.T @ centred / n - cov) / ((variance[:, None] * variance + cov**2) / n).sqrt()).abs().max().item(),
    )


class GaussianPrior:
    """Exact draws of p(x0 | y) for stationary Gaussian images, called like a generative denoiser.

    One channel; mean 0.2, standard deviation 0.5, a spectrum that falls off by a factor of 5 to the highest frequency.
    """

    img_channels = 1
    mean = 0.2

    def __init__(self, size):
        self.img_resolution = size
        frequencies = torch.fft.fftfreq(size, dtype=torch.float64)
        power = (1 + 4 * (frequencies[:, None] ** 2 + frequencies**2)) ** -1.5
        self.power = (0.25 * power / power.mean())[:, : size // 2 + 1]
        self.calls = []

    def __call__(self, y, sigma, labels=None, *, ts=None, zeta=1.0, randn_like=torch.randn_like):
        self.calls.append((float(torch.as_tensor(sigma).flatten()[0]), labels, ts, zeta))
        if ts is not None:
            levels = few_step_sigmas(ts)
            return few_step_posterior(
                lambda y, sigma: self.draw(y, sigma, randn_like), y, sigma, levels, zeta=zeta, randn_like=randn_like
            )
        return self.draw(y, sigma, randn_like)

    def draw(self, y, sigma, randn_like):
        sigma = expand_sigma(sigma, y)
        shrink = self.power.to(y.dtype) / (self.power.to(y.dtype) + sigma**2)
        noise = sigma * shrink.sqrt() * torch.fft.rfft2(randn_like(y))
        return self.mean + torch.fft.irfft2(shrink * torch.fft.rfft2(y - self.mean) + noise, s=y.shape[-2:])

    def moments(self):
        """Mean [d] and covariance [d,d] of the images, float64."""
        d = self.img_resolution**2
        impulses = torch.eye(d, dtype=torch.float64).reshape(d, self.img_resolution, self.img_resolution)
        cov = torch.fft.irfft2(self.power * torch.fft.rfft2(impulses), s=impulses.shape[-2:]).reshape(d, d)
        return torch.full([d], self.mean, dtype=torch.float64), (cov + cov.T) / 2


def split_gibbs_law(matrix, y, noise_std, prior, levels):
    """Exact mean and covariance of the last prior draw of split Gibbs sampling along `levels`, started at level 0."""
    mean, cov = prior.moments()
    d = len(mean)
    prior_values, prior_vectors = torch.linalg.eigh(cov)
    values, vectors = torch.linalg.eigh(matrix.T @ matrix)
    change = vectors.T @ prior_vectors
    data = vectors.T @ (matrix.T @ y.double().flatten()) / noise_std**2
    mean = prior_vectors.T @ mean

    # in the prior's eigenbasis: x = mean + shrink·(u - mean) + noise
    # in the operator's: u = step·(data + x/sigma²) + noise
    u_mean, u_cov = torch.zeros(d, dtype=torch.float64), levels[0] ** 2 * torch.eye(d, dtype=torch.float64)
    for i, sigma in enumerate(levels[:-1]):
        shrink = prior_values / (prior_values + sigma**2)
        x_mean = mean + shrink * (u_mean - mean)
        x_cov = shrink[:, None] * u_cov * shrink + (sigma**2 * shrink).diag()
        if i == len(levels) - 2:
            break
        step = 1 / (values / noise_std**2 + levels[i + 1] ** -2)
        weight = step / levels[i + 1] ** 2
        u_mean = change.T @ (step * data + weight * (change @ x_mean))
        u_cov = change.T @ (weight[:, None] * (change @ x_cov @ change.T) * weight + step.diag()) @ change
    return prior_vectors @ x_mean, prior_vectors @ x_cov @ prior_vectors.T
