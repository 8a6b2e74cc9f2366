"""Which layers of a net a rule is for."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

from jaxprop.core.checks import require
from jaxprop.core.combinator import Combinator, map_children, seen_through
from jaxprop.core.layer import Layer

Path: TypeAlias = tuple[int | str, ...]
Where: TypeAlias = Callable[[Layer], bool] | type[Layer] | tuple[type[Layer], ...] | Path
"""A predicate of a layer, a class or several, or the path to a layer's params in the net's."""


def with_rule(net: Layer, rule: Callable[[Layer], Layer], where: Where) -> Layer:
    """Return the net with ``rule(layer)`` for every layer that is meant.

    Args:
        net: the network.
        rule: a function of a layer.
        where: which layers.

    Raises:
        TypeError: for what is not a net, or says nothing of a layer.
        ValueError: where no layer is meant.
    """
    require(net, Layer, "rules: net")
    if not callable(where) and not isinstance(where, tuple):
        raise TypeError(
            f"where is a predicate of a layer, a class of layers, or a path such as (0, 'w'), not "
            f"{where!r}"
        )
    found: list[Layer] = []

    def of_layer(layer: Layer, path: Path) -> Layer:
        if not _is_meant(layer, path, where):
            return layer
        found.append(layer)
        return rule(layer)

    changed = _mapped(net, of_layer, ())
    if not found:
        raise ValueError(f"where={where!r} is no layer of {net}")
    return changed


def _is_meant(layer: Layer, path: Path, where: Where) -> bool:
    if isinstance(where, tuple) and not all(isinstance(name, type) for name in where):
        return path == where
    if isinstance(where, type | tuple):
        return isinstance(seen_through(layer), where)  # pyright: ignore[reportArgumentType]
    return bool(where(layer))


def _mapped(layer: Layer, f: Callable[[Layer, Path], Layer], path: Path) -> Layer:
    if not isinstance(layer, Combinator):
        return f(layer, path)
    children = list(layer.children())

    def of_child(inner: Layer) -> Layer:
        at = next(index for index, child in enumerate(children) if child.layer is inner)
        name = children.pop(at).name
        here = path if name is None or name is ... else (*path, name)
        return _mapped(inner, f, here)

    return map_children(layer, of_child)
