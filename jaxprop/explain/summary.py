"""An array in a few numbers."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

SATURATED = 0.01


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Summary:
    """Mean, rms and largest size of an array's finite elements, and what there is besides them.

    All in at least float32, each a scalar; behind an axis of repetitions in a layer that is
    repeated. ``at`` is the flat index of the first element that is not finite, and of the largest
    where all are; ``worst`` is the element there.
    """

    mean: Array
    rms: Array
    max: Array
    zeros: Array  # the share of elements that are 0
    nonfinite: Array  # how many
    at: Array
    worst: Array
    shape: tuple[int, ...] = dataclasses.field(metadata={"static": True})


def summary(tree: Any) -> Summary | None:
    """Of all the tree's arrays together; None where there is none."""
    leaves = [jnp.asarray(leaf) for leaf in jax.tree.leaves(tree)]
    if not leaves:
        return None
    shape = leaves[0].shape if len(leaves) == 1 else (numbers(leaves),)
    double = any(leaf.dtype == jnp.float64 for leaf in leaves)
    wide = jnp.float64 if double else jnp.float32
    x = jnp.concatenate([leaf.ravel().astype(wide) for leaf in leaves])
    x = x if x.size else jnp.zeros(1, wide)
    finite = jnp.isfinite(x)
    count = jnp.maximum(finite.sum(), 1).astype(x.dtype)
    size = jnp.where(finite, jnp.abs(x), 0)
    largest = size.max()
    scale = jnp.where(largest > 0, largest, 1)  # squares of what is large or small would be lost
    at = jnp.argmax(jnp.where(finite, size, jnp.inf))
    return Summary(
        mean=jnp.sum(jnp.where(finite, x, 0) / count),
        rms=scale * jnp.sqrt(jnp.sum((size / scale) ** 2) / count),
        max=largest,
        zeros=jnp.mean(x == 0, dtype=x.dtype),
        nonfinite=jnp.sum(~finite),
        at=at,
        worst=x[at],
        shape=shape,
    )


def saturated(slope: Array) -> Array:
    """The share of elements at which the local derivative is below 0.01 in size."""
    return jnp.mean(jnp.abs(slope) < SATURATED, dtype=jnp.float32)


def dead(slope: Array) -> Array:
    """The share of units, along the last axis, that pass nothing back for any example."""
    return jnp.mean(jnp.all(slope == 0, axis=tuple(range(slope.ndim - 1))), dtype=jnp.float32)


def element(shape: tuple[int, ...], at: int) -> tuple[int, ...]:
    """The index that the flat index is."""
    index = []
    for size in reversed(shape):
        at, rest = divmod(at, size)
        index.append(rest)
    return tuple(reversed(index))


def numbers(tree: Any) -> int:
    """How many numbers the tree's arrays hold, by their shapes alone."""
    return sum(math.prod(jnp.shape(leaf)) for leaf in jax.tree.leaves(tree))
