"""``jp.explain``: one walk through a network, with every term of the chain rule recorded."""

from __future__ import annotations

import dataclasses
import functools
from typing import ClassVar

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from jaxprop.core.arrays import check_fit
from jaxprop.core.batch import Batch
from jaxprop.core.checks import check_count, check_not_empty
from jaxprop.core.combinator import Wrapper, map_layers, seen_through
from jaxprop.core.cotangents import factored, gradient
from jaxprop.core.layer import Layer
from jaxprop.core.loss import Loss
from jaxprop.core.step import Step
from jaxprop.core.tree import Unlearned, is_not_learned
from jaxprop.core.types import Cotangent, Params, PyTree, Residuals
from jaxprop.core.walk import check_net_and_loss, forward
from jaxprop.explanation.summary import dead, numbers, saturated, summary
from jaxprop.explanation.terms import Explanation, Kept, Scope, Summaries, Terms
from jaxprop.layers import Elementwise
from jaxprop.traced.example import is_learned
from jaxprop.traced.function import Function
from jaxprop.traced.observed import Result, results_of

KEEP = 10_000  # the most numbers in a walk that is kept whole


def explain(
    net: Layer,
    loss: Loss,
    params: Params,
    x: PyTree,
    target: PyTree = None,
    *,
    key: Array | None = None,
    mask: Array | None = None,
    keep: int = KEEP,
) -> Explanation:
    """Return the chain-rule terms of each layer, as a value that prints.

    The terms of a layer are its input x, its output y, the cotangents ct of y and d_x of x, the
    local derivative if the layer is elementwise, and for each param the factors of its gradient.
    Cotangents are of each example's *own* loss; the gradient of a param is the mean over examples.
    The walk is compiled, and may itself be called under ``jax.jit``.

    Args:
        net: the network.
        loss: the loss.
        params: the net's params.
        x: the inputs, with the example on axis 0.
        target: the targets, with the example on axis 0; omit it for a loss without a target.
        key: a key of ``jax.random.key``, for the layers that draw.
        mask: bool (N, T), True where a position is real, for the layers that take a mask.
        keep: the largest number of elements to keep. A walk with more of them leaves only a summary
            of each array: its mean, rms and largest size, the fraction of zeros and of saturated
            elements, and the number that are not finite.

    Returns:
        An ``Explanation``: ``layers["2.0"]`` has the terms of a layer, and ``["2.0.w"][1, 0]`` the
        chain rule for one weight. A function's param is named by its path,
        ``["params/Dense_0/kernel"]``, and ``layers[""].scopes`` has the terms of each of the
        function's named scopes: a Flax module, a ``jax.named_scope``, or a source line outside any
        scope.

    Raises:
        TypeError: if net is not a layer, loss is not a loss, or keep is not a whole number.
        ValueError: for keep below 0.

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
    check_count("explain: keep", keep, least=0)
    check_not_empty("explain", x)
    check_fit({"x": x, "target": target})
    return _explained(net, loss, keep, net.bind(params, key=key, mask=mask), x, target)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _explained(
    net: Layer, loss: Loss, keep: int, params: Params, x: PyTree, target: PyTree
) -> Explanation:
    def walked(kept: bool) -> Explanation:
        ahead = forward(map_layers(net, _recorded), RecordedLoss(loss), params, Batch(x, target))
        y, values, _ = ahead.residuals
        ct, ones = ahead.own_gradient(), jnp.ones_like(values)
        collected, _ = ahead.back(ct, lambda step: _read(step, ahead.examples.number, kept))
        at_loss = _summaries(y, values, ones, ct)
        whole = Kept(y, values, ones, None, ct, (), (), ()) if kept else None
        return Explanation(net, ahead.value, collected, Terms(loss, at_loss, whole))

    return walked(keep > 0 and numbers(jax.eval_shape(lambda: walked(True))) <= keep)


class Recorded(Wrapper):
    """y = f(x), with x and y saved among the residuals.

    Attributes:
        layer: f.
    """

    transparent: ClassVar[bool] = True

    def __repr__(self) -> str:
        return repr(self.layer)

    def forward(self, params: Params, x: PyTree) -> tuple[PyTree, Residuals]:
        y, residuals = self.layer.forward(params, x)
        return y, (x, y, residuals)

    def backward(
        self, params: Params, residuals: Residuals, ct: Cotangent
    ) -> tuple[Cotangent, Cotangent]:
        return self.layer.backward(params, residuals[2], ct)


def _recorded(layer: Layer) -> Layer:
    """Return a layer that saves x and y; a function also saves the results of its scopes."""
    return Recorded(_watching(layer))


def _watching(layer: Layer) -> Layer:
    """Make a function, maybe in wrappers, save the results of its scopes; return others as is."""
    if isinstance(layer, Function):
        return dataclasses.replace(layer, watching=True)
    if isinstance(layer, Wrapper) and layer.transparent:
        return dataclasses.replace(layer, layer=_watching(layer.layer))
    return layer


class RecordedLoss(Loss):
    """A loss that saves y and its values among the residuals.

    Attributes:
        loss: the loss within.
    """

    loss: Loss

    def __repr__(self) -> str:
        return repr(self.loss)

    def forward(self, y: PyTree, target: PyTree) -> tuple[Float[Array, " n"], Residuals]:
        values, residuals = self.loss.forward(y, target)
        return values, (y, values, residuals)

    def backward(self, residuals: Residuals) -> Cotangent:
        return self.loss.backward(residuals[2])


def _read(step: Step, examples: int, kept: bool) -> Terms:
    """Return the terms of one layer, with its whole arrays if ``kept``."""
    x = y = slope = forms = None
    results: list[Result] = []
    layer = seen_through(step.layer)
    if isinstance(step.layer, Recorded):
        x, y, residuals = step.residuals
        step = step._replace(layer=step.layer.layer, residuals=residuals)
        if isinstance(layer, Elementwise):
            _, slope = step.layer.backward(step.params, residuals, jnp.ones_like(y))
        if isinstance(layer, Function):
            inner = step.layer
            while isinstance(inner, Wrapper):
                inner, residuals = inner.inside(residuals)
            results = results_of(residuals, step.ct)
            layer = dataclasses.replace(layer, watching=False)
    grads, params = jax.tree.map(lambda g: g / examples, gradient(step)), step.learned
    fixed = jax.tree.map(_unlearned, step.params, is_leaf=is_not_learned)
    summaries = _summaries(x, y, step.ct, step.d_x, params, fixed, grads, slope)
    gradients = _by_number(step.params, grads) if results else {}
    scopes = tuple(_scope(result, gradients, kept) for result in results)
    if not kept:
        return Terms(layer, summaries, None, scopes)
    if not step.layer.batch_coupled:
        forms = factored(step)
    whole = Kept(x, y, step.ct, slope, step.d_x, params, forms, grads)
    return Terms(layer, summaries, whole, scopes)


def _scope(result: Result, gradients: dict[int, tuple[str, Array]], kept: bool) -> Scope:
    """Return the terms of a scope.

    Args:
        result: the scope's result and its cotangent.
        gradients: the name and the gradient of each param, by its number.
        kept: whether its whole result is kept.
    """
    names, grads = [], []
    for param, layer in result.params:
        name, grad = gradients[param]
        names.append(name)
        grads.append(grad[layer])
    whole = (result.y, result.ct) if kept else None
    y, ct = summary(result.y), summary(result.ct)
    assert y is not None
    assert ct is not None
    name = result.scope or result.line
    return Scope(name, result.line, tuple(names), y, ct, summary(grads), whole)


def _by_number(params: Params, grads: Params) -> dict[int, tuple[str, Array]]:
    """Return the name and the gradient of each learned param of a function, by number."""
    nodes = jax.tree.leaves_with_path(params, is_leaf=is_not_learned)
    learned = [index for index, (_, node) in enumerate(nodes) if is_learned(node)]
    each = zip(learned, jax.tree.leaves(grads), strict=True)
    return {
        index: (jax.tree_util.keystr(nodes[index][0], simple=True, separator="/"), grad)
        for index, grad in each
    }


def _unlearned(node: PyTree) -> Array | None:
    """Return a floating array that is not learned, and None for anything else."""
    unlearned = isinstance(node, Unlearned) and jnp.issubdtype(node.value.dtype, jnp.floating)
    return node.value if unlearned else None


def _summaries(
    x: PyTree,
    y: PyTree,
    ct: Cotangent,
    d_x: Cotangent,
    params: Params = (),
    unlearned: Params = (),
    grads: Params = (),
    slope: Array | None = None,
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
