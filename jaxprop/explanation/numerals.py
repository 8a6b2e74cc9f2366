"""Numbers as text."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import SupportsFloat

DECIMALS = 8
FEWEST = 4  # with fewer decimals, an exponent is used instead
CELL = 11  # characters of a number in a column


def fixed(number: SupportsFloat) -> str:
    """Return the number with eight decimals, or as ``aligned`` writes it if these do not fit."""
    return aligned([number])[0]


def aligned(numbers: Iterable[SupportsFloat]) -> list[str]:
    """Return the numbers of a column, all with the same number of decimals.

    There are eight, or the most that fit into 11 characters, but at least four. If fewer fit, or a
    number other than 0 would show only zeros, all are written with an exponent, and 0 as 0.
    """
    values = [float(number) + 0.0 for number in numbers]  # -0.0 + 0.0 is 0.0
    finite = [value for value in values if math.isfinite(value)]
    for places in range(DECIMALS, FEWEST - 1, -1):
        shown = [f"{value:.{places}f}" for value in finite]
        if all(len(text) <= CELL for text in shown):
            if any(value and not float(text) for value, text in zip(finite, shown, strict=True)):
                break
            return [f"{value:.{places}f}" for value in values]
    digits = 4 if all(len(f"{value:.4e}") <= CELL for value in finite) else 3
    return [f"{value:.{digits}e}" if value else "0" for value in values]


def plain(number: SupportsFloat) -> str:
    """Return the number as a person would write it, with at most eight digits."""
    return f"{float(number) + 0.0:.8g}"


def given(number: SupportsFloat) -> str:
    """Return the number as it was given if eight digits suffice, else as ``fixed`` writes it."""
    text = plain(number)
    return text if float(text) == float(number) else fixed(number)


def bracketed(number: str) -> str:
    """Return a number's text, in brackets if it has a minus sign, for use after an operator."""
    return f"({number})" if number.startswith("-") else number


def short(number: SupportsFloat) -> str:
    """Return the number with one decimal and an exponent; 0, inf and nan as they are."""
    number = float(number)
    return f"{number:.1e}" if number and math.isfinite(number) else f"{number:g}"


def share(number: SupportsFloat) -> str:
    """Return a fraction of 1 in percent; only exactly 0 and 1 are written as 0% and 100%."""
    number = float(number)
    if number in (0, 1):
        return f"{number:.0%}"
    return f"{min(max(number, 0.001), 0.999):.1%}"
