"""One step of training, two ways: all gradients and then all updates, or fused with the walk."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jaxtyping import Float

from jaxprop.core.arrays import sum_over, wide
from jaxprop.core.combinator import stack_depths
from jaxprop.core.cotangents import gradient
from jaxprop.core.coupling import check_uncoupled
from jaxprop.core.describe import shapes
from jaxprop.core.forms import norm_of_all, norms
from jaxprop.core.layer import Layer
from jaxprop.core.loss import Loss
from jaxprop.core.mesh import shard_map_axes
from jaxprop.core.tree import check_learned, for_optimizer, merged
from jaxprop.core.types import Params, PyTree
from jaxprop.core.walk import forward, loss_fn
from jaxprop.quantity.micro_batches import check_examples, part
from jaxprop.training.attached import attached
from jaxprop.training.fused import FusedUpdate, NormsOfMean, mean_with, norms_of_gradient
from jaxprop.training.gradients import ValueAndGrad


class Skipping(NamedTuple):
    """An optimizer's state, and how many steps were skipped because they were not finite.

    Attributes:
        state: the optimizer's state.
        skipped: int32, a scalar.
    """

    state: PyTree
    skipped: Array


class Seen(NamedTuple):
    """What an update knows of the whole batch.

    Attributes:
        value: the loss.
        norm: the norm of the gradient, where it is needed.
        finite: whether both are finite.
    """

    value: Float[Array, ""]
    norm: Any = None
    finite: Any = None

    @classmethod
    def with_norm(cls, value: Array, norm: Array) -> Seen:
        """Return what is seen; in ``jax.shard_map`` finite is what is so on all devices."""
        finite = jnp.isfinite(value) & jnp.isfinite(norm)
        axes = shard_map_axes()
        if axes:
            finite &= jax.lax.axis_index(axes) >= 0  # always so, but on each device its own answer
            finite = jax.lax.pmin(finite.astype(jnp.int32), axes) > 0
        return cls(value, norm, finite)


Apply = Callable[..., tuple[Params, PyTree]]
Run = Callable[..., tuple[Params, PyTree, Array]]


def make_apply(
    optimizer: optax.GradientTransformationExtraArgs,
    max_norm: float | Array | None,
    skip_nonfinite: bool,
) -> Apply:
    """Return ``apply(grads, state, params, seen, value_fn) -> (params, state)``."""
    taken = _extra_args(optimizer)

    def apply(
        grads: Params,
        state: PyTree,
        params: Params,
        seen: Seen,
        value_fn: Callable[[Params], Array],
    ) -> tuple[Params, PyTree]:
        if max_norm is not None:
            scale = jnp.where(seen.norm < max_norm, 1, max_norm / seen.norm)
            grads = jax.tree.map(lambda g: g * scale.astype(g.dtype), grads)
        extra = {"value": seen.value, "grad": grads, "value_fn": value_fn}
        given = {name: extra[name] for name in taken}
        updates, state = optimizer.update(grads, state, params, **given)
        return optax.apply_updates(params, updates), state

    def apply_if_finite(
        grads: Params,
        state: PyTree,
        params: Params,
        seen: Seen,
        value_fn: Callable[[Params], Array],
    ) -> tuple[Params, PyTree]:
        if not isinstance(state, Skipping):
            raise TypeError("with skip_nonfinite start from state = update.init(params)")
        old = params, state.state
        params, inner = jax.tree.map(
            lambda new, old: jax.lax.select(seen.finite, new, old),
            apply(grads, state.state, params, seen, value_fn),
            old,
        )
        return params, Skipping(inner, state.skipped + (~seen.finite).astype(jnp.int32))

    return apply_if_finite if skip_nonfinite else apply


def _extra_args(optimizer: optax.GradientTransformationExtraArgs) -> tuple[str, ...]:
    """Return which extra arguments the optimizer's update takes."""
    names = ("value", "grad", "value_fn")
    parameters = inspect.signature(optimizer.update).parameters
    if any(each.kind is inspect.Parameter.VAR_KEYWORD for each in parameters.values()):
        return names
    return tuple(name for name in names if name in parameters)


