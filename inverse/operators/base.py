"""What measurement operators A of y = A(x) + noise have in common, on images [N,C,H,W] in [-1, 1]."""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from sampling.posterior import RandnLike


class Operator(ABC):
    """A measurement operator; `forward(x)` maps images [N,C,H,W] to measurements [N,C,h,w]."""

    is_linear = False
    has_exact_step = False  # `sample_conditional` exists
    measures_images = True  # measurements are pictures in about [-1, 1]
    ratio = ""  # what the operator adds to the title of a report, as ×4
    description = ""  # a sentence for a report on what was done to each image; empty = the task's own

    @abstractmethod
    def forward(self, x: Tensor) -> Tensor:
        """Return A(x), without noise. Raises ValueError for images that the operator cannot take."""

    def measurement_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Return the shape of A(x) for x of shape [N,C,H,W]: here the same. Raises ValueError as `forward` does."""
        return check_image_shape(shape)

    def measure(self, x: Tensor, noise_std: float, randn_like: RandnLike = torch.randn_like) -> Tensor:
        """Return a simulated measurement A(x) + noise_std·n. Raises ValueError as `forward` does."""
        clean = self.forward(x)
        return clean + noise_std * randn_like(clean)

    def misfit_gradient(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the gradient [N,C,H,W] of |A(x) - y|² with respect to x."""
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            return torch.autograd.grad((self.forward(x) - y).square().sum(), x)[0]

    def residual(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the root-mean-square measurement error [N] of A(x) against y. Raises ValueError as `check_pair`."""
        self.check_pair(x, y)
        return (self.forward(x) - y).flatten(1).square().mean(1).sqrt()

    def check_pair(self, x: Tensor, y: Tensor) -> None:
        """Raise ValueError unless y [N,C,h,w] has the shape of a measurement of x [N,C,H,W]."""
        wanted = self.measurement_shape(x.shape)
        if tuple(y.shape) != wanted:
            given = f"measurements {list(y.shape)} do not fit: images {list(x.shape)}"
            raise ValueError(f"{given} give measurements {list(wanted)}")


class LinearOperator(Operator):
    """A linear operator with an adjoint and an exact draw from the conditional of a Gaussian prior."""

    is_linear = True
    has_exact_step = True

    @abstractmethod
    def adjoint(self, y: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        """Return A*y [N,C,H,W]: <A x, y> = <x, A* y>. `size` = (H, W), where y's own size leaves it open."""

    @abstractmethod
    def sample_conditional(
        self, x: Tensor, y: Tensor, likelihood_std: float, rho: float, randn_like: RandnLike = torch.randn_like
    ) -> Tensor:
        """Draw u [N,C,H,W] exactly from its conditional: prior N(x, rho²), y = A(u) + likelihood_std·n. One call of
        `randn_like` on x. Affine in that noise: zeros give the conditional mean. Raises ValueError where x or y do not
        fit the operator or a standard deviation is not positive.
        """

    def misfit_gradient(self, x: Tensor, y: Tensor) -> Tensor:
        return 2 * self.adjoint(self.forward(x) - y, tuple(x.shape[-2:]))


def check_image_shape(shape: Sequence[int]) -> tuple[int, int, int, int]:
    """Return (N, C, H, W); raises ValueError unless the shape is that of a batch of non-empty images."""
    if len(shape) != 4 or min(shape) < 1:
        raise ValueError(f"images must be [N,C,H,W] with no empty dimension, not {list(shape)}")
    return tuple(shape)


def check_positive(value: float, name: str) -> float:
    """Return `value`; raises ValueError unless it is a positive finite number."""
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"{name} must be a positive number, not {value}")
    return float(value)


def gaussian_conditional(a: Tensor, noise_std: float, rho: float) -> tuple[Tensor, Tensor]:
    """Return (gain, std) of u given x and y = a·u + noise_std·n, u ~ N(x, rho²), for each of an operator's eigen- or
    singular values `a`, real or complex, on its own: the conditional is N(x + gain·(y - a·x), std²), with
    gain = conj(a)·rho²/(|a|²·rho² + noise_std²) and std = rho·noise_std/sqrt(|a|²·rho² + noise_std²).
    Raises ValueError unless noise_std and rho are positive numbers.
    """
    noise_std, rho = check_positive(noise_std, "likelihood_std"), check_positive(rho, "rho")
    total = (a.abs() * rho).square() + noise_std**2
    return a.conj() * (rho**2 / total), rho * noise_std / total.sqrt()
