"""Computing in a narrower dtype than that of the params."""

from __future__ import annotations

from typing import Any

import chex
import jax
import jax.numpy as jnp

from jaxprop.combinators.wrapper import Wrapper
from jaxprop.factored import wide
from jaxprop.layer import Layer, map_layers
from jaxprop.seats import rounded
from jaxprop.shapes import empty_like, require, structs


class Cast(Wrapper):
    """y = f(x) with params and x rounded to ``dtype``, in which f computes.

    The cotangents of params are left factored in ``dtype`` and summed in at least float32, which
    is what autodiff of the same forward would round to ``dtype`` first. y is of ``dtype``.
    """

    dtype: str

    def init(self, key: chex.PRNGKey, x: Any) -> Any:
        """Params of at least float32, whatever the layer before rounded x to."""
        return self.layer.init(key, jax.eval_shape(lambda x: jax.tree.map(wide, x), structs(x)))

    def forward(self, params: Any, x: Any) -> tuple[Any, Any]:
        y, residuals = self.layer.forward(
            self.layer.rounded(params, self.dtype), rounded(x, self.dtype)
        )
        return y, (residuals, jax.tree.map(empty_like, x))

    def backward(self, params: Any, residuals: Any, ct: Any) -> tuple[Any, Any]:
        residuals, like = residuals
        params, ct = self.layer.rounded(params, self.dtype), rounded(ct, self.dtype)
        d_params, d_x = self.layer.backward(params, residuals, ct)
        if d_x is None:
            return d_params, None
        return d_params, jax.tree.map(lambda like, d: d.astype(like.dtype), like, d_x)

    def inside(self, residuals: Any) -> tuple[Layer, Any]:
        return self.layer, residuals[0]


def cast(net: Layer, dtype: Any) -> Layer:
    """The same net computing in ``dtype``, with params and gradients in their own.

    Every layer that is not made of layers rounds its params and its x: with float32 params and
    ``jnp.bfloat16`` this is mixed precision. Statistics (a BatchNorm's running ones are not
    rounded), softmax and the loss are in at least float32 as always, and cotangents of params
    accumulate in it. In float16 small cotangents
    are lost: ``jp.value_and_grad(..., loss_scale=2.0**12)`` keeps them. A ``repeat`` that comes
    first takes an x that is of ``dtype`` already.

    Raises ``TypeError`` for a dtype that is not floating.
    """
    require(net, Layer, "cast")
    name = jnp.dtype(dtype).name
    if not jnp.issubdtype(name, jnp.floating):
        raise TypeError(f"cast takes a floating dtype, not {name}")
    return map_layers(net, lambda layer: Cast(layer, name))
