"""Layers that index an axis of x, or reorder its axes."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float

from jaxprop.core.arrays import empty_like
from jaxprop.core.checks import check_count, check_x, is_whole
from jaxprop.core.layer import Layer
from jaxprop.core.tree import Mask
from jaxprop.core.types import Params, PyTree
from jaxprop.layers.masks import mask_of

X = Float[Array, "n ..."]


class Take(Layer):
    """The entry of x at one index of an axis, so d_x is ct there and 0 elsewhere.

    ``Take(-1)`` is the last step of a sequence, and ``Take(0)`` its first, such as a class token.

    x is (N, ...), floating, and y is x without the axis. params are ``()``, or for x (N, T, C) a
    ``jp.Mask`` that ``net.bind(params, mask=)`` puts in their place. The index then counts only an
    example's real positions: -1 is the last real one. y is 0 for an example that has no such
    position.

    Args:
        index: the index, which counts from the end if it is negative.
        axis: the axis, at least 1, as axis 0 is the example.

    Raises:
        TypeError: for an argument that is not a whole number, and for x that is not floating.
        ValueError: for an axis or an index that x does not have, and for a mask that is not (N, T).
    """

    index: int
    axis: int = 1

    @property
    def takes(self) -> type[Mask] | None:  # pyright: ignore[reportIncompatibleVariableOverride]
        return Mask if self.axis == 1 else None

    def __post_init__(self) -> None:
        if not is_whole(self.index):
            raise TypeError(f"Take: index is a whole number, not {self.index!r}")
        check_count("Take: axis", self.axis)

    def init(self, key: Array, x: PyTree) -> tuple[()]:
        check_x(self, x, "N, ...")
        if self.axis >= x.ndim or not -x.shape[self.axis] <= self.index < x.shape[self.axis]:
            raise ValueError(f"{self} takes an entry that x of shape {x.shape} does not have")
        return ()

    def forward(self, params: Params, x: X) -> tuple[X, Array]:
        at = self._at(params, x)
        if at is None:
            y = jax.lax.index_in_dim(x, self.index, self.axis, keepdims=False)
        else:
            y = jnp.sum(x, axis=1, where=at)
        return y, empty_like(x)

    def backward(self, params: Params, x: Array, ct: X) -> tuple[tuple[()], X]:
        like = jax.ShapeDtypeStruct((x.shape[0], *x.shape[2:]), x.dtype)
        at, ct = self._at(params, like), jnp.expand_dims(ct, self.axis)
        if at is not None:
            return (), jnp.where(at, ct, 0)
        index = self.index % like.shape[self.axis]
        config = [(0, 0, 0)] * ct.ndim
        config[self.axis] = (index, like.shape[self.axis] - 1 - index, 0)
        return (), jax.lax.pad(ct, jnp.zeros((), ct.dtype), config)

    def _at(self, params: Params, x: PyTree) -> Bool[Array, "n t 1"] | None:
        """Return where the taken position is, as bools; None without a mask of positions."""
        mask = mask_of(self, params, x) if self.axis == 1 else None
        if mask is None:
            return None
        rank = jnp.cumsum(mask, axis=1)
        wanted = self.index + (1 if self.index >= 0 else rank[:, -1:] + 1)
        return (mask & (rank == wanted))[..., None]


class Moveaxis(Layer):
    """x with some axes moved, as by ``jnp.moveaxis``; d_x is ct with them moved back.

    x is (N, ...), floating. Axis 0, the example, stays where it is.

    Args:
        source: the axis of x, or a tuple of axes.
        destination: the place of each of them in y.

    Raises:
        TypeError: for axes that are not whole numbers, and for x that is not floating.
        ValueError: for axes that x does not have, that are named twice, or that are the example's.

    Example:
        >>> import jaxprop as jp
        >>> channels_last = jp.Moveaxis(1, -1)  # from (N, C, H, W) to (N, H, W, C)
    """

    source: int | tuple[int, ...]
    destination: int | tuple[int, ...]
    mixes_positions = True

    def __post_init__(self) -> None:
        for axes in (self.source, self.destination):
            if not all(map(is_whole, axes if isinstance(axes, tuple) else (axes,))):
                raise TypeError(
                    f"Moveaxis takes a whole number or a tuple of them for each of source and "
                    f"destination, not {self.source!r} and {self.destination!r}"
                )

    def init(self, key: Array, x: PyTree) -> tuple[()]:
        check_x(self, x, "N, ...")
        sides = []
        for axes in (self.source, self.destination):
            each = axes if isinstance(axes, tuple) else (axes,)
            sides.append({axis % x.ndim for axis in each if -x.ndim <= axis < x.ndim} - {0})
            if len(sides[-1]) != len(each):
                raise ValueError(
                    f"{self} takes axes that x of shape {x.shape} has, each once and not the "
                    "example's"
                )
        if len(sides[0]) != len(sides[1]):
            raise ValueError(f"{self} takes as many axes for destination as for source")
        return ()

    def forward(self, params: tuple[()], x: X) -> tuple[X, tuple[()]]:
        return jnp.moveaxis(x, self.source, self.destination), ()

    def backward(self, params: tuple[()], residuals: tuple[()], ct: X) -> tuple[tuple[()], X]:
        return (), jnp.moveaxis(ct, self.destination, self.source)
