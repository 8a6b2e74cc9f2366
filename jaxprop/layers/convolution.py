"""Convolution over positions, and transposed convolution."""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from jaxprop.core.arrays import aligned
from jaxprop.core.checks import check_counts, check_flags, check_x
from jaxprop.core.forms import Sum
from jaxprop.core.layer import Layer
from jaxprop.core.types import PyTree
from jaxprop.layers.dense import AffineParams
from jaxprop.layers.patches import Patches
from jaxprop.layers.windows import AXES, Padding, Sizes, Windows, check_padding, check_window, sizes

X = Float[Array, "n ... c"]
Y = Float[Array, "n ... o"]
FEW = 16  # channels of x: with fewer, a matmul gives d_x faster than XLA's convolution on a CPU


class Conv(Layer):
    """y[t] = sum_k x[t s + k d] w[k] + b, over the taps k of the window; a cross-correlation.

    s is the stride and d the dilation; t, k, s and d have an entry for each spatial axis. At each
    tap the layer is dense: y[n, t] takes x[n, t s + k d] times the matrix w[k]. Dense layers that
    share their output add up, so

        dE/dw[k]    = sum_n sum_t x[n, t s + k d] (outer) ct[n, t]        ``Patches``
        dE/db       = sum_n sum_t ct[n, t]
        dE/dx[n, h] = sum of ct[n, t] w[k]^T over all t and k with t s + k d = h.

    The last is again a convolution: of ct, with input dilation s, by the flipped window with w's
    two channel axes swapped (Dumoulin and Visin 2016, https://arxiv.org/abs/1603.07285). For x of
    few channels a CPU is faster with the sum as written: one matmul for all taps, and each tap's
    part added where the tap read x.

    x is (N, *spatial, C), floating, with one to three spatial axes, as many as ``window`` has. y is
    (N, *outputs, features). w is (*window, C / groups, features) and starts as LeCun normal, b is
    (features,) and starts as zeros.

    Args:
        features: the number of channels of y.
        window: the size of the window along each spatial axis.
        strides: s, one number for all axes or a tuple; None for 1.
        padding: "SAME", "VALID", or how many zeros are added at each axis, as (low, high) pairs.
        dilation: d, one number for all axes or a tuple; None for 1.
        groups: the number of convolutions side by side that split the channels of x and of y.
        bias: whether to add b.

    Raises:
        TypeError: for an argument of the wrong type, and for x that is not floating.
        ValueError: for an argument out of range, for x of another rank or smaller than the window,
            and for channels or features that ``groups`` does not divide.
    """

    features: int
    window: Sizes = (3, 3)
    strides: int | Sizes | None = None
    padding: Padding = "SAME"
    dilation: int | Sizes | None = None
    groups: int = 1
    bias: bool = True
    mixes_positions = True

    def __post_init__(self) -> None:
        _check_fields(self)
        sizes("Conv: dilation", self.dilation, len(self.window))
        check_counts(self, "groups")
        if self.features % self.groups:
            raise ValueError(
                f"Conv: groups divides features, {self.features}, but is {self.groups}"
            )

    def init(self, key: Array, x: PyTree) -> AffineParams:
        check_x(self, x, AXES[len(self.window)])
        if x.shape[-1] % self.groups:
            raise ValueError(
                f"{self} takes x whose channels {self.groups} groups divide, not {x.shape}"
            )
        return _init(self, key, x, x.shape[-1] // self.groups, self._windows(x))

    def forward(self, params: AffineParams, x: X) -> tuple[Y, X]:
        return _affine(params, x, self._windows(x), self.groups), x

    def backward(self, params: AffineParams, x: X, ct: Y) -> tuple[AffineParams, X]:
        windows = self._windows(x)
        _check_ct(self, x, ct, windows)
        d_b = None if params.b is None else Sum(ct)
        d_x = _d_x(params.w, ct, windows, self.groups, x.shape[1:-1]).astype(x.dtype)
        return AffineParams(Patches(x, ct, windows, self.groups), d_b), d_x

    def _windows(self, x: PyTree) -> Windows:
        rank = len(self.window)
        strides = sizes("Conv: strides", self.strides, rank)
        dilation = sizes("Conv: dilation", self.dilation, rank)
        return Windows.over(x.shape[1:-1], self.window, strides, self.padding, dilation)


class ConvTranspose(Layer):
    """y[t] = sum_k x'[t + k - low] w[k] + b, where x' is x with input dilation s: x'[h s] = x[h].

    The other entries of x' are 0, and low is the padding before them. This is ``Conv`` of x' with
    strides 1, and has its derivatives. d_x is needed at multiples of s only, where it is an
    ordinary convolution of ct with strides s. y is that of
    ``jax.lax.conv_transpose`` with ``transpose_kernel=False``: the window is not flipped, and w's
    channel axes are not swapped.

    x is (N, *spatial, C), floating, and y is (N, *outputs, features). w is (*window, C, features)
    and starts as LeCun normal, b is (features,) and starts as zeros.

    Args:
        features: the number of channels of y.
        window: the size of the window along each spatial axis.
        strides: s, one number for all axes or a tuple; None for 1.
        padding: "SAME" for outputs of size spatial * strides, "VALID" for
            spatial * strides + max(window - strides, 0), or how many zeros are added to x' at each
            axis, as (low, high) pairs.
        bias: whether to add b.

    Raises:
        TypeError: for an argument of the wrong type, and for x that is not floating.
        ValueError: for an argument out of range, and for x of another rank or smaller than the
            window.
    """

    features: int
    window: Sizes = (3, 3)
    strides: int | Sizes | None = None
    padding: Padding = "SAME"
    bias: bool = True
    mixes_positions = True

    def __post_init__(self) -> None:
        _check_fields(self)

    def init(self, key: Array, x: PyTree) -> AffineParams:
        check_x(self, x, AXES[len(self.window)])
        return _init(self, key, x, x.shape[-1], self._windows())

    def forward(self, params: AffineParams, x: X) -> tuple[Y, X]:
        return _affine(params, x, self._windows(), 1), x

    def backward(self, params: AffineParams, x: X, ct: Y) -> tuple[AffineParams, X]:
        windows = self._windows()
        _check_ct(self, x, ct, windows)
        d_b = None if params.b is None else Sum(ct)
        d_x = _d_x(params.w, ct, windows, 1, x.shape[1:-1]).astype(x.dtype)
        return AffineParams(Patches(x, ct, windows), d_b), d_x

    def _windows(self) -> Windows:
        ones = (1,) * len(self.window)
        strides = sizes("ConvTranspose: strides", self.strides, len(self.window))
        if isinstance(self.padding, str):
            pairs = zip(self.window, strides, strict=True)
            padding = tuple(_transposed(self.padding, k, s) for k, s in pairs)
        else:
            padding = self.padding
        return Windows(self.window, ones, padding, ones, strides)


def _transposed(padding: Literal["SAME", "VALID"], k: int, s: int) -> tuple[int, int]:
    if padding == "VALID":
        return k - 1, max(k, s) - 1
    total = k + s - 2
    low = k - 1 if s > k - 1 else -(-total // 2)
    return low, total - low


def _affine(params: AffineParams, x: X, windows: Windows, groups: int) -> Y:
    y = jax.lax.conv_general_dilated(
        x,
        params.w,
        windows.strides,
        windows.padding,
        lhs_dilation=windows.spread,
        rhs_dilation=windows.dilation,
        dimension_numbers=_dimensions(windows),
        feature_group_count=groups,
    )
    return y if params.b is None else y + aligned(params.b, y)


def _d_x(w: Array, ct: Y, windows: Windows, groups: int, spatial: Sizes) -> X:
    def convolved(w: Array, ct: Y) -> X:
        padding = []
        for h, t, k, s, (low, _), d, e in zip(spatial, ct.shape[1:-1], *windows, strict=True):
            before = (k - 1) * d - low
            padding.append((before, (h - 1) * e + low - (t - 1) * s))
        n, io, out = _dimensions(windows)
        if groups > 1:
            channels, features = w.shape[-2], w.shape[-1] // groups
            w = w.reshape(*windows.window, channels, groups, features).swapaxes(-1, -3)
            w = w.reshape(*windows.window, features, groups * channels)
        else:
            io = io.replace("IO", "OI")
        return jax.lax.conv_general_dilated(
            ct,
            jnp.flip(w, range(len(spatial))),
            windows.spread,
            padding,
            lhs_dilation=windows.strides,
            rhs_dilation=windows.dilation,
            dimension_numbers=(n, io, out),
            feature_group_count=groups,
        )

    def added(w: Array, ct: Y) -> X:
        parts = ct @ w.reshape(-1, w.shape[-1]).T
        return windows.put_back(jnp.split(parts, windows.taps, axis=-1), spatial)

    if groups > 1 or max(windows.spread) > 1 or w.shape[-2] >= FEW:
        return convolved(w, ct)
    return jax.lax.platform_dependent(w, ct, cpu=added, default=convolved)


def _dimensions(windows: Windows) -> tuple[str, str, str]:
    axes = "HWD"[: len(windows.window)]
    return f"N{axes}C", f"{axes}IO", f"N{axes}C"


def _init(
    layer: Conv | ConvTranspose, key: Array, x: PyTree, channels: int, windows: Windows
) -> AffineParams:
    if not all(windows.outputs(x.shape[1:-1])):
        raise ValueError(f"{layer}: no window fits into x of shape {x.shape}")
    dtype = jax.dtypes.canonicalize_dtype(x.dtype)
    shape = (*layer.window, channels, layer.features)
    w = jax.nn.initializers.lecun_normal()(key, shape, dtype)
    return AffineParams(w, jnp.zeros(layer.features, dtype) if layer.bias else None)


def _check_fields(layer: Conv | ConvTranspose) -> None:
    name = type(layer).__name__
    check_counts(layer, "features")
    check_flags(layer, "bias")
    check_window(name, layer.window)
    sizes(f"{name}: strides", layer.strides, len(layer.window))
    check_padding(name, layer.padding, len(layer.window))


def _check_ct(layer: Layer, x: X, ct: Y, windows: Windows) -> None:
    expected = (x.shape[0], *windows.outputs(x.shape[1:-1]))
    if ct.shape[:-1] != expected:
        raise ValueError(f"{layer}: ct has shape {ct.shape}, but x has {x.shape}")
