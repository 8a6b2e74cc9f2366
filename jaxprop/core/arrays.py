"""Arrays: their precision and their shapes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, core, errors
from jax.flatten_util import ravel_pytree

from jaxprop.core.types import PyTree

_OPEN = "InconclusiveDimensionOperation"  # in jax.errors, and in older JAX in jax.core
_INCONCLUSIVE: Any = getattr(errors if hasattr(errors, _OPEN) else core, _OPEN)


def wide(x: Array) -> Array:
    """Return x in at least float32 if it is floating, else unchanged."""
    narrow = x.dtype.itemsize < 4 and jnp.issubdtype(x.dtype, jnp.floating)
    return x.astype(jnp.float32) if narrow else x


def as_rounded(x: Array) -> Array:
    """Return ``wide(x)`` with x rounded to its own dtype, also under ``jax.jit``.

    If x has just been computed, XLA may skip the rounding to bfloat16 and back ("excess precision")
    at one use of x and not at another. This is for code that subtracts two uses of x.
    """
    info = jnp.finfo(x.dtype)
    same = wide(x)
    if same.dtype == x.dtype:
        return same
    return jax.lax.reduce_precision(same, exponent_bits=info.nexp, mantissa_bits=info.nmant)


def aligned(v: Array, x: Array) -> Array:
    """Return v with leading axes of length 1, so that it has as many axes as x.

    The axes of v are the last axes of x. NumPy's broadcasting does the same implicitly, which
    ``jax.numpy_rank_promotion`` may forbid.
    """
    return jax.lax.expand_dims(v, range(x.ndim - v.ndim))


def on_device(leaf: Any) -> Any:
    """Return a NumPy array as a JAX array, in JAX's dtype for it; return anything else as it is.

    Raises:
        ValueError: for integers that do not fit into that dtype and would wrap around.
    """
    if not isinstance(leaf, np.ndarray):
        return leaf
    check_fit(leaf)
    return jnp.asarray(leaf)


def check_fit(tree: PyTree) -> None:
    """Raise for a NumPy array that JAX does not accept, or accepts in a dtype that is too narrow.

    Raises:
        TypeError: for an array of anything but numbers and bools.
        ValueError: for integers that would wrap around.
    """
    for path, leaf in jax.tree.leaves_with_path(tree):
        if not isinstance(leaf, np.ndarray):
            continue
        name = jax.tree_util.keystr(path, simple=True, separator=".") or "an array"
        if leaf.dtype.kind in "OSUmM":
            raise TypeError(f"{name} is of {leaf.dtype}, where JAX takes numbers and bools")
        dtype = jax.dtypes.canonicalize_dtype(leaf.dtype)
        if leaf.size and jnp.issubdtype(dtype, jnp.integer) and dtype != leaf.dtype:
            least, most = leaf.min(), leaf.max()
            if least < jnp.iinfo(dtype).min or most > jnp.iinfo(dtype).max:
                raise ValueError(
                    f"{name} of {leaf.dtype} holds {most if most > -least else least}, which does "
                    f"not fit into {dtype}; jax_enable_x64 is off"
                )


def scalar_of(scale: float | Array, x: Array) -> float | Array:
    """Return a scalar array in x's dtype, or a Python number as it is."""
    return scale.astype(x.dtype) if isinstance(scale, Array) else scale


def of_indices(ids: Array) -> Array:
    """Return integers in at least int32, so that they can be compared with any size."""
    return ids.astype(jnp.int32) if ids.dtype.itemsize < 4 else ids


def rounded(tree: PyTree, dtype: Any) -> PyTree:
    """Return the tree with its floating leaves in dtype."""

    def narrow(leaf: Array) -> Array:
        floating = jnp.issubdtype(jnp.result_type(leaf), jnp.floating)
        return jnp.asarray(leaf).astype(dtype) if floating else leaf

    return jax.tree.map(narrow, tree)


def added(*arrays: Array) -> Array:
    """Return the sum in a dtype that holds all of the arrays, whatever JAX's promotion mode."""
    with jax.numpy_dtype_promotion("standard"):
        return sum(arrays[1:], start=arrays[0])


