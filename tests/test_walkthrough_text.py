"""The walkthrough on a terminal: the format of numbers, large networks, notices in words."""

import json
import math
import re
import sys

import jax.numpy as jnp
import pytest
from hypothesis import given, settings, strategies as st
from rich.cells import cell_len
from test_walkthrough import printed

import jaxprop as jp
from jaxprop.cli import main
from jaxprop.explanation import numerals
from jaxprop.walkthrough.config import WORKED_EXAMPLE, Config, Units, dump
from jaxprop.walkthrough.descent import walkthrough
from jaxprop.walkthrough.lines import equation
from jaxprop.walkthrough.notices import notices
from jaxprop.walkthrough.words import KOREAN, words

NAN, INF = math.nan, math.inf
SIGNED = Config(
    inputs=(-0.5, 0.25, 0.0),
    targets=(-1.0, 0.0),
    learning_rate=0.1,
    layers=(
        Units("tanh", ((-0.3, 0.5, 1.0), (0.123456789012, -1e-7, 2.0)), (-0.25, 0.1)),
        Units("none", ((-0.3, 0.5), (0.2, -1.0))),
    ),
)


def net(*weights, activation="none", inputs=(1.0, 2.0), targets=(1.0,), rate=0.1):
    """A config whose layers have these weights, and all but the last the activation."""
    layers = [Units(activation, rows) for rows in weights[:-1]] + [Units("none", weights[-1])]
    return Config(inputs, targets, rate, tuple(layers))


def show(capsys, tmp_path, config, *argv):
    path = tmp_path / "net.toml"
    path.write_text(config if isinstance(config, str) else dump(config))
    return printed(capsys, "--config", str(path), *argv)


def said(config, steps=1, language="en"):
    return list(notices(walkthrough(config, steps), words(language)))


# How numbers are written.


def test_a_zero_has_no_sign(capsys, tmp_path):
    assert numerals.fixed(-0.0) == "0.00000000"
    assert numerals.plain(-0.0) == numerals.given(-0.0) == "0"
    assert numerals.aligned([-0.0, 1e9]) == ["0", "1.0000e+09"]
    text = show(capsys, tmp_path, SIGNED)
    assert "0.00000000" in text
    assert not re.search(r"-0\.0*(?!\d)", text)


@given(st.lists(st.floats(-1e308, 1e308) | st.sampled_from([NAN, INF, -INF]), min_size=1))
def test_a_column_has_one_way_to_write_its_numbers(numbers):
    shown = numerals.aligned(numbers)
    assert all(len(text) <= 11 for text in shown)
    digits = [text for text in shown if text[-1].isdigit() and text != "0"]
    fractions = [re.search(r"\.(\d+)(e?)", text).groups() for text in digits]
    assert len({(len(decimals), exponent) for decimals, exponent in fractions}) <= 1
    for text, number in zip(shown, numbers, strict=True):
        if math.isnan(number):
            assert text == "nan"
        else:
            assert math.copysign(1, float(text)) == math.copysign(1, number + 0.0)
            assert (float(text) == 0) == (number == 0)
            assert float(text) == pytest.approx(number, rel=1e-3, abs=1e-4)


def test_given_numbers_stand_as_they_were_given_and_computed_ones_with_eight_decimals():
    assert [numerals.given(n) for n in (0.45, -1.0, 1e-7, 784)] == ["0.45", "-1", "1e-07", "784"]
    assert numerals.given(0.098159403) == "0.098159403"
    assert numerals.given(0.09815940260887146) == "0.09815940"
    assert numerals.fixed(-18.49) == "-18.4900000"


def test_negative_factors_and_terms_are_in_brackets(capsys, tmp_path):
    for argv in ((), ("--weight", "w1"), ("--weight", "w10")):
        text = show(capsys, tmp_path, SIGNED, *argv)
        assert not re.search(r"[·+−] ?-", text)
    text = show(capsys, tmp_path, SIGNED)
    assert "z1 = -0.3·(-0.5) + 0.5·0.25 + 1·0 + (-0.25) = 0.02500000" in text
    assert "z4 = 0.2·0.02499479 + (-1)·0.03825291 = -0.03325395" in text
    assert "E_o2 = ½ (0 − (-0.03325395))² = 0.00055291" in text


