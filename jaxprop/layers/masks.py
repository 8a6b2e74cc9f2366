"""The padding mask that a layer finds in place of its params."""

from __future__ import annotations

from jax import Array
from jaxtyping import Bool

from jaxprop.core.describe import shapes
from jaxprop.core.layer import Layer
from jaxprop.core.tree import Mask
from jaxprop.core.types import Params, PyTree


def mask_of(layer: Layer, params: Params, x: PyTree) -> Bool[Array, "n t"] | None:
    """Return the mask given as params, True where a position of x is real; None without a mask.

    Args:
        layer: the layer, for the error message.
        params: a ``Mask``, or anything else.
        x: (N, T, C).

    Raises:
        ValueError: for a mask that is not (N, T), and for x of another rank.
    """
    if not isinstance(params, Mask):
        return None
    if len(x.shape) != 3 or params.value.shape != x.shape[:2]:
        raise ValueError(
            f"{layer}: the mask is {shapes(params.value)}, but an input {shapes(x)} takes a "
            f"padding mask bool{list(x.shape[:-1])}, True where a position is real"
        )
    return params.value
