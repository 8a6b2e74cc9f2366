"""Windows over positions: where convolution and pooling read, and where what they read goes back.

Along an axis, output t reads at tap k the padded input's element t s + k d, for stride s and
dilation d. Read tap by tap that is one strided slice of the whole input, ``shifted``; its
transpose, ``put_back``, adds each tap's part where the slice came from.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from jaxprop.core.checks import is_whole

AXES = {1: "N, T, C", 2: "N, H, W, C", 3: "N, H, W, D, C"}
Sizes = tuple[int, ...]
Padding = str | tuple[tuple[int, int], ...]


class Windows(NamedTuple):
    """Window, strides, (low, high) padding and dilation of each spatial axis.

    ``spread`` is the distance between x's neighbours, with zeros between them where it is above 1:
    a transposed convolution.
    """

    window: Sizes
    strides: Sizes
    padding: tuple[tuple[int, int], ...]
    dilation: Sizes
    spread: Sizes

    @classmethod
    def over(
        cls, spatial: Sizes, window: Sizes, strides: Sizes, padding: Padding, dilation: Sizes
    ) -> Windows:
        """Those over an input of these spatial sizes, with "SAME" and "VALID" worked out."""
        if isinstance(padding, str):
            reach = [(k - 1) * d + 1 for k, d in zip(window, dilation, strict=True)]
            padding = tuple(
                (int(low), int(high))
                for low, high in jax.lax.padtype_to_pads(spatial, reach, strides, padding)
            )
        return cls(window, strides, padding, dilation, (1,) * len(window))

    def outputs(self, spatial: Sizes) -> Sizes:
        """How many windows there are along each axis; 0 where not one fits."""
        return tuple(
            max(0, ((h - 1) * e + 1 + low + high - (k - 1) * d - 1) // s + 1)
            for h, k, s, (low, high), d, e in zip(spatial, *self, strict=True)
        )

    @property
    def taps(self) -> int:
        return math.prod(self.window)

    def shifted(self, x: Float[Array, "n ... c"], fill: Any = 0) -> list[Float[Array, "n ... c"]]:
        """For each tap of the window, in row-major order, what all windows read at it."""
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
                    x, (0, *starts, 0), (len(x), *stops, x.shape[-1]), (1, *self.strides, 1)
                )
            )
        return slices

    def put_back(
        self, parts: Sequence[Float[Array, "n ... c"]], spatial: Sizes
    ) -> Float[Array, "n ... c"]:
        """The transpose of ``shifted``: a part for each tap, summed where that tap read x."""
        total = None
        for tap, part in zip(itertools.product(*map(range, self.window)), parts, strict=True):
            config = []
            for k, h, t, s, (low, _), d in zip(
                tap, spatial, part.shape[1:-1], *self[1:4], strict=True
            ):
                start = k * d - low
                config.append((start, h - start - (t - 1) * s - 1, s - 1))
            config = [(0, 0, 0), *config, (0, 0, 0)]
            placed = jax.lax.pad(part, jnp.zeros((), part.dtype), config)
            total = placed if total is None else total + placed
        assert total is not None
        return total


def sizes(name: str, value: Any, rank: int) -> Sizes:
    """value as a positive whole number for each spatial axis; one int stands for all, None for 1.

    Raises ``TypeError`` and ``ValueError``, which begin with name.
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


def check_window(name: str, window: Any) -> None:
    """Raise unless window is a tuple of one to three positive whole numbers."""
    if not isinstance(window, tuple) or not window or not all(map(is_whole, window)):
        raise TypeError(f"{name}: window is a tuple with a size for each axis, not {window!r}")
    if len(window) > 3:
        raise ValueError(f"{name}: window has 1 to 3 axes, not {len(window)}")
    if min(window) < 1:
        raise ValueError(f"{name}: window must be at least 1 along each axis, not {window}")


def check_padding(name: str, padding: Any, rank: int) -> None:
    """Raise unless padding is "SAME", "VALID" or a (low, high) pair for each spatial axis."""
    if padding in ("SAME", "VALID"):
        return
    pairs = isinstance(padding, tuple) and all(
        isinstance(pair, tuple) and len(pair) == 2 and all(map(is_whole, pair)) for pair in padding
    )
    if not pairs or len(padding) != rank:
        raise ValueError(
            f'{name}: padding is "SAME", "VALID" or a (low, high) pair for each of {rank} '
            f"axes, not {padding!r}"
        )
    if any(side < 0 for pair in padding for side in pair):
        raise ValueError(f"{name}: padding must not be negative, not {padding!r}")