@settings(max_examples=50)
@given(st.lists(st.tuples(st.floats(-1e300, 1e300), st.floats(-9, 9)), min_size=1, max_size=9))
def test_an_equation_fits_the_terminal(terms):
    shown = [tuple(map(numerals.fixed, term)) for term in terms]
    line = equation("∂E/∂h12 = ", shown, " = -0.12345678")
    assert cell_len(line) <= 78
    assert not re.search(r"[·+] ?-", line)


def test_an_explanation_writes_its_numbers_in_the_same_way():
    params = (jp.AffineParams(jnp.array([[-0.5], [0.25]]), None),)
    x, target = jnp.array([[-2.0, 100.0]]), jnp.array([[30.0]])
    net = jp.chain(jp.Dense(1, bias=False))
    text = str(jp.explain(net, jp.HalfSquaredError(), params, x, target))
    assert "x        -2.0000000 100.0000000" in text
    assert "x (-2.00000000) · ct (-4.00000000) = 8.00000000" in text


# What is counted.


def test_the_steps_are_those_of_the_descent(capsys):
    assert "step" not in printed(capsys).lower().replace("sigmoid", "")
    text = printed(capsys, "--steps", "7")
    titles = [line for line in text.splitlines() if line and line[0] != " "]
    assert titles == [
        "The network",
        "Forward (step 1 of 7)",
        "Back to the output weights (step 1 of 7)",
        "Back to the hidden weights (step 1 of 7)",
        "The check (step 1 of 7)",
        "After 7 steps",
    ]
    assert re.findall(r"^  step (\d+) ", text, re.MULTILINE) == [str(i) for i in range(8)]


# Large networks.


LARGE = """
inputs = [1, 2, 3]
targets = [1]
learning_rate = 1e-6
[[layers]]
activation = "tanh"
units = 300
[[layers]]
activation = "none"
units = 1
"""


def test_a_large_network_is_readable(capsys, tmp_path):
    text = show(capsys, tmp_path, LARGE)
    lines = text.splitlines()
    assert len(lines) <= 180
    assert all(cell_len(line) <= 80 for line in lines)
    assert re.search(r"^  hidden +300 +900 ", text, re.MULTILINE)
    assert "… and 292 more units" in text
    assert "--all" in text
    document = json.loads(show(capsys, tmp_path, LARGE, "--json"))
    for stage, left_out in zip(document["stages"], (876, 276), strict=True):
        weights = [w for row in stage["weights"] for w in row]
        steepest = max(weights, key=lambda w: abs(w["product"]))
        product = numerals.fixed(steepest["product"])
        assert f"… and {left_out} more weights; the largest product is {product}" in text
        assert f"of {steepest['name']}" in text
    every = show(capsys, tmp_path, LARGE, "--all")
    assert "more units" not in every
    assert "By layer" not in every
    assert all(f"\n  w{i} " in every for i in range(1, 1201))


@pytest.mark.full
def test_a_large_network_in_korean_has_the_same_numbers(capsys, tmp_path):
    english = show(capsys, tmp_path, LARGE, "--steps", "3")
    korean = show(capsys, tmp_path, LARGE, "--steps", "3", "--lang", "ko")
    numbers = re.compile(r"\d\.\d{8}")
    assert sorted(numbers.findall(english)) == sorted(numbers.findall(korean))
    assert "층별 요약 (3번의 갱신 중 1번째)" in korean
    assert all(cell_len(line) <= 80 for line in korean.splitlines())
    allowed = {"tanh", "float", "jax.grad", "all", "weight", "json", "none"}
    assert set(re.findall(r"[A-Za-z.]{3,}", korean)) <= allowed


