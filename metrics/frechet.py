"""Fréchet distance between Gaussians fitted to features (Heusel et al. 2017, arXiv 1706.08500)."""

from __future__ import annotations

import torch
from torch import Tensor

from torch_utils import distributed

ROUNDING = 1e-6  # of tr(C1 + C2): how far below 0 a distance may come out


class FeatureMoments:
    """Mean and covariance of features that arrive in batches, accumulated in float64; memory is O(D²).

    Sums are taken about the first batch's mean, so that features far from 0 lose no digits. They stay on `device`,
    except on devices without float64 (MPS), whose features come to the CPU.
    """

    def __init__(self, dim: int, device: torch.device | str = "cpu") -> None:
        device = torch.device(device)
        self.device = torch.device("cpu") if device.type == "mps" else device
        self.count = 0
        self._shift: Tensor | None = None
        self._sum = torch.zeros(dim, dtype=torch.float64, device=self.device)
        self._outer = torch.zeros(dim, dim, dtype=torch.float64, device=self.device)

    def add(self, features: Tensor) -> None:
        """Take in features [N,D]. Raises ValueError for another shape or for values that are not finite."""
        if features.ndim != 2 or features.shape[1] != len(self._sum):
            raise ValueError(f"features of shape {list(features.shape)} do not fit [N,{len(self._sum)}]")
        if not torch.isfinite(features).all():
            raise ValueError("features are not finite")
        if not len(features):
            return
        x = features.detach().to(self.device).to(torch.float64)
        if self._shift is None:
            self._shift = x.mean(dim=0)
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
        shift = self._sum.new_zeros(len(self._sum)) if self._shift is None else self._shift
        common = shift.to(device, copy=True)
        torch.distributed.broadcast(common, src=int(counts.nonzero()[0]))
        common = common.to(self.device)
        change = shift - common  # sums about the own shift become sums about the common one
        cross = torch.outer(self._sum, change)
        self._outer += cross + cross.T + self.count * torch.outer(change, change)
        self._sum += self.count * change
        for total in (self._sum, self._outer):
            message = total.to(device, copy=True)
            torch.distributed.all_reduce(message)
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

    The trace of the root is the sum of square roots of the eigenvalues of Rᵀ·C2·R with R·Rᵀ = C1 (see below), which
    is symmetric, so that nothing turns complex for singular covariances. The roots of rounding errors then amount to
    about 1e-8 of tr(C1 + C2): a result below 0 by at most 1e-6 of that sum is rounding and returned as 0; one further
    below, which no two covariances have, is returned as it is. Tensors or arrays; computed where `mu1` is (on the CPU
    for devices without float64). Raises ValueError where shapes differ or values are not finite.
    """
    device = mu1.device if isinstance(mu1, Tensor) and mu1.device.type != "mps" else torch.device("cpu")
    arrays = [torch.as_tensor(a).detach().to(device).to(torch.float64) for a in (mu1, cov1, mu2, cov2)]
    mu1, cov1, mu2, cov2 = arrays
    if mu1.ndim != 1 or mu1.shape != mu2.shape or cov1.shape != cov2.shape or cov1.shape != (len(mu1), len(mu1)):
        raise ValueError(f"statistics do not fit together: shapes {', '.join(str(list(a.shape)) for a in arrays)}")
    if not all(torch.isfinite(a).all() for a in arrays):
        raise ValueError("statistics are not finite")
    eigenvalues = torch.linalg.eigvalsh(_symmetric_product(cov1, cov2))
    variances = float(cov1.trace() + cov2.trace())
    distance = float((mu1 - mu2).square().sum()) + variances - 2 * float(eigenvalues.clamp(min=0).sqrt().sum())
    return 0.0 if -ROUNDING * abs(variances) <= distance < 0 else distance


def _symmetric_product(cov1: Tensor, cov2: Tensor, block: int = 256) -> Tensor:
    """Lower triangle of R^T·C2·R, whose eigenvalues are those of C1·C2, with R·R^T = C1."""
    root, singular = torch.linalg.cholesky_ex(cov1)
    if singular:
        values, vectors = torch.linalg.eigh(cov1)
        root = vectors * values.clamp(min=0).sqrt()
        return root.T @ cov2 @ root
    product = torch.zeros_like(cov2)
    for i in range(0, len(cov1), block):  # R is triangular too: a third of the work
        columns = slice(i, i + block)
        product[i:, columns] = root[i:, i:].T @ (cov2[i:, i:] @ root[i:, columns])
    return product
