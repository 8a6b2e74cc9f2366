"""One training step, in two ways: all gradients and then all updates, or fused with the walk."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from jaxprop.core.arrays import wide
from jaxprop.core.batch import Batch, weighted_batch
from jaxprop.core.combinator import stack_depths
from jaxprop.core.cotangents import gradient, scaled_up
from jaxprop.core.coupling import check_uncoupled
from jaxprop.core.describe import shapes
from jaxprop.core.forms import norm_of_all, norms
from jaxprop.core.layer import Layer
from jaxprop.core.loss import Loss
from jaxprop.core.side_inputs import takes_side_input
from jaxprop.core.step import Layerwise
from jaxprop.core.tree import Key, Unlearned, check_learned, for_optimizer, is_not_learned, merged
from jaxprop.core.types import Params, PyTree
from jaxprop.core.walk import forward, loss_fn
from jaxprop.quantity.aux import Aux
from jaxprop.quantity.micro_batches import dividing, part
from jaxprop.training.apply import Apply, BatchFacts, LossOfStep, Options
from jaxprop.training.attached import attached
from jaxprop.training.fused import FusedUpdate, NormsOfMean, mean_with, norms_of_gradient
from jaxprop.training.gradients import ValueAndGrad
from jaxprop.training.statistics import holds_batch_stats, update_batch_stats

Run = Callable[..., tuple[Params, PyTree, Any]]


def whole_step(
    net: Layer,
    loss: Loss,
    apply: Apply,
    options: Options,
    differentiate: Callable[[float | Array], ValueAndGrad],
) -> Run:
    """Return a step that computes all gradients, and then updates all params.

    Args:
        net: the network.
        loss: the loss.
        apply: the function from gradients to new params and state.
        options: the options of the update.
        differentiate: a function of a loss scale that returns the ``value_and_grad`` to use.
    """
    mean_loss = loss_fn(net, loss)

    def step(
        params: Params,
        state: PyTree,
        x: PyTree,
        target: PyTree,
        key: Array | None = None,
        mask: Array | None = None,
        weights: Array | None = None,
        divisor: float | Array | None = None,
    ) -> tuple[Params, PyTree, Any]:
        check_learned(params)
        _check_key(net, key)
        every = {"key": key, "mask": mask, "weights": weights, "divisor": divisor}
        given = {name: value for name, value in every.items() if value is not None}

        value_fn = LossOfStep(mean_loss, params, (x, target), given)
        result, grads = _pair(differentiate(options.scale(state))(params, x, target, **given))
        value, aux = _pair(result) if options.aux else (result, None)
        grads, arrays = for_optimizer(grads), for_optimizer(params)
        _check_grads(grads, arrays)
        seen = BatchFacts(value)
        if options.need_norm:
            each = jax.tree.map(lambda grad: norms(grad[None])[0], grads)
            seen = BatchFacts.with_norm(value, norm_of_all(each))
        arrays, state = apply(grads, state, arrays, seen, value_fn)
        params = _with_batch_stats(net, params, x, key, mask, seen if options.skips else None)
        return merged(params, arrays), state, _result(value, aux, seen)

    return step


def fused_step(net: Layer, loss: Loss, apply: Apply, options: Options) -> Run:
    """Return a step that updates each layer's params during the walk back.

    Args:
        net: the network.
        loss: the loss.
        apply: the function from gradients to new params and state.
        options: the options of the update.
    """
    micro_batches = options.micro_batches

    def step(
        params: Params,
        state: PyTree,
        x: PyTree,
        target: PyTree,
        key: Array | None = None,
        mask: Array | None = None,
        weights: Array | None = None,
        divisor: float | Array | None = None,
    ) -> tuple[Params, PyTree, Any]:
        check_learned(params)
        _check_key(net, key)
        scale, depths = options.scale(state), stack_depths(net, params)
        bound = net.bind(params, key=key, mask=mask)
        last, before = (bound, weighted_batch(net, bound, x, target, None, weights, divisor)), None
        if micro_batches > 1:
            before, last = _all_but_last(net, loss, *last, options, scale)
        ahead = forward(net, loss, *last)
        ct, value, y = scaled_up(ahead.mean_gradient(), scale), ahead.value, ahead.y
        if before is not None:
            value = mean_with(before.value, value, micro_batches)
            y = _interleaved(before.y, y)
        seen = BatchFacts(value)
        if options.need_norm:
            if before is None:
                each, _ = ahead.back(
                    ct, Layerwise(functools.partial(norms_of_gradient, scale=scale))
                )
            else:
                visit = NormsOfMean(micro_batches, scale)
                each, _ = ahead.back(ct, visit, attached(last[0], before.grads))
            seen = BatchFacts.with_norm(value, norm_of_all(each))
        grads = None if before is None else before.grads
        visit = FusedUpdate(apply, last[0], state, seen, depths, grads, micro_batches, scale)
        places, _ = ahead.back(ct, visit, visit.places())
        arrays, state = visit.results(places)
        params = _with_batch_stats(net, params, x, key, mask, seen if options.skips else None)
        return merged(params, arrays), state, _result(value, Aux(y) if options.aux else None, seen)

    return step


class Before(NamedTuple):
    """The sums over all micro-batches except the last.

    Attributes:
        value: the sum of the losses.
        grads: the sums of the gradients, like the learned params, in at least float32.
        y: the outputs, with a leading axis of micro-batches, or ``()`` if they are not asked for.
    """

    value: Array
    grads: Params
    y: PyTree


def _all_but_last(
    net: Layer, loss: Loss, params: Params, batch: Batch, options: Options, scale: float | Array
) -> tuple[Before, tuple[Params, Batch]]:
    """Return the sums over all micro-batches except the last, and the last one's arguments."""
    batch = dividing(batch, options.micro_batches)
    check_uncoupled(net, params, batch.x)

    def args(i: Array | int) -> tuple[Params, Batch]:
        return part(params, batch, i, options.micro_batches)

    def of_part(i: Array | int) -> tuple[tuple[Array, Params], PyTree]:
        ahead = forward(net, loss, *args(i))
        ct = scaled_up(ahead.mean_gradient(), scale)
        grads, _ = ahead.back(ct, Layerwise(functools.partial(gradient, scale=scale)))
        return (ahead.value, jax.tree.map(wide, grads)), ahead.y if options.aux else ()

    def add(sums: PyTree, i: Array) -> tuple[PyTree, PyTree]:
        more, y = of_part(i)
        return jax.tree.map(jnp.add, sums, more), y

    start = jax.tree.map(jnp.zeros_like, jax.eval_shape(lambda: of_part(0)[0]))
    last = options.micro_batches - 1
    (value, grads), y = jax.lax.scan(add, start, jnp.arange(last))
    return Before(value, grads, y), args(last)