def promoted(*arrays: Array) -> list[Array]:
    """Return the arrays in a dtype that holds all of them, whatever JAX's promotion mode."""
    with jax.numpy_dtype_promotion("standard"):
        dtype = jnp.result_type(*arrays)
    return [array.astype(dtype) for array in arrays]


def known(holds: Callable[[], bool]) -> bool:
    """Return whether a comparison of sizes is known to hold.

    In ``jax.export`` a size may be a symbol and the comparison inconclusive: the result is then
    False. Code that branches on it must be correct either way.
    """
    try:
        return bool(holds())
    except _INCONCLUSIVE:
        return False


def weighted(x: Array, weights: Array) -> Array:
    """Return x with each example, along axis 0, multiplied by its weight."""
    return x * jnp.expand_dims(weights.astype(x.dtype), range(1, x.ndim))


def is_one(factor: object) -> bool:
    """Return whether a factor is known to be 1, so that it may be left out."""
    return isinstance(factor, int | float) and factor == 1


def is_floating(leaf: object) -> bool:
    """Return whether a leaf is an array of real floats."""
    return bool(jnp.issubdtype(getattr(leaf, "dtype", object), jnp.floating))


def is_inexact(leaf: object) -> bool:
    """Return whether a leaf is an array of real or complex floats, which has a cotangent."""
    return bool(jnp.issubdtype(getattr(leaf, "dtype", object), jnp.inexact))


def root(squares: Array) -> Array:
    """Return the square root, with a derivative of 0 at 0, where 0 times infinity would be NaN."""
    zero = squares == 0
    return jnp.where(zero, 0, jnp.sqrt(jnp.where(zero, 1, squares)))


def selected(kept: Array, tree: PyTree) -> PyTree:
    """Return the tree with zeros in its floating arrays for the examples that are not kept."""

    def one(leaf: Any) -> Any:
        if not jnp.issubdtype(jnp.result_type(leaf), jnp.floating):
            return leaf
        return jnp.where(jnp.expand_dims(kept, range(1, jnp.ndim(leaf))), leaf, 0)

    return jax.tree.map(one, tree)


def filled(kept: Array, tree: PyTree) -> PyTree:
    """Return the tree with each example that is not kept replaced by the first one that is.

    If none is kept, zeros replace them. A leaf of keys, or without examples, stays as it is.
    """
    if not kept.shape[0]:
        return tree
    first = kept & (jnp.arange(kept.shape[0]) == jnp.argmax(kept))

    def one(leaf: Any) -> Any:
        of_examples = getattr(leaf, "shape", ())[:1] == kept.shape
        if not of_examples or jnp.issubdtype(leaf.dtype, jax.dtypes.extended):
            return leaf
        axes = range(1, leaf.ndim)
        of_first = jnp.where(jnp.expand_dims(first, axes), leaf, jnp.zeros((), leaf.dtype))
        row = of_first.any(0) if leaf.dtype == jnp.bool_ else of_first.sum(0, dtype=leaf.dtype)
        return jnp.where(jnp.expand_dims(kept, axes), leaf, row[None])

    return jax.tree.map(one, tree)


def empty_like(x: Array) -> Array:
    """Return an array without elements, (N, 0, *shape[1:]), that records x's shape and dtype.

    As a residual it carries a shape through a scan, where a Python number would not stay static.
    """
    return jax.lax.slice_in_dim(jnp.expand_dims(x, 1), 0, 0, axis=1)


def angle(a: PyTree, b: PyTree) -> Array:
    """Return the angle between two trees of floats, in degrees; NaN if either is 0.

    Kahan's half-angle formula is exact near 0 and 180 degrees too, where the arc cosine is not.

    Args:
        a: a tree of arrays.
        b: another tree, of the same structure and shapes.
    """
    units = [wide(ravel_pytree(tree)[0]) for tree in (a, b)]
    a, b = (v / jnp.linalg.norm(v) for v in units)
    return jnp.degrees(2 * jnp.arctan2(jnp.linalg.norm(a - b), jnp.linalg.norm(a + b)))
