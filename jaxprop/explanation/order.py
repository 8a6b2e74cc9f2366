"""The layers of a network in the order in which they run."""

from __future__ import annotations

from collections.abc import Iterator

import jax

from jaxprop.core.combinator import runs
from jaxprop.core.forms import Repeated
from jaxprop.core.layer import Layer
from jaxprop.core.types import PyTree


def in_order(net: Layer, layers: dict[str, PyTree]) -> Iterator[tuple[str, PyTree]]:
    """Yield each layer's name and terms in the order of the forward pass.

    A layer in a ``repeat`` comes once for each turn.

    Args:
        net: the network.
        layers: the terms of each layer, by the place of its params, such as "2.0". The terms of a
            layer in a ``repeat`` have a leading axis of turns.

    Yields:
        A name such as "2.0", or "2.0[3]" for turn 3 of a layer in a ``repeat``, and the terms.

    Raises:
        ValueError: if ``layers`` holds a place that no combinator declares.
    """
    met = set()
    for run in runs(net):
        place = ".".join(map(str, run.names))
        if place not in layers:
            continue
        met.add(place)
        turn = f"[{', '.join(map(str, run.turn))}]" if run.turn else ""
        yield place + turn, _at_turn(layers[place], run.turn)
    missed = layers.keys() - met
    if missed:
        raise ValueError(
            f"{net}: the walk came to layers at {', '.join(sorted(missed))}, which the children() "
            "of the layers around them do not declare"
        )


def _at_turn(terms: PyTree, turn: tuple[int, ...]) -> PyTree:
    """Return the terms of one layer of a stack; its forms are no longer those of a stack."""

    def at(node: PyTree) -> PyTree:
        for _ in turn if isinstance(node, Repeated) else ():
            node = node.form
        return jax.tree.map(lambda leaf: leaf[turn], node)

    return jax.tree.map(at, terms, is_leaf=lambda node: isinstance(node, Repeated))
