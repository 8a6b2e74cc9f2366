"""The walk: forward through the net, the loss, and back again, leaving behind what is asked for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from jaxprop.layer import Layer, Leave
from jaxprop.losses import Loss


def loss_fn(net: Layer, loss: Loss) -> Callable[[Any, Any, Any], Float[Array, ""]]:
    """``f(params, x, target)``: the mean over examples of the loss, a scalar.

    Pure ``jax.numpy``, so that ``jax.grad(f)`` is backpropagation by autodiff.

    Example:
        >>> import jax, jax.numpy as jnp, jaxprop as jp
        >>> net, x = jp.chain(jp.Dense(2), jp.Sigmoid()), jnp.ones((1, 2))
        >>> params = net.init(jax.random.key(0), x)
        >>> jax.grad(jp.loss_fn(net, jp.HalfSquaredError()))(params, x, x)[0].w.shape
        (2, 2)
    """

    def scalar(params: Any, x: Any, target: Any) -> Float[Array, ""]:
        y, _ = net.forward(params, x)
        values, _ = loss.forward(y, target)
        return _mean(values)

    return scalar


def walk(net: Layer, loss: Loss, leave: Leave) -> Callable[[Any, Any, Any], tuple[Array, Any, Any]]:
    """``f(params, x, target) -> (value, left, d_x)``: one walk forward and back.

    ``left`` has the structure of the net's params, with ``leave(step)`` where each layer's params
    stand. The walk starts from the gradient of the mean over examples. Under ``jit`` a result that
    nobody uses is not computed; d_x of the first layer costs nothing if dropped.
    """

    def walked(params: Any, x: Any, target: Any) -> tuple[Array, Any, Any]:
        with jax.named_scope("forward"):
            y, residuals = net.forward(params, x)
        with jax.named_scope("loss"):
            values, loss_residuals = loss.forward(y, target)
            ct = loss.backward(loss_residuals) / values.shape[0]
        with jax.named_scope("backward"):
            left, d_x = net.walk(params, residuals, ct, leave)
        return _mean(values), left, d_x

    return walked


def _mean(values: Float[Array, " n"]) -> Float[Array, ""]:
    if not values.size:
        raise ValueError("the batch is empty: the mean over 0 examples does not exist")
    return jnp.mean(values)
