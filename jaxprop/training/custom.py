"""A layer as a function of ordinary JAX code."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array

from jaxprop.core.checks import require
from jaxprop.core.cotangents import gradient
from jaxprop.core.layer import Layer
from jaxprop.core.mesh import like
from jaxprop.core.step import Layerwise
from jaxprop.core.tree import is_not_learned
from jaxprop.core.types import Cotangent, Params, PyTree


def custom_vjp(layer: Layer) -> Callable[[Params, PyTree], PyTree]:
    """Return ``f(params, x) -> y`` whose ``jax.grad`` is ``layer.backward``, for any JAX program.

    An integer x gets no cotangent, and an array that is not learned gets zeros.

    Args:
        layer: the layer, or a whole net.

    Example:
        >>> import jax, jax.numpy as jnp, jaxprop as jp
        >>> f = jp.custom_vjp(jp.Sigmoid())
        >>> float(jax.grad(lambda x: f((), x).sum())(jnp.zeros((1, 1)))[0, 0])
        0.25
    """
    require(layer, Layer, "custom_vjp: layer")

    @jax.custom_vjp
    def apply(params: Params, x: PyTree) -> PyTree:
        return layer.forward(params, x)[0]

    def forward(params: Params, x: PyTree) -> tuple[PyTree, PyTree]:
        y, residuals = layer.forward(params, x)
        return y, (params, x, residuals)

    def backward(saved: PyTree, ct: Cotangent) -> tuple[Cotangent, Cotangent]:
        params, x, residuals = saved
        grads, d_x = layer.walk(params, residuals, ct, Layerwise(gradient))
        grads = jax.tree.map(
            lambda node, grad: None if isinstance(grad, tuple) or is_not_learned(node) else grad,
            params,
            grads,
            is_leaf=is_not_learned,
        )
        return grads, None if d_x is None else jax.tree.map(_like, x, d_x)

    apply.defvjp(forward, backward)
    return apply


def _like(x: Array, d_x: Array | None) -> Array | None:
    if d_x is None or not jnp.issubdtype(x.dtype, jnp.inexact):
        return None
    return like(x, d_x)
