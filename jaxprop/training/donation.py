"""Arrays whose memory an update may take for its results: JAX calls that donating them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.core import Tracer


def owned(init: Callable[[Any], Any], params: Any) -> Any:
    """A state that can be donated: the optimizer's may hold an array of the caller's, as a rate."""
    leaves, structure = jax.tree.flatten(init(params))
    for place, leaf in enumerate(leaves):  # one after the other, not all of them twice
        leaves[place] = jnp.copy(leaf) if isinstance(leaf, Array) else leaf
    return jax.tree.unflatten(structure, leaves)


def fit_to_donate(tree: Any) -> Any:
    """The tree, with a copy of each array that it holds a second time.

    ``optax.lbfgs`` starts from a state with one array of zeros in two places, and JAX refuses to
    donate an array twice. Raises ``RuntimeError`` for an array that was donated before.
    """
    seen: set[int] = set()

    def once(leaf: Any) -> Any:
        if not isinstance(leaf, Array) or isinstance(leaf, Tracer):
            return leaf
        if leaf.is_deleted():
            raise RuntimeError(
                "an array in params or state is gone: update uses the memory of those that it is "
                "given; go on with the params and the state that it returned"
            )
        if id(leaf) in seen:
            return jnp.copy(leaf)
        seen.add(id(leaf))
        return leaf

    return jax.tree.map(once, tree)
