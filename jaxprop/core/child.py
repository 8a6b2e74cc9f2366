"""The place of one layer inside another."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from types import EllipsisType
from typing import TYPE_CHECKING, NamedTuple

from jaxprop.core.describe import is_array, shapes
from jaxprop.core.types import Params, PyTree

if TYPE_CHECKING:
    from jaxprop.core.layer import Layer


class Child(NamedTuple):
    """A layer inside another layer, and the place of its params.

    Attributes:
        layer: the layer.
        name: where its params stand in the outer layer's params: an index of a tuple, a key of a
            dict, or the name of a field; None if the two layers have the same params, and ``...``
            if only the outer layer knows.
        times: how often it runs, with its params stacked along axis 0; None for a layer that runs
            once.
    """

    layer: Layer
    name: int | str | EllipsisType | None
    times: int | None = None

    def of(self, params: Params) -> Params:
        """Return the child's part of the outer layer's params."""
        if self.name is None:
            return params
        if isinstance(self.name, str) and not isinstance(params, dict):
            return getattr(params, self.name)
        return params[self.name]

    def put(self, params: Params, new: Params) -> Params:
        """Return the outer layer's params with ``new`` in the child's place."""
        if self.name is None:
            return new
        if isinstance(params, dict):
            return {**params, self.name: new}
        if isinstance(self.name, str):
            replace = getattr(params, "_replace", None) or functools.partial(
                dataclasses.replace, params
            )
            return replace(**{self.name: new})
        entries = list(params)
        entries[self.name] = new  # pyright: ignore[reportArgumentType, reportCallIssue]
        named = hasattr(params, "_fields")
        return type(params)(*entries) if named else type(params)(entries)


def layers_within(layer: Layer) -> Iterator[Layer]:
    """Yield the layer, then every layer inside it, outer layers before inner ones."""
    yield layer
    for child in layer.children():
        yield from layers_within(child.layer)


def part_of(layer: Layer, x: PyTree, part: int | str) -> PyTree:
    """Return a part of x, by its index in a tuple, its key in a dict, or the name of its field.

    Args:
        layer: the layer that takes the part, for the message.
        x: a dict, a tuple or a named tuple.
        part: the part's index, key or field name.

    Raises:
        ValueError: for an x without that part.
    """
    try:
        if not is_array(x):
            return Child(layer, part).of(x)
    except (AttributeError, IndexError, KeyError, TypeError):
        pass
    raise ValueError(f"{layer}: x is {shapes(x)}, which has no part {part!r}")
