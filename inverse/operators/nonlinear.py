"""Nonlinear operators, whose likelihood step is drawn by Langevin dynamics."""

from collections.abc import Sequence

import torch
from torch import Tensor

from inverse.operators.base import Operator, check_image_shape
from inverse.operators.kernels import is_number, motion_kernel
from inverse.operators.linear import CircularBlur, Kernel


class PhaseRetrieval(Operator):
    """Magnitude of the oversampled, centred, orthonormal Fourier transform of the image scaled to [0, 1]. Each side is
    padded with zeros by oversample/8 of the image's size, as in DPS (arXiv 2209.14687): 4 doubles it.
    """

    measures_images = False
    description = (
        "Only the magnitude of each image's oversampled Fourier transform was measured; its phase is lost. An image "
        "and its copy turned by 180 degrees have the same magnitude, which is drawn on a logarithmic scale."
    )

    def __init__(self, *, oversample: float = 4.0) -> None:
        if not is_number(oversample) or not 0 <= oversample <= 64:
            raise ValueError(f"phase_retrieval oversample must be a number from 0 to 64, not {oversample!r}")
        self.oversample = oversample

    def measurement_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        n, c, height, width = check_image_shape(shape)
        pads = [self.oversample / 8 * size for size in (height, width)]
        if any(pad != int(pad) for pad in pads):
            made = f"phase_retrieval: oversample {self.oversample:g} pads {height}x{width} images by oversample/8 of"
            raise ValueError(f"{made} their size, {pads[0]:g} and {pads[1]:g} pixels, which must be whole")
        return n, c, height + 2 * int(pads[0]), width + 2 * int(pads[1])

    def forward(self, x: Tensor) -> Tensor:
        height, width = self.measurement_shape(x.shape)[-2:]
        rows, columns = (height - x.shape[-2]) // 2, (width - x.shape[-1]) // 2
        padded = torch.nn.functional.pad((x + 1) / 2, (columns, columns, rows, rows))
        spectrum = torch.fft.fft2(torch.fft.ifftshift(padded, dim=(-2, -1)), norm="ortho")
        return torch.fft.fftshift(spectrum, dim=(-2, -1)).abs()


class HighDynamicRange(Operator):
    """Overexposure: y = clip(scale·x, -1, 1), as in DAPS (arXiv 2407.01521). Beyond the clip the slope is 0, where
    Langevin steps that overshoot get stuck: keep c1/c2 <= 1/(2·scale²), as c1 0.0125 with c2 0.1.
    """

    def __init__(self, *, scale: float = 2.0) -> None:
        if not is_number(scale) or not 0 < scale <= 1e6:
            raise ValueError(f"high_dynamic_range scale must be a positive number up to 1e6, not {scale!r}")
        self.scale = scale
        self.description = f"Each image was overexposed: pixels were multiplied by {scale} and clipped to the range."

    def forward(self, x: Tensor) -> Tensor:
        check_image_shape(x.shape)
        return (self.scale * x).clamp(-1, 1)


class NonlinearBlur(Operator):
    """A camera's blur: pixels are decoded to linear light by the sRGB curve on [0, 1] (IEC 61966-2-1, continued
    beyond), blurred circularly, by camera shake unless a kernel is given, and encoded again. Not comparable with the
    nonlinear blur of the DPS and DAPS tables, a pretrained network (Tran et al., CVPR 2021).
    """

    description = "Each image was blurred by camera shake in linear light, as in a camera, and encoded again."

    def __init__(
        self, *, kernel_size: int = 61, intensity: float = 0.5, seed: int = 0, kernel: Kernel | None = None
    ) -> None:
        self._blur = CircularBlur(motion_kernel(kernel_size, intensity, seed) if kernel is None else kernel)
        self.kernel = self._blur.kernel  # [h,w] float64 on the CPU

    def forward(self, x: Tensor) -> Tensor:
        return 2 * _encode_srgb(self._blur.forward(_decode_srgb((x + 1) / 2))) - 1


def _decode_srgb(v: Tensor) -> Tensor:
    return torch.where(v <= 0.04045, v / 12.92, ((v.clamp_min(0.04045) + 0.055) / 1.055) ** 2.4)


def _encode_srgb(v: Tensor) -> Tensor:
    return torch.where(v <= 0.0031308, v * 12.92, 1.055 * v.clamp_min(0.0031308) ** (1 / 2.4) - 0.055)
