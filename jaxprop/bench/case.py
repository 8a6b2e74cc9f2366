"""A case of the bench: two functions to compare, and their arguments."""

from __future__ import annotations

from typing import NamedTuple

from jaxprop.bench.measure import Function, Make
from jaxprop.core.types import PyTree


class Case(NamedTuple):
    """Two functions to compare, and their arguments.

    Attributes:
        hand: makes jaxprop's function, a new one at each call.
        auto: makes the function that it is compared with, in the same way.
        args: the arguments of both.
        carried: the number of leading args that are donated; in the next call, the leading results
            take their places.
    """

    hand: Make
    auto: Make
    args: tuple[PyTree, ...]
    carried: int = 0


def with_key(f: Function) -> Function:
    """Return ``f(params, x, target, key=key)`` as a function of four arguments."""
    return lambda params, x, target, key: f(params, x, target, key=key)


def without_key(f: Function) -> Function:
    """Return ``f(params, x, target)`` as a function that also takes a key, unused."""
    return lambda params, x, target, key: f(params, x, target)
