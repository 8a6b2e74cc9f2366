"""In which order layers are run, where some are repeated."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import jax

from jaxprop.combinators.chain import Chain, Skip
from jaxprop.combinators.recompute import Recompute
from jaxprop.combinators.shared import Tied
from jaxprop.layer import Layer


def unrolled(net: Layer, layers: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Each layer's name and ``Terms``, a repeated one's once a repetition, as in "2.0[3]"."""
    yield from _turns([(_loop(net, name), name, (), terms) for name, terms in layers.items()])


def _loop(net: Layer, name: str) -> str:
    """The place of the layer that may repeat the one of that name, as far as can be seen."""
    seat: list[str] = []
    for place in name.split("."):
        while isinstance(net, Skip | Recompute):
            net = net.layer
        if isinstance(net, Chain):
            net = net.layers[int(place)]
        elif isinstance(net, Tied):
            net = (net.embedding, net.body)[int(place)]
        else:
            break
        seat.append(place)
    return ".".join(seat)


def _turns(entries: Sequence[tuple[str, str, tuple[int, ...], Any]]) -> Iterator[Any]:
    """Layers that stand next to each other in one loop take turns."""

    def repeated(entry: Any) -> str | None:
        return entry[0] if entry[3].repeats else None

    for loop, group in itertools.groupby(entries, key=repeated):
        body = list(group)
        if loop is None:
            for _, name, turn, terms in body:
                yield name + (f"[{', '.join(map(str, turn))}]" if turn else ""), terms
            continue
        for i in range(body[0][3].repeats[0]):
            yield from _turns(
                [
                    (loop, name, (*turn, i), jax.tree.map(lambda leaf, i=i: leaf[i], terms))
                    for _, name, turn, terms in body
                ]
            )
