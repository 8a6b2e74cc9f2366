"""One entry of a tuple."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jaxprop.core.arrays import empty_like
from jaxprop.core.checks import is_whole
from jaxprop.core.describe import shapes
from jaxprop.core.layer import Layer
from jaxprop.core.types import Cotangent, PyTree, Residuals


class Item(Layer):
    """y = x[index], an entry of a tuple, so dE/dx[index] = ct, and 0 for the other entries.

    x is a tuple, as ``jp.branch(..., join="tuple")`` gives one, or as the net is given. There are
    no params.

    Args:
        index: which entry, from 0.

    Raises:
        TypeError: for an index that is not a whole number, and for x that is not a tuple.
        ValueError: for a negative index, and for a tuple that is too short.

    Example:
        >>> import jaxprop as jp
        >>> encoder = jp.chain(jp.Item(0), jp.Embedding(50, 8), jp.Dense(8))
        >>> decoder = jp.chain(jp.Item(1), jp.Embedding(50, 8))
        >>> both = jp.branch(decoder, encoder, join="tuple")
    """

    index: int

    def __post_init__(self) -> None:
        if not is_whole(self.index):
            raise TypeError(f"Item: index is a whole number, not {self.index!r}")
        if self.index < 0:
            raise ValueError(f"Item: index is not negative, not {self.index}")

    def init(self, key: Array, x: PyTree) -> tuple[()]:
        if type(x) is not tuple:
            raise TypeError(f"{self} takes a tuple x, not {shapes(x)}")
        if len(x) <= self.index:
            raise ValueError(f"{self} takes a tuple of more entries than {shapes(x)}")
        return ()

    def forward(self, params: tuple[()], x: tuple[PyTree, ...]) -> tuple[PyTree, Residuals]:
        others = (() if i == self.index else entry for i, entry in enumerate(x))
        return x[self.index], jax.tree.map(empty_like, tuple(others))

    def backward(
        self, params: tuple[()], residuals: Residuals, ct: Cotangent
    ) -> tuple[tuple[()], Cotangent]:
        d_x = jax.tree.map(_zeros, residuals)
        return (), (*d_x[: self.index], ct, *d_x[self.index + 1 :])


def _zeros(empty: Array) -> Any:
    """Return zeros of the shape that ``empty_like`` kept; None for what has no cotangent."""
    if not jnp.issubdtype(empty.dtype, jnp.floating):
        return None
    return jnp.zeros((empty.shape[0], *empty.shape[2:]), empty.dtype)
