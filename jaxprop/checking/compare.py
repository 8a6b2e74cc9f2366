"""The comparison of cotangents with an oracle's, leaf by leaf, and the message on a difference."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from jax.tree_util import keystr

from jaxprop.checking.points import wide
from jaxprop.core.types import Cotangent, PyTree


def compare(
    who: object,
    got: PyTree,
    expected: PyTree,
    oracle: str,
    rtol: float,
    ct: Cotangent,
    by_example: bool = False,
    giver: str = "backward",
) -> None:
    """Raise unless each leaf of got is within rtol of the expected one.

    The difference is relative to the leaf's largest element. A leaf that should be zero may differ
    by rtol / 100 of the largest element of ct.

    Args:
        who: what is checked, for the message.
        got: the cotangents, a dict keyed by the names of their primals.
        expected: the oracle's cotangents, with the same keys.
        oracle: the oracle's name.
        rtol: the largest relative difference allowed.
        ct: the cotangent that they were pulled back from.
        by_example: whether a difference is relative to the largest element of its example, on axis
            0. For a layer's d_x it always is.
        giver: the name of what computed got: "backward" for a layer, or another name.

    Raises:
        AssertionError: for the first leaf that disagrees, with its worst element and both values.
    """
    floor = rtol / 100 * max(_largest(leaf) for leaf in jax.tree.leaves(ct))
    pairs = zip(jax.tree.leaves_with_path(got), jax.tree.leaves(expected), strict=True)
    for (path, leaf), want in pairs:
        a, b = wide(leaf), wide(want).reshape(np.shape(leaf))
        with np.errstate(invalid="ignore"):
            difference = np.where(a == b, 0.0, np.abs(a - b))
        difference = np.where(np.isnan(difference), np.inf, difference)
        of_x = giver == "backward" and path[0].key == "x"
        axes = tuple(range(1, b.ndim)) if by_example or of_x else None
        scale = np.broadcast_to(np.max(np.abs(b), axes, keepdims=True, initial=0.0), b.shape)
        excess = difference - np.maximum(rtol * scale, floor)
        if not np.any(excess > 0):
            continue
        at = np.unravel_index(np.argmax(excess), difference.shape)
        error = difference[at] / scale[at] if scale[at] else np.inf
        raise AssertionError(
            f"{who}: {d_name(path)} disagrees with {oracle}: at {[int(i) for i in at]} {giver} "
            f"gives {float(a[at])!r}, the oracle {float(b[at])!r} (relative error {error:.1e}, "
            f"allowed {rtol:.0e})"
        )


def d_name(path: tuple[Any, ...]) -> str:
    """Return the name of a cotangent, such as ``d_params.w``."""
    return f"d_{path[0].key}{keystr(path[1:])}"


def _largest(leaf: PyTree) -> float:
    return float(np.max(np.abs(wide(leaf)), initial=0.0))
