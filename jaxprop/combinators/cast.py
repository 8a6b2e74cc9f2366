"""Computing in a narrower dtype than that of the params."""

from __future__ import annotations

from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax import Array

from jaxprop.core.arrays import empty_like, rounded, wide
from jaxprop.core.checks import given, require
from jaxprop.core.combinator import Wrapper, map_layers
from jaxprop.core.describe import structs
from jaxprop.core.layer import Layer
from jaxprop.core.types import Cotangent, Params, PyTree, Residuals


class Cast(Wrapper):
    """y = f(x), computed in ``dtype`` from params and x that are rounded to it.

    The cotangents of params are kept factored in ``dtype`` and summed in at least float32; autodiff
    of the same forward would round them to ``dtype`` first. y is of ``dtype``.

    Attributes:
        layer: f.
        dtype: the name of a floating dtype.
    """

    dtype: str
    transparent: ClassVar[bool] = True

    @property
    def by_module(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.layer.by_module

    def init(self, key: Array, x: PyTree) -> Params:
        """Return params of at least float32, whatever dtype the layer before rounded x to."""
        return self.layer.init(key, jax.eval_shape(lambda x: jax.tree.map(wide, x), structs(x)))

    def __repr__(self) -> str:
        return f"cast({self.layer!r}, {self.dtype!r})"

    def forward(self, params: Params, x: PyTree) -> tuple[PyTree, Residuals]:
        y, residuals = self.layer.forward(
            self.layer.rounded(params, self.dtype), rounded(x, self.dtype)
        )
        return y, (residuals, jax.tree.map(empty_like, x))

    def backward(
        self, params: Params, residuals: Residuals, ct: Cotangent
    ) -> tuple[Cotangent, Cotangent]:
        residuals, like = residuals
        params, ct = self.layer.rounded(params, self.dtype), rounded(ct, self.dtype)
        d_params, d_x = self.layer.backward(params, residuals, ct)
        if d_x is None:
            return d_params, None
        return d_params, jax.tree.map(
            lambda like, d: None if d is None else d.astype(like.dtype), like, d_x
        )

    def inside(self, residuals: Residuals) -> tuple[Layer, Residuals]:
        return self.layer, residuals[0]


def cast(net: Layer, dtype: Any) -> Layer:
    """Return the net computing in ``dtype``, with params and gradients in their own dtypes.

    Every layer that is not made of layers rounds its params and its x. With float32 params and
    ``jnp.bfloat16`` this is mixed precision. Statistics, softmax and the loss are in at least
    float32 as always (a BatchNorm's running statistics are not rounded), and cotangents of params
    accumulate in it. In float16 small cotangents are lost: ``jp.value_and_grad(...,
    loss_scale=2.0**12)`` keeps them. If a ``repeat`` comes first, x must already have ``dtype``.

    Args:
        net: the network.
        dtype: a floating dtype; others raise ``TypeError``.
    """
    require(net, Layer, "cast: net")
    name = _floating(dtype)
    return map_layers(net, lambda layer: Cast(layer, name))


def _floating(dtype: Any) -> str:
    """Return the name of a floating dtype; refuse None, which NumPy reads as float64."""
    try:
        name = "None" if dtype is None else jnp.dtype(dtype).name
    except TypeError:
        name = given(dtype)
    else:
        if dtype is not None and jnp.issubdtype(name, jnp.floating):
            return name
    raise TypeError(f"cast takes a floating dtype, not {name}; write jnp.bfloat16, say")
