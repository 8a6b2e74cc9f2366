"""A pair of programs for the same numbers, ours and a peer's, and the check that they are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxprop.bench.measure import Function, temp_bytes
from jaxprop.core.types import PyTree

TOLERANCE = 1e-4  # of an array's norm: float32, through as many as 64 steps
OF_MAXIMA = 1e-2  # where the larger of two nearly equal values may be another one on each side
OF_ALL = 1e-6  # of the norm of all arrays, for one whose right value is 0, such as a bias of keys


class Differ(Exception):
    """Two sides of a row compute other numbers."""


class Side(NamedTuple):
    """One program of a pair.

    Attributes:
        run: does its work once. It returns arrays of JAX, or is done when it returns.
        numbers: gives the numbers of such a run, arrays in the peer's own layout.
        temp_bytes: its temporary memory, where that is known.
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
    """Return the side of a compiled function of JAX.

    Args:
        function: what is compiled.
        args: its arguments.
        convert: takes what it returns into the layout of the peer's numbers.
    """
    compiled = jax.jit(function).lower(*args).compile()
    return Side(
        lambda: compiled(*args),
        lambda: convert(compiled(*args)),
        temp_bytes(compiled),
    )


def check(pair: Pair, tolerance: float = TOLERANCE) -> None:
    """Raise ``Differ`` unless both sides give the same numbers, array by array, in float32.

    Args:
        pair: the sides.
        tolerance: how far an array may be from the other, of its norm.
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
        if not apart <= tolerance * size + OF_ALL * whole:  # not so of NaN
            raise Differ(
                f"{name or 'the result'} is {apart:.1e} apart, of {size:.1e}; {tolerance:.0e} of "
                "it is allowed"
            )