@pytest.mark.full
def test_a_deep_network_shows_both_ends(capsys, tmp_path):
    config = net(*[((0.9,),)] * 40, inputs=(1.0,))
    text = show(capsys, tmp_path, config)
    assert len(text.splitlines()) <= 160
    assert "Back to the hidden-1 weights" in text
    assert "Back to the hidden-39 weights" in text
    assert "Back to the hidden-20 weights" not in text
    assert "Back to the hidden-20 weights" in show(capsys, tmp_path, config, "--all")


def test_a_network_that_fits_is_printed_whole(capsys):
    assert printed(capsys) == printed(capsys, "--all")


# What stands out, in words.


DEAD = net(((-0.3, -0.5), (0.2, 0.3)), ((-0.3, 0.5),), activation="relu")
ALL_DEAD = net(((-0.3, -0.5), (-0.2, -0.3)), ((-0.3, 0.5),), activation="relu")
DIVERGES = net(((-0.3, 0.5), (0.2, -1.0)), ((-0.3, 0.5),), rate=5.0)
DIES = net(((0.5, 0.5), (0.2, 0.3)), ((0.3, 0.5),), activation="relu", rate=5.0)
TOO_LARGE = net(((1e200, 0.5), (0.2, -1.0)), ((-0.3, 0.5),), inputs=(1e200, 2.0))
SATURATED = net(((1.0, 2.0), (0.01, 0.02)), ((0.1, 0.2),), activation="sigmoid", inputs=(9.0, 9.0))


UPHILL, TOO_LONG = net(((0.5, 0.0),), rate=-0.1), net(((0.5, 0.0),), rate=1.0)
RISES = net(((0.1,),), ((1.5,),), inputs=(1.0,), rate=0.9)
LONG = "The steps are too long."


