"""Normalization of each row of features, and the functions that all normalizations share.

Each layer standardizes, n = (x - mean) * rstd with rstd = 1 / sqrt(var + eps), and then scales and
shifts, y = n * scale + bias. Statistics are computed in at least float32. The variance comes from
x - mean, since E x^2 - mean^2 would cancel. y and d_x have the dtype of x.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from jaxprop.core.arrays import aligned, as_rounded, wide
from jaxprop.core.checks import check_number, check_x, is_whole
from jaxprop.core.forms import Sum
from jaxprop.core.layer import Layer
from jaxprop.core.serialization import serializable
from jaxprop.core.types import Params, PyTree

X = Float[Array, "n ... c"]
PerRow = Float[Array, "n ... 1"]


@serializable
class NormParams(NamedTuple):
    """The params of a normalization, or their cotangents.

    Attributes:
        scale: (C,), the factor of the standardized x.
        bias: (C,), the shift; None in a layer without one.
    """

    scale: Any
    bias: Any = None


class LayerNorm(Layer):
    """Layer normalization, y = n * scale + bias with n = (x - mean) * rstd, over the last axis.

    Let dn = ct * scale be the cotangent of n, and D the number of features. n depends on x_i in
    three ways: directly, through mean, and through rstd. From n_j = (x_j - mean) * rstd,

        d mean / d x_i = 1 / D
        d var  / d x_i = 2 (x_i - mean) / D          (through mean it is 0: sum_j (x_j - mean) = 0)
        d rstd / d x_i = -1/2 rstd^3 d var / d x_i = -rstd^2 n_i / D
        d n_j  / d x_i = ([i = j] - 1/D) rstd + (x_j - mean) (-rstd^2 n_i / D)
                       = rstd ([i = j] - 1/D - n_j n_i / D)

    and the sum of dn_j d n_j / d x_i over j is

        dE/dx_i     = rstd (dn_i - mean_j(dn_j) - n_i mean_j(dn_j n_j))
        dE/dscale_i = sum over examples and positions of ct_i n_i
        dE/dbias_i  = sum over examples and positions of ct_i

    For eps = 0 this removes dn's components along (1, ..., 1) and along n, because shifting or
    stretching x does not change y (Ba, Kiros and Hinton 2016, https://arxiv.org/abs/1607.06450).
    With rounding, the mean of n is not exactly 0, and the further the x_i are from 0 the larger it
    is. It is subtracted from n_i, so that dE/dx sums to 0, as must the gradient of a bias before
    this layer.

    x is (N, ..., D), floating, and y is like x. scale is (D,) and starts as ones, bias is (D,) and
    starts as zeros. The residuals are x, which costs nothing if another layer keeps it too, and two
    numbers per row. n would be a worse residual: for x in bfloat16, it is twice as large in
    float32, and rounded in bfloat16.

    Args:
        eps: the positive number added to the variance; PyTorch has the same default, Flax 1e-6.

    Raises:
        TypeError: for an eps that is not a number, and for x that is not floating.
        ValueError: for an eps that is not positive, and for x without an example axis or features.
    """

    eps: float = 1e-5

    def __post_init__(self) -> None:
        check_eps(self, self.eps)

    def init(self, key: Array, x: PyTree) -> NormParams:
        return init_norm_params(self, x)

    def forward(self, params: NormParams, x: X) -> tuple[X, tuple[X, PerRow, PerRow]]:
        same = as_rounded(x)
        mean = _mean_along(same)
        rstd = rstd_of(same - mean, _mean_along, self.eps)
        return scaled(params, (same - mean) * rstd, x), (x, mean, rstd)

    def backward(
        self, params: NormParams, residuals: tuple[X, PerRow, PerRow], ct: X
    ) -> tuple[NormParams, X]:
        x, mean, rstd = residuals
        n, wide_ct, scale = (as_rounded(x) - mean) * rstd, wide(ct), wide(params.scale)
        mean_dn, mean_dn_n = _mean_along(wide_ct, scale), _mean_along(wide_ct * n, scale)
        off_mean = n - _mean_along(n)
        d_x = rstd * (wide_ct * aligned(scale, n) - mean_dn - off_mean * mean_dn_n)
        return NormParams(Sum(wide_ct * n), Sum(ct)), d_x.astype(x.dtype)


class RMSNorm(Layer):
    """Root mean square normalization, y = n * scale with n = x * rstd, over the last axis.

    This is LayerNorm without the mean, with rstd = 1 / sqrt(mean(x^2) + eps). From
    d rstd / d x_i = -rstd^2 n_i / D follows d n_j / d x_i = rstd ([i = j] - n_j n_i / D), and with
    dn = ct * scale

        dE/dx_i     = rstd (dn_i - n_i mean_j(dn_j n_j))
        dE/dscale_i = sum over examples and positions of ct_i n_i

    (Zhang and Sennrich 2019, https://arxiv.org/abs/1910.07467).

    x is (N, ..., D), floating, and y is like x. scale is (D,) and starts as ones; there is no bias.
    The residuals are x and one number per row.

    Args:
        eps: the positive number added to the mean square; Flax has the same default, PyTorch the
            dtype's machine epsilon.

    Raises:
        TypeError: for an eps that is not a number, and for x that is not floating.
        ValueError: for an eps that is not positive, and for x without an example axis or features.
    """

    eps: float = 1e-6

    def __post_init__(self) -> None:
        check_eps(self, self.eps)

    def init(self, key: Array, x: PyTree) -> NormParams:
        return NormParams(init_norm_params(self, x).scale)

    def forward(self, params: NormParams, x: X) -> tuple[X, tuple[X, PerRow]]:
        same = as_rounded(x)
        rstd = rstd_of(same, _mean_along, self.eps)
        return scaled(params, same * rstd, x), (x, rstd)

    def backward(
        self, params: NormParams, residuals: tuple[X, PerRow], ct: X
    ) -> tuple[NormParams, X]:
        x, rstd = residuals
        n, wide_ct, scale = as_rounded(x) * rstd, wide(ct), wide(params.scale)
        d_x = rstd * (wide_ct * aligned(scale, n) - n * _mean_along(wide_ct * n, scale))
        return NormParams(Sum(wide_ct * n)), d_x.astype(x.dtype)


def _mean_along(x: Array, v: Array | None = None) -> Array:
    """Return mean_j(x_j v_j) over the last axis, kept with length 1; v is ones by default.

    On a CPU it is a matrix-vector product. For a sum over the last axis XLA would write all its
    terms to memory there, as many as x has entries, and a layer with many rows would take more than
    twice as long.
    """

    def product(x: Array, v: Array) -> Array:
        return x @ v[:, None]

    def reduction(x: Array, v: Array) -> Array:
        return jnp.sum(x * aligned(v, x), -1, keepdims=True)

    v = jnp.ones(x.shape[-1], x.dtype) if v is None else v
    return jax.lax.platform_dependent(x, v, cpu=product, default=reduction) / x.shape[-1]


def rstd_of(x: Array, mean: Callable[[Array], Array], eps: float) -> Array:
    """Return 1 / sqrt(mean(x^2) + eps), also where x^2 would overflow.

    Args:
        x: an array in at least float32.
        mean: a function that takes the mean of an array like x.
        eps: the number added to the mean square.
    """
    small = 2.0 ** -(jnp.finfo(x.dtype).maxexp * 5 // 8)
    var, of_large = mean(x**2), mean((x * small) ** 2)
    large = jnp.isinf(var)
    rstd = jax.lax.rsqrt(jnp.where(large, of_large, var + float(eps)))
    return jnp.where(large, rstd * small, rstd)


def scaled(params: Params, n: Array, x: Array) -> Array:
    """Return n * scale + bias in the dtype of x."""
    y = n * aligned(wide(params.scale), n)
    return (y if params.bias is None else y + aligned(wide(params.bias), y)).astype(x.dtype)


def init_norm_params(layer: Layer, x: PyTree) -> NormParams:
    """Return ones and zeros for the channels of x; raise for an x that the layer does not take."""
    check_x(layer, x, "N, ..., C")
    dtype = jax.dtypes.canonicalize_dtype(x.dtype)
    return NormParams(jnp.ones(x.shape[-1], dtype), jnp.zeros(x.shape[-1], dtype))


def check_eps(layer: Layer, eps: object) -> None:
    """Raise unless eps is positive, and not the number of features that other libraries take."""
    name = f"{type(layer).__name__}: eps"
    if is_whole(eps) and eps != 0:
        raise TypeError(f"{name} is a float, not {eps}; the number of features is that of x")
    check_number(name, eps, positive=True)
