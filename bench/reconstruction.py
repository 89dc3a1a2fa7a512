"""Reconstructions of linear measurements without a network, as dense algebra on small images."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

Prox = Callable[[Tensor, float], Tensor]  # (images [B,H,W], weight) -> images

CUT = 1e-6  # singular values below this share of the largest are left out of the pseudo-inverse
RATIO = 1.5  # between neighbouring weights that are tried


def dense_matrix(operator: Any, height: int, width: int) -> Tensor:
    """Return A of a linear operator as a matrix [h·w, H·W], float64, for one channel."""
    basis = torch.eye(height * width, dtype=torch.float64).view(-1, 1, height, width)
    return operator.forward(basis).flatten(1).T.contiguous()


def pseudo_inverse(matrix: Tensor, y: Tensor, shape: Sequence[int], cut: float = CUT) -> Tensor:
    """Return A⁺y [N,C,H,W]: the smallest of the images that fit y best."""
    return (_channels(y) @ torch.linalg.pinv(matrix, rtol=cut).T).view(shape)


def tikhonov(matrix: Tensor, y: Tensor, weight: float, shape: Sequence[int]) -> Tensor:
    """Return the minimiser [N,C,H,W] of |A u - y|² + weight·|∇u|²: for blurs, a Wiener filter of smooth images."""
    height, width = shape[-2:]
    basis = torch.eye(height * width, dtype=matrix.dtype).view(-1, height, width)
    smoothness = gradient_adjoint(gradient(basis)).flatten(1)
    return torch.linalg.solve(matrix.T @ matrix + weight * smoothness, matrix.T @ _channels(y).T).T.reshape(shape)


def total_variation(
    matrix: Tensor,  # A [m,n], of one channel
    y: Tensor,  # [N,C,h,w]
    weight: float,
    shape: Sequence[int],  # of the images [N,C,H,W]
    *,
    iterations: int = 400,
    inner: int = 10,  # iterations of each proximal step, which starts from the dual variables of the last one
    bounded: bool = False,  # among the images in [-1, 1]
    prox: Prox | None = None,  # another proximal step: (images [B,H,W], weight) → images
) -> Tensor:
    """Return the minimiser [N,C,H,W] of ½|A u - y|² + weight·TV(u), TV isotropic, each channel on its own.

    FISTA (Beck & Teboulle, "A Fast Iterative Shrinkage-Thresholding Algorithm for Linear Inverse Problems", 2009).
    """
    gram, back = matrix.T @ matrix, _channels(y) @ matrix
    step = 1 / torch.linalg.eigvalsh(gram)[-1].item()
    u = momentum = back.new_zeros(len(back), *shape[-2:])
    dual = u.new_zeros(2, *u.shape)
    t = 1.0
    for _ in range(iterations):
        descent = momentum - step * (momentum.flatten(1) @ gram - back).view_as(u)
        if prox is None:
            new, dual = tv_prox(descent, step * weight, dual, inner, bounded)
        else:
            new = prox(descent, step * weight)
        t, previous = (1 + math.sqrt(1 + 4 * t * t)) / 2, t
        u, momentum = new, new + (previous - 1) / t * (new - u)
    return u.view(shape)


def tv_prox(b: Tensor, weight: float, dual: Tensor, iterations: int, bounded: bool) -> tuple[Tensor, Tensor]:
    """Return the minimiser of ½|u - b|² + weight·TV(u) over images [B,H,W], and its dual variables [2,B,H,W].

    Projected gradient steps on the dual, accelerated (Beck & Teboulle, "Fast Gradient-Based Algorithms for Constrained
    Total Variation Image Denoising and Deblurring Problems", 2009).
    """

    def primal(dual: Tensor) -> Tensor:
        u = b - gradient_adjoint(dual)
        return u.clamp_(-1, 1) if bounded else u

    momentum, t = dual, 1.0
    for _ in range(iterations):
        new = momentum + gradient(primal(momentum)) / 8
        new = new / (new.square().sum(dim=0).sqrt() / weight).clamp_min_(1)
        t, previous = (1 + math.sqrt(1 + 4 * t * t)) / 2, t
        dual, momentum = new, new + (previous - 1) / t * (new - dual)
    return primal(dual), dual


def gradient(u: Tensor) -> Tensor:
    """Return forward differences [2,B,H,W] of images [B,H,W], down and to the right, 0 at the border."""
    g = u.new_zeros(2, *u.shape)
    g[0, :, :-1] = u[:, 1:] - u[:, :-1]
    g[1, :, :, :-1] = u[:, :, 1:] - u[:, :, :-1]
    return g


def gradient_adjoint(g: Tensor) -> Tensor:
    """Return the adjoint of `gradient`, [B,H,W]: minus the divergence."""
    u = g.new_zeros(g.shape[1:])
    u[:, 1:] += g[0, :, :-1]
    u[:, :-1] -= g[0, :, :-1]
    u[:, :, 1:] += g[1, :, :, :-1]
    u[:, :, :-1] -= g[1, :, :, :-1]
    return u


def interpolate(operator: Any, y: Tensor, shape: Sequence[int]) -> Tensor:
    """Return what takes no solver [N,C,H,W]: bicubic enlargement, linear interpolation of what was not removed (nearest
    outside its convex hull), and for blurs y itself.
    """
    height, width = shape[-2:]
    if hasattr(operator, "mask"):
        from scipy.interpolate import griddata

        known = operator.mask(height, width).numpy() > 0
        values = y.flatten(0, 1).numpy()[:, known].T
        places = tuple(np.indices((height, width)))
        points = np.argwhere(known)
        found = griddata(points, values, places, method="linear")
        nearest = griddata(points, values, places, method="nearest")
        return torch.from_numpy(np.where(np.isnan(found), nearest, found)).permute(2, 0, 1).reshape(shape)
    if y.shape[-2:] == shape[-2:]:
        return y
    size = (operator.factor * y.shape[-1], operator.factor * y.shape[-2])
    pictures = [Image.fromarray(picture) for picture in y.flatten(0, 1).float().numpy()]
    enlarged = np.stack([np.asarray(picture.resize(size, Image.Resampling.BICUBIC)) for picture in pictures])
    return torch.from_numpy(enlarged).to(y.dtype)[:, :height, :width].reshape(shape)


def tune_weight(score: Callable[[float], float], start: float, patience: int = 2) -> tuple[float, dict[float, float]]:
    """Return the weight of the largest score on the grid start·1.5^k and the scores of all that were tried.

    The grid grows on either side until the best has `patience` weights beyond it, or 20 steps from the start.
    """
    scores = {0: score(start)}
    while True:
        best = max(scores, key=scores.__getitem__)
        wanted = [k for k in range(best - patience, best + patience + 1) if k not in scores and abs(k) <= 20]
        if not wanted:
            return start * RATIO**best, {start * RATIO**k: scores[k] for k in sorted(scores)}
        nearest = min(wanted, key=lambda k: abs(k - best))
        scores[nearest] = score(start * RATIO**nearest)


def _channels(y: Tensor) -> Tensor:
    return y.reshape(y.shape[0] * y.shape[1], -1)
