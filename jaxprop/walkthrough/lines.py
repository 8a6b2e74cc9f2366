"""Formulas, lists and tables in lines that fit a terminal of 80 columns."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from rich.cells import cell_len

from jaxprop.explanation.numerals import bracketed
from jaxprop.walkthrough.words import Say

WIDTH = 80
INDENT = 2
TERMS = 4  # most terms of a sum that are written out


def flow(cells: Iterable[str], between: str) -> Iterator[str]:
    """Yield the cells one after the other, in lines that fit the terminal."""
    line = ""
    for cell in cells:
        if line and cell_len(line + between + cell) > WIDTH - 3 * INDENT:
            yield line.rstrip() + between.rstrip()
            line = ""
        line += between + cell if line else cell
    yield line


def equation(start: str, terms: Sequence[Sequence[str]], end: str) -> str:
    """Return the line start + the sum of the terms + end, with as many terms as fit into it.

    Args:
        start: what is on the left of the sum.
        terms: the factors of each term, as text. A negative one is put in brackets, except at the
            beginning of the sum.
        end: what is on the right of the sum.
    """
    shown = [product(terms[0]), *("·".join(map(bracketed, term)) for term in terms[1:])]
    sums = [total(shown, most) for most in range(TERMS, 1, -1)]
    if len(shown) > 1:
        sums.append(f"{shown[0]} + …")
    lines = [f"{start}{each}{end}" for each in sums]
    return next((line for line in lines if cell_len(line) <= WIDTH - INDENT), lines[-1])


def product(factors: Sequence[str], dot: str = "·") -> str:
    """Return a·b, with brackets around a negative factor that is not the first."""
    return dot.join([factors[0], *map(bracketed, factors[1:])])


def total(parts: Sequence[str], most: int = TERMS) -> str:
    """Return a + b + … + z, with at most ``most`` parts."""
    return " + ".join(elided(parts, most))


def listed(parts: Sequence[str], most: int = TERMS) -> str:
    """Return a, b, …, z, with at most ``most`` parts."""
    return ", ".join(elided(parts, most))


def elided(parts: Sequence[str], most: int) -> list[str]:
    """Return the parts; if there are more than ``most``, the first, an ellipsis and the last."""
    return list(parts) if len(parts) <= most else [*parts[: max(1, most - 2)], "…", parts[-1]]


def table(header: Sequence[str], columns: Sequence[Sequence[str]]) -> Iterator[str]:
    """Yield the lines of a table: the first column to the left, the others to the right."""
    columns = [[name, *column] for name, column in zip(header, columns, strict=True)]
    widths = [max(map(cell_len, column)) for column in columns]
    for row in zip(*columns, strict=True):
        spaces = [" " * (width - cell_len(cell)) for cell, width in zip(row, widths, strict=True)]
        cells = [space + cell for space, cell in zip(spaces[1:], row[1:], strict=True)]
        yield " ".join([row[0] + spaces[0], *cells]).rstrip()


def layer(name: str, say: Say) -> str:
    """Return the name of a layer, such as hidden-2, in the language of ``say``."""
    kind, dash, number = name.partition("-")
    return say("hidden-{number}", number=number) if dash else say(kind)
