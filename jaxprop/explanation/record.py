"""A walk of which all terms are recorded."""

from __future__ import annotations

import functools
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax import Array

from jaxprop.core.combinator import Wrapper, map_layers, seen_through
from jaxprop.core.cotangents import factored, gradient
from jaxprop.core.layer import Layer
from jaxprop.core.loss import Loss
from jaxprop.core.step import Step
from jaxprop.core.tree import Unlearned, is_not_learned
from jaxprop.core.walk import check_net_and_loss, forward
from jaxprop.explanation.summary import dead, numbers, saturated, summary
from jaxprop.explanation.terms import Explanation, Kept, Summaries, Terms
from jaxprop.layers import Elementwise

KEEP = 10_000


def explain(
    net: Layer, loss: Loss, params: Any, x: Any, target: Any, *, keep: int = KEEP
) -> Explanation:
    """Every layer's part in the chain rule, as a value that prints, for any net.

    For each layer: its input x and output y, the cotangent ct of y, the local derivative where the
    layer is elementwise, the cotangent d_x of x, and each param's terms. The cotangents are those
    of each example's *own* loss; ``grad`` of a param is their mean over the examples. A walk with
    more than ``keep`` numbers in it leaves a summary of each array in their place: mean, rms,
    largest, zeros, saturated, not finite. It is compiled, and works under ``jit``.

    Example:
        >>> import jax, jax.numpy as jnp, jaxprop as jp
        >>> net, x = jp.chain(jp.Dense(2), jp.Sigmoid()), jnp.array([[0.5, 1.0]])
        >>> params = net.init(jax.random.key(0), x)
        >>> terms = jp.explain(net, jp.HalfSquaredError(), params, x, jnp.zeros((1, 2)))
        >>> factors, product = terms["0.w"][1, 0]
        >>> bool(factors["x"] * factors["ct"] == product), terms.layers["1"].slope.shape
        (True, (1, 2))
    """
    check_net_and_loss(net, loss)
    return _explained(net, loss, keep, params, x, target)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _explained(net: Layer, loss: Loss, keep: int, params: Any, x: Any, target: Any) -> Explanation:
    def walked(kept: bool) -> Explanation:
        ahead = forward(map_layers(net, Recorded), RecordedLoss(loss), params, x, target)
        y, values, _ = ahead.residuals
        ct, ones = ahead.own_gradient(), jnp.ones_like(values)
        collected, _ = ahead.back(ct, lambda step: _read(step, ahead.examples, kept))
        at_loss = _summaries(y, values, ones, ct)
        whole = Kept(y, values, ones, None, ct, (), (), ()) if kept else None
        return Explanation(net, ahead.value, collected, Terms(loss, at_loss, whole))

    return walked(keep > 0 and numbers(jax.eval_shape(lambda: walked(True))) <= keep)


class Recorded(Wrapper):
    """The layer it holds, with x and y kept among the residuals."""

    transparent: ClassVar[bool] = True

    def forward(self, params: Any, x: Any) -> tuple[Any, Any]:
        y, residuals = self.layer.forward(params, x)
        return y, (x, y, residuals)

    def backward(self, params: Any, residuals: Any, ct: Any) -> tuple[Any, Any]:
        return self.layer.backward(params, residuals[2], ct)


class RecordedLoss(Loss):
    """The loss it holds, with y and the values kept among the residuals."""

    loss: Loss

    def forward(self, y: Any, target: Any) -> tuple[Any, Any]:
        values, residuals = self.loss.forward(y, target)
        return values, (y, values, residuals)

    def backward(self, residuals: Any) -> Any:
        return self.loss.backward(residuals[2])


def _read(step: Step, examples: int, kept: bool) -> Terms:
    x = y = slope = forms = None
    layer = seen_through(step.layer)
    if isinstance(step.layer, Recorded):
        x, y, residuals = step.residuals
        step = step._replace(layer=step.layer.layer, residuals=residuals)
        if isinstance(layer, Elementwise):
            _, slope = step.layer.backward(step.params, residuals, jnp.ones_like(y))
    grads, params = jax.tree.map(lambda g: g / examples, gradient(step)), step.learned
    fixed = jax.tree.map(_unlearned, step.params, is_leaf=is_not_learned)
    summaries = _summaries(x, y, step.ct, step.d_x, params, fixed, grads, slope)
    if not kept:
        return Terms(layer, summaries, None)
    if not step.layer.batch_coupled:
        forms = factored(step)
    whole = Kept(x, y, step.ct, slope, step.d_x, params, forms, grads)
    return Terms(layer, summaries, whole)


def _unlearned(node: Any) -> Array | None:
    """Return a floating array that is not learned, and None for anything else."""
    unlearned = isinstance(node, Unlearned) and jnp.issubdtype(node.value.dtype, jnp.floating)
    return node.value if unlearned else None


def _summaries(
    x: Any,
    y: Any,
    ct: Any,
    d_x: Any,
    params: Any = (),
    unlearned: Any = (),
    grads: Any = (),
    slope: Any = None,
) -> Summaries:
    return Summaries(
        x=summary(x),
        y=summary(y),
        ct=summary(ct),
        d_x=summary(d_x),
        params=jax.tree.map(summary, params),
        unlearned=jax.tree.map(summary, unlearned),
        grads=jax.tree.map(summary, grads),
        saturated=None if slope is None else saturated(slope),
        dead=None if slope is None else dead(slope),
    )
