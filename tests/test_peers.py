"""``bench --peers`` and ``bench --growth``: equal numbers on small networks, tables, exponents."""

import json
import math
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxprop as jp
from jaxprop.bench import networks
from jaxprop.bench.growth import report as growth
from jaxprop.bench.growth.fit import exponent
from jaxprop.bench.growth.rows import DEVICES, ROWS as GROWING, Growing, mlp
from jaxprop.bench.peers import report
from jaxprop.bench.peers.pair import Absent, Differ, Pair, Side, check, jitted
from jaxprop.bench.peers.rows import ROWS, Row
from jaxprop.cli import main


def small_gpt():
    config = jp.models.Gpt2Config(vocab=11, length=6, features=8, heads=4, layers=2)
    net, tokens = jp.models.gpt2(config, scan=False), jnp.arange(25, dtype=jnp.int32) % 11
    x, target = tokens[:24].reshape(4, 6), tokens[1:].reshape(4, 6)
    return net, jp.CrossEntropy(), (net.init(jax.random.key(0), x), x, target)


def small_mlp():
    net = jp.chain(jp.Dense(7), jp.Relu(), jp.Dense(7), jp.Relu(), jp.Dense(5))
    x, target = jax.random.normal(jax.random.key(1), (4, 6), jnp.float32), jnp.arange(4)
    return net, jp.CrossEntropy(), (net.init(jax.random.key(0), x), x, target)


SMALL = {
    "mlp": small_mlp,
    "gpt": small_gpt,
    "lstm": lambda: networks.lstm(batch=4, length=3, features=6),
    "3c3d": lambda: networks.three_c3d(4),
}


IN_JAX = [name for name, row in ROWS.items() if {*row.needs} <= {"flax", "equinox"}]
OTHERS = [name for name in ROWS if name not in IN_JAX and "compiled" not in name]


def same_on_both_sides(name):
    row = ROWS[name]
    for module in row.needs:
        pytest.importorskip(module)
    with jax.enable_x64(False), warnings.catch_warnings(action="ignore"):
        network = SMALL[row.network]()
        try:
            pair = row.make(network)
        except Absent as reason:
            pytest.skip(str(reason))
        check(pair)


@pytest.mark.few(2)
@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize("name", IN_JAX)
def test_a_row_computes_the_same_on_both_sides(name):
    same_on_both_sides(name)


@pytest.mark.full
@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize("name", OTHERS)
def test_a_row_of_the_peers_extra_computes_the_same_on_both_sides(name):
    same_on_both_sides(name)


def test_rows_of_every_network_and_peer():
    assert {row.network for row in ROWS.values()} == set(SMALL)
    needs = {module for row in ROWS.values() for module in row.needs}
    assert needs == {"flax", "equinox", "torch", "opacus", "backpack", "jax_privacy"}
    assert "3c3d/torch-last-compiled" in ROWS


def side(*arrays):
    return Side(lambda: None, lambda: dict(enumerate(arrays)))


@pytest.mark.parametrize(
    ("theirs", "message"),
    [
        (side(np.ones(3), np.full(2, 1.001)), "[1] is 1.4e-03 apart, of 1.4e+00; 1e-04 of it"),
        (side(np.ones(3), np.full(2, np.nan)), "[1] is nan apart"),
        (side(np.ones(3), np.ones(3)), "[1] is (2,) here and (3,) there"),
        (side(np.ones(3)), "ours are ['[0]', '[1]'], theirs ['[0]']"),
    ],
)
def test_other_numbers_are_an_error(theirs, message):
    ours = side(np.ones(3), np.ones(2))
    check(Pair(ours, ours))
    check(Pair(ours, side(np.ones(3), np.full(2, 1.001))), tolerance=1e-2)
    with pytest.raises(Differ) as error:
        check(Pair(ours, theirs))
    assert str(error.value).startswith(message)


@pytest.fixture
def fakes(monkeypatch):
    def make(network):
        return Pair(jitted(lambda x: x @ x, jnp.eye(9)), Side(lambda: None, lambda: np.eye(9)))

    def wrong(network):
        return Pair(make(network).ours, Side(lambda: None, lambda: np.zeros((9, 9))))

    def absent(network):
        raise Absent("it cannot")

    rows = {
        "mlp-second-moment/backpack": Row("mlp", (), make),
        "mlp/other": Row("mlp", (), absent),
        "gpt/none": Row("gpt", ("no_such_module",), make),
        "lstm/wrong": Row("lstm", (), wrong),
    }
    monkeypatch.setattr(report, "ROWS", rows)
    monkeypatch.setattr(report, "FULL", dict.fromkeys(SMALL, lambda: None))
    monkeypatch.setattr(report, "QUICK", 0.05)


