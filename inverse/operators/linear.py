"""Linear operators, each with its adjoint and exact step; what a size needs is computed on first use and kept."""

from collections.abc import Sequence
from functools import cache

import numpy as np
import torch
from torch import Tensor

from inverse.operators.base import LinearOperator, check_image_shape, gaussian_conditional
from inverse.operators.kernels import MAX_SEED, bicubic_matrix, check_whole, gaussian_kernel, is_number, motion_kernel

Kernel = Tensor | np.ndarray | Sequence[Sequence[float]]


class Inpainting(LinearOperator):
    """Pixels removed, by one of a mask, a box or a share at random: y = mask·x, zero where removed, same for all
    channels. The exact step is diagonal. Settings of DPS (arXiv 2209.14687) and DAPS (arXiv 2407.01521).
    """

    description = "The pixels outside a mask were removed from each image."

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
            mask = _as_tensor(mask, torch.float32, "inpainting mask (an image is named with --mask)")
            if mask.ndim != 2 or not ((mask == 0) | (mask == 1)).all():
                found = f"{list(mask.shape)}{' with other values' if mask.ndim == 2 else ''}"
                raise ValueError(f"inpainting mask must be [H,W] of 0 (removed) and 1 (measured), this one is {found}")
        if box is not None:
            if not isinstance(box, list | tuple) or len(box) != 4:
                raise ValueError(f"inpainting box must be top, left, height, width in pixels, not {box!r:.60}")
            box = [check_whole(box[i], "inpainting box: every entry", least) for i, least in enumerate((0, 0, 1, 1))]
            self.description = f"A box of {box[2]} × {box[3]} pixels was removed from each image."
        if fraction is not None:
            if not is_number(fraction) or not 0 <= fraction < 1:
                raise ValueError(f"inpainting fraction is the share of pixels removed, in [0, 1), not {fraction!r}")
            self.description = f"{fraction:.0%} of the pixels, drawn at random, were removed, the same in every image."
        self._given, self._box, self._fraction = mask, box, fraction
        self._seed = check_whole(seed, "seed", 0, MAX_SEED)
        self._mask_at = cache(lambda height, width, dtype, device: self.mask(height, width).to(device, dtype))

    def mask(self, height: int, width: int) -> Tensor:
        """Return the mask [H,W], float32 on the CPU; raises ValueError if it does not fit or removes every pixel."""
        mask = torch.ones(height, width) if self._given is None else self._given
        if tuple(mask.shape) != (height, width):
            raise ValueError(f"inpainting mask is {list(mask.shape)} and the images are {[height, width]}")
        if self._box is not None:
            top, left, rows, columns = self._box
            if top + rows > height or left + columns > width:
                raise ValueError(f"inpainting box {self._box} reaches beyond images of {height}x{width} pixels")
            mask[top : top + rows, left : left + columns] = 0
        if self._fraction is not None:
            order = np.random.RandomState(self._seed).permutation(mask.numel())
            mask.view(-1)[torch.from_numpy(order[: round(self._fraction * mask.numel())])] = 0
        if not mask.any():
            raise ValueError(f"inpainting removes every pixel of images of {height}x{width}: nothing is measured")
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
        return self._mask_at(*check_image_shape(x.shape)[2:], x.dtype, x.device)


