"""Distances between sets of features, and scores of one set; all sums are taken in float64. Fréchet distance of
moments; kernel distance, precision and recall of single features; inception score of logits. Features and logits are
arrays or tensors [N,D] on any device with float64.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from torch_utils import distributed

Features = Tensor | np.ndarray
_ROUNDING = 1e-6  # of tr(C1 + C2): how far below 0 a distance may come out
_TIE = 1e-12  # squared distances this close, relative to the squared norms, are equal: they are rounded at 1e-15


class FeatureMoments:
    """Mean and covariance of features that arrive in batches, summed in float64 about the first batch's mean, so that
    features far from 0 lose no digits, on `device` (on the CPU for MPS, which has no float64); memory is O(D²).
    """

    def __init__(self, dim: int, device: torch.device | str = "cpu") -> None:
        self.device = torch.device("cpu" if torch.device(device).type == "mps" else device)
        self.count = 0
        self._shift: Tensor | None = None
        self._sum, self._outer = (torch.zeros(n, dtype=torch.float64, device=self.device) for n in (dim, (dim, dim)))

    def add(self, features: Tensor) -> None:
        """Take in features [N,D]. Raises ValueError for another shape or for values that are not finite."""
        if features.ndim != 2 or features.shape[1] != len(self._sum):
            raise ValueError(f"features of shape {list(features.shape)} do not fit [N,{len(self._sum)}]")
        if not torch.isfinite(features).all():
            raise ValueError("features are not finite")
        if not len(features):
            return
        x = features.detach().to(self.device).to(torch.float64)
        self._shift = x.mean(dim=0) if self._shift is None else self._shift
        x = x - self._shift
        self.count += len(x)
        self._sum += x.sum(dim=0)
        self._outer += x.T @ x

    def merge_processes(self) -> None:
        """Make every process's moments those of all processes' features. Collective; does nothing for one process."""
        if distributed.world_size() == 1:
            return
        device = distributed.collective_device()
        counts = torch.zeros(distributed.world_size(), dtype=torch.float64, device=device)
        counts[distributed.rank()] = self.count
        torch.distributed.all_reduce(counts)
        if not counts.any():
            return
        shift = torch.zeros_like(self._sum) if self._shift is None else self._shift
        common = shift.to(device, copy=True)
        torch.distributed.broadcast(common, src=int(counts.nonzero()[0]))
        common = common.to(self.device)
        change = shift - common  # sums about the own shift become sums about the common one
        cross = torch.outer(self._sum, change)
        self._outer += cross + cross.T + self.count * torch.outer(change, change)
        self._sum += self.count * change
        for total in (self._sum, self._outer):
            torch.distributed.all_reduce(message := total.to(device, copy=True))
            total.copy_(message)
        self._shift, self.count = common, int(counts.sum())

    def mean(self) -> Tensor:
        """Mean [D]. Raises ValueError before the first feature."""
        if self._shift is None:
            raise ValueError("no features were added")
        return self._shift + self._sum / self.count

    def cov(self) -> Tensor:
        """Unbiased covariance [D,D]. Raises ValueError for fewer than two features."""
        if self.count < 2:
            raise ValueError(f"a covariance needs at least 2 images, got {self.count}")
        return (self._outer - torch.outer(self._sum, self._sum) / self.count) / (self.count - 1)


def frechet_distance(mu1: Tensor, cov1: Tensor, mu2: Tensor, cov2: Tensor) -> float:
    """|mu1 - mu2|² + tr(C1 + C2 - 2·(C1·C2)^½) for means [D] and covariances [D,D], in float64.

    The trace of the root is the sum of roots of the eigenvalues of Rᵀ·C2·R with R·Rᵀ = C1, which is symmetric, so that
    nothing turns complex for singular covariances. Their rounding amounts to about 1e-8 of tr(C1 + C2): a result below
    0 by at most 1e-6 of that sum is returned as 0; one further below, which no two covariances have, as it is. Tensors
    or arrays; computed where `mu1` is (on the CPU for MPS). Raises ValueError for shapes and values that do not fit.
    """
    device = mu1.device if isinstance(mu1, Tensor) and mu1.device.type != "mps" else torch.device("cpu")
    arrays = [torch.as_tensor(a).detach().to(device).to(torch.float64) for a in (mu1, cov1, mu2, cov2)]
    mu1, cov1, mu2, cov2 = arrays
    if mu1.ndim != 1 or mu1.shape != mu2.shape or cov1.shape != cov2.shape or cov1.shape != (len(mu1), len(mu1)):
        raise ValueError(f"statistics do not fit together: shapes {', '.join(str(list(a.shape)) for a in arrays)}")
    if not all(torch.isfinite(a).all() for a in arrays):
        raise ValueError("statistics are not finite")
    root, singular = torch.linalg.cholesky_ex(cov1)
    if singular:
        values, vectors = torch.linalg.eigh(cov1)
        root = vectors * values.clamp(min=0).sqrt()
        product = root.T @ cov2 @ root
    else:
        product = torch.zeros_like(cov2)
        for i in range(0, len(cov1), 256):  # R is triangular, and the lower triangle enough: a third of the work
            product[i:, i : i + 256] = root[i:, i:].T @ (cov2[i:, i:] @ root[i:, i : i + 256])
    eigenvalues = torch.linalg.eigvalsh(product)
    variances = float(cov1.trace() + cov2.trace())
    distance = float((mu1 - mu2).square().sum()) + variances - 2 * float(eigenvalues.clamp(min=0).sqrt().sum())
    return 0.0 if -_ROUNDING * abs(variances) <= distance < 0 else distance


class MeanStd(NamedTuple):
    """Mean and standard deviation (of the population, ddof 0) over subsets or splits."""

    mean: float
    std: float


@dataclass(frozen=True)
class PrecisionRecall:
    """Fractions in [0, 1]."""

    precision: float  # of the generated samples, those within the manifold of the real ones
    recall: float  # of the real samples, those within the manifold of the generated ones


def kernel_distance(
    features1: Features, features2: Features, *, num_subsets: int = 100, subset_size: int = 1000, seed: int = 0
) -> MeanStd:
    """Squared maximum mean discrepancy of sets [N,D] and [M,D] with the kernel (x·y/D + 1)³, unbiased, over random
    subsets: the kernel distance of Binkowski et al. (2018, arXiv 1801.01401, section 4), KID in Inception features.
    Each subset draws `subset_size` samples, or N or M where that is less, without replacement, first from set 1. Being
    unbiased, it may be negative. Raises ValueError for fewer than 2 samples, and values and shapes that do not fit.
    """
    features1, features2 = _checked(features1=features1, features2=features2)
    if num_subsets < 1 or subset_size < 2:
        raise ValueError(f"kernel distance: {num_subsets} subsets of {subset_size}; at least 1 of 2 samples are needed")
    size = min(subset_size, len(features1), len(features2))
    if size < 2:
        raise ValueError(f"kernel distance: at least 2 samples per set, got {len(features1)} and {len(features2)}")
    rng, values = np.random.default_rng(seed), []
    for _ in range(num_subsets):
        rows = [torch.from_numpy(rng.choice(len(f), size, replace=False)) for f in (features1, features2)]
        x, y = (f[i.to(f.device)].to(torch.float64) for f, i in zip((features1, features2), rows, strict=True))
        xx, yy, xy = ((a @ b.T / x.shape[1] + 1) ** 3 for a, b in ((x, x), (y, y), (x, y)))
        within = xx.sum() - xx.trace() + yy.sum() - yy.trace()
        values.append(float(within / (size * (size - 1)) - 2 * xy.mean()))
    return MeanStd(float(np.mean(values)), float(np.std(values)))


def precision_recall(real: Features, fake: Features, *, k: int = 3, chunk: int = 4096) -> PrecisionRecall:
    """Improved precision and recall (Kynkäänniemi et al. 2019, arXiv 1904.06991) of sets [N,D] and [M,D], whose
    distances take about 24·chunk² bytes at a time. The manifold of a set is the union of balls around its samples, each
    reaching to the sample's k-th nearest neighbour in the set, border included. Raises ValueError for fewer than k + 1
    samples, and what does not fit.
    """
    real, fake = _checked(real=real, fake=fake)
    if k < 1 or chunk < 1:
        raise ValueError(f"precision and recall: k = {k} and chunk = {chunk} must be at least 1")
    for name, features in (("real", real), ("fake", fake)):
        if len(features) < k + 1:
            raise ValueError(f"precision and recall: k = {k} needs {k + 1} {name} samples or more, got {len(features)}")
    center = real.mean(dim=0, dtype=torch.float64)  # features far from 0 lose no digits in the distances
    real_radii, fake_radii = (_squared_radii(f, center, k, chunk) for f in (real, fake))
    real_inside, fake_inside = (torch.zeros(len(f), dtype=torch.bool, device=f.device) for f in (real, fake))
    for i in range(0, len(fake), chunk):
        for j in range(0, len(real), chunk):
            rows, cols = slice(i, i + chunk), slice(j, j + chunk)
            distances, ties = _squared_distances(fake[rows], real[cols], center)
            distances -= ties
            fake_inside[rows] |= (distances <= real_radii[cols]).any(dim=1)
            real_inside[cols] |= (distances <= fake_radii[rows, None]).any(dim=0)
    return PrecisionRecall(float(fake_inside.double().mean()), float(real_inside.double().mean()))


def _squared_radii(features: Tensor, center: Tensor, k: int, chunk: int) -> Tensor:
    """Squared distance of each sample to its k-th nearest other sample, float64 [N]."""
    radii = []
    for i in range(0, len(features), chunk):
        rows = features[i : i + chunk]
        nearest = torch.full((len(rows), k), torch.inf, dtype=torch.float64, device=features.device)
        for j in range(0, len(features), chunk):
            distances, _ = _squared_distances(rows, features[j : j + chunk], center)
            if i == j:
                distances.fill_diagonal_(torch.inf)
            candidates = distances.topk(min(k, distances.shape[1]), largest=False).values
            nearest = torch.cat([nearest, candidates], dim=1).topk(k, largest=False).values
        radii.append(nearest[:, -1])
    return torch.cat(radii)


def _squared_distances(x: Tensor, y: Tensor, center: Tensor) -> tuple[Tensor, Tensor]:
    """|x_i - y_j|² and the differences too small to tell such distances apart, each float64 [len(x),len(y)]."""
    x, y = x.to(torch.float64) - center, y.to(torch.float64) - center
    norms = x.square().sum(dim=1)[:, None] + y.square().sum(dim=1)
    return torch.addmm(norms, x, y.T, alpha=-2).clamp_(min=0), norms.mul_(_TIE)


def inception_score(logits: Features, *, splits: int = 10) -> MeanStd:
    """exp of the mean KL divergence of p(class | image) from its mean over images, in each of `splits` contiguous
    blocks of images (Salimans et al. 2016, arXiv 1606.03498), for logits [N,classes]; from 1 to the number of classes.
    Raises ValueError for fewer images than splits and for values that are not finite.
    """
    (logits,) = _checked(logits=logits)
    if splits < 1:
        raise ValueError(f"inception score: {splits} splits; at least 1 is needed")
    if len(logits) < splits:
        raise ValueError(f"inception score: {splits} splits need as many images, got {len(logits)}")
    log_p = torch.log_softmax(logits.to(torch.float64), dim=1)
    scores = []
    for part in (log_p[i * len(log_p) // splits : (i + 1) * len(log_p) // splits] for i in range(splits)):
        log_mean = torch.logsumexp(part, dim=0) - math.log(len(part))  # finite where every probability underflows
        scores.append(float((part.exp() * (part - log_mean)).sum(dim=1).mean().exp()))
    return MeanStd(float(np.mean(scores)), float(np.std(scores)))


def _checked(**sets: Features) -> list[Tensor]:
    """The sets [N,D], whose D is one, as tensors on the device of the first. Raises ValueError, naming one."""
    tensors = {name: torch.as_tensor(values).detach() for name, values in sets.items()}
    for name, values in tensors.items():
        if values.ndim != 2 or not values.shape[1]:
            raise ValueError(f"{name} must have the shape [N,D], got {list(values.shape)}")
        if not values.dtype.is_floating_point:
            raise ValueError(f"{name} must be floating-point numbers, got {values.dtype}")
        if not torch.isfinite(values).all():
            raise ValueError(f"{name} are not finite")
    (first, a), (last, b) = list(tensors.items())[0], list(tensors.items())[-1]
    if a.shape[1] != b.shape[1]:
        raise ValueError(f"{first} have {a.shape[1]} dimensions, {last} {b.shape[1]}")
    return [values.to(a.device) for values in tensors.values()]
