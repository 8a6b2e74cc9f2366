"""Windows over positions: the entries that a convolution or a pooling reads, and the transpose.

Along an axis with stride s and dilation d, output t reads the entry t s + k d of the padded input
at tap k. At each tap, all outputs together read one strided slice of the input (``shifted``). The
transpose adds each tap's part where its slice came from (``put_back``).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float

from jaxprop.core.arrays import wide
from jaxprop.core.checks import is_whole
from jaxprop.layers.padding import Padding, Pairs, Sizes, pairs_of

AXES = {1: "N, T, C", 2: "N, H, W, C", 3: "N, H, W, D, C"}


class Windows(NamedTuple):
    """The windows over an input; each field has an entry for each spatial axis.

    Attributes:
        window: the size of the window.
        strides: the distance between neighbouring windows.
        padding: how many entries are added at the (low, high) end.
        dilation: the distance between neighbouring taps.
        spread: the input dilation, which is above 1 in a transposed convolution.
    """

    window: Sizes
    strides: Sizes
    padding: Pairs
    dilation: Sizes
    spread: Sizes

    @classmethod
    def over(
        cls, spatial: Sizes, window: Sizes, strides: Sizes, padding: Padding, dilation: Sizes
    ) -> Windows:
        """Return the windows over an input of these spatial sizes, with padding in numbers."""
        pairs = pairs_of(padding, spatial, window, strides, dilation)
        return cls(window, strides, pairs, dilation, (1,) * len(window))

    def outputs(self, spatial: Sizes) -> Sizes:
        """Return the number of windows along each axis, 0 where none fits."""
        return tuple(
            max(0, ((h - 1) * e + 1 + low + high - (k - 1) * d - 1) // s + 1)
            for h, k, s, (low, high), d, e in zip(spatial, *self, strict=True)
        )

    def counts(self, spatial: Sizes) -> np.ndarray:
        """Return how many taps of each window lie inside an input of these sizes, as (*outputs)."""
        counts = np.ones((), int)
        for h, outputs, k, s, (low, _), d in zip(
            spatial, self.outputs(spatial), *self[:4], strict=True
        ):
            at = np.arange(outputs)[:, None] * s + np.arange(k) * d - low
            counts = np.multiply.outer(counts, ((at >= 0) & (at < h)).sum(axis=1))
        return counts

    @property
    def taps(self) -> int:
        """The number of taps of a window."""
        return math.prod(self.window)

    def shifted(self, x: Float[Array, "n ... c"], fill: float = 0) -> list[Float[Array, "n ... c"]]:
        """Return, for each tap in row-major order, the slice of x that all windows read there."""
        lows_and_highs = [
            (low, high, e - 1) for (low, high), e in zip(self.padding, self.spread, strict=True)
        ]
        outputs = self.outputs(x.shape[1:-1])
        if any(map(any, lows_and_highs)):
            config = [(0, 0, 0), *lows_and_highs, (0, 0, 0)]
            x = jax.lax.pad(x, jnp.asarray(fill, x.dtype), config)
        slices = []
        for tap in itertools.product(*map(range, self.window)):
            starts = [k * d for k, d in zip(tap, self.dilation, strict=True)]
            stops = [
                start + (t - 1) * s + 1
                for start, t, s in zip(starts, outputs, self.strides, strict=True)
            ]
            slices.append(
                jax.lax.slice(
                    x, (0, *starts, 0), (x.shape[0], *stops, x.shape[-1]), (1, *self.strides, 1)
                )
            )
        return slices

    def put_back(
        self, parts: Sequence[Float[Array, "n ... c"]], spatial: Sizes
    ) -> Float[Array, "n ... c"]:
        """Return the transpose of ``shifted``: each tap's part, added where that tap read x.

        The parts are added in at least float32, and the sum has their dtype.
        """
        total = None
        for tap, part in zip(itertools.product(*map(range, self.window)), parts, strict=True):
            config = []
            for k, h, t, s, (low, _), d in zip(
                tap, spatial, part.shape[1:-1], *self[1:4], strict=True
            ):
                start = k * d - low
                config.append((start, h - start - (t - 1) * s - 1, s - 1))
            config = [(0, 0, 0), *config, (0, 0, 0)]
            placed = jax.lax.pad(wide(part), jnp.zeros((), wide(part).dtype), config)
            total = placed if total is None else total + placed
        assert total is not None
        return total.astype(parts[0].dtype)


def sizes(name: str, value: object, rank: int) -> Sizes:
    """Return value as a tuple of positive whole numbers, one for each spatial axis.

    Args:
        name: the argument's name, which error messages begin with.
        value: a tuple of rank numbers, one number for all axes, or None for 1.
        rank: the number of spatial axes.

    Raises:
        TypeError: for a value of the wrong type.
        ValueError: for the wrong number of entries, or one below 1.
    """
    if value is None:
        return (1,) * rank
    each: Any = (value,) * rank if is_whole(value) else value
    if not isinstance(each, tuple) or not all(map(is_whole, each)):
        raise TypeError(f"{name} takes a whole number or a tuple of them, not {value!r}")
    if len(each) != rank:
        raise ValueError(f"{name} has {len(each)} entries, but the window has {rank}")
    if min(each) < 1:
        raise ValueError(f"{name} must be at least 1, not {value!r}")
    return each


def check_window(name: str, window: object) -> None:
    """Raise unless window is a tuple of one to three positive whole numbers."""
    if not isinstance(window, tuple) or not window or not all(map(is_whole, window)):
        raise TypeError(f"{name}: window is a tuple with a size for each axis, not {window!r}")
    if len(window) > 3:
        raise ValueError(f"{name}: window has 1 to 3 axes, not {len(window)}")
    if min(window) < 1:
        raise ValueError(f"{name}: window must be at least 1 along each axis, not {window}")
