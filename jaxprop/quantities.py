"""What one walk can take from the factored cotangents, besides their sum.

The scalar loss is the mean over the N examples. A per-example quantity is that of each example's
*own* loss, so that the mean of the per-example gradients is the gradient (there is no 1/N in them).
Each function here is called as ``jp.value_and_grad`` is, with a net and a loss, and returns a
function of (params, x, target). Quantities that are asked for together share one walk:
``quantities``.

A layer whose cotangents are not factored serves as well: its backward is then taken one example
at a time. A layer that couples the examples of a batch has no per-example gradient, and raises.
"""

from __future__ import annotations

import abc
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from jaxprop.backprop import own_gradient, walk
from jaxprop.factored import Factored, factored, is_factored, like, wide
from jaxprop.layer import Layer, Static, Step, Total
from jaxprop.losses import Loss
from jaxprop.of_batch import OfBatch, PerExample, unmarked


class Quantity(Static):
    """What is taken at each layer from its params' cotangents, and made of all of it at the end.

    ``take`` gives means over examples, or arrays marked as ``PerExample``, so that what it gives
    for micro-batches (``accumulate``) makes up what it gives for the batch. What is not linear in
    the examples is left to ``settle`` and ``finish``, which see the batch.
    """

    @abc.abstractmethod
    def take(self, params: Any, forms: Any, examples: int) -> Any:
        """At one layer: forms is like params, with each example's own cotangent, factored."""

    def settle(self, taken: Any) -> Any:
        """What is kept of what was taken at a layer, or at those of a ``repeat`` together."""
        return taken

    def finish(self, settled: Any, examples: int) -> Any:
        """settled is like the net's params, with what was kept where a layer's params stand."""
        del examples
        return unmarked(settled)


class Moments(NamedTuple):
    """Of one param: the gradient, and a second moment of its per-example gradients."""

    mean: Array
    second: Array


class Gradient(Quantity):
    """The gradient of the mean over examples; like params."""

    def take(self, params: Any, forms: Any, examples: int) -> Any:
        return _each(lambda p, form: like(p, _mean(form, examples)), params, forms)


class PerExampleGrads(Quantity):
    """Each example's gradient; like params, behind an example axis."""

    def take(self, params: Any, forms: Any, examples: int) -> Any:
        def each(p: Array, form: Factored) -> PerExample:
            return PerExample(form.per_example().astype(p.dtype), axis=-1 - p.ndim)

        return _each(each, params, forms)

    def finish(self, settled: Any, examples: int) -> Any:
        """Behind the example axis come the layers of a ``repeat``, as in params."""
        return jax.tree.map(
            lambda each: jnp.moveaxis(each.value, each.axis, 0),
            settled,
            is_leaf=lambda node: isinstance(node, PerExample),
        )


class SqNorms(Quantity):
    """|g_n|^2, (N,): over all params, or for each layer where its params stand (``per_layer``)."""

    per_layer: bool = False

    def take(self, params: Any, forms: Any, examples: int) -> Any:
        norms = PerExample(total(lambda form: form.sq_norms(), forms), axis=-1)
        return norms if self.per_layer else Total(norms)

    def finish(self, settled: Any, examples: int) -> Any:
        norms = unmarked(settled)
        return norms if self.per_layer else everything(norms)


class Gram(Quantity):
    """<g_n, g_m> over all params, (N, N)."""

    def take(self, params: Any, forms: Any, examples: int) -> Any:
        return Total(total(lambda form: form.inner_products(), forms))

    def finish(self, settled: Any, examples: int) -> Any:
        return everything(settled)


class SecondMoment(Quantity):
    """The mean over examples of g_n^2, elementwise; like params, in at least float32."""

    def take(self, params: Any, forms: Any, examples: int) -> Any:
        return _each(lambda _, form: form.second_moment() / examples, params, forms)


class Variance(Quantity):
    """The mean over examples of (g_n - mean)^2, elementwise: second moment - gradient^2."""

    def take(self, params: Any, forms: Any, examples: int) -> Any:
        def moments(_: Array, form: Factored) -> Moments:
            return Moments(_mean(form, examples), form.second_moment() / examples)

        return _each(moments, params, forms)

    def settle(self, taken: Any) -> Any:
        def variance(of: Moments) -> Array:
            square = of.mean.astype(of.second.dtype) ** 2
            return jnp.maximum(of.second - square, 0)  # of equal examples it is rounding alone

        return jax.tree.map(variance, taken, is_leaf=_is_moments)


