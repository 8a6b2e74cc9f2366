"""Points to check at and directions to check in, and the norms and products of such trees.

Everything is drawn and computed by NumPy, so that nothing has to be compiled.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import keystr

from jaxprop.core.arrays import is_floating
from jaxprop.core.describe import shapes
from jaxprop.core.tree import is_not_learned
from jaxprop.core.types import PyTree


def float64(name: str, tree: PyTree) -> PyTree:
    """Return the tree as JAX arrays, with its floats in float64.

    Args:
        name: "params" or "x", for messages.
        tree: the tree.

    Raises:
        TypeError: for a leaf that is not an array, for complex numbers, and in params for a number
            that is neither a float nor marked as not learned.
    """

    def widen(path: tuple[Any, ...], leaf: PyTree) -> PyTree:
        if is_not_learned(leaf):
            return jax.tree.map(_widened, leaf)
        if not hasattr(leaf, "dtype"):
            raise TypeError(f"{name}{keystr(path)} must be an array, not {shapes(leaf)}")
        if jnp.issubdtype(leaf.dtype, jnp.complexfloating) or (
            name == "params" and jnp.issubdtype(leaf.dtype, jnp.number) and not is_floating(leaf)
        ):
            hint = "; what is not learned is marked by jp.Unlearned" if name == "params" else ""
            raise TypeError(
                f"{name}{keystr(path)} is {leaf.dtype}; check_layer takes real floats{hint}"
            )
        return _widened(leaf)

    return jax.tree.map_with_path(widen, tree, is_leaf=is_not_learned)


def wide(leaf: PyTree) -> np.ndarray:
    """Return a leaf of floats as a NumPy array in float64."""
    return np.asarray(leaf, np.float64)


def _like(leaf: PyTree, values: np.ndarray) -> PyTree:
    """Return values on the device, in the dtype of the leaf."""
    return jax.device_put(values.astype(leaf.dtype))


def _widened(leaf: PyTree) -> PyTree:
    return jax.device_put(np.asarray(leaf, np.float64) if is_floating(leaf) else leaf)


def normal(rng: np.random.Generator, tree: PyTree) -> PyTree:
    """Return the tree with standard normal numbers in place of its floats."""
    return jax.tree.map(
        lambda leaf: _like(leaf, rng.normal(size=leaf.shape)) if is_floating(leaf) else leaf, tree
    )


def with_noise(rng: np.random.Generator, tree: PyTree, share: float) -> PyTree:
    """Return the tree with normal noise added to its floats, in proportion to each one's size."""

    def add(leaf: PyTree, noise: PyTree) -> PyTree:
        if not is_floating(leaf):
            return leaf
        return _like(leaf, wide(leaf) + share * size_of(leaf) * wide(noise))

    return jax.tree.map(add, tree, normal(rng, tree))


def size_of(leaf: PyTree) -> np.ndarray:
    """Return each element's absolute value; for a zero the leaf's rms, or 1 in a leaf of zeros."""
    array = np.abs(wide(leaf))
    typical = np.sqrt(np.mean(array**2)) if array.size else 1.0
    return np.where(array == 0, typical or 1.0, array)


def inner(a: PyTree, b: PyTree) -> float:
    """Return the inner product of two trees."""
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return float(sum(np.sum(wide(x) * wide(y)) for x, y in pairs))


def norm(tree: PyTree) -> float:
    """Return the norm of a tree's floats."""
    floats = [leaf for leaf in jax.tree.leaves(tree) if is_floating(leaf)]
    return float(np.sqrt(inner(floats, floats)))
