"""Checks of arguments, with a sentence for each argument that is refused."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from numbers import Integral, Real
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.core import Tracer

from jaxprop.core.describe import is_array, shapes
from jaxprop.core.types import PyTree

REAL = ("real floating", "integral")


def require(value: object, kind: type, where: str) -> None:
    """Raise ``TypeError`` unless value is an instance of kind, with a hint if it is the class.

    Args:
        value: the argument.
        kind: the class that it must be an instance of.
        where: the argument's name, which begins the message.
    """
    if isinstance(value, type) and issubclass(value, kind):
        raise TypeError(f"{where} is the class {value.__name__}; write {value.__name__}(...)")
    if not isinstance(value, kind):
        raise TypeError(f"{where} is not a {kind.__name__} but {given(value)}")


def given(value: object) -> str:
    """Return an argument in words, with dtypes and shapes in place of arrays."""
    array = is_array(value) and value.shape  # pyright: ignore[reportAttributeAccessIssue]
    plain = jax.tree_util.all_leaves([value]) and not array
    return repr(value) if plain else shapes(value)


def check_key(name: str, key: object) -> None:
    """Raise unless key is a single key, from ``jax.random.key`` or ``jax.random.PRNGKey``.

    Raises:
        TypeError: for anything but a key.
        ValueError: for an array of keys. Both messages begin with name.
    """
    dtype, axes = getattr(key, "dtype", None), getattr(key, "shape", ())
    if dtype == jnp.uint32 and len(axes):
        axes = axes[:-1]
    elif dtype is None or not jnp.issubdtype(dtype, jax.dtypes.prng_key):
        raise TypeError(f"{name}: key is a key such as jax.random.key(0), not {given(key)}")
    if axes:
        raise ValueError(f"{name}: key is one key, not an array of them, {shapes(key)}")


def is_whole(value: object) -> bool:
    """Return whether value is an integer of any kind; a bool is not one."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def check_one_of(name: str, value: object, words: Sequence[str]) -> None:
    """Raise ``ValueError``, whose message begins with name, unless value is one of the words."""
    if value not in words:
        *most, last = map(repr, words)
        raise ValueError(f"{name} is {', '.join(most)} or {last}, not {value!r}")


def check_count(name: str, value: object, least: int = 1) -> None:
    """Raise unless value is a whole number of at least ``least``.

    Raises:
        TypeError: for anything but a whole number.
        ValueError: for a number that is too small. Both messages begin with name.
    """
    if not is_whole(value):
        raise TypeError(f"{name} is a whole number, not {given(value)}")
    if value < least:  # pyright: ignore[reportOperatorIssue]
        raise ValueError(f"{name} is at least {least}, not {value}")


def check_counts(layer: object, *fields: str) -> None:
    """Raise, as ``check_count`` does, unless each field of the layer is a whole number above 0."""
    for field in fields:
        check_count(f"{type(layer).__name__}: {field}", getattr(layer, field))


def check_flags(layer: object, *fields: str) -> None:
    """Raise ``TypeError`` unless each field of the layer is a bool."""
    for field in fields:
        check_flag(f"{type(layer).__name__}: {field}", getattr(layer, field))


def check_flag(name: str, value: object) -> None:
    """Raise ``TypeError``, whose message begins with name, unless value is a bool."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} is True or False, not {given(value)}")


def is_known(value: object) -> bool:
    """Return whether a value can be looked at: it is not traced, and all of it is on this host.

    Look at it by NumPy. In a traced program even a known array's comparison is traced.
    """
    return not isinstance(value, Tracer) and getattr(value, "is_fully_addressable", True)


def check_number(
    name: str,
    value: object,
    *,
    positive: bool = False,
    finite: bool = False,
    signed: bool = False,
) -> None:
    """Raise unless value is a number that is not negative, or a scalar array that holds one.

    Args:
        name: the argument's name, which begins the message.
        value: the argument. In a traced program its value is not known, and not checked.
        positive: whether 0 is refused too.
        finite: whether infinity is refused too.
        signed: whether it may be negative.

    Raises:
        TypeError: for anything but a number.
        ValueError: for a number that is negative or NaN.
    """
    dtype = getattr(value, "dtype", None)
    number = isinstance(value, Real) if dtype is None else jnp.isdtype(dtype, REAL)
    if isinstance(value, bool) or not number or getattr(value, "shape", ()) != ():
        raise TypeError(f"{name} is a number, not {given(value)}")
    if not is_known(value):
        return
    value = np.asarray(value)[()]
    if signed:
        value = abs(value)  # pyright: ignore[reportArgumentType]
    if not (value > 0 if positive else value >= 0):  # pyright: ignore[reportOperatorIssue]
        must = "must be positive" if positive else "must not be negative"
        raise ValueError(f"{name} {must}, not {value}")
    if finite and not value < math.inf:  # pyright: ignore[reportOperatorIssue]
        raise ValueError(f"{name} must be finite, not {value}")


def check_share(name: str, value: object) -> None:
    """Raise, as ``check_number`` does, unless value is at least 0 and below 1."""
    check_number(name, value)
    if is_known(value) and not np.asarray(value) < 1:
        raise ValueError(f"{name} is below 1, not {value}")


def check_not_empty(name: str, x: PyTree) -> None:
    """Raise ``ValueError``, whose message begins with name, for a batch without examples."""
    if any(np.shape(leaf)[:1] == (0,) for leaf in jax.tree.leaves(x)):
        raise ValueError(f"{name}: the batch is empty")


def check_values(words: str, values: Array | np.ndarray, right: Callable[[Any], Any]) -> None:
    """Raise ``ValueError`` for wrong values; traced values are not known, and not checked.

    Args:
        words: the requirement, which begins the message.
        values: an array.
        right: a function that returns whether each value is right.
    """
    if not is_known(values):
        return
    known = np.asarray(values)
    wrong = known[~right(known)]
    if wrong.size:
        raise ValueError(f"{words}, not {wrong[0]}")


def check_x(layer: object, x: PyTree, axes: str) -> None:
    """Raise unless x is a floating array with these axes and at least one feature.

    Args:
        layer: the layer that takes x, for the message.
        x: an array or a ``jax.ShapeDtypeStruct``.
        axes: the names of the axes, such as "N, T, C"; an ellipsis stands for any number of axes.

    Raises:
        TypeError: for an x that is not an array, or not floating.
        ValueError: for another number of axes, or no features.
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
