"""Weights of linear operators: Gaussian and camera-shake kernels, and antialiased bicubic downsampling."""

import math
from numbers import Real

import numpy as np
from PIL import Image, ImageDraw, ImageFilter
from scipy.ndimage import gaussian_filter1d

MAX_SEED = (1 << 32) - 1  # of NumPy's legacy generator
_MAX_SIZE = 2048  # of a kernel, in pixels


def gaussian_kernel(size: int, std: float) -> np.ndarray:
    """Return a Gaussian kernel [size, size] of sum 1, float64: an impulse at size//2 after a filter of `std` pixels.
    Cut at 4 of them and mirrored at the borders. Raises ValueError for a size below 1 or a std that is not positive.
    """
    size = check_whole(size, "kernel_size", 1, _MAX_SIZE)
    if not is_number(std) or not 0 < std <= _MAX_SIZE:
        raise ValueError(f"std of a Gaussian kernel must be a positive number of pixels up to {_MAX_SIZE}, not {std!r}")
    impulse = np.zeros(size)
    impulse[size // 2] = 1
    row = gaussian_filter1d(impulse, max(std, 0.1), truncate=4)  # up to 0.12 the impulse stays one
    return np.outer(row, row)


def motion_kernel(size: int, intensity: float, seed: int) -> np.ndarray:
    """Return a camera-shake kernel [size, size] of sum 1, float64; intensity 0 is nearly straight, 1 strong shake.

    The "motionblur" recipe of L. Borodenko, which DPS (arXiv 2209.14687) and DAPS (arXiv 2407.01521) use: a random
    walk of persistent direction is drawn at twice the size, blurred a little and downsampled. The draws come from
    NumPy's legacy generator in a fixed order, so that a seed means the same kernel everywhere.
    Raises ValueError for a size below 3, an intensity outside [0, 1] or a seed outside 0..2^32-1.
    """
    size = check_whole(size, "kernel_size", 3, _MAX_SIZE)
    if not is_number(intensity) or not 0 <= intensity <= 1:
        raise ValueError(f"intensity of a motion kernel must lie in [0, 1], not {intensity!r}")
    rng = np.random.RandomState(check_whole(seed, "seed", 0, MAX_SEED))
    diagonal = np.hypot(2 * size, 2 * size)
    wanted = 0.75 * diagonal * (rng.uniform() + rng.uniform(0, intensity**2))
    steps, total = [], 0.0
    while total < wanted:
        length = rng.beta(1, 30) * (1 - intensity + 0.1) * diagonal
        if length < wanted:
            steps.append(length)
            total += length
    largest, jitter = rng.uniform(0, intensity * np.pi), rng.beta(2, 20)
    angles = [rng.uniform(-largest, largest)]
    while len(angles) < len(steps):
        angle = rng.triangular(0, intensity * largest, largest + 0.1)
        sign = -1.0 if angles[-1] < 0 else 1.0
        angles.append(angle * (-sign if rng.uniform() < jitter else sign))
    path = np.cumsum(steps * np.exp(1j * np.asarray(angles)))
    path = (path - path.sum() / len(steps)) * np.exp(1j * rng.uniform(0, np.pi)) + (1 + 1j) * size
    canvas = Image.new("L", (2 * size, 2 * size))
    width = max(int(diagonal / 150), 1)  # Pillow's thinnest line, which its older versions draw for width 0
    ImageDraw.Draw(canvas).line([(p.real, p.imag) for p in path], fill=255, width=width)
    canvas = canvas.filter(ImageFilter.GaussianBlur(int(0.01 * diagonal)))
    kernel = np.asarray(canvas.resize((size, size), Image.Resampling.LANCZOS), dtype=np.float64)
    if not kernel.sum() > 0:
        raise ValueError(f"the motion kernel of seed {seed} is empty at intensity {intensity}: take another seed")
    return kernel / kernel.sum()


def bicubic_matrix(size: int, factor: int) -> np.ndarray:
    """Return the float64 matrix [ceil(size/factor), size] that downsamples a row of pixels by an integer factor.

    Output pixel i is centred at input factor·i + (factor - 1)/2, Keys' cubic kernel (1981) of a = -0.5 is stretched by
    `factor`, borders are mirrored (which no library at hand does), and the weights of each output pixel sum to 1.
    """
    margin = 5 * factor
    mirrored = np.pad(np.arange(size), margin, mode="symmetric")
    rows = np.arange(-(-size // factor))[:, None]
    centers = factor * rows + (factor - 1) / 2
    taps = factor * rows + np.arange(-2 * factor, 3 * factor)
    t = np.abs((taps - centers) / factor)
    near, far = 1.5 * t**3 - 2.5 * t**2 + 1, -0.5 * (t**3 - 5 * t**2 + 8 * t - 4)
    matrix = np.zeros([len(rows), size])
    np.add.at(matrix, (rows, mirrored[taps + margin]), np.where(t <= 1, near, np.where(t < 2, far, 0.0)))
    return matrix / matrix.sum(axis=1, keepdims=True)


def is_number(value: object) -> bool:
    """Whether it is a real number; what a task file says may be anything."""
    return isinstance(value, Real) and not isinstance(value, bool)


def check_whole(value: float, name: str, least: int, most: float = math.inf) -> int:
    """Return `value` as an int; raises ValueError unless it is a whole number from `least` to `most`."""
    if not is_number(value) or value % 1 or not least <= value <= most:
        upto = "at least {}" if most == math.inf else "from {} to {}"
        raise ValueError(f"{name} must be a whole number {upto.format(least, most)}, not {value!r:.60}")
    return int(value)
