"""From gradients to an update: the norm bound, the loss scale, skipped steps, the optimizer."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jaxtyping import Float

from jaxprop.core.checks import check_count, check_number
from jaxprop.core.mesh import shard_map_axes
from jaxprop.core.serialization import serializable
from jaxprop.core.static import Static
from jaxprop.core.tree import merged
from jaxprop.core.types import Params, PyTree

MOST = float(jnp.finfo(jnp.float32).max)  # a loss scale that is infinite could never shrink


@serializable
class Skipping(NamedTuple):
    """An optimizer's state, and the number of steps that were skipped as not finite.

    Attributes:
        state: the optimizer's state.
        skipped: int32, a scalar.
    """

    state: PyTree
    skipped: Array


@serializable
class Scaling(NamedTuple):
    """The state of ``Skipping`` with the loss scale of the next step.

    Attributes:
        state: the optimizer's state.
        skipped: int32, a scalar.
        scale: float32, a scalar.
        steps: int32, the number of consecutive finite steps since the scale last changed.
    """

    state: PyTree
    skipped: Array
    scale: Array
    steps: Array


class DynamicLossScale(Static):
    """A loss scale that grows until gradients overflow, and then shrinks.

    A step whose loss or gradient is not finite is skipped, and divides the scale by ``factor``.
    After ``interval`` consecutive finite steps, the scale is multiplied by ``factor``
    (Micikevicius et al. 2018, https://arxiv.org/abs/1710.03740). It never falls below 1.

    Args:
        initial: the scale of the first step, at least 1 and finite in float32.
        factor: the factor to multiply or divide the scale by, more than 1.
        interval: the number of consecutive finite steps after which the scale grows.

    Raises:
        TypeError: for an argument that is not a number, and an interval that is not an integer.
        ValueError: for a number out of its range.
    """

    initial: float = 2.0**16
    factor: float = 2.0
    interval: int = 2000

    def __post_init__(self) -> None:
        for name, least in (("initial", 1), ("factor", 1)):
            value = getattr(self, name)
            check_number(f"DynamicLossScale: {name}", value, positive=True)
            if not value <= MOST:
                raise ValueError(f"DynamicLossScale: {name} is finite in float32, not {value}")
            if value < least or (name == "factor" and value == least):
                words = "is more than 1" if name == "factor" else "is at least 1"
                raise ValueError(f"DynamicLossScale: {name} {words}, not {value}")
        check_count("DynamicLossScale: interval", self.interval)

    def start(self, state: PyTree) -> Scaling:
        """Return the initial state, which wraps the optimizer's."""
        skipped, steps = jnp.zeros((2,), jnp.int32)
        return Scaling(state, skipped, jnp.asarray(self.initial, jnp.float32), steps)

    def after(self, state: Scaling, inner: PyTree, finite: Array) -> Scaling:
        """Return the state after a step, which wraps the optimizer's new state ``inner``."""
        steps = jnp.where(finite, state.steps + 1, 0)
        grows = steps == self.interval
        smaller = jnp.maximum(state.scale / self.factor, 1)
        larger = jnp.where(grows, jnp.minimum(state.scale * self.factor, MOST), state.scale)
        return Scaling(
            inner,
            state.skipped + (~finite).astype(jnp.int32),
            jnp.where(finite, larger, smaller),
            jnp.where(grows, 0, steps),
        )


class Options(NamedTuple):
    """The options of an update, apart from the optimizer.

    Attributes:
        max_norm: the bound on the gradient's norm, or None.
        skip_nonfinite: whether to skip a step that is not finite.
        loss_scale: a number, or a ``DynamicLossScale``.
        micro_batches: the number of parts that the batch is split into.
        aux: whether to return auxiliary results next to the loss.
    """

    max_norm: float | Array | None = None
    skip_nonfinite: bool = False
    loss_scale: float | Array | DynamicLossScale = 1.0
    micro_batches: int = 1
    aux: bool = False

    @property
    def skips(self) -> bool:
        return self.skip_nonfinite or isinstance(self.loss_scale, DynamicLossScale)

    @property
    def need_norm(self) -> bool:
        return self.max_norm is not None or self.skips

    def scale(self, state: PyTree) -> float | Array:
        """Return the loss scale of the step that starts from this state."""
        if isinstance(self.loss_scale, DynamicLossScale):
            return state.scale
        return self.loss_scale

    def around(self, state: PyTree) -> PyTree:
        """Return the initial state, which wraps the optimizer's where an option needs it."""
        if isinstance(self.loss_scale, DynamicLossScale):
            return self.loss_scale.start(state)
        return Skipping(state, jnp.zeros((), jnp.int32)) if self.skip_nonfinite else state


class BatchFacts(NamedTuple):
    """Facts of the whole batch that an update may use.

    Attributes:
        value: the loss.
        norm: the norm of the gradient, or None if no option needs it.
        finite: whether both are finite, or None without the norm.
    """

    value: Float[Array, ""]
    norm: Any = None
    finite: Any = None

    @classmethod
    def with_norm(cls, value: Array, norm: Array) -> BatchFacts:
        """Return the facts with the norm; in ``jax.shard_map``, finite means on all devices."""
        finite = jnp.isfinite(value) & jnp.isfinite(norm)
        axes = shard_map_axes()
        if axes:
            finite &= jax.lax.axis_index(axes) >= 0  # always true; makes finite vary by device
            finite = jax.lax.pmin(finite.astype(jnp.int32), axes) > 0
        return cls(value, norm, finite)


@dataclasses.dataclass(frozen=True, eq=False)
class LossOfStep:
    """The loss of a step's batch, as a function of the arrays that the optimizer holds.

    A line search calls it. An optimizer that needs the batch, such as ``jp.kfac``, finds it here:
    a separate argument would reach every transformation in an ``optax.chain``, and optax's line
    search refuses unknown ones.

    Attributes:
        loss: ``loss(params, x, target, **given)``.
        params: the net's params at this step, unlearned arrays included.
        batch: (x, target).
        given: those of key, mask, weights and divisor that were given.
    """

    loss: Callable[..., Array]
    params: Params
    batch: tuple[PyTree, PyTree]
    given: Mapping[str, Any]

    def __call__(self, arrays: Params) -> Array:
        return self.loss(merged(self.params, arrays), *self.batch, **self.given)


Apply = Callable[..., tuple[Params, PyTree]]


def make_apply(optimizer: optax.GradientTransformationExtraArgs, options: Options) -> Apply:
    """Return ``apply(grads, state, params, seen, value_fn) -> (params, state)``."""
    taken = _extra_args(optimizer)
    max_norm, loss_scale = options.max_norm, options.loss_scale

    def apply(
        grads: Params,
        state: PyTree,
        params: Params,
        seen: BatchFacts,
        value_fn: Callable[..., Array],
    ) -> tuple[Params, PyTree]:
        if max_norm is not None:
            scale = jnp.where(seen.norm < max_norm, 1, max_norm / seen.norm)
            grads = jax.tree.map(lambda g: g * scale.astype(g.dtype), grads)
        extra = {"value": seen.value, "grad": grads, "value_fn": value_fn}
        given = {name: extra[name] for name in taken if name in extra}
        updates, state = optimizer.update(grads, state, params, **given)
        return optax.apply_updates(params, updates), state

    def apply_if_finite(
        grads: Params,
        state: PyTree,
        params: Params,
        seen: BatchFacts,
        value_fn: Callable[..., Array],
    ) -> tuple[Params, PyTree]:
        old = params, state.state
        params, inner = jax.tree.map(
            lambda new, old: jax.lax.select(seen.finite, new, old),
            apply(grads, state.state, params, seen, value_fn),
            old,
        )
        if isinstance(loss_scale, DynamicLossScale):
            return params, loss_scale.after(state, inner, seen.finite)
        return params, Skipping(inner, state.skipped + (~seen.finite).astype(jnp.int32))

    return apply_if_finite if options.skips else apply


def _extra_args(optimizer: optax.GradientTransformationExtraArgs) -> tuple[str, ...]:
    """Return the names of the extra arguments that the optimizer's update takes."""
    names = ("value", "grad", "value_fn")
    parameters = inspect.signature(optimizer.update).parameters
    if any(each.kind is inspect.Parameter.VAR_KEYWORD for each in parameters.values()):
        return names
    return tuple(name for name in names if name in parameters)
