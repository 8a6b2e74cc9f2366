"""The report of ``jaxprop bench``: a table of the rows, and a comparison with earlier figures."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
from rich.console import Console

from jaxprop.bench.case import Case
from jaxprop.bench.measure import Comparison, compare, matmul_rate
from jaxprop.bench.rows import LARGE, ROWS, needs_flax
from jaxprop.bench.terminal import (
    BenchError,
    matching,
    print_table,
    progress,
    table_of,
    wide_console,
)

WORSE = 1.1  # a ratio above this many times the baseline's is a regression
QUICK, FULL = (0.8, 2), (10.0, 9)  # seconds to run each row, and how many times to compile it
HEADINGS = ("hand ms", "auto ms", "run", "", "trace", "compile", "temp MB", "temp", "share")
EXPLANATION = """\
hand: jaxprop; auto: jax.value_and_grad of the same loss, in a row /vmap the same quantity by
jax.vmap, in a row /weights the same net that saves attention's weights, for hvp jax.jvp of
jax.grad, for projected, a network's norms, influence, laplace and noise-norms jaxprop's own
value_and_grad, in a row fused- jax.value_and_grad and the same optimizer, for kfac-step ten steps
of Adam beside ten of K-FAC. influence, self-influence and laplace are given the curvature. run,
trace, compile, temp: ratios hand/auto, medians of neighbouring pairs [quartiles]. share: hand's
FLOP/s as a part of a large matmul's (- where a loop hides them)."""
FLAX = """\
linen: a network of Flax Linen as a jp.function, beside jax.value_and_grad of the same network, in a
row /own the norms of the same network in our own layers."""
NO_FLAX = "of the rows need Flax and were skipped: pip install 'jaxprop-vjp[flax]'"


def bench(
    only: str | Sequence[str] | None = None, quick: bool = False, large: bool = False
) -> dict[str, Any]:
    """Measure the rows, print a table, and return the figures.

    Args:
        only: measure only the rows whose name contains this, or one of these.
        quick: whether to take fewer samples.
        large: whether to measure the rows for an accelerator too.

    Returns:
        The figures, ready for JSON: the device, the version of JAX, and the costs of each row.

    Raises:
        BenchError: if ``only`` (or an element of it) is in no row's name, or if all rows chosen
            need Flax and it is not installed.
    """
    rows, skipped = chosen(only, large)
    console = wide_console()
    seconds, builds = QUICK if quick else FULL
    rate = matmul_rate()
    figures: dict[str, Any] = {
        "device": str(jax.devices()[0].device_kind),
        "jax": jax.__version__,
        "matmul_flops_per_s": rate,
        "rows": {},
    }
    table = table_of(HEADINGS)
    with progress() as bar:
        for name, make in bar.track(rows.items(), description="measuring"):
            case = make()
            measured = compare(
                case.hand,
                case.auto,
                case.args,
                carried=case.carried,
                seconds=seconds,
                builds=builds,
            )
            figures["rows"][name] = _figures(measured, rate)
            table.add_row(name, *_cells(figures["rows"][name]))
    console.print(
        f"{figures['device']}, jax {jax.__version__}, one large matmul {rate / 1e9:.0f} GFLOP/s"
    )
    print_table(console, table, EXPLANATION)
    print_footnotes(console, rows, skipped)
    return figures


def chosen(
    only: str | Sequence[str] | None, large: bool
) -> tuple[dict[str, Callable[[], Case]], int]:
    """Return the rows that ``only`` selects, and how many are left out for lack of Flax.

    Raises:
        BenchError: if ``only`` (or an element of it) is in no row's name, or if all rows chosen
            need Flax and it is not installed.
    """
    every = ROWS | LARGE if large else ROWS
    named = {name: every[name] for name in matching(only, every)}
    if importlib.util.find_spec("flax"):
        return named, 0
    rows = {name: make for name, make in named.items() if not needs_flax(name)}
    if not rows:
        raise BenchError(f"--only: {len(named)} {NO_FLAX}")
    return rows, len(named) - len(rows)


def print_footnotes(console: Console, rows: Iterable[str], skipped: int) -> None:
    """Print what the Flax rows' names mean, if any are there, and how many rows were skipped."""
    if any(map(needs_flax, rows)):
        console.print(" ".join(FLAX.split()), markup=False)
    if skipped:
        console.print(f"{skipped} {NO_FLAX}", markup=False)


def regressions(figures: dict[str, Any], baseline: dict[str, Any]) -> list[str]:
    """Return a line for each ratio that is worse than the baseline's by more than a tenth.

    Args:
        figures: the figures, as ``bench`` returns them.
        baseline: earlier figures. Rows that are missing from them are not compared.
    """
    worse = []
    for name, row in figures["rows"].items():
        for ratio, now in row["ratio"].items():
            before = baseline["rows"].get(name, {}).get("ratio", {}).get(ratio)
            if before is not None and now is not None and now > WORSE * before:
                worse.append(f"{name} {ratio} ratio {now:.2f}, was {before:.2f}")
    return worse


def _figures(measured: Comparison, rate: float) -> dict[str, Any]:
    """Return the figures of one row; rate is the FLOP/s of a large matmul."""
    sides = {}
    for side, program in (("hand", measured.a), ("auto", measured.b)):
        sides[side] = {
            "run_s": program.run._asdict(),
            "trace_s": program.trace.median,
            "compile_s": program.compile.median,
            "temp_bytes": program.temp_bytes,
            "share_of_matmul": program.flops and program.flops / program.run.median / rate,
        }
    return {
        **sides,
        "ratio": {
            "run": measured.run.median,
            "trace": measured.trace.median,
            "compile": measured.compile.median,
            "temp": measured.temp,
        },
        "run_ratio_quartiles": [measured.run.low, measured.run.high],
    }


def _cells(row: dict[str, Any]) -> list[str]:
    """Return a row's figures as the cells of the table."""
    ratio, (low, high) = row["ratio"], row["run_ratio_quartiles"]
    return [
        f"{1e3 * row['hand']['run_s']['median']:.2f}",
        f"{1e3 * row['auto']['run_s']['median']:.2f}",
        f"{ratio['run']:.2f}",
        f"[{low:.2f}, {high:.2f}]",
        f"{ratio['trace']:.2f}",
        f"{ratio['compile']:.2f}",
        f"{row['hand']['temp_bytes'] / 1e6:.2f}",
        "-" if ratio["temp"] is None else f"{ratio['temp']:.2f}",
        "-" if row["hand"]["share_of_matmul"] is None else f"{row['hand']['share_of_matmul']:.0%}",
    ]
