"""What layers ask of their fields and of x, and how they say what is wrong."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp

from jaxprop.layer import Layer
from jaxprop.shapes import check_count, shapes


def check_counts(layer: Layer, *fields: str) -> None:
    """Raise unless each field is a whole number of at least 1."""
    for field in fields:
        check_count(f"{type(layer).__name__}: {field}", getattr(layer, field))


def check_flags(layer: Layer, *fields: str) -> None:
    """Raise unless each field is a bool."""
    for field in fields:
        value = getattr(layer, field)
        if not isinstance(value, bool):
            raise TypeError(f"{type(layer).__name__}: {field} is True or False, not {value!r}")


def check_x(layer: Layer, x: Any, axes: str) -> None:
    """Raise unless x is a floating array with these axes, "N, T, C" say, none but N empty.

    An ellipsis stands for any number of axes.
    """
    if not hasattr(x, "ndim"):
        raise TypeError(f"{layer} takes an array x, not {shapes(x)}")
    named = axes.split(", ")
    least = len(named) - ("..." in named)
    if x.ndim < least or (x.ndim > least and "..." not in named):
        one = "; for one example write x[None]" if x.ndim == least - 1 else ""
        raise ValueError(
            f"{layer} takes x of shape ({axes}), axis 0 the example, not {x.shape}{one}"
        )
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(f"{layer} takes floating x, not {x.dtype}")
    if least > 1 and not x.shape[-1]:
        raise ValueError(f"{layer} takes x of at least one feature, not {x.shape}")
