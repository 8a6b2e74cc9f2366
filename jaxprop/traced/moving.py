"""Equations that only rearrange the entries of a param, cast them, or multiply them by a number."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jax import Array
from jax.extend.core import JaxprEqn

from jaxprop.core.arrays import is_floating
from jaxprop.core.forms import Move, Reshaped, Sliced, Transposed, Turned
from jaxprop.traced.equations import (
    evaluate,
    joined_axis_of,
    kept_axes_of,
    order_of,
    permutation_of,
    pieces_of,
    reversed_axes_of,
    rule_of,
    slice_of,
    struct,
)
from jaxprop.traced.views import ParamPart, View, bare, plain

Moving: TypeAlias = Callable[[JaxprEqn, list[Any]], list[Any] | None]
"""Returns the outputs of an equation, some of them views; None if none of them is a view."""


def _moving(
    move_of: Callable[[JaxprEqn, View], Move | None],
) -> Moving:
    """Return the step for an equation that moves the entries of its one input."""

    def step(equation: JaxprEqn, ins: list[Any]) -> list[Any] | None:
        view, *rest = ins
        if rest or not isinstance(view, View):
            return None
        move = move_of(equation, view)
        if move is not None and view.joined is not None:
            return None
        return [view.moved(move, lambda value: evaluate(equation, [value])[0])]

    return step


def _reshape(equation: JaxprEqn, ins: list[Any]) -> list[Any] | None:
    """Reshape a view, whose axes a column-major reshape puts into another order first."""
    order = order_of(equation)
    if order is None:
        return RESHAPE(equation, ins)
    view, *rest = ins
    if rest or view.joined is not None:
        return None
    shape = struct(equation.outvars[0]).shape
    view = view.moved(Transposed(order), lambda value: jnp.transpose(value, order))
    return [view.moved(Reshaped(view.value.shape), lambda value: value.reshape(shape))]


def _split(equation: JaxprEqn, ins: list[Any]) -> list[Any] | None:
    (view,), (sizes, axis) = ins, pieces_of(equation)
    if view.joined is not None:
        return None

    def piece(start: int, size: int) -> View:
        starts, strides = [0] * view.value.ndim, (1,) * view.value.ndim
        starts[axis] = start
        move = Sliced(view.value.shape, tuple(starts), strides)
        return view.moved(
            move, lambda value: jax.lax.slice_in_dim(value, start, start + size, axis=axis)
        )

    starts = itertools.accumulate(sizes, initial=0)
    return [piece(*each) for each in zip(starts, sizes, strict=False)]


def _broadcast(equation: JaxprEqn, ins: list[Any]) -> list[Any] | None:
    """Reshape a view by a broadcast that only adds axes of length 1, with the others in order."""
    out, kept = struct(equation.outvars[0]), kept_axes_of(equation)
    if len(ins) > 1 or out.size != ins[0].value.size or list(kept) != sorted(kept):
        return None
    return RESHAPE(equation, ins)


def _cast(equation: JaxprEqn, ins: list[Any]) -> list[Any] | None:
    return STAY(equation, ins) if is_floating(struct(equation.outvars[0])) else None


def _scaling(factor: Callable[[Any], Any]) -> Moving:
    """Return the step for a product of a view and a number, in either order."""

    def step(equation: JaxprEqn, ins: list[Any]) -> list[Any] | None:
        at = int(isinstance(ins[-1], View))
        view, others = ins[at], [other for index, other in enumerate(ins) if index != at]
        if any(isinstance(other, View) or jnp.shape(other) for other in others):
            return None
        if equation.primitive.name == "div" and at:
            return None

        def f(value: Array) -> Array:
            return evaluate(equation, [value, *others] if not at else [*others, value])[0]

        return [view.scaled(factor(*others), f)]

    return step


def _negated(equation: JaxprEqn, ins: list[Any]) -> list[Any]:
    return [ins[0].scaled(-1, lambda value: evaluate(equation, [value])[0])]


def _joined(equation: JaxprEqn, ins: list[Any]) -> list[Any] | None:
    return _side_by_side(equation, ins, ins)


def _stacked(equation: JaxprEqn, ins: list[Any]) -> list[Any] | None:
    axis = joined_axis_of(equation)

    def entry(value: Any) -> Any:
        if not isinstance(value, View):
            return jnp.expand_dims(value, axis)
        return value.moved(Reshaped(value.value.shape), lambda v: jnp.expand_dims(v, axis))

    return _side_by_side(equation, ins, list(map(entry, ins)))


def _side_by_side(equation: JaxprEqn, ins: list[Any], entries: list[Any]) -> list[Any] | None:
    """Return a view of several params side by side, each with its range of the joined axis."""
    axis, start = joined_axis_of(equation), 0
    parts: list[ParamPart] = []
    views = [value for value in entries if isinstance(value, View)]
    if any(v.joined is not None or v.scale is not None for v in views):
        return None
    if any(v.scans != views[0].scans for v in views):
        return None
    for value in entries:
        length = bare(value).shape[axis]
        if isinstance(value, View):
            parts.append(value.parts[0]._replace(start=start, stop=start + length))
        start += length
    (joined,) = evaluate(equation, list(map(bare, ins)))

    def own() -> Array:
        return evaluate(equation, list(map(plain, ins)))[0]

    return [View(tuple(parts), joined, own, axis, scans=views[0].scans)]


def _passed_on(equation: JaxprEqn, ins: list[Any]) -> list[Any] | None:
    """Return the result of ``jaxprop_passed_on`` as a view, since its cotangent is the view's."""
    if rule_of(equation) != "jaxprop_passed_on" or isinstance(ins[0], View):
        return None
    y, view = ins
    return [view.moved(None, lambda value: evaluate(equation, [y, value])[0])]


def _cut(equation: JaxprEqn, ins: list[Any]) -> list[Any] | None:
    """Return bare values for ``jaxprop_cut``: only derivatives further out can see the params."""
    return list(map(bare, ins)) if rule_of(equation) == "jaxprop_cut" else None


RESHAPE = _moving(lambda equation, view: Reshaped(view.value.shape))
STAY = _moving(lambda equation, view: None)
TIMES = _scaling(lambda factor: factor)
MOVING: dict[str, Moving] = {
    "concatenate": _joined,
    "stack": _stacked,
    "reshape": _reshape,
    "squeeze": RESHAPE,
    "broadcast_in_dim": _broadcast,
    "transpose": _moving(lambda equation, view: Transposed(permutation_of(equation))),
    "slice": _moving(lambda equation, view: Sliced(view.value.shape, *slice_of(equation)[::2])),
    "split": _split,
    "rev": _moving(lambda equation, view: Turned(reversed_axes_of(equation))),
    "convert_element_type": _cast,
    "copy": STAY,
    "sharding_constraint": STAY,
    "stop_gradient": lambda equation, ins: evaluate(equation, [ins[0].value]),
    "mul": TIMES,
    "div": _scaling(lambda factor: 1 / factor),
    "neg": _negated,
    "custom_jvp_call": _cut,
    "custom_vjp_call": _passed_on,
}
