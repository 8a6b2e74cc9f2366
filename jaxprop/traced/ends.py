"""The equations that end a named scope: those whose results the rest of the program uses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax.extend.core import JaxprEqn

from jaxprop.traced.equations import Program, inlined, rematerialized, struct, variables
from jaxprop.traced.origin import origin_of


def ends_of(program: Program, data: Sequence[bool]) -> dict[int, int]:
    """Return the last equation of each scope with a floating result, made of data, that others use.

    Consecutive equations belong together as long as their scope is the same or, outside any scope,
    their source line. An equation that takes a param and runs a program with scopes inside, such as
    a scan, counts as a separate scope.

    Args:
        program: the program.
        data: for each of its inputs, whether it is data; otherwise it is a view of a param.

    Returns:
        A dict from the number of each such equation to the number of that result.
    """
    jaxpr, scopes = program.jaxpr, _scopes(program, data)
    moving: set[Any] = {var for var, is_data in zip(jaxpr.invars, data, strict=True) if is_data}
    readers: dict[Any, set[int]] = {var: {-1} for var in variables(jaxpr.outvars)}
    for scope, equation in zip(scopes, jaxpr.eqns, strict=True):
        inputs = variables(equation.invars)
        for var in inputs:
            readers.setdefault(var, set()).add(scope)
        if any(var in moving for var in inputs):
            moving.update(equation.outvars)
    ends: dict[int, tuple[int, int]] = {}
    for number, (scope, equation) in enumerate(zip(scopes, jaxpr.eqns, strict=True)):
        for place, var in enumerate(equation.outvars):
            seen = readers.get(var, set()) - {scope}
            if seen and var in moving and jnp.issubdtype(struct(var).dtype, jnp.floating):
                ends[scope] = number, place
    return dict(ends.values())


def _scopes(program: Program, data: Sequence[bool]) -> list[int]:
    """Return the number of each equation's scope."""
    numbers: list[int] = []
    views = {var for var, is_data in zip(program.jaxpr.invars, data, strict=True) if not is_data}
    last: object = None
    for equation in program.jaxpr.eqns:
        origin = origin_of(equation)
        here: object = origin.scope or origin.line
        with_views = [var in views for var in variables(equation.invars)]
        if any(with_views) and _holds_scopes(equation):
            here = equation
        elif with_views and all(with_views):
            views.update(equation.outvars)
        numbers.append((numbers[-1] if numbers else 0) + (here != last))
        last = here
    return numbers


def _holds_scopes(equation: JaxprEqn) -> bool:
    """Return whether the scopes within an equation are watched if it takes a param."""
    program = inlined(equation)
    if program is not None:
        inner = program.jaxpr.eqns
        return any(origin_of(each).scope or _holds_scopes(each) for each in inner)
    return equation.primitive.name in ("scan", "cond") or rematerialized(equation) is not None
