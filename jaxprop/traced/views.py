"""Views of a param: values that only rearrange its entries."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from jax import Array

from jaxprop.core.forms import Move, Moves


class ParamPart(NamedTuple):
    """A param's part in a view: which param, how it was moved, and its range of the joined axis.

    Attributes:
        param: the number of its leaf.
        moves: the moves that brought its entries into their order.
        start: where it begins on the axis along which several params are joined.
        stop: where it ends.
        layers: the place of the joined axis among the axes of layers, if a scan iterated over it.
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
        own: a function that returns the value made of param + 0, where the cotangent of the 0 is
            one example's own share. Calling it asks for the share.
        joined: the axis along which several params are joined; None for one param.
        scale: a number that its entries were multiplied by, or None.
        scans: for each scan that it entered, the outermost first, whether the scan iterates over
            its layers; otherwise each step uses all of it.
    """

    parts: tuple[ParamPart, ...]
    value: Array
    own: Callable[[], Array]
    joined: int | None = None
    scale: Any = None
    scans: tuple[bool, ...] = ()

    def moved(self, move: Move | None, f: Callable[[Array], Array]) -> View:
        """Return f of the view, where f does this move; None if f leaves the entries in place."""
        parts = self.parts
        if move is not None:
            parts = tuple(part._replace(moves=(*part.moves, move)) for part in parts)
        return dataclasses.replace(
            self, parts=parts, value=f(self.value), own=lambda: f(self.own())
        )

    def scaled(self, factor: Any, f: Callable[[Array], Array]) -> View:
        """Return f of the view, where f multiplies it by a number."""
        scale = factor if self.scale is None else self.scale * factor
        return dataclasses.replace(
            self, value=f(self.value), own=lambda: f(self.own()), scale=scale
        )


def placed(some: Sequence[Any], where: Sequence[bool], others: Sequence[Any]) -> list[Any]:
    """Return ``others``, with the values of ``some`` in the places that ``where`` marks."""
    each = iter(some)
    return [next(each) if here else other for here, other in zip(where, others, strict=True)]


def is_data(value: Any) -> bool:
    """Return whether a value is data, and not a view of a param."""
    return not isinstance(value, View)


def bare(value: Any) -> Any:
    """Return a value as an array, without a record of its params."""
    return value.value if isinstance(value, View) else value


def plain(value: Any) -> Any:
    """Return a value as an untapped use sees it: of a view, with the example's own share."""
    return value.own() if isinstance(value, View) else value
