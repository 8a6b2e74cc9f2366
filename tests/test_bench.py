"""The measuring command: its figures, its table, and its verdict on a baseline."""

import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from table import relative_error

from jaxprop.bench import measure, regressions, rows
from jaxprop.bench.report import EXPLANATION
from jaxprop.cli import main


@pytest.fixture
def small(monkeypatch):
    """Rows that take no time, and a matmul as small."""
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
    """With arrays of the rows' own shapes, that nothing is computed for."""

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


def test_the_readme_shows_the_table_as_it_is_printed():
    readme = (Path(__file__).parent.parent / "README.md").read_text()
    table = readme.split("$ jaxprop bench\n")[1].split("```")[0]
    device, head, *lines = table.splitlines()
    assert "GFLOP/s" in device
    assert head.split()[:3] == ["row", "hand", "ms"]
    assert [line.split()[0] for line in lines[: len(rows.ROWS)]] == list(rows.ROWS)
    assert "\n".join(lines[len(rows.ROWS) :]) == EXPLANATION


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
        (["--only", "resnet"], "--only resnet: no such row; there are mlp-2x256"),
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
