"""The exponent of a power law, with its confidence interval."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447)
"""Student's t at 97.5 %, for 1 to 6 degrees of freedom."""


class Exponent(NamedTuple):
    """The exponent k in y = a x^k, with its 95 % confidence interval.

    Attributes:
        k: the exponent.
        low: the lower end of the interval.
        high: the upper end.
    """

    k: float
    low: float
    high: float


def exponent(x: Sequence[float], y: Sequence[float]) -> Exponent:
    """Return the exponent by least squares of log y on log x.

    The interval assumes independent normal errors in log y.

    Args:
        x: three to eight sizes.
        y: a positive number for each.

    Raises:
        ValueError: for fewer or more sizes, or if x and y differ in length.
    """
    if not 3 <= len(x) <= len(STUDENT) + 2 or len(x) != len(y):
        raise ValueError(f"an exponent is of 3 to 8 pairs, not of {len(x)} x and {len(y)} y")
    at, values = [math.log(a) for a in x], [math.log(b) for b in y]
    mean_at, mean = sum(at) / len(at), sum(values) / len(values)
    spread = sum((a - mean_at) ** 2 for a in at)
    k = sum((a - mean_at) * (b - mean) for a, b in zip(at, values, strict=True)) / spread
    errors = [b - mean - k * (a - mean_at) for a, b in zip(at, values, strict=True)]
    free = len(at) - 2
    half = STUDENT[free - 1] * math.sqrt(sum(error**2 for error in errors) / free / spread)
    return Exponent(k, k - half, k + half)
