"""The page, clicked through in a real browser: every number on it is the walk's."""

import json
import re
import shutil
import tomllib

import pytest

from jaxprop.cli import main
from jaxprop.walkthrough import config as configs
from jaxprop.walkthrough.descent import descent
from jaxprop.walkthrough.page import page
from jaxprop.walkthrough.words import KOREAN

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
WIDE = """
inputs = [0.5, -1]
targets = [1, 0]
learning_rate = 0.1
[[layers]]
activation = "tanh"
units = 30
bias = true
[[layers]]
activation = "none"
units = 2
"""
READ = """() => {
  const values = (root) => [...root.querySelectorAll(".value")].map((node) => node.textContent);
  const texts = (selector) => [...document.querySelectorAll(selector)].map((n) => n.textContent);
  const nodes = Object.fromEntries([...document.querySelectorAll("#network .node")].map((node) => [
    node.dataset.unit,
    [...node.querySelectorAll(".value, .below, .derivative")].map((text) => text.textContent),
  ]));
  const labels = Object.fromEntries([...document.querySelectorAll("#network .label")].map((label) =>
    [label.dataset.weight, label.querySelector("tspan").textContent]));
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


@pytest.fixture(scope="module")
def browser():
    sync_api = pytest.importorskip("playwright.sync_api")
    with sync_api.sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield running
        running.close()


@pytest.fixture
def show(browser, tmp_path):
    """Open a page; at the end, nothing went wrong in it and nothing was asked of the network."""
    wrong, asked, contexts = [], [], []

    def opened(text, **options):
        path = tmp_path / "page.html"
        path.write_text(text, encoding="utf-8")
        contexts.append(browser.new_context(reduced_motion="reduce", **options))
        contexts[-1].set_default_timeout(120_000)
        tab = contexts[-1].new_page()
        tab.on("pageerror", lambda error: wrong.append(error))
        tab.on("console", lambda message: wrong.append(message.text))
        tab.on("request", lambda request: asked.append(request.url))
        tab.goto(path.as_uri())
        return tab

    yield opened
    for context in contexts:
        context.close()
    assert wrong == []
    assert [url for url in asked if not url.startswith("file:")] == []


def number(text):
    return float(re.sub(r"[a-zA-Z∂]+\d* ", "", text).replace("−", "-"))


def shown(texts):
    return [number(text) for text in texts if text]


def exactly(numbers):
    """As eight decimals show them, or an exponent with four."""
    return [pytest.approx(n, rel=5.1e-5 if abs(n) < 1e-4 else 0, abs=5.1e-9) for n in numbers]


def roughly(number):
    """As the drawing shows it: four decimals, or an exponent with one."""
    return pytest.approx(number, rel=0.051, abs=5.1e-5 if 1e-3 <= abs(number) < 1e4 else 0)


def expected(walk):
    """(key, numbers of the formula, of the table) of every stage, from the walkthrough alone."""
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
                chain = [w.d_value, w.slope, w.source_value, w.product, w.jax_grad]
                yield f"backward {w.name}", [*first, *chain], []
    weights = walk.chains()
    rows = [n for w in weights for n in (w.old, w.product, w.new)]
    yield "update", [walk.config.learning_rate], rows
    after = [n for unit in outputs for n in (unit.target, unit.value_after, unit.error_after)]
    errors = [unit.error_after for unit in outputs]
    yield "after", [*after, *errors, walk.error_after, walk.error, walk.error_after], []


def check_drawing(seen, walk):
    """Of the nodes and weights, those numbers that are there."""
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


@in_a_browser
@pytest.mark.parametrize(
    "text", [configs.dump(configs.WORKED_EXAMPLE), pytest.param(DEEP, marks=pytest.mark.full)]
)
def test_every_number_at_every_stage_of_every_step(show, text):
    config = config_of(text)
    tab = show(page(config, steps=3))
    for walk, _ in descent(config, 3, 3):
        for key, formula, table in expected(walk):
            seen = tab.evaluate(READ)
            assert seen["key"] == key
            assert shown(seen["formula"]) == exactly(formula)
            assert shown(seen["table"]) == exactly(table)
            check_drawing(seen, walk)
            assert seen["spoken"].startswith(seen["title"])
            _ = seen["last"] or tab.click("#next")
    assert tab.evaluate(READ)["last"]


@in_a_browser
def test_the_path_from_the_error_is_lit(show):
    tab = show(page(configs.WORKED_EXAMPLE))
    lit = {}
    for _ in range(17):
        seen = tab.evaluate(READ)
        lit[seen["key"]] = set(seen["lit"])
        tab.keyboard.press("ArrowRight")
    assert lit["forward h1"] == {"w1", "w2"}
    assert lit["error"] == {"o1E", "o2E"}
    assert lit["backward w5"] == {"w5", "o1E"}
    assert lit["arrival h2"] == {"w6", "w8", "o1E", "o2E"}
    assert lit["backward w3"] == {"w3", "w6", "w8", "o1E", "o2E"}
    assert lit["update"] == {f"w{i}" for i in range(1, 9)}


@in_a_browser
def test_keys_sliders_and_languages(show):
    tab = show(page(configs.WORKED_EXAMPLE, steps=4))
    key = "document.getElementById('panel').dataset.key"
    tab.keyboard.press("ArrowLeft")
    assert tab.evaluate(key) == "forward h1"
    for _ in range(16):
        tab.keyboard.press("ArrowRight")
    assert tab.evaluate(key) == "after"
    tab.keyboard.press("ArrowRight")
    assert (tab.evaluate(key), tab.input_value("#frame")) == ("forward h1", "1")
    tab.keyboard.press("ArrowLeft")
    assert (tab.evaluate(key), tab.input_value("#frame")) == ("after", "0")
    tab.keyboard.press("ArrowUp")
    assert tab.input_value("#frame") == "1"
    tab.focus("#stage")
    tab.keyboard.press("ArrowLeft")  # once, whoever has the focus
    assert tab.evaluate(key) == "update"
    tab.fill("#stage", "5")
    assert tab.evaluate(key) == "backward w5"
    assert tab.get_attribute("#stage", "aria-valuetext") == "6 of 17: Back to w5"
    assert tab.inner_text("#title") == "Back to w5"
    tab.click("[data-language=ko]")
    assert tab.inner_text("#title") == "w5까지 역전파"
    assert tab.evaluate("document.documentElement.lang") == "ko"
    assert tab.evaluate("document.getElementById('curve').hidden") is False
    ours = show(page(configs.WORKED_EXAMPLE, language="ko"))
    assert ours.inner_text("h1") == KOREAN["Backpropagation, one number at a time"]
    assert ours.is_hidden("#frame")


@in_a_browser
@pytest.mark.parametrize(
    "text",
    [
        configs.dump(configs.WORKED_EXAMPLE),
        pytest.param(DEEP, marks=pytest.mark.full),
        pytest.param(WIDE, marks=pytest.mark.full),
    ],
)
@pytest.mark.parametrize("width", [340, 1200])
def test_it_fits_the_screen(show, text, width):
    tab = show(page(config_of(text), steps=3), viewport={"width": width, "height": 800})
    for _ in range(tab.evaluate("stages.length")):
        assert tab.evaluate("document.documentElement.scrollWidth") <= width
        main = "document.querySelector('#network .node.main')?.getBoundingClientRect()"
        box = tab.evaluate(main)
        assert box is None or (box["left"] >= 0 and box["right"] <= width)
        tab.keyboard.press("ArrowRight")


@in_a_browser
def test_dark_and_light(show):
    text = page(configs.WORKED_EXAMPLE)
    grounds = []
    for scheme in ("light", "dark"):
        tab = show(text, color_scheme=scheme)
        style = tab.evaluate(
            "(({backgroundColor: g, color}) => [g, color])(getComputedStyle(document.body))"
        )
        ground, ink = [sum(map(int, re.findall(r"\d+", colour)[:3])) for colour in style]
        assert abs(ground - ink) > 450
        grounds.append(ground)
    assert grounds[0] > 700
    assert grounds[1] < 100


@in_a_browser
def test_a_large_net_is_drawn_as_layers(show):
    config = config_of(WIDE)
    tab = show(page(config, steps=2))
    for walk, terms in descent(config, 2, 2):
        layers = list(terms.layers.values())
        dense, tanh, last = (layer.summaries for layer in layers)

        def four(summary):
            return [summary.mean, summary.rms, summary.max]

        wanted = {
            "forward hidden": [dense.y, tanh.y],
            "forward output": [last.y, last.y],
            "error": None,
            "backward output": [last.ct, last.grads.w],
            "backward hidden": [tanh.ct, dense.grads.w, dense.grads.b],
            "after": None,
        }
        for key, summaries in wanted.items():
            seen = tab.evaluate(READ)
            assert seen["key"] == key
            if summaries is None:
                errors = [walk.error, walk.error_after] if key == "after" else [walk.error]
                assert shown(seen["formula"]) == exactly(errors)
            else:
                rows = zip(*map(four, summaries), strict=True)
                numbers = [float(n) for row in rows for n in row]
                texts = [text for text in seen["table"] if "%" not in text]
                assert shown(texts) == exactly(numbers)
            if not seen["last"]:
                tab.click("#next")


@pytest.mark.parametrize("text", [DEEP, pytest.param(WIDE, marks=pytest.mark.full)])
def test_it_is_one_file_under_a_megabyte(text):
    made = page(config_of(text), steps=500)
    assert len(made.encode()) < 1_000_000
    assert not re.search(r"(?:src|href)=|https?://(?!www\.w3\.org)|@import|url\(", made)


def test_a_divergence_and_a_script_tag_are_data(monkeypatch):
    config = configs.WORKED_EXAMPLE._replace(learning_rate=1e200)
    layers = tuple(units._replace(activation="none") for units in config.layers)
    made = page(config._replace(layers=layers), steps=9)
    data = re.search(r'id="data">(.*?)</script>', made, re.DOTALL).group(1)
    assert json.loads(data, parse_constant=pytest.fail)["frames"][-1]["error"] is None
    monkeypatch.setitem(KOREAN, "</script><script>alert(1)", "<!--")
    assert "alert(1)" in page(configs.WORKED_EXAMPLE)
    assert "</script><script>alert" not in page(configs.WORKED_EXAMPLE)


def test_every_word_on_the_page_is_translated():
    made = page(configs.WORKED_EXAMPLE)
    said = re.findall(r'(?:data-say|data-label)="([^"]*)"', made) + re.findall(
        r'say\("([^"]*)"', made
    )
    said += re.findall(r'\? "([A-Z][^"]*)" : "([A-Z][^"]*)"', made)[0]
    assert len(said) > 20
    assert [words for words in said if words not in KOREAN] == []


def test_the_command_writes_it(capsys, tmp_path):
    path = tmp_path / "page.html"
    assert main(["--html", str(path), "--steps", "2", "--lang", "ko"]) == 0
    assert capsys.readouterr().out == ""
    assert path.read_text(encoding="utf-8").startswith('<!doctype html>\n<html lang="ko">')
    assert main(["--html", str(tmp_path / "no" / "page.html")]) == 2
    assert "page.html: no such file or directory" in capsys.readouterr().err
    assert main(["--html", str(path), "--weight", "w3"]) == 2
    assert "leave out --weight" in capsys.readouterr().err


def test_without_jinja2_it_says_what_to_install(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main(["--html", str(tmp_path / "page.html")]) == 2
    assert "pip install 'jaxprop-vjp[html]'" in capsys.readouterr().err
