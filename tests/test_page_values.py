"""Values changed in the page: its own arithmetic agrees with the library."""

import itertools
import re

import pytest
from reading import (
    DEEP,
    READ,
    check_drawing,
    config_of,
    exactly,
    expected,
    in_a_browser,
    number,
    roughly,
    shown,
)

from jaxprop.walkthrough import config as configs
from jaxprop.walkthrough.descent import descent
from jaxprop.walkthrough.page import page

EVERY_ACTIVATION = """
inputs = [0.5, -1.5]
targets = [1, 0, 0.5]
learning_rate = 0.1
seed = 1
layers = [
    {activation = "tanh", units = 3},
    {activation = "gelu", units = 3, bias = true},
    {activation = "none", units = 3},
    {activation = "silu", units = 3},
    {activation = "softplus", units = 3, bias = true},
    {activation = "relu", units = 3},
    {activation = "sigmoid", units = 3},
]
"""


def numbers(value):
    """Yield every number in nested dicts and lists, in order, with its path."""
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, item in items:
        if isinstance(item, dict | list):
            yield from ((f"{key} {way}", n) for way, n in numbers(item))
        else:
            yield str(key), item


@pytest.mark.full
@in_a_browser
def test_the_page_s_arithmetic_is_the_library_s(show):
    config = config_of(EVERY_ACTIVATION)
    tab = show(page(config, steps=4))
    library, own = tab.evaluate("""() => {
      const plain = ({ quotient, ...frame }) => frame;
      const { frames, curve } = descend(data.stages, data.values, 4, 4);
      return [[data.frames, data.curve], [frames.map(plain), curve]];
    }""")
    for stage, z_signs in zip(
        tab.evaluate("data.stages.map(({ activation }) => activation)"),
        tab.evaluate("""data.stages.map(({ units }) =>
          units.map(({ name }) => Math.sign(data.frames[0].units[name].z)))"""),
        strict=True,
    ):
        assert stage == "none" or set(z_signs) == {-1, 1}, f"{stage}: both sides of zero"
    theirs, ours = dict(numbers(library)), dict(numbers(own))
    assert set(theirs) == set(ours)
    only = {way for way, n in theirs.items() if n is None}
    assert all(way.endswith((" dZ", " error", " errorAfter")) for way in only)
    by_jax = {way for way in theirs if re.search(r" weights \w+ 2$", way)}
    compared = theirs.keys() - only - by_jax
    assert len(compared) > 1000
    for way in compared:
        assert ours[way] == pytest.approx(theirs[way], rel=1e-11, abs=1e-15), way


def changed(config, tab):
    """Change one value of each kind in the page as a reader would; return the resulting config."""
    typed = {"x2": 0.7, "w1": -1.25}
    for name, value in typed.items():
        tab.select_option("#name", name)
        tab.fill("#number", str(value))
    tab.select_option("#name", "t1")
    tab.fill("#drag", "-0.24")
    tab.select_option("#name", "rate")
    tab.focus("#drag")
    tab.keyboard.press("ArrowRight")
    rate = float(tab.input_value("#number"))
    assert rate == pytest.approx(1.02 * config.learning_rate)  # a 200th of the slider
    first = config.layers[0]
    weights = ((-1.25, *first.weights[0][1:]), *first.weights[1:])
    return config._replace(
        inputs=(config.inputs[0], 0.7, *config.inputs[2:]),
        targets=(-0.24, *config.targets[1:]),
        learning_rate=rate,
        layers=(first._replace(weights=weights), *config.layers[1:]),
    )


@pytest.mark.full
@in_a_browser
@pytest.mark.parametrize("text", [EVERY_ACTIVATION, pytest.param(DEEP, marks=pytest.mark.full)])
def test_values_can_be_changed(show, text):
    config = config_of(text)
    tab = show(page(config, steps=3))
    before = tab.evaluate("document.getElementById('panel').textContent")
    new = changed(config, tab)
    assert tab.inner_text("#changed").startswith("Changed: learning rate, x2, t1, w1.")
    assert tab.is_hidden("#source")
    walks = descent(new, 3, 3)
    for frame, count in ((0, 3), (2, None)):
        walk = walks[frame][0]
        tab.evaluate(f"visit(0, {frame})")
        for key, formula, table in itertools.islice(expected(walk, by_jax=False), count):
            seen = tab.evaluate(READ)
            assert seen["key"] == key
            numbers = shown(seen["formula"])
            if key.startswith("backward"):
                *numbers, quotient = numbers
                assert quotient == pytest.approx(formula[-1], rel=6e-4, abs=1e-10)
            assert numbers == exactly(formula)
            assert shown(seen["table"]) == exactly(table)
            check_drawing(seen, walk)
            _ = seen["last"] or tab.click("#next")
    tab.click("#reset")
    tab.evaluate("visit(0, 0)")
    assert tab.evaluate("document.getElementById('panel').textContent") == before
    assert tab.evaluate("state.frames === data.frames")
    assert tab.is_disabled("#reset")


@in_a_browser
def test_a_number_of_the_drawing_is_dragged(show):
    tab = show(page(configs.WORKED_EXAMPLE, steps=2))
    for name, wanted in {
        "w3": 0.4 + 30 * 0.01,
        "x1": 0.1 + 30 * 0.01,
        "t2": 0.6 + 30 * 0.02,
    }.items():
        box = tab.locator(
            f"#network .label[data-name={name}], #network .node [data-name={name}]"
        ).bounding_box()
        x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
        tab.mouse.move(x, y)
        tab.mouse.down()
        tab.mouse.move(x + 20, y)
        tab.mouse.move(x + 30, y)
        tab.mouse.up()
        tab.mouse.move(x + 90, y)
        assert float(tab.input_value("#number")) == pytest.approx(wanted)
        assert tab.input_value("#stage") == "0"  # a drag is not a click
    assert number(tab.evaluate(READ)["labels"]["w3"]) == roughly(0.7)


@in_a_browser
def test_what_is_typed_may_be_no_number_or_too_large(show):
    config = configs.WORKED_EXAMPLE
    layers = tuple(units._replace(activation="none") for units in config.layers)
    tab = show(page(config._replace(layers=layers), steps=9))
    error = "document.querySelector('#network [data-name=E] .value').textContent"
    tab.fill("#number", "")
    assert tab.get_attribute("#number", "aria-invalid") == "true"
    assert tab.is_disabled("#reset")
    tab.press("#number", "Tab")
    assert tab.input_value("#number") == "0.5"
    assert tab.get_attribute("#number", "aria-invalid") is None
    tab.fill("#number", "1e200")
    tab.evaluate("visit(stages.length - 1, 8)")
    assert tab.evaluate(error) == "—"
    tab.click("#reset")
    assert tab.evaluate(error) != "—"
