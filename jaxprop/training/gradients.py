"""The gradient of the mean loss, by the hand-written chain and by autodiff."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import jax
from jax import Array
from jaxtyping import Float

from jaxprop.core.batch import Batch
from jaxprop.core.checks import check_number
from jaxprop.core.cotangents import gradient, scaled_up
from jaxprop.core.functions import of_batch
from jaxprop.core.layer import Layer
from jaxprop.core.loss import Loss
from jaxprop.core.step import Layerwise, Step
from jaxprop.core.tree import check_learned, learned, like_params, merged
from jaxprop.core.types import OfBatch, Params, PyTree
from jaxprop.core.walk import check_net_and_loss, forward
from jaxprop.quantity.also import alongside
from jaxprop.quantity.aux import Aux
from jaxprop.quantity.base import Quantity, of_examples, unmarked
from jaxprop.quantity.micro_batches import Parts, in_micro_batches
from jaxprop.quantity.per_example import Gradient, Output

DOC = "Return the mean of the loss, and its gradient."
Value = Float[Array, ""]
ValueAndGrad = OfBatch[tuple[Value, Params]]


class Differentiate(Protocol):
    """A function of a net and a loss that returns ``f(params, x, target) -> (value, grads)``."""

    def __call__(self, net: Layer, loss: Loss, /) -> ValueAndGrad: ...


def value_and_grad(
    net: Layer,
    loss: Loss,
    *,
    loss_scale: float | Array = 1.0,
    micro_batches: int = 1,
    aux: bool = False,
    also: Mapping[str, Quantity] | None = None,
) -> ValueAndGrad:
    """Return ``f(params, x, target) -> (value, grads)`` by the hand-written chain.

    Value and gradient equal those of ``jax.value_and_grad(jp.loss_fn(net, loss))``: value is the
    mean of the loss over examples, and grads has the structure, shapes and dtypes of params. Where
    params hold an ``Unlearned`` array, grads hold ``Unlearned(0)``. For an integer param that
    ``init`` did not mark and for which ``backward`` returns ``()``, grads hold ``()``.

    Args:
        net: the network.
        loss: the loss.
        loss_scale: the factor that multiplies the cotangent at the start of the walk back, and
            that divides each gradient once it is summed. With a net that computes in float16
            (``jp.cast``), a scale of 2.0**12, say, keeps small cotangents from becoming zero
            (Micikevicius et al. 2018, https://arxiv.org/abs/1710.03740).
        micro_batches: the number of equal parts to split the batch into, which are processed one
            after the other in the memory of one.
        aux: whether ``f`` returns ``((value, aux), grads)``, where aux is a ``jp.Aux`` with the
            net's output y.
        also: quantities by name, such as ``{"noise": jp.NoiseScale(parts=True)}``, as for
            ``jp.quantities``. They come from the same walk, and are returned in ``aux.also``.

    Raises:
        TypeError: for a net, loss or loss_scale of the wrong type.
        ValueError: for a loss_scale that is not positive, for micro-batches or ``also`` with a net
            that couples the examples of a batch, and for ``also`` without ``aux``.
    """
    check_net_and_loss(net, loss)
    check_number("loss_scale", loss_scale, positive=True)
    if also is not None:
        own = {"grads": Gradient(), "y": Output()}
        f = alongside(net, loss, own, also, micro_batches, aux, loss_scale)

        def with_also(params: Params, batch: Batch) -> tuple[Any, Params]:
            result, quantities = f(params, batch)
            return (result["value"], Aux(result["y"], also=quantities)), result["grads"]

        return of_batch("value_and_grad", DOC, net, with_also)

    def parts(params: Params, batch: Batch) -> tuple[Any, Params]:
        ahead = forward(net, loss, params, batch)
        ct = scaled_up(ahead.mean_gradient(), loss_scale)

        def visit(step: Step) -> Params:
            return gradient(step, loss_scale)

        grads, _ = ahead.back(ct, Layerwise(visit))
        return (ahead.value, Aux(of_examples(ahead.y))) if aux else ahead.value, grads

    return _in_form("value_and_grad", net, in_micro_batches(net, parts, micro_batches))


def autodiff(net: Layer, loss: Loss, *, micro_batches: int = 1, aux: bool = False) -> ValueAndGrad:
    """Return ``f(params, x, target) -> (value, grads)`` by ``jax.grad`` of ``jp.loss_fn``.

    The result has the structure of ``jp.value_and_grad``'s. Only learned params are differentiated,
    whereas ``jax.grad`` of the whole tree refuses integers and keys. An integer param that is not
    marked as ``Unlearned`` raises ``TypeError``.

    Args:
        net: the network.
        loss: the loss.
        micro_batches: the number of equal parts to split the batch into.
        aux: whether ``f`` returns ``((value, aux), grads)``, as in ``jp.value_and_grad``.

    Example:
        >>> import jax, jax.numpy as jnp, jaxprop as jp
        >>> net, loss, x = jp.chain(jp.Dense(3), jp.BatchNorm()), jp.HalfSquaredError(), jnp.eye(3)
        >>> params = net.init(jax.random.key(0), x)
        >>> by_hand, by_jax = (f(net, loss)(params, x, x) for f in (jp.value_and_grad, jp.autodiff))
        >>> jax.tree.structure(by_hand) == jax.tree.structure(by_jax)
        True
    """
    check_net_and_loss(net, loss)

    def parts(params: Params, batch: Batch) -> tuple[Any, Params]:
        check_learned(params)

        def of_learned(arrays: Params) -> tuple[Value, PyTree]:
            ahead = forward(net, loss, merged(params, arrays), batch)
            return ahead.value, ahead.y

        of_pair = jax.value_and_grad(of_learned, has_aux=True)
        (value, y), grads = of_pair(learned(params))
        return (value, Aux(of_examples(y))) if aux else value, grads

    return _in_form("autodiff", net, in_micro_batches(net, parts, micro_batches))


def _in_form(name: str, net: Layer, differentiate: Parts) -> ValueAndGrad:
    """Return the function of a batch whose gradients have the structure of params."""

    def in_form(params: Params, batch: Batch) -> tuple[Any, Params]:
        value, grads = differentiate(params, batch)
        return unmarked(value), like_params(params, grads)

    return of_batch(name, DOC, net, in_form)
