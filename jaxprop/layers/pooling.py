"""Pooling over windows of positions, along one to three axes, without params."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Bool, Float

from jaxprop.core.arrays import empty_like, wide
from jaxprop.core.checks import check_flags, check_x
from jaxprop.core.layer import Layer
from jaxprop.core.loops import map_examples
from jaxprop.core.mesh import is_explicit
from jaxprop.core.tree import Mask
from jaxprop.core.types import Params, PyTree
from jaxprop.layers.masks import mask_of
from jaxprop.layers.padding import Sizes, Zeros, check_padding, whole_pairs
from jaxprop.layers.windows import AXES, Windows, check_window, sizes

X = Float[Array, "n ... c"]
Y = Float[Array, "n ... c"]


class MaxPool(Layer):
    """Max pooling, y[t] = max over the taps k of the window of x[t s + k].

    s is the stride. With k* the tap of the maximum, the first one among equals, y[t] = x[t s + k*]
    and

        dE/dx[h] = sum of ct[t] over the windows t with t s + k* = h.

    The residual is the index of the tap k*. For each tap in turn, backward takes ct where k* is
    that tap, and adds it where the tap read x. This vectorizes, whereas XLA's select-and-scatter
    searches one window after the other. On a TPU backward is select-and-scatter, with x as
    residual: there it takes a fifth of the cycles, by the compiler's count.

    x is (N, *spatial, C), floating, with as many spatial axes as ``window`` has, and y is
    (N, *outputs, C).

    Args:
        window: the size of the window along each spatial axis.
        strides: s, one number for all axes or a tuple; None for the window, as in PyTorch (not for
            1, as in Flax).
        padding: "SAME", "VALID", or how many entries of minus infinity are added: a whole number,
            or a (low, high) pair for each axis, each smaller than the window.

    Raises:
        TypeError: for an argument of the wrong type, and for x that is not floating.
        ValueError: for an argument out of range, and for x of another rank or smaller than the
            window.
    """

    window: Sizes = (2, 2)
    strides: int | Sizes | None = None
    padding: Zeros = "VALID"
    mixes_positions = True

    def __post_init__(self) -> None:
        _check_fields(self)

    def init(self, key: Array, x: PyTree) -> tuple[()]:
        return _init(self, x)

    def forward(self, params: tuple[()], x: X) -> tuple[Y, tuple[Array, Array]]:
        windows = _windows(self, x.shape[1:-1])
        y = _reduced(x, -jnp.inf, jax.lax.max, windows)

        def in_loop(x: X, y: Y) -> Array:
            return map_examples(lambda xy: _first(xy[0], xy[1], windows), (x, y))

        def unread(x: X, y: Y) -> Array:
            return jnp.zeros_like(y, _of_taps(windows))

        at_once = jax.vmap(lambda x, y: _first(x, y, windows))
        if is_explicit(x):  # a loop over the examples would need them all on each device
            first = at_once(x, y)
        else:
            first = jax.lax.platform_dependent(x, y, cpu=in_loop, tpu=unread, default=at_once)
        return y, (first, x)

    def backward(
        self, params: tuple[()], residuals: tuple[Array, Array], ct: Y
    ) -> tuple[tuple[()], X]:
        first, x = residuals
        return (), jax.lax.platform_dependent(
            first, x, ct, tpu=self._scattered, default=self._tap_by_tap
        )

    def _tap_by_tap(self, first: Array, x: X, ct: Y) -> X:
        windows = _windows(self, x.shape[1:-1])
        parts = [jnp.where(first == tap, ct, 0) for tap in range(windows.taps)]
        return windows.put_back(parts, x.shape[1:-1])

    def _scattered(self, first: Array, x: X, ct: Y) -> X:
        """Return d_x by select-and-scatter, to which JAX transposes the maximum over windows."""
        windows = _windows(self, x.shape[1:-1])
        _, pull = jax.vjp(lambda x: _reduced(x, -jnp.inf, jax.lax.max, windows), x)
        return pull(ct)[0]


class AvgPool(Layer):
    """Average pooling, y[t] = 1/K sum_k x[t s + k] over the K taps of the window.

    The padding is zeros, and dE/dx[h] = 1/K sum of ct[t] over all t and k with t s + k = h. By
    default K counts the taps in the padding too, as in Flax and PyTorch. With
    ``count_include_pad=False`` the mean is over entries of x alone, so that K depends on t and
    stays within the sum.

    x is (N, *spatial, C), floating, with as many spatial axes as ``window`` has, and y is
    (N, *outputs, C).

    Args:
        window: the size of the window along each spatial axis.
        strides: s, one number for all axes or a tuple; None for the window, as in PyTorch (not for
            1, as in Flax).
        padding: "SAME", "VALID", or how many zeros are added: a whole number, or a (low, high)
            pair for each axis, each smaller than the window.
        count_include_pad: whether K counts the taps that lie in the padding.

    Raises:
        TypeError: for an argument of the wrong type, and for x that is not floating.
        ValueError: for an argument out of range, and for x of another rank or smaller than the
            window.
    """

    window: Sizes = (2, 2)
    strides: int | Sizes | None = None
    padding: Zeros = "VALID"
    count_include_pad: bool = True
    mixes_positions = True

    def __post_init__(self) -> None:
        _check_fields(self)
        check_flags(self, "count_include_pad")

    def init(self, key: Array, x: PyTree) -> tuple[()]:
        return _init(self, x)

    def forward(self, params: tuple[()], x: X) -> tuple[Y, Array]:
        windows = _windows(self, x.shape[1:-1])
        total = _reduced(wide(x), 0, jax.lax.add, windows)
        count = self._count(windows, x.shape[1:-1], total.dtype)
        return (total / count).astype(x.dtype), empty_like(x)

    def backward(self, params: tuple[()], x: Array, ct: Y) -> tuple[tuple[()], X]:
        spatial = x.shape[2:-1]
        windows, share = _windows(self, spatial), wide(ct)
        count = self._count(windows, spatial, share.dtype)
        if self.count_include_pad:
            total = windows.put_back([share] * windows.taps, spatial) / count
        else:
            total = windows.put_back([share / count] * windows.taps, spatial)
        return (), total.astype(ct.dtype)

    def _count(self, windows: Windows, spatial: Sizes, dtype: Any) -> int | Array:
        """Return K: one number, or one for each window, (1, *outputs, 1)."""
        if self.count_include_pad:
            return windows.taps
        return jnp.asarray(windows.counts(spatial)[None, ..., None], dtype)


class GlobalAvgPool(Layer):
    """Global average pooling, the mean of x over its P positions, so dE/dx = ct / P at each.

    x is (N, ..., C), floating, with at least one axis of positions, and y is (N, C). params are
    ``()``, or for x (N, T, C) a ``jp.Mask`` that ``net.bind(params, mask=)`` puts in their place.
    The mean is then over an example's real positions, and 0 if it has none.

    Raises:
        TypeError: for x that is not floating.
        ValueError: for x without positions or channels, and for a mask that is not (N, T).
    """

    takes: ClassVar[type[Mask]] = Mask

    def init(self, key: Array, x: PyTree) -> tuple[()]:
        check_x(self, x, "N, ..., C")
        if x.ndim < 3:
            raise ValueError(f"{self} takes x of shape (N, ..., C) with positions, not {x.shape}")
        return ()

    def forward(self, params: Params, x: X) -> tuple[Float[Array, "n c"], Array]:
        real, count = self._real(params, x)
        total = jnp.sum(wide(x), axis=tuple(range(1, x.ndim - 1)), where=real)
        return (total / jnp.asarray(count, total.dtype)).astype(x.dtype), empty_like(x)

    def backward(self, params: Params, x: Array, ct: Float[Array, "n c"]) -> tuple[tuple[()], X]:
        like = jax.ShapeDtypeStruct((x.shape[0], *x.shape[2:]), x.dtype)
        real, count = self._real(params, like)
        share = (wide(ct) / jnp.asarray(count, wide(ct).dtype)).astype(ct.dtype)
        ct = jnp.expand_dims(share, range(1, len(like.shape) - 1))
        return (), jnp.where(real, jnp.broadcast_to(ct, like.shape), 0)

    def _real(self, params: Params, x: PyTree) -> tuple[Bool[Array, "n t 1"] | bool, Any]:
        """Return which positions are real, and how many."""
        mask = mask_of(self, params, x)
        if mask is None:
            return True, math.prod(x.shape[1:-1])
        return mask[..., None], jnp.maximum(mask.sum(axis=1), 1)[:, None]


def _first(x: Float[Array, "... c"], y: Float[Array, "... c"], windows: Windows) -> Array:
    """Return the index of the first tap at which one example's x equals y.

    On a CPU this runs in a loop over the examples, which XLA does not fuse into ``backward``. If it
    were fused, it would run again for each tap.
    """
    first = jnp.full(y.shape, windows.taps - 1, _of_taps(windows))
    for tap, there in reversed(list(enumerate(windows.shifted(x[None], -jnp.inf)))):
        first = jnp.where(there[0] == y, jnp.asarray(tap, first.dtype), first)
    return first


def _of_taps(windows: Windows) -> Any:
    """Return a dtype that holds the index of any tap."""
    return jnp.int8 if windows.taps < 128 else jnp.int32


def _windows(layer: MaxPool | AvgPool, spatial: Sizes) -> Windows:
    rank = len(layer.window)
    strides = layer.window if layer.strides is None else sizes("strides", layer.strides, rank)
    return Windows.over(spatial, layer.window, strides, layer.padding, (1,) * rank)


def _reduced(x: X, start: float, combine: Callable[[Array, Array], Array], windows: Windows) -> Y:
    return jax.lax.reduce_window(
        x,
        np.asarray(start, x.dtype),
        combine,
        (1, *windows.window, 1),
        (1, *windows.strides, 1),
        ((0, 0), *windows.padding, (0, 0)),
    )


def _init(layer: MaxPool | AvgPool, x: PyTree) -> tuple[()]:
    check_x(layer, x, AXES[len(layer.window)])
    if not all(_windows(layer, x.shape[1:-1]).outputs(x.shape[1:-1])):
        raise ValueError(f"{layer}: no window fits into x of shape {x.shape}")
    return ()


def _check_fields(layer: MaxPool | AvgPool) -> None:
    name = type(layer).__name__
    check_window(name, layer.window)
    rank = len(layer.window)
    sizes(f"{name}: strides", layer.strides, rank)
    check_padding(name, layer.padding, rank)
    if isinstance(layer.padding, str):
        return
    for k, (low, high) in zip(layer.window, whole_pairs(layer.padding, rank), strict=True):
        if max(low, high) >= k:
            raise ValueError(
                f"{name}: padding is smaller than the window, or a window would hold nothing of "
                f"x; not {layer.padding} for {layer.window}"
            )
