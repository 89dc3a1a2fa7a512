"""Measurement operators A of the inverse problems y = A(x) + noise, on images [N,C,H,W] in [-1, 1].

Every operator works for any number of channels, on any device and at any image size (`phase_retrieval`: any size at
which its padding is whole); matrices and transfer functions are computed on first use at a size and kept.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from inverse.kernels import MAX_SEED, check_whole, gaussian_kernel, motion_kernel
from inverse.likelihood import gaussian_conditional
from inverse.resize import bicubic_matrix

RandnLike = Callable[[Tensor], Tensor]
Kernel = Tensor | np.ndarray | Sequence[Sequence[float]]


class Operator(ABC):
    """A measurement operator; `forward(x)` maps images [N,C,H,W] to measurements [N,C,h,w]."""

    is_linear = False
    has_exact_step = False  # `sample_conditional` exists
    measures_images = True  # measurements are pictures in about [-1, 1]

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
            misfit = (self.forward(x) - y).square().sum()
            return torch.autograd.grad(misfit, x)[0]

    def residual(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the root-mean-square measurement error [N] of A(x) against y. Raises ValueError as `check_pair`."""
        self.check_pair(x, y)
        return (self.forward(x) - y).flatten(1).square().mean(1).sqrt()

    def check_pair(self, x: Tensor, y: Tensor) -> None:
        """Raise ValueError unless y [N,C,h,w] has the shape of a measurement of x [N,C,H,W]."""
        wanted = self.measurement_shape(x.shape)
        if tuple(y.shape) != wanted:
            raise ValueError(
                f"measurements {list(y.shape)} do not fit: images {list(x.shape)} give measurements {list(wanted)}"
            )


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
        """Draw u [N,C,H,W] exactly from its conditional: prior N(x, rho²), y = A(u) + likelihood_std·n.

        One call of `randn_like` on x. Affine in that noise: zeros give the conditional mean.
        Raises ValueError where x or y do not fit the operator or a standard deviation is not positive.
        """

    def misfit_gradient(self, x: Tensor, y: Tensor) -> Tensor:
        return 2 * self.adjoint(self.forward(x) - y, tuple(x.shape[-2:]))