@pytest.mark.full
@pytest.mark.usefixtures("fakes")
def test_the_table_of_peers(capsys, tmp_path):
    path = tmp_path / "figures.json"
    picture = tmp_path / "picture.png"
    argv = ["bench", "--peers", "--quick", "--json", str(path), "--plot", str(picture)]
    assert main([*argv, "--only", "mlp"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 100
    row = next(line for line in lines if line.startswith("mlp-second-moment/backpack "))
    assert row.endswith(" -")
    assert "mlp/other: it cannot" in lines
    figures = json.loads(path.read_text())
    assert list(figures["rows"]) == ["mlp-second-moment/backpack"]
    assert figures["absent"] == {"mlp/other": "it cannot"}
    assert picture.stat().st_size > 1000
    assert main(["bench", "--peers", "--quick", "--baseline", str(path), "--only", "mlp"]) in (0, 1)
    capsys.readouterr()
    assert main(["bench", "--peers", "--quick"]) == 2
    out, err = capsys.readouterr()
    assert "1 rows need no_such_module, skipped: pip install 'jaxprop-vjp[peers]'" in out
    assert "the numbers are not the same: lstm/wrong: the result is 3.0e+00 apart" in err


@pytest.mark.usefixtures("fakes")
def test_wrong_arguments_beside_peers(capsys, tmp_path):
    (tmp_path / "figures.json").write_text('{"rows": {}}')
    for argv, message in (
        (["--peers", "--only", "vgg"], "--only vgg: no such row; there are mlp-second"),
        (["--peers", "--only", "gpt"], "--peers: no_such_module not installed: pip install"),
        (["--growth", "--only", "vgg"], "--only vgg: no such row; there are mlp-gradient/depth"),
        (["--plot", "x.png"], "--plot draws --peers, --growth or --target"),
        (["--growth", "--large"], "--large is for the rows without --peers"),
        (["--growth", "--plot", str(tmp_path)], "is a directory"),
        (["--growth", "--baseline", str(tmp_path / "figures.json")], "--growth has none"),
    ):
        assert main(["bench", *argv]) == 2
        assert message in capsys.readouterr().err


def test_exponents_and_their_intervals():
    x = [1, 2, 4, 8, 16]
    found = exponent(x, [3 * a**1.5 for a in x])
    assert all(math.isclose(k, 1.5) for k in found)
    noise = np.random.default_rng(0).normal(size=(400, 5)) * 0.1
    inside = [
        exponent(x, [a**2 * math.exp(e) for a, e in zip(x, each, strict=True)]) for each in noise
    ]
    share = np.mean([low <= 2 <= high for _, low, high in inside])
    assert 0.92 <= share <= 0.98
    with pytest.raises(ValueError, match="of 3 to 8 pairs"):
        exponent([1, 2], [1, 2])


def test_the_table_of_growth(capsys, tmp_path, monkeypatch):
    row = Growing("depth", (1, 2, 3), jp.value_and_grad, lambda depth: mlp(depth, 4, 2))
    monkeypatch.setattr(growth, "ROWS", {"embedding-second-moment/length": row})
    monkeypatch.setattr(growth.devices, "memory", lambda: [800, 400, 200, 100])
    path, picture = tmp_path / "figures.json", tmp_path / "picture.png"
    with jax.enable_x64(False):
        assert main(["bench", "--growth", "--json", str(path), "--plot", str(picture)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 100
    assert not any("…" in line for line in lines)
    figures = json.loads(path.read_text())
    assert list(figures["rows"]) == ["embedding-second-moment/length", DEVICES]
    assert math.isclose(figures["rows"][DEVICES]["memory_exponent"]["k"], -1)
    assert figures["rows"][DEVICES]["time_exponent"] is None
    assert picture.stat().st_size > 1000


@pytest.mark.full
def test_rows_of_growth_trace_and_a_device_s_memory_falls():
    with jax.enable_x64(False):
        for name, row in GROWING.items():
            net, loss, args = row.network(row.sizes[0])
            assert jax.tree.leaves(jax.eval_shape(row.of(net, loss), *args)), name
    one, *_, eight = growth.devices.memory()
    assert eight <= 0.15 * one
