"""The table of what the tests run, made of the tests: it is written into ``quantities.md``.

``build.py --tables`` writes it, and ``tests/test_docs.py`` asks that it is as the tests are.
"""

import ast
import inspect
import sys
import textwrap
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent.parent
PAGE = HERE / "quantities.md"
BEGIN = "<!-- From here on by `python .github/docs/build.py --tables`, from the tests. -->\n"
END = "<!-- To here. -->\n"


def write() -> None:
    """Write the table into the page."""
    before, _, after = PAGE.read_text().partition(BEGIN)
    PAGE.write_text(before + BEGIN + tables() + END + after.partition(END)[2])


def tables() -> str:
    """Return the tables in Markdown: quantities with their oracles, and layers with their forms."""
    sys.path.append(str(HERE.parent.parent / "tests"))
    import test_quantities as tests

    first, second, third = (f"`jp.{type(loss).__name__}`" for loss in tests.EACH_LOSS)
    losses = f"{first}, {second}, {third}"
    return f"""
`pytest --full` asks for each of these on each of {len(tests.ROWS)} nets, in float64, to 1e-10, with
{losses}. The quick run takes a few of
the nets.

| asked for as | oracle |
|---|---|
{_quantities(tests)}

`each` is of `oracles.per_example_grads`, and `blocks` are of `oracles.ggn_blocks`. The nets are the
rows of `tests/table.py` and a few more, here by the outermost layer. The cotangents of its params
are kept in the forms beside it. Kronecker factors, what `jp.curvature` makes of them, and influence
run on the rows of the table too, in `tests/test_kronecker.py`.

| layer | nets | forms |
|---|---|---|
{_layers(tests)}

Without params of their own: {_without_params(tests)}.

"""


def _quantities(tests: Any) -> str:
    oracles = _oracles(tests.expected_of)
    oracles["clipped by layer"] = "clipped_by_layer(norms by layer, each)"
    oracles["gram by layer"] = "gram_by_layer(norms by layer, each)"
    oracles["by layer"] = "the sum over layers is all"
    oracles["grads"] = oracles["none clipped"] = "the mean of each"
    asked = tests.asked(2)
    assert asked.keys() == oracles.keys(), "a quantity without an oracle, or the other way about"
    return "\n".join(f"| `jp.{asked[name]}` | `{oracles[name]}` |" for name in asked)


def _oracles(function: Any) -> dict[str, str]:
    """Return the expressions of the dict that a function makes, as its source has them."""
    found: dict[str, str] = {}
    for node in ast.walk(ast.parse(textwrap.dedent(inspect.getsource(function)))):
        if isinstance(node, ast.Dict):
            for key, value in zip(node.keys, node.values, strict=True):
                if isinstance(key, ast.Constant):
                    found[key.value] = ast.unparse(value)
        elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Subscript):
            key = node.targets[0].slice
            if isinstance(key, ast.Constant):
                found[key.value] = ast.unparse(node.value)
    for name, expression in found.items():
        if expression.startswith("oracle["):
            found[name] = found[ast.literal_eval(expression.removeprefix("oracle")[1:-1])]
    return found


def _kinds(rows: list[Any]) -> dict[str, list[Any]]:
    kinds: dict[str, list[Any]] = {}
    for row in rows:
        kinds.setdefault(type(row.layer).__name__, []).append(row)
    return kinds


def _layers(tests: Any) -> str:
    tested, rows = _kinds(tests.ROWS), []
    for kind, of_kind in _kinds([*filter(tests.has_params, tests.TABLE)]).items():
        name, nets = _named(kind), str(len(tested[kind]))
        if any(row.layer.batch_coupled and not row.layer.children() for row in of_kind):
            name, nets = f"{name}, `training=False`", f"{nets}; in training it is refused by name"
        rows.append(f"| {name} | {nets} | {_forms(tests, tested[kind][0])} |")
    return "\n".join(rows)


def _named(kind: str) -> str:
    """Return how a user writes a layer: a combinator is made by a function of its name."""
    import jaxprop as jp

    name = kind if kind in jp.__all__ else kind[0].lower() + kind[1:]
    return f"`jp.{name}`" if name in jp.__all__ else f"`{kind}`"


def _forms(tests: Any, row: Any) -> str:
    import jax
    import jax.numpy as jnp

    import jaxprop as jp

    if isinstance(row.layer, jp.Combinator | jp.Wrapper):
        form = {"Repeat": "`jp.Repeated` of ", "Tied": "`jp.Joint` of both uses of the table, and "}
        return f"{form.get(type(row.layer).__name__, '')}those of its layers"

    def back(params: Any, x: Any) -> Any:
        y, residuals = row.layer.forward(params, x)
        ct = jax.tree.map(jnp.ones_like, y)
        return row.layer.backward(params, residuals, ct)[0]

    found = jax.eval_shape(back, *tests.at(row))
    forms = jax.tree.leaves(found, is_leaf=lambda node: isinstance(node, jp.Factored))
    names = dict.fromkeys(type(it).__name__ for it in forms if isinstance(it, jp.Factored))
    return ", ".join(f"`jp.{name}`" for name in names)


def _without_params(tests: Any) -> str:
    kinds = _kinds([row for row in tests.TABLE if not tests.has_params(row)])
    return ", ".join(sorted(_named(kind) for kind in kinds if kind not in _kinds(tests.ROWS)))
