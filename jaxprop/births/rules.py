"""The search for a non-finite cotangent inside a function's custom derivative rule."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
from jax import Array
from jax.extend.core import JaxprEqn

from jaxprop.births.ahead import Born, Within, look
from jaxprop.births.replay import has_nan, with_values
from jaxprop.traced.equations import Program, evaluate
from jaxprop.traced.origin import Line, line_of_error


def look_in_rule(
    equation: JaxprEqn,
    ins: Sequence[Any],
    index: int,
    cts: Sequence[Any],
    within: tuple[Within, ...],
) -> Born | None:
    """Look inside the rule of a ``jax.custom_vjp`` or ``jax.custom_jvp`` function.

    Args:
        equation: the equation that calls the function.
        ins: its inputs.
        index: the index of the input whose cotangent is not finite.
        cts: the cotangents of its outputs, None for a zero.
        within: the equations that the rule is a part of; the last is the one that calls it.
    """
    live = [number for number, ct in enumerate(cts) if ct is not None]
    some = [cts[number] for number in live]

    def joint(value: Array, some: list[Any]) -> list[Any]:
        def of_one(value: Array) -> list[Any]:
            outs = evaluate(equation, with_values(ins, [index], [value]))
            return [outs[number] for number in live]

        return list(jax.vjp(of_one, value)[1](some))

    program = Program.of(jax.make_jaxpr(joint)(ins[index], some))
    born = look(program, [ins[index], *some], [0], within).first
    if born is None:
        return None

    def run() -> Any:
        return joint(ins[index], some)

    nan = has_nan(born.results[born.position])
    return born._replace(back=True, line=_line_in_rule(run, nan))


def _line_in_rule(run: Any, nan: bool) -> Line | None:
    """Return the line in the rule, from an error: JAX gives its equations the line of the call."""
    try:
        with jax.debug_nans(nan), jax.debug_infs(not nan), jax.disable_jit():
            jax.block_until_ready(run())
    except FloatingPointError as error:
        return line_of_error(error, __file__)
    return None
