"""Donation: arrays whose memory an update may reuse for its results."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.core import Tracer


def owned(init: Callable[[Any], Any], params: Any) -> Any:
    """Return the state that init makes, copied so that it can be donated.

    The original may hold an array of the caller's, such as a learning rate.
    """
    leaves, structure = jax.tree.flatten(init(params))
    for place, leaf in enumerate(leaves):  # one by one, never two copies of all
        leaves[place] = jnp.copy(leaf) if isinstance(leaf, Array) else leaf
    return jax.tree.unflatten(structure, leaves)


def fit_to_donate(tree: Any) -> Any:
    """Return the tree, with a copy in place of every repeated array.

    The initial state of ``optax.lbfgs`` has one array of zeros in two places, and JAX refuses to
    donate an array twice. Raises ``RuntimeError`` for an array that was donated before.
    """
    seen: set[int] = set()

    def once(leaf: Any) -> Any:
        if not isinstance(leaf, Array) or isinstance(leaf, Tracer):
            return leaf
        if leaf.is_deleted():
            raise RuntimeError(
                "an array in params or state was donated to an earlier update: continue with the "
                "params and the state that it returned"
            )
        if id(leaf) in seen:
            return jnp.copy(leaf)
        seen.add(id(leaf))
        return leaf

    return jax.tree.map(once, tree)
