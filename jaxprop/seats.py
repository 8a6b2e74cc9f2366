"""What stands in a layer's seat in the tree of params: its params, and what goes along with them.

A seat of ``()`` may be given a key or a mask (``Layer.given``), and a param may have something
attached to it, which a walk back then replaces.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Attached:
    """A param with what goes along with it on the walk back, such as an optimizer's state.

    A walk through params with something attached replaces them: ``leave`` gives what shall stand in
    the seat from then on, and ``repeat`` writes it where the old ones were. ``index`` is the
    param's place among the leaves of all params.
    """

    param: Any
    state: Any
    index: int = dataclasses.field(metadata={"static": True})


def is_attached(leaf: object) -> bool:
    return isinstance(leaf, Attached)


def bare(params: Any) -> Any:
    """params without what is attached to them."""
    return jax.tree.map(
        lambda leaf: leaf.param if is_attached(leaf) else leaf, params, is_leaf=is_attached
    )


def is_key(leaf: Any) -> bool:
    """Whether a leaf of params is a key that ``given`` has put there."""
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def is_mask(leaf: Any) -> bool:
    """Whether a leaf of params is a mask that ``given`` has put there, (N, T) in its seat.

    In the seat of a ``repeat`` it has the layers in front.
    """
    return leaf.dtype == bool


def learned(params: Any, d_params: Any) -> Any:
    """params with ``()`` for a key or a mask, which were given and have ``()`` for a cotangent."""

    def kept(param: Any, d_param: Any) -> Any:
        absent = isinstance(d_param, tuple) and d_param == ()
        return () if absent and (is_key(param) or is_mask(param)) else param

    try:
        return jax.tree.map(kept, params, d_params)
    except ValueError:  # another structure: whoever takes the cotangents says so
        return params


def rounded(tree: Any, dtype: Any) -> Any:
    """The tree with floating leaves in dtype."""

    def narrow(leaf: Any) -> Any:
        return leaf.astype(dtype) if jnp.issubdtype(jnp.result_type(leaf), jnp.floating) else leaf

    return jax.tree.map(narrow, tree)
