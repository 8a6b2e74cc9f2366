"""The report of ``jaxprop bench --peers``: one table of jaxprop against its peers."""

from __future__ import annotations

import gc
import importlib.metadata
import warnings
from collections.abc import Sequence
from typing import Any

import jax

from jaxprop.bench.measure import Spread, in_turn
from jaxprop.bench.peers.ours import FULL
from jaxprop.bench.peers.pair import OF_MAXIMA, TOLERANCE, Absent, Differ, Pair, check
from jaxprop.bench.peers.rows import ROWS
from jaxprop.bench.terminal import (
    BenchError,
    matching,
    print_table,
    progress,
    table_of,
    wide_console,
)

QUICK, SECONDS = 0.8, 10.0  # seconds to run each row
PACKAGES = ("flax", "equinox", "torch", "opacus", "backpack-for-pytorch", "jax-privacy")
HEADINGS = ("ours ms", "theirs ms", "run", "", "ours MB", "theirs MB")
EXPLANATION = """\
ours: jaxprop; theirs: the network and the params in the library after the slash, on as many
threads. Before a row is measured both are found to compute the same numbers. A row is the value and
the gradient, or squared norms of the examples' gradients (-norms), their mean where half of them
are clipped (-clipped), the gradient of four micro-batches one after the other (-parts, there in
Flax, added up by JAX's with_refs), or a quantity of BackPACK's. run: the ratio ours/theirs, the
median of neighbouring pairs [quartiles]. MB: temporary memory, which PyTorch does not tell.
kfac-jax 0.0.8 needs jax 0.9.1, and stands beside jp.kfac in examples/peers."""
GET = "pip install 'jaxprop-vjp[peers]'"


def bench_peers(only: str | Sequence[str] | None = None, quick: bool = False) -> dict[str, Any]:
    """Measure the rows, print a table, and return the figures.

    Args:
        only: measure only the rows whose name contains this, or one of these.
        quick: whether to take fewer samples.

    Returns:
        The figures, ready for JSON: the device, the versions, the times and the memory of both
        sides of each row, and the reason for each row without figures.

    Raises:
        BenchError: if ``only`` (or an element of it) is in no row's name, if no chosen row has its
            peer installed, or, after the table, if the sides of a row compute different numbers.
    """
    names = matching(only, ROWS)
    absent = {name: ROWS[name].missing() for name in names}
    there = [name for name in names if not absent[name]]
    lacking = sorted({module for modules in absent.values() for module in modules})
    if not there:
        raise BenchError(f"--peers: {', '.join(lacking)} not installed: {GET}")
    figures: dict[str, Any] = {
        "device": str(jax.devices()[0].device_kind),
        "versions": _versions(),
        "rows": {},
        "absent": {},
    }
    wrong, table = [], table_of(HEADINGS)
    with progress() as bar:
        for name in bar.track(there, description="measuring"):
            try:
                row = _measured(name, QUICK if quick else SECONDS)
            except Absent as reason:
                figures["absent"][name] = str(reason)
            except Differ as error:
                wrong.append(f"{name}: {error}")
            else:
                figures["rows"][name] = row
                table.add_row(name, *_cells(row))
    console = wide_console()
    versions = ", ".join(f"{name} {version}" for name, version in figures["versions"].items())
    console.print(f"{figures['device']}, {versions}")
    print_table(console, table, EXPLANATION)
    for name, reason in figures["absent"].items():
        console.print(f"{name}: {reason}", markup=False)
    if lacking:
        rows = len(names) - len(there)
        console.print(f"{rows} rows need {', '.join(lacking)}, skipped: {GET}", markup=False)
    if wrong:
        raise BenchError("the numbers are not the same: " + "; ".join(wrong))
    return figures


def _measured(name: str, seconds: float) -> dict[str, Any]:
    """Return the figures of one row."""
    row = ROWS[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the peers warn
        pair = row.make(FULL[row.network]())
        check(pair, OF_MAXIMA if row.network == "3c3d" else TOLERANCE)
        figures = measured(pair, seconds)
    del pair
    gc.collect()
    return figures


def measured(pair: Pair, seconds: float) -> dict[str, Any]:
    """Run both sides in turn, and return their figures.

    Args:
        pair: the sides.
        seconds: about how long to run.
    """
    times = in_turn(pair.ours.run, pair.theirs.run, seconds)
    ours, theirs = (Spread.of(list(side)) for side in zip(*times, strict=True))
    ratio = Spread.of([x / y for x, y in times])
    bytes_ = [side.temp_bytes for side in pair]
    return {
        "ours": {"run_s": ours._asdict(), "temp_bytes": bytes_[0]},
        "theirs": {"run_s": theirs._asdict(), "temp_bytes": bytes_[1]},
        "ratio": {
            "run": ratio.median,
            "trace": None,
            "compile": None,
            "temp": bytes_[0] / bytes_[1] if bytes_[0] and bytes_[1] else None,
        },
        "run_ratio_quartiles": [ratio.low, ratio.high],
    }


def _versions() -> dict[str, str]:
    versions = {"jax": jax.__version__}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def _cells(row: dict[str, Any]) -> list[str]:
    """Return a row's figures as the cells of the table."""
    low, high = row["run_ratio_quartiles"]
    sides = row["ours"], row["theirs"]
    bytes_ = [side["temp_bytes"] for side in sides]
    return [
        *(f"{1e3 * side['run_s']['median']:.2f}" for side in sides),
        f"{row['ratio']['run']:.2f}",
        f"[{low:.2f}, {high:.2f}]",
        *("-" if size is None else f"{size / 1e6:.2f}" for size in bytes_),
    ]