def whole_step(
    net: Layer, loss: Loss, apply: Apply, need_norm: bool, differentiate: ValueAndGrad
) -> Run:
    """Return a step that finds all gradients, and then updates all params."""
    mean_loss = loss_fn(net, loss)

    def step(
        params: Params,
        state: PyTree,
        x: PyTree,
        target: PyTree,
        key: Array | None = None,
        mask: Array | None = None,
    ) -> tuple[Params, PyTree, Array]:
        check_learned(params)
        given = {name: value for name, value in (("key", key), ("mask", mask)) if value is not None}

        def value_fn(arrays: Params) -> Array:
            return mean_loss(merged(params, arrays), x, target, **given)

        value, grads = _pair(differentiate(params, x, target, **given))
        grads, arrays = for_optimizer(grads), for_optimizer(params)
        _check_grads(grads, arrays)
        seen = Seen(value)
        if need_norm:
            each = jax.tree.map(lambda grad: norms(grad[None])[0], grads)
            seen = Seen.with_norm(value, norm_of_all(each))
        arrays, state = apply(grads, state, arrays, seen, value_fn)
        return merged(params, arrays), state, value

    return step


def fused_step(net: Layer, loss: Loss, apply: Apply, need_norm: bool, micro_batches: int) -> Run:
    """Return a step that updates each layer's params as what the walk back collects."""

    def step(
        params: Params,
        state: PyTree,
        x: PyTree,
        target: PyTree,
        key: Array | None = None,
        mask: Array | None = None,
    ) -> tuple[Params, PyTree, Array]:
        check_learned(params)
        bound, depths = net.bind(params, key=key, mask=mask), stack_depths(net, params)
        of_last, before = (bound, x, target), None
        if micro_batches > 1:
            before, of_last = _all_but_last(net, loss, bound, x, target, micro_batches)
        ahead = forward(net, loss, *of_last)
        ct, value = ahead.mean_gradient(), ahead.value
        if before is not None:
            value = mean_with(before.value, value, micro_batches)
        seen = Seen(value)
        if need_norm:
            if before is None:
                each, _ = ahead.back(ct, norms_of_gradient)
            else:
                visit = NormsOfMean(micro_batches)
                each, _ = ahead.back(ct, visit, attached(of_last[0], before.grads))
            seen = Seen.with_norm(value, norm_of_all(each))
        grads = None if before is None else before.grads
        visit = FusedUpdate(apply, of_last[0], state, seen, depths, grads, micro_batches)
        places, _ = ahead.back(ct, visit, visit.places())
        arrays, state = visit.results(places)
        return merged(params, arrays), state, value

    return step


class Before(NamedTuple):
    """The sums over all micro-batches but the last.

    Attributes:
        value: of the loss.
        grads: of the gradients, like the learned params, in at least float32.
    """

    value: Array
    grads: Params


def _all_but_last(
    net: Layer, loss: Loss, params: Params, x: PyTree, target: PyTree, micro_batches: int
) -> tuple[Before, tuple[Params, PyTree, PyTree]]:
    """Return the sums over all micro-batches but the last, and the arguments of that one."""
    check_examples((x, target), micro_batches)
    check_uncoupled(net, params, x)

    def args(i: Any) -> tuple[Params, PyTree, PyTree]:
        return part(params, x, target, None, i, micro_batches)[:3]

    def of_part(i: Array) -> Before:
        ahead = forward(net, loss, *args(i))
        grads, _ = ahead.back(ahead.mean_gradient(), gradient)
        return Before(ahead.value, jax.tree.map(wide, grads))

    return sum_over(of_part, jnp.arange(micro_batches - 1)), args(micro_batches - 1)


def _pair(result: Any) -> tuple[Array, Params]:
    """Return ``(value, grads)``, and raise ``TypeError`` for anything else."""
    if type(result) is not tuple or len(result) != 2:
        raise TypeError(f"value_and_grad= returns (value, grads), not {shapes(result)}")
    return result


def _check_grads(grads: Params, params: Params) -> None:
    """Raise ``ValueError`` unless there is a gradient like every param that is learned."""
    same = jax.tree.structure(grads) == jax.tree.structure(params)
    if not same or jax.tree.map(jnp.shape, grads) != jax.tree.map(jnp.shape, params):
        raise ValueError(
            f"the gradients are {shapes(grads)}, but the learned params {shapes(params)}: an array "
            "without a gradient is marked in init, by jp.Unlearned(array)"
        )
