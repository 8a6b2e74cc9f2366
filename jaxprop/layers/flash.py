"""Attention whose scores never leave the chip, in three kernels for TPUs and GPUs.

The forward half computes the softmax in one pass over the keys (Milakov and Gimelshein 2018,
https://arxiv.org/abs/1805.02867). For the keys that a query has met so far, it holds their largest
score, top, and

    total = sum exp(s - top)
    sums  = sum exp(s - top) v

A block of keys with a larger top first multiplies both by exp(top - larger). After the last block
y = sums / total, and all that the backward half needs of the softmax is logsumexp = top + log total
(Dao et al. 2022, https://arxiv.org/abs/2205.14135), as p = exp(s - logsumexp). That half passes
over the scores twice (Dao 2023, https://arxiv.org/abs/2307.08691), so that each program adds up
sums for its own positions only, with dE/ds = p (ct v^T - <ct, y>) as derived in ``Attention``:

    dE/dq = sum over keys dE/ds k         a block of queries meets the keys
    dE/dk = sum over queries dE/ds q      a block of keys meets the queries
    dE/dv = sum over queries p ct

A block of scores is (own, met): its rows are keys if the program's own positions are keys.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.experimental import pallas as pl
from jaxtyping import Bool, Float

from jaxprop.layers import on_chip
from jaxprop.layers.by_parts import slices
from jaxprop.layers.heads import Inputs, split
from jaxprop.layers.on_chip import Blocks, Near, Over, Platform, launch
from jaxprop.layers.over_devices import spread
from jaxprop.layers.scores import Heads, ScoreMask, Sight

if TYPE_CHECKING:
    from jaxprop.layers.attention import Attention

Rows = Float[Array, "n h t"]
Real = Bool[Array, "n 1 s"]
Ref = Any  # of an array on the chip

# The top of no keys is finite, since exp(-inf - EMPTY) is 0, but exp(-inf + inf) is NaN.
EMPTY = float(jnp.finfo(jnp.float32).min)


class Plan(NamedTuple):
    """The blocks of positions that each kernel iterates over.

    Attributes:
        attend: forward.
        to_queries: backward, to the queries.
        to_keys: backward, to the keys and values.
    """

    attend: Blocks
    to_queries: Blocks
    to_keys: Blocks


def plan_of(platform: Platform, q: Array) -> Plan:
    """Return the plan for these queries; on a GPU it takes up to 96 KiB of shared memory per block.

    All GPUs of compute capability 8.0 and later have that much. Their blocks are the fastest on an
    H200 of several that were tried.
    """
    if platform == "tpu":
        return Plan(Blocks(512, 512), Blocks(512, 512), Blocks(512, 512))
    bytes_of_row = pl.next_power_of_2(q.shape[3]) * q.dtype.itemsize
    if bytes_of_row <= 128:
        return Plan(Blocks(128, 64, 8, 3), Blocks(64, 64, 4, 3), Blocks(64, 64, 4, 3))
    less = max(1, bytes_of_row // 256)
    most, some = (Blocks(max(16, own // less), max(16, 64 // less)) for own in (128, 64))
    return Plan(most, some, some)


def platforms(layer: Attention, x: Inputs, mask: ScoreMask | None) -> list[Platform]:
    """Return the platforms that have kernels for these inputs, given how they are sharded.

    No kernel takes a bias or a mask for each query, which are as large as the scores.
    """
    known = all(isinstance(size, int) for size in x.sizes)
    if not known or x.bias is not None or (mask is not None and mask.shape[1:3] != (1, 1)):
        return []
    heads = layer.heads + (2 * (layer.kv_heads or layer.heads) if x.memory is None else 0)
    return on_chip.platforms(x.x, max(x.sizes[1:]), x.x.shape[2] // heads)


def attend(
    layer: Attention, platform: Platform, x: Inputs, mask: ScoreMask | None, interpret: bool = False
) -> tuple[Heads, tuple[Array, ...]]:
    """Return y and the logsumexp of each query's scores, as ``by_parts.attend`` does.

    Args:
        layer: the layer, which saves "logsumexp".
        platform: the platform of the kernel.
        x: its inputs, without a bias.
        mask: which keys are real, (N, 1, 1, S); None for all of them.
        interpret: whether to run on a CPU, one equation after the other.
    """

    def both(q: Heads, k: Heads, v: Heads, real: Real | None) -> list[Array]:
        run = functools.partial(launch, platform, interpret, _attend, plan_of(platform, q).attend)
        return run(layer.sight, [q], [k, v, real], [q.dtype, None])

    real = mask if mask is None else mask[:, 0]
    y, logsumexp = spread(both, *split(layer, x), real, by_xla=platform == "cuda")
    rows = [rows for rows, _ in slices(layer, *x.sizes[1:])]
    return y, tuple(logsumexp[:, :, at, None] for at in rows)


def _attend(over: Over[Any], *refs: Ref) -> None:
    q, k, v, hidden, y, logsumexp = refs
    own = q[...]

    def step(keys: Any, near: Near, carry: tuple[Array, Array, Array]) -> tuple[Array, ...]:
        sums, top, total = carry
        s = near(_product(own, k[keys].T))
        if hidden is not None:
            s += hidden[:, keys]
        larger = jnp.maximum(top, s.max(1, keepdims=True))
        p, fade = jnp.exp(s - larger), jnp.exp(top - larger)
        sums = fade * sums + _product(p.astype(own.dtype), v[keys])
        return sums, larger, fade * total + p.sum(1, keepdims=True)

    column = jnp.zeros((own.shape[0], 1), jnp.float32)
    sums, top, total = over(step, (jnp.zeros(own.shape, jnp.float32), column + EMPTY, column))
    total = jnp.where(total > 0, total, np.float32(1))
    y[...] = (sums / total).astype(y.dtype)
    logsumexp[...] = (top + jnp.log(total)).reshape(1, -1)


def pull(
    layer: Attention,
    platform: Platform,
    x: Inputs,
    mask: ScoreMask | None,
    ct: Heads,
    mean: Float[Array, "n h t 1"],
    kept: tuple[Array, ...],
    interpret: bool = False,
) -> tuple[Heads, Heads, Heads, None]:
    """Return dE/d(scale q), dE/dk and dE/dv of each head of q, and None, as ``by_parts.pull`` does.

    Args:
        layer: as for ``attend``, like platform, x, mask and interpret.
        ct: (N, heads, T, d).
        mean: <ct, y>.
        kept: the logsumexp.
    """
    run = functools.partial(launch, platform, interpret)
    sight, seen_by = layer.sight, Sight(*reversed(layer.sight))

    def all_three(
        q: Heads, k: Heads, v: Heads, real: Real | None, ct: Heads, mean: Rows, logsumexp: Rows
    ) -> list[Array]:
        queries, keys, plan = [q, ct, mean, logsumexp], [k, v, real], plan_of(platform, q)
        d_q = run(_pull_to_queries, plan.to_queries, sight, queries, keys, [jnp.float32])
        d_kv = run(_pull_to_keys, plan.to_keys, seen_by, keys, queries, [jnp.float32] * 2)
        return d_q + d_kv

    real = mask if mask is None else mask[:, 0]
    rows = [z[..., 0] for z in (mean, jnp.concatenate(kept, 2))]
    given = *split(layer, x), real, ct, *rows
    d_q, d_k, d_v = spread(all_three, *given, by_xla=platform == "cuda")
    return d_q, d_k, d_v, None


def _pull_to_queries(over: Over[Any], *refs: Ref) -> None:
    q, ct, mean, logsumexp, k, v, hidden, d_q = refs
    own, ct = q[...], ct[...]
    mean, logsumexp = (row[...].reshape(-1, 1) for row in (mean, logsumexp))

    def step(keys: Any, near: Near, d_q: Array) -> Array:
        s = near(_product(own, k[keys].T))
        if hidden is not None:
            s += hidden[:, keys]
        d_s = _weights(s, logsumexp) * (_product(ct, v[keys].T) - mean)
        return d_q + _product(d_s.astype(own.dtype), k[keys])

    d_q[...] = over(step, jnp.zeros(own.shape, jnp.float32))


def _pull_to_keys(over: Over[Any], *refs: Ref) -> None:
    k, v, hidden, q, ct, mean, logsumexp, d_k, d_v = refs
    own, values = k[...], v[...]
    hidden = None if hidden is None else hidden[...].reshape(-1, 1)

    def step(queries: Any, near: Near, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        d_k, d_v = carry
        s = near(_product(own, q[queries].T))
        if hidden is not None:
            s += hidden
        p = _weights(s, logsumexp[:, queries])
        d_s = p * (_product(values, ct[queries].T) - mean[:, queries])
        d_k += _product(d_s.astype(own.dtype), q[queries])
        return d_k, d_v + _product(p.astype(own.dtype), ct[queries])

    zeros = jnp.zeros(own.shape, jnp.float32)
    d_k[...], d_v[...] = over(step, (zeros, zeros))


def _weights(s: Array, logsumexp: Array) -> Array:
    """Return p, at most 1 also where s, from another block, is rounded to more than before."""
    return jnp.exp(jnp.minimum(s - logsumexp, np.float32(0)))


def _product(a: Array, b: Array) -> Array:
    return jax.lax.dot(a, b, preferred_element_type=jnp.float32)
