"""Numbers as text."""

from __future__ import annotations

import math
from typing import SupportsFloat


def fixed(number: SupportsFloat) -> str:
    """Eight decimals; where those would not fit a column, or be all zeros, an exponent."""
    number = float(number)
    text = f"{number:.8f}"
    return text if len(text) <= 11 and (abs(number) >= 5e-9 or number == 0) else f"{number:.4e}"


def plain(number: SupportsFloat) -> str:
    """As a person would write it."""
    return f"{float(number):.8g}"


def short(number: SupportsFloat) -> str:
    """One decimal and an exponent, 7 columns; a 0 and what is not finite in as many letters."""
    number = float(number)
    return f"{number:.1e}" if number and math.isfinite(number) else f"{number:g}"


def share(number: SupportsFloat) -> str:
    """A part of 1 in percent; what is not nothing and not all is not written as if it were."""
    number = float(number)
    if number in (0, 1):
        return f"{number:.0%}"
    return f"{min(max(number, 0.001), 0.999):.1%}"
