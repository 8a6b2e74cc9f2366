"""Code that both kinds of convolution share: y, d_x, the initial params and the checks."""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from jaxprop.core.affine import AffineParams
from jaxprop.core.arrays import aligned, promoted
from jaxprop.core.checks import check_counts, check_flags
from jaxprop.core.types import PyTree
from jaxprop.layers.padding import Sizes, check_padding
from jaxprop.layers.windows import Windows, check_window, sizes

if TYPE_CHECKING:
    from jaxprop.layers.conv_transpose import ConvTranspose
    from jaxprop.layers.convolution import Conv

    Convolution = Conv | ConvTranspose

X = Float[Array, "n ... c"]
Y = Float[Array, "n ... o"]
FEW = 16  # channels of x: with fewer, a matmul computes d_x faster than XLA's convolution on a CPU


def convolve(params: AffineParams, x: X, windows: Windows, groups: int) -> Y:
    """Return the convolution of x with params.w, plus params.b if there is one."""
    x, w = promoted(x, params.w)
    y = jax.lax.conv_general_dilated(
        x,
        w,
        windows.strides,
        windows.padding,
        lhs_dilation=windows.spread,
        rhs_dilation=windows.dilation,
        dimension_numbers=_dimensions(windows),
        feature_group_count=groups,
    )
    return y if params.b is None else y + aligned(params.b, y)


def pulled_back(w: Array, ct: Y, windows: Windows, groups: int, spatial: Sizes) -> X:
    """Return d_x, pulled back from ct to an x of these spatial sizes."""

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

    w, ct = promoted(w, ct)
    if groups > 1 or max(windows.spread) > 1 or w.shape[-2] >= FEW:
        return convolved(w, ct)
    return jax.lax.platform_dependent(w, ct, cpu=added, default=convolved)


def _dimensions(windows: Windows) -> tuple[str, str, str]:
    axes = "HWD"[: len(windows.window)]
    return f"N{axes}C", f"{axes}IO", f"N{axes}C"


def init_affine(layer: Convolution, key: Array, x: PyTree, windows: Windows) -> AffineParams:
    """Return the initial params: w LeCun normal, b zeros.

    Raises:
        ValueError: for channels that ``groups`` does not divide, and for x smaller than a window.
    """
    if x.shape[-1] % layer.groups:
        raise ValueError(
            f"{layer} takes x whose channels {layer.groups} groups divide, not {x.shape}"
        )
    if not all(windows.outputs(x.shape[1:-1])):
        raise ValueError(f"{layer}: no window fits into x of shape {x.shape}")
    dtype = jax.dtypes.canonicalize_dtype(x.dtype)
    shape = (*layer.window, x.shape[-1] // layer.groups, layer.features)
    w = jax.nn.initializers.lecun_normal()(key, shape, dtype)
    return AffineParams(w, jnp.zeros(layer.features, dtype) if layer.bias else None)


def check_fields(layer: Convolution, words: tuple[str, ...] = ("SAME", "VALID")) -> None:
    """Raise unless the layer's fields are valid, with padding as numbers or one of these words."""
    name = type(layer).__name__
    check_counts(layer, "features", "groups")
    check_flags(layer, "bias")
    check_window(name, layer.window)
    rank = len(layer.window)
    sizes(f"{name}: strides", layer.strides, rank)
    sizes(f"{name}: dilation", layer.dilation, rank)
    check_padding(name, layer.padding, rank, words)
    if layer.features % layer.groups:
        raise ValueError(
            f"{name}: groups divides features, {layer.features}, but is {layer.groups}"
        )


def check_ct(layer: Convolution, x: X, ct: Y, windows: Windows) -> None:
    """Raise ``ValueError`` unless ct has the shape of y, except for the channels."""
    expected = (x.shape[0], *windows.outputs(x.shape[1:-1]))
    if ct.shape[:-1] != expected:
        raise ValueError(f"{layer}: ct has shape {ct.shape}, but x has {x.shape}")
