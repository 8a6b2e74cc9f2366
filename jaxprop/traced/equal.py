"""Variables of a program that have the same cotangent, such as the terms of a sum."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

from jax.extend.core import JaxprEqn, Literal

from jaxprop.traced.equations import Program, linear, struct


class Equal:
    """The variables of a program, grouped by their cotangents.

    The cotangent of a variable is the sum of what each equation that reads it hands back. An
    addition hands back the cotangent of its result to each input that it does not broadcast. A
    slice, or another equation that is linear in one input, hands back something that depends only
    on the operation and the cotangents of its results. Nothing is known of any other equation.
    Variables of which the same is known have the same cotangent.
    """

    def __init__(self, program: Program) -> None:
        self._program = program
        self._kinds: dict[Any, int] | None = None
        self._first: dict[int, int] = {}

    def first(self, var: Any, place: int) -> int:
        """Return the first place that was asked about whose cotangent is the same as var's.

        Args:
            var: the variable of the result at this place.
            place: the number of the place.
        """
        if self._kinds is None:
            self._kinds = _kinds(self._program)
        return self._first.setdefault(self._kinds[var], place)


def _kinds(program: Program) -> dict[Any, int]:
    """Return a number for each variable, the same for variables with the same cotangent."""
    numbers: dict[Hashable, int] = {}
    kinds: dict[Any, int] = {}
    back: dict[Any, list[Hashable]] = {}

    def kind(var: Any) -> int:
        parts = back.get(var, [])
        if len(parts) == 1 and isinstance(parts[0], int):
            return parts[0]
        known = str(var.aval), *sorted(parts, key=repr)  # without readers it is 0, of this shape
        return numbers.setdefault(known, len(numbers))

    for place, var in enumerate(program.jaxpr.outvars):
        if not isinstance(var, Literal):
            back.setdefault(var, []).append(("y", place))
    for number, equation in reversed(list(enumerate(program.jaxpr.eqns))):
        for var in equation.outvars:
            kinds[var] = kind(var)
        for place, var in enumerate(equation.invars):
            if not isinstance(var, Literal):
                back.setdefault(var, []).append(_handed_back(equation, number, place, kinds))
    return kinds


def _handed_back(equation: JaxprEqn, number: int, place: int, kinds: dict[Any, int]) -> Hashable:
    """Return what an equation hands back to one of its inputs: a kind, or a name for it."""
    outs = tuple(kinds[var] for var in equation.outvars)
    if equation.primitive.name in ("add", "add_any"):
        whole = struct(equation.invars[place]).shape == struct(equation.outvars[0]).shape
        return outs[0] if whole else (number, place)
    same = linear(equation)
    return (number, place) if same is None else (same, outs)