class CircularBlur(LinearOperator):
    """Circular convolution with a centred kernel [h,w]: a unit impulse at (h//2, w//2) leaves the image unmoved, a
    larger kernel than the image wraps around. The exact step is diagonal in the Fourier basis.
    """

    def __init__(self, kernel: Kernel, cause: str = "a given kernel, wrapping") -> None:
        self.kernel = kernel = _as_tensor(kernel, torch.float64, "a blur kernel")  # [h,w] float64 on the CPU
        if kernel.ndim != 2 or not kernel.numel() or not kernel.isfinite().all():
            raise ValueError(f"a blur kernel must be [h,w] of finite numbers, not of shape {list(kernel.shape)}")
        self.description = f"Each image was blurred by {cause} at the border."
        self._transfer_at = cache(self._make_transfer)

    def forward(self, x: Tensor) -> Tensor:
        return torch.fft.irfft2(self._transfer(x) * torch.fft.rfft2(x), s=x.shape[-2:])

    def adjoint(self, y: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        return torch.fft.irfft2(self._transfer(y).conj() * torch.fft.rfft2(y), s=y.shape[-2:])

    def sample_conditional(self, x, y, likelihood_std, rho, randn_like=torch.randn_like):
        self.check_pair(x, y)
        transfer = self._transfer(x)
        gain, std = gaussian_conditional(transfer, likelihood_std, rho)
        innovation = torch.fft.rfft2(y) - transfer * torch.fft.rfft2(x)
        return x + torch.fft.irfft2(gain * innovation + std * torch.fft.rfft2(randn_like(x)), s=x.shape[-2:])

    def _transfer(self, x: Tensor) -> Tensor:
        return self._transfer_at(tuple(check_image_shape(x.shape)[2:]), x.dtype, x.device)

    def _make_transfer(self, size: tuple[int, int], dtype: torch.dtype, device: torch.device) -> Tensor:
        rows, columns = ((torch.arange(n) - n // 2) % m for n, m in zip(self.kernel.shape, size, strict=True))
        placed = torch.zeros(size, dtype=torch.float64)
        placed.index_put_((rows[:, None], columns[None]), self.kernel, accumulate=True)
        return torch.fft.rfft2(placed).to(dtype.to_complex()).to(device)


class SuperResolution(LinearOperator):
    """Antialiased bicubic downsampling (`bicubic_matrix`) by an integer factor: [N,C,H,W] to [N,C,ceil(H/f),ceil(W/f)].

    Separable, y = R_h x R_wᵀ: the singular vectors of A are products of those of two small matrices, so that the exact
    step draws u singular value by singular value inside their span and from the prior in the null space.
    """

    def __init__(self, *, factor: int = 4) -> None:
        self.factor = check_whole(factor, "super_resolution factor", 1, 1024)
        self.ratio = f"×{self.factor}"
        how = "in height and width by antialiased bicubic interpolation"
        self.description = f"Each image was shrunk {self.factor} times {how}."
        self._matrices = cache(self._make_matrices)

    def measurement_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        n, c, height, width = check_image_shape(shape)
        return n, c, -(-height // self.factor), -(-width // self.factor)

    def forward(self, x: Tensor) -> Tensor:
        check_image_shape(x.shape)
        rows, columns = (self._matrices(n, x.dtype, x.device)[0] for n in x.shape[-2:])
        return _separable(rows, x, columns)

    def adjoint(self, y: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        """Return A*y. `size` = (H, W) of the image; factor times y's size if left out."""
        height, width = size or (self.factor * y.shape[-2], self.factor * y.shape[-1])
        if self.measurement_shape((*y.shape[:2], height, width)) != tuple(y.shape):
            raise ValueError(f"measurements {list(y.shape)} are not {self.factor}x fewer pixels than {height}x{width}")
        rows, columns = (self._matrices(n, y.dtype, y.device)[0] for n in (height, width))
        return _separable(rows.T, y, columns.T)

    def sample_conditional(self, x, y, likelihood_std, rho, randn_like=torch.randn_like):
        self.check_pair(x, y)
        (_, u_h, s_h, v_h), (_, u_w, s_w, v_w) = (self._matrices(n, x.dtype, x.device) for n in x.shape[-2:])
        singular = s_h[:, None] * s_w
        gain, std = gaussian_conditional(singular, likelihood_std, rho)
        noise = randn_like(x)
        innovation = _separable(u_h.T, y, u_w.T) - singular * _separable(v_h.T, x, v_w.T)
        inside = gain * innovation + (std - rho) * _separable(v_h.T, noise, v_w.T)
        return x + rho * noise + _separable(v_h, inside, v_w)

    def _make_matrices(self, size: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, ...]:
        """The matrix R [h,H] of one dimension and its thin SVD: U [h,h], singular values [h], V [H,h]."""
        matrix = bicubic_matrix(size, self.factor)
        u, s, vt = np.linalg.svd(matrix, full_matrices=False)
        return tuple(torch.from_numpy(m).to(dtype).to(device) for m in (matrix, u, s, vt.T))


def gaussian_blur_circ(*, kernel_size: int = 61, std: float = 3.0, kernel: Kernel | None = None) -> CircularBlur:
    """Circular Gaussian blur; `std` in pixels. A `kernel` given replaces it."""
    if kernel is not None:
        return CircularBlur(kernel)
    return CircularBlur(gaussian_kernel(kernel_size, std), f"a Gaussian of {std} pixels, wrapping")


def motion_blur_circ(
    *, kernel_size: int = 61, intensity: float = 0.5, seed: int = 0, kernel: Kernel | None = None
) -> CircularBlur:
    """Circular blur by random camera shake, see `kernels.motion_kernel`. A `kernel` given replaces it."""
    if kernel is not None:
        return CircularBlur(kernel)
    return CircularBlur(motion_kernel(kernel_size, intensity, seed), "random camera shake, wrapping around")


def _as_tensor(values: Kernel, dtype: torch.dtype, what: str) -> Tensor:
    try:
        return torch.as_tensor(values, dtype=dtype).detach().cpu()
    except (TypeError, ValueError):
        raise ValueError(f"{what} must be rows of numbers, all of one length, not {values!r:.60}") from None


def _separable(rows: Tensor, x: Tensor, columns: Tensor) -> Tensor:
    """rows [h,H] · x [N,C,H,W] · columnsᵀ, columns [w,W]: the smaller intermediate result first."""
    return rows @ (x @ columns.T) if columns.shape[0] <= columns.shape[1] else (rows @ x) @ columns.T
