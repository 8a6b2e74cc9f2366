"""The step of a training loop: params, and the optimizer's state, after one batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax
from jax import Array
from jaxtyping import Float

from jaxprop import training
from jaxprop.backprop import ahead, check_net_and_loss, loss_fn, mean_gradient
from jaxprop.donation import fit_to_donate, owned
from jaxprop.factored import Factored, gradient, is_factored, wide
from jaxprop.layer import Layer, Step, Total
from jaxprop.leafwise import Leafwise
from jaxprop.losses import Loss
from jaxprop.shapes import shard_map_axes
from jaxprop.training import ValueAndGrad


class Skipping(NamedTuple):
    """An optimizer's state, and how many steps were skipped because they were not finite."""

    state: Any
    skipped: Array


class Update:
    """``update(params, state, x, target, key=None, mask=None) -> (params, state, value)``, jitted.

    ``update.init(params)`` is the state to start from, ``update.lower(...)`` what ``jax.jit`` calls
    by that name.
    """

    def __init__(self, step: Callable[..., Any], init: Callable[[Any], Any]) -> None:
        self.init = init
        self._step = jax.jit(step, donate_argnames=("params", "state"))

    def __call__(
        self,
        params: Any,
        state: Any,
        x: Any,
        target: Any,
        key: chex.PRNGKey | None = None,
        *,
        mask: Any = None,
    ) -> tuple[Any, Any, Array]:
        return self._step(*fit_to_donate((params, state)), x, target, key, mask)

    def lower(self, *args: Any, **given: Any) -> Any:
        return self._step.lower(*args, **given)


