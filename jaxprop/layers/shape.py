"""Layers that only move numbers: each is a linear map whose transpose moves them back."""

from __future__ import annotations

import math
from typing import Any

import chex
import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from jaxprop.core.arrays import empty_like
from jaxprop.core.checks import check_x, is_whole
from jaxprop.core.layer import Layer

X = Float[Array, "n ..."]


class Flatten(Layer):
    """y[n] = the elements of x[n] in a row, last axis fastest; d_x is ct in the shape of x.

    x is (N, ...), floating; y is (N, D). Raises ``ValueError`` for x without an example axis.
    """

    def init(self, key: chex.PRNGKey, x: Any) -> tuple[()]:
        check_x(self, x, "N, ...")
        return ()

    def forward(self, params: tuple[()], x: X) -> tuple[Float[Array, "n d"], Array]:
        return x.reshape(len(x), math.prod(x.shape[1:])), empty_like(x)

    def backward(self, params: tuple[()], x: Array, ct: Float[Array, "n d"]) -> tuple[tuple[()], X]:
        return (), ct.reshape(len(x), *x.shape[2:])


class Reshape(Layer):
    """y[n] = x[n] in another shape, which leaves the example axis out; d_x is ct in x's shape.

    x is (N, ...), floating; y is (N, *shape). Raises ``ValueError`` where x[n] has another number
    of elements than shape.
    """

    shape: tuple[int, ...]

    def __post_init__(self) -> None:
        if not isinstance(self.shape, tuple) or not all(map(_natural, self.shape)):
            raise TypeError(
                f"Reshape takes a tuple of whole numbers, without the example axis, "
                f"not {self.shape!r}"
            )

    def init(self, key: chex.PRNGKey, x: Any) -> tuple[()]:
        check_x(self, x, "N, ...")
        if math.prod(x.shape[1:]) != math.prod(self.shape):
            raise ValueError(
                f"{self}: an example has {math.prod(self.shape)} elements, but x has {x.shape}"
            )
        return ()

    def forward(self, params: tuple[()], x: X) -> tuple[X, Array]:
        return x.reshape(len(x), *self.shape), empty_like(x)

    def backward(self, params: tuple[()], x: Array, ct: X) -> tuple[tuple[()], X]:
        return (), ct.reshape(len(x), *x.shape[2:])


class Pad(Layer):
    """y = x with a constant around it, so d_x is what of ct lies where x was.

    ``widths`` has a (low, high) pair for each axis of x between the example axis and the last one.
    x is (N, ..., C), floating. Raises ``ValueError`` for another number of axes.
    """

    widths: tuple[tuple[int, int], ...]
    value: float = 0.0

    def __post_init__(self) -> None:
        if not isinstance(self.widths, tuple) or not all(map(_pair, self.widths)):
            raise TypeError(
                f"Pad takes a tuple of (low, high) pairs of whole numbers, not {self.widths!r}"
            )
        if isinstance(self.value, bool) or not isinstance(self.value, int | float):
            raise TypeError(f"Pad: value is a number, not {self.value!r}")

    def init(self, key: chex.PRNGKey, x: Any) -> tuple[()]:
        check_x(self, x, "N, ...")
        if x.ndim != len(self.widths) + 2:
            raise ValueError(
                f"{self} takes x with {len(self.widths)} axes between N and C, not {x.shape}"
            )
        return ()

    def forward(self, params: tuple[()], x: X) -> tuple[X, Array]:
        widths = ((0, 0), *self.widths, (0, 0))
        return jnp.pad(x, widths, constant_values=self.value), empty_like(x)

    def backward(self, params: tuple[()], x: Array, ct: X) -> tuple[tuple[()], X]:
        n, _, *positions, c = x.shape
        starts = (0, *(low for low, _ in self.widths), 0)
        limits = [start + size for start, size in zip(starts, (n, *positions, c), strict=True)]
        return (), jax.lax.slice(ct, starts, limits)


def _natural(value: Any) -> bool:
    return is_whole(value) and int(value) >= 0


def _pair(value: Any) -> bool:
    return isinstance(value, tuple) and len(value) == 2 and all(map(_natural, value))
