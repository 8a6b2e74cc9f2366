"""The step of a training loop: params, and the optimizer's state, after one batch."""

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
from jaxprop.core.checks import check_count
from jaxprop.core.combinator import stack_depths
from jaxprop.core.cotangents import gradient
from jaxprop.core.describe import shapes
from jaxprop.core.layer import Layer
from jaxprop.core.loss import Loss
from jaxprop.core.mesh import shard_map_axes
from jaxprop.core.tree import learned, merged
from jaxprop.core.types import Params, PyTree
from jaxprop.core.walk import check_net_and_loss, forward, loss_fn
from jaxprop.quantity.micro_batches import check_apart, check_examples, part
from jaxprop.training import gradients
from jaxprop.training.donation import fit_to_donate, owned
from jaxprop.training.fused import FusedUpdate, SumOfSquares, attached, mean_with, sum_of_squares
from jaxprop.training.gradients import Differentiate, ValueAndGrad


class Skipping(NamedTuple):
    """An optimizer's state, and how many steps were skipped because they were not finite.

    Attributes:
        state: the optimizer's state.
        skipped: int32, a scalar.
    """

    state: PyTree
    skipped: Array


class Update:
    """``update(params, state, x, target, key=None, mask=None) -> (params, state, value)``, jitted.

    What ``jp.make_update`` returns. ``update.init(params)`` is the state to start from, and
    ``update.lower(...)`` what ``jax.jit`` calls by that name.
    """

    def __init__(self, step: Callable[..., Any], init: Callable[[Params], PyTree]) -> None:
        self._init = init
        self._step = jax.jit(step, donate_argnames=("params", "state"))

    def init(self, params: Params) -> PyTree:
        """Return the state to start from, in memory of its own."""
        return self._init(params)

    def __call__(
        self,
        params: Params,
        state: PyTree,
        x: PyTree,
        target: PyTree = None,
        key: Array | None = None,
        mask: Array | None = None,
    ) -> tuple[Params, PyTree, Float[Array, ""]]:
        """Return params and state after one step, and the loss before it.

        Args:
            params: the net's params; their memory is used for the result.
            state: the optimizer's state, likewise.
            x: the inputs, with the example on axis 0.
            target: the targets.
            key: a key of ``jax.random.key``, a new one each step, for layers and noise that draw.
            mask: bool (N, T), True where a position is real.
        """
        return self._step(*fit_to_donate((params, state)), x, target, key, mask)

    def lower(self, *args: Any, **given: Any) -> Any:
        """Return the step lowered for these arguments, as ``jax.jit(...).lower`` does."""
        return self._step.lower(*args, **given)


def make_update(
    net: Layer,
    loss: Loss,
    optimizer: optax.GradientTransformation,
    *,
    fused: bool = False,
    max_norm: float | None = None,
    skip_nonfinite: bool = False,
    micro_batches: int = 1,
    value_and_grad: Differentiate | None = None,
) -> Update:
    """Return a jitted ``update(params, state, x, target, key, mask) -> (params, state, value)``.

    params and state are donated: their memory is used for the results, and the arrays that were
    passed in cannot be used again. Arrays that are not learned stay as they are, and have no
    optimizer state. In ``jax.shard_map`` ``value`` is the mean over a device's own examples, and
    the gradient, as that of autodiff there, the sum of what the devices find.

    Args:
        net: the network.
        loss: the loss; its mean over examples is what is minimised, and ``value`` that mean before
            the update.
        optimizer: any optax transformation; start from ``state = update.init(params)``. Those that
            ask for the value, the gradient or the loss as a function (``optax.lbfgs``,
            ``optax.polyak_sgd``, ``reduce_on_plateau``) are given them.
        fused: update each layer's params on the walk back, as soon as their gradient exists, so
            that the gradients of all params are never in memory together. In a ``repeat`` params
            and state stay where they are, whatever the depth. The optimizer's update of a param
            must depend on that param alone, as SGD's with momentum, Adam's, AdamW's and Lion's do,
            with schedules and masks; in a ``repeat`` each entry must be updated by itself. Others
            raise ``ValueError``, ``optax.MultiSteps`` among them: it looks at all gradients to skip
            a step, and keeps a sum of them.
        max_norm: scale the gradient down to at most this global norm before the optimizer sees it,
            as ``optax.clip_by_global_norm`` does. With ``fused`` a walk of its own takes the norm
            first.
        skip_nonfinite: leave params and state as they are, and count the step, where the loss or
            the norm of the gradient is not finite. The state is then ``Skipping(state, skipped)``.
            With ``fused`` this too needs the norm's walk.
        micro_batches: into how many equal parts the batch is split, which are gone through one
            after the other in the memory of one. With ``fused`` the gradients of all but the last
            are summed first, and that sum is as large as params.
        value_and_grad: how to differentiate: a maker that is called with the net and the loss, and
            with ``micro_batches=`` where there are some; by default ``jp.value_and_grad``. Autodiff
            is ``jp.autodiff``, and DP-SGD ``functools.partial(jp.clipped_grad, max_norm=1.0,
            noise_multiplier=1.0)``. Not with ``fused``.

    Raises:
        TypeError: for what is not a net, a loss or an optimizer.
        ValueError: for a max_norm that is not positive, and for options that exclude each other.
    """
    check_net_and_loss(net, loss)
    if isinstance(optimizer, optax.MultiSteps):
        raise TypeError("optimizer: write optax.MultiSteps(...).gradient_transformation()")
    if not isinstance(optimizer, optax.GradientTransformation):
        raise TypeError(
            f"optimizer is not an optax transformation such as optax.sgd(0.1) but {optimizer!r}"
        )
    if max_norm is not None and not max_norm > 0:
        raise ValueError(f"max_norm must be positive, not {max_norm}")
    if fused and value_and_grad is not None:
        raise ValueError("fused walks back by itself: give fused or value_and_grad, not both")
    check_count("micro_batches", micro_batches)
    need_norm = max_norm is not None or skip_nonfinite
    apply = _make_apply(optax.with_extra_args_support(optimizer), max_norm, skip_nonfinite)
    if fused:
        if micro_batches > 1:
            check_apart(net)
        step = _fused(net, loss, apply, need_norm, micro_batches)
    else:
        make = value_and_grad or gradients.value_and_grad
        step = _whole(net, loss, apply, need_norm, _made(make, net, loss, micro_batches))

    def init(params: Params) -> PyTree:
        _check_learned(params)
        state = owned(optimizer.init, learned(params))
        return Skipping(state, jnp.zeros((), jnp.int32)) if skip_nonfinite else state

    return Update(step, init)


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


