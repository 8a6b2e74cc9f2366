"""Numbers as text."""

from __future__ import annotations

import math
from typing import SupportsFloat


def fixed(number: SupportsFloat) -> str:
    """Return the number with eight decimals.

    One that would not fit a column of 11, or would show zeros alone, is written with an exponent.
    """
    number = float(number)
    text = f"{number:.8f}"
    return text if len(text) <= 11 and (abs(number) >= 5e-9 or number == 0) else f"{number:.4e}"


def plain(number: SupportsFloat) -> str:
    """Return the number as a person would write it, with at most eight digits."""
    return f"{float(number):.8g}"


def short(number: SupportsFloat) -> str:
    """Return the number with one decimal and an exponent; 0, inf and nan as they are."""
    number = float(number)
    return f"{number:.1e}" if number and math.isfinite(number) else f"{number:g}"


def share(number: SupportsFloat) -> str:
    """Return a fraction of 1 in percent; 0% and 100% are written for exactly 0 and 1 alone."""
    number = float(number)
    if number in (0, 1):
        return f"{number:.0%}"
    return f"{min(max(number, 0.001), 0.999):.1%}"