def make_update(
    net: Layer,
    loss: Loss,
    optimizer: optax.GradientTransformation,
    *,
    fused: bool = False,
    max_norm: float | None = None,
    skip_nonfinite: bool = False,
    value_and_grad: Callable[[Layer, Loss], ValueAndGrad] | None = None,
) -> Update:
    """A jitted ``update(params, state, x, target, key=None, mask=None) -> (params, state, value)``.

    Args:
        net: the network.
        loss: the loss; its mean over examples is what is minimised, and ``value`` that mean before
            the update.
        optimizer: any optax transformation; start from ``state = update.init(params)``, which is
            ``optimizer.init(params)`` in memory of its own. Those that ask for the value, the
            gradient or the loss as a function (``optax.lbfgs``, ``optax.polyak_sgd``,
            ``reduce_on_plateau``) are given them.
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
            the norm of the gradient is not finite. The state is then ``Skipping(state, skipped)``:
            start from ``update.init(params)``. With ``fused`` this too needs the norm's walk.
        value_and_grad: how to differentiate: a function of (net, loss) that returns
            ``f(params, x, target) -> (value, grads)``; by default ``jp.value_and_grad``. Autodiff
            is ``lambda net, loss: jax.value_and_grad(jp.loss_fn(net, loss))``, which takes neither
            key nor mask. Not with ``fused``, which therefore has no micro-batches
            (``jp.accumulate``) and no ``loss_scale``.

    A key, a new one each step, and a mask are put in the seats of the layers that take one
    (``net.given``); what no layer takes is not used.

    In ``jax.shard_map`` ``value`` is the mean over a device's own examples, and the gradient, as
    that of autodiff there, the sum of what the devices find.

    params and state are donated: their memory is used for the results, and the arrays that were
    passed in cannot be used again.
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
    need_norm = max_norm is not None or skip_nonfinite
    apply = _make_apply(optax.with_extra_args_support(optimizer), max_norm, skip_nonfinite)
    if fused:
        step = _fused(net, loss, apply, need_norm)
    else:
        differentiate = (value_and_grad or training.value_and_grad)(net, loss)
        step = _whole(net, loss, apply, need_norm, differentiate)

    def init(params: Any) -> Any:
        state = owned(optimizer.init, params)
        return Skipping(state, jnp.zeros((), jnp.int32)) if skip_nonfinite else state

    return Update(step, init)


class Seen(NamedTuple):
    """What an update knows of the whole batch: the loss, and if needed the norm of the gradient."""

    value: Float[Array, ""]
    norm: Any = None
    finite: Any = None

    @classmethod
    def with_norm(cls, value: Array, norm: Array) -> Seen:
        """Finite is what is so on all devices: in ``jax.shard_map`` each sees a loss of its own."""
        finite = jnp.isfinite(value) & jnp.isfinite(norm)
        axes = shard_map_axes()
        if axes:
            finite &= jax.lax.axis_index(axes) >= 0  # always so, but on each device its own answer
            finite = jax.lax.pmin(finite.astype(jnp.int32), axes) > 0
        return cls(value, norm, finite)


Apply = Callable[..., tuple[Any, Any]]


def _make_apply(
    optimizer: optax.GradientTransformationExtraArgs, max_norm: float | None, skip_nonfinite: bool
) -> Apply:
    """``apply(grads, state, params, seen, value_fn) -> (params, state)``."""

    def apply(
        grads: Any, state: Any, params: Any, seen: Seen, value_fn: Callable[[Any], Array]
    ) -> tuple[Any, Any]:
        if max_norm is not None:
            scale = jnp.where(seen.norm < max_norm, 1, max_norm / seen.norm)
            grads = jax.tree.map(lambda g: g * scale.astype(g.dtype), grads)
        updates, state = optimizer.update(
            grads, state, params, value=seen.value, grad=grads, value_fn=value_fn
        )
        return optax.apply_updates(params, updates), state

    def apply_if_finite(
        grads: Any, state: Any, params: Any, seen: Seen, value_fn: Callable[[Any], Array]
    ) -> tuple[Any, Any]:
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


Run = Callable[..., tuple[Any, Any, Array]]


def _whole(
    net: Layer, loss: Loss, apply: Apply, need_norm: bool, differentiate: ValueAndGrad
) -> Run:
    """All gradients, and then the update of all params."""
    scalar = loss_fn(net, loss)

    def step(
        params: Any, state: Any, x: Any, target: Any, key: Any = None, mask: Any = None
    ) -> tuple[Any, Any, Array]:
        def value_fn(params: Any) -> Array:
            return scalar(net.given(params, key=key, mask=mask), x, target)

        value, grads = differentiate(net.given(params, key=key, mask=mask), x, target)
        seen = Seen(value)
        if need_norm:
            seen = Seen.with_norm(value, optax.tree.norm(jax.tree.map(wide, grads)))
        return *apply(grads, state, params, seen, value_fn), value

    return step


def _fused(net: Layer, loss: Loss, apply: Apply, need_norm: bool) -> Run:
    """Each layer's update as what the walk back leaves behind."""

    def step(
        params: Any, state: Any, x: Any, target: Any, key: Any = None, mask: Any = None
    ) -> tuple[Any, Any, Array]:
        seats = net.given(params, key=key, mask=mask)
        value, examples, residuals, pull = ahead(net, loss, seats, x, target)
        ct = mean_gradient(loss, residuals, examples)
        seen = Seen(value)
        if need_norm:
            seen = Seen.with_norm(value, jnp.sqrt(sum(jax.tree.leaves(pull(ct, _sq_norms)[0]))))
        leafwise = Leafwise(apply, params, state, seen)

        def leave(step: Step) -> Any:
            return leafwise.updated(step.seat, gradient(step.params, step.d_params))

        seats, _ = pull(ct, leave, net.given(leafwise.attached(), key=key, mask=mask))
        return *leafwise.results(seats), value

    return step


def _sq_norms(step: Step) -> Total:
    """|gradient|^2 of each of a layer's params, from its factors if these are all that it is.

    What rounds a gradient to narrower params may make it infinite; in ``jax.shard_map`` it is a sum
    over devices.
    """

    def sq_norm(leaf: Any) -> Array:
        return leaf.sq_norm_of_sum() if isinstance(leaf, Factored) else jnp.sum(wide(leaf) ** 2)

    narrow = any(wide(param).dtype != param.dtype for param in jax.tree.leaves(step.params))
    whole = gradient(step.params, step.d_params) if narrow or shard_map_axes() else step.d_params
    return Total(tuple(map(sq_norm, jax.tree.leaves(whole, is_leaf=is_factored))))
