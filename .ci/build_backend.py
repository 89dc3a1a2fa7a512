"""Builds what `pip install -e .` needs, and nothing else: presets, assets and scripts lie in the clone, so that a wheel
of the packages would lack them, and would put `data` and `training` beside everybody else's.
"""

from typing import Any


def __getattr__(name: str) -> Any:
    """Those of setuptools, where they serve an editable installation."""
    if name not in ("build_editable", "get_requires_for_build_editable", "prepare_metadata_for_build_editable"):
        raise AttributeError(name)
    from setuptools import build_meta

    return getattr(build_meta, name)


def refuse(*_: object, **__: object) -> None:
    """In place of what would make a wheel or an archive of the sources. Raises SystemExit."""
    advice = "run it there, or install it from there with: pip install -e ."
    raise SystemExit(f"error: ncvsd runs from its clone and cannot be packed: {advice}")


get_requires_for_build_wheel = prepare_metadata_for_build_wheel = build_wheel = refuse
get_requires_for_build_sdist = build_sdist = refuse
