"""Inverse problems solved by plug-and-play sampling with a generative denoiser.

`get_operator` and `pnp_sample` are loaded on first use, so that scripts which import this package start fast.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from inverse.operators import get_operator
    from inverse.pnp import pnp_sample

__all__ = ["get_operator", "pnp_sample"]


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module 'inverse' has no attribute {name!r}")
    from inverse.operators import get_operator
    from inverse.pnp import pnp_sample

    return get_operator if name == "get_operator" else pnp_sample
