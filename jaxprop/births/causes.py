"""Why a number is not finite, in words: what functions do at the edges of their domains."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax.extend.core import JaxprEqn, Literal

from jaxprop.births.ahead import Born
from jaxprop.traced.equations import inlined
from jaxprop.traced.origin import line_of

INF = math.inf
GROWING = frozenset(
    (
        *("exp2", "expm1", "sinh", "cosh", "square", "integer_pow", "pow", "cumprod"),
        *("add", "sub", "mul", "add_any", "div", "reduce_prod"),
    )
)
SUMS = frozenset(
    (
        *("reduce_sum", "cumsum", "dot_general", "conv_general_dilated", "reduce_window_sum"),
        *("scatter-add", "broadcast_in_dim", "gather", "cumlogsumexp"),
    )
)
EMPTY = {"reduce_max": "maximum", "reduce_min": "minimum"}
SOLVING = {
    "cholesky": "the matrix is not positive definite",
    "lu": "the matrix is singular",
    "triangular_solve": "the matrix is singular: there is a 0 on its diagonal",
    "custom_linear_solve": "the matrix is singular",
    "eigh": "two eigenvalues are equal, where eigenvectors have no derivative",
    "svd": "two singular values are equal, where singular vectors have no derivative",
    "qr": "the matrix has not full rank",
}

MIXING = SUMS | {
    *SOLVING,
    "sort",
    "transpose",
    "rev",
    "fft",
    "dynamic_slice",
    "concatenate",
    "scan",
}
"""Primitives whose result at an index does not come from the operands at that index."""


class Given(NamedTuple):
    """The least and the largest of some numbers, and how many there are."""

    low: float
    high: float
    size: int

    @classmethod
    def of(cls, array: np.ndarray) -> Given | None:
        """Return the range of an array, without its NaN unless it has nothing else."""
        if not array.size:
            return None
        some = array[~np.isnan(array)] if array.dtype.kind == "f" else array
        if not some.size:
            return cls(math.nan, math.nan, array.size)
        return cls(float(some.min()) + 0.0, float(some.max()) + 0.0, array.size)  # no -0.0

    def __str__(self) -> str:
        if self.size == 1:
            return f"{self.low:g}"
        if self.low == self.high or math.isnan(self.low):
            return f"{self.size} numbers that are {self.low:g}"
        return f"{self.size} numbers from {self.low:g} to {self.high:g}"

    @property
    def one(self) -> float:
        """The number, if they are all the same; else NaN."""
        return self.low if self.low == self.high else math.nan


@dataclasses.dataclass(frozen=True)
class Element:
    """One element of an equation's result, and what it comes from.

    Attributes:
        primitive: the equation's primitive.
        given: the numbers of each operand there; None for an operand without numbers.
        value: the element.
        dtype: its dtype.
        position: on the way back, the index of the operand whose cotangent it belongs to.
        ct: on the way back, the cotangent of the result; None on the way forward.
        out: on the way back, the equation's result on the way forward.
        summed: whether it is the sum of the cotangents of one value.
        infinite: whether any operand has a number that is not finite, there or elsewhere.
        hidden: the source line of a later ``where`` that takes its other value there, or "".
        makers: the name of the equation that made each operand.
    """

    primitive: str
    given: tuple[Given | None, ...]
    value: float
    dtype: Any
    position: int
    ct: Given | None
    out: Given | None
    summed: bool
    infinite: bool
    hidden: str
    makers: Sequence[str]

    def operand(self, index: int) -> float:
        """Return an operand's number; NaN if its numbers differ, or it has none."""
        given = self.given[index] if index < len(self.given) else None
        return math.nan if given is None else given.one

    @property
    def largest(self) -> str:
        """The largest number of the dtype, in words."""
        return f"{self.dtype} goes to {float(jnp.finfo(self.dtype).max):.2g}"


def cause_of(seen: Element) -> str:
    """Return the usual cause as a sentence; "" if none is known."""
    if seen.summed:
        text = f"the cotangents of a value that is used several times add up, and {seen.largest}"
    elif seen.ct is not None:
        text = _back(seen)
    else:
        text = _ahead(seen)
    if not text:
        return ""
    is_name = text.split(maxsplit=1)[0] == seen.primitive or text.startswith(("inf", "-inf"))
    return f"{text if is_name else text[0].upper() + text[1:]}."


def _ahead(seen: Element) -> str:
    name, a, b = seen.primitive, seen.operand(0), seen.operand(1)
    outside = _outside(name, a, b)
    if outside:
        return outside
    if name in ("sub", "add", "add_any") and abs(a) == abs(b) == INF:
        if name == "sub" and a == b == -INF:
            return (
                "-inf - (-inf) is nan: this is a softmax or a logsumexp of nothing but -inf, such "
                "as a row that is masked as a whole"
            )
        return "inf - inf is nan"
    if name == "mul" and 0 in (a, b) and INF in (abs(a), abs(b)):
        return "0 · inf is nan"
    if name == "div" and abs(a) == abs(b) == INF:
        return "inf / inf is nan"
    if name in SOLVING and name not in ("eigh", "svd"):
        return SOLVING[name]
    if name == "gather" and not seen.infinite:
        return 'an index is outside of the array, and there mode="fill" reads nan'
    if name in EMPTY and not seen.infinite:
        return f"the {EMPTY[name]} over an axis without elements is {seen.value:g}"
    if seen.infinite:
        if name in SUMS:
            return "the sum has inf among its terms: 0 · inf and inf - inf are nan"
        return "a constant of the program is not finite" if name not in GROWING else ""
    return _overflow(seen)


