"""The search for the equation that made a cotangent, by differentiating equation by equation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import JaxprEqn, Literal

from jaxprop.births.ahead import Born, Within
from jaxprop.births.replay import (
    Replay,
    function_of,
    inside,
    loop_of,
    not_finite,
    numbers,
    with_values,
)
from jaxprop.births.rules import look_in_rule
from jaxprop.core.arrays import is_inexact
from jaxprop.traced.equations import (
    Program,
    branches_of,
    evaluate,
    inlined,
    rematerialized,
    ruled,
    scan_of,
)

Fn = Callable[..., Sequence[Any]]


class Pulled(NamedTuple):
    """The cotangents of one equation's outputs and inputs; None stands for a symbolic zero."""

    cts: list[Any]
    ds: list[Any]


def look_back(
    program: Program,
    args: Sequence[Any],
    moving: Sequence[bool],
    cts: Sequence[Any],
    wanted: Sequence[int],
    within: tuple[Within, ...] = (),
) -> Born | None:
    """Return the first equation on the way back that made a non-finite cotangent of finite ones.

    Args:
        program: the program.
        args: its inputs.
        moving: for each input, whether the program is differentiated with respect to it.
        cts: the cotangents of its outputs, None for a zero.
        wanted: the numbers of the inputs whose cotangents are not finite.
        within: the equations that the program is a part of.
    """
    replay = Replay(program, args)
    totals, pulls = _walked(replay, moving, cts)
    invars = program.jaxpr.invars
    todo, met = [invars[index] for index in wanted], set()
    births: dict[int, tuple[int, bool]] = {}
    while todo:
        var = todo.pop()
        if var in met or not_finite(totals.get(var)) is None:
            continue
        met.add(var)
        parts = [
            (number, index)
            for number, pulled in pulls.items()
            for index, each in enumerate(replay.equations[number].invars)
            if each is var and pulled.ds[index] is not None
        ]
        bad = [part for part in parts if not_finite(pulls[part[0]].ds[part[1]]) is not None]
        if not bad and parts:
            births.setdefault(min(parts)[0], (min(parts)[1], True))
        for number, index in bad:
            outs = zip(replay.equations[number].outvars, pulls[number].cts, strict=True)
            before = [out for out, ct in outs if not_finite(ct) is not None]
            todo += before
            if not before:
                births.setdefault(number, (index, False))
    if not births:
        return None
    number = max(births)
    index, summed = births[number]
    return _born(replay, number, index, pulls[number], summed, moving_in(replay, moving), within)


def _born(
    replay: Replay,
    number: int,
    index: int,
    pulled: Pulled,
    summed: bool,
    moving: set[Any],
    within: tuple[Within, ...],
) -> Born:
    """Return the birth at an equation, or inside it."""
    equation, ins = replay.equations[number], replay.ins[number]
    here = Born(replay, number, index, pulled.ds, within, pulled.cts, True, summed)
    if summed:
        total = sum(d for d in pulled.ds if d is not None and d.shape == pulled.ds[index].shape)
        return here._replace(results=[*pulled.ds[:index], total, *pulled.ds[index + 1 :]])
    around = (*within, Within(replay, number))
    flags = [not isinstance(var, Literal) and var in moving for var in equation.invars]
    inner = None
    part = inside(equation, ins)
    if ruled(equation) is not None:
        inner = look_in_rule(equation, ins, index, pulled.cts, around)
    elif part is not None:
        args, start = ins[part.start :], part.start
        inner = look_back(part.program, args, flags[start:], pulled.cts, [index - start], around)
    elif equation.primitive.name == "scan":
        inner = _in_scan(equation, ins, flags, pulled.cts, index, around)
    return here if inner is None else inner


def _walked(
    replay: Replay, moving: Sequence[bool], cts: Sequence[Any]
) -> tuple[dict[Any, Any], dict[int, Pulled]]:
    """Return the cotangent of each variable, and the ``Pulled`` of each equation, by number."""
    totals: dict[Any, Any] = {}
    pulls: dict[int, Pulled] = {}
    moves = moving_in(replay, moving)

    def add(var: Any, ct: Any) -> None:
        totals[var] = totals[var] + ct if var in totals else ct

    for var, ct in zip(replay.program.jaxpr.outvars, cts, strict=True):
        if ct is not None and not isinstance(var, Literal) and var in moves:
            add(var, ct)
    for number in reversed(range(len(replay.equations))):
        equation = replay.equations[number]
        here = [totals.get(var) for var in equation.outvars]
        at = [
            index
            for index, var in enumerate(equation.invars)
            if not isinstance(var, Literal) and var in moves
        ]
        if not at or all(ct is None for ct in here):
            continue

        def f(*values: Any, equation: JaxprEqn = equation) -> Sequence[Any]:
            return evaluate(equation, values)

        ds = pull(f, replay.ins[number], at, here)
        pulls[number] = Pulled(here, ds)
        for var, d in zip(equation.invars, ds, strict=True):
            if d is not None:
                add(var, d)
    return totals, pulls


