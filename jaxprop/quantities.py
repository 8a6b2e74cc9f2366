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

import dataclasses
from typing import Any

import jax
from jax import Array

from jaxprop.backprop import own_gradient, walk
from jaxprop.factored import factored
from jaxprop.layer import Layer, Step
from jaxprop.losses import Loss
from jaxprop.of_batch import OfBatch
from jaxprop.quantity import (
    Gram,
    NoiseScale,
    PerExampleGrads,
    Quantity,
    SecondMoment,
    SqNorms,
    Variance,
)


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

    def take(step: Step) -> Taken:
        forms, examples = factored(step), jax.tree.leaves(step.ct)[0].shape[0]
        return Taken(
            {name: quantity.take(step.params, forms, examples) for name, quantity in asked.items()}
        )

    def settle(taken: Taken) -> Taken:
        return Taken({name: asked[name].settle(each) for name, each in taken.by_name.items()})

    taking = walk(net, loss, take, own_gradient)
    settling = walk(net, loss, lambda step: settle(take(step)), own_gradient)

    def parts(params: Any, x: Any, target: Any) -> tuple[Array, Any]:
        value, left, _ = taking(params, x, target)
        return value, left

    def finish(parts: tuple[Array, Any], examples: int, params: Any) -> dict[str, Any]:
        value, left = parts
        return finished(value, jax.tree.map(settle, left, is_leaf=_is_taken), examples)

    def whole(params: Any, x: Any, target: Any) -> dict[str, Any]:
        value, left, _ = settling(params, x, target)
        return finished(value, left, jax.tree.leaves(x)[0].shape[0])

    def finished(value: Array, left: Any, examples: int) -> dict[str, Any]:
        return {"value": value} | {
            name: quantity.finish(picked(left, name), examples) for name, quantity in asked.items()
        }

    return OfBatch(parts, finish, whole)


def _alone(net: Layer, loss: Loss, quantity: Quantity) -> OfBatch:
    name = type(quantity).__name__
    return quantities(net, loss, **{name: quantity}).then(lambda together: together[name])


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


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Taken:
    """What was taken at one layer, by name."""

    by_name: dict[str, Any]


def picked(left: Any, name: str) -> Any:
    return jax.tree.map(lambda taken: taken.by_name[name], left, is_leaf=_is_taken)


def _is_taken(node: object) -> bool:
    return isinstance(node, Taken)
