"""The search for the equation that made a value on the way forward, starting at the value."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax.extend.core import JaxprEqn, Literal

from jaxprop.births.replay import Loop, Replay, has_nan, inside, loop_of, not_finite
from jaxprop.traced.equations import Program, evaluate
from jaxprop.traced.origin import Line


class Within(NamedTuple):
    """An equation whose program contains another equation.

    Attributes:
        replay: the replay that it belongs to.
        number: its number there.
        step: for a loop, the step.
    """

    replay: Replay
    number: int
    step: int | None = None

    @property
    def equation(self) -> JaxprEqn:
        """The equation."""
        return self.replay.equations[self.number]


class Born(NamedTuple):
    """An equation with a result that is not finite.

    Attributes:
        replay: the replay that it belongs to.
        number: its number there.
        position: the index of the result.
        results: its outputs or, on the way back, the cotangents of its inputs.
        within: the equations around it, the outermost first.
        cts: on the way back, the cotangents of its outputs, None for a zero; otherwise None.
        back: whether this is on the way back. If so, and cts is None, it is an equation of a
            backward rule.
        summed: whether the sum of the cotangents of one value overflowed, rather than one result.
        line: the source line, where the equation does not have it.
        where: which elements of the result are meant; None for all that are not finite.
    """

    replay: Replay
    number: int
    position: int
    results: Sequence[Any]
    within: tuple[Within, ...] = ()
    cts: Sequence[Any] | None = None
    back: bool = False
    summed: bool = False
    line: Line | None = None
    where: np.ndarray | None = None

    @property
    def equation(self) -> JaxprEqn:
        """The equation."""
        return self.replay.equations[self.number]


@dataclasses.dataclass
class Found:
    """The findings of a search from a value back to where it was made.

    Attributes:
        births: the equations, by number, that made a non-finite result of finite numbers.
        turned: the equations that made NaN of infinite numbers.
        constants: the equations that took a non-finite constant.
        inputs: the program's non-finite inputs that the value comes from.
    """

    births: dict[int, Born] = dataclasses.field(default_factory=dict)
    turned: dict[int, Born] = dataclasses.field(default_factory=dict)
    constants: dict[int, Born] = dataclasses.field(default_factory=dict)
    inputs: set[int] = dataclasses.field(default_factory=set)

    @property
    def first(self) -> Born | None:
        """The first of ``births``; if that is empty, of ``turned``, and then of ``constants``.

        An infinite constant, such as a mask's, is not a birth: it is deliberate.
        """
        for each in (self.births, self.turned, self.constants):
            if each:
                return each[min(each)]
        return None

    def take(self, number: int, other: Found) -> None:
        """Add what was found inside an equation, except the inputs."""
        for mine, theirs in (
            (self.births, other.births),
            (self.turned, other.turned),
            (self.constants, other.constants),
        ):
            if theirs:
                mine.setdefault(number, theirs[min(theirs)])


def look(
    program: Program, args: Sequence[Any], wanted: Iterable[int], within: tuple[Within, ...] = ()
) -> Found:
    """Return where the non-finite outputs of a program come from.

    The program is run equation by equation. The search follows non-finite values back from the
    outputs, and into the programs that equations run, such as one step of a loop.

    Args:
        program: the program.
        args: its inputs.
        wanted: the numbers of the outputs to search from.
        within: the equations that the program is a part of.
    """
    replay, found = Replay(program, args), Found()
    todo = {program.jaxpr.outvars[index] for index in wanted}
    todo = {var for var in todo if not isinstance(var, Literal)}
    for number in reversed(range(len(replay.equations))):
        equation = replay.equations[number]
        for position, var in enumerate(equation.outvars):
            if var in todo and not_finite(replay.outs[number][position]) is not None:
                inputs = _at(replay, number, position, found, within)
                todo |= {equation.invars[index] for index in inputs}
    found.inputs = {index for index, var in enumerate(program.jaxpr.invars) if var in todo}
    return found


def _at(
    replay: Replay, number: int, position: int, found: Found, within: tuple[Within, ...]
) -> list[int]:
    """Record how an equation made a result non-finite, and return the inputs to go on from."""
    equation, ins = replay.equations[number], replay.ins[number]
    part = inside(equation, ins)
    if part is not None:
        inner = look(part.program, ins[part.start :], [position], (*within, Within(replay, number)))
        found.take(number, inner)
        inputs = [part.start + index for index in inner.inputs]
    elif (loop := loop_of(equation, ins)) is not None:
        inner = _in_loop(loop, replay.outs[number], position, Within(replay, number), within)
        found.take(number, inner)
        inputs = list(inner.inputs)
    else:
        born = Born(replay, number, position, replay.outs[number], within)
        inputs, here = _culprits(equation, ins, born.results[position], position)
        if here is not None:
            found.births[number] = born._replace(where=here)
        elif has_nan(born.results[position]) and not any(has_nan(ins[i]) for i in inputs):
            found.turned[number] = born
    constants = replay.program.jaxpr.constvars
    for index in inputs:
        var = equation.invars[index]
        if isinstance(var, Literal) or var in constants:
            found.constants[number] = Born(replay, number, position, replay.outs[number], within)
    return [index for index in inputs if not isinstance(equation.invars[index], Literal)]


def _culprits(
    equation: JaxprEqn, ins: Sequence[Any], out: Any, position: int
) -> tuple[list[int], np.ndarray | None]:
    """Return the non-finite inputs that make a result non-finite, and where it is so without them.

    The latter are the elements that stay non-finite if all inputs are finite; None if there are
    none.
    """
    here = not_finite(out)
    bad = {
        index: where for index, value in enumerate(ins) if (where := not_finite(value)) is not None
    }
    if not bad or here is None:
        return [], here
    mended = [
        jnp.where(bad[index], jnp.ones((), value.dtype), value) if index in bad else value
        for index, value in enumerate(ins)
    ]
    still = not_finite(evaluate(equation, mended)[position])
    own = None if still is None or not (still & here).any() else still & here
    if own is not None and own.sum() == here.sum():
        return [], own
    beside = [
        index for index, where in bad.items() if where.shape != here.shape or (where & here).any()
    ]
    return beside or list(bad), own


def _in_loop(
    loop: Loop, outs: Sequence[Any], position: int, loops: Within, within: tuple[Within, ...]
) -> Found:
    """Go back from a loop's result to the step that made it, and look there."""
    found, consts = Found(), len(loop.consts)
    step = len(loop.steps) - 1
    if step < 0:
        found.inputs = {loop.start + position}
        return found
    out = outs[position]
    if position >= loop.carry:
        where = not_finite(out)
        assert where is not None
        rows = np.flatnonzero(where.reshape(len(where), -1).any(axis=1))
        step = min(loop.at(int(row)) for row in rows)
        out = out[loop.at(step)]
    wanted, worst = {position}, has_nan(out)
    while wanted:
        while step > 0:
            carried = loop.steps[step][consts : consts + loop.carry]
            bad = {
                i
                for i, v in enumerate(carried)
                if (has_nan(v) if worst else not_finite(v) is not None)
            }
            if not bad:
                break
            step, wanted = step - 1, bad
        inner = look(
            loop.body, loop.steps[step], wanted, (*within, loops._replace(step=loop.at(step)))
        )
        found.take(0, inner)
        wanted, worst = set(), False
        for index in inner.inputs:
            if index < consts:
                found.inputs.add(loop.consts[index])
            elif step and index < consts + loop.carry:
                wanted.add(index - consts)
            else:
                found.inputs.add(loop.start + index - consts)
        step -= 1
        if found.births:
            break
    return found
