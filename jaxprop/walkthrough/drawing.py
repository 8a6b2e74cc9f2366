"""The geometry of the page's drawing of a network."""

from __future__ import annotations

from typing import NamedTuple

from jaxprop.walkthrough.document import Walkthrough

UNITS = 8  # in a layer; a network with more in one is drawn as a box for each layer
LABELLED = 4  # units in a layer whose incoming edges always show their weights
RADIUS = 28
LINE = 13  # height of a line of text
MARGIN = 14

Box = dict[str, str | float | None]
"""A layer as a box: its name, activation, count of units, and its x and width."""


class Node(NamedTuple):
    """A unit, an input or the error, drawn as a circle.

    Attributes:
        name: its name; "E" for the error.
        x: the x of the centre.
        y: the y of the centre.
        below: the number of lines of text below the circle.
        aside: the shift of that text along x, which keeps it clear of the weights.
    """

    name: str
    x: float
    y: float
    below: int
    aside: float


class Edge(NamedTuple):
    """A weight, drawn as a line.

    Attributes:
        weight: the weight's name; "" for an edge to the error.
        source: the name of the node that it starts at.
        unit: the name of the node that it leads to.
        x1: the x of its start.
        y1: the y of its start.
        x2: the x of its end.
        y2: the y of its end.
        x: the x of its label.
        y: the y of its label.
        dense: whether there are too many edges to show all labels at once.
    """

    weight: str
    source: str
    unit: str
    x1: float
    y1: float
    x2: float
    y2: float
    x: float
    y: float
    dense: bool


class Drawing(NamedTuple):
    """A network as a drawing: of nodes and edges, or of boxes.

    Attributes:
        width: the width of the drawing.
        height: the height of the drawing.
        nodes: the nodes.
        edges: the edges.
        boxes: the boxes.
        scale: the largest scale to show it at.
        radius: the radius of a node.
    """

    width: float
    height: float
    nodes: list[Node]
    edges: list[Edge]
    boxes: list[Box]
    scale: float
    radius: int = RADIUS


def units(walk: Walkthrough) -> Drawing:
    """Return a drawing with a circle for each unit and a line for each weight.

    On the way to k units a weight is written 1/(k + 1) along its line: no two lines meet there.
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
    """Return a drawing with a box for each layer."""
    names = ["x", *(stage.name for stage in walk.stages), "E"]
    counts = [len(walk.stages[0].inputs), *(len(stage.units) for stage in walk.stages), None]
    activations = ["", *(stage.activation for stage in walk.stages), ""]
    boxes: list[Box] = []
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
    """Return an edge, with its label at a fraction t of its length."""
    (x1, y1), (x2, y2) = at[source], at[unit]
    return Edge(weight, source, unit, x1, y1, x2, y2, x1 + t * (x2 - x1), y1 + t * (y2 - y1), dense)
