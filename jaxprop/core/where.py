"""The selection of a net's layers, and of its params, by type, path or function."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, TypeAlias

import jax

from jaxprop.core.combinator import seen_through
from jaxprop.core.forms import is_factored
from jaxprop.core.layer import Layer
from jaxprop.core.types import PyTree

Path: TypeAlias = tuple[int | str, ...]
Where: TypeAlias = Callable[[Layer], bool] | type[Layer] | tuple[type[Layer], ...] | Path
"""A predicate of a layer, a class or several, or the path to a layer's params in the net's params.

A layer in ``jp.cast`` counts as the layer itself. A path through ``jp.repeat`` or ``jp.shared``
follows the params, which have no level for the times."""


def check_where(where: object) -> None:
    """Raise ``TypeError`` unless ``where`` can select layers."""
    if not callable(where) and not isinstance(where, tuple):
        raise TypeError(
            "where is a predicate of a layer, a class of layers or a tuple of them, or a path such "
            f"as (0, 'w'), not {where!r}"
        )


def is_path(where: Where) -> bool:
    """Return whether where is a path."""
    return isinstance(where, tuple) and not (where and all(isinstance(n, type) for n in where))


def is_meant(layer: Layer, path: Path | None, where: Where) -> bool:
    """Return whether ``where`` selects a layer; by a path only if the layer's own is known."""
    if is_path(where):
        return path == where
    if isinstance(where, type | tuple):
        return isinstance(seen_through(layer), where)  # pyright: ignore[reportArgumentType]
    return bool(where(seen_through(layer)))


def of_layers(where: Where, layer: Layer, tree: PyTree) -> PyTree:
    """Return a tree like a layer's params, with ``()`` outside the layers that ``where`` selects.

    Args:
        where: a predicate, a class or several.
        layer: the layer.
        tree: a tree like the layer's params, with arrays or forms.
    """
    if is_meant(layer, None, where):
        return tree
    found = jax.tree.map(lambda _: (), tree, is_leaf=is_factored)
    for child in layer.children():
        if child.name is not ...:
            found = child.put(found, of_layers(where, child.layer, child.of(tree)))
    return found


def at_path(path: Path | str, tree: PyTree, is_leaf: Callable[[Any], bool] | None = None) -> PyTree:
    """Return the tree with ``()`` for each leaf that the path does not select.

    Args:
        path: the path of the selected leaves, or of a node above them; or a regular expression to
            search for in a leaf's own path, with "/" between its names.
        tree: any tree.
        is_leaf: as for ``jax.tree.map``.
    """

    def kept(keys: tuple[Any, ...], leaf: Any) -> Any:
        names = [jax.tree_util.keystr((key,), simple=True) for key in keys]
        if isinstance(path, str):
            return leaf if re.search(path, "/".join(names)) else ()
        return leaf if names[: len(path)] == list(map(str, path)) else ()

    return jax.tree.map_with_path(kept, tree, is_leaf=is_leaf)
