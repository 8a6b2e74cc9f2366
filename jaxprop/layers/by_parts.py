"""The two halves of attention as XLA computes them, for parts or blocks of the queries."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from jax import Array

from jaxprop.core.mesh import varying_zero
from jaxprop.core.types import PyTree, Residuals
from jaxprop.layers import scores
from jaxprop.layers.heads import Inputs, positions, split
from jaxprop.layers.scores import Heads, Keys, Queries, ScoreMask

if TYPE_CHECKING:
    from jaxprop.layers.attention import Attention


def attend(layer: Attention, x: Inputs, mask: ScoreMask | None) -> tuple[Heads, Residuals]:
    """Return y, (N, heads, T, d), and the residuals of each part of the queries."""
    parts = [
        _run(layer, functools.partial(scores.attend, layer, keys), (), (queries,))[0]
        for _, queries, keys in _parts(layer, x, mask)
    ]
    ys, kept = zip(*parts, strict=True)
    return jnp.concatenate(ys, 2).astype(x.x.dtype), kept


def pull(
    layer: Attention, x: Inputs, mask: ScoreMask | None, ct: Heads, mean: Heads, kept: Residuals
) -> tuple[Heads, Heads, Heads, Heads | None]:
    """Return dE/d(scale q), dE/dk and dE/dv of each head of q, and dE/dbias or None.

    Args:
        layer: the layer.
        x: its inputs.
        mask: which scores count, None for all.
        ct: (N, heads, T, d).
        mean: <ct, y>, (N, heads, T, 1) in at least float32.
        kept: the residuals from ``attend``.
    """
    s, zero = x.sizes[2], varying_zero(jax.tree.leaves((x, mask, ct)), mean.dtype)
    d_q, d_k, d_v, d_bias = [], [], [], []
    for (rows, queries, keys), saved in zip(_parts(layer, x, mask), kept, strict=True):
        zeros = (jnp.zeros_like(keys.k, mean.dtype) + zero,) * 2
        block = queries, ct[:, :, rows], mean[:, :, rows], saved
        back = functools.partial(scores.pull, layer, keys)
        (of_q, of_bias), of_keys = _run(layer, back, zeros, block)
        d_q.append(of_q)
        for d, here in zip((d_k, d_v), of_keys, strict=True):
            d.append(_placed(here, keys.start, s))
        if of_bias is not None:
            d_bias.append(_placed(of_bias, keys.start, s, axis=3))
    d_k, d_v = (sum(d[1:], start=d[0]) for d in (d_k, d_v))
    return jnp.concatenate(d_q, 2), d_k, d_v, jnp.concatenate(d_bias, 2) if d_bias else None


def slices(layer: Attention, t: int, s: int) -> list[tuple[slice, slice]]:
    """Return the parts of t queries, each with the part of s keys that it may see.

    With a window, or for causal queries that save weights, there are up to 8 parts of at least 64
    queries. Otherwise there is one part.
    """
    apart = layer.window is not None or (layer.causal and layer.save == "weights")
    parts = min(8, max(1, t // 64)) if apart else 1
    ends = [t * i // parts for i in range(parts + 1)]
    before, after = (s if far is None else far for far in layer.sight)
    return [
        (slice(a, b), slice(max(0, a - before), min(s, b + after)))
        for a, b in itertools.pairwise(ends)
    ]


def _parts(
    layer: Attention, x: Inputs, mask: ScoreMask | None
) -> list[tuple[slice, Queries, Keys]]:
    q, k, v = split(layer, x)
    if layer.groups > 1:
        k, v = (jnp.repeat(z, layer.groups, 1) for z in (k, v))
    parts = []
    for rows, keys in slices(layer, q.shape[2], k.shape[2]):
        seen, real = (mask, None) if mask is None or mask.shape[2] > 1 else (None, mask)
        beside = (z if z is None else z[:, :, rows, keys] for z in (seen, x.bias))
        queries = Queries(q[:, :, rows], positions(rows.start, rows.stop), *beside)
        real = None if real is None else real[..., keys]
        parts.append((rows, queries, Keys(k[:, :, keys], v[:, :, keys], keys.start, real)))
    return parts


def _run(
    layer: Attention, f: Callable[..., tuple[PyTree, PyTree]], zeros: PyTree, block: PyTree
) -> tuple[PyTree, PyTree]:
    """Return f(*block): a pair of values for each query (axis 2) and sums over the queries."""
    if layer.save == "weights":
        return f(*block)
    t = block[0].q.shape[2]
    blocks = -(-t // layer.block)
    size = -(-t // blocks)

    def split(z: Array) -> Array:
        z = _placed(z, 0, blocks * size)
        return jnp.moveaxis(z.reshape(*z.shape[:2], blocks, size, *z.shape[3:]), 2, 0)

    def join(z: Array) -> Array:
        z = jnp.moveaxis(z, 0, 2)
        return z.reshape(*z.shape[:2], blocks * size, *z.shape[4:])[:, :, :t]

    def step(sums: PyTree, block: PyTree) -> tuple[PyTree, PyTree]:
        out, more = f(*block)
        return jax.tree.map(jnp.add, sums, more), out

    sums, out = jax.lax.scan(step, zeros, jax.tree.map(split, block))
    return jax.tree.map(join, out), sums


def _placed(z: Array, start: int, size: int, axis: int = 2) -> Array:
    """Return z placed at ``start`` along an axis of this size, with zeros around it."""
    around = [(0, 0)] * z.ndim
    around[axis] = start, size - start - z.shape[axis]
    return jnp.pad(z, around)
