"""The birth of a non-finite number: the equation, its source line, and the cause in words."""

from __future__ import annotations

import dataclasses
import re
import textwrap
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxprop.births.ahead import Born
from jaxprop.births.causes import MIXING, Element, Given, cause_of, takes_another
from jaxprop.births.replay import not_finite, numbers
from jaxprop.traced.equations import name_of, primitive_of, reduced_axes_of, rule_of, ruled
from jaxprop.traced.origin import Line, line_of, origin_of

WIDTH = 80
SHOWN = 3  # operands at most
TIED = "\x00"  # stands for a space at which no line may break
TRANSFORMS = re.compile(r"\b(?:jvp|transpose|vmap|jit|checkpoint|remat)\(|rematted_computation|\)")


class LoopStep(NamedTuple):
    """A step of a loop: its index, and where the loop is written."""

    at: int
    loop: str
    line: str


@dataclasses.dataclass(frozen=True)
class Birth:
    """The equation that made a non-finite number of finite ones.

    Attributes:
        back: whether it was on the way back.
        primitive: the name of JAX's primitive.
        line: the file and the number of the innermost source line outside installed packages. For a
            layer of this library it is a line of the library; for the rule of a ``jax.custom_jvp``
            function it is the line of the call.
        source: the text of the line; "" where the source cannot be read.
        scope: the named scopes, from ``jax.named_scope`` or Flax modules.
        rule: the function whose derivative rule has the equation; "" if no rule has it.
        steps: the step of each loop around the equation.
        example: the example of the batch; None if it is not known, or if the number belongs to all.
        index: the index of the first non-finite element in the primitive's result or, on the way
            back, in the cotangent of its input.
        shape: the shape of that array.
        value: the element.
        given: the operands for that element: the least and the largest number of each.
        ct: on the way back, the same for the cotangent of the result.
        cause: the usual cause, as a sentence; "" if none is known.
    """

    back: bool
    primitive: str
    line: str
    source: str
    scope: str
    rule: str
    steps: tuple[LoopStep, ...]
    example: int | None
    index: tuple[int, ...]
    shape: tuple[int, ...]
    value: float
    given: tuple[Given, ...]
    ct: Given | None
    cause: str

    def __str__(self) -> str:
        at = f" at {self.line}" if self.line else ""
        scope = f", in scope {self.scope}" if self.scope else ""
        rule = f", in the derivative rule of {self.rule}" if self.rule else ""
        steps = "".join(
            f", in step {step.at} of the {step.loop}{step.line and ' at '}{step.line}"
            for step in self.steps
        )
        place, shape = ", ".join(map(str, self.index)), "×".join(map(str, self.shape))
        where = f" at [{place}] of {shape}".replace(", ", f",{TIED}") if self.index else ""
        example = "" if self.example is None else f", of example {self.example}"
        more = " and more" if len(self.given) > SHOWN else ""
        given = f"{' and '.join(map(str, self.given[:SHOWN]))}{more}"
        way = "on the way back through" if self.back else "in"
        first = f"It was born {way} {self.primitive}{at}{rule}{scope}{steps}:"
        if self.ct is not None:
            had = f"had been given {given}; of the cotangent {self.ct} it made"
        else:
            had = f"was given {given} and gave" if given else "gave"
        second = f"{self.primitive} {had} {self.value:g}{where}{example}. {self.cause}"
        if not self.source:
            return f"{_filled(first)}\n{_filled(second)}"
        source = textwrap.shorten(self.source, WIDTH - 4, placeholder=" …")
        return f"{_filled(first)}\n    {source}\n{_filled(second)}"


