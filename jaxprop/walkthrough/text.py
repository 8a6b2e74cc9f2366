"""The walkthrough as text for a terminal of 80 columns, or for a pipe."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence

from rich.cells import cell_len
from rich.console import Console
from rich.text import Text

from jaxprop.explanation.numerals import fixed, plain
from jaxprop.walkthrough.config import WORKED_EXAMPLE
from jaxprop.walkthrough.document import Stage, Unit, Walkthrough, Weight
from jaxprop.walkthrough.words import Language, Say, words

WIDTH = 80
TERMS = 4  # of a sum that are written out
LISTED = 64  # numbers of a list that are written out
CURVE_ROWS = 10  # intervals of the error curve, at most
CURVE_WIDTH = 40  # columns of its longest bar


def show(walk: Walkthrough, console: Console, language: Language = "en") -> None:
    """Print the network, the forward pass, a step back for each layer, and the check.

    Args:
        walk: the walkthrough. With more than one step the state after the last is printed too.
        console: the console to print to.
        language: the language of the text.
    """
    say = words(language)
    sections = [(say("The network"), network(walk, say)), (say("Forward"), forward(walk))]
    for number, stage in enumerate(reversed(walk.stages), 1):
        title = say("Step {number}: the {layer} weights", number=number, layer=_layer(stage, say))
        sections.append((title, step(stage, say)))
    sections.append((say("The check"), check(walk, say)))
    if walk.final.steps > 1:
        title = say("After {steps} steps", steps=walk.final.steps)
        sections.append((title, final(walk, say)))
    _print(console, sections)


def show_weight(walk: Walkthrough, name: str, console: Console, language: Language = "en") -> None:
    """Print the chain rule for one weight, and nothing else.

    Args:
        walk: the walkthrough.
        name: the weight's name.
        console: the console to print to.
        language: the language of the text.
    """
    stage, chain = next((s, w) for s in walk.stages for w in s.chains() if w.name == name)
    unit = next(unit for unit in stage.units if unit.name == chain.unit)
    say = words(language)
    rate, bias = plain(walk.config.learning_rate), chain.source == "1"
    source = say("the bias") if bias else say("from {source}", source=chain.source)
    lines = [*_arrival(unit), ""] if unit.paths else []
    lines += [
        f"∂E/∂{name} = {_chain_rule(chain)}",
        f"{'':{len(name) + 5}}= "
        + " · ".join(_bracketed(fixed(f)) for f in (chain.d_value, chain.slope, chain.d_z)),
        f"{'':{len(name) + 5}}= {fixed(chain.product)}   {say('by hand')}",
        f"{'':{len(name) + 5}}= {fixed(chain.jax_grad)}   {say('by jax.grad')}",
        "",
        f"{say('new {name}', name=name)} = {plain(chain.old)} − {rate} · "
        f"{_bracketed(fixed(chain.product))} = {fixed(chain.new)}",
    ]
    title = say(
        "{name}, {source} to {unit} ({layer} layer)",
        name=name,
        source=source,
        unit=chain.unit,
        layer=_layer(stage, say),
    )
    _print(console, [(title, lines)])


def network(walk: Walkthrough, say: Say) -> Iterator[str]:
    """Yield the lines on the network: its layers, its values and its weights."""
    config = walk.config
    inputs = len(config.inputs)
    parts = [say("{count} input" if inputs == 1 else "{count} inputs", count=inputs)]
    for stage in walk.stages:
        units = "unit" if len(stage.units) == 1 else "units"
        parts.append(
            say(
                f"{{count}} {{layer}} {units} ({{activation}})",
                count=len(stage.units),
                layer=_layer(stage, say),
                activation=stage.activation,
            )
        )
    bias = [] if any(stage.biases for stage in walk.stages) else [say("no bias")]
    yield from _flow([*parts, *bias], ", ")
    rate = plain(config.learning_rate)
    yield say("error E = Σ ½ (t − o)², learning rate {rate}, float64", rate=rate)
    yield ""
    yield from _values(walk.stages[0].inputs, config.inputs)
    yield from _values([f"t{i + 1}" for i in range(len(config.targets))], config.targets)
    for stage in walk.stages:
        yield ""
        for index, unit in enumerate(stage.units):
            row = stage.weights[index]
            products = [f"{w.name}·{w.source}" for w in row] + [b.name for b in _bias(stage, index)]
            yield f"{unit.z_name} = {_sum(products)}    {_activated(unit, stage)}"
            numbers = [*row, *_bias(stage, index)]
            for line in _values([w.name for w in numbers], [w.old for w in numbers]):
                yield f"    {line}"
    yield ""
    yield say("In arrays z = x @ w, with a column for each unit:")
    for stage in walk.stages:
        columns = [[row[i].name for row in stage.weights] for i in range(len(stage.inputs))]
        rows = [f"[{_listed(column)}]" for column in columns]
        yield f"    {_layer(stage, say)}: w = [{_listed(rows, 3)}]"


def forward(walk: Walkthrough) -> Iterator[str]:
    """Yield the lines of the forward pass, up to the error."""
    for stage in walk.stages:
        for index, unit in enumerate(stage.units):
            products = [_product(plain(w.old), plain(w.d_z)) for w in stage.weights[index]]
            products += [plain(bias.old) for bias in _bias(stage, index)]
            yield f"{unit.z_name} = {_sum(products, 3)} = {fixed(unit.z)}"
            yield f"{_activated(unit, stage)} = {fixed(unit.value)}"
    yield ""
    for unit in walk.stages[-1].units:
        assert unit.target is not None
        assert unit.error is not None
        distance = f"({plain(unit.target)} − {_bracketed(fixed(unit.value))})"
        yield f"E_{unit.name} = ½ {distance}² = {fixed(unit.error)}"
    yield f"E = {fixed(walk.error)}"


def step(stage: Stage, say: Say) -> Iterator[str]:
    """Yield the lines of the step back through one layer: the chain of each of its weights."""
    first = stage.chains()[0]
    yield f"∂E/∂{first.name} = {_chain_rule(first)}"
    if stage.units[0].paths:
        yield say("and the error comes back to a hidden unit by every weight that it feeds:")
        yield ""
        for unit in stage.units:
            yield from _arrival(unit)
    else:
        yield say("with ∂E/∂o = o − t, and the same for the others:")
    yield ""
    letter = first.unit[0]
    header = ["", f"∂E/∂{letter}", f"∂{letter}/∂z", "∂z/∂w"]
    header += [say("product"), "jax.grad", say("new")]
    yield from _table(
        header,
        [
            [w.name, *map(fixed, (w.d_value, w.slope, w.d_z, w.product, w.jax_grad, w.new))]
            for w in stage.chains()
        ],
    )


def check(walk: Walkthrough, say: Say) -> Iterator[str]:
    """Yield the lines of the check: forward with the new weights, and the two errors."""
    yield say("Forward again, with the new weights:")
    yield ""
    for stage in walk.stages:
        for unit in stage.units:
            yield (
                f"{unit.z_name} = {fixed(unit.z_after)}    "
                f"{_activated(unit, stage)} = {fixed(unit.value_after)}"
            )
    yield ""
    for unit in walk.stages[-1].units:
        assert unit.error_after is not None
        yield f"E_{unit.name} = {fixed(unit.error_after)}"
    yield ""
    yield say("E before {error}", error=fixed(walk.error))
    change = "the error fell" if walk.error_after < walk.error else "the error did not fall"
    yield f"{say('E after  {error}', error=fixed(walk.error_after))}    {say(change)}"
    weights = "weight" if len(walk.chains()) == 1 else "weights"
    yield say(
        f"By hand and by jax.grad, the largest difference over {{count}} {weights}: {{difference}}",
        count=len(walk.chains()),
        difference=f"{walk.largest_difference:.1e}",
    )
    if walk.config == WORKED_EXAMPLE:
        yield ""
        yield say("The article behind this example prints z2 = 0.10988248 and o2 = 0.66296548")
        yield say("here: misprints, since its own h2 and E_o2 agree with the values above.")


def final(walk: Walkthrough, say: Say) -> Iterator[str]:
    """Yield the lines of the error curve, and of the state after the last step."""
    last = len(walk.curve) - 1
    shown = sorted({round(last * i / CURVE_ROWS) for i in range(CURVE_ROWS + 1)})
    rows = [walk.curve[i] for i in shown]
    top = max((error for _, error in rows if math.isfinite(error)), default=0.0)
    width = len(str(walk.final.steps))
    for taken, error in rows:
        bar = "█" * round(CURVE_WIDTH * error / top) if top and math.isfinite(error) else ""
        step = say("step {taken}", taken=f"{taken:>{width}}")
        yield f"{step}   E = {fixed(error):<11}  {bar}".rstrip()
    yield ""
    yield from _values(walk.final.outputs.keys(), walk.final.outputs.values())
    yield ""
    yield from _values(walk.final.weights.keys(), walk.final.weights.values())


def _print(console: Console, sections: Sequence[tuple[str, Iterable[str]]]) -> None:
    for index, (title, lines) in enumerate(sections):
        if index:
            console.print()
        console.print(Text(title, style="bold"), soft_wrap=True)
        for line in lines:
            console.print(Text(f"  {line}" if line else ""), soft_wrap=True)


def _arrival(unit: Unit) -> Iterator[str]:
    """Yield dE/dh as the sum over the paths by which the error comes back."""
    start = f"∂E/∂{unit.name} = "
    yield start + _sum([f"∂E/∂{path.z_name}·{path.weight_name}" for path in unit.paths])
    numbers = [_product(fixed(path.d_z), plain(path.weight)) for path in unit.paths]
    for most in (TERMS, 3, 2):
        line = f"{'= ':>{len(start)}}{_sum(numbers, most)} = {fixed(unit.d_value)}"
        if len(line) <= WIDTH - 2:
            break
    yield line  # pyright: ignore[reportPossiblyUnbound]


def _chain_rule(weight: Weight) -> str:
    w, a, z = weight.name, weight.unit, weight.z_name
    return f"∂E/∂{a} · ∂{a}/∂{z} · ∂{z}/∂{w}"


def _activated(unit: Unit, stage: Stage) -> str:
    inner = unit.z_name if stage.activation == "none" else f"{stage.activation}({unit.z_name})"
    return f"{unit.name} = {inner}"


def _bias(stage: Stage, index: int) -> tuple[Weight, ...]:
    return stage.biases[index : index + 1]


def _values(names: Iterable[str], numbers: Iterable[float]) -> Iterator[str]:
    pairs = [f"{name} = {plain(number)}" for name, number in zip(names, numbers, strict=True)]
    yield from _flow(_elided(pairs, LISTED), "   ")


def _flow(cells: Iterable[str], between: str) -> Iterator[str]:
    """Yield the cells one after the other, in lines that fit the terminal."""
    line = ""
    for cell in cells:
        if line and cell_len(line + between + cell) > WIDTH - 6:
            yield line.rstrip() + between.rstrip()
            line = ""
        line += between + cell if line else cell
    yield line


def _sum(parts: Sequence[str], most: int = TERMS) -> str:
    return " + ".join(_elided(parts, most))


def _product(*factors: str) -> str:
    """Return a·b, with brackets around a negative factor that is not the first."""
    return "·".join([factors[0], *map(_bracketed, factors[1:])])


def _bracketed(number: str) -> str:
    return f"({number})" if number.startswith("-") else number


def _listed(parts: Sequence[str], most: int = TERMS) -> str:
    return ", ".join(_elided(parts, most))


def _elided(parts: Sequence[str], most: int = TERMS) -> list[str]:
    """Return the parts; of more than ``most`` the first ones, an ellipsis and the last."""
    return list(parts) if len(parts) <= most else [*parts[: max(1, most - 2)], "…", parts[-1]]


def _layer(stage: Stage, say: Say) -> str:
    kind, dash, number = stage.name.partition("-")
    return say("hidden-{number}", number=number) if dash else say(kind)


def _table(header: list[str], rows: list[list[str]]) -> Iterator[str]:
    widths = [max(map(cell_len, column)) for column in zip(header, *rows, strict=True)]
    for row in (header, *rows):
        cells = [
            " " * (width - cell_len(cell)) + cell
            for cell, width in zip(row[1:], widths[1:], strict=True)
        ]
        yield " ".join([f"{row[0]:<{widths[0]}}", *cells])
