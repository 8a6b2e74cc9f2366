"""The sections of the walkthrough's text, each as its lines."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from jaxprop.explanation.numerals import aligned, bracketed, fixed, given, share, short
from jaxprop.walkthrough.config import WORKED_EXAMPLE
from jaxprop.walkthrough.document import Stage, Unit, Walkthrough, Weight
from jaxprop.walkthrough.lines import elided, equation, flow, layer, listed, table, total
from jaxprop.walkthrough.words import Say

CURVE_ROWS = 10  # intervals of the error curve, at most
CURVE_WIDTH = 40  # columns of its longest bar


class Most(NamedTuple):
    """How much of a large network is printed.

    Attributes:
        layers: the number of layers, half of them from each end.
        units: the number of units of a layer, from the first.
        chains: the number of weights of a layer whose chains are printed, from the first.
        numbers: the number of numbers in a list.
    """

    layers: int
    units: int
    chains: int
    numbers: int

    def ends(self, stages: Sequence[Stage]) -> Sequence[Stage]:
        """Return the layers to print."""
        left_out = len(stages) - self.layers
        half = self.layers // 2
        return stages if left_out <= 0 else [*stages[:half], *stages[half + left_out :]]

    def leaves_out_of(self, walk: Walkthrough) -> bool:
        """Return whether the network has more than this."""
        return len(walk.stages) > self.layers or any(
            len(stage.units) > self.units
            or len(stage.chains()) > self.chains
            or len(stage.inputs) > self.numbers
            for stage in walk.stages
        )


READABLE = Most(layers=6, units=8, chains=24, numbers=12)
ALL = Most(sys.maxsize, sys.maxsize, sys.maxsize, sys.maxsize)


def network(walk: Walkthrough, most: Most, say: Say) -> Iterator[str]:
    """Yield the lines on the network: its layers, its values and its weights."""
    config, stages = walk.config, most.ends(walk.stages)
    inputs = len(config.inputs)
    parts = [say("{count} input" if inputs == 1 else "{count} inputs", count=f"{inputs:,}")]
    for stage in walk.stages:
        units = "unit" if len(stage.units) == 1 else "units"
        parts.append(
            say(
                f"{{count}} {{layer}} {units} ({{activation}})",
                count=f"{len(stage.units):,}",
                layer=layer(stage.name, say),
                activation=stage.activation,
            )
        )
    bias = [] if any(stage.biases for stage in walk.stages) else [say("no bias")]
    yield from flow([*elided(parts, most.numbers), *bias], ", ")
    rate = given(config.learning_rate)
    yield say("error E = Σ ½ (t − o)², learning rate {rate}, float64", rate=rate)
    yield ""
    targets = [f"t{i + 1}" for i in range(len(config.targets))]
    yield from _values(walk.stages[0].inputs, map(given, config.inputs), most)
    yield from _values(targets, map(given, config.targets), most)
    for stage in stages:
        yield ""
        for index, unit in enumerate(stage.units[: most.units]):
            numbers = [*stage.weights[index], *_bias(stage, index)]
            products = [f"{w.name}·{w.source}" for w in stage.weights[index]]
            products += [bias.name for bias in _bias(stage, index)]
            yield f"{unit.z_name} = {total(products)}    {_activated(unit, stage)}"
            for line in _values([w.name for w in numbers], [given(w.old) for w in numbers], most):
                yield f"    {line}"
        yield from _more_units(stage, most, say)
    yield ""
    yield say("In arrays z = x @ w, with a column for each unit:")
    for stage in stages:
        columns = [[row[i].name for row in stage.weights] for i in range(len(stage.inputs))]
        rows = [f"[{listed(column)}]" for column in columns]
        yield f"    {layer(stage.name, say)}: w = [{listed(rows, 3)}]"


def by_layer(walk: Walkthrough, most: Most, say: Say) -> Iterator[str]:
    """Yield the lines of a table of all layers, and how to see what is left out."""
    rows = []
    for stage in walk.stages:
        chains = stage.chains()
        steepest = _steepest(chains)
        flat = sum(row[0].slope == 0 for row in stage.weights) / len(stage.units)
        rows.append(
            [
                layer(stage.name, say),
                f"{len(stage.units):,}",
                f"{len(chains):,}",
                short(max((unit.z for unit in stage.units), key=_size)),
                "" if stage.activation == "none" else share(flat),
                short(steepest.product),
                steepest.name,
            ]
        )
    header = ["", say("units"), say("weights"), say("largest z"), say("slope 0")]
    header += [say("largest ∂E/∂w"), say("of")]
    gap = ["…", *[""] * 6]
    rows = [gap if row == "…" else row for row in elided(rows, most.numbers)]
    yield from table(header, list(zip(*rows, strict=True)))
    yield ""
    yield from flow(
        say(
            "Below, at most {layers} layers, {units} units and {chains} weights a layer. --all "
            "prints everything, --weight {name} one weight, --json is for scripts.",
            **most._asdict(),
            name=walk.chains()[-1].name,
        ).split(),
        " ",
    )


def forward(walk: Walkthrough, most: Most, say: Say) -> Iterator[str]:
    """Yield the lines of the forward pass, up to the error."""
    for stage in most.ends(walk.stages):
        value = given if stage is walk.stages[0] else fixed
        for index, unit in enumerate(stage.units[: most.units]):
            terms = [(given(w.old), value(w.source_value)) for w in stage.weights[index]]
            terms += [(given(bias.old),) for bias in _bias(stage, index)]
            yield equation(f"{unit.z_name} = ", terms, f" = {fixed(unit.z)}")
            yield f"{_activated(unit, stage)} = {fixed(unit.value)}"
        yield from _more_units(stage, most, say)
    yield ""
    outputs = walk.stages[-1]
    for unit in outputs.units[: most.units]:
        assert unit.target is not None
        assert unit.error is not None
        distance = f"({given(unit.target)} − {bracketed(fixed(unit.value))})"
        yield f"E_{unit.name} = ½ {distance}² = {fixed(unit.error)}"
    yield from _more_units(outputs, most, say)
    yield f"E = {fixed(walk.error)}"


def back(stage: Stage, most: Most, say: Say) -> Iterator[str]:
    """Yield the lines of the backward pass through one layer: the chain of each of its weights."""
    chains = stage.chains()
    first = chains[0]
    yield f"∂E/∂{first.name} = {chain_rule(first)}"
    if stage.units[0].paths:
        yield say("and the error reaches a hidden unit through every weight that it feeds:")
        yield ""
        for unit in stage.units[: most.units]:
            yield from arrival(unit)
        yield from _more_units(stage, most, say)
    else:
        yield say("with ∂E/∂o = o − t, and the same for the others:")
    yield ""
    letter = first.unit[0]
    header = ["", f"∂E/∂{letter}", f"∂{letter}/∂z", "∂z/∂w"]
    header += [say("product"), "jax.grad", say("new")]
    shown = chains[: most.chains]
    left_out = chains[most.chains :]
    columns = [[w.name for w in shown]]
    for name in ("d_value", "slope", "source_value", "product", "jax_grad", "new"):
        columns.append(aligned(getattr(w, name) for w in shown))
    yield from table(header, columns)
    if left_out:
        steepest = _steepest(chains)
        weights = "weight" if len(left_out) == 1 else "weights"
        yield say(
            f"… and {{count}} more {weights}; the largest product is {{product}}, of {{name}}",
            count=f"{len(left_out):,}",
            product=fixed(steepest.product),
            name=steepest.name,
        )


def check(walk: Walkthrough, most: Most, say: Say) -> Iterator[str]:
    """Yield the lines of the check: forward with the new weights, and the two errors."""
    yield say("Forward again, with the new weights:")
    yield ""
    for stage in most.ends(walk.stages):
        for unit in stage.units[: most.units]:
            yield (
                f"{unit.z_name} = {fixed(unit.z_after)}    "
                f"{_activated(unit, stage)} = {fixed(unit.value_after)}"
            )
        yield from _more_units(stage, most, say)
    yield ""
    outputs = walk.stages[-1]
    for unit in outputs.units[: most.units]:
        assert unit.error_after is not None
        yield f"E_{unit.name} = {fixed(unit.error_after)}"
    yield from _more_units(outputs, most, say)
    yield ""
    before, after = aligned((walk.error, walk.error_after))
    yield say("E before {error}", error=before)
    yield f"{say('E after  {error}', error=after)}    {say(_change(walk.error, walk.error_after))}"
    weights = "weight" if len(walk.chains()) == 1 else "weights"
    yield say(
        f"By hand and by jax.grad, the largest difference over {{count}} {weights}: {{difference}}",
        count=f"{len(walk.chains()):,}",
        difference=short(walk.largest_difference),
    )
    if walk.config == WORKED_EXAMPLE:
        yield ""
        yield say("The article behind this example prints z2 = 0.10988248 and o2 = 0.66296548")
        yield say("here: misprints, since its own h2 and E_o2 agree with the values above.")


def final(walk: Walkthrough, most: Most, say: Say) -> Iterator[str]:
    """Yield the lines of the error curve, and of the state after the last step."""
    last = len(walk.curve) - 1
    shown = sorted({round(last * i / CURVE_ROWS) for i in range(CURVE_ROWS + 1)})
    rows = [walk.curve[i] for i in shown]
    top = max((error for _, error in rows if math.isfinite(error)), default=0.0)
    width = len(str(walk.final.steps))
    numbers = aligned(error for _, error in rows)
    widest = max(map(len, numbers))
    for (taken, error), number in zip(rows, numbers, strict=True):
        bar = "█" * round(CURVE_WIDTH * (error / top)) if top and math.isfinite(error) else ""
        step = say("step {taken}", taken=f"{taken:>{width}}")
        yield f"{step}   E = {number:<{widest}}   {bar}".rstrip()
    for named in (walk.final.outputs, walk.final.weights):
        yield ""
        yield from _values(named.keys(), aligned(named.values()), most)


def arrival(unit: Unit) -> Iterator[str]:
    """Yield dE/dh as the sum over the paths by which the error comes back."""
    start = f"∂E/∂{unit.name} = "
    yield start + total([f"∂E/∂{path.z_name}·{path.weight_name}" for path in unit.paths])
    terms = [(fixed(path.d_z), given(path.weight)) for path in unit.paths]
    yield equation(f"{'= ':>{len(start)}}", terms, f" = {fixed(unit.d_value)}")


def chain_rule(weight: Weight) -> str:
    """Return the chain rule for a weight, in names."""
    w, a, z = weight.name, weight.unit, weight.z_name
    return f"∂E/∂{a} · ∂{a}/∂{z} · ∂{z}/∂{w}"


def _activated(unit: Unit, stage: Stage) -> str:
    inner = unit.z_name if stage.activation == "none" else f"{stage.activation}({unit.z_name})"
    return f"{unit.name} = {inner}"


def _bias(stage: Stage, index: int) -> tuple[Weight, ...]:
    return stage.biases[index : index + 1]


def _values(names: Iterable[str], numbers: Iterable[str], most: Most) -> Iterator[str]:
    pairs = [f"{name} = {number}" for name, number in zip(names, numbers, strict=True)]
    yield from flow(elided(pairs, most.numbers), "   ")


def _more_units(stage: Stage, most: Most, say: Say) -> Iterator[str]:
    left_out = len(stage.units) - most.units
    if left_out > 0:
        units = "unit" if left_out == 1 else "units"
        yield say(f"… and {{count}} more {units}", count=f"{left_out:,}")


def _change(before: float, after: float) -> str:
    if not math.isfinite(after):
        return (
            "the error is no longer finite" if math.isfinite(before) else "the error is not finite"
        )
    if after == before:
        return "the error is the same"
    return "the error fell" if after < before else "the error grew"


def _steepest(chains: Sequence[Weight]) -> Weight:
    return max(chains, key=lambda weight: _size(weight.product))


def _size(number: float) -> float:
    """Return the absolute value; NaN counts as infinite."""
    return math.inf if math.isnan(number) else abs(number)
