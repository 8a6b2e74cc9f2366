"""An array in a few numbers."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
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
    repeated. ``first`` is the flat index of the first element that is not finite, and the array's
    size where there is none; ``value`` is that element.
    """

    mean: Array
    rms: Array
    max: Array
    zeros: Array  # the share of elements that are 0
    nonfinite: Array  # how many
    first: Array
    value: Array
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
    kept = jnp.where(finite, x, 0)
    total, largest, zeros, nonfinite, first = _reduced(
        (kept / x.size, jnp.add),
        (jnp.abs(kept), jnp.maximum),
        ((x == 0).astype(jnp.int32), jnp.add),
        ((~finite).astype(jnp.int32), jnp.add),
        (jnp.where(finite, x.size, jnp.arange(x.size, dtype=jnp.int32)), jnp.minimum),
    )
    count = jnp.maximum(x.size - nonfinite, 1).astype(wide)
    scale = jnp.where(largest > 0, largest, 1)  # squares of what is large or small would be lost
    return Summary(
        mean=total * (x.size / count),
        rms=scale * jnp.sqrt(jnp.sum((kept / scale) ** 2) / count),
        max=largest,
        zeros=zeros.astype(wide) / x.size,
        nonfinite=nonfinite,
        first=first,
        value=x[jnp.minimum(first, x.size - 1)],
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


def _reduced(*pairs: tuple[Array, Any]) -> Sequence[Array]:
    """Each array reduced by its function, all in one kernel: there are many small arrays."""
    arrays, functions = zip(*pairs, strict=True)
    identities = {jnp.add: 0, jnp.maximum: 0, jnp.minimum: jnp.iinfo(jnp.int32).max}
    starts = tuple(
        jnp.asarray(identities[f], array.dtype) for array, f in zip(arrays, functions, strict=True)
    )

    def both(left: Any, right: Any) -> Any:
        return tuple(f(a, b) for f, a, b in zip(functions, left, right, strict=True))

    return jax.lax.reduce(arrays, starts, both, (0,))
