"""Bridges from a layer to other ways of writing JAX."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

from jaxprop.factored import gradient, like
from jaxprop.layer import Layer


def custom_vjp(layer: Layer) -> Callable[[Any, Any], Any]:
    """``f(params, x) -> y`` whose ``jax.grad`` is ``layer.backward``, for use in any JAX program.

    An integer x has no cotangent, and gets none. As with ``jax.custom_vjp``, forward mode
    (``jax.jvp``, and so ``jax.hessian``) is not defined.

    Example:
        >>> import jax, jax.numpy as jnp, jaxprop as jp
        >>> f = jp.custom_vjp(jp.Sigmoid())
        >>> float(jax.grad(lambda x: f((), x).sum())(jnp.zeros((1, 1)))[0, 0])
        0.25
    """

    @jax.custom_vjp
    def apply(params: Any, x: Any) -> Any:
        return layer.forward(params, x)[0]

    def forward(params: Any, x: Any) -> tuple[Any, Any]:
        y, residuals = layer.forward(params, x)
        return y, (params, x, residuals)

    def backward(saved: tuple[Any, Any, Any], ct: Any) -> tuple[Any, Any]:
        params, x, residuals = saved
        grads, d_x = layer.walk(
            params, residuals, ct, lambda step: gradient(step.params, step.d_params)
        )
        # A key or a mask in a layer's seat has no cotangent.
        grads = jax.tree.map(
            lambda _, grad: None if isinstance(grad, tuple) else grad, params, grads
        )
        return grads, None if d_x is None else like(x, d_x)

    apply.defvjp(forward, backward)
    return apply
