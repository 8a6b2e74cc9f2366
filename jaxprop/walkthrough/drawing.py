"""The geometry of the page's drawing of a network."""

from __future__ import annotations

import itertools
from typing import NamedTuple

from jaxprop.walkthrough.document import Walkthrough

UNITS = 8  # most units in a layer; with more, the network is drawn as a box for each layer
LABELLED = 4  # most units on either side of weights that are all labelled at once
RADIUS = 28
LINE = 14  # height of a line of text
LABEL = 40  # height of a label: a weight's name, and below it its value
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

    The label of a weight to one of k units stands 1/(k + 1) along its line, where no two lines
    meet. With many weights, labels stand midway and are shown only with their stage.
    """
    columns = [walk.stages[0].inputs, *(tuple(u.name for u in s.units) for s in walk.stages)]
    labelled = [max(len(a), len(b)) <= LABELLED for a, b in itertools.pairwise(columns)]
    bias = {w.unit for stage in walk.stages for w in stage.biases}
    below = {name: int(name in bias) for names in columns for name in names}
    below |= {name: below[name] + 1 for name in columns[-1]}  # the target
    gaps = _gaps(columns, below, labelled)
    height = max(gap * len(names) for gap, names in zip(gaps, columns, strict=True)) + 2 * MARGIN
    at: dict[str, tuple[float, float]] = {}
    x = MARGIN + RADIUS + 0.0
    for position, names in enumerate(columns):
        if position:
            x += 54 * (len(names) + 1) if labelled[position - 1] else 170
        for i, name in enumerate(names):
            at[name] = x, height / 2 + (i - (len(names) - 1) / 2) * gaps[position] - 12
    at["E"] = x + 84, height / 2 - 12
    edges = []
    for stage, together in zip(walk.stages, labelled, strict=True):
        t = 1 / (len(stage.units) + 1) if together else 0.5
        for row in stage.weights:
            edges += [_edge(w.name, w.source, w.unit, at, t, not together) for w in row]
    edges += [_edge("", name, "E", at, 0.5, False) for name in columns[-1]]
    nodes = [
        Node(name, *at[name], below.get(name, 0), 0.0 if name in columns[-1] else -14.0)
        for name in at
    ]
    scale = min(max(600 / height, 0.85), 1.7)
    return Drawing(at["E"][0] + RADIUS + MARGIN, height, nodes, edges, [], scale)


def _gaps(
    columns: list[tuple[str, ...]], below: dict[str, int], labelled: list[bool]
) -> list[float]:
    """Return the distance between the units of each column: room for their text and the labels.

    Columns with labels between them have the same distance, which keeps the labels apart.
    """
    lines = [
        max(below[name] + (position > 0) for name in names)  # the derivative; inputs have none
        for position, names in enumerate(columns)
    ]
    gaps = [2.0 * RADIUS + 8 + LINE * count for count in lines]
    beside = {i + side for i, together in enumerate(labelled) if together for side in (0, 1)}
    room = [LABEL * (len(columns[i + 1]) + 1) for i, together in enumerate(labelled) if together]
    common = max([*(gaps[i] for i in beside), *room], default=0.0)
    return [common if i in beside else gap for i, gap in enumerate(gaps)]


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
