"""Points to check at and directions to check in, and the norms and products of such trees."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array
from jax.tree_util import KeyPath, keystr

from jaxprop.core.arrays import rounded
from jaxprop.core.describe import shapes
from jaxprop.core.tree import is_not_learned
from jaxprop.core.types import PyTree


def is_floating(leaf: Array) -> bool:
    """Return whether an array is of real floats."""
    return jnp.issubdtype(leaf.dtype, jnp.floating)


def float64(name: str, tree: PyTree) -> PyTree:
    """Return the tree with its floats in float64.

    Args:
        name: "params" or "x", for messages.
        tree: the tree.

    Raises:
        TypeError: for a leaf that is not an array, for complex numbers, and in params for a number
            that is neither a float nor marked as not learned.
    """

    def widen(path: KeyPath, leaf: PyTree) -> PyTree:
        if is_not_learned(leaf):
            return jax.tree.map(lambda leaf: rounded(leaf, jnp.float64), leaf)
        if not hasattr(leaf, "dtype"):
            raise TypeError(f"{name}{keystr(path)} must be an array, not {shapes(leaf)}")
        leaf = jnp.asarray(leaf)
        if is_floating(leaf):
            return leaf.astype(jnp.float64)
        if jnp.issubdtype(leaf.dtype, jnp.complexfloating) or (
            name == "params" and jnp.issubdtype(leaf.dtype, jnp.number)
        ):
            raise TypeError(f"{name}{keystr(path)} is {leaf.dtype}; check_layer takes real floats")
        return leaf

    return jax.tree.map_with_path(widen, tree, is_leaf=is_not_learned)


def normal(key: Array, tree: PyTree) -> PyTree:
    """Return the tree with standard normal numbers in the place of floats."""
    leaves, structure = jax.tree.flatten(tree)
    keys = jax.random.split(key, max(len(leaves), 1))
    drawn = [
        jax.random.normal(key, leaf.shape, leaf.dtype) if is_floating(leaf) else leaf
        for leaf, key in zip(leaves, keys, strict=False)
    ]
    return jax.tree.unflatten(structure, drawn)


def with_noise(key: Array, tree: PyTree, size: Callable[[Array], Array]) -> PyTree:
    """Return the tree with normal noise of standard deviation ``size(leaf)`` added to floats."""

    def add(leaf: Array, noise: Array) -> Array:
        return leaf + size(leaf) * noise if is_floating(leaf) else leaf

    return jax.tree.map(add, tree, normal(key, tree))


def size_of(leaf: Array) -> Array:
    """Return the size of each element: for a zero the leaf's rms, and in a leaf of zeros 1."""
    typical = jnp.sqrt(jnp.mean(leaf**2))
    return jnp.where(leaf == 0, jnp.where(typical == 0, 1, typical), jnp.abs(leaf))


def tenth(leaf: Array) -> Array:
    """Return a tenth of the size of each element."""
    return 0.1 * size_of(leaf)


def hundredth(leaf: Array) -> Array:
    """Return a hundredth of the size of each element."""
    return 0.01 * size_of(leaf)


def inner(a: PyTree, b: PyTree) -> Array:
    """Return the inner product of two trees."""
    return sum(jax.tree.leaves(jax.tree.map(lambda a, b: jnp.sum(a * b), a, b)), jnp.zeros(()))


def norm_of_floats(tree: PyTree) -> Array:
    """Return the norm of the tree's floats."""
    floats = [leaf for leaf in jax.tree.leaves(tree) if is_floating(leaf)]
    return norm(floats)


def norm(a: PyTree) -> Array:
    """Return the norm of a tree, all of floats."""
    return jnp.sqrt(inner(a, a))
