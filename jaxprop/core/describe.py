"""Trees of arrays as their shapes: in words, for messages, and as structs, for tracing."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from jaxprop.core.types import PyTree


def shapes(tree: PyTree) -> str:
    """Return the tree as text, each array as its dtype and shape: ``float32[8,2]``."""

    class Shape(str):
        __repr__ = str.__str__

    def short(leaf: Any) -> Shape:
        if not is_array(leaf):
            return Shape(f"{type(leaf).__name__} {leaf!r}")
        return Shape(f"{leaf.dtype}[{','.join(map(str, leaf.shape))}]")

    return repr(jax.tree.map(short, tree))


def is_array(leaf: object) -> bool:
    """Return whether a leaf has a shape and a dtype, as arrays and their structs do."""
    return isinstance(getattr(leaf, "shape", None), tuple) and hasattr(leaf, "dtype")


def structs(x: PyTree) -> PyTree:
    """Return x with a ``jax.ShapeDtypeStruct`` for each array, in the dtype that JAX gives it.

    Raises:
        TypeError: for a leaf that is not an array.
    """

    def struct(leaf: Any) -> jax.ShapeDtypeStruct:
        if not is_array(leaf):
            raise TypeError(f"x must be an array, not {shapes(x)}")
        numpy = isinstance(leaf, np.ndarray)
        dtype = jax.dtypes.canonicalize_dtype(leaf.dtype) if numpy else leaf.dtype
        return jax.ShapeDtypeStruct(leaf.shape, dtype)

    return jax.tree.map(struct, x)
