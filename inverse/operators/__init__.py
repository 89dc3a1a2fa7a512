"""Measurement operators A of y = A(x) + noise, by name: for any number of channels, device and size (of whole pads)."""

import inspect
from collections.abc import Callable
from typing import Any

from inverse.operators.base import Operator
from inverse.operators.linear import Inpainting, SuperResolution, gaussian_blur_circ, motion_blur_circ
from inverse.operators.nonlinear import HighDynamicRange, NonlinearBlur, PhaseRetrieval

OPERATORS: dict[str, Callable[..., Operator]] = {
    "inpainting": Inpainting,
    "gaussian_blur_circ": gaussian_blur_circ,
    "motion_blur_circ": motion_blur_circ,
    "super_resolution": SuperResolution,
    "phase_retrieval": PhaseRetrieval,
    "high_dynamic_range": HighDynamicRange,
    "nonlinear_blur": NonlinearBlur,
}


def get_operator(name: str, **params: Any) -> Operator:
    """Return the operator `name` of OPERATORS with its parameters; those left out take the published values. Raises
    ValueError for a name or parameter that does not exist, and for values that make no sense.
    """
    if name not in OPERATORS:
        raise ValueError(f"there is no operator {name!r}: use one of {', '.join(OPERATORS)}")
    known = inspect.signature(OPERATORS[name]).parameters
    if unknown := [key for key in params if key not in known]:
        raise ValueError(f"operator {name} has no parameter {', '.join(unknown)}: it takes {', '.join(known)}")
    try:
        return OPERATORS[name](**params)
    except TypeError as error:
        shown = ", ".join(f"{key}={value!r:.60}" for key, value in params.items())
        raise ValueError(f"operator {name} cannot be made with {shown}: {error}") from error
