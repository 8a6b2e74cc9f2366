"""Batch normalization, the only layer here that couples the examples of a batch."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from jaxprop.core.arrays import aligned, as_rounded, rounded, wide
from jaxprop.core.checks import check_flags, check_share
from jaxprop.core.describe import structs
from jaxprop.core.forms import Sum
from jaxprop.core.layer import Layer
from jaxprop.core.mesh import is_bound, shard_map_axes, split_over
from jaxprop.core.serialization import serializable
from jaxprop.core.tree import Unlearned
from jaxprop.core.types import PyTree
from jaxprop.layers.normalization import X, check_eps, init_norm_params, rstd_of, scaled


@serializable
class BatchNormParams(NamedTuple):
    """The params of a BatchNorm, or their cotangents.

    Attributes:
        scale: (C,), the factor of the standardized x; learned.
        bias: (C,), the shift; learned.
        mean: (C,), the running mean, ``jp.Unlearned``; ``()`` among cotangents.
        var: (C,), the running variance, ``jp.Unlearned``; ``()`` among cotangents.
    """

    scale: Any
    bias: Any
    mean: Any
    var: Any


class BatchNorm(Layer):
    """Batch normalization, y = n * scale + bias with n = (x - mean) / sqrt(var + eps), per channel.

    In training, mean and var are taken over the batch: over the M numbers of a channel, one for
    each example and position. LayerNorm's derivation holds with these M numbers in place of a row's
    features. They all have the same scale, so mean(dn) = scale dE/dbias / M and
    mean(dn n) = scale dE/dscale / M:

        dE/dscale = sum over examples and positions of ct n
        dE/dbias  = sum over examples and positions of ct
        dE/dx     = scale rstd (ct - (dE/dbias + n dE/dscale) / M)

    (Ioffe and Szegedy 2015, https://arxiv.org/abs/1502.03167). An example's y then depends on the
    other examples, so no per-example quantity exists, and asking for one raises ``ValueError``.

    In ``jax.shard_map`` each device has its own part of the batch. With ``axis_name``, the
    statistics of the batch are averages over the D devices: mean = pmean(mean of x), and the same
    for var. Each device's loss then depends on every device's x through these two means, so dE/dx
    takes the sums of all devices. With M examples and positions on each,

        dE/dx = scale rstd (ct - (pmean(dE/dbias) + n pmean(dE/dscale)) / M)

    where E is the sum of the devices' losses. dE/dscale and dE/dbias are each device's own part, as
    in every layer, and the gradient adds them up. Without ``axis_name``, a ``jax.shard_map`` over
    the batch raises ``ValueError``. Under ``jax.jit`` the batch is whole, however it is sharded.

    In inference mode (``training=False``, ``jp.inference_mode``) mean and var are the running
    statistics in params. They are constants, so dE/dx = scale rstd ct, and every per-example
    quantity exists.

    The running statistics are ``jp.Unlearned`` arrays. No gradient, noise or weight decay moves
    them; ``jp.update_batch_stats`` does. The running variance divides by M, as the normalization
    itself, Flax and Keras do, not by M - 1, as PyTorch and the paper do. mean starts as zeros and
    var as ones, in at least float32.

    x is (N, ..., C), floating, and y is like x. scale starts as ones, bias as zeros. Only x is
    saved: backward computes the statistics by the same expressions as forward, so under ``jit`` XLA
    computes them once.

    Args:
        momentum: the share of a running statistic that each update keeps, in [0, 1). Flax's default
            is 0.99; PyTorch's momentum is the other share, 0.1 by default.
        eps: the positive number added to the variance.
        training: whether to normalize by the batch's statistics instead of the running ones.
        axis_name: the axis, or a tuple of axes, of ``jax.shard_map`` or ``jax.vmap`` that split the
            batch. Outside of these axes, as in ``init``, the batch is whole. ``()`` is for separate
            statistics of each device's part.

    Raises:
        TypeError: for an argument of the wrong type, and for x that is not floating.
        ValueError: for an argument out of range, for x without an example axis or channels, and in
            a ``jax.shard_map`` whose axes split the batch and are not named.
    """

    momentum: float = 0.9
    eps: float = 1e-5
    training: bool = True
    axis_name: str | tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        check_eps(self, self.eps)
        check_share("BatchNorm: momentum", self.momentum)
        check_flags(self, "training")
        if self.axis_name is not None and not all(isinstance(axis, str) for axis in self._axes()):
            raise TypeError(f"BatchNorm: axis_name is a name, or several, not {self.axis_name!r}")

    @property
    def batch_coupled(self) -> bool:
        return self.training

    @property
    def mixes_positions(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.training

    def init(self, key: Array, x: PyTree) -> BatchNormParams:
        scale, bias = init_norm_params(self, x)
        mean, var = wide(jnp.zeros_like(scale)), wide(jnp.ones_like(scale))
        return BatchNormParams(scale, bias, Unlearned(mean), Unlearned(var))

    def init_with_output(self, key: Array, x: PyTree) -> tuple[BatchNormParams, PyTree]:
        return self.init(key, x), structs(x)

    def forward(self, params: BatchNormParams, x: X) -> tuple[X, X]:
        return scaled(params, self._standardized(params, x)[0], x), x

    def backward(self, params: BatchNormParams, x: X, ct: X) -> tuple[BatchNormParams, X]:
        n, rstd = self._standardized(params, x)
        slope, wide_ct = aligned(wide(params.scale), x) * rstd, wide(ct)
        if not self.training:
            d_params = BatchNormParams(Sum(wide_ct * n), Sum(ct), (), ())
            return d_params, (slope * wide_ct).astype(x.dtype)
        d_scale, d_bias = (jnp.sum(d, _all_but_last(x)) for d in (wide_ct * n, wide_ct))
        mean_bias, mean_scale = (aligned(self._over_devices(d), x) for d in (d_bias, d_scale))
        off_mean = n - self._mean(n)  # n except for rounding, so that d_x sums to 0
        along = mean_bias + off_mean * mean_scale
        d_x = slope * (wide_ct - along / (x.size // x.shape[-1]))
        return BatchNormParams(d_scale, d_bias, (), ()), d_x.astype(x.dtype)

    def rounded(self, params: BatchNormParams, dtype: DTypeLike) -> BatchNormParams:
        """Return params with scale and bias in dtype; rounding the mean would move every y."""
        return rounded(params, dtype)._replace(mean=params.mean, var=params.var)

    def with_batch_stats(self, params: BatchNormParams, x: X) -> BatchNormParams:
        """Return params with the running statistics moved towards those of x.

        A channel keeps its running statistic where that of x is not finite.

        Args:
            params: the layer's params.
            x: the input of a training step, (N, ..., C).
        """

        def moved(running: Array, batch: Array) -> Array:
            kept = float(self.momentum)
            batch, old = batch.reshape(running.shape), running.astype(batch.dtype)
            batch = jnp.where(jnp.isfinite(batch), batch, old)
            return (kept * old + (1 - kept) * batch).astype(running.dtype)

        same = as_rounded(x)
        mean = self._mean(same)
        var = self._mean((same - mean) ** 2)
        return params._replace(
            mean=jax.tree.map(lambda running: moved(running, mean), params.mean),
            var=jax.tree.map(lambda running: moved(running, var), params.var),
        )

    def _standardized(self, params: BatchNormParams, x: X) -> tuple[X, Array]:
        """Return ``(n, rstd)``."""
        if not self.training:
            x = wide(x)
            mean, var = (running.astype(x.dtype) for running in (params.mean, params.var))
            rstd = aligned(jax.lax.rsqrt(var + float(self.eps)), x)
            return (x - aligned(mean, x)) * rstd, rstd
        self._check_axes(x)
        same = as_rounded(x)
        centered = same - self._mean(same)
        rstd = rstd_of(centered, self._mean, self.eps)
        return centered * rstd, rstd

    def _mean(self, x: X) -> X:
        """Return the mean over examples and positions, including those of other devices."""
        return self._over_devices(x.mean(_all_but_last(x), keepdims=True))

    def _over_devices(self, mean: Array) -> Array:
        axes = tuple(filter(is_bound, self._axes()))
        return jax.lax.pmean(mean, axes) if axes else mean

    def _axes(self) -> tuple[str, ...]:
        name = self.axis_name
        return () if name is None else name if isinstance(name, tuple) else (name,)

    def _check_axes(self, x: X) -> None:
        """Raise ``ValueError`` unless ``axis_name`` fits the axes that split the batch."""
        if self.axis_name is None and split_over(x):
            raise ValueError(
                f"{self}: in jax.shard_map over {split_over(x)} a device sees its own part of the "
                f"batch; for statistics of the whole write axis_name={split_over(x)}, and for "
                "those of each part axis_name=()"
            )
        for axis in self._axes():
            if shard_map_axes() and not is_bound(axis):
                raise ValueError(
                    f"{self}: jax.shard_map has the axes {shard_map_axes()}, and no {axis!r}"
                )


def _all_but_last(x: X) -> tuple[int, ...]:
    return tuple(range(x.ndim - 1))
