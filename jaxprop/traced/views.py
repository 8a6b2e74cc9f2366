"""Views of a param: values that merely rearrange its entries."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from jax import Array

from jaxprop.core.forms import Move, Moves


class ParamPart(NamedTuple):
    """A param's part in a view: which param, moved how, and where it lies along the joined axis.

    Attributes:
        param: the number of its leaf.
        moves: how its entries came to lie as they do.
        start: where it begins along the axis that several params are joined on.
        stop: where it ends.
        layers: where they were joined along the axis that a scan went through, which of the axes of
            layers that is.
    """

    param: int
    moves: Moves
    start: int = 0
    stop: int = 0
    layers: int | None = None


@dataclasses.dataclass(frozen=True)
class View:
    """A value that holds the entries of one param, or of several that are joined, and no others.

    Attributes:
        parts: the params that it is made of.
        value: the value.
        own: a function that returns the value as one example's own: of param + 0, where the
            cotangent of the 0 is that example's share. Whoever calls it asks for the share.
        joined: the axis that several params are joined on; None for one.
        scale: a number that its entries were multiplied by, or None.
        scans: for each scan that it came into, the outermost first, whether that goes through its
            layers; else it is used anew at each step.
    """

    parts: tuple[ParamPart, ...]
    value: Array
    own: Callable[[], Array]
    joined: int | None = None
    scale: Any = None
    scans: tuple[bool, ...] = ()

    def moved(self, move: Move | None, f: Callable[[Array], Array]) -> View:
        """Return f of the view, which does this move; None for one that leaves entries in place."""
        parts = self.parts
        if move is not None:
            parts = tuple(part._replace(moves=(*part.moves, move)) for part in parts)
        return dataclasses.replace(
            self, parts=parts, value=f(self.value), own=lambda: f(self.own())
        )

    def scaled(self, factor: Any, f: Callable[[Array], Array]) -> View:
        """Return f of the view, which multiplies it by a number."""
        scale = factor if self.scale is None else self.scale * factor
        return dataclasses.replace(
            self, value=f(self.value), own=lambda: f(self.own()), scale=scale
        )


def placed(some: Sequence[Any], where: Sequence[bool], others: Sequence[Any]) -> list[Any]:
    """Return the others, with some in their place where it says so."""
    each = iter(some)
    return [next(each) if here else other for here, other in zip(where, others, strict=True)]


def is_data(value: Any) -> bool:
    """Return whether a value is none of a param's."""
    return not isinstance(value, View)


def bare(value: Any) -> Any:
    """Return a value as it is, without a word of where it comes from."""
    return value.value if isinstance(value, View) else value


def plain(value: Any) -> Any:
    """Return a value as what is not tapped sees it: a view with the example's own share."""
    return value.own() if isinstance(value, View) else value
