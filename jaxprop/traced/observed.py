"""The result of each named scope of a function, and that result's cotangent."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxprop.core.types import Cotangent
from jaxprop.traced.taps import Use, Watched
from jaxprop.traced.walking import TapeOfRun, Walked


class Result(NamedTuple):
    """The result of one scope.

    Attributes:
        scope: its name, with the layer's number in a scan over layers, such as "Block[1]"; "" for a
            result outside any scope.
        line: the source line.
        params: the number of each param that is used in it, and the layer in the param's stack.
        y: (N, ...), the result.
        ct: (N, ...), its cotangent.
    """

    scope: str
    line: str
    params: tuple[tuple[int, tuple[int, ...]], ...]
    y: Array
    ct: Array


def results_of(walked: Walked, ct: Cotangent) -> list[Result]:
    """Return the results of a function's scopes, in the order in which they were computed.

    A zero was added to each of them, as to the results where params meet data; the zero's cotangent
    is the cotangent of the result. Outside any scope, each source line counts as one.

    Args:
        walked: the residuals of a function that is ``watching``.
        ct: the cotangent of y.
    """
    (run,), cts = walked.tapes, walked.cts(ct)
    assert isinstance(run, TapeOfRun)
    told, _, _ = run.tape.told([cts.get(slot) for slot in run.outs])
    watched = [each for each in told if isinstance(each[0].meeting, Watched)]
    found: list[Result] = []
    for _, group in itertools.groupby(watched, lambda each: _loop(each[0], each[1])):
        each = [list(_by_layer(use, y, ct)) for use, y, ct in group]
        found += [result for layer in zip(*each, strict=True) for result in layer]
    return found


def _loop(use: Use, y: Array) -> tuple[tuple[bool, int], ...]:
    """Return, for each scan around a use, whether it iterates over layers, and its length."""
    return tuple(zip(use.scans, y.shape[1:], strict=False))


def _by_layer(use: Use, y: Array, ct: Array) -> Iterator[Result]:
    """Yield the result in each layer of the scans around it, or the one result outside of scans."""
    assert isinstance(use.meeting, Watched)
    axes = [1 + index for index, layers in enumerate(use.scans) if layers]
    y, ct = (jnp.moveaxis(a, axes, range(len(axes))) for a in (y, ct))
    inner = 1 + len(use.scans) - len(axes)  # the axis of the batch of one example
    for layer in np.ndindex(*y.shape[: len(axes)]):
        at = f"[{', '.join(map(str, layer))}]" if layer else ""
        here = (a[layer] for a in (y, ct))
        alone = (a.squeeze(inner) if a.shape[inner : inner + 1] == (1,) else a for a in here)
        params = tuple((param, layer[: sum(scans)]) for param, scans in use.meeting.params)
        yield Result(f"{use.scope}{at}", use.line, params, *alone)
