"""The walkthrough as an HTML page to step through, in one file that loads nothing else."""

from __future__ import annotations

import itertools
import math
from typing import Any

from jaxprop.explanation.summary import Summary
from jaxprop.explanation.terms import Explanation, Terms
from jaxprop.walkthrough import drawing
from jaxprop.walkthrough.config import ACTIVATIONS, Config
from jaxprop.walkthrough.descent import descent
from jaxprop.walkthrough.document import Stage, Walkthrough
from jaxprop.walkthrough.words import KOREAN, LANGUAGES, PARTICLES, Language

BUDGET = 500_000  # bytes of numbers in a page, at most
FRAMES = 200  # steps of descent in a page, at most
STEPS = 20  # steps of descent in a page by default


def page(config: Config, steps: int = STEPS, language: Language = "en") -> str:
    """Return the page as HTML.

    It holds as many of the first steps of the descent as fit into about 500 kB, and the error curve
    of all steps. The reader can change inputs, targets, weights and the learning rate; the page
    then recomputes the walk with its own arithmetic. A network with many units in a layer is shown
    layer by layer, and cannot be changed.

    Args:
        config: the network.
        steps: the number of steps to descend.
        language: the language that the page opens in.
    """
    import jinja2

    widths = [len(config.inputs), *(len(units.weights) for units in config.layers)]
    unit_by_unit = max(widths) <= drawing.UNITS
    numbers = sum(a * b + b for a, b in itertools.pairwise(widths))
    size = 100 * numbers + 200 * sum(widths) if unit_by_unit else 2000 * len(widths)
    shown = max(1, min(steps, FRAMES, BUDGET // size))
    walks = descent(config, steps, shown)
    frame = _units if unit_by_unit else _layers
    first = walks[0][0]
    data = {
        "language": language,
        "korean": KOREAN,
        "particles": PARTICLES,
        "values": _values(first) if unit_by_unit else {"rate": config.learning_rate},
        "stages": [_names(stage) for stage in first.stages],
        "unitByUnit": unit_by_unit,
        "frames": [_finite(frame(walk, terms)) for walk, terms in walks],
        "curve": _finite(first.curve),
    }
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("jaxprop.walkthrough", "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.policies["json.dumps_kwargs"] = {
        "ensure_ascii": False,
        "separators": (",", ":"),
        "sort_keys": False,
    }
    return environment.get_template("page.html").render(
        language=language,
        languages=LANGUAGES,
        drawing=drawing.units(first) if unit_by_unit else drawing.layers(first),
        data=data,
        shown=shown,
    )


def _names(stage: Stage) -> dict[str, Any]:
    """Return the names in a stage, which are the same in every frame."""
    return {
        "name": stage.name,
        "activation": stage.activation,
        "inputs": stage.inputs,
        "units": [{"name": unit.name, "z": unit.z_name} for unit in stage.units],
        "weights": [[weight.name for weight in row] for row in stage.weights],
        "biases": [bias.name for bias in stage.biases],
    }


def _values(walk: Walkthrough) -> dict[str, float]:
    """Return what can be changed, by name: the learning rate, inputs, targets and weights."""
    config = walk.config
    targets = [unit.name.replace("o", "t") for unit in walk.stages[-1].units]
    return {
        "rate": config.learning_rate,
        **dict(zip(walk.stages[0].inputs, config.inputs, strict=True)),
        **dict(zip(targets, config.targets, strict=True)),
        **{weight.name: weight.old for weight in walk.chains()},
    }


def _units(walk: Walkthrough, _: Explanation) -> dict[str, Any]:
    """Return the numbers of one step of descent, by the names of units and weights."""
    d_z = {path.z_name: path.d_z for s in walk.stages for unit in s.units for path in unit.paths}
    units = {}
    for stage in walk.stages:
        for unit, row in zip(stage.units, stage.weights, strict=True):
            units[unit.name] = {
                "z": unit.z,
                "value": unit.value,
                "dValue": unit.d_value,
                "slope": row[0].slope,
                "dZ": d_z.get(unit.z_name),
                "error": unit.error,
                "valueAfter": unit.value_after,
                "errorAfter": unit.error_after,
            }
    weights = {w.name: [w.old, w.product, w.jax_grad, w.new] for w in walk.chains()}
    return {
        "error": walk.error,
        "errorAfter": walk.error_after,
        "units": units,
        "weights": weights,
    }


def _layers(walk: Walkthrough, terms: Explanation) -> dict[str, Any]:
    """Return a few numbers of each layer, for a network with too many units to draw."""
    ahead = iter(terms.layers.values())
    stages = []
    for stage in walk.stages:
        dense = next(ahead)
        active = dense if ACTIVATIONS[stage.activation] is None else next(ahead)
        stages.append(
            {
                "forward": {
                    "weighted sums z": _row(dense.summaries.y),
                    "values": _row(active.summaries.y, active),
                },
                "backward": {
                    "derivatives by the values": _row(active.summaries.ct),
                    "derivatives by the weights": _row(dense.summaries.grads.w),
                    "derivatives by the biases": _row(dense.summaries.grads.b),
                },
            }
        )
    return {"error": walk.error, "errorAfter": walk.error_after, "stages": stages}


def _row(summary: Summary | None, terms: Terms | None = None) -> list[float | None] | None:
    """Return mean, rms, largest, zeros, and for an activation the fraction that is saturated."""
    if summary is None:
        return None
    row = [float(n) for n in (summary.mean, summary.rms, summary.max, summary.zeros)]
    share = None if terms is None else terms.summaries.saturated
    return [*row, None if share is None else float(share)]


def _finite(value: object) -> Any:
    """Return the value with None in the place of NaN and infinity, which JSON does not have."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