class NoiseScale(Quantity):
    """tr(S) / |G|^2, with S the covariance of g_n and G its mean, each by its unbiased estimate.

    With m the mean of |g_n|^2 and g the gradient, E m = |G|^2 + tr S and E |g|^2 = |G|^2 + tr S / N
    give tr S = (m - |g|^2) N / (N - 1) and |G|^2 = (N |g|^2 - m) / (N - 1): the simple noise scale
    of McCandlish et al. 2018 (https://arxiv.org/abs/1812.06162, appendix A), from one batch.
    """

    def take(self, params: Any, forms: Any, examples: int) -> Any:
        def moments(_: Array, form: Factored) -> Moments:
            return Moments(wide(_mean(form, examples)), jnp.mean(form.sq_norms()))

        return _each(moments, params, forms)

    def settle(self, taken: Any) -> Any:
        return Total(total(lambda of: jnp.stack([jnp.sum(of.second), jnp.sum(of.mean**2)]), taken))

    def finish(self, settled: Any, examples: int) -> Array:
        if examples < 2:
            raise ValueError("the noise scale is estimated from at least 2 examples, not 1")
        mean_of_squares, square_of_mean = everything(settled)
        trace = (mean_of_squares - square_of_mean) * examples / (examples - 1)
        return trace * (examples - 1) / (examples * square_of_mean - mean_of_squares)


class Forms(Quantity):
    """The factored cotangents themselves; like params."""

    def take(self, params: Any, forms: Any, examples: int) -> Any:
        return forms


def quantities(net: Layer, loss: Loss, /, **asked: Quantity) -> OfBatch:
    """``f(params, x, target)``: a dict of the quantities asked for, and ``value``, from one walk.

    Example:
        >>> import jax, jax.numpy as jnp, jaxprop as jp
        >>> net, loss, x = jp.chain(jp.Dense(2)), jp.HalfSquaredError(), jnp.ones((3, 4))
        >>> params = net.init(jax.random.key(0), x)
        >>> f = jp.quantities(net, loss, grads=jp.Gradient(), norms=jp.SqNorms())
        >>> {name: jax.tree.map(jnp.shape, result)
        ...  for name, result in f(params, x, jnp.ones((3, 2))).items()}
        {'value': (), 'grads': (Affine(w=(4, 2), b=(2,)),), 'norms': (3,)}
    """
    if "value" in asked:
        raise ValueError("'value' is the name of the loss; call the quantity something else")
    for name, quantity in asked.items():
        if not isinstance(quantity, Quantity):
            raise TypeError(f"{name} is not a quantity but {quantity!r}; write jp.Gradient(), say")

    def take(step: Step) -> Seat:
        forms, examples = factored(step), jax.tree.leaves(step.ct)[0].shape[0]
        return Seat(
            {name: quantity.take(step.params, forms, examples) for name, quantity in asked.items()}
        )

    def settle(seat: Seat) -> Seat:
        return Seat({name: asked[name].settle(taken) for name, taken in seat.by_name.items()})

    taking = walk(net, loss, take, own_gradient)
    settling = walk(net, loss, lambda step: settle(take(step)), own_gradient)

    def parts(params: Any, x: Any, target: Any) -> tuple[Array, Any]:
        value, left, _ = taking(params, x, target)
        return value, left

    def finish(parts: tuple[Array, Any], examples: int, params: Any) -> dict[str, Any]:
        value, left = parts
        return finished(value, jax.tree.map(settle, left, is_leaf=_is_seat), examples)

    def whole(params: Any, x: Any, target: Any) -> dict[str, Any]:
        value, left, _ = settling(params, x, target)
        return finished(value, left, jax.tree.leaves(x)[0].shape[0])

    def finished(value: Array, left: Any, examples: int) -> dict[str, Any]:
        return {"value": value} | {
            name: quantity.finish(picked(left, name), examples) for name, quantity in asked.items()
        }

    return OfBatch(parts, finish, whole)


def _alone(net: Layer, loss: Loss, quantity: Quantity) -> OfBatch:
    return quantities(net, loss, it=quantity).then(lambda together: together["it"])


