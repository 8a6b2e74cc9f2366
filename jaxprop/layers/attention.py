"""Attention, with its softmax weights saved for backward or computed again."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float

from jaxprop.core.arrays import aligned, wide
from jaxprop.core.checks import check_counts, check_flags
from jaxprop.core.describe import shapes
from jaxprop.core.layer import Layer
from jaxprop.core.tree import Mask
from jaxprop.core.types import Params, PyTree, Residuals
from jaxprop.layers.masks import mask_of

Heads = Float[Array, "n h t d"]
PaddingMask = Bool[Array, "n t"] | None
Save = Literal["weights", "logsumexp"]


class Attention(Layer):
    """y = softmax(q k^T / sqrt(d)) v for each head, with q, k and v packed in x.

    With s = scale q k^T, p = softmax(s) over the keys and y = p v, the chain rule gives

        dE/dv = p^T ct
        dE/dp = ct v^T
        dE/ds = p (dE/dp - sum over keys of p dE/dp)    softmax's Jacobian is diag(p) - p p^T
              = p (dE/dp - <ct, y>)                     as sum_k p_k <ct, v_k> = <ct, y>
        dE/dq = scale dE/ds k
        dE/dk = scale dE/ds^T q

    (Vaswani et al. 2017, https://arxiv.org/abs/1706.03762). ``save`` names the residuals:

    - ``"weights"``: e = exp(s - max s) and 1 / sum e, which multiplies y and ct instead of e.
      Nothing is computed twice. Causal queries are split into up to 8 parts, each with the keys up
      to its last query only. That takes little more than half of the N heads T^2 numbers, and of
      the work.
    - ``"logsumexp"``: log sum exp s, (N, heads, T). backward computes p = exp(s - logsumexp) again,
      at the price of one more product, for ``block`` queries at a time. Memory is linear in T (Rabe
      and Staats 2021, https://arxiv.org/abs/2112.05682; Dao et al. 2022,
      https://arxiv.org/abs/2205.14135).

    x is (N, T, 3D), floating: the D features of q, then of k, then of v, each with its heads one
    after the other. y is (N, T, D), and scale is 1 / sqrt(D / heads). The softmax is computed in at
    least float32.

    There is nothing to learn: params are ``()``, or a ``jp.Mask`` that ``net.bind(params, mask=)``
    puts in their place. Padded positions are taken for zeros, whatever x holds there, and get no
    weight as keys. For a query with no key left, y and the cotangents are 0.

    Args:
        heads: the number of heads, which divides D.
        causal: whether position t attends only to the positions up to t.
        save: the residuals, "weights" or "logsumexp".
        block: the largest number of queries that "logsumexp" handles at a time.

    Raises:
        TypeError: for an argument of the wrong type, and for x that is not floating.
        ValueError: for a number below 1 or another ``save``, for x that is not (N, T, 3D) with
            heads dividing D, and for a mask that is not (N, T).
    """

    heads: int
    causal: bool = True
    save: Save = "weights"
    block: int = 128
    takes = Mask

    def __post_init__(self) -> None:
        check_counts(self, "heads", "block")
        check_flags(self, "causal")
        if self.save not in ("weights", "logsumexp"):
            raise ValueError(f"Attention: save is 'weights' or 'logsumexp', not {self.save!r}")

    def init(self, key: Array, x: PyTree) -> tuple[()]:
        if getattr(x, "ndim", None) != 3 or not all(x.shape[1:]) or x.shape[2] % (3 * self.heads):
            raise ValueError(
                f"{self} takes x of shape (N, T, 3D), q, k and v packed, with {self.heads} heads "
                f"dividing D, not {shapes(x)}"
            )
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise TypeError(f"{self} takes floating x, not {x.dtype}")
        return ()

    def forward(
        self, params: Params, x: Float[Array, "n t c"]
    ) -> tuple[Float[Array, "n t d"], Residuals]:
        mask = mask_of(self, params, x)
        x = x if mask is None else jnp.where(mask[..., None], x, 0)
        q, k, v = _split(x, self.heads)
        parts = []
        for rows, keys in self._parts(x.shape[1]):
            attend = functools.partial(self._attend, mask, k[:, :, keys], v[:, :, keys])
            parts.append(self._run(attend, (), (q[:, :, rows], _positions(rows)))[0])
        ys, kept = zip(*parts, strict=True)
        y = jnp.concatenate(ys, 2).swapaxes(1, 2).reshape(*x.shape[:2], -1).astype(x.dtype)
        return y, (x, y, kept)

    def backward(
        self, params: Params, residuals: Residuals, ct: Float[Array, "n t d"]
    ) -> tuple[tuple[()], Float[Array, "n t c"]]:
        x, y, kept = residuals
        mask = mask_of(self, params, x)
        q, k, v = _split(x, self.heads)
        ct, y = (z.reshape(*x.shape[:2], self.heads, -1).swapaxes(1, 2) for z in (ct, y))
        mean = jnp.sum(wide(ct) * wide(y), -1, keepdims=True)
        d_q, d_k, d_v = [], [], []
        for (rows, keys), saved in zip(self._parts(x.shape[1]), kept, strict=True):
            pull = functools.partial(self._pull, mask, k[:, :, keys], v[:, :, keys])
            zeros = (jnp.zeros_like(k[:, :, keys], mean.dtype),) * 2
            block = q[:, :, rows], _positions(rows), ct[:, :, rows], mean[:, :, rows], saved
            here = self._run(pull, zeros, block)
            d_q.append(here[0])
            d_k.append(_until(x.shape[1], here[1][0]))
            d_v.append(_until(x.shape[1], here[1][1]))
        d_x = jnp.stack([jnp.concatenate(d_q, 2) * _scale(q), sum(d_k), sum(d_v)], 2)
        d_x = d_x.transpose(0, 3, 2, 1, 4).reshape(x.shape).astype(x.dtype)
        return (), d_x if mask is None else jnp.where(mask[..., None], d_x, 0)

    def _attend(
        self, mask: PaddingMask, k: Heads, v: Heads, block: tuple[Heads, Array]
    ) -> tuple[tuple[Heads, Residuals], tuple[()]]:
        """Return ``((y, residuals), ())`` of a block of queries."""
        q, at = block
        s, seen = self._scores(mask, q, k, at)
        top = jax.lax.stop_gradient(s.max(-1, keepdims=True))
        e = jnp.exp(s - top)
        if mask is None:
            total = e.sum(-1, keepdims=True)
        else:
            e = jnp.where(seen, e, 0)
            total = e.sum(-1, keepdims=True)
            total = jnp.where(total > 0, total, 1)
        e, r = e.astype(q.dtype), 1 / total
        y = _product("nhqk,nhkd->nhqd", e, v) * r
        return (y, (e, r) if self.save == "weights" else top + jnp.log(total)), ()

    def _pull(
        self,
        mask: PaddingMask,
        k: Heads,
        v: Heads,
        block: tuple[Heads, Array, Heads, Heads, Residuals],
    ) -> tuple[Heads, tuple[Heads, Heads]]:
        """Return ``(d_q, (d_k, d_v))``, pulled back from a block of queries."""
        q, at, ct, mean, saved = block
        if self.save == "weights":
            p, r = saved
            ct, mean = (wide(ct) * r).astype(ct.dtype), mean * r
        else:
            s, seen = self._scores(mask, q, k, at)
            p = jnp.exp(s - saved)
            p = (p if mask is None else jnp.where(seen, p, 0)).astype(q.dtype)
        d_v = _product("nhqk,nhqd->nhkd", p, ct)
        d_p = _product("nhqd,nhkd->nhqk", ct, v)
        d_s = (wide(p) * (d_p - mean)).astype(q.dtype)
        d_q = _product("nhqk,nhkd->nhqd", d_s, k)
        return d_q, (_product("nhqk,nhqd->nhkd", d_s, q), d_v)

    def _scores(self, mask: PaddingMask, q: Heads, k: Heads, at: Array) -> tuple[Heads, PyTree]:
        """Return s, and where a query sees a key (None if everywhere); elsewhere s is minimal."""
        s = _product("nhqd,nhkd->nhqk", q, k)
        keys = k.shape[2]
        if not self.causal and mask is None:
            return s, None
        seen = at >= (aligned(jnp.arange(keys), at) if self.causal else 0)
        if mask is not None:
            seen = seen & mask[:, None, None, :keys]
        return jnp.where(seen, s, jnp.finfo(s.dtype).min), seen

    def _parts(self, t: int) -> list[tuple[slice, slice]]:
        """Return slices of queries and of their keys: up to 8 parts of at least 64, or one part."""
        parts = min(8, max(1, t // 64)) if self.causal and self.save == "weights" else 1
        ends = [t * i // parts for i in range(parts + 1)]
        return [(slice(a, b), slice(0, b)) for a, b in itertools.pairwise(ends)]

    def _run(
        self, f: Callable[..., tuple[PyTree, PyTree]], zeros: PyTree, block: PyTree
    ) -> tuple[PyTree, PyTree]:
        """Return f(block), a pair of values of the queries (axis 2) and of sums over them."""
        if self.save == "weights":
            return f(block)
        t = block[0].shape[2]
        blocks = -(-t // self.block)
        size = -(-t // blocks)

        def split(z: Array) -> Array:
            z = _until(blocks * size, z)
            return jnp.moveaxis(z.reshape(*z.shape[:2], blocks, size, *z.shape[3:]), 2, 0)

        def join(z: Array) -> Array:
            z = jnp.moveaxis(z, 0, 2)
            return z.reshape(*z.shape[:2], blocks * size, *z.shape[4:])[:, :, :t]

        def step(sums: PyTree, block: PyTree) -> tuple[PyTree, PyTree]:
            out, more = f(block)
            return jax.tree.map(jnp.add, sums, more), out

        sums, out = jax.lax.scan(step, zeros, jax.tree.map(split, block))
        return jax.tree.map(join, out), sums


def _split(x: Float[Array, "n t c"], heads: int) -> tuple[Heads, Heads, Heads]:
    """Return scale q, k and v, each (N, heads, T, d)."""
    n, t, c = x.shape
    q, k, v = x.reshape(n, t, 3, heads, c // (3 * heads)).transpose(2, 0, 3, 1, 4)
    return (wide(q) * _scale(q)).astype(q.dtype), k, v


def _positions(rows: slice) -> Array:
    return jnp.arange(rows.start, rows.stop).reshape(1, 1, -1, 1)


def _until(t: int, z: Heads) -> Heads:
    """Return z padded with zeros to T = t."""
    return jnp.pad(z, ((0, 0), (0, 0), (0, t - z.shape[2]), (0, 0)))


def _scale(q: Heads) -> float:
    return 1 / math.sqrt(q.shape[-1])


def _product(spec: str, a: Array, b: Array) -> Array:
    """Return the einsum of a and b, accumulated in at least float32."""
    return jnp.einsum(spec, a, b, preferred_element_type=wide(a).dtype)
