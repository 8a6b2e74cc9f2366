"""Reading the page in a real browser: what it shows, and what the walkthrough says it should."""

import re
import shutil
import tomllib

import pytest

from jaxprop.walkthrough import config as configs

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
in_a_browser = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")


DEEP = """
inputs = [0.5, -1, 2]
targets = [1, 0]
learning_rate = 0.1
seed = 4
[[layers]]
activation = "gelu"
units = 5
bias = true
[[layers]]
activation = "none"
units = 2
[[layers]]
activation = "softplus"
weights = [[0.5, -0.25], [1e-5, 2]]
biases = [0.1, -0.1]
"""
READ = """() => {
  const values = (root) => [...root.querySelectorAll(".value")].map((node) => node.textContent);
  const texts = (selector) => [...document.querySelectorAll(selector)].map((n) => n.textContent);
  const nodes = Object.fromEntries([...document.querySelectorAll("#network .node")].map((node) => [
    node.dataset.unit,
    [...node.querySelectorAll(".value, .below, .derivative")].map((text) => text.textContent),
  ]));
  const labels = Object.fromEntries([...document.querySelectorAll("#network .label")].map((label) =>
    [label.dataset.weight, label.querySelector(".number").textContent]));
  const lit = [...document.querySelectorAll("#network .edge:is(.lit, .main)")].map((edge) =>
    edge.dataset.weight || `${edge.dataset.source}E`);
  return {
    key: document.getElementById("panel").dataset.key,
    formula: values(document.getElementById("formula")),
    table: values(document.getElementById("table")),
    title: document.getElementById("title").textContent,
    spoken: document.getElementById("spoken").textContent,
    last: document.getElementById("next").disabled,
    nodes, labels, lit,
  };
}"""


def config_of(text):
    return configs.parse(tomllib.loads(text))


def number(text):
    return float(re.sub(r"[a-zA-Z∂]+\d* ", "", text).replace("−", "-"))


def shown(texts):
    return [number(text) for text in texts if text]


def exactly(numbers):
    """Approximately the numbers, as eight decimals show them, or an exponent with four."""
    return [pytest.approx(n, rel=5.1e-5 if abs(n) < 1e-4 else 0, abs=5.1e-9) for n in numbers]


def roughly(number):
    """Approximately the number, as the drawing shows it: four decimals, or an exponent with one."""
    return pytest.approx(number, rel=0.051, abs=5.1e-5 if 1e-3 <= abs(number) < 1e4 else 0)


def expected(walk, by_jax=True):
    """Yield (key, numbers in the formula, in the table) of every stage, from the walkthrough alone.

    Without by_jax, the last number of a weight's stage is left out.
    """
    inputs = dict(zip(walk.stages[0].inputs, walk.config.inputs, strict=True))
    outputs = walk.stages[-1].units
    for stage in walk.stages:
        for row, unit in enumerate(stage.units):
            terms = [n for w in stage.weights[row] for n in (w.old, w.source_value)]
            terms += [bias.old for bias in stage.biases[row : row + 1]]
            yield f"forward {unit.name}", [*terms, unit.z, unit.value], []
            inputs[unit.name] = unit.value
    errors = [unit.error for unit in outputs]
    each = [n for unit in outputs for n in (unit.target, unit.value, unit.error)]
    yield "error", [*each, *errors, walk.error], []
    for stage in reversed(walk.stages):
        is_output = stage is walk.stages[-1]
        for unit in stage.units if not is_output else ():
            paths = [n for path in unit.paths for n in (path.d_z, path.weight)]
            yield f"arrival {unit.name}", [*paths, unit.d_value], []
        for row, unit in enumerate(stage.units):
            for w in (*stage.weights[row], *stage.biases[row : row + 1]):
                first = [unit.value, unit.target, unit.d_value] if is_output else []
                chain = [
                    w.d_value,
                    w.slope,
                    w.source_value,
                    w.product,
                    *([w.jax_grad] if by_jax else []),
                ]
                yield f"backward {w.name}", [*first, *chain], []
    weights = walk.chains()
    rows = [n for w in weights for n in (w.old, w.product, w.new)]
    yield "update", [walk.config.learning_rate], rows
    after = [n for unit in outputs for n in (unit.target, unit.value_after, unit.error_after)]
    errors = [unit.error_after for unit in outputs]
    yield "after", [*after, *errors, walk.error_after, walk.error, walk.error_after], []


def check_drawing(seen, walk):
    """Assert that the numbers that the drawing shows are the walkthrough's."""
    after, updated = seen["key"] == "after", seen["key"] in ("update", "after")
    for name, value in zip(walk.stages[0].inputs, walk.config.inputs, strict=True):
        assert number(seen["nodes"][name][0]) == roughly(value)
    for stage in walk.stages:
        for row, unit in enumerate(stage.units):
            value, *below, derivative = seen["nodes"][unit.name]
            if value:
                assert number(value) == roughly(unit.value_after if after else unit.value)
            if derivative:
                assert number(derivative) == roughly(unit.d_value)
            wanted = [b.new if updated else b.old for b in stage.biases[row : row + 1]]
            wanted += [] if unit.target is None else [unit.target]
            assert shown(below) == list(map(roughly, wanted))
            for w in stage.weights[row]:
                assert number(seen["labels"][w.name]) == roughly(w.new if updated else w.old)
    (error,) = [text for text in seen["nodes"]["E"] if text] or [None]
    if error is not None:
        assert number(error) == roughly(walk.error_after if after else walk.error)
