"""The page, clicked through in a real browser: every number on it is the walk's."""

import json
import re

import pytest
from reading import DEEP, READ, check_drawing, config_of, exactly, expected, in_a_browser, shown

from jaxprop.cli import main
from jaxprop.walkthrough import config as configs
from jaxprop.walkthrough.descent import descent
from jaxprop.walkthrough.page import STEPS, page
from jaxprop.walkthrough.words import KOREAN, particles, words

DENSE = """
inputs = [0.5, -1, 2, 0.3, -0.7]
targets = [1, 0, 0.5]
learning_rate = 0.1
seed = 4
layers = [
    {activation = "tanh", units = 8, bias = true},
    {activation = "gelu", units = 6, bias = true},
    {activation = "sigmoid", units = 3, bias = true},
]
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


@pytest.mark.full
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


@pytest.mark.full
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
    tab.keyboard.press("ArrowLeft")  # once, whichever element has the focus
    assert tab.evaluate(key) == "update"
    tab.fill("#stage", "5")
    assert tab.evaluate(key) == "backward w5"
    assert tab.get_attribute("#stage", "aria-valuetext") == "6 of 17: Back to w5"
    assert tab.inner_text("#title") == "Back to w5"
    tab.click("[data-language=ko]")
    assert tab.inner_text("#title") == "w5까지 역전파"
    assert tab.evaluate("document.documentElement.lang") == "ko"
    assert tab.evaluate("document.getElementById('curve').hidden") is False
    ours = show(page(configs.WORKED_EXAMPLE, steps=1, language="ko"))
    assert ours.inner_text("h1") == KOREAN["Backpropagation, one number at a time"]
    assert ours.is_hidden("#frame")


@pytest.mark.few(1)
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


@pytest.mark.full
@in_a_browser
def test_the_formula_and_its_weights_are_on_a_small_screen(show):
    tab = show(page(config_of(DENSE), steps=2), viewport={"width": 390, "height": 800})
    seen = tab.evaluate("""() => [...stages.keys()].filter(
      (i) => !stages[i].key.startsWith("backward") || i % 4 === 0
    ).map((i) => {
      go(i);
      const box = document.querySelector(".drawing").getBoundingClientRect();
      const main = drawnAs(stages[i].lit.main)?.getBoundingClientRect() ?? box;
      const [x, y] = [(main.left + main.right) / 2, (main.top + main.bottom) / 2];
      return {
        key: stages[i].key,
        formula: document.getElementById("formula").getBoundingClientRect().bottom,
        drawn: x > box.left && x < box.right && y > box.top && y < box.bottom,
        scale: document.getElementById("network").getScreenCTM().a,
      };
    })""")
    assert len(seen) > 60
    assert [stage["key"] for stage in seen if stage["formula"] > 800] == []
    assert [stage["key"] for stage in seen if not stage["drawn"]] == []
    assert min(stage["scale"] for stage in seen) * 12.5 > 9


@in_a_browser
def test_the_drawing_has_names_and_widths(show):
    tab = show(page(config_of(DENSE), steps=1))
    visible = """() => [...document.querySelectorAll("#network .label")]
      .filter((label) => label.getBoundingClientRect().width).map((label) => label.dataset.name)"""
    assert tab.evaluate(visible) == [f"w{i}" for i in range(1, 6)]
    tab.evaluate("visit(stages.findIndex((stage) => stage.key === 'backward w50'))")
    assert tab.evaluate(visible) == ["w50"]
    tab.dispatch_event("#network .edge[data-name=w7] .hit", "pointerover")
    assert tab.evaluate(visible) == ["w7", "w50"]
    tab.dispatch_event("#network .edge[data-name=w7] .hit", "pointerout")
    assert tab.evaluate(visible) == ["w50"]
    small = show(page(configs.WORKED_EXAMPLE))
    assert small.evaluate(visible) == [f"w{i}" for i in range(1, 9)]
    names = small.evaluate(
        "[...document.querySelectorAll('#network .label .name')].map((name) => name.textContent)"
    )
    assert names == [f"w{i}" for i in range(1, 9)]
    widths = small.evaluate("""() => Object.fromEntries(
      [...document.querySelectorAll("#network .edge[data-name]:not(.main)")].map((edge) =>
        [edge.dataset.name, parseFloat(getComputedStyle(edge.firstElementChild).strokeWidth)]))""")
    assert widths["w7"] > widths["w8"] > widths["w5"] > widths["w4"] > 0.8


@pytest.mark.full
@in_a_browser
def test_a_click_on_a_name_goes_to_its_stage(show):
    tab = show(page(config_of(DEEP), steps=2), has_touch=True)
    key = "document.getElementById('panel').dataset.key"
    for name, wanted in {
        "w26": "backward w26",
        "b2": "backward b2",
        "h3": "arrival h3",  # backward, since that is shown
        "E": "error",
        "h4": "forward h4",
        "t2": "forward h4",  # has no stage; its value can be changed
    }.items():
        tab.tap(f"#network .node [data-name={name}], #network .label[data-name={name}]")
        assert tab.evaluate(key) == wanted
    assert tab.input_value("#name") == "t2"
    tab.focus("#outline [data-group='backward hidden-1']")
    tab.keyboard.press("Enter")
    assert tab.evaluate(key) == "arrival h1"
    tab.select_option("#pick", label="w3")
    assert tab.evaluate(key) == "backward w3"
    assert tab.get_attribute("#outline [aria-current]", "data-group") == "backward hidden-1"
    tab.focus("#pick")
    tab.keyboard.press("ArrowDown")
    assert tab.input_value("#frame") == "0"  # in this field the key does not move the descent


@in_a_browser
def test_playing_and_pausing(show):
    tab = show(page(configs.WORKED_EXAMPLE, steps=3))
    tab.clock.install(time=0)
    tab.clock.pause_at(10)  # otherwise real time would pass, too
    key = "document.getElementById('panel').dataset.key"
    tab.click("#stage-play")
    assert tab.get_attribute("#stage-play", "aria-label") == "Pause"
    tab.clock.run_for(4000)
    assert tab.evaluate(key) == "forward o1"
    tab.click("#stage-play")
    tab.clock.run_for(4000)
    assert tab.evaluate(key) == "forward o1"
    tab.click("#frame-play")
    tab.clock.run_for(600)
    assert tab.input_value("#frame") == "1"
    tab.clock.run_for(6000)
    assert (tab.input_value("#frame"), tab.evaluate(key)) == ("2", "forward o1")
    assert tab.get_attribute("#frame-play", "aria-label") == "Play"
    tab.click("#stage-play")
    tab.click("#next")
    assert tab.evaluate("state.playing") is None


@pytest.mark.few(1)
@in_a_browser
@pytest.mark.parametrize("language", ["en", "ko"])
def test_a_formula_has_one_font(browser, language):
    tab = browser.new_page()
    tab.set_content(page(configs.WORKED_EXAMPLE, steps=1, language=language))
    devtools = tab.context.new_cdp_session(tab)
    devtools.send("DOM.enable")
    devtools.send("CSS.enable")
    fonts = set()
    for stage in range(0, 17, 2):
        tab.evaluate(f"go({stage})")
        root = devtools.send("DOM.getDocument")["root"]["nodeId"]
        leaves = {"nodeId": root, "selector": "math :is(mi, mo, mn, mtext)"}
        for node in devtools.send("DOM.querySelectorAll", leaves)["nodeIds"]:
            used = devtools.send("CSS.getPlatformFontsForNode", {"nodeId": node})["fonts"]
            fonts |= {font["familyName"] for font in used}
    tab.close()
    assert len(fonts) == 1


@in_a_browser
def test_particles_follow_their_sound(show):
    said = {
        "h1은(는)": "h1은", "h2는": "h2는", "h12은(는)": "h12는", "w10을(를)": "w10을",
        "w3(으)로": "w3으로", "w8(으)로": "w8로", "o2(으)로": "o2로", "E이(가)": "E가",
        "층과(와)": "층과", "오차이(가)": "오차가", "길(으)로": "길로",
        "x6은(는) w4을(를)": "x6은 w4를",
    }  # fmt: skip
    assert {text: particles(text) for text in said} == said
    assert words("ko")("Back to {unit}", unit="h1") == "h1까지 역전파"
    tab = show(page(configs.WORKED_EXAMPLE, steps=1, language="ko"))
    texts = [*said, *(f"{letter}{i}(으)로" for letter in "xwbho" for i in range(130))]
    assert tab.evaluate("(texts) => texts.map(withParticles)", texts) == list(map(particles, texts))
    assert tab.inner_text("#sentence").endswith("활성화 함수를 거치면 h1이 됩니다.")


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
    motion = "getComputedStyle(document.querySelector('.drawing')).scrollBehavior"
    assert tab.evaluate(motion) == "auto"  # since reduced motion is requested
    assert grounds[0] > 700
    assert grounds[1] < 100


@pytest.mark.full
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
    for pair in re.findall(r'\? "([A-Z][^"]+)"\s*: "([A-Z][^"]+)"', made):
        said += pair
    assert len(said) > 20
    assert [words for words in said if words not in KOREAN] == []


def test_the_command_writes_it(capsys, tmp_path):
    path = tmp_path / "page.html"
    assert main(["--html", str(path), "--steps", "2", "--lang", "ko"]) == 0
    assert capsys.readouterr().out == ""
    assert path.read_text(encoding="utf-8").startswith('<!doctype html>\n<html lang="ko">')
    assert main(["--html", str(path)]) == 0
    assert f'max="{STEPS - 1}"' in path.read_text(encoding="utf-8")
    assert main(["--html", str(tmp_path / "no" / "page.html")]) == 2
    assert "page.html: no such file or directory" in capsys.readouterr().err
    assert main(["--html", str(path), "--weight", "w3"]) == 2
    assert "leave out --weight" in capsys.readouterr().err


def test_without_jinja2_it_says_what_to_install(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main(["--html", str(tmp_path / "page.html")]) == 2
    assert "pip install 'jaxprop-vjp[html]'" in capsys.readouterr().err
