"""The last dense layer and the cross-entropy in one, for logits that do not fit into memory."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Int

from jaxprop.core.affine import AffineParams
from jaxprop.core.arrays import of_indices, wide
from jaxprop.core.checks import check_counts, check_flags, check_values, check_x
from jaxprop.core.describe import shapes
from jaxprop.core.layer import Layer
from jaxprop.core.mesh import shard_map_axes
from jaxprop.core.types import PyTree
from jaxprop.layers.dense import Dense

H = Float[Array, "n ... d"]
Ids = Int[Array, "n ..."]
Each = Float[Array, "n ..."]


class Running(NamedTuple):
    """The running sums of a position after some of the chunks.

    Attributes:
        top: the largest logit of a class other than the target.
        total: the sum of exp(logit - top) over those classes.
        own: the target's logit; NaN before its chunk, and 0 for padding.
    """

    top: Each
    total: Each
    own: Each


class LinearCrossEntropy(Layer):
    """``jp.CrossEntropy`` of h w + b, by chunks of the classes, so never with all logits in memory.

    It is a net's last layer, with ``jp.Mean()`` for the loss, and takes the target along with x:

        net = jp.chain(jp.on(0, body), jp.LinearCrossEntropy(50257))
        value, grads = jp.value_and_grad(net, jp.Mean())(params, (tokens, targets))

    With z = h w + b, and L = log sum_j exp(z_j) over the classes other than the target t,

        E = log(1 + exp(L - z_t)),  dE/dz_t = -r,  dE/dz_j = r exp(z_j - L),  r = sigmoid(L - z_t)

    which is p_j - [j = t] without cancellation. ``forward`` accumulates L and z_t chunk by chunk,
    with a running maximum (Milakov and Gimelshein 2018, https://arxiv.org/abs/1805.02867), and
    saves only these and x. ``backward`` recomputes each chunk's z, and from it that chunk's dE/dz
    and its parts of dE/dw = h^T dE/dz, dE/db and dE/dh = dE/dz w^T (as in Wijmans et al. 2024,
    https://arxiv.org/abs/2411.09009). The price is four matrix products instead of three.

    x is a pair (h, target): h (N, ..., D), floating, and target (N, ...), integers in [0, classes),
    or -1 for padding; a target of ``classes`` or more gives NaN. y is (N,): each example's mean
    over its positions that are not padding, in at least float32. params are those of
    ``jp.Dense(classes)``.

    It computes in the dtype of h, with sums in at least float32. It is best left out of
    ``jp.cast``, which would round the cotangent 1 / N. The cotangents of params are sums over
    examples already: per-example quantities come from ``backward`` of single examples, with a
    gradient of w for each.

    Args:
        classes: the number of classes.
        bias: whether to add b.
        chunk: the number of classes that are processed at once.

    Raises:
        TypeError: for an argument of the wrong type, and for x that is not such a pair.
        ValueError: for a number below 1, for a target that does not have the shape of h without its
            last axis, and where its values are known (outside of ``jax.jit``) for a target of
            ``classes`` or more.
    """

    classes: int
    bias: bool = True
    chunk: int = 1024

    def __post_init__(self) -> None:
        check_counts(self, "classes", "chunk")
        check_flags(self, "bias")

    def init(self, key: Array, x: PyTree) -> AffineParams:
        if type(x) is not tuple or len(x) != 2:
            raise TypeError(f"{self} takes a pair (h, target), not {shapes(x)}")
        h, target = x
        check_x(self, h, "N, ..., D")
        if not jnp.issubdtype(getattr(target, "dtype", object), jnp.integer):
            raise TypeError(f"{self} takes integer targets, not {shapes(target)}")
        if target.shape != h.shape[:-1]:
            raise ValueError(
                f"{self}: h has shape {h.shape}, which takes a target of shape {h.shape[:-1]}, not "
                f"{target.shape}"
            )
        return Dense(self.classes, self.bias).init(key, h)

    def forward(self, params: AffineParams, x: tuple[H, Ids]) -> tuple[Float[Array, " n"], Any]:
        h, target = x[0], of_indices(x[1])
        words = f"{self} takes a target below {self.classes}"
        check_values(words, x[1], lambda t: t < self.classes)
        start = wide(h[..., 0])

        def gather(seen: Running, first: Array) -> tuple[Running, None]:
            z, ids, new = self._logits(params, h, first)
            mine = ids.astype(target.dtype) == target[..., None]
            others = jnp.where(new & ~mine, z, -jnp.inf)
            top = jnp.maximum(seen.top, jax.lax.stop_gradient(others).max(axis=-1))
            at = jnp.where(top == -jnp.inf, 0, top)
            total = seen.total * jnp.exp(seen.top - at) + jnp.exp(others - at[..., None]).sum(-1)
            own = jnp.where(mine, z, 0).sum(axis=-1)
            return Running(top, total, jnp.where(mine.any(axis=-1), own, seen.own)), None

        unmet = jnp.where(target < 0, 0, jnp.full_like(start, jnp.nan))
        nothing = Running(jnp.full_like(start, -jnp.inf), jnp.zeros_like(start), unmet)
        seen, _ = jax.lax.scan(gather, nothing, self._firsts())
        each, _ = _error(seen)
        weight = _weights(target, each.dtype)
        values = jnp.where(weight == 0, 0, weight * each)
        return values.sum(axis=tuple(range(1, values.ndim))), (h, target, seen, weight)

    def backward(
        self, params: AffineParams, residuals: Any, ct: Float[Array, " n"]
    ) -> tuple[AffineParams, tuple[H, None]]:
        h, target, seen, weight = residuals
        ct = jnp.expand_dims(ct, tuple(range(1, weight.ndim))) * weight
        rest = jnp.where(weight == 0, 0, ct * _error(seen)[1])
        scale = jnp.where(seen.total == 0, 0, rest / seen.total)
        top = jnp.where(seen.top == -jnp.inf, 0, seen.top)
        rows = jnp.where((weight == 0)[..., None], 0, h).reshape(-1, h.shape[-1])

        def of_chunk(total: Any, first: Array) -> tuple[Any, None]:
            d_h, d_w, d_b = total
            z, ids, new = self._logits(params, h, first)
            d_z = scale[..., None] * jnp.exp(z - top[..., None])
            mine = ids.astype(target.dtype) == target[..., None]
            d_z = jnp.where(mine, -rest[..., None], d_z)
            d_z = jnp.where((weight == 0)[..., None], 0, d_z)
            put = jax.lax.dynamic_update_slice_in_dim
            if d_b is not None:
                part = d_z.sum(axis=tuple(range(d_z.ndim - 1)))
                d_b = put(d_b, part.astype(d_b.dtype), first, 0)
            d_z = d_z.astype(h.dtype)
            w = self._chunk(params.w, first).astype(h.dtype)
            d_h += jnp.matmul(jnp.where(new, d_z, 0), w.T, preferred_element_type=d_h.dtype)
            part = jnp.matmul(
                rows.T, d_z.reshape(-1, d_z.shape[-1]), preferred_element_type=d_w.dtype
            )
            return (d_h, put(d_w, part, first, 1), d_b), None

        start = jax.tree.map(lambda leaf: wide(jnp.zeros_like(leaf)), (h, params.w, params.b))
        firsts = self._firsts()
        if shard_map_axes():  # each device has its own sums, and their type says so
            start = jax.tree.map(jnp.zeros_like, of_chunk(start, firsts[0])[0])
        (d_h, d_w, d_b), _ = jax.lax.scan(of_chunk, start, firsts)
        return AffineParams(d_w, d_b), (d_h.astype(h.dtype), None)

    def _firsts(self) -> Int[Array, " k"]:
        """Return the first class of each chunk. All have one size, so the last may overlap."""
        width = self._width()
        return jnp.minimum(jnp.arange(0, self.classes, width), self.classes - width)

    def _width(self) -> int:
        return min(self.chunk, self.classes)

    def _chunk(self, array: Array, first: Array) -> Array:
        return jax.lax.dynamic_slice_in_dim(array, first, self._width(), axis=-1)

    def _logits(
        self, params: AffineParams, h: H, first: Array
    ) -> tuple[Float[Array, "n ... c"], Int[Array, "n ... c"], Bool[Array, "n ... c"]]:
        """Return a chunk's logits, its classes, and which of these are in no earlier chunk."""
        z = h @ self._chunk(params.w, first).astype(h.dtype)
        if params.b is not None:
            b = self._chunk(params.b, first).astype(h.dtype)
            z = z + jnp.expand_dims(b, range(z.ndim - 1))
        ids = first + jax.lax.broadcasted_iota(first.dtype, z.shape, z.ndim - 1)
        return wide(z), ids, ids >= -(-first // self._width()) * self._width()


def _error(seen: Running) -> tuple[Each, Each]:
    """Return E and r, relative to the largest of all logits as in ``jp.CrossEntropy``."""
    top = jax.lax.stop_gradient(jnp.maximum(seen.top, seen.own))
    own = jnp.where((seen.own == top) & jnp.isinf(top), 0, seen.own - top)
    others = seen.total * jnp.exp(seen.top - top)
    return jnp.log1p(others + jnp.expm1(own)) - own, others / (others + jnp.exp(own))


def _weights(target: Ids, dtype: Any) -> Each:
    """Return the weight of each position in its example's mean."""
    real = target >= 0
    count = jnp.maximum(real.sum(axis=tuple(range(1, real.ndim)), keepdims=True), 1)
    return real.astype(dtype) / count.astype(dtype)
