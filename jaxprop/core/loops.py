"""Loops with one term or one example at a time in memory.

A scan over an axis that is split over devices brings the whole axis to every device. So on a mesh
the examples of a batch are dealt into lanes, as many as there are devices, and each device iterates
over its own lane. Types do not tell which axes of a mesh split a batch: if not all of them do, a
device has several lanes, and as many examples at once.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jaxprop.core.mesh import devices_by_xla, shard_map_axes
from jaxprop.core.types import PyTree


def sum_over(f: Callable[[Any], PyTree], xs: PyTree) -> PyTree:
    """Return the sum of f over the leading axis of xs, one term after the other in a scan.

    Only one f(x) and the sum are in memory at once.

    Args:
        f: a function of one slice of xs; returns a pytree of arrays.
        xs: a pytree of arrays with a common leading axis.
    """

    def first_slice(leaf: Array) -> Array:
        if leaf.shape[0] == 0:
            leaf = jnp.zeros((1, *leaf.shape[1:]), leaf.dtype)
        return jax.lax.index_in_dim(leaf, 0, keepdims=False)

    def first() -> PyTree:
        return f(jax.tree.map(first_slice, xs))

    def add(total: PyTree, x: Any) -> tuple[PyTree, None]:
        return jax.tree.map(jnp.add, total, f(x)), None

    # In jax.shard_map the type of an array says on which axes devices differ; a struct's does not.
    terms = first() if shard_map_axes() else jax.eval_shape(first)
    return jax.lax.scan(add, jax.tree.map(jnp.zeros_like, terms), xs)[0]


def sum_examples(f: Callable[[Any], PyTree], xs: PyTree) -> PyTree:
    """Return ``sum_over(f, xs)`` over examples on axis 0; each device loops over its own."""
    lanes = lanes_of(xs)
    if lanes == 1:
        return sum_over(f, xs)
    sums = sum_over(jax.vmap(f), _dealt(xs, lanes, 1))
    return jax.tree.map(lambda leaf: leaf.sum(axis=0), sums)


def map_examples(f: Callable[[Any], PyTree], xs: PyTree) -> PyTree:
    """Return ``jax.lax.map(f, xs)`` over examples on axis 0; each device loops over its own."""
    lanes = lanes_of(xs)
    if lanes == 1:
        return jax.lax.map(f, xs)
    return map_blocks(jax.vmap(f), 1, xs)


def map_blocks(f: Callable[[Any], PyTree], size: int, xs: PyTree) -> PyTree:
    """Return f of all examples, computed for one block of ``size`` examples of each lane at a time.

    Args:
        f: a function of one block from every lane, together on axis 0; returns a pytree of arrays
            with the example on axis 0 too.
        size: the number of a lane's examples in a block; it divides the number in the lane.
        xs: a pytree of arrays with the example on axis 0.
    """
    lanes = lanes_of(xs)

    def whole(leaf: Array) -> Array:
        leaf = leaf.reshape(len(leaf), lanes, size, *leaf.shape[2:])
        return jax.lax.collapse(leaf.swapaxes(0, 1), 0, 3)

    return jax.tree.map(whole, jax.lax.map(f, _dealt(xs, lanes, size)))


def lanes_of(xs: PyTree) -> int:
    """Return the number of lanes: how many examples of xs, on axis 0, a loop handles at once."""
    leaves = jax.tree.leaves(xs)
    examples = leaves[0].shape[0]
    if not isinstance(examples, int) or not examples:  # a symbol, in jax.export; or 0
        return 1
    return math.gcd(max(map(devices_by_xla, leaves)), examples)


def _dealt(xs: PyTree, lanes: int, size: int) -> PyTree:
    """Return the examples as (steps, lanes * size, ...); a lane holds consecutive examples."""

    def one(leaf: Array) -> Array:
        leaf = leaf.reshape(lanes, len(leaf) // (lanes * size), size, *leaf.shape[1:])
        return jax.lax.collapse(leaf.swapaxes(0, 1), 1, 3)

    return jax.tree.map(one, xs)
