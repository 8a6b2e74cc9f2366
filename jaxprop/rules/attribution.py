"""Attributions of an output to the entries of x, and the backward rules for two of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax import Array

from jaxprop.core.arrays import wide
from jaxprop.core.batch import Batch
from jaxprop.core.checks import check_count, check_number, check_values, require
from jaxprop.core.combinator import Wrapper
from jaxprop.core.describe import shapes
from jaxprop.core.functions import of_batch
from jaxprop.core.layer import Layer
from jaxprop.core.loops import sum_over
from jaxprop.core.types import Cotangent, OfBatch, Params, PyTree, Residuals
from jaxprop.layers import Relu
from jaxprop.rules.affine import nonzero
from jaxprop.rules.select import Where, with_rule


class Guided(Wrapper):
    """A rectifier y = f(x) that passes back only positive cotangents: d_x = f'(x) ct+.

    Springenberg et al. 2015, https://arxiv.org/abs/1412.6806.

    Attributes:
        layer: f.
        by_derivative: whether f' is a factor; otherwise d_x = ct+, the deconvolution of Zeiler and
            Fergus 2014, https://arxiv.org/abs/1311.2901.
    """

    by_derivative: bool = True
    is_derivative: ClassVar[bool] = False
    is_linear: ClassVar[bool] = False

    def forward(self, params: Params, x: Array) -> tuple[Array, Residuals]:
        return self.layer.forward(params, x)

    def backward(self, params: Params, residuals: Residuals, ct: Array) -> tuple[Cotangent, Array]:
        positive = jnp.maximum(ct, 0)
        d_params, d_x = self.layer.backward(params, residuals, positive)
        return d_params, d_x if self.by_derivative else positive


def guided_backprop(net: Layer, *, where: Where = Relu) -> Layer:
    """Return the net whose rectifiers pass a cotangent back only where it and x are positive.

    Springenberg et al. 2015, https://arxiv.org/abs/1412.6806. The attribution is
    ``jp.rules.saliency`` of the result.

    Args:
        net: a layer or a network.
        where: which layers; by default every ``Relu``.
    """
    return with_rule(net, Guided, where)


def deconvolution(net: Layer, *, where: Where = Relu) -> Layer:
    """Return the net whose rectifiers pass back the positive part of the cotangent, whatever x was.

    Zeiler and Fergus 2014, https://arxiv.org/abs/1311.2901.

    Args:
        net: a layer or a network.
        where: which layers; by default every ``Relu``.
    """
    return with_rule(net, lambda layer: Guided(layer, by_derivative=False), where)


def saliency(net: Layer) -> OfBatch[PyTree]:
    """Return ``f(params, x, target)``, the cotangent of x for an output of each example.

    The target says what is explained: (N,) integers pick an entry of each example's y, whose last
    axis is the class; arrays like y are the weights of a sum over y. Without a target, all of y is
    summed. The result is like x, computed by the net's own backward.

    Args:
        net: a network, with or without rules. If it ends with a loss or a softmax, explain the part
            before that.
    """

    def of(params: Params, batch: Batch) -> PyTree:
        return _d_x(net, params, batch.x, batch.target)

    return _attribution("saliency", net, of)


def gradient_times_input(net: Layer) -> OfBatch[PyTree]:
    """Return ``f(params, x, target)``, the cotangent of x, times x.

    For a piecewise linear net without biases, the sum is the output
    (Shrikumar et al. 2016, https://arxiv.org/abs/1605.01713).

    Args:
        net: a network; it and the target are as in ``jp.rules.saliency``.
    """

    def of(params: Params, batch: Batch) -> PyTree:
        return _times(batch.x, _d_x(net, params, batch.x, batch.target))

    return _attribution("gradient_times_input", net, of)


def relevance(net: Layer) -> OfBatch[PyTree]:
    """Return ``f(params, x, target)``, the relevance of each entry of x for an output.

    Where the rules conserve relevance, its sum is the output, except for what biases absorb.

    Args:
        net: a network with rules of relevance, ``jp.rules.lrp(net)``. The target is as in
            ``jp.rules.saliency``.
    """

    def of(params: Params, batch: Batch) -> PyTree:
        d_x = _d_x(net, params, batch.x, batch.target)
        return _times(jax.tree.map(nonzero, batch.x), d_x)

    return _attribution("relevance", net, of)


def integrated_gradients(net: Layer, *, baseline: PyTree = 0.0, steps: int = 32) -> OfBatch[PyTree]:
    """Return ``f(params, x, target)``, (x - x0) times the mean of d_x between x0 and x.

    The sum is the output minus the output at x0, up to the error of the mean, which is taken at the
    midpoints of equal steps (Sundararajan et al. 2017, https://arxiv.org/abs/1703.01365).

    Args:
        net: a network; it and the target are as in ``jp.rules.saliency``.
        baseline: x0: a number, or arrays that broadcast to x.
        steps: the number of points at which the gradient is taken, one after the other.
    """
    check_count("integrated_gradients: steps", steps)

    def of(params: Params, batch: Batch) -> PyTree:
        x, start = batch.x, _start(baseline, batch.x)
        apart = jax.tree.map(jnp.subtract, x, start)

        def at(share: Array) -> PyTree:
            point = jax.tree.map(lambda a, b: a + b * share.astype(b.dtype), start, apart)
            return _d_x(net, params, point, batch.target)

        middles = (jnp.arange(steps, dtype=float) + 0.5) / steps
        return _times(apart, _mean_of(at, middles, x))

    return _attribution("integrated_gradients", net, of)


def smooth_grad(net: Layer, *, deviation: float, samples: int = 32) -> OfBatch[PyTree]:
    """Return ``f(params, x, target, key=key)``, the mean of d_x over noisy copies of x.

    Smilkov et al. 2017, https://arxiv.org/abs/1706.03825.

    Args:
        net: a network; it and the target are as in ``jp.rules.saliency``.
        deviation: the standard deviation of the normal noise on each entry; the paper takes 10 to
            20 % of the range of x.
        samples: the number of noisy copies, taken one after the other.
    """
    check_number("smooth_grad: deviation", deviation, finite=True)
    check_count("smooth_grad: samples", samples)

    def of(params: Params, batch: Batch) -> PyTree:
        if batch.key is None:
            raise ValueError("smooth_grad draws noise: give key=, of jax.random.key")
        leaves, structure = jax.tree.flatten(batch.x)

        def at(key: Array) -> PyTree:
            keys = jax.random.split(key, len(leaves))
            noisy = [
                x + jnp.asarray(deviation, x.dtype) * jax.random.normal(k, x.shape, x.dtype)
                for k, x in zip(keys, leaves, strict=True)
            ]
            return _d_x(net, params, structure.unflatten(noisy), batch.target)

        return _mean_of(at, jax.random.split(batch.key, samples), batch.x)

    return _attribution("smooth_grad", net, of)


def _attribution(name: str, net: Layer, of: Callable[[Params, Batch], PyTree]) -> OfBatch[PyTree]:
    require(net, Layer, f"{name}: net")

    def checked(params: Params, batch: Batch) -> PyTree:
        if batch.weights is not None or batch.divisor is not None:
            raise TypeError(f"{name} is of each example by itself: it takes no weights, no divisor")
        for leaf in jax.tree.leaves(batch.x):
            if not jnp.issubdtype(getattr(leaf, "dtype", None) or int, jnp.floating):
                raise TypeError(
                    f"{name} takes x as floating arrays, not {shapes(batch.x)}; of a net that "
                    "begins with an embedding, explain what comes behind it"
                )
        return of(params, batch)

    return of_batch(name, f"Return the {name.replace('_', ' ')} of each entry of x.", net, checked)


def _d_x(net: Layer, params: Params, x: PyTree, target: Any) -> Cotangent:
    y, residuals = net.forward(params, x)
    return net.backward(params, residuals, _explained(y, target))[1]


def _explained(y: PyTree, target: Any) -> Cotangent:
    """Return the cotangent of y that picks what is explained."""
    if target is None:
        return jax.tree.map(jnp.ones_like, y)
    if hasattr(y, "shape") and jnp.issubdtype(getattr(target, "dtype", float), jnp.integer):
        if y.ndim == 2 and jnp.shape(target) == y.shape[:1]:
            words = f"a target of an output is from 0 to {y.shape[1] - 1}"
            check_values(words, target, lambda t: (t >= 0) & (t < y.shape[1]))
            return jax.nn.one_hot(target, y.shape[1], dtype=y.dtype)
        words = f"y is {shapes(y)}"
        raise ValueError(f"integer targets are (N,), for a y (N, C); but {words}, {shapes(target)}")
    if jax.tree.map(jnp.shape, target) != jax.tree.map(jnp.shape, y):
        raise ValueError(f"the target is {shapes(target)}, and y {shapes(y)}: weights are like y")
    return jax.tree.map(lambda w, y: jnp.asarray(w, y.dtype), target, y)


def _times(x: PyTree, d_x: Cotangent) -> PyTree:
    return jax.tree.map(lambda x, d: (wide(x) * wide(d)).astype(d.dtype), x, d_x)


def _start(baseline: PyTree, x: PyTree) -> PyTree:
    """Return a baseline with the shapes and dtypes of x."""
    if jax.tree.structure(baseline) != jax.tree.structure(x):
        baseline = jax.tree.map(lambda _: baseline, x)
    try:
        return jax.tree.map(
            lambda x0, x: jnp.broadcast_to(jnp.asarray(x0, x.dtype), x.shape), baseline, x
        )
    except (TypeError, ValueError):
        raise ValueError(
            f"integrated_gradients: the baseline is a number, or arrays that broadcast to x, "
            f"{shapes(x)}, not {shapes(baseline)}"
        ) from None


def _mean_of(f: Callable[[Array], PyTree], xs: Array, like: PyTree) -> PyTree:
    """Return the mean of f over an array, one entry at a time; f returns trees like ``like``."""
    total = sum_over(lambda x: jax.tree.map(wide, f(x)), xs)
    return jax.tree.map(lambda leaf, a: (leaf / len(xs)).astype(a.dtype), total, like)
