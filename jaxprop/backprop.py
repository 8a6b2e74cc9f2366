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
from jaxprop.shapes import require

Source = Callable[[Loss, Any, int], Any]


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

    check_net_and_loss(net, loss)

    def scalar(params: Any, x: Any, target: Any) -> Float[Array, ""]:
        y, _ = net.forward(params, x)
        values, _ = loss.forward(y, target)
        return _mean(loss, values, y)

    return scalar


def mean_gradient(loss: Loss, residuals: Any, examples: int) -> Any:
    """The source of the gradient: the cotangent of y for the mean over examples."""
    return loss.backward(residuals) / examples


def own_gradient(loss: Loss, residuals: Any, examples: int) -> Any:
    """The source of per-example quantities: the cotangent of y for each example's own loss."""
    return loss.backward(residuals)


def walk(
    net: Layer, loss: Loss, leave: Leave, source: Source = mean_gradient
) -> Callable[[Any, Any, Any], tuple[Array, Any, Any]]:
    """``f(params, x, target) -> (value, left, d_x)``: one walk forward and back.

    ``left`` has the structure of the net's params, with ``leave(step)`` where each layer's params
    stand. ``source(loss, residuals of the loss, N)`` is the cotangent of y to start from. Under
    ``jit`` a result that nobody uses is not computed; d_x of the first layer costs nothing if
    dropped.
    """

    check_net_and_loss(net, loss)

    def walked(params: Any, x: Any, target: Any) -> tuple[Array, Any, Any]:
        value, examples, loss_residuals, pull = ahead(net, loss, params, x, target)
        left, d_x = pull(source(loss, loss_residuals, examples), leave)
        return value, left, d_x

    return walked


Pull = Callable[..., tuple[Any, Any]]


def ahead(net: Layer, loss: Loss, params: Any, x: Any, target: Any) -> tuple[Array, int, Any, Pull]:
    """The way forward: ``(value, N, residuals of the loss, pull)``.

    ``pull(ct, leave) -> (left, d_x)`` is the way back, which may be gone more than once, and with
    something attached to the params: ``pull(ct, leave, seats)``.
    """
    with jax.named_scope("forward"):
        y, residuals = net.forward(params, x)
    with jax.named_scope("loss"):
        values, loss_residuals = loss.forward(y, target)
        value = _mean(loss, values, y)

    def pull(ct: Any, leave: Leave, seats: Any = params) -> tuple[Any, Any]:
        with jax.named_scope("backward"):
            ct = jax.tree.map(lambda ct, y: ct.astype(y.dtype), ct, y)
            return net.walk(seats, residuals, ct, leave)

    return value, values.shape[0], loss_residuals, pull


def check_net_and_loss(net: Layer, loss: Loss) -> None:
    """Raise ``TypeError`` for what is not a net, or not a loss."""
    require(net, Layer, "net")
    require(loss, Loss, "loss")


def _mean(loss: Loss, values: Float[Array, " n"], y: Any) -> Float[Array, ""]:
    examples = jax.tree.leaves(y)[0].shape[0]
    if values.shape != (examples,):
        raise ValueError(
            f"{loss}: forward gives values of shape {values.shape}, not one for each of the "
            f"{examples} examples"
        )
    if not examples:
        raise ValueError("the batch is empty: the mean over 0 examples does not exist")
    return jnp.mean(values)
