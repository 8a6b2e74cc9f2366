"""Layers that only move the entries of x: the transpose of each moves those of ct back."""

from __future__ import annotations

import math
from typing import Literal

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from jaxprop.core.arrays import empty_like
from jaxprop.core.checks import check_x, is_whole
from jaxprop.core.layer import Layer
from jaxprop.core.types import PyTree
from jaxprop.layers.padding import Mode, check_room, extended, folded_back

X = Float[Array, "n ..."]


class Flatten(Layer):
    """Flattening, y[n] = the entries of x[n] in row-major order; d_x is ct in x's shape.

    x is (N, ...), floating, and y is (N, D).

    Raises:
        TypeError: for x that is not floating.
        ValueError: for x without an example axis.
    """

    mixes_positions = True

    def init(self, key: Array, x: PyTree) -> tuple[()]:
        check_x(self, x, "N, ...")
        return ()

    def forward(self, params: tuple[()], x: X) -> tuple[Float[Array, "n d"], Array]:
        return x.reshape(x.shape[0], math.prod(x.shape[1:])), empty_like(x)

    def backward(self, params: tuple[()], x: Array, ct: Float[Array, "n d"]) -> tuple[tuple[()], X]:
        return (), ct.reshape(x.shape[0], *x.shape[2:])


class Reshape(Layer):
    """Reshaping, y[n] = x[n] in another shape; d_x is ct in x's shape.

    x is (N, ...), floating, and y is (N, *shape).

    Args:
        shape: the shape of y[n], without the example axis.

    Raises:
        TypeError: for a shape that is not a tuple of whole numbers, and for x that is not floating.
        ValueError: for x[n] with another number of entries.
    """

    shape: tuple[int, ...]

    def __post_init__(self) -> None:
        if not isinstance(self.shape, tuple) or not all(map(_natural, self.shape)):
            raise TypeError(
                f"Reshape takes a tuple of whole numbers, without the example axis, "
                f"not {self.shape!r}"
            )

    def init(self, key: Array, x: PyTree) -> tuple[()]:
        check_x(self, x, "N, ...")
        if math.prod(x.shape[1:]) != math.prod(self.shape):
            raise ValueError(
                f"{self}: an example has {math.prod(self.shape)} elements, but x has {x.shape}"
            )
        return ()

    def forward(self, params: tuple[()], x: X) -> tuple[X, Array]:
        return x.reshape(x.shape[0], *self.shape), empty_like(x)

    def backward(self, params: tuple[()], x: Array, ct: X) -> tuple[tuple[()], X]:
        return (), ct.reshape(x.shape[0], *x.shape[2:])


class Pad(Layer):
    """Padding, y = x with a constant or repeated entries of x around it.

    d_x is the part of ct that lies over x. The part over a copy is added to its original.

    x is (N, ..., C), floating. y is x with its axes between the first and the last widened.

    Args:
        widths: how many entries are added, as a (low, high) pair for each of these axes.
        value: the constant.
        mode: what is added, as in ``jnp.pad``: "constant" adds the value, "wrap" continues from the
            other end of x, "reflect" mirrors x without repeating the outermost entry, and "edge"
            repeats the outermost entry.

    Raises:
        TypeError: for an argument of the wrong type, and for x that is not floating.
        ValueError: for another mode, for a value with a mode that does not use it, and for x with
            the wrong number of axes or too few entries to repeat.
    """

    widths: tuple[tuple[int, int], ...]
    value: float = 0.0
    mode: Literal["constant"] | Mode = "constant"

    def __post_init__(self) -> None:
        if not isinstance(self.widths, tuple) or not all(map(_pair, self.widths)):
            raise TypeError(
                f"Pad takes a tuple of (low, high) pairs of whole numbers, not {self.widths!r}"
            )
        if isinstance(self.value, bool) or not isinstance(self.value, int | float):
            raise TypeError(f"Pad: value is a number, not {self.value!r}")
        if self.mode not in ("constant", "wrap", "reflect", "edge"):
            raise ValueError(
                f'Pad: mode is "constant", "wrap", "reflect" or "edge", not {self.mode!r}'
            )
        if self.mode != "constant" and self.value:
            raise ValueError(f'Pad: mode "{self.mode}" repeats x, and has no use for a value')

    @property
    def mixes_positions(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.mode != "constant"

    def init(self, key: Array, x: PyTree) -> tuple[()]:
        check_x(self, x, "N, ...")
        if x.ndim != len(self.widths) + 2:
            raise ValueError(
                f"{self} takes x with {len(self.widths)} axes between N and C, not {x.shape}"
            )
        if self.mode != "constant":
            check_room(self, x.shape, self.widths, self.mode)
        return ()

    def forward(self, params: tuple[()], x: X) -> tuple[X, Array]:
        if self.mode != "constant":
            return extended(x, self.widths, self.mode), empty_like(x)
        widths = ((0, 0), *self.widths, (0, 0))
        return jnp.pad(x, widths, constant_values=self.value), empty_like(x)

    def backward(self, params: tuple[()], x: Array, ct: X) -> tuple[tuple[()], X]:
        if self.mode != "constant":
            return (), folded_back(ct, self.widths, self.mode)
        n, _, *positions, c = x.shape
        starts = (0, *(low for low, _ in self.widths), 0)
        limits = [start + size for start, size in zip(starts, (n, *positions, c), strict=True)]
        return (), jax.lax.slice(ct, starts, limits)


def _natural(value: object) -> bool:
    return is_whole(value) and int(value) >= 0  # pyright: ignore[reportArgumentType]


def _pair(value: object) -> bool:
    return isinstance(value, tuple) and len(value) == 2 and all(map(_natural, value))
