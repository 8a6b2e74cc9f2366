"""``jaxprop bench``: its figures, its table, and its comparison with a baseline."""

import io
import json
import math
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.flatten_util import ravel_pytree
from rich.console import Console
from table import relative_error

import jaxprop as jp
from jaxprop.bench import linen, measure, networks, regressions, rows
from jaxprop.bench.report import EXPLANATION, chosen
from jaxprop.bench.terminal import print_table, table_of
from jaxprop.cli import main


@pytest.fixture
def small(monkeypatch):
    """Rows that take no time, and a small matmul."""
    small_rows = {
        "mlp-small": lambda: rows.mlp(8, 16, 4, batch=4),
        "worked-example": lambda: rows.worked_example(steps=10),
    }
    monkeypatch.setattr("jaxprop.bench.report.ROWS", small_rows)
    monkeypatch.setattr("jaxprop.bench.report.matmul_rate", lambda: measure.matmul_rate(64))
    monkeypatch.setattr("jaxprop.bench.report.QUICK", (0.05, 2))


def test_rows_compute_the_same_by_hand_and_by_autodiff():
    for make in (lambda: rows.mlp(8, 16, 4, batch=4), lambda: rows.worked_example(steps=10)):
        case = make()
        hand, auto = (jax.jit(f())(*case.args) for f in (case.hand, case.auto))
        assert relative_error(hand, auto) <= 1e-5


@pytest.mark.full
@pytest.mark.usefixtures("standard_promotion")
def test_every_row_traces():
    """With the shapes of the rows' own arrays; nothing is computed."""

    def shapes(row):
        case = row()
        return [jax.eval_shape(make(), *case.args) for make in (case.hand, case.auto)]

    for name, row in rows.ROWS.items():
        hand, auto = jax.eval_shape(lambda row=row: shapes(row))
        assert jax.tree.leaves(hand), name
        assert jax.tree.leaves(auto), name


def test_the_rows_that_are_promised():
    assert list(rows.ROWS)[:5] == [
        "mlp-2x256",
        "mlp-2x1024",
        "mlp-8x512",
        "mlp-32x128",
        "worked-example",
    ]


ROOT = Path(__file__).parent.parent
FIGURES = (ROOT / ".github" / "docs" / "figures.md").read_text()


def test_the_page_of_figures_shows_the_table_as_it_is_printed():
    table = FIGURES.split("$ jaxprop bench\n")[1].split("```")[0]
    device, head, *lines = table.splitlines()
    assert "GFLOP/s" in device
    assert head.split()[:3] == ["row", "hand", "ms"]
    own = [name for name in rows.ROWS if not rows.needs_flax(name)]
    assert [line.split()[0] for line in lines[: len(own)]] == own
    assert "\n".join(lines[len(own) :]) == EXPLANATION


def test_the_readme_s_summary_is_that_of_the_tables():
    def ratios(section, *columns):
        """Of each row the given columns, without quartiles."""
        text = FIGURES.split(f"\n## {section}\n")[1].split("\n## ")[0]
        lines = [re.sub(r"\[.*?\]", "", line).split() for line in text.splitlines()]
        return {
            line[0]: [line[n] for n in columns] for line in lines if line and line[0] in rows.ROWS
        }

    cpu, h200 = ratios("On a CPU", 3, 7), ratios("On an H200", 3)
    v5e = ratios("For a TPU v5e, compiled", 3)
    readme = (ROOT / "README.md").read_text().split("| row | what is computed |")[1]
    summary = [line.strip("|").split("|") for line in readme.split("\n\n")[0].splitlines()[2:]]
    assert len(summary) > 15
    for row, _, *shown in ([cell.strip(" `") for cell in line] for line in summary):
        assert shown == [*cpu[row], *h200.get(row, "-"), *v5e.get(row, "-")], row


LINEN = {
    "mlp": (linen.Mlp((8, 10)), lambda: linen.classified(3, 6)),
    "cnn": (linen.Cnn((2, 3), 4), lambda: linen.classified(3, 8, 8, 2)),
    "gpt": (linen.Gpt(7, 8, 2, 1, scan=False), lambda: linen.tokens(3, 4, 7)),
    "gpt-scan": (linen.Gpt(7, 8, 2, 2, scan=True), lambda: linen.tokens(3, 4, 7)),
    "gpt-remat": (linen.Gpt(7, 8, 2, 2, scan=True, remat=True), lambda: linen.tokens(3, 4, 7)),
    "lstm": (linen.Lstm(4), lambda: linen.sequences(3, 5, 6)),
    "resnet": (linen.ResNet((8, 16)), lambda: linen.classified(3, 8, 8, 3)),
}


