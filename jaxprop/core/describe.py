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
        if not hasattr(leaf, "dtype"):
            return Shape(f"{type(leaf).__name__} {leaf!r}")
        return Shape(f"{leaf.dtype}[{','.join(map(str, leaf.shape))}]")

    return repr(jax.tree.map(short, tree))


def first_difference(got: PyTree, expected: PyTree) -> tuple[str, str, str] | None:
    """Return where two trees first differ in structure or shape, and what each has there.

    Returns:
        ``(path, got, expected)`` in words, or None where they do not differ.
    """
    ours, theirs = (
        {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree.leaves_with_path(tree)}
        for tree in (got, expected)
    )
    for path in (*theirs, *ours):
        both = [shapes(tree[path]) if path in tree else "not there" for tree in (ours, theirs)]
        if "not there" in both or np.shape(ours[path]) != np.shape(theirs[path]):
            return path, both[0], both[1]
    return None


def structs(x: PyTree) -> PyTree:
    """Return x with a ``jax.ShapeDtypeStruct`` for each array, in the dtype that JAX gives it.

    Raises:
        TypeError: for a leaf that is not an array.
    """

    def struct(leaf: Any) -> jax.ShapeDtypeStruct:
        if not hasattr(leaf, "dtype"):
            raise TypeError(f"x must be an array, not {shapes(x)}")
        numpy = isinstance(leaf, np.ndarray)
        dtype = jax.dtypes.canonicalize_dtype(leaf.dtype) if numpy else leaf.dtype
        return jax.ShapeDtypeStruct(leaf.shape, dtype)

    return jax.tree.map(struct, x)
