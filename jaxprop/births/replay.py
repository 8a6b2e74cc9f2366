"""A program run equation by equation with every value kept, and tests for non-finite values."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal, jaxpr_as_fun

from jaxprop.traced.equations import (
    Program,
    Scan,
    branches_of,
    evaluate,
    inlined,
    rematerialized,
    ruled,
    scan_of,
    while_of,
)

REARRANGING = frozenset(("broadcast_in_dim", "reshape", "squeeze", "convert_element_type"))


class Replay:
    """A program, run equation by equation.

    Attributes:
        program: the program.
        equations: its equations.
        ins: the inputs of each equation.
        outs: the outputs of each equation.
        makers: for each variable that an equation makes, the equation's number.
    """

    def __init__(self, program: Program, args: Sequence[Any]) -> None:
        self.program: Program = program
        self.equations: Sequence[JaxprEqn] = program.jaxpr.eqns
        self.ins: list[list[Any]] = []
        self.outs: list[list[Any]] = []
        self.makers: dict[Any, int] = {}

        def step(equation: JaxprEqn, ins: list[Any]) -> list[Any]:
            outs = evaluate(equation, ins)
            self.makers |= dict.fromkeys(equation.outvars, len(self.outs))
            self.ins.append(ins)
            self.outs.append(outs)
            return outs

        program.run(args, step)

    def maker(self, number: int, position: int) -> JaxprEqn | None:
        """Return the equation that made an input of another one, before it was rearranged.

        None for an input or a constant of the program.
        """
        var = self.equations[number].invars[position]
        while not isinstance(var, Literal) and var in self.makers:
            equation = self.equations[self.makers[var]]
            if equation.primitive.name not in REARRANGING:
                return equation
            var = equation.invars[0]
        return None


class Inside(NamedTuple):
    """The program that an equation runs once, and the first of the equation's inputs it takes."""

    program: Program
    start: int


def inside(equation: JaxprEqn, ins: Sequence[Any]) -> Inside | None:
    """Return the program that an equation runs once; None for a primitive or a loop."""
    if equation.primitive.name == "cond":
        branches = branches_of(equation)
        return Inside(branches[int(np.clip(int(ins[0]), 0, len(branches) - 1))], 1)
    again = rematerialized(equation)
    program = again[0] if again is not None else inlined(equation) or ruled(equation)
    return None if program is None else Inside(program, 0)


class Loop(NamedTuple):
    """The steps of a scan or of a while loop.

    Attributes:
        body: the program of each step, of the constants, the carried values, and its slice of xs.
        consts: the places of the constants among the equation's inputs.
        start: the place of the first carried value among them; the xs come after the carried ones.
        carry: how many values are carried.
        steps: the inputs of the body, in the order in which it ran.
        reverse: whether it iterated over xs from the end.
    """

    body: Program
    consts: range
    start: int
    carry: int
    steps: list[list[Any]]
    reverse: bool

    def at(self, step: int) -> int:
        """Return the index in xs and ys of a step, or the step of an index."""
        return len(self.steps) - 1 - step if self.reverse else step


def loop_of(equation: JaxprEqn, ins: Sequence[Any]) -> Loop | None:
    """Return the steps of a loop, run one by one; None for another equation."""
    if equation.primitive.name == "scan":
        return _scanned(scan_of(equation), ins)
    if equation.primitive.name == "while":
        return _while(equation, ins)
    return None


def _scanned(scan: Scan, ins: Sequence[Any]) -> Loop:
    reverse, behind = scan.options["reverse"], scan.carried.stop
    loop = Loop(scan.body, range(scan.consts), scan.consts, scan.carry, [], reverse)
    run = _compiled(scan.body)
    consts, carried = list(ins[: scan.consts]), list(ins[scan.consts : behind])
    for step in range(scan.length):
        at = scan.length - 1 - step if reverse else step
        given = [*consts, *carried, *(x[at] for x in ins[behind:])]
        loop.steps.append(given)
        carried = list(run(*given))[: scan.carry]
    return loop


def _while(equation: JaxprEqn, ins: Sequence[Any]) -> Loop:
    loop = while_of(equation)
    first = loop.condition_consts
    start = first + loop.body_consts
    goes_on, run = _compiled(loop.condition), _compiled(loop.body)
    consts, carried, steps = list(ins[first:start]), list(ins[start:]), []
    while goes_on(*ins[:first], *carried)[0]:
        steps.append([*consts, *carried])
        carried = list(run(*consts, *carried))
    return Loop(loop.body, range(first, start), start, len(ins) - start, steps, False)


def function_of(program: Program) -> Callable[..., list[Any]]:
    """Return a program that holds a ``Jaxpr`` of JAX as a function of its inputs."""
    assert isinstance(program.jaxpr, Jaxpr)
    return jaxpr_as_fun(ClosedJaxpr(program.jaxpr, program.consts))


def _compiled(program: Program) -> Any:
    return jax.jit(function_of(program))


def not_finite(value: Any) -> np.ndarray | None:
    """Return where an array is not finite; None if it is finite everywhere."""
    if value is None or not hasattr(value, "dtype"):
        value = None if value is None else np.asarray(value)
    if value is None or not jnp.issubdtype(value.dtype, jnp.inexact):
        return None
    found = ~np.isfinite(numbers(value))
    return found if found.any() else None


def has_nan(value: Any) -> bool:
    """Return whether an array has an element that is not a number."""
    return not_finite(value) is not None and bool(np.isnan(numbers(value)).any())


def numbers(value: Any) -> np.ndarray:
    """Return an array as NumPy computes with it: narrow floats in float32."""
    value = np.asarray(value)
    narrow = value.dtype.kind == "V" or (value.dtype.kind == "f" and value.dtype.itemsize < 4)
    return value.astype(np.float32) if narrow else value


def with_values(values: Sequence[Any], at: Sequence[int], new: Sequence[Any]) -> list[Any]:
    """Return the values, with new ones in some places."""
    result = list(values)
    for index, value in zip(at, new, strict=True):
        result[index] = value
    return result