@pytest.mark.full
@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize("network", LINEN)
def test_rows_on_flax_networks_are_of_the_loss_that_they_stand_beside(network, monkeypatch):
    assert list(linen.MODELS) == list(LINEN)
    assert type(linen.MODELS[network][0]) is type(LINEN[network][0])
    monkeypatch.setattr(linen, "MODELS", LINEN)
    case = rows.linen(network, "norms")
    params, x, target = case.args
    vmapped = jax.jit(jax.vmap(case.auto(), (None, 0, 0)))
    values, each = vmapped(params, x[:, None], target[:, None])
    norms = sum(jnp.sum(g**2, range(1, g.ndim)) for g in jax.tree.leaves(each))
    assert relative_error(jax.jit(case.hand())(*case.args), norms) <= 1e-5
    clipping = rows.linen(network, "clipped")
    value, clipped = jax.jit(clipping.hand())(*case.args)
    scales = jnp.minimum(1, 1 / jnp.sqrt(norms)) / len(norms)
    mean = jax.tree.map(lambda g: jnp.tensordot(scales, g, 1), each)
    assert relative_error(value, values.mean()) <= 1e-5
    whole, right = ravel_pytree(clipped)[0], ravel_pytree(mean)[0]  # some leaves' gradients are 0
    assert relative_error(whole, right) <= 1e-5


@pytest.mark.full
@pytest.mark.usefixtures("standard_promotion")
def test_rows_beside_vmap_and_beside_our_layers(monkeypatch):
    monkeypatch.setattr(linen, "MODELS", LINEN)
    case = rows.linen_beside_vmap("cnn")
    assert relative_error(jax.jit(case.hand())(*case.args), case.auto()(*case.args)) <= 1e-5
    own = jp.chain(jp.Dense(8), jp.Relu(), jp.Dense(10)), jp.CrossEntropy()
    params = own[0].init(jax.random.key(0), jnp.zeros((3, 6), jnp.float32))
    case = rows.linen_beside_own("mlp", (*own, (params, None, None)))
    kernel = case.args[0][0]["params"]["Dense_0"]["kernel"]
    assert kernel.shape == case.args[0][1][0].w.shape
    for make in (case.hand, case.auto):
        assert jax.jit(make())(*case.args).shape == (3,)


@pytest.mark.few(1)
@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize("network", ["mlp", "cnn", "gpt", "lstm"])
def test_the_two_networks_of_a_row_have_as_many_params(network):
    model, data = linen.MODELS[network]
    flax = jax.eval_shape(model.init, jax.random.key(0), data()[0])
    makers = {
        "mlp": lambda: networks.mlp(batch=1),
        "cnn": lambda: networks.cnn(batch=1),
        "gpt": lambda: networks.gpt(scan=False, vocab=256, batch=1),
        "lstm": lambda: rows.lstm(batch=1, length=2, features=256),
    }
    _, _, (ours, *_) = makers[network]()
    sizes = [sum(leaf.size for leaf in jax.tree.leaves(params)) for params in (flax, ours)]
    assert abs(sizes[0] - sizes[1]) <= 0.02 * sizes[0]


@pytest.mark.usefixtures("standard_promotion")
def test_kronecker_factors_of_a_flax_network_are_sampled_once(monkeypatch):
    monkeypatch.setattr(linen, "MODELS", LINEN)
    case = rows.linen("mlp", "kfac")
    take, (*args, key) = jax.jit(case.hand()), case.args
    (x, *_), factors = args[1:], take(*args, key)["params"]["Dense_0"]["kernel"]
    assert factors.a.shape == (6, 6)
    assert relative_error(factors.a, x.T @ x / 3) <= 1e-5
    again = take(*args, jax.random.fold_in(key, 1))
    assert relative_error(factors.b, again["params"]["Dense_0"]["kernel"].b) > 1e-3


def test_rows_that_need_flax_are_skipped_with_a_word(capsys, monkeypatch, small):
    small_rows = {"mlp-small": lambda: rows.mlp(8, 16, 4, batch=4), "linen-x": None}
    monkeypatch.setattr("jaxprop.bench.report.ROWS", small_rows)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main(["bench", "--quick"]) == 0
    out = capsys.readouterr().out
    assert "linen-x" not in out
    assert out.splitlines()[-1].startswith("1 of the rows need Flax and were skipped")
    assert main(["bench", "--only", "linen"]) == 2
    assert "--only: 1 of the rows need Flax" in capsys.readouterr().err