def per_example_grads(net: Layer, loss: Loss) -> OfBatch:
    """``f(params, x, target)``: each example's own gradient; like params, behind an example axis.

    Their mean over the example axis is the gradient.
    """
    return _alone(net, loss, PerExampleGrads())


def per_example_sq_norms(net: Layer, loss: Loss, *, per_layer: bool = False) -> OfBatch:
    """``f(params, x, target)``: the squared norm of each example's own gradient, (N,).

    For a dense layer it is |x_n|^2 |ct_n|^2 (Goodfellow 2015, https://arxiv.org/abs/1510.01799),
    and along positions <X X^T, C C^T>; a per-example gradient is formed only where that costs less
    (long sequences, small weights). With ``per_layer`` the result is like the net's params, with
    (N,) where a layer's params stand (and ``()`` for a layer without); inside ``repeat``, (L, N).
    """
    return _alone(net, loss, SqNorms(per_layer))


def gram(net: Layer, loss: Loss) -> OfBatch:
    """``f(params, x, target)``: <g_n, g_m> of all pairs of per-example gradients, (N, N)."""
    return _alone(net, loss, Gram())


def second_moment(net: Layer, loss: Loss) -> OfBatch:
    """``f(params, x, target)``: the mean over examples of the squared per-example gradients.

    Like params, in at least float32. Not the square of the gradient: what the gradient's entries
    would be if each example's were squared first.
    """
    return _alone(net, loss, SecondMoment())


def variance(net: Layer, loss: Loss) -> OfBatch:
    """``f(params, x, target)``: the variance over examples of each entry of the gradient.

    Like params, in at least float32: ``second_moment`` minus the square of the gradient, with N
    (not N - 1) below.
    """
    return _alone(net, loss, Variance())


def noise_scale(net: Layer, loss: Loss) -> OfBatch:
    """``f(params, x, target)``: the simple noise scale tr(S) / |G|^2 from one batch, a scalar.

    S is the covariance of the per-example gradients and G the true gradient, each replaced by its
    unbiased estimate (McCandlish et al. 2018, https://arxiv.org/abs/1812.06162). It says how large
    a batch is worth its cost. On a small batch the estimate of |G|^2 may come out negative, and the
    ratio with it. Raises ``ValueError`` for a batch of one.
    """
    return _alone(net, loss, NoiseScale())


@jax.tree_util.register_pytree_node_class
class Seat:
    """What was taken at one layer, by name."""

    def __init__(self, by_name: dict[str, Any]) -> None:
        self.by_name = by_name

    def tree_flatten(self) -> tuple[tuple[dict[str, Any]], None]:
        return (self.by_name,), None

    @classmethod
    def tree_unflatten(cls, _: None, children: tuple[dict[str, Any]]) -> Seat:
        return cls(*children)


def picked(left: Any, name: str) -> Any:
    return jax.tree.map(lambda seat: seat.by_name[name], left, is_leaf=_is_seat)


def _is_seat(node: object) -> bool:
    return isinstance(node, Seat)


def _is_moments(node: object) -> bool:
    return isinstance(node, Moments)


def _each(f: Callable[[Array, Factored], Any], params: Any, forms: Any) -> Any:
    return jax.tree.map(f, params, forms)


def _mean(form: Factored, examples: int) -> Array:
    return form.weighted_sum(jnp.full(examples, 1 / examples))


def total(f: Callable[[Any], Array], forms: Any) -> Any:
    """f summed over the leaves, which may be forms or moments; () where there are none."""
    leaves = jax.tree.leaves(forms, is_leaf=lambda node: is_factored(node) or _is_moments(node))
    return sum(map(f, leaves[1:]), start=f(leaves[0])) if leaves else ()


def each_example(forms: Any) -> Any:
    """The forms' per-example shares, behind an example axis wherever their layer stands."""
    return jax.tree.map(lambda form: form.per_example(), forms, is_leaf=is_factored)


def everything(taken: Any) -> Array:
    """The sum of what was taken at the layers. Raises ``ValueError`` for a net without params."""
    leaves: list[Array] = jax.tree.leaves(taken)
    if not leaves:
        raise ValueError("the net has no params, so that there is no gradient to ask about")
    return sum(leaves[1:], start=leaves[0])