def _make_apply(
    optimizer: optax.GradientTransformationExtraArgs, max_norm: float | None, skip_nonfinite: bool
) -> Apply:
    """Return ``apply(grads, state, params, seen, value_fn) -> (params, state)``."""

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
        updates, state = optimizer.update(
            grads, state, params, value=seen.value, grad=grads, value_fn=value_fn
        )
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


def _made(make: Differentiate, net: Layer, loss: Loss, micro_batches: int) -> ValueAndGrad:
    """Return how to differentiate, in micro-batches where there are some."""
    if micro_batches == 1:
        return make(net, loss)
    try:
        inspect.signature(make).bind(net, loss, micro_batches=micro_batches)
    except TypeError:
        raise TypeError(
            "value_and_grad is called with micro_batches= where there are some, and this one does "
            "not take it; write functools.partial(jp.clipped_grad, max_norm=1.0), say"
        ) from None
    return make(net, loss, micro_batches=micro_batches)  # pyright: ignore[reportCallIssue]


def _whole(
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
        _check_learned(params)
        given = {name: value for name, value in (("key", key), ("mask", mask)) if value is not None}

        def value_fn(arrays: Params) -> Array:
            return mean_loss(merged(params, arrays), x, target, **given)

        value, grads = differentiate(params, x, target, **given)
        grads, arrays = learned(grads), learned(params)
        _check_grads(grads, arrays)
        seen = Seen(value)
        if need_norm:
            seen = Seen.with_norm(value, optax.tree.norm(jax.tree.map(wide, grads)))
        arrays, state = apply(grads, state, arrays, seen, value_fn)
        return merged(params, arrays), state, value

    return step


def _fused(net: Layer, loss: Loss, apply: Apply, need_norm: bool, micro_batches: int) -> Run:
    """Return a step that updates each layer's params as what the walk back collects."""

    def step(
        params: Params,
        state: PyTree,
        x: PyTree,
        target: PyTree,
        key: Array | None = None,
        mask: Array | None = None,
    ) -> tuple[Params, PyTree, Array]:
        _check_learned(params)
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
                squares, _ = ahead.back(ct, sum_of_squares)
            else:
                visit = SumOfSquares(micro_batches)
                squares, _ = ahead.back(ct, visit, attached(of_last[0], before.grads))
            seen = Seen.with_norm(value, jnp.sqrt(sum(jax.tree.leaves(squares))))
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

    def args(i: Any) -> tuple[Params, PyTree, PyTree]:
        return part(params, x, target, None, i, micro_batches)[:3]

    def of_part(i: Array) -> Before:
        ahead = forward(net, loss, *args(i))
        grads, _ = ahead.back(ahead.mean_gradient(), gradient)
        return Before(ahead.value, jax.tree.map(wide, grads))

    return sum_over(of_part, jnp.arange(micro_batches - 1)), args(micro_batches - 1)


def _check_learned(params: Params) -> None:
    """Raise ``TypeError`` for an array that no gradient can move, and that is not marked so."""
    for path, leaf in jax.tree.leaves_with_path(learned(params)):
        if not jnp.issubdtype(jnp.result_type(leaf), jnp.floating):
            raise TypeError(
                f"params{jax.tree_util.keystr(path)} is {shapes(leaf)}, which no gradient moves: "
                "mark it in init, by jp.Unlearned(array)"
            )


def _check_grads(grads: Params, params: Params) -> None:
    """Raise ``ValueError`` unless there is a gradient for every param that is learned."""
    if jax.tree.structure(grads) != jax.tree.structure(params):
        raise ValueError(
            f"the gradients are {shapes(grads)}, but the learned params {shapes(params)}: an array "
            "without a gradient is marked in init, by jp.Unlearned(array)"
        )
