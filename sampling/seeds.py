"""One random stream per image, so that a seed means the same image in any batch, process or device."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

MAX_SEEDS = 10_000_000
_MASK32 = (1 << 32) - 1


def parse_seeds(text: str) -> list[int]:
    """Parse a list of seeds such as '0-49999' or '1,2,5-10'; order and repeats are kept. Raises ValueError for anything
    else, for a range that runs backwards, and for more than 10 million seeds.
    """
    seeds: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not (first.isdecimal() and (last.isdecimal() if dash else True)):
            raise ValueError(f"seeds {text!r}: {part.strip()!r} is neither a number nor a range, as in 1,2,5-10")
        low, high = int(first), int(last) if dash else int(first)
        if high < low:
            raise ValueError(f"seeds {text!r}: the range {part.strip()} runs backwards")
        if high >= 1 << 63:
            raise ValueError(f"seeds {text!r}: {part.strip()} is too large")
        if len(seeds) + high - low >= MAX_SEEDS:
            raise ValueError(f"seeds {text[:60]!r}: more than {MAX_SEEDS:,}; draw them in several runs")
        seeds += range(low, high + 1)
    return seeds


def stream_seed(seed: int) -> int:
    """Map any integer to a 32-bit generator seed, such that neighbouring seeds give unrelated streams. PyTorch's CPU
    generator keeps 32 bits of its seed, so the map is a bijection on 0..2^32-1 (the finaliser of MurmurHash3): no two
    of those seeds ever share a stream. Higher and negative integers are folded in modulo 2^64.
    """
    return _mix32((seed & _MASK32) ^ _mix32(seed >> 32 & _MASK32))


class SeededNoise:
    """Draws for a batch in which image i only ever consumes the stream of `seeds[i]`. Numbers are drawn in float32 on
    the CPU, one image after the other, then moved to `device`: they depend neither on the batch's composition nor on
    the device. The first dimension of whatever is drawn must be len(seeds).
    """

    def __init__(self, seeds: Iterable[int], device: torch.device | str = "cpu") -> None:
        self.seeds = [int(seed) for seed in seeds]
        self.device = torch.device(device)
        self._generators = [torch.Generator("cpu").manual_seed(stream_seed(seed)) for seed in self.seeds]

    def randn(self, size: Sequence[int], *, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return standard normal numbers of shape `size` = [N, ...]."""
        if not size or size[0] != len(self.seeds):
            raise ValueError(f"shape {list(size)} must begin with the number of seeds, {len(self.seeds)}")
        out = torch.empty(tuple(size), dtype=torch.float32)
        for row, generator in zip(out, self._generators, strict=True):
            row.normal_(generator=generator)
        return out.to(self.device, dtype)

    def randn_like(self, x: Tensor) -> Tensor:
        """Return standard normal numbers of x's shape and dtype."""
        return self.randn(x.shape, dtype=x.dtype)

    def randint(self, high: int) -> Tensor:
        """Return integers uniform in 0..high-1, int64 [N]."""
        rows = [torch.randint(high, (), generator=generator) for generator in self._generators]
        return torch.stack(rows).to(self.device)


def _mix32(value: int) -> int:
    value = (value ^ value >> 16) * 0x85EBCA6B & _MASK32
    value = (value ^ value >> 13) * 0xC2B2AE35 & _MASK32
    return value ^ value >> 16
