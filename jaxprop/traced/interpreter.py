"""A traced program run again, with taps where params meet data."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.extend.core import JaxprEqn

from jaxprop.core.arrays import is_floating, is_inexact
from jaxprop.core.forms import Scanned
from jaxprop.core.mesh import varying_zero
from jaxprop.traced.ends import ends_of
from jaxprop.traced.equal import Equal
from jaxprop.traced.equations import (
    Dot,
    Program,
    branches_of,
    clips_ids,
    convolution_of,
    dot_of,
    evaluate,
    first_of,
    for_tracing,
    inlined,
    looks_up_rows,
    primitive_of,
    rematerialized,
    scan_of,
    struct,
)
from jaxprop.traced.moving import MOVING
from jaxprop.traced.origin import origin_of
from jaxprop.traced.taps import LookUp, MatrixProduct, Meeting, Taps, Use
from jaxprop.traced.views import View, bare, is_data, placed, plain


def run(program: Program, args: Sequence[Any], taps: Taps) -> list[Any]:
    """Run a program with taps on inputs that include views, and return its outputs."""
    outer, numbers, equal = taps.within, itertools.count(), taps.equal
    taps.equal = Equal(program)
    ends = ends_of(program, list(map(is_data, args))) if taps.watching else {}

    def step(equation: JaxprEqn, ins: list[Any]) -> list[Any]:
        end = ends.get(next(numbers))
        if end is None and not any(isinstance(value, View) for value in ins):
            return evaluate(equation, ins)
        taps.within = (*outer, origin_of(equation))
        outs = _watched(taps, equation, ins, end) if taps.watching else _step(taps, equation, ins)
        taps.within = outer
        return outs

    outs = program.run(args, step)
    taps.equal = equal
    return outs


def _watched(taps: Taps, equation: JaxprEqn, ins: list[Any], end: int | None) -> list[Any]:
    """Return the outputs of an equation; if it ends a scope, one of them is watched."""
    before = taps.watched()
    tapped = any(isinstance(value, View) for value in ins)
    outs = _step(taps, equation, ins) if tapped else evaluate(equation, ins)
    if taps.watched() > before:  # scopes within it
        return outs
    if not all(isinstance(out, View) for out in outs):
        views = [value for value in ins if isinstance(value, View)]
        taps.met |= {(part.param, view.scans): None for view in views for part in view.parts}
    if end is not None and not isinstance(outs[end], View):
        outs[end] = taps.watch(equation, outs[end])
    return outs


def _step(taps: Taps, equation: JaxprEqn, ins: list[Any]) -> list[Any]:
    name = primitive_of(equation)
    result = None
    if name in MOVING:
        result = MOVING[name](equation, ins)
    elif name in STEPS:
        result = STEPS[name](equation, ins, taps)
    elif (program := inlined(equation)) is not None:
        return run(program, ins, taps)
    elif (again := rematerialized(equation)) is not None:
        return _rematerialized(*again, ins, taps)
    if result is not None:
        return result
    if not any(is_inexact(struct(var)) for var in equation.outvars):
        return evaluate(equation, list(map(bare, ins)))  # nothing goes back through it
    return evaluate(equation, list(map(plain, ins)))


def _meet(
    meeting: Meeting, view: View, x: Any, equation: JaxprEqn, ins: list[Any], taps: Taps
) -> list[Any]:
    (y,) = evaluate(equation, list(map(bare, ins)))
    use = Use(
        meeting,
        view.parts,
        view.joined,
        view.value.shape,
        view.scans,
        equation.primitive.name,
        taps.line,
        taps.scope,
    )
    if isinstance(meeting, MatrixProduct) and not is_floating(x):  # a product of two dtypes
        x = x.astype(y.dtype)
    data = x
    if view.scale is not None:
        wider = max(x.dtype, y.dtype, key=lambda dtype: dtype.itemsize)
        data = x.astype(wider) * jnp.asarray(view.scale, wider)
    return [taps.add(use, data, y, equation.outvars[0])]


def _product(equation: JaxprEqn, ins: list[Any], taps: Taps) -> list[Any] | None:
    left, right = ins
    if isinstance(left, View) and isinstance(right, View):
        return None
    if not is_floating(struct(equation.outvars[0])):  # a real param, and complex data
        return None
    data_first = isinstance(right, View)
    dot = dot_of(equation)
    if not data_first:
        dot = Dot(*((right, left) for left, right in dot))
    view, x = (right, left) if data_first else (left, right)
    return _meet(MatrixProduct(dot, data_first), view, x, equation, ins, taps)


def _convolution(equation: JaxprEqn, ins: list[Any], taps: Taps) -> list[Any] | None:
    x, view = ins
    convolution = convolution_of(equation)
    y = struct(equation.outvars[0])
    if isinstance(x, View) or view.joined is not None or convolution is None:
        return None
    if not is_floating(y) or not y.size or not convolution.strides:
        return None
    frames = x.shape[convolution.x[0]] > 1 or not all(view.scans)
    if len(convolution.strides) + frames > 3:
        return None
    return _meet(convolution, view, x, equation, ins, taps)


def _look_up(equation: JaxprEqn, ins: list[Any], taps: Taps) -> list[Any] | None:
    view, ids = ins
    if isinstance(ids, View) or view.joined is not None or view.scale is not None:
        return None
    if not looks_up_rows(equation):
        return None
    return _meet(LookUp(clips_ids(equation)), view, ids, equation, ins, taps)


def _scan(equation: JaxprEqn, ins: list[Any], taps: Taps) -> list[Any]:
    scan = scan_of(equation)
    carried = list(map(plain, ins[scan.consts : scan.consts + scan.carry]))
    stacks = ins[scan.consts + scan.carry :]
    consts = ins[: scan.consts]
    constants = list(map(bare, consts))
    asked: set[int] = set()

    def body(taps: Taps, carried: list[Any], values: list[Any], owns: list[Any]) -> list[Any]:
        """Run one step; ``owns`` are the values, with the example's own share where asked for."""
        args: list[Any] = []
        for index, (given, value, own) in enumerate(
            zip([*consts, *stacks], values, owns, strict=True)
        ):
            if isinstance(given, View):
                value = _in_scan(given, index >= scan.consts, value, own, index, asked)
            args.append(value)
        return list(
            map(plain, run(scan.body, args[: scan.consts] + carried + args[scan.consts :], taps))
        )

    def first_run(carried: list[Any], stacks: list[Any]) -> list[Any]:
        values = constants + stacks
        outs = body(found, carried, values, values)
        found.keep_shapes()
        return outs

    layers = any(isinstance(value, View) for value in stacks)
    found = taps.inside(None, layers)
    slices = [first_of(bare(stack)) for stack in stacks]
    jax.eval_shape(first_run, list(map(for_tracing, carried)), slices)

    owns = [
        plain(value) if index in asked else bare(value)
        for index, value in enumerate([*consts, *stacks])
    ]

    def step(carried: list[Any], here: Any) -> tuple[list[Any], Any]:
        zeros, values, stack_owns = here
        inner = taps.inside(zeros, layers)
        outs = body(inner, carried, constants + values, owns[: scan.consts] + stack_owns)
        return outs[: scan.carry], (outs[scan.carry :], inner.xs)

    here = taps.next(len(found.uses)), list(map(bare, stacks)), owns[scan.consts :]
    carried, (outs, xs) = jax.lax.scan(step, carried, here, **scan.options)
    zeros = jax.tree.map(
        lambda zero: jax.ShapeDtypeStruct((scan.length, *zero.shape), zero.dtype), found.zeros
    )
    taps.note(found.uses, xs, zeros)
    return [*carried, *outs]