def test_table_and_figures(capsys, tmp_path, small):
    path = tmp_path / "figures.json"
    assert main(["bench", "--quick", "--json", str(path)]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert max(map(len, out.splitlines())) <= 100
    figures = json.loads(path.read_text())
    assert list(figures["rows"]) == ["mlp-small", "worked-example"]
    for name, row in figures["rows"].items():
        assert name in out
        assert all(value > 0 and math.isfinite(value) for value in row["ratio"].values() if value)
        low, high = row["run_ratio_quartiles"]
        assert low <= row["ratio"]["run"] <= high
    main(["bench", "--quick", "--only", "worked", "--baseline", str(path)])
    assert "mlp-small" not in capsys.readouterr().out


def test_a_narrow_terminal_gets_the_columns_that_fit():
    table = table_of(["hand ms", "auto ms", "run", "", "temp MB", "share"])
    table.add_row("a-row-of-a-name", "1.00", "2.00", "0.50", "[0.40, 0.60]", "3.00", "10%")
    text = io.StringIO()
    print_table(Console(width=60, file=text), table, "run: the ratio of the two sides.\n" * 9)
    printed = text.getvalue()
    assert max(map(len, printed.splitlines())) <= 60
    assert "[0.40, 0.60]" in printed
    assert "Left out in this narrow terminal: temp MB, share." in printed


@pytest.mark.parametrize(
    ("argv", "names"),
    [
        (["--only", "gpt-rec"], ["gpt-recompute"]),
        (["--only", "fused-adam", "gram"], ["gram", "fused-adam"]),
        (["--only", "gram", "--only", "fused-adam"], ["gram", "fused-adam"]),
        (["--only", "fused", "fused-adam", "--quick"], ["fused-sgd", "fused-adam"]),
    ],
)
def test_only_takes_one_name_or_several(monkeypatch, argv, names):
    def measured(only, quick, large):
        assert list(chosen(only, large)[0]) == names
        return {"rows": {}}

    monkeypatch.setattr("jaxprop.cli.bench", measured)
    assert main(["bench", *argv]) == 0


@pytest.mark.full
def test_a_ratio_worse_by_more_than_a_tenth_is_exit_1(capsys, tmp_path, small):
    path = tmp_path / "figures.json"
    assert main(["bench", "--quick", "--only", "mlp", "--json", str(path)]) == 0
    figures = json.loads(path.read_text())
    ratio = figures["rows"]["mlp-small"]["ratio"]
    assert regressions(figures, figures) == []
    for key in ("run", "trace", "compile"):
        worse = json.loads(json.dumps(figures))
        worse["rows"]["mlp-small"]["ratio"][key] = 1.11 * ratio[key]
        assert [line.split(" ratio")[0] for line in regressions(worse, figures)] == [
            f"mlp-small {key}"
        ]
        worse["rows"]["mlp-small"]["ratio"][key] = 1.09 * ratio[key]
        assert regressions(worse, figures) == []
    figures["rows"]["mlp-small"]["ratio"] = dict.fromkeys(ratio, 1e-6)
    path.write_text(json.dumps(figures))
    assert main(["bench", "--quick", "--only", "mlp", "--baseline", str(path)]) == 1
    assert "worse: mlp-small run" in capsys.readouterr().out


def test_wrong_arguments_exit_2_before_measuring(capsys, tmp_path):
    (tmp_path / "empty.json").write_text("{}")
    (tmp_path / "text.json").write_text("no")
    (tmp_path / "odd.json").write_text('{"rows": {"mlp-2x256": 3}}')
    for argv, message in (
        (["--only", "vgg"], "--only vgg: no such row; there are mlp-2x256"),
        (["--only", "mlp", "vgg"], "--only vgg: no such row; there are mlp-2x256"),
        (["--baseline", str(tmp_path / "none.json")], "none.json: no such file or directory"),
        (["--baseline", str(tmp_path / "text.json")], "not JSON"),
        (["--baseline", str(tmp_path / "empty.json")], "not written by jaxprop bench --json"),
        (["--baseline", str(tmp_path / "odd.json")], "not written by jaxprop bench --json"),
        (["--json", str(tmp_path / "none" / "x.json")], "no such directory"),
        (["--json", str(tmp_path)], "is a directory"),
    ):
        assert main(["bench", *argv]) == 2
        assert message in capsys.readouterr().err


def test_compare_measures_the_slower_as_slower():
    x = jnp.ones((256, 256))

    def slow(x):
        return jnp.linalg.matrix_power(x, 64)

    compared = measure.compare(lambda: slow, lambda: lambda x: x @ x, (x,), seconds=0.2, builds=1)
    assert compared.run.median > 1.5
