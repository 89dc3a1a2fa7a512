"""Inverse problems solved with a generative denoiser; names are loaded on first use, so that scripts start fast."""

__all__ = ["get_operator", "pnp_sample"]


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module 'inverse' has no attribute {name!r}")
    from inverse.operators import get_operator
    from inverse.pnp import pnp_sample

    return get_operator if name == "get_operator" else pnp_sample