@pytest.mark.few(1)
@pytest.mark.parametrize(
    ("config", "steps", "expected"),
    [
        (WORKED_EXAMPLE, 20, []),
        (DEAD, 1, ["Dead for this example in the hidden layer: h1 (1 of 2)."]),
        (ALL_DEAD, 3, ["All units of the hidden layer are dead: h1, h2.", "Every derivative is 0"]),
        (SATURATED, 1, ["Saturated in the hidden layer: h1 (1 of 2)."]),
        (TOO_LARGE, 4, ["z1 is inf: overflow."]),
        (net(((1.0, 0.0),)), 1, ["E is 0: every output is its target"]),
        (net(((0.5, 0.0),), rate=0.0), 1, ["The learning rate is 0: no weight moves."]),
        (UPHILL, 1, ["E grew from 0.125 to", "The learning rate is negative, and every step"]),
        (TOO_LONG, 1, ["E grew from 0.125 to 2.", f"{LONG} Try a smaller learning rate, such"]),
        (DIVERGES, 10, ["The descent diverges: after step 5 E", LONG]),
        (DIES, 3, ["E grew from 0.01125 to 0.5.", LONG, "After 3 steps: All units of the hidden"]),
        (RISES, 9, ["On the way E grew to 0.562799", LONG]),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_in_words(capsys, tmp_path, config, steps, expected):
    paragraphs = said(config, steps)
    assert len(paragraphs) == len(expected), paragraphs
    for paragraph, start in zip(paragraphs, expected, strict=True):
        assert paragraph.startswith(start)
    korean = said(config, steps, "ko")
    assert len(korean) == len(paragraphs)
    numbers = re.compile(r"\d[\d.e+-]*\d")
    for one, other in zip(paragraphs, korean, strict=True):
        assert sorted(numbers.findall(one)) == sorted(numbers.findall(other))
    text = show(capsys, tmp_path, config, "--steps", str(steps))
    assert ("What stands out" in text) == bool(expected)
    assert "".join("".join(paragraphs).split()) in "".join(text.split())
    assert all(cell_len(line) <= 80 for line in text.splitlines())


def test_the_step_of_the_overflow_is_counted_over_a_long_descent():
    """The step from which E is not finite is the same, however coarse the curve's intervals are."""
    config = net(((1.0,),), inputs=(1.0,), targets=(2.0,), rate=2.02)  # |o - t| grows 1.02-fold
    steps = math.ceil(math.log(sys.float_info.max) / 2 / math.log(1.02))  # until E overflows
    for total in (steps + 10, 5 * steps):
        assert walkthrough(config, total).final.nonfinite_after == pytest.approx(steps, abs=1)
    assert walkthrough(config, steps - 5).final.nonfinite_after is None


def test_equal_infinities_do_not_differ():
    assert walkthrough(TOO_LARGE).largest_difference == 0
    nan = net(((1e200, 1e200),), inputs=(1e200, -1e200))  # inf - inf
    assert math.isnan(walkthrough(nan).largest_difference)


def test_every_korean_sentence_takes_the_values_of_the_english_one():
    holes = re.compile(r"\{\w+\}")
    for english, korean in KOREAN.items():
        assert set(holes.findall(english)) == set(holes.findall(korean)), english


# The keys of the JSON document: scripts rely on them.


CONFIG = {"inputs", "targets", "learning_rate", "layers"}
CHAIN = {"name", "source", "unit", "z_name", "d_value", "slope", "source_value"}
CHAIN |= {"product", "jax_grad", "old", "new"}
UNIT = {"name", "z_name", "z", "value", "d_value", "paths", "target", "error"}
UNIT |= {"z_after", "value_after", "error_after"}


def test_the_keys_of_the_json_document(capsys, tmp_path):
    document = json.loads(show(capsys, tmp_path, SIGNED, "--json", "--steps", "2"))
    assert set(document) == {
        "config", "stages", "error", "error_after", "largest_difference", "curve", "final",
    }  # fmt: skip
    assert set(document["config"]) == CONFIG
    assert all(
        set(units) == {"activation", "weights", "biases"} for units in document["config"]["layers"]
    )
    assert set(document["final"]) == {
        "steps", "error", "outputs", "weights", "slopes", "nonfinite_after",
    }  # fmt: skip
    for stage in document["stages"]:
        assert set(stage) == {"name", "activation", "inputs", "units", "weights", "biases"}
        for unit in stage["units"]:
            assert set(unit) == UNIT
            for path in unit["paths"]:
                assert set(path) == {"z_name", "weight_name", "d_z", "weight"}
        for chain in [*stage["biases"], *(w for row in stage["weights"] for w in row)]:
            assert set(chain) == CHAIN
    assert set(json.loads(show(capsys, tmp_path, SIGNED, "--json", "--weight", "b1"))) == CHAIN


def test_a_key_means_one_thing(capsys, tmp_path):
    """source_value is dz/dw, the value of the source; d_z is dE/dz."""
    document = json.loads(show(capsys, tmp_path, SIGNED, "--json"))
    hidden, output = document["stages"]
    values = dict(zip(hidden["inputs"], document["config"]["inputs"], strict=True))
    values |= {unit["name"]: unit["value"] for unit in hidden["units"]} | {"1": 1.0}
    d_z = {path["z_name"]: path["d_z"] for unit in hidden["units"] for path in unit["paths"]}
    for chain in [w for stage in (hidden, output) for row in stage["weights"] for w in row]:
        assert chain["source_value"] == values[chain["source"]]
    for chain in [w for row in output["weights"] for w in row]:
        assert d_z[chain["z_name"]] == pytest.approx(chain["d_value"] * chain["slope"])


def test_every_key_is_documented():
    from jaxprop.walkthrough import config, document

    shown = (document.Walkthrough, document.Stage, document.Unit, document.Path, document.Weight)
    for kind in (*shown, document.Final, config.Config, config.Units):
        for field in kind._fields:
            assert re.search(rf"^ +{field}: ", kind.__doc__, re.MULTILINE), (kind, field)


# Files that cannot be read.


def test_unreadable_config_is_one_line(capsys, tmp_path):
    path = tmp_path / "net.toml"
    path.write_text(f"inputs = {'[' * 5000}")
    assert main(["--config", str(path)]) == 2
    assert capsys.readouterr().err == f"jaxprop: {path}: not a TOML file: nested too deeply\n"
