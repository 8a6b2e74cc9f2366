"""Parts that the reports of ``jaxprop bench`` share: errors, console, progress bar, table."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence

from rich.console import Console
from rich.measure import Measurement
from rich.progress import Progress
from rich.table import Table


class BenchError(Exception):
    """An error that ``jaxprop bench`` reports in one line."""


def matching(only: str | Sequence[str] | None, rows: Iterable[str]) -> list[str]:
    """Return the names of the rows that contain one of ``only``, or all names for None.

    Raises:
        BenchError: if ``only`` (or an element of it) is in no row's name.
    """
    rows = list(rows)
    if only is None:
        return rows
    parts = [only] if isinstance(only, str) else only
    for part in parts:
        if not any(part in row for row in rows):
            raise BenchError(f"--only {part}: no such row; there are {', '.join(rows)}")
    return [row for row in rows if any(part in row for part in parts)]


def wide_console() -> Console:
    """Return a console of 100 columns: fewer on a narrower terminal, more on a wider pipe."""
    console = Console(highlight=False)
    width = max(100, console.width) if not console.is_terminal else min(100, console.width)
    return Console(highlight=False, width=width)


def print_table(console: Console, table: Table, explanation: str) -> None:
    """Print a table and what its columns mean.

    If the console is too narrow, the last columns are left out, and a line names them.
    """
    left_out: list[str] = []
    options = console.options.update(max_width=10 * console.width)
    while Measurement.get(console, options, table).maximum > console.width and table.columns[2:]:
        left_out.insert(0, str(table.columns.pop().header))
    console.print(table)
    if left_out:
        names = ", ".join(filter(None, left_out))
        console.print(f"Left out in this narrow terminal: {names}.", markup=False)
    console.print(" ".join(explanation.split()), markup=False)


def progress() -> Progress:
    """Return a progress bar on stderr, shown only on a terminal and removed at the end."""
    console = Console(file=sys.stderr)
    return Progress(console=console, transient=True, disable=not sys.stderr.isatty())


def table_of(headings: Sequence[str], gap: int = 2) -> Table:
    """Return a table with a column for the rows' names, and one of figures for each heading.

    Args:
        headings: the headings.
        gap: the number of blanks between two columns.
    """
    table = Table(box=None, pad_edge=False, padding=(0, gap, 0, 0))
    table.add_column("row", no_wrap=True)
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    return table