def _interleaved(before: PyTree, last: PyTree) -> PyTree:
    """Return the outputs of all examples, of which [i::micro_batches] come from the i-th part."""

    def joined(before: Array, last: Array) -> Array:
        parts = jnp.concatenate([before, last[None]])
        return parts.swapaxes(0, 1).reshape(-1, *last.shape[1:])

    return jax.tree.map(joined, before, last) if jax.tree.leaves(before) else last


def _with_batch_stats(
    net: Layer,
    params: Params,
    x: PyTree,
    key: Array | None,
    mask: Array | None,
    seen: BatchFacts | None,
) -> Params:
    """Return params with each BatchNorm's running statistics moved, unless the step is skipped."""
    if not holds_batch_stats(net):
        return params
    moved = update_batch_stats(net, params, x, key=key, mask=mask)

    def kept(old: Any, new: Any) -> Any:
        if not isinstance(old, Unlearned):
            return old
        if seen is None:
            return new
        return jax.tree.map(functools.partial(jax.lax.select, seen.finite), new, old)

    return jax.tree.map(kept, params, moved, is_leaf=is_not_learned)


def _check_key(net: Layer, key: Array | None) -> None:
    if key is None and takes_side_input(net, Key):
        raise ValueError(
            f"update takes key=, a new one each step, for the layers of {net} that draw; to train "
            "without drawing make the update of jp.inference_mode(net)"
        )


def _pair(result: Any) -> tuple[Any, Any]:
    """Return ``(value, grads)``, and raise ``TypeError`` for anything else."""
    if type(result) is not tuple or len(result) != 2:
        raise TypeError(f"value_and_grad= returns (value, grads), not {shapes(result)}")
    return result


def _result(value: Array, aux: Any, seen: BatchFacts) -> Any:
    """Return the last result of an update: the value, with aux if that was asked for."""
    if aux is None:
        return value
    return value, aux._replace(norm=seen.norm) if isinstance(aux, Aux) else aux


def _check_grads(grads: Params, params: Params) -> None:
    """Raise ``ValueError`` unless every learned param has a gradient of its shape."""
    same = jax.tree.structure(grads) == jax.tree.structure(params)
    if not same or jax.tree.map(jnp.shape, grads) != jax.tree.map(jnp.shape, params):
        raise ValueError(
            f"the gradients are {shapes(grads)}, but the learned params {shapes(params)}: an array "
            "without a gradient is marked in init, by jp.Unlearned(array)"
        )
