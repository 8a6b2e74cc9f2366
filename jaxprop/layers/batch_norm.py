"""Normalization over the batch: the one layer here that couples its examples."""

from __future__ import annotations

from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
from jax import Array

from jaxprop.factored import Sum, wide
from jaxprop.layer import Layer
from jaxprop.layers.normalization import X, affine, check_eps, moments, scaled
from jaxprop.seats import rounded


class BatchNormParams(NamedTuple):
    """Params of shape (C,), or their cotangents. Those of mean and var are zero."""

    scale: Any
    bias: Any
    mean: Any
    var: Any


class BatchNorm(Layer):
    """y = n * scale + bias, n = (x - mean) / sqrt(var + eps), for each channel.

    In training, mean and var are the batch's, over examples and positions, M numbers a channel.
    LayerNorm's derivation holds with them in the place of a row's features, and since scale is the
    same for all of them, mean(dn) = scale dE/dbias / M and mean(dn n) = scale dE/dscale / M:

        dE/dscale = sum over examples and positions of ct n
        dE/dbias  = sum over examples and positions of ct
        dE/dx     = scale rstd (ct - (dE/dbias + n dE/dscale) / M)

    (Ioffe and Szegedy 2015, https://arxiv.org/abs/1502.03167). An example's y then depends on the
    others, so no per-example quantity exists, and asking for one raises ``ValueError``.

    With ``training=False`` mean and var are the running statistics in params, constants:
    dE/dx = scale rstd ct, and every per-example quantity exists. ``evaluation`` makes the net so.

    The running statistics are params that no gradient moves: their cotangents are zero, and so an
    optimizer that goes by the gradient alone leaves them as they are (one that decays weights, or
    adds noise, is told to leave them out with ``optax.masked``). ``with_statistics`` moves them.
    They hold the batch's variance as it normalizes, with M below (as Flax and Keras do), not
    M - 1 (as PyTorch and the paper do), and start from 0 and 1, in at least float32.

    x is (N, ..., C), floating; scale starts as ones, bias as zeros. Only x is saved: backward
    writes down the statistics as forward did, and under ``jit`` XLA computes them once. Raises
    ``ValueError`` for x without an example axis and ``TypeError`` for x not floating.

    Args:
        momentum: what the running statistics keep of themselves at each step, in [0, 1).
        eps: added to the variance.
        training: whether the batch's statistics are used, or the running ones.
    """

    momentum: float = 0.9
    eps: float = 1e-5
    training: bool = True

    def __post_init__(self) -> None:
        check_eps(self, self.eps)
        if isinstance(self.momentum, bool) or not isinstance(self.momentum, int | float):
            raise TypeError(f"BatchNorm takes momentum as a number, not {self.momentum!r}")
        if not 0 <= self.momentum < 1:
            raise ValueError(f"BatchNorm takes a momentum in [0, 1), not {self.momentum}")
        if not isinstance(self.training, bool):
            raise TypeError(f"BatchNorm: training is True or False, not {self.training!r}")

    @property
    def batch_coupled(self) -> bool:
        return self.training

    def init(self, key: chex.PRNGKey, x: Any) -> BatchNormParams:
        scale, bias = affine(self, x)
        return BatchNormParams(scale, bias, wide(jnp.zeros_like(scale)), wide(jnp.ones_like(scale)))

    def forward(self, params: BatchNormParams, x: X) -> tuple[X, X]:
        return scaled(params, self._standardized(params, x)[0], x), x

    def backward(self, params: BatchNormParams, x: X, ct: X) -> tuple[BatchNormParams, X]:
        n, rstd = self._standardized(params, x)
        slope, wide_ct = wide(params.scale) * rstd, wide(ct)
        if not self.training:
            zero = Sum(jnp.zeros((x.shape[0], x.shape[-1]), n.dtype))
            d_params = BatchNormParams(Sum(wide_ct * n), Sum(ct), zero, zero)
            return d_params, (slope * wide_ct).astype(x.dtype)
        d_scale, d_bias = (jnp.sum(d, _all_but_last(x)) for d in (wide_ct * n, wide_ct))
        d_x = slope * (wide_ct - (d_bias + n * d_scale) / (x.size // x.shape[-1]))
        zero = jnp.zeros_like(params.mean)
        return BatchNormParams(d_scale, d_bias, zero, zero), d_x.astype(x.dtype)

    def rounded(self, params: BatchNormParams, dtype: Any) -> BatchNormParams:
        """The running statistics as they are: rounding the mean would move every y."""
        return rounded(params, dtype)._replace(mean=params.mean, var=params.var)

    def with_statistics(self, params: BatchNormParams, x: X) -> BatchNormParams:
        """params with the running statistics moved towards those of x, where these are finite."""

        def moved(running: Array, batch: Array) -> Array:
            kept = float(self.momentum)
            batch = batch.reshape(running.shape)
            batch = jnp.where(jnp.isfinite(batch), batch, running)
            return (kept * running + (1 - kept) * batch).astype(running.dtype)

        mean, var = moments(x, _all_but_last(x))
        return params._replace(mean=moved(params.mean, mean), var=moved(params.var, var))

    def _standardized(self, params: BatchNormParams, x: X) -> tuple[X, Array]:
        """(n, rstd)"""
        if self.training:
            mean, var = moments(x, _all_but_last(x))
        else:
            mean, var = jax.lax.stop_gradient((params.mean, params.var))
        rstd = jax.lax.rsqrt(var + float(self.eps))
        return (wide(x) - mean) * rstd, rstd


def _all_but_last(x: X) -> tuple[int, ...]:
    return tuple(range(x.ndim - 1))
