"""Side inputs: the key and the mask of a step, on their way to the layers that take them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from jax import Array

from jaxprop.core.child import Child, layers_within
from jaxprop.core.describe import shapes
from jaxprop.core.tree import Key, Mask, SideInput
from jaxprop.core.types import Params

if TYPE_CHECKING:
    from jaxprop.core.layer import Layer


MASK = (
    "mask is bool (N, T), True where a position is real, or for attention (N, T, S) or "
    "(N, heads, T, S), True where a query sees a key"
)


def takes_side_input(layer: Layer, kind: type[SideInput]) -> bool:
    """Return whether the layer, or any layer inside it, takes this side input."""
    return any(each.takes is kind for each in layers_within(layer))


def bound(layer: Layer, params: Params, key: Array | None, mask: Mask | None) -> Params:
    """Return params with the side inputs, each in the place of the layers that take it."""
    if layer.takes is Key and key is not None:
        return layer.with_side_input(params, Key(key))
    if layer.takes is Mask and mask is not None:
        return layer.with_side_input(params, mask)
    if key is None and mask is None:
        return params
    layer.check_places(params)
    for index, child in enumerate(layer.children()):
        params = _bind_child(layer, params, index, child, key, mask)
    return params


def check_side_inputs(net: Layer, key: Array | None, mask: Array | None) -> None:
    """Raise unless key and mask are valid, and the net can use the mask."""
    dtype = getattr(key, "dtype", None)
    if key is not None and (dtype is None or not jnp.issubdtype(dtype, jax.dtypes.prng_key)):
        raise TypeError(f"key is a key of jax.random.key, not {shapes(key)}")
    if key is not None and key.shape:
        raise ValueError(f"key is one key, not an array of them, {shapes(key)}")
    if mask is not None and getattr(mask, "dtype", None) != jnp.bool_:
        raise TypeError(f"{MASK}, not {shapes(mask)}")
    if mask is not None:
        if not 2 <= jnp.ndim(mask) <= 4:
            raise ValueError(f"{MASK}, not {shapes(mask)}")
        _check_mixing(net)
        if not takes_side_input(net, Mask):
            raise ValueError(f"no layer takes a mask: {net}")


def _check_mixing(net: Layer) -> None:
    for layer in layers_within(net):
        if layer.mixes_positions:
            raise ValueError(
                f"{layer} mixes positions and takes no mask: what is padded would reach the others"
            )


def _bind_child(
    layer: Layer, params: Params, index: int, child: Child, key: Array | None, mask: Mask | None
) -> Params:
    if child.name is ...:
        given = {Key: key, Mask: mask}
        for kind, value in given.items():
            if value is not None and takes_side_input(child.layer, kind):
                raise ValueError(
                    f"{layer}: {child.layer} takes a {kind.__name__.lower()}, but where its params "
                    "stand is not known; make the layer a jp.Wrapper or a jp.Combinator"
                )
        return params
    if key is not None and child.name is not None:
        key = _each(lambda key: jax.random.fold_in(key, index), key)
    times = child.times
    if times is not None:
        if key is not None:
            key = _each(lambda key: jax.random.split(key, times), key)
        if mask is not None:
            axis, value = mask.axis, mask.value
            shape = *value.shape[:axis], times, *value.shape[axis:]
            mask = mask.of(jnp.broadcast_to(jnp.expand_dims(value, axis), shape))
    return child.put(params, bound(child.layer, child.of(params), key, mask))


def _each(f: Callable[[Array], Array], keys: Array) -> Array:
    """Return f of each key, in an array of the shape of the keys."""
    for _ in keys.shape:
        f = jax.vmap(f)
    return f(keys)
