"""The equations that end a named scope of a program: those whose results the rest of it sees."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax.extend.core import Literal

from jaxprop.traced.equations import Program, place_of, struct


def ends_of(program: Program, data: Sequence[bool]) -> dict[int, int]:
    """Return the last equation of each scope that gives others a floating result made of data.

    Equations one after the other are of one scope as long as their scope is the same; outside of
    any scope, as long as their source line is.

    Args:
        program: the program.
        data: for each of its inputs, whether it is data; else it is a view of a param.

    Returns:
        For each such equation, by its number, the number of that result.
    """
    jaxpr, scopes = program.jaxpr, _scopes(program)
    moving: set[Any] = {var for var, is_data in zip(jaxpr.invars, data, strict=True) if is_data}
    readers: dict[Any, set[int]] = {var: {-1} for var in _variables(jaxpr.outvars)}
    for scope, equation in zip(scopes, jaxpr.eqns, strict=True):
        inputs = _variables(equation.invars)
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


def _scopes(program: Program) -> list[int]:
    """Return the number of each equation's scope."""
    numbers: list[int] = []
    last = None
    for equation in program.jaxpr.eqns:
        place = place_of(equation)
        here = place.scope or place.line
        numbers.append((numbers[-1] if numbers else 0) + (here != last))
        last = here
    return numbers


def _variables(atoms: Sequence[Any]) -> list[Any]:
    return [atom for atom in atoms if not isinstance(atom, Literal)]
