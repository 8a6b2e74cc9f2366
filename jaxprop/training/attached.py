"""Params with what the walk back carries for each: optimizer state and a sum of gradients."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
from jax import Array

from jaxprop.core.tree import for_optimizer, merged
from jaxprop.core.types import Params, PyTree


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Attached:
    """A param, with the optimizer state and the sum of gradients that the walk back carries for it.

    Attributes:
        param: the param.
        state: the part of the optimizer's state that belongs to the param.
        grad: the sum of its gradients over earlier micro-batches, or ``()``.
        index: its index among the leaves of the learned params.
    """

    param: Array
    state: tuple[Array, ...]
    grad: Any
    index: int = dataclasses.field(metadata={"static": True})


def is_attached(node: object) -> bool:
    """Return whether a node of a tree is an ``Attached``."""
    return isinstance(node, Attached)


def attached(
    params: Params, grads: Params | None, states: Sequence[tuple[Array, ...]] | None = None
) -> PyTree:
    """Return a tree of places: params, with an ``Attached`` for each one that is learned.

    Args:
        params: the net's params, side inputs included.
        grads: a tree like the learned params, the sums over earlier micro-batches, or None.
        states: for each learned param, the part of the optimizer's state that belongs to it.
    """
    leaves, structure = jax.tree.flatten(for_optimizer(params))
    states = [()] * len(leaves) if states is None else states
    sums: Sequence[Any] = [()] * len(leaves) if grads is None else jax.tree.leaves(grads)
    each = zip(leaves, states, sums, range(len(leaves)), strict=True)
    return merged(params, jax.tree.unflatten(structure, [Attached(*one) for one in each]))


def bare(places: PyTree) -> Params:
    """Return the params that a tree of places holds."""
    return jax.tree.map(
        lambda node: node.param if is_attached(node) else node, places, is_leaf=is_attached
    )