def _overflow(seen: Element) -> str:
    name = seen.primitive
    if name == "exp":
        return (
            f"exp overflows above {math.log(float(jnp.finfo(seen.dtype).max)):.3g}: {seen.largest}"
        )
    if name == "convert_element_type":
        return f"the number is too large for a cast: {seen.largest}"
    if name in SUMS:
        return f"the sum overflows: {seen.largest}"
    if name in GROWING:
        return f"the result overflows: {seen.largest}"
    return ""


def _outside(name: str, a: float, b: float) -> str:
    """Return why a function is not finite at a point outside its domain, or at a pole."""
    match name:
        case "sqrt" if a < 0:
            return "the square root of a negative number is nan"
        case "rsqrt" if a == 0:
            return "1 / sqrt(0) is infinite"
        case "rsqrt" if a < 0:
            return "the square root of a negative number is nan"
        case "log" | "log1p" if a == (0 if name == "log" else -1):
            return "the logarithm of 0 is -inf"
        case "log" | "log1p" if a < (0 if name == "log" else -1):
            return "the logarithm of a negative number is nan"
        case "div" | "rem" if b == 0:
            return "0 / 0 is nan" if a == 0 or name == "rem" else "this is a division by 0"
        case "pow" if a < 0 and b != round(b):
            return "a negative number to a power that is no whole number is nan"
        case "pow" if a == 0 and b < 0:
            return "0 to a negative power is infinite"
        case "integer_pow" if a == 0:
            return "0 to a negative power is infinite"
        case "asin" | "acos" if abs(a) > 1:
            return f"{name} of a number outside of -1 to 1 is nan"
        case "acosh" if a < 1:
            return "acosh of a number below 1 is nan"
        case "atanh" | "erf_inv" if abs(a) == 1:
            return f"{name} at 1 and at -1 is infinite"
        case "atanh" | "erf_inv" if abs(a) > 1:
            return f"{name} of a number outside of -1 to 1 is nan"
        case "lgamma" | "digamma" if a <= 0 and a == round(a):
            return f"{name} has a pole at 0 and at every negative whole number"
        case _:
            return ""


STEEP: dict[str, Callable[[float, float], bool]] = {
    "sqrt": lambda a, b: a == 0,
    "rsqrt": lambda a, b: a == 0,
    "cbrt": lambda a, b: a == 0,
    "log": lambda a, b: a == 0,
    "log1p": lambda a, b: a == -1,
    "div": lambda a, b: b == 0,
    "pow": lambda a, b: a == 0,
    "integer_pow": lambda a, b: a == 0,
    "asin": lambda a, b: abs(a) == 1,
    "acos": lambda a, b: abs(a) == 1,
    "acosh": lambda a, b: a == 1,
    "atanh": lambda a, b: abs(a) == 1,
    "erf_inv": lambda a, b: abs(a) == 1,
    "atan2": lambda a, b: a == b == 0,
}


def _back(seen: Element) -> str:
    name, a, b = seen.primitive, seen.operand(0), seen.operand(1)
    ct = math.nan if seen.ct is None else seen.ct.one
    out = 0.0 if seen.out is None or seen.out.size > 1 else seen.out.one
    at = b if name == "div" else a
    if name in STEEP and STEEP[name](a, b):
        return _product(seen, f"the slope of {name} at {at:g} is infinite", ct)
    if not math.isfinite(out):
        why = _outside(name, a, b) or f"{name} gives {out:g} there on the way forward"
        return _product(seen, why, ct, out)
    if name == "pow" and seen.position == 1 and a < 0:
        return "the derivative by the power is a multiple of the logarithm of a negative number"
    if name == "div":
        return f"the slope of a division by {b:g} overflows: {seen.largest}"
    if name in SOLVING:
        return SOLVING[name]
    return f"the cotangent overflows: {seen.largest}"


def _product(seen: Element, why: str, ct: float, slope: float = INF) -> str:
    """Return why a non-finite slope spoils the cotangent that comes back."""
    nought = f"0 · {abs(slope):g} is nan"
    if ct == 0 and seen.hidden:
        return (
            f"{why}. The `where` at {seen.hidden} takes its other value there, so that the "
            f"cotangent is 0; but {nought}. Both values of a `where` must be finite: guard what "
            f"{seen.primitive} is given, by a `where` before it too"
        )
    if seen.primitive == "sqrt" and seen.makers[0] in ("reduce_sum", "div", "_var"):
        why += (
            ": a norm of zeros, or a standard deviation of equal numbers, has no derivative; add a "
            "small number under the root"
        )
    return f"{why}. The cotangent that comes back is 0, and {nought}" if ct == 0 else why


def takes_another(born: Born) -> str:
    """Return the source line of a later ``where`` that uses an equation's result, or ""."""
    outs: set[Any] = set(born.equation.outvars)
    levels = [(each.replay, each.number) for each in born.within]
    for replay, number in reversed([*levels, (born.replay, born.number)]):
        if number != born.number or replay is not born.replay:
            outs = set(replay.equations[number].outvars)
        for equation in replay.equations[number + 1 :]:
            if not outs & {var for var in equation.invars if not isinstance(var, Literal)}:
                continue
            if _chooses(equation):
                line = line_of(equation) or line_of(equation, ours=True)
                if line is not None:
                    return line.name
            outs |= set(equation.outvars)
    return ""


def _chooses(equation: JaxprEqn) -> bool:
    part = inlined(equation)
    if part is not None:
        return any(_chooses(inner) for inner in part.jaxpr.eqns)
    return equation.primitive.name == "select_n"