def pull(f: Fn, ins: Sequence[Any], at: Sequence[int], cts: Sequence[Any]) -> list[Any]:
    """Return the cotangents of a function's inputs, with None for a symbolic zero of JAX.

    Only the outputs with a cotangent are differentiated, as in JAX, which does not multiply the
    zeros of the others by slopes that may be infinite.

    Args:
        f: the function, from values to a list of values.
        ins: the inputs.
        at: the indices of the inputs to return cotangents of.
        cts: the cotangents of the outputs, None for a zero.
    """
    live = [index for index, ct in enumerate(cts) if ct is not None]
    some = [cts[index] for index in live]

    def of_moving(*moving: Any) -> list[Any]:
        outs = f(*with_values(ins, at, moving))
        return [outs[index] for index in live]

    moving = [jnp.asarray(ins[index]) for index in at]
    _, back = jax.vjp(of_moving, *moving)
    ds = list(back(some))
    if not all(numbers(d).any() for d in ds):
        jaxpr = jax.make_jaxpr(lambda moving, cts: jax.vjp(of_moving, *moving)[1](cts))(
            moving, some
        )
        flags = moved(Program.of(jaxpr), [False] * len(moving) + [True] * len(some))
        ds = [d if reached else None for d, reached in zip(ds, flags, strict=True)]
    return with_values([None] * len(ins), at, ds)


def _in_scan(
    equation: JaxprEqn,
    ins: Sequence[Any],
    flags: Sequence[bool],
    cts: Sequence[Any],
    index: int,
    within: tuple[Within, ...],
) -> Born | None:
    """Go back through a scan step by step, and look inside the first step that goes wrong."""
    loop, scan = loop_of(equation, ins), scan_of(equation)
    assert loop is not None
    behind = scan.consts + scan.carry
    flags = [
        *flags[: scan.consts],
        *_carried(scan.body, flags, scan.consts, behind),
        *flags[behind:],
    ]
    at = [position for position, moves in enumerate(flags) if moves]
    watched = {index, *range(scan.consts, behind)}
    f = jax.jit(function_of(scan.body))
    carried = list(cts[: scan.carry])
    for step in reversed(range(len(loop.steps))):
        row = loop.at(step)
        here = [*carried, *(None if ct is None else ct[row] for ct in cts[scan.carry :])]
        ds = pull(f, loop.steps[step], at, here)
        bad = [i for i, d in enumerate(ds) if i in watched and not_finite(d) is not None]
        if bad:
            around = (*within[:-1], within[-1]._replace(step=row))
            return look_back(scan.body, loop.steps[step], flags, here, bad, around)
        carried = ds[scan.consts : behind]
    return None


def _carried(body: Program, flags: Sequence[bool], consts: int, behind: int) -> list[bool]:
    """Return which of the carried values depend on moving inputs, in any step."""
    carried = list(flags[consts:behind])
    while True:
        outs = moved(body, [*flags[:consts], *carried, *flags[behind:]])
        new = [a or b for a, b in zip(carried, outs, strict=False)]
        if new == carried:
            return carried
        carried = new


def moving_in(replay: Replay, moving: Sequence[bool]) -> set[Any]:
    """Return the variables of a replay that depend on moving inputs."""
    moves: set[Any] = set()
    _spread(replay.program, moving, moves)
    return moves


def moved(program: Program, moving: Sequence[bool]) -> list[bool]:
    """Return which outputs of a program depend on moving inputs."""
    moves: set[Any] = set()
    _spread(program, moving, moves)
    return [not isinstance(var, Literal) and var in moves for var in program.jaxpr.outvars]


def _spread(program: Program, moving: Sequence[bool], moves: set[Any]) -> None:
    moves |= {var for var, moves_ in zip(program.jaxpr.invars, moving, strict=True) if moves_}
    for equation in program.jaxpr.eqns:
        flags = [not isinstance(var, Literal) and var in moves for var in equation.invars]
        if any(flags) and equation.primitive.name != "stop_gradient":
            outs = zip(equation.outvars, _moved_by(equation, flags), strict=True)
            moves |= {var for var, flag in outs if flag and is_inexact(var.aval)}


def _moved_by(equation: JaxprEqn, flags: list[bool]) -> list[bool]:
    name, again = equation.primitive.name, rematerialized(equation)
    program = again[0] if again is not None else inlined(equation) or ruled(equation)
    if program is not None:
        return moved(program, flags)
    if name == "cond":
        branches = [moved(branch, flags[1:]) for branch in branches_of(equation)]
        return [any(each) for each in zip(*branches, strict=True)]
    if name == "scan":
        scan = scan_of(equation)
        behind = scan.consts + scan.carry
        carried = _carried(scan.body, flags, scan.consts, behind)
        return [
            *carried,
            *moved(scan.body, [*flags[: scan.consts], *carried, *flags[behind:]])[scan.carry :],
        ]
    return [True] * len(equation.outvars)