def _in_scan(
    view: View, layers: bool, value: Array, own: Array, index: int, asked: set[int]
) -> View:
    """Return a view as a scan's body sees it."""
    parts, joined = view.parts, view.joined
    if layers:
        parts = tuple(part._replace(moves=(*part.moves, Scanned())) for part in parts)
    if layers and joined == 0:
        joined, axis = None, sum(view.scans)
        parts = tuple(part._replace(layers=axis) for part in parts)
    elif layers and joined is not None:
        joined -= 1

    def ask() -> Array:
        asked.add(index)
        return own

    return View(parts, value, ask, joined, view.scale, (*view.scans, layers))


def _switch(equation: JaxprEqn, ins: list[Any], taps: Taps) -> list[Any] | None:
    """Run a choice of branches: all are tapped, and those not taken have zeros for their data."""
    index, *args = ins
    if isinstance(index, View):
        return None
    branches = branches_of(equation)
    found = [taps.inside() for _ in branches]
    data = list(filter(is_data, args))
    for branch, inner in zip(branches, found, strict=True):
        _look_ahead(branch, args, inner)
    zeros = taps.next(sum(len(inner.uses) for inner in found))

    def chosen(number: int) -> Callable[[list[Any]], Any]:
        start = sum(len(inner.uses) for inner in found[:number])

        def f(data: list[Any]) -> Any:
            here = None if zeros is None else zeros[start : start + len(found[number].uses)]
            inner = taps.inside(here)
            outs = _run_with(branches[number], args, data, inner)
            xs = [
                inner.xs if n == number else jax.tree.map(jnp.zeros_like, other.xs)
                for n, other in enumerate(found)
            ]
            xs = jax.tree.map(lambda x: x + varying_zero(data, x.dtype), xs)
            return outs, [x for each in xs for x in each]

        return f

    index = jnp.asarray(index, jnp.int32)
    outs, xs = jax.lax.switch(index, [chosen(n) for n in range(len(branches))], data)
    for inner in found:
        taps.note(inner.uses, xs[: len(inner.uses)], inner.zeros)
        xs = xs[len(inner.uses) :]
    return outs


def _rematerialized(
    program: Program, options: dict[str, Any], ins: list[Any], taps: Taps
) -> list[Any]:
    """Run a part that is computed again on the way back."""
    found, data = taps.inside(again=True), list(filter(is_data, ins))
    _look_ahead(program, ins, found)

    def f(zeros: Sequence[Any] | None, data: list[Any]) -> Any:
        inner = taps.inside(zeros, again=True)
        return _run_with(program, ins, data, inner), inner.xs

    outs, xs = jax.checkpoint(f, **options)(taps.next(len(found.uses)), data)
    taps.note(found.uses, xs, found.zeros)
    return outs


def _run_with(program: Program, args: list[Any], data: list[Any], taps: Taps) -> list[Any]:
    """Return the outputs of a program for these data, with the views among ``args``."""
    return list(map(plain, run(program, placed(data, list(map(is_data, args)), args), taps)))


def _look_ahead(program: Program, args: list[Any], taps: Taps) -> None:
    """Find the uses in a program, from the shapes of its data."""

    def first_run(data: list[Any]) -> list[Any]:
        outs = _run_with(program, args, data, taps)
        taps.keep_shapes()
        return outs

    jax.eval_shape(first_run, list(map(for_tracing, filter(is_data, args))))


STEPS: dict[str, Callable[[JaxprEqn, list[Any], Taps], list[Any] | None]] = {
    "dot_general": _product,
    "conv_general_dilated": _convolution,
    "gather": _look_up,
    "scan": _scan,
    "cond": _switch,
}
