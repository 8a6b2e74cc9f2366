"""Padding: how many entries are added at each end of an axis, which ones, and the transpose."""

from __future__ import annotations

from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from jaxprop.core.arrays import wide
from jaxprop.core.checks import is_whole

Sizes = tuple[int, ...]
Pairs = tuple[tuple[int, int], ...]
Zeros = Literal["SAME", "VALID"] | int | Pairs
Padding = Literal["CAUSAL", "CIRCULAR", "REFLECT"] | Zeros
Mode = Literal["wrap", "reflect", "edge"]
WORDS = ("SAME", "VALID", "CAUSAL", "CIRCULAR", "REFLECT")
MODES: dict[object, Mode] = {"CIRCULAR": "wrap", "REFLECT": "reflect"}


def pairs_of(
    padding: Padding, spatial: Sizes, window: Sizes, strides: Sizes, dilation: Sizes
) -> Pairs:
    """Return how many entries a padding adds at the (low, high) end of each spatial axis."""
    reach = [(k - 1) * d + 1 for k, d in zip(window, dilation, strict=True)]
    if padding == "CAUSAL":
        return tuple((r - 1, 0) for r in reach)
    if padding in MODES:
        return tuple(((r - 1) // 2, r // 2) for r in reach)
    if isinstance(padding, str):
        pairs = jax.lax.padtype_to_pads(spatial, reach, strides, padding)
        return tuple((int(low), int(high)) for low, high in pairs)
    return whole_pairs(padding, len(window))


def whole_pairs(padding: int | Pairs, rank: int) -> Pairs:
    """Return padding as (low, high) pairs; one number stands for all ends."""
    return padding if isinstance(padding, tuple) else ((int(padding), int(padding)),) * rank


def extended(x: Float[Array, "n ... c"], pairs: Pairs, mode: Mode) -> Float[Array, "n ... c"]:
    """Return x padded with its own entries, as ``jnp.pad`` does in this mode.

    Args:
        x: an array with an axis for each pair, between the first axis and the last.
        pairs: how many entries are added at the (low, high) end of each of these axes.
        mode: "wrap" continues from the other end, "reflect" mirrors x without repeating the
            outermost entry, and "edge" repeats the outermost entry.
    """
    for axis, widths in enumerate(pairs, start=1):
        if any(widths):
            before, after = (
                _turned(jax.lax.slice_in_dim(x, start, stop, axis=axis), axis, mode, width)
                for (start, stop), width in zip(_ends(x, axis, widths, mode), widths, strict=True)
            )
            x = jnp.concatenate([before, x, after], axis)
    return x


def folded_back(ct: Float[Array, "n ... c"], pairs: Pairs, mode: Mode) -> Float[Array, "n ... c"]:
    """Return the transpose of ``extended``: ct, with the part of each copy added to its original.

    The sum is computed in at least float32, and has ct's dtype.
    """
    total = wide(ct)
    for axis, widths in enumerate(pairs, start=1):
        if any(widths):
            low, high = widths
            n = total.shape[axis] - low - high
            before, total, after = jnp.split(total, [low, low + n], axis)
            for part, (start, stop) in zip(
                (before, after), _ends(total, axis, widths, mode), strict=True
            ):
                config = [(0, 0, 0)] * ct.ndim
                config[axis] = (start, n - stop, 0)
                part = _turned_back(part, axis, mode)
                total += jax.lax.pad(part, jnp.zeros((), part.dtype), config)
    return total.astype(ct.dtype)


def _ends(x: Array, axis: int, widths: tuple[int, int], mode: Mode) -> tuple[Sizes, Sizes]:
    """Return the (start, stop) in x of the entries that are repeated before it, and after it."""
    n, (low, high) = x.shape[axis], widths
    if mode == "wrap":
        return (n - low, n), (0, high)
    if mode == "reflect":
        return (1, 1 + low), (n - 1 - high, n - 1)
    return (0, 1), (n - 1, n)


def _turned(part: Array, axis: int, mode: Mode, width: int) -> Array:
    if mode == "edge":
        return jnp.repeat(part, width, axis)
    return jnp.flip(part, axis) if mode == "reflect" else part


def _turned_back(part: Array, axis: int, mode: Mode) -> Array:
    if mode == "edge":
        return part.sum(axis, keepdims=True)
    return jnp.flip(part, axis) if mode == "reflect" else part


def check_room(layer: object, shape: tuple[int, ...], pairs: Pairs, mode: Mode) -> None:
    """Raise ``ValueError`` if more entries are to be repeated than x of this shape has."""
    for n, (low, high) in zip(shape[1:-1], pairs, strict=True):
        most = n - 1 if mode == "reflect" else n
        if max(low, high) > most and (mode != "edge" or not n):
            raise ValueError(
                f"{layer} repeats up to {max(most, 0)} entries at the end of an axis of {n}, not "
                f"{max(low, high)}; x has shape {shape}"
            )


def check_padding(
    name: str, padding: Padding, rank: int, words: tuple[str, ...] = ("SAME", "VALID")
) -> None:
    """Raise ``ValueError`` unless padding is one of the words, a whole number or rank pairs.

    Args:
        name: the layer's name, which error messages begin with.
        padding: the argument.
        rank: the number of spatial axes.
        words: the words that the layer takes.
    """
    if isinstance(padding, str) and padding in words:
        if padding == "CAUSAL" and rank > 1:
            raise ValueError(f'{name}: padding "CAUSAL" is along time, one axis, not {rank}')
        return
    pairs: Any = ((padding, padding),) * rank if is_whole(padding) else padding
    right = isinstance(pairs, tuple) and all(
        isinstance(pair, tuple) and len(pair) == 2 and all(map(is_whole, pair)) for pair in pairs
    )
    if not right or len(pairs) != rank:
        named = ", ".join(f'"{word}"' for word in words)
        raise ValueError(
            f"{name}: padding is {named}, a whole number or a (low, high) pair for each of {rank} "
            f"axes, not {padding!r}"
        )
    if any(side < 0 for pair in pairs for side in pair):
        raise ValueError(f"{name}: padding must not be negative, not {padding!r}")
