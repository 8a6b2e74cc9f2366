"""Points to check at and directions to check in: trees of numbers, and what lies between them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
from jax import Array
from jax.tree_util import keystr

from jaxprop.core.arrays import rounded
from jaxprop.core.describe import shapes
from jaxprop.core.tree import is_not_learned


def is_floating(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jnp.floating)


def float64(name: str, tree: Any) -> Any:
    """Return the tree with its floats in float64.

    Raises:
        TypeError: for a learned array, or an input, that has no cotangent and is not a bool.
    """

    def widen(path: Any, leaf: Any) -> Any:
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


def normal(key: chex.PRNGKey, tree: Any) -> Any:
    """Normal numbers in the place of floats."""
    leaves, structure = jax.tree.flatten(tree)
    keys = jax.random.split(key, max(len(leaves), 1))
    drawn = [
        jax.random.normal(key, leaf.shape, leaf.dtype) if is_floating(leaf) else leaf
        for leaf, key in zip(leaves, keys, strict=False)
    ]
    return jax.tree.unflatten(structure, drawn)


def with_noise(key: chex.PRNGKey, tree: Any, size: Callable[[Array], Any]) -> Any:
    def add(leaf: Array, noise: Array) -> Array:
        return leaf + size(leaf) * noise if is_floating(leaf) else leaf

    return jax.tree.map(add, tree, normal(key, tree))


def size_of(leaf: Array) -> Array:
    """The size of each element; for a zero, that of the leaf, and for a leaf of zeros 1."""
    typical = jnp.sqrt(jnp.mean(leaf**2))
    return jnp.where(leaf == 0, jnp.where(typical == 0, 1, typical), jnp.abs(leaf))


def tenth(leaf: Array) -> Array:
    return 0.1 * size_of(leaf)


def hundredth(leaf: Array) -> Array:
    return 0.01 * size_of(leaf)


def inner(a: Any, b: Any) -> Array:
    return sum(jax.tree.leaves(jax.tree.map(lambda a, b: jnp.sum(a * b), a, b)), jnp.zeros(()))


def norm_of_floats(tree: Any) -> Array:
    """The norm of the tree's floats."""
    floats = [leaf for leaf in jax.tree.leaves(tree) if is_floating(leaf)]
    return norm(floats)


def norm(a: Any) -> Array:
    return jnp.sqrt(inner(a, a))
