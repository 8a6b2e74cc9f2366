"""The walk: forward through the net, the loss, and back again, collecting a visit's results."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
from jax import Array
from jaxtyping import Bool, Float

from jaxprop.core.batch import Batch, Examples
from jaxprop.core.checks import require
from jaxprop.core.functions import of_batch
from jaxprop.core.layer import Layer
from jaxprop.core.loss import Loss, check_cotangent
from jaxprop.core.step import Visit
from jaxprop.core.tree import Mask
from jaxprop.core.types import Cotangent, OfBatch, Params, PyTree, Residuals, Visited


def loss_fn(net: Layer, loss: Loss) -> OfBatch[Float[Array, ""]]:
    """Return ``f(params, x, target)``, the mean over examples of the loss.

    It is pure ``jax.numpy``, so that ``jax.grad(f)`` is backpropagation by autodiff. If params hold
    arrays that are not learned, ``jp.autodiff`` differentiates with respect to the others only.

    Args:
        net: the network.
        loss: the loss.

    Example:
        >>> import jax, jax.numpy as jnp, jaxprop as jp
        >>> net, x = jp.chain(jp.Dense(2), jp.Sigmoid()), jnp.ones((1, 2))
        >>> params = net.init(jax.random.key(0), x)
        >>> jax.grad(jp.loss_fn(net, jp.HalfSquaredError()))(params, x, x)[0].w.shape
        (2, 2)
    """
    check_net_and_loss(net, loss)

    def mean_loss(params: Params, batch: Batch) -> Float[Array, ""]:
        y, _ = net.forward(params, batch.x)
        values, _ = loss.forward(y, batch.target)
        return _examples(loss, values, y, batch).mean(values)

    return of_batch("loss_fn", "Return the mean over examples of the loss.", net, mean_loss)


def walk(net: Layer, loss: Loss, visit: Visit) -> OfBatch[tuple[Array, Visited, Cotangent]]:
    """Return ``f(params, x, target) -> (value, visited, d_x)``, one walk forward and back.

    The walk starts from the cotangent of the mean over examples. Under ``jit`` an unused result is
    not computed, so that d_x of the first layer costs nothing if it is dropped.

    Args:
        net: the network.
        loss: the loss.
        visit: a function of a ``jp.Step``, called at each layer on the way back.

    Returns:
        A function that returns the loss, a tree in the structure of the net's params with
        ``visit(step)`` where each layer's params stand, and the cotangent of x.
    """
    check_net_and_loss(net, loss)
    if not callable(visit):
        raise TypeError(f"visit is a function of a jp.Step, not {visit!r}")

    def walked(params: Params, batch: Batch) -> tuple[Array, Visited, Cotangent]:
        ahead = forward(net, loss, params, batch)
        return ahead.value, *ahead.back(ahead.mean_gradient(), visit)

    return of_batch("walk", "Return the loss, what was visited, and d_x.", net, walked)


class Forward(NamedTuple):
    """The result of a forward pass: the loss, and the way back.

    Attributes:
        y: the net's output, with zeros for the examples of weight 0.
        values: the loss of each example.
        value: their mean.
        examples: the weights of the examples in a mean.
        loss: the loss.
        residuals: what the loss saved.
        back: ``back(ct, visit, places=params) -> (visited, d_x)``, the walk from a cotangent of the
            net's output; it may be called more than once.
    """

    y: PyTree
    values: Float[Array, " n"]
    value: Float[Array, ""]
    examples: Examples
    loss: Loss
    residuals: Residuals
    back: Callable[..., tuple[Visited, Cotangent]]

    def own_gradient(self) -> Cotangent:
        """Return the cotangent of the net's output for each example's own loss."""
        return self.examples.counting(self.loss.backward(self.residuals))

    def mean_gradient(self) -> Cotangent:
        """Return the cotangent of the net's output for the mean over examples."""
        return self.examples.mean_cotangent(self.own_gradient())


def forward(net: Layer, loss: Loss, params: Params, batch: Batch) -> Forward:
    """Run the net and the loss forward, once for any number of ways back."""
    with jax.named_scope("forward"):
        y, residuals = net.forward(params, batch.x)
    with jax.named_scope("loss"):
        values, loss_residuals = loss.forward(y, batch.target)
        examples = _examples(loss, values, y, batch)
        value = examples.mean(values)

    def back(ct: Cotangent, visit: Visit, places: PyTree = params) -> tuple[Visited, Cotangent]:
        check_cotangent(loss, ct, y)
        with jax.named_scope("backward"):
            ct = jax.tree.map(lambda y, ct: None if ct is None else ct.astype(y.dtype), y, ct)
            return net.walk(places, residuals, ct, visit)

    examples = examples._replace(real=_real(params, loss.real(loss_residuals)))
    return Forward(examples.counting(y), values, value, examples, loss, loss_residuals, back)


def _real(params: Params, real: Bool[Array, "n ..."] | None) -> Bool[Array, "n ..."] | None:
    """Return what is not padding, by the target and, if that has no positions, by the mask too."""
    nodes = jax.tree.leaves(params, is_leaf=lambda node: isinstance(node, Mask))
    masks = [node for node in nodes if isinstance(node, Mask) and node.rank == 2]
    if not masks or (real is not None and real.ndim > 1):
        return real
    mask = masks[0].value[(0,) * masks[0].axis]
    return mask if real is None else mask & real[:, None]


def check_net_and_loss(net: Layer, loss: Loss) -> None:
    """Raise ``TypeError`` unless net is a layer and loss is a loss."""
    require(net, Layer, "net")
    require(loss, Loss, "loss")


def _examples(loss: Loss, values: Float[Array, " n"], y: PyTree, batch: Batch) -> Examples:
    number = jax.tree.leaves(y)[0].shape[0]
    if values.shape != (number,):
        raise ValueError(
            f"{loss}: forward gives values of shape {values.shape}, not one for each of the "
            f"{number} examples"
        )
    return batch.examples(number)
