"""Taps: places in a traced program where the cotangent of a result can be observed.

Where a param, or a view of one, meets data in a matrix product, a convolution or a look-up of rows,
a zero is added to the result, and the data are kept. The cotangent of the zero is the cotangent of
the result; together with the data it makes a form. Wherever else a param is used, the program sees
param + 0 with a separate zero for each example, whose cotangent is that example's own share of the
gradient.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
from jax import Array
from jax.extend.core import JaxprEqn

from jaxprop.core.arrays import is_inexact
from jaxprop.traced.equal import Equal
from jaxprop.traced.equations import Axes, Convolution, Dot, primitive_of, struct
from jaxprop.traced.origin import Origin
from jaxprop.traced.views import ParamPart


class MatrixProduct(NamedTuple):
    """A matrix product of data with a view.

    Attributes:
        dot: the contracted and the batched axes, those of the data first.
        data_first: whether the data are the left operand.
    """

    dot: Dot
    data_first: bool


class LookUp(NamedTuple):
    """A look-up of rows, where an id outside the table is clipped or belongs to no row."""

    clipped: bool


class Watched(NamedTuple):
    """The end of a named scope, in place of a meeting: the data are the scope's result.

    Attributes:
        params: the number of each param that was used in the scope, with the ``scans`` of its view.
    """

    params: tuple[tuple[int, tuple[bool, ...]], ...]


Meeting: TypeAlias = MatrixProduct | Convolution | LookUp | Watched


@dataclasses.dataclass(frozen=True)
class Use:
    """A place where a view meets data, or where the result of a scope is watched.

    Attributes:
        meeting: how they meet.
        parts: the params in the view.
        joined: the axis along which several params are joined.
        shape: the shape of the view there.
        scans: the view's ``scans``.
        primitive: the name of the primitive.
        line: the source line.
        scope: the named scope.
        again: whether the data are computed again on the way back, and arrive with the cotangent.
        before: how many places before this one is the place whose zero it shares; 0 for its own.
    """

    meeting: Meeting
    parts: tuple[ParamPart, ...]
    joined: int | None
    shape: Axes
    scans: tuple[bool, ...]
    primitive: str
    line: str
    scope: str
    again: bool = False
    before: int = 0


class Taps:
    """The taps of a program while it runs.

    Attributes:
        uses: the places, in the order in which the program reaches them.
        xs: the data at each place; None where they arrive with the cotangent.
        zeros: the shape of the zero at each place, paired with the shape of the data where these
            arrive with the cotangent; None where the place shares the zero of an earlier one.
        equal: which variables of the running program have the same cotangent.
        watching: whether the results of named scopes are tapped too.
        met: the params used since the last result of a scope, as in ``Watched``.
    """

    def __init__(
        self,
        zeros: Sequence[Any] | None = None,
        within: Sequence[Origin] = (),
        watching: bool = False,
        scans: tuple[bool, ...] = (),
        again: bool = False,
    ) -> None:
        """Start without any taps.

        Args:
            zeros: the zero to add at each place; None in the first run, which finds the places.
            within: the origins of the equations around the program, the outermost first.
            watching: whether the results of named scopes are tapped too.
            scans: for each scan around the program, whether it iterates over layers.
            again: whether the program is computed again on the way back.
        """
        self.uses: list[Use] = []
        self.xs: list[Any] = []
        self.zeros: list[Any] = []
        self.within: tuple[Origin, ...] = tuple(within)
        self.watching: bool = watching
        self.met: dict[tuple[int, tuple[bool, ...]], None] = {}
        self.equal: Equal | None = None
        self._given, self._scans, self._again = zeros, scans, again

    def inside(self, zeros: Sequence[Any] | None = None, *scans: bool, again: bool = False) -> Taps:
        """Return taps for a program within this one.

        Args:
            zeros: the zero to add at each place; None in the first run, which finds the places.
            scans: for each further scan around that program, whether it iterates over layers.
            again: whether that program is computed again on the way back.
        """
        scans, again = (*self._scans, *scans), again or self._again
        return Taps(zeros, self.within, self.watching, scans, again)

    @property
    def line(self) -> str:
        """The innermost source line that is known."""
        return next((place.line for place in reversed(self.within) if place.line), "")

    @property
    def scope(self) -> str:
        """The named scopes, the outermost first, joined by slashes."""
        return "/".join(place.scope for place in self.within if place.scope)

    def next(self, number: int) -> Sequence[Any] | None:
        """Return the zeros of the given number of places that come next."""
        at = len(self.uses)
        return None if self._given is None else self._given[at : at + number]

    def add(self, use: Use, x: Array, y: Array, var: Any = None) -> Array:
        """Return y with the zero of this place.

        Args:
            use: the place.
            x: the data.
            y: the result.
            var: the variable of y, if another variable may have the same cotangent.
        """
        if var is not None and self.equal is not None and not self._again:
            first = self.equal.first(var, len(self.uses))
            if first < len(self.uses):
                use = dataclasses.replace(use, before=len(self.uses) - first)
                self.note([use], [x], [None])
                return y
        given, zero = self.next(1), struct(y)
        if self._again and is_inexact(x):
            self.note([dataclasses.replace(use, again=True)], [None], [(zero, struct(x))])
            return y if given is None else told(y, x, *given[0])
        self.note([use], [x], [zero])
        return y if given is None else y + given[0]

    def keep_shapes(self) -> None:
        """Keep only the shapes of the data, which come from a trace that has ended."""
        self.xs = jax.tree.map(struct, self.xs)

    def watched(self) -> int:
        """Return how many results of scopes were tapped."""
        return sum(isinstance(use.meeting, Watched) for use in self.uses)

    def watch(self, equation: JaxprEqn, y: Array) -> Array:
        """Return the result of a scope with the zero of this place."""
        meeting, name = Watched(tuple(self.met)), primitive_of(equation)
        self.met.clear()
        use = Use(meeting, (), None, (), self._scans, name, self.line, self.scope)
        return self.add(use, y, y)

    def note(self, uses: Sequence[Use], xs: Sequence[Any], zeros: Sequence[Any]) -> None:
        """Record places whose zeros have been added already."""
        self.uses += uses
        self.xs += xs
        self.zeros += zeros


@jax.custom_vjp
def told(y: Array, x: Array, zero: Array, place: Array) -> Array:
    """Return y; on the way back the cotangent of y also goes to ``zero``, and x goes to ``place``.

    So a part that is computed again on the way back keeps neither x nor the zeros until then.
    """
    del x, zero, place
    return y


def _told_forward(y: Array, x: Array, zero: Array, place: Array) -> tuple[Array, Array]:
    del zero, place
    return y, x


def _told_backward(x: Array, ct: Array) -> tuple[Array, None, Array, Array]:
    return ct, None, ct, x


told.defvjp(_told_forward, _told_backward)
