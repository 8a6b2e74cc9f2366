"""Checks of a loss's y, target and weights, and helpers for the outputs of an example."""

from __future__ import annotations

import math
from collections.abc import Callable
from numbers import Real
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float

from jaxprop.core.checks import check_values, is_known
from jaxprop.core.describe import shapes
from jaxprop.core.loss import Loss
from jaxprop.core.types import PyTree

Y = Float[Array, "n ..."]


def in_pair(loss: Loss, target: PyTree) -> tuple[Any, Array | None]:
    """Return the target and its weights, which are None unless it is a pair (target, weights)."""
    if type(target) is not tuple:
        return target, None
    if len(target) != 2:
        raise TypeError(
            f"{loss} takes a target, or a pair (target, weights), not a tuple of {len(target)}"
        )
    return target


def check_arrays(
    loss: Loss, y: Array, target: Array, *kinds: type, of_classes: bool = False
) -> None:
    """Raise unless y is floating, and target has y's shape and a dtype of one of these kinds.

    Args:
        loss: the loss, for the error message.
        y: the net's output.
        target: the target.
        kinds: kinds of dtype, such as ``jnp.floating``.
        of_classes: whether the target lacks the last axis of y.
    """
    if not hasattr(y, "dtype"):
        raise TypeError(
            f"{loss} takes an array y, and the net's output is {shapes(y)}; jp.total_loss(...) has "
            "a loss for each part"
        )
    if not jnp.issubdtype(y.dtype, jnp.floating):
        raise TypeError(f"{loss} takes floating y, not {y.dtype}")
    if not hasattr(target, "dtype"):
        raise TypeError(f"{loss} takes the target as an array, not {target!r}")
    if not any(jnp.issubdtype(target.dtype, kind) for kind in kinds):
        words = " or ".join(kind.__name__.rstrip("_") for kind in kinds)
        raise TypeError(f"{loss} takes a target of dtype {words}, not {target.dtype}")
    shape = y.shape[:-1] if of_classes else y.shape
    if target.shape != shape:
        hint = "; probabilities of classes are floating" if target.shape == y.shape else ""
        raise ValueError(
            f"{loss}: the net's output has shape {y.shape}, which takes a target of shape {shape}, "
            f"not {target.shape}{hint}"
        )


def check_weights(loss: Loss, weights: Array | None, shape: tuple[int, ...]) -> None:
    """Raise unless weights are None, or real numbers of this shape.

    Raises:
        TypeError: for weights that are not an array of real numbers or bools.
        ValueError: for another shape, and for a weight that is known to be negative or not finite.
    """
    if weights is None:
        return
    dtype = getattr(weights, "dtype", None)
    if dtype is None or not jnp.isdtype(dtype, ("real floating", "integral", "bool")):
        raise TypeError(f"{loss} takes weights as an array of real numbers, not {shapes(weights)}")
    if weights.shape != shape:
        raise ValueError(f"{loss} takes weights of shape {shape} here, not {weights.shape}")
    words = f"{loss} takes weights that are finite and not negative"
    check_values(words, weights, lambda w: (w >= 0) & (w < math.inf))


def counted(weights: Array, dtype: Any) -> Array:
    """Return weights in the dtype, with NaN in place of negative ones."""
    weights = weights.astype(dtype)
    return jnp.where(weights >= 0, weights, jnp.nan)


def check_target(
    words: str, target: Array, weights: Array | None, right: Callable[[Any], Any]
) -> None:
    """Raise ``ValueError`` for a target that is known to be wrong and has a nonzero weight.

    Args:
        words: what the loss takes, which the message begins with.
        target: the target.
        weights: None, or the weights.
        right: a function that returns whether each target is right, in the shape of weights.
    """
    if weights is None:
        check_values(words, target, right)
    elif is_known(weights):
        check_values(words, target, lambda t: right(t) | (np.asarray(weights) == 0))


def check_plain_number(name: str, value: object, most: float = math.inf) -> None:
    """Raise unless value is a finite number from 0 to ``most``, and not an array.

    Raises:
        TypeError: for a value that is not a number, or is an array, which a field cannot hold.
        ValueError: for a number out of range. Both messages begin with name.
    """
    if not isinstance(value, Real) or isinstance(value, bool):
        raise TypeError(f"{name} is a number, not {value!r}")
    if not (0 <= value <= most and value < math.inf):  # pyright: ignore[reportOperatorIssue]
        bound = "" if most == math.inf else f" and at most {most:g}"
        raise ValueError(f"{name} is finite and not negative{bound}, not {value}")


def times(weight: Y, value: Y) -> Y:
    """Return the product, which is 0 for a weight of 0 whatever the value is."""
    return jnp.where(weight == 0, 0, weight * value)


def only(c: int | Array, root: Y) -> Y:
    """Return root with zeros for all of an example's outputs except number c."""
    one = jnp.arange(math.prod(root.shape[1:])) == c
    return jnp.where(one.reshape(1, *root.shape[1:]), root, 0)


def outputs(y: Array) -> int:
    """Return the number of an example's outputs."""
    return max(math.prod(y.shape[1:]), 1)


def positions(y: Array) -> tuple[int, ...]:
    """Return all axes except that of the examples."""
    return tuple(range(1, y.ndim))