def birth_of(born: Born, examples: int | None = None, example: int | None = None) -> Birth:
    """Return the birth at an equation, with its numbers and the usual cause.

    Args:
        born: the equation.
        examples: the length of an axis of examples in the program, if it has one.
        example: the example in question, if it is known.
    """
    equation = born.equation
    result = numbers(born.results[born.position])
    bad = not_finite(result) if born.where is None else born.where
    assert bad is not None
    index = _first(bad, examples, example)
    ins = born.replay.ins[born.number]
    through = born.back and born.cts is not None
    here = reduced_axes_of(equation)
    if through:
        shape = np.shape(ins[born.position])
        kept = tuple(i for axis, i in enumerate(index) if axis not in here)
        cts = [ct for ct in born.cts or () if ct is not None]
        ct = _seen_at(cts[0], kept if len(kept) == np.ndim(cts[0]) else index, shape)
    else:
        shape, ct = result.shape, None
    rows = examples if example is not None else None
    by_index = equation.primitive.name not in MIXING
    given = tuple(
        _seen_at(value, index, shape, () if through else here, rows, by_index) for value in ins
    )
    outs = None
    if through:
        made = born.replay.outs[born.number]
        outs = _seen_at(made[0], index, shape)
    line, scope, steps = _place(born)
    ruled_by = [each.equation for each in born.within if ruled(each.equation) is not None]
    seen = Element(
        primitive_of(equation),
        given,
        float(np.real(result[index])),
        np.asarray(born.results[born.position]).dtype,
        born.position,
        ct,
        outs,
        born.summed,
        bool(not_finite_in(ins)),
        takes_another(born) if ct is not None and ct.low == ct.high == 0 else "",
        [name_of(e) if (e := born.replay.maker(born.number, i)) else "" for i in range(len(ins))],
    )
    return Birth(
        born.back,
        name_of(equation),
        "" if line is None else line.name,
        "" if line is None else line.text,
        scope,
        rule_of(ruled_by[-1]) if ruled_by and born.back and not through else "",
        steps,
        example,
        index,
        result.shape,
        seen.value,
        tuple(each for each in given if each is not None),
        ct,
        cause_of(seen),
    )


def not_finite_in(values: Sequence[Any]) -> list[int]:
    """Return the indices of the values that are not finite."""
    return [index for index, value in enumerate(values) if not_finite(value) is not None]


def _first(bad: np.ndarray, examples: int | None, example: int | None) -> tuple[int, ...]:
    """Return the index of the first bad element, within the example where its axis is known."""
    if example is not None and bad.shape[:1] == (examples,) and bad[example].any():
        other = np.arange(len(bad)) != example
        bad = bad & ~other.reshape(-1, *(1,) * (bad.ndim - 1))
    return tuple(int(axis[0]) for axis in np.nonzero(bad)) if bad.ndim else ()


def _seen_at(
    value: Any,
    index: tuple[int, ...],
    shape: tuple[int, ...],
    reduced: Sequence[int] = (),
    examples: int | None = None,
    by_index: bool = True,
) -> Given | None:
    """Return the range of an operand's numbers that an element comes from, as far as known."""
    if jnp.issubdtype(jnp.result_type(value), jax.dtypes.extended):
        return None
    array = numbers(value)
    if np.iscomplexobj(array):
        array = np.abs(array)
    if reduced and array.ndim == len(shape) + len(reduced):
        kept = iter(index)
        array = array[tuple(slice(None) if a in reduced else next(kept) for a in range(array.ndim))]
    elif (
        by_index
        and array.ndim == len(shape)
        and all(size in (1, length) for size, length in zip(array.shape, shape, strict=True))
    ):
        array = array[tuple(min(i, size - 1) for i, size in zip(index, array.shape, strict=True))]
    elif examples is not None and array.shape[:1] == shape[:1] == (examples,):
        array = array[index[0]]
    return Given.of(array)


def _place(born: Born) -> tuple[Line | None, str, tuple[LoopStep, ...]]:
    """Return the innermost known line, the scopes, and the steps of loops."""
    chain = [*(each.equation for each in born.within), born.equation]
    lines = [line_of(equation) for equation in reversed(chain)]
    lines += [line_of(equation, ours=True) for equation in reversed(chain)]
    line = next((line for line in [born.line, *lines] if line is not None), None)
    parts = (TRANSFORMS.sub("", origin_of(equation).scope).split("/") for equation in chain)
    steps = tuple(
        LoopStep(each.step, "scan" if each.equation.primitive.name == "scan" else "loop", at)
        for each in born.within
        if each.step is not None
        for at in [getattr(line_of(each.equation) or line_of(each.equation, ours=True), "name", "")]
    )
    scope = "/".join(part for each in parts for part in each if part and "->" not in part)
    return line, scope, steps


def _filled(text: str) -> str:
    text = textwrap.fill(text.strip(), WIDTH, break_on_hyphens=False, break_long_words=False)
    return text.replace(TIED, " ")
