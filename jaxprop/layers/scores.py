"""The scores of a block of queries, their softmax, and its vector-Jacobian product."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float

from jaxprop.core.arrays import wide
from jaxprop.core.types import Residuals

if TYPE_CHECKING:
    from jaxprop.layers.attention import Attention

Heads = Float[Array, "n h t d"]
ScoreMask = Bool[Array, "n h t s"]


class Sight(NamedTuple):
    """The range of positions that a position sees.

    Attributes:
        before: how many positions before its own, None for all.
        after: how many after its own, None for all.
    """

    before: int | None = None
    after: int | None = None

    def sees(self, behind: Array) -> Array | None:
        """Return where a position sees the one this far behind it; None for everywhere."""
        seen = None if self.before is None else behind <= self.before
        if self.after is None:
            return seen
        ahead = behind >= -self.after
        return ahead if seen is None else seen & ahead


class Queries(NamedTuple):
    """A block of queries.

    Attributes:
        q: the queries times scale, (N, heads, B, d).
        at: their positions, (1, 1, B, 1).
        seen: which keys each may see, (N, heads or 1, B, K); None for all of them.
        bias: added to the scores, (N, heads or 1, B, K); None for nothing.
    """

    q: Heads
    at: Array
    seen: ScoreMask | None = None
    bias: Heads | None = None


class Keys(NamedTuple):
    """The keys that a block of queries meets, with their values.

    Attributes:
        k: (N, heads, K, d).
        v: (N, heads, K, d).
        start: the position of the first key.
        real: which keys are real, (N, 1, 1, K); None for all of them.
    """

    k: Heads
    v: Heads
    start: int = 0
    real: ScoreMask | None = None


def attend(
    layer: Attention, keys: Keys, queries: Queries
) -> tuple[tuple[Heads, Residuals], tuple[()]]:
    """Return ``((y, residuals), ())`` for a block of queries."""
    s, seen = _scores(layer, queries, keys)
    top = jax.lax.stop_gradient(s.max(-1, keepdims=True))
    if queries.bias is not None:  # the bias may be -inf for every key
        top = jnp.maximum(top, jnp.finfo(s.dtype).min)
    e = jnp.exp(s - top)
    if _sees_a_key(queries, keys):
        total = e.sum(-1, keepdims=True)
    else:
        e = e if seen is None else jnp.where(seen, e, 0)
        total = e.sum(-1, keepdims=True)
        total = jnp.where(total > 0, total, 1)
    e, r = e.astype(queries.q.dtype), 1 / total
    y = _product("nhqk,nhkd->nhqd", e, keys.v) * r
    return (y, (e, r) if layer.save == "weights" else top + jnp.log(total)), ()


def pull(
    layer: Attention, keys: Keys, queries: Queries, ct: Heads, mean: Heads, saved: Residuals
) -> tuple[tuple[Heads, Heads | None], tuple[Heads, Heads]]:
    """Return ``((d_q, d_bias), (d_k, d_v))``, pulled back from a block of queries."""
    q = queries.q
    if layer.save == "weights":
        p, r = saved
        ct, mean = (wide(ct) * r).astype(ct.dtype), mean * r
    else:
        s, seen = _scores(layer, queries, keys)
        p = jnp.exp(s - saved)
        if seen is not None and not _sees_a_key(queries, keys):
            p = jnp.where(seen, p, 0)
        p = p.astype(q.dtype)
    d_v = _product("nhqk,nhqd->nhkd", p, ct)
    d_p = _product("nhqd,nhkd->nhqk", ct, keys.v)
    d_s = wide(p) * (d_p - mean)
    d_bias = queries.bias
    if d_bias is not None:
        d_bias = d_s.sum(1, keepdims=True) if d_bias.shape[1] < d_s.shape[1] else d_s
    d_s = d_s.astype(q.dtype)
    d_q = _product("nhqk,nhkd->nhqd", d_s, keys.k)
    return (d_q, d_bias), (_product("nhqk,nhqd->nhkd", d_s, q), d_v)


def _scores(layer: Attention, queries: Queries, keys: Keys) -> tuple[Heads, ScoreMask | None]:
    """Return s, and where a query sees a key (None for everywhere); elsewhere s is minimal."""
    s = _product("nhqd,nhkd->nhqk", queries.q, keys.k)
    if queries.bias is not None:
        s = s + queries.bias.astype(s.dtype)
    at = jnp.arange(keys.start, keys.start + keys.k.shape[2]).reshape(1, 1, 1, -1)
    masks = layer.sight.sees(queries.at - at), keys.real, queries.seen
    masks = [mask for mask in masks if mask is not None]
    if not masks:
        return s, None
    seen = functools.reduce(jnp.logical_and, masks)
    return jnp.where(seen, s, jnp.finfo(s.dtype).min), seen


def _sees_a_key(queries: Queries, keys: Keys) -> bool:
    """Return whether every query is sure to see a key, next to which unseen ones have no weight."""
    return keys.real is None and queries.seen is None and queries.bias is None


def _product(spec: str, a: Array, b: Array) -> Array:
    """Return the einsum of a and b, accumulated in at least float32."""
    return jnp.einsum(spec, a, b, preferred_element_type=wide(a).dtype)
