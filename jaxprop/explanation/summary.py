"""The summary of an array in a few numbers."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxprop.core.types import PyTree

SATURATED = 0.01

Reduction = Callable[[Array, Array], Array]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Summary:
    """A summary of an array: statistics of its finite elements, and a count of the others.

    Each number is a scalar array; for a layer in a ``repeat`` an array with an axis of turns. The
    statistics are in at least float32.

    Attributes:
        mean: the mean of the finite elements.
        rms: their root mean square.
        max: the largest of their absolute values.
        zeros: the fraction of all elements that are 0.
        nonfinite: the number of elements that are not finite.
        first: the flat index of the first of these; the array's size if all are finite.
        value: the element at ``first``; the last one if all are finite.
        shapes: the shape of the array, by its place in the tree: "" for a single array. A tree of
            several arrays is summarised as one array of all their elements.
    """

    mean: Array
    rms: Array
    max: Array
    zeros: Array
    nonfinite: Array
    first: Array
    value: Array
    shapes: tuple[tuple[str, tuple[int, ...]], ...] = dataclasses.field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the array; ``(size,)`` for several arrays."""
        return self.shapes[0][1] if len(self.shapes) == 1 else (self.size,)

    @property
    def size(self) -> int:
        """The number of elements."""
        return sum(math.prod(shape) for _, shape in self.shapes)

    def place_of_first(self) -> tuple[str, tuple[int, ...]]:
        """Return the array and the index of the first element that is not finite."""
        at = int(self.first)
        for name, shape in self.shapes:
            if at < math.prod(shape):
                return name, tuple(map(int, np.unravel_index(at, shape)))
            at -= math.prod(shape)
        raise ValueError("all elements are finite")


def summary(tree: PyTree) -> Summary | None:
    """Return the summary of all arrays of the tree together; None for a tree without arrays."""
    named = jax.tree.leaves_with_path(tree)
    if not named:
        return None
    leaves = [jnp.asarray(leaf) for _, leaf in named]
    names = [jax.tree_util.keystr(path) for path, _ in named]
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
    scale = jnp.where(largest > 0, largest, 1)  # squares of large or small numbers leave the dtype
    nothing = jnp.where(nonfinite < x.size, 0, jnp.nan).astype(wide)  # to take statistics of
    return Summary(
        mean=nothing + total * (x.size / count),
        rms=nothing + scale * jnp.sqrt(jnp.sum((kept / scale) ** 2) / count),
        max=nothing + largest,
        zeros=zeros.astype(wide) / x.size,
        nonfinite=nonfinite,
        first=first,
        value=x[jnp.minimum(first, x.size - 1)],
        shapes=tuple((name, leaf.shape) for name, leaf in zip(names, leaves, strict=True)),
    )


def saturated(slope: Array) -> Array:
    """Return the fraction of elements whose local derivative is below 0.01 in absolute value."""
    return jnp.mean(jnp.abs(slope) < SATURATED, dtype=jnp.float32)


def dead(slope: Array) -> Array:
    """Return the fraction of units, along the last axis, with slope 0 for every example."""
    return jnp.mean(jnp.all(slope == 0, axis=tuple(range(slope.ndim - 1))), dtype=jnp.float32)


def numbers(tree: PyTree) -> int:
    """Return the number of elements in all arrays of the tree, from their shapes alone."""
    return sum(math.prod(jnp.shape(leaf)) for leaf in jax.tree.leaves(tree))


def _reduced(*pairs: tuple[Array, Reduction]) -> Sequence[Array]:
    """Reduce each array by its function, all in one kernel: there are many small arrays."""
    arrays, functions = zip(*pairs, strict=True)
    identities: dict[Reduction, int] = {
        jnp.add: 0,
        jnp.maximum: 0,
        jnp.minimum: jnp.iinfo(jnp.int32).max,
    }
    starts = tuple(
        jnp.asarray(identities[f], array.dtype) for array, f in zip(arrays, functions, strict=True)
    )

    def both(left: Sequence[Array], right: Sequence[Array]) -> tuple[Array, ...]:
        return tuple(f(a, b) for f, a, b in zip(functions, left, right, strict=True))

    return jax.lax.reduce(arrays, starts, both, (0,))


def rms_of_all(summaries: PyTree) -> float | None:
    """Return the rms over all arrays that were summarised; None if they have no elements."""
    each = jax.tree.leaves(summaries, is_leaf=lambda node: isinstance(node, Summary))
    sizes = [math.prod(one.shape) for one in each]
    if not sum(sizes):
        return None
    squares = sum(float(one.rms) ** 2 * size for one, size in zip(each, sizes, strict=True))
    return math.sqrt(squares / sum(sizes))
