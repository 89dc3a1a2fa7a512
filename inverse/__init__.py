"""Inverse problems solved by plug-and-play sampling with a generative denoiser.

`get_operator` and `pnp_sample` are loaded on first use, so that scripts which import this package start fast.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from inverse.operators import get_operator
    from inverse.pnp import pnp_sample

__all__ = ["get_operator", "pnp_sample"]


def __getattr__(name: str) -> Any:
    if name == "get_operator":
        from inverse.operators import get_operator

        return get_operator
    if name == "pnp_sample":
        from inverse.pnp import pnp_sample

        return pnp_sample
    raise AttributeError(f"module 'inverse' has no attribute {name!r}")
