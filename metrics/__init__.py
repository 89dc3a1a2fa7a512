"""Distances between sets of images. `frechet_distance` is loaded on first use, so that scripts start fast."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from metrics.distances import frechet_distance

__all__ = ["frechet_distance"]


def __getattr__(name: str) -> object:
    if name == "frechet_distance":
        from metrics.distances import frechet_distance

        return frechet_distance
    raise AttributeError(f"module 'metrics' has no attribute {name!r}")
