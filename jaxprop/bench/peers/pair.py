"""A pair of programs, ours and a peer's, and the check that both compute the same numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxprop.bench.measure import Function, temp_bytes
from jaxprop.core.types import PyTree

TOLERANCE = 1e-4  # relative to an array's norm: float32, through as many as 64 steps
OF_MAXIMA = 1e-2  # for max-pooling, where each side may pick another of two nearly equal values
OF_ALL = 1e-6  # relative to the norm of all arrays, for those that should be 0, as a keys' bias


class Differ(Exception):
    """The two sides of a row compute different numbers."""


class Side(NamedTuple):
    """One program of a pair.

    Attributes:
        run: does the work once. It returns JAX arrays to wait for, or is done when it returns.
        numbers: does it once and returns the numbers, as arrays in the peer's own layout.
        temp_bytes: its temporary memory; None if unknown.
    """

    run: Callable[[], object]
    numbers: Callable[[], PyTree]
    temp_bytes: int | None = None


class Pair(NamedTuple):
    """Two programs for the same numbers.

    Attributes:
        ours: by jaxprop.
        theirs: by the peer.
    """

    ours: Side
    theirs: Side


class Absent(Exception):
    """A peer cannot do a row's work, for the reason in the message."""


def jitted(
    function: Function, *args: PyTree, convert: Callable[[Any], PyTree] = lambda numbers: numbers
) -> Side:
    """Return the side of a JAX function, compiled.

    Args:
        function: the function to compile.
        args: its arguments.
        convert: converts its result to the layout of the peer's numbers.
    """
    compiled = jax.jit(function).lower(*args).compile()
    return Side(
        lambda: compiled(*args),
        lambda: convert(compiled(*args)),
        temp_bytes(compiled),
    )


def check(pair: Pair, tolerance: float = TOLERANCE) -> None:
    """Raise ``Differ`` unless both sides compute the same numbers, array by array, in float32.

    Args:
        pair: the sides.
        tolerance: the largest distance between two arrays, relative to their norm.
    """
    ours, theirs = (
        {jax.tree_util.keystr(path): np.asarray(leaf, np.float64) for path, leaf in leaves}
        for leaves in (
            jax.tree_util.tree_leaves_with_path(side.numbers()) for side in (pair.ours, pair.theirs)
        )
    )
    if ours.keys() != theirs.keys():
        raise Differ(f"ours are {sorted(ours)}, theirs {sorted(theirs)}")
    whole = np.sqrt(sum(np.sum(array**2) for array in ours.values()))
    for name, array in ours.items():
        if array.shape != theirs[name].shape:
            raise Differ(f"{name} is {array.shape} here and {theirs[name].shape} there")
        apart, size = (np.linalg.norm(a) for a in (array - theirs[name], array))
        if not apart <= tolerance * size + OF_ALL * whole:  # written so that NaN fails, too
            raise Differ(
                f"{name or 'the result'} is {apart:.1e} apart, of {size:.1e}; {tolerance:.0e} of "
                "it is allowed"
            )
