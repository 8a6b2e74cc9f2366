"""Group normalization."""

from __future__ import annotations

import math
from collections.abc import Callable

import jax.numpy as jnp
from jax import Array

from jaxprop.core.arrays import aligned, as_rounded, wide
from jaxprop.core.checks import check_counts
from jaxprop.core.forms import Sum
from jaxprop.core.layer import Layer
from jaxprop.core.types import PyTree
from jaxprop.layers.normalization import NormParams, X, check_eps, init_norm_params, rstd_of, scaled


class GroupNorm(Layer):
    """Group normalization, y = n * scale + bias, n = (x - mean) * rstd, over groups of channels.

    The C channels are split into ``groups`` groups of neighbours. mean and var are over all
    positions of an example and over the channels of a group, so LayerNorm's derivation holds with
    these numbers in place of a row's features (Wu and He 2018, https://arxiv.org/abs/1803.08494).
    One group is layer normalization of the whole example, and C groups are instance normalization.

    The sums over the positions of an example, b = sum_t ct and a = sum_t ct n, both (N, C), are
    used three times. With P positions and K channels in a group,

        each example's share of dE/dbias is b, of dE/dscale a
        mean(dn) = sum_group(scale b) / (P K),  mean(dn n) = sum_group(scale a) / (P K)
        dE/dx = rstd (ct scale - mean(dn) - n mean(dn n))

    x is (N, ..., C), floating, and y is like x. scale is (C,) and starts as ones, bias is (C,) and
    starts as zeros. The residuals are x and two numbers for each channel of an example.

    Args:
        groups: the number of groups, which divides C.
        eps: the positive number added to the variance; PyTorch has the same default, Flax 1e-6.

    Raises:
        TypeError: for an argument of the wrong type, and for x that is not floating.
        ValueError: for an argument out of range, for x without an example axis, and for channels
            that ``groups`` does not divide.
    """

    groups: int
    eps: float = 1e-5
    mixes_positions = True

    def __post_init__(self) -> None:
        check_counts(self, "groups")
        check_eps(self, self.eps)

    def init(self, key: Array, x: PyTree) -> NormParams:
        params = init_norm_params(self, x)
        if x.shape[-1] % self.groups:
            raise ValueError(
                f"{self} takes x with channels that {self.groups} groups divide, not {x.shape}"
            )
        return params

    def forward(self, params: NormParams, x: X) -> tuple[X, tuple[X, X, X]]:
        same = as_rounded(x)
        mean = self._mean_of_groups(_over_positions(jnp.mean, same))

        def over_group(x: Array) -> Array:
            return self._mean_of_groups(_over_positions(jnp.mean, x))

        rstd = rstd_of(same - mean, over_group, self.eps)
        return scaled(params, (same - mean) * rstd, x), (x, mean, rstd)

    def backward(
        self, params: NormParams, residuals: tuple[X, X, X], ct: X
    ) -> tuple[NormParams, X]:
        x, mean, rstd = residuals
        n, ct, scale = (as_rounded(x) - mean) * rstd, wide(ct), aligned(wide(params.scale), x)
        a, b = _over_positions(jnp.sum, ct * n), _over_positions(jnp.sum, ct)
        positions = math.prod(x.shape[1:-1])
        along_ones = self._mean_of_groups(scale * b) / positions
        along_n = self._mean_of_groups(scale * a) / positions
        mean_n = self._mean_of_groups(_over_positions(jnp.mean, n))  # 0 except for rounding
        d_x = rstd * (ct * scale - along_ones - (n - mean_n) * along_n)
        return NormParams(Sum(a), Sum(b)), d_x.astype(x.dtype)

    def _mean_of_groups(self, each: Array) -> Array:
        """Return the mean over each group's channels, repeated at each of them."""
        groups = each.reshape(*each.shape[:-1], self.groups, each.shape[-1] // self.groups)
        return jnp.broadcast_to(groups.mean(-1, keepdims=True), groups.shape).reshape(each.shape)


def _over_positions(reduce: Callable[..., Array], x: Array) -> Array:
    return reduce(x, tuple(range(1, x.ndim - 1)), keepdims=True)
