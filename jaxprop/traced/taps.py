"""Taps: places in a traced program whose results can be told their cotangents.

Where a param, or a view of one, meets data in a matrix product, a convolution or a look-up of rows,
a zero is added to the result, and the data are remembered. The cotangent of the zero is that of the
result, and with the data it makes a form. Wherever else a param is used, the program sees param + 0
with a zero for each example, whose cotangent is that example's own share of the gradient.
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
        dot: the axes that are contracted and batched, those of the data first.
        data_first: whether the data are the left operand.
    """

    dot: Dot
    data_first: bool


class LookUp(NamedTuple):
    """A look-up of rows, with ids outside of the table clipped or in no row."""

    clipped: bool


class Watched(NamedTuple):
    """No meeting, but the end of a named scope: the data are its result.

    Attributes:
        params: the number of each param that was used in the scope, with what stands in the view's
            ``scans``.
    """

    params: tuple[tuple[int, tuple[bool, ...]], ...]


Meeting: TypeAlias = MatrixProduct | Convolution | LookUp | Watched


@dataclasses.dataclass(frozen=True)
class Use:
    """A place where a view meets data, or where the result of a scope is watched.

    Attributes:
        meeting: how they meet.
        parts: the params in the view.
        joined: the axis that several params are joined on.
        shape: that of the view there.
        scans: as in the view.
        primitive: the name of the primitive.
        line: the source line.
        scope: the named scope.
        again: whether the data are computed again on the way back, and come with the cotangent.
        before: how many places before it is the one that it shares a zero with: 0 for its own.
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
        uses: the places, in the order in which they are met.
        xs: the data at each; None where they come with the cotangent.
        zeros: the shape of the zero that is added at each, in a pair with that of its data where
            these come with the cotangent; None where another's will do.
        equal: which variables of the program that runs have the same cotangent.
        watching: whether the results of named scopes are tapped too.
        met: the params that were used since the last such result, as in ``Watched``.
    """

    def __init__(
        self,
        zeros: Sequence[Any] | None = None,
        within: Sequence[Origin] = (),
        watching: bool = False,
        scans: tuple[bool, ...] = (),
        again: bool = False,
    ) -> None:
        """Tap nothing yet.

        Args:
            zeros: what is added at each place; None if that is yet to be found out.
            within: the places of the equations whose programs these are, the outermost first.
            watching: whether the results of named scopes are tapped too.
            scans: for each scan that these are in, whether it goes through layers.
            again: whether what runs is computed again on the way back.
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
            zeros: what is added at each place; None if that is yet to be found out.
            scans: for each scan around it in this one, whether it goes through layers.
            again: whether it is computed again on the way back.
        """
        scans, again = (*self._scans, *scans), again or self._again
        return Taps(zeros, self.within, self.watching, scans, again)

    @property
    def line(self) -> str:
        """The innermost source line that is known of."""
        return next((place.line for place in reversed(self.within) if place.line), "")

    @property
    def scope(self) -> str:
        """The named scopes, one within the other."""
        return "/".join(place.scope for place in self.within if place.scope)

    def next(self, number: int) -> Sequence[Any] | None:
        """Return what is added at the next so many places."""
        at = len(self.uses)
        return None if self._given is None else self._given[at : at + number]

    def add(self, use: Use, x: Array, y: Array, var: Any = None) -> Array:
        """Return y with the zero of this place.

        Args:
            use: the place.
            x: the data.
            y: the result.
            var: its variable, if another may have the same cotangent.
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
        """Keep of the data their shapes alone: they are of a trace that is over."""
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
        """Note places whose zeros are added already."""
        self.uses += uses
        self.xs += xs
        self.zeros += zeros


@jax.custom_vjp
def told(y: Array, x: Array, zero: Array, place: Array) -> Array:
    """Return y; on the way back its cotangent is that of the zero, and x that of its place.

    In what is computed again on the way back x is not kept until then, and neither are the zeros.
    """
    del x, zero, place
    return y


def _told_forward(y: Array, x: Array, zero: Array, place: Array) -> tuple[Array, Array]:
    del zero, place
    return y, x


def _told_backward(x: Array, ct: Array) -> tuple[Array, None, Array, Array]:
    return ct, None, ct, x


told.defvjp(_told_forward, _told_backward)
