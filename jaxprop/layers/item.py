"""A layer that selects one part of a dict or a tuple."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jaxprop.core.arrays import empty_like
from jaxprop.core.child import Child, part_of
from jaxprop.core.layer import Layer
from jaxprop.core.types import Cotangent, PyTree, Residuals


class Item(Layer):
    """One part of x, y = x_i, so dE/dx_i = ct, and 0 for the other parts.

    x is a dict or a tuple: the net's input, or the output of ``jp.branch(..., join="tuple")``.
    There are no params.

    Args:
        part: i, a key of a dict, an index of a tuple, or the name of a field of a named tuple.

    Raises:
        ValueError: for an x without that part.

    Example:
        >>> import jaxprop as jp
        >>> source = jp.chain(jp.Item(0), jp.Embedding(50, 8))
        >>> target = jp.chain(jp.Item(1), jp.Embedding(50, 8))
        >>> jp.branch(target, source, join="tuple")  # of a pair of ids, a pair of rows
        branch(chain(Item(1), Embedding(50, 8)), chain(Item(0), Embedding(50, 8)), join='tuple')
    """

    part: str | int

    def init(self, key: Array, x: PyTree) -> tuple[()]:
        part_of(self, x, self.part)
        return ()

    def forward(self, params: tuple[()], x: PyTree) -> tuple[PyTree, Residuals]:
        return self._place.of(x), jax.tree.map(empty_like, self._place.put(x, ()))

    def backward(
        self, params: tuple[()], residuals: Residuals, ct: Cotangent
    ) -> tuple[tuple[()], Cotangent]:
        return (), self._place.put(jax.tree.map(_zeros, residuals), ct)

    @property
    def _place(self) -> Child:
        return Child(self, self.part)


def _zeros(empty: Array) -> Any:
    """Return zeros of the shape that ``empty_like`` kept; None unless it is floating."""
    if not jnp.issubdtype(empty.dtype, jnp.floating):
        return None
    return jnp.zeros((empty.shape[0], *empty.shape[2:]), empty.dtype)
