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
    """Return the tree, with a copy in place of every array whose memory an earlier one has.

    The initial state of ``optax.lbfgs`` has one array of zeros in two places, ``jax.device_put``
    makes two arrays of it that share their memory, and memory cannot be donated twice. Raises
    ``RuntimeError`` for an array that was donated before.
    """
    seen: set[object] = set()

    def once(leaf: Any) -> Any:
        if not isinstance(leaf, Array) or isinstance(leaf, Tracer):
            return leaf
        if leaf.is_deleted():
            raise RuntimeError(
                "an array in params or state was donated to an earlier update: continue with the "
                "params and the state that it returned"
            )
        here = _memory(leaf)
        if not seen.isdisjoint(here):
            return jnp.copy(leaf)
        seen.update(here)
        return leaf

    return jax.tree.map(once, tree)


def _memory(array: Array) -> list[object]:
    """Return the address of each shard of an array on this host, with the shard's number."""
    if jnp.issubdtype(array.dtype, jax.dtypes.prng_key):
        array = jax.random.key_data(array)
    shards = range(len(array.sharding.addressable_devices))
    try:
        return [(n, array.addressable_data(n).unsafe_buffer_pointer()) for n in shards]
    except jax.errors.JaxRuntimeError:  # a device that does not tell
        return [id(array)]