class Inpainting(LinearOperator):
    """Pixels removed, by a mask, a box or at random: y = mask·x, zero where removed, same for all channels.

    The exact step is diagonal. Give one of `mask`, `box` or `fraction`.
    Settings of DPS (arXiv 2209.14687) and DAPS (arXiv 2407.01521).
    """

    def __init__(
        self,
        *,
        mask: Tensor | np.ndarray | None = None,  # [H,W], 1 = measured, 0 = removed
        box: Sequence[int] | None = None,  # removed: (top, left, height, width) in pixels
        fraction: float | None = None,  # share of pixels removed at random, the same ones in every image
        seed: int = 0,  # of the random removal
    ) -> None:
        if sum(option is not None for option in (mask, box, fraction)) != 1:
            raise ValueError("inpainting needs exactly one of mask, box or fraction")
        if mask is not None:
            mask = torch.as_tensor(mask, dtype=torch.float32).cpu()
            if mask.ndim != 2 or not ((mask == 0) | (mask == 1)).all():
                raise ValueError(
                    f"inpainting mask must be [H,W] of 0 (removed) and 1 (measured), this one is {list(mask.shape)}"
                    + (" with other values" if mask.ndim == 2 else "")
                )
        if box is not None:
            if len(box) != 4:
                raise ValueError(f"inpainting box must be top, left, height, width in pixels, not {list(box)}")
            box = [
                check_whole(v, "inpainting box: every entry", least) for v, least in zip(box, (0, 0, 1, 1), strict=True)
            ]
        if fraction is not None and not 0 <= fraction < 1:
            raise ValueError(f"inpainting fraction is the share of pixels removed, in [0, 1), not {fraction}")
        self._given, self._box, self._fraction = mask, box, fraction
        self._seed = check_whole(seed, "seed", 0, MAX_SEED)
        self._masks: dict[Any, Tensor] = {}

    def mask(self, height: int, width: int) -> Tensor:
        """Return the mask [H,W] at an image size, float32 on the CPU. Raises ValueError if it does not fit."""
        if self._given is not None:
            if tuple(self._given.shape) != (height, width):
                raise ValueError(f"inpainting mask is {list(self._given.shape)} and the images are {[height, width]}")
            return self._given
        mask = torch.ones(height, width)
        if self._box is not None:
            top, left, rows, columns = self._box
            if top + rows > height or left + columns > width:
                raise ValueError(f"inpainting box {self._box} reaches beyond images of {height}x{width} pixels")
            mask[top : top + rows, left : left + columns] = 0
        else:
            order = np.random.RandomState(self._seed).permutation(height * width)
            mask.view(-1)[torch.from_numpy(order[: round(self._fraction * height * width)])] = 0
        return mask

    def forward(self, x: Tensor) -> Tensor:
        return self._mask_for(x) * x

    def adjoint(self, y: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        return self._mask_for(y) * y

    def measure(self, x, noise_std, randn_like=torch.randn_like):
        return self._mask_for(x) * super().measure(x, noise_std, randn_like)

    def residual(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the root-mean-square error [N] of the measured pixels."""
        self.check_pair(x, y)
        mask = self._mask_for(x)
        return (mask * (x - y)).flatten(1).square().sum(1).div(mask.sum() * x.shape[1]).sqrt()

    def sample_conditional(self, x, y, likelihood_std, rho, randn_like=torch.randn_like):
        self.check_pair(x, y)
        mask = self._mask_for(x)
        gain, std = gaussian_conditional(mask, likelihood_std, rho)
        return x + gain * (y - mask * x) + std * randn_like(x)

    def _mask_for(self, x: Tensor) -> Tensor:
        *_, height, width = check_image_shape(x.shape)
        key = (height, width, x.dtype, x.device)
        if key not in self._masks:
            self._masks[key] = self.mask(height, width).to(x.device, x.dtype)
        return self._masks[key]


class CircularBlur(LinearOperator):
    """Circular convolution with a centred kernel [h,w]: a unit impulse at (h//2, w//2) leaves the image unmoved.

    The exact step is diagonal in the Fourier basis. A kernel larger than the image wraps around.
    """

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = check_kernel(kernel)  # [h,w] float64 on the CPU
        self._transfers: dict[Any, Tensor] = {}

    def forward(self, x: Tensor) -> Tensor:
        return self._inverse(self._transfer(x) * torch.fft.rfft2(x), x)

    def adjoint(self, y: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        return self._inverse(self._transfer(y).conj() * torch.fft.rfft2(y), y)

    def sample_conditional(self, x, y, likelihood_std, rho, randn_like=torch.randn_like):
        self.check_pair(x, y)
        transfer = self._transfer(x)
        gain, std = gaussian_conditional(transfer, likelihood_std, rho)
        innovation = torch.fft.rfft2(y) - transfer * torch.fft.rfft2(x)
        return x + self._inverse(gain * innovation + std * torch.fft.rfft2(randn_like(x)), x)

    @staticmethod
    def _inverse(spectrum: Tensor, x: Tensor) -> Tensor:
        return torch.fft.irfft2(spectrum, s=x.shape[-2:])

    def _transfer(self, x: Tensor) -> Tensor:
        *_, height, width = check_image_shape(x.shape)
        key = (height, width, x.dtype, x.device)
        if key not in self._transfers:
            rows, columns = (
                (torch.arange(n) - n // 2) % size for n, size in zip(self.kernel.shape, (height, width), strict=True)
            )
            placed = torch.zeros(height, width, dtype=torch.float64)
            placed.index_put_((rows[:, None], columns[None]), self.kernel, accumulate=True)
            self._transfers[key] = torch.fft.rfft2(placed).to(x.dtype.to_complex()).to(x.device)
        return self._transfers[key]


class SuperResolution(LinearOperator):
    """Antialiased bicubic downsampling (a = -0.5) by an integer factor: [N,C,H,W] to [N,C,ceil(H/f),ceil(W/f)].

    See `inverse.resize.bicubic_matrix`. Separable, y = R_h x R_wᵀ, so that the singular vectors of A are products of
    those of the two small matrices and the exact step takes no iteration: inside their span u is drawn singular value
    by singular value, and in the null space from the prior.
    """

    def __init__(self, *, factor: int = 4) -> None:
        self.factor = check_whole(factor, "super_resolution factor", 1)
        self._matrices: dict[Any, tuple[Tensor, ...]] = {}

    def measurement_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        n, c, height, width = check_image_shape(shape)
        return n, c, -(-height // self.factor), -(-width // self.factor)

    def forward(self, x: Tensor) -> Tensor:
        check_image_shape(x.shape)
        rows, columns = (self._resize(size, x)[0] for size in x.shape[-2:])
        return _separable(rows, x, columns)

    def adjoint(self, y: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        """Return A*y. `size` = (H, W) of the image; factor times y's size if left out."""
        height, width = size or (self.factor * y.shape[-2], self.factor * y.shape[-1])
        if self.measurement_shape((*y.shape[:2], height, width)) != tuple(y.shape):
            raise ValueError(f"measurements {list(y.shape)} are not {self.factor}x fewer pixels than {height}x{width}")
        rows, columns = (self._resize(n, y)[0] for n in (height, width))
        return _separable(rows.T, y, columns.T)

    def sample_conditional(self, x, y, likelihood_std, rho, randn_like=torch.randn_like):
        self.check_pair(x, y)
        (_, u_h, s_h, v_h), (_, u_w, s_w, v_w) = (self._resize(size, x) for size in x.shape[-2:])
        singular = s_h[:, None] * s_w
        gain, std = gaussian_conditional(singular, likelihood_std, rho)
        noise = randn_like(x)
        innovation = _separable(u_h.T, y, u_w.T) - singular * _separable(v_h.T, x, v_w.T)
        inside = gain * innovation + (std - rho) * _separable(v_h.T, noise, v_w.T)
        return x + rho * noise + _separable(v_h, inside, v_w)

    def _resize(self, size: int, x: Tensor) -> tuple[Tensor, ...]:
        """The matrix R [h,H] of one dimension and its thin SVD: U [h,h], singular values [h], V [H,h]."""
        key = (size, x.dtype, x.device)
        if key not in self._matrices:
            matrix = bicubic_matrix(size, self.factor)
            u, s, vt = np.linalg.svd(matrix, full_matrices=False)
            self._matrices[key] = tuple(torch.from_numpy(m).to(x.dtype).to(x.device) for m in (matrix, u, s, vt.T))
        return self._matrices[key]


class PhaseRetrieval(Operator):
    """Magnitude of the oversampled, centred, orthonormal Fourier transform of the image scaled to [0, 1].

    Each side is padded with zeros by oversample/8 of the image's height and width, so that oversample 4 doubles the
    size. Setting of DPS (arXiv 2209.14687) and DAPS (arXiv 2407.01521).
    """

    measures_images = False

    def __init__(self, *, oversample: float = 4.0) -> None:
        if not (np.isfinite(oversample) and oversample >= 0):
            raise ValueError(f"phase_retrieval oversample must be a number of at least 0, not {oversample}")
        self.oversample = oversample

    def measurement_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        n, c, height, width = check_image_shape(shape)
        pads = [self.oversample / 8 * size for size in (height, width)]
        if any(pad != int(pad) for pad in pads):
            raise ValueError(
                f"phase_retrieval: oversample {self.oversample:g} pads {height}x{width} images by oversample/8 of "
                f"their size, {pads[0]:g} and {pads[1]:g} pixels, which must be whole"
            )
        return n, c, height + 2 * int(pads[0]), width + 2 * int(pads[1])

    def forward(self, x: Tensor) -> Tensor:
        height, width = self.measurement_shape(x.shape)[-2:]
        rows, columns = (height - x.shape[-2]) // 2, (width - x.shape[-1]) // 2
        padded = torch.nn.functional.pad((x + 1) / 2, (columns, columns, rows, rows))
        spectrum = torch.fft.fft2(torch.fft.ifftshift(padded, dim=(-2, -1)), norm="ortho")
        return torch.fft.fftshift(spectrum, dim=(-2, -1)).abs()


class HighDynamicRange(Operator):
    """Overexposure: y = clip(scale·x, -1, 1), as in DAPS (arXiv 2407.01521).

    The slope is `scale` and drops to 0 beyond the clip, so Langevin steps that overshoot get stuck there: keep
    c1/c2 <= 1/(2·scale²), as c1 0.0125 with c2 0.1.
    """

    def __init__(self, *, scale: float = 2.0) -> None:
        if not (np.isfinite(scale) and scale > 0):
            raise ValueError(f"high_dynamic_range scale must be a positive number, not {scale}")
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        check_image_shape(x.shape)
        return (self.scale * x).clamp(-1, 1)


class NonlinearBlur(Operator):
    """A camera's blur: pixel values are decoded to linear light, blurred circularly, and encoded again.

    Images in [-1, 1] are scaled to [0, 1] for the sRGB transfer curve (IEC 61966-2-1: exponent 2.4 with a linear toe,
    continued below 0 and above 1, which keeps all slopes finite), and back. The kernel is camera shake unless given.
    This is not the nonlinear blur of the DPS and DAPS tables: that one is a pretrained kernel network (GOPRO-trained,
    Tran et al., CVPR 2021), whose weights are not part of this project, so figures cannot be compared with theirs.
    """

    def __init__(
        self, *, kernel_size: int = 61, intensity: float = 0.5, seed: int = 0, kernel: Kernel | None = None
    ) -> None:
        self._blur = CircularBlur(motion_kernel(kernel_size, intensity, seed) if kernel is None else kernel)

    @property
    def kernel(self) -> Tensor:
        """The kernel [h,w], float64 on the CPU."""
        return self._blur.kernel

    def forward(self, x: Tensor) -> Tensor:
        return 2 * _encode_srgb(self._blur.forward(_decode_srgb((x + 1) / 2))) - 1


def gaussian_blur_circ(*, kernel_size: int = 61, std: float = 3.0, kernel: Kernel | None = None) -> CircularBlur:
    """Circular Gaussian blur; `std` in pixels. A `kernel` given replaces it."""
    return CircularBlur(gaussian_kernel(kernel_size, std) if kernel is None else kernel)


def motion_blur_circ(
    *, kernel_size: int = 61, intensity: float = 0.5, seed: int = 0, kernel: Kernel | None = None
) -> CircularBlur:
    """Circular blur by random camera shake, see `inverse.kernels.motion_kernel`. A `kernel` given replaces it."""
    return CircularBlur(motion_kernel(kernel_size, intensity, seed) if kernel is None else kernel)


OPERATORS: dict[str, Callable[..., Operator]] = {
    "inpainting": Inpainting,
    "gaussian_blur_circ": gaussian_blur_circ,
    "motion_blur_circ": motion_blur_circ,
    "super_resolution": SuperResolution,
    "phase_retrieval": PhaseRetrieval,
    "high_dynamic_range": HighDynamicRange,
    "nonlinear_blur": NonlinearBlur,
}


def get_operator(name: str, **params: Any) -> Operator:
    """Return the operator `name` of OPERATORS with its parameters; those left out take the published values.

    Raises ValueError for a name or parameter that does not exist, and for values that make no sense.
    """
    if name not in OPERATORS:
        raise ValueError(f"there is no operator {name!r}: use one of {', '.join(OPERATORS)}")
    known = inspect.signature(OPERATORS[name]).parameters
    unknown = [key for key in params if key not in known]
    if unknown:
        raise ValueError(f"operator {name} has no parameter {', '.join(unknown)}: it takes {', '.join(known)}")
    try:
        return OPERATORS[name](**params)
    except TypeError as error:
        shown = ", ".join(f"{key}={value!r:.60}" for key, value in params.items())
        raise ValueError(f"operator {name} cannot be made with {shown}: {error}") from error


def check_image_shape(shape: Sequence[int]) -> tuple[int, int, int, int]:
    """Return (N, C, H, W); raises ValueError unless the shape is that of a batch of non-empty images."""
    if len(shape) != 4 or min(shape) < 1:
        raise ValueError(f"images must be [N,C,H,W] with no empty dimension, not {list(shape)}")
    n, c, height, width = shape
    return n, c, height, width


def check_kernel(kernel: Kernel) -> Tensor:
    """Return a blur kernel as [h,w] float64 on the CPU; raises ValueError for another rank or non-finite weights."""
    kernel = torch.as_tensor(kernel, dtype=torch.float64).detach().cpu()
    if kernel.ndim != 2 or not kernel.numel() or not kernel.isfinite().all():
        raise ValueError(f"a blur kernel must be [h,w] of finite numbers, not of shape {list(kernel.shape)}")
    return kernel


def _separable(rows: Tensor, x: Tensor, columns: Tensor) -> Tensor:
    """rows [h,H] · x [N,C,H,W] · columnsᵀ, columns [w,W]: the smaller intermediate result first."""
    if columns.shape[0] <= columns.shape[1]:
        return rows @ (x @ columns.T)
    return (rows @ x) @ columns.T


def _decode_srgb(v: Tensor) -> Tensor:
    return torch.where(v <= 0.04045, v / 12.92, ((v.clamp_min(0.04045) + 0.055) / 1.055) ** 2.4)


def _encode_srgb(v: Tensor) -> Tensor:
    return torch.where(v <= 0.0031308, v * 12.92, 1.055 * v.clamp_min(0.0031308) ** (1 / 2.4) - 0.055)
