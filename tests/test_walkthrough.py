"""The worked example's published numbers, and the command that prints them."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rich.cells import cell_len

from jaxprop.cli import main
from jaxprop.walkthrough import config as configs
from jaxprop.walkthrough.config import WORKED_EXAMPLE, ConfigError
from jaxprop.walkthrough.descent import descent, walkthrough

# The values published in the article behind the example, to 8 decimals. Two that it prints
# differently after the step, z2 = 0.10988248 and o2 = 0.66296548, are misprints: its own h2 and
# E_o2 agree with the values here.
BEFORE = {
    "z1": 0.08, "z2": 0.11, "h1": 0.51998934, "h2": 0.52747230,
    "z3": 0.44498412, "z4": 0.68047592, "o1": 0.60944600, "o2": 0.66384491,
}  # fmt: skip
AFTER = {
    "z1": 0.07979778, "z2": 0.10982248, "h1": 0.51993887, "h2": 0.52742806,
    "z3": 0.43126996, "z4": 0.67650625, "o1": 0.60617688, "o2": 0.66295848,
    "E_o1": 0.02125445, "E_o2": 0.00198189,
}  # fmt: skip
CHAINS = {
    "w5": (0.20944600, 0.23802157, 0.51998934, 0.02592286, 0.43703857),
    "w1": (0.03240681, 0.24960043, 0.1, 0.00080888, 0.29959556),
}
NEW = (
    0.29959556, 0.24919112, 0.39964496, 0.34928991,
    0.43703857, 0.38685205, 0.69629578, 0.59624247,
)  # fmt: skip

DEEP = """
inputs = [0.5, -1, 2]
targets = [1, 0]
learning_rate = 0.1
seed = 4
[[layers]]
activation = "gelu"
units = 4
bias = true
[[layers]]
activation = "none"
units = 2
[[layers]]
activation = "softplus"
weights = [[0.5, -0.25], [1e3, 2]]
biases = [0.1, -0.1]
"""


def printed(capsys, *argv):
    assert main(list(argv)) == 0
    return capsys.readouterr().out


@pytest.fixture(scope="module")
def walk():
    return walkthrough(WORKED_EXAMPLE)


def test_published_forward(walk):
    units = [unit for stage in walk.stages for unit in stage.units]
    before = {u.z_name: u.z for u in units} | {u.name: u.value for u in units}
    after = {u.z_name: u.z_after for u in units} | {u.name: u.value_after for u in units}
    after |= {f"E_{u.name}": u.error_after for u in walk.stages[-1].units}
    assert {name: round(value, 8) for name, value in before.items()} == BEFORE
    assert {name: round(value, 8) for name, value in after.items()} == AFTER
    assert round(walk.error, 8) == 0.02397190
    assert round(walk.error_after, 8) == 0.02323634


def test_published_chains(walk):
    chains = {w.name: w for w in walk.chains()}
    for name, expected in CHAINS.items():
        w = chains[name]
        numbers = (w.d_value, w.slope, w.source_value, w.product, w.new)
        assert tuple(round(number, 8) for number in numbers) == expected
    assert tuple(round(w.new, 8) for w in walk.chains()) == NEW


def test_article_s_misprints_contradict_its_own_numbers():
    """sigmoid of the printed z2 is not its h2, and the printed o2 does not give its E_o2."""
    import math

    assert round(1 / (1 + math.exp(-0.10988248)), 8) != AFTER["h2"]
    assert round(1 / (1 + math.exp(-AFTER["z2"])), 8) == AFTER["h2"]
    assert round((0.6 - 0.66296548) ** 2 / 2, 8) != AFTER["E_o2"]
    assert round((0.6 - AFTER["o2"]) ** 2 / 2, 8) == AFTER["E_o2"]


@pytest.mark.parametrize("text", [configs.dump(WORKED_EXAMPLE), DEEP])
def test_every_chain_is_its_factors_and_jax_grad(text):
    import tomllib

    config = configs.parse(tomllib.loads(text))
    result = walkthrough(config, steps=3)
    for w in result.chains():
        assert w.d_value * w.slope * w.source_value == pytest.approx(
            w.product, rel=1e-12, abs=1e-300
        )
        assert w.jax_grad == pytest.approx(w.product, rel=1e-12, abs=1e-300)
        assert w.old - config.learning_rate * w.product == pytest.approx(w.new, rel=1e-12)
    assert result.largest_difference <= 1e-12
    for stage in result.stages[:-1]:
        for unit in stage.units:
            assert sum(p.d_z * p.weight for p in unit.paths) == pytest.approx(
                unit.d_value, rel=1e-9
            )


def test_prints_every_number_in_80_columns(capsys, walk):
    text = printed(capsys)
    for value in (*BEFORE.values(), *AFTER.values(), *NEW, walk.error, walk.error_after):
        assert f"{value:.8f}" in text
    for w in walk.chains():
        numbers = (w.d_value, w.slope, w.source_value, w.product, w.jax_grad, w.new)
        assert " ".join([w.name, *(f"{number:.8f}" for number in numbers)]) in text
    titles = [line for line in text.splitlines() if line and not line.startswith(" ")]
    assert titles == [
        "The network", "Forward", "Back to the output weights", "Back to the hidden weights",
        "The check",
    ]  # fmt: skip
    assert "misprints" in text
    assert "\x1b" not in text
    assert max(map(len, text.splitlines())) <= 80


def test_large_networks_stay_in_80_columns(capsys, tmp_path):
    (tmp_path / "net.toml").write_text(DEEP)
    text = printed(capsys, "--config", str(tmp_path / "net.toml"), "--steps", "50")
    assert max(map(len, text.splitlines())) <= 80
    assert "Back to the hidden-1 weights (step 1 of 50)" in text
    assert "misprints" not in text


def test_steps_go_on_to_the_end(capsys):
    text = printed(capsys, "walkthrough", "--steps", "1000")
    assert "After 1000 steps" in text
    assert "step 1000" in text
    steps = json.loads(printed(capsys, "--steps", "3", "--json"))
    assert [taken for taken, _ in steps["curve"]] == [0, 1, 2, 3]
    assert steps["curve"][1][1] == pytest.approx(0.02323634, abs=5e-9)
    assert steps["final"]["error"] == steps["curve"][-1][1] < steps["curve"][-2][1]
    one_by_one = WORKED_EXAMPLE
    for _ in range(3):
        rows = iter([w.new for w in walkthrough(one_by_one).chains()])
        layers = tuple(
            units._replace(weights=tuple(tuple(next(rows) for _ in row) for row in units.weights))
            for units in one_by_one.layers
        )
        one_by_one = one_by_one._replace(layers=layers)
    assert list(steps["final"]["weights"].values()) == pytest.approx(
        [w for units in one_by_one.layers for row in units.weights for w in row], rel=1e-12
    )


def test_one_weight(capsys):
    text = printed(capsys, "--weight", "w3")
    assert "∂E/∂w3 = ∂E/∂h2 · ∂h2/∂z2 · ∂z2/∂w3" in text
    assert "0.39964496" in text
    assert "w5" not in text
    chain = json.loads(printed(capsys, "--weight", "w3", "--json"))
    assert (chain["name"], chain["source"], chain["unit"]) == ("w3", "x1", "h2")


def test_json_is_the_walkthrough(capsys, walk):
    assert json.loads(printed(capsys, "--json")) == json.loads(json.dumps(walk.document()))


def test_json_of_a_divergence_is_json(capsys, tmp_path):
    text = configs.dump(WORKED_EXAMPLE._replace(learning_rate=1e200)).replace("sigmoid", "none")
    (tmp_path / "net.toml").write_text(text)
    out = printed(capsys, "--config", str(tmp_path / "net.toml"), "--steps", "9", "--json")

    def refuse(constant):
        raise AssertionError(constant)

    assert json.loads(out, parse_constant=refuse)["final"]["error"] is None


@pytest.mark.parametrize("text", [configs.dump(WORKED_EXAMPLE), DEEP])
def test_printed_config_reads_back_to_the_same_numbers(capsys, tmp_path, text):
    first, second = tmp_path / "first.toml", tmp_path / "second.toml"
    first.write_text(text)
    second.write_text(printed(capsys, "--config", str(first), "--print-config"))
    assert configs.load(str(first)) == configs.load(str(second))
    assert configs.load(str(second)).layers[0].activation in configs.ACTIVATIONS
    assert printed(capsys, "--config", str(second), "--print-config") == second.read_text()


GOOD = configs.dump(WORKED_EXAMPLE)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("inputs = [0.1, 0.2]", "inputs = [0.1, nan]", r"inputs[1] is nan; it must be finite"),
        ("inputs = [0.1, 0.2]", "inputs = [0.1, -inf]", r"inputs[1] is -inf"),
        ("inputs = [0.1, 0.2]", "inputs = []", "inputs must be a list of numbers, not []"),
        ("inputs = [0.1, 0.2]", "inputs = 3", "inputs must be a list of numbers, not 3"),
        ("inputs = [0.1, 0.2]", 'inputs = [0.1, "a"]', "inputs[1] must be a number, not 'a'"),
        ("inputs = [0.1, 0.2]", "inputs = [[0.1, 0.2]]", "inputs[0] must be a number"),
        ("inputs = [0.1, 0.2]", "", "inputs is missing"),
        ("inputs = [0.1, 0.2]", "inputs = [1]", "layers[0].weights[0] has 2 numbers for 1 inputs"),
        (
            "targets = [0.4, 0.6]",
            "targets = [1]",
            "targets has 1 numbers, but the last layer has 2",
        ),
        ("learning_rate = 0.5", "learning_rate = true", "learning_rate must be a number, not True"),
        ("learning_rate = 0.5", "learning_rat = 0.5", "did you mean learning_rate?"),
        ("learning_rate = 0.5", f"learning_rate = 1{'0' * 400}", "learning_rate is inf"),
        (
            "learning_rate = 0.5",
            "learning_rate = 0.5\nseed = -1",
            "seed must be a whole number from 0",
        ),
        (
            'activation = "sigmoid"',
            'activation = "sigmoidal"',
            "layers[0].activation is 'sigmoidal'",
        ),
        ('activation = "sigmoid"', "activation = [1]", "layers[0].activation is [1]"),
        ('activation = "sigmoid"', "", "layers[0].activation is missing"),
        ("[0.3, 0.25],", "[0.3],", "layers[0].weights[0] has 1 numbers for 2 inputs"),
        ("[0.3, 0.25],", "0.3,", "layers[0].weights[0] must be a list of numbers, not 0.3"),
        ("[0.45, 0.4],", "[0.45, nan],", "layers[1].weights[0][1] is nan"),
        ("[0.7, 0.6],\n]", "[0.7, 0.6],\n]\nbiases = [1]", "layers[1].biases has 1 numbers for 2"),
        ("[0.7, 0.6],\n]", "[0.7, 0.6],\n]\nunits = 2", "layers[1] has both units and weights"),
        ("[0.7, 0.6],\n]", "[0.7, 0.6],\n]\nbias = true", "layers[1].bias goes with units"),
        ("[[layers]]", "[layers]", "not a TOML file"),
        ("inputs =", "inputs", "not a TOML file"),
    ],
)
def test_wrong_config_is_one_line_and_exit_2(capsys, tmp_path, old, new, message):
    path = tmp_path / "net.toml"
    assert old in GOOD
    path.write_text(GOOD.replace(old, new, 1))
    assert main(["--config", str(path)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"jaxprop: {path}: ")
    assert message in err
    assert err.count("\n") == 1


def test_too_many_weights_is_said_before_they_are_drawn(capsys, tmp_path):
    path = tmp_path / "net.toml"
    path.write_text(DEEP.replace("units = 4", "units = 9000").replace("units = 2", "units = 8000"))
    assert main(["--config", str(path)]) == 2
    assert "layers[1] has 8000 x 9000 weights" in capsys.readouterr().err


def test_too_many_units_is_said_before_they_are_drawn(capsys, tmp_path):
    path = tmp_path / "net.toml"
    path.write_text(DEEP.replace("units = 4", "units = 3000000000"))
    assert main(["--config", str(path)]) == 2
    assert "layers[0].units must be a whole number from 1 to 10000" in capsys.readouterr().err


@pytest.mark.parametrize("layers", ["layers = []", "layers = 3", "layers = [3]", ""])
def test_config_without_layers(layers):
    import tomllib

    with pytest.raises(ConfigError, match="layers"):
        configs.parse(tomllib.loads(f"inputs = [1]\ntargets = [1]\nlearning_rate = 1\n{layers}"))


def test_missing_file_and_missing_weight(capsys, tmp_path):
    assert main(["--config", str(tmp_path / "none.toml")]) == 2
    assert "none.toml: no such file or directory" in capsys.readouterr().err
    assert main(["--config", str(tmp_path)]) == 2
    assert "is a directory" in capsys.readouterr().err
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe\x00")
    assert main(["--config", str(tmp_path / "binary.toml")]) == 2
    assert "not a TOML file" in capsys.readouterr().err
    assert main(["--weight", "w3", "--steps", "5"]) == 2
    assert "--weight shows the first step" in capsys.readouterr().err
    assert main(["--weight", "w9"]) == 2
    assert "--weight w9: no such weight; there are w1, w2" in capsys.readouterr().err


@pytest.mark.parametrize(
    "argv",
    [
        ["--steps", "0"],
        ["--steps", "9" * 20],
        ["--steps", "x"],
        ["walk"],
        ["--json", "--print-config"],
    ],
)
def test_wrong_arguments_exit_2(capsys, argv):
    with pytest.raises(SystemExit) as caught:
        main(argv)
    assert caught.value.code == 2
    assert "jaxprop" in capsys.readouterr().err


COMMAND = [sys.executable, "-m", "jaxprop"]
ENVIRONMENT = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}


@pytest.mark.full
def test_the_command_in_float64_within_ten_seconds():
    start = time.monotonic()
    environment = ENVIRONMENT | {"JAX_ENABLE_X64": "0", "COLUMNS": "40"}
    done = subprocess.run(COMMAND, env=environment, capture_output=True, text=True, check=True)
    assert time.monotonic() - start < 10
    assert done.stderr == ""
    assert "0.43703857" in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 80


@pytest.mark.full
def test_a_terminal_that_is_not_utf8():
    environment = ENVIRONMENT | {"PYTHONIOENCODING": "ascii"}
    done = subprocess.run(COMMAND, env=environment, capture_output=True, text=True, check=True)
    assert "0.43703857" in done.stdout


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="a full disk to write to")
@pytest.mark.full
def test_a_full_disk_is_one_line():
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            COMMAND, env=ENVIRONMENT, stdout=full, stderr=subprocess.PIPE, text=True, check=False
        )
    assert done.stderr == "jaxprop: No space left on device\n"
    assert done.returncode == 1


@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
def test_a_closed_pipe_ends_it_quietly():
    with subprocess.Popen(
        [*COMMAND, "--json"], env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as running:
        running.stdout.close()
        assert running.stderr.read() == b""
    assert running.returncode == -signal.SIGPIPE


@pytest.mark.full
@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
def test_ctrl_c_ends_it_quietly():
    with subprocess.Popen(
        [*COMMAND, "--steps", "900000000"],
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as running:
        time.sleep(4)
        running.send_signal(signal.SIGINT)
        out, err = running.communicate(timeout=10)
    assert (out, err) == (b"", b"")
    assert running.returncode == -signal.SIGINT


@pytest.mark.skipif(not os.path.exists("/proc/self/maps"), reason="Linux tells what is loaded")
def test_ctrl_c_while_jax_is_imported_is_quiet():
    with subprocess.Popen(COMMAND, env=ENVIRONMENT, stderr=subprocess.PIPE) as running:
        maps = Path(f"/proc/{running.pid}/maps")
        while running.poll() is None and "jaxlib" not in maps.read_text():
            time.sleep(0.002)
        running.send_signal(signal.SIGINT)
        assert running.stderr.read() == b""
    assert running.returncode == -signal.SIGINT


def test_korean(capsys):
    english, korean = (
        printed(capsys, "--steps", "20"),
        printed(capsys, "--steps", "20", "--lang", "ko"),
    )
    assert [line[:3] for line in korean.splitlines() if line and line[0] != " "][:2] == [
        "신경망", "순전파",
    ]  # fmt: skip
    numbers = re.compile(r"\d\.\d{8}")
    assert numbers.findall(english) == numbers.findall(korean)
    assert all(cell_len(line) <= 80 for line in korean.splitlines())
    for word in re.findall(r"[A-Za-z.]{4,}", korean):
        assert word in ("sigmoid", "float", "jax.grad"), word
    one = printed(capsys, "--weight", "w3", "--lang", "ko")
    assert one.startswith("w3, x1에서 h2로 (은닉층)")


@pytest.mark.parametrize("text", [configs.dump(WORKED_EXAMPLE), DEEP])
def test_every_sentence_is_translated(capsys, tmp_path, text):
    (tmp_path / "net.toml").write_text(text)
    config = str(tmp_path / "net.toml")
    assert "갱신" in printed(capsys, "--config", config, "--steps", "2", "--lang", "ko")
    last = configs.load(config).layers[-1].biases
    assert "jax.grad의 값" in printed(capsys, "--config", config, "--weight", "w1", "--lang", "ko")
    assert last is None or "편향" in printed(
        capsys, "--config", config, "--weight", "b1", "--lang", "ko"
    )


def test_the_descent_is_one_walkthrough_after_the_other(walk):
    first, second = (shown for shown, _ in descent(WORKED_EXAMPLE, 5, 2))
    assert first.chains() == walk.chains()
    assert [w.old for w in second.chains()] == [w.new for w in first.chains()]
    assert second.error == first.error_after > second.error_after
    assert second.curve == first.curve
