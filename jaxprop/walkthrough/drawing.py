"""Where the page draws what."""

from __future__ import annotations

from typing import Any, NamedTuple

from jaxprop.walkthrough.document import Walkthrough

UNITS = 8  # in a layer; where there are more, layers are drawn as boxes
LABELLED = 4  # units that an edge's weight is always written on the way to
RADIUS = 28
LINE = 13  # of text
MARGIN = 14


class Node(NamedTuple):
    name: str
    x: float
    y: float
    below: int  # lines of text under it
    aside: float  # by how much that text gives way to the weights on the right


class Edge(NamedTuple):
    weight: str  # "" on the way to the error
    source: str
    unit: str
    x1: float
    y1: float
    x2: float
    y2: float
    x: float  # of its label
    y: float
    dense: bool


class Drawing(NamedTuple):
    width: float
    height: float
    nodes: list[Node]
    edges: list[Edge]
    boxes: list[dict[str, Any]]
    scale: float  # at most
    radius: int = RADIUS


def units(walk: Walkthrough) -> Drawing:
    """A circle for each unit and a line for each weight.

    A weight is written 1/(k + 1) of the way to the next layer's k units: there no two lines meet.
    """
    columns = [list(walk.stages[0].inputs), *([u.name for u in s.units] for s in walk.stages)]
    tallest = max(map(len, columns))
    bias = {w.unit: 1 for stage in walk.stages for w in stage.biases}
    outputs = set(columns[-1])
    below = {name: bias.get(name, 0) + (name in outputs) for names in columns for name in names}
    gap = 2 * RADIUS + 16 + LINE * (max(below.values()) + 1)
    height = gap * tallest + 2 * MARGIN
    at: dict[str, tuple[float, float]] = {}
    x = MARGIN + RADIUS + 0.0
    for position, names in enumerate(columns):
        if position:
            x += 50 * (len(names) + 1) if len(names) <= LABELLED else 170
        for i, name in enumerate(names):
            at[name] = x, height / 2 + (i - (len(names) - 1) / 2) * gap - 12
    at["E"] = x + 100, height / 2 - 12
    edges = []
    for stage in walk.stages:
        count = len(stage.units)
        t = 1 / (count + 1) if count <= LABELLED else 0.5
        for row in stage.weights:
            for w in row:
                edges.append(_edge(w.name, w.source, w.unit, at, t, count > LABELLED))
    edges += [_edge("", unit.name, "E", at, 0.5, False) for unit in walk.stages[-1].units]
    nodes = [
        Node(name, *at[name], below.get(name, 0), 0.0 if name in outputs else -14.0) for name in at
    ]
    scale = min(max(600 / height, 0.85), 1.7)
    return Drawing(at["E"][0] + RADIUS + MARGIN, height, nodes, edges, [], scale)


def layers(walk: Walkthrough) -> Drawing:
    """A box for each layer."""
    names = ["x", *(stage.name for stage in walk.stages), "E"]
    counts = [len(walk.stages[0].inputs), *(len(stage.units) for stage in walk.stages), None]
    activations = ["", *(stage.activation for stage in walk.stages), ""]
    boxes: list[dict[str, Any]] = []
    x = float(MARGIN)
    for name, count, activation in zip(names, counts, activations, strict=True):
        width = 116 if activation else 72
        boxes.append(
            {"name": name, "count": count, "activation": activation, "x": x, "width": width}
        )
        x += width + 34
    return Drawing(x - 34 + MARGIN, 124, [], [], boxes, 1.4)


def _edge(
    weight: str, source: str, unit: str, at: dict[str, tuple[float, float]], t: float, dense: bool
) -> Edge:
    (x1, y1), (x2, y2) = at[source], at[unit]
    return Edge(weight, source, unit, x1, y1, x2, y2, x1 + t * (x2 - x1), y1 + t * (y2 - y1), dense)
