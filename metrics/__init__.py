"""Distances between sets of images. `frechet_distance` is loaded on first use, so that scripts start fast."""

__all__ = ["frechet_distance"]


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module 'metrics' has no attribute {name!r}")
    from metrics.distances import frechet_distance

    return frechet_distance
