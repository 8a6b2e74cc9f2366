"""The report of ``jaxprop bench --growth``: fitted exponents of time and of memory."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import jax

from jaxprop.bench.growth import devices
from jaxprop.bench.growth.fit import exponent
from jaxprop.bench.growth.rows import DEVICES, ROWS, Growing
from jaxprop.bench.measure import Spread, temp_bytes
from jaxprop.bench.terminal import matching, print_table, progress, table_of, wide_console

QUICK, ROUNDS = 3, 15
HEADINGS = ("sizes", "time", "", "memory", "", "ms", "MB")
EXPLANATION = """\
time, memory: the exponents k of size^k, by least squares of logarithms [95 % interval]; of memory
for temporaries as XLA allocates it, of time medians of rounds through all sizes. ms, MB: at the
largest size. The width of an MLP squares its work, and attention the length; all else has work and
memory in proportion, where it is not too small for that. Of devices, which share one machine, only
the memory of each is known: the batch is split over them."""


def bench_growth(only: str | Sequence[str] | None = None, quick: bool = False) -> dict[str, Any]:
    """Measure the rows at all sizes, print a table, and return the figures.

    Args:
        only: measure only the rows whose name contains this, or one of these.
        quick: whether to run each size fewer times.

    Returns:
        The figures, ready for JSON: the device, the version of JAX, and each row's sizes, times,
        memory and exponents.

    Raises:
        BenchError: if ``only`` (or an element of it) is in no row's name.
    """
    names = matching(only, [*ROWS, DEVICES])
    device = str(jax.devices()[0].device_kind)
    figures: dict[str, Any] = {"device": device, "jax": jax.__version__, "rows": {}}
    table = table_of(HEADINGS, gap=1)
    with progress() as bar:
        for name in bar.track(names, description="measuring"):
            if name == DEVICES:
                row = figures_of("devices", devices.COUNTS, None, devices.memory())
            else:
                row = measured(ROWS[name], QUICK if quick else ROUNDS)
            figures["rows"][name] = row
            table.add_row(name, *_cells(row))
    console = wide_console()
    console.print(f"{device}, jax {jax.__version__}")
    print_table(console, table, EXPLANATION)
    return figures


def measured(row: Growing, rounds: int) -> dict[str, Any]:
    """Return the figures of a row.

    Args:
        row: the row.
        rounds: how many times to run all of its sizes.
    """
    runs, bytes_ = [], []
    for size in row.sizes:
        net, loss, args = row.network(size)
        compiled = jax.jit(row.of(net, loss)).lower(*args).compile()
        jax.block_until_ready(compiled(*args))
        runs.append((compiled, args))
        bytes_.append(temp_bytes(compiled))
    times: list[list[float]] = [[] for _ in runs]
    for _ in range(rounds):
        for samples, (compiled, args) in zip(times, runs, strict=True):
            start = time.perf_counter()
            jax.block_until_ready(compiled(*args))
            samples.append(time.perf_counter() - start)
    return figures_of(row.along, row.sizes, times, bytes_)


def figures_of(
    along: str, sizes: tuple[int, ...], times: list[list[float]] | None, bytes_: list[int]
) -> dict[str, Any]:
    """Return the figures of a row from its samples.

    Args:
        along: the size that grows.
        sizes: the sizes.
        times: samples in seconds at each size; None if only memory is known.
        bytes_: the memory at each size.
    """
    spreads = [Spread.of(samples) for samples in times or []]
    medians = [spread.median for spread in spreads]
    return {
        "along": along,
        "sizes": list(sizes),
        "run_s": [spread._asdict() for spread in spreads],
        "temp_bytes": bytes_,
        "time_exponent": exponent(sizes, medians)._asdict() if spreads else None,
        "memory_exponent": exponent(sizes, bytes_)._asdict() if all(bytes_) else None,
    }


def _cells(row: dict[str, Any]) -> list[str]:
    """Return a row's figures as the cells of the table."""
    cells = [f"{row['sizes'][0]}-{row['sizes'][-1]}"]
    for found in (row["time_exponent"], row["memory_exponent"]):
        cells += (
            ["-", ""]
            if found is None
            else [f"{found['k']:.2f}", f"[{found['low']:.2f}, {found['high']:.2f}]"]
        )
    cells.append(f"{1e3 * row['run_s'][-1]['median']:.2f}" if row["run_s"] else "-")
    return [*cells, f"{row['temp_bytes'][-1] / 1e6:.2f}"]
