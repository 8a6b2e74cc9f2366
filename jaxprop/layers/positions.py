"""Position encodings: tables that are added to x, and a rotation of queries and keys.

The tables of sines and cosines are constants, computed in float64 while tracing.
"""

from __future__ import annotations

import dataclasses
import math
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Bool, Float

from jaxprop.core.arrays import weighted, wide
from jaxprop.core.checks import check_counts, check_flags, check_number, check_x
from jaxprop.core.describe import shapes
from jaxprop.core.forms import Factored, OfX, Stacked, gram, of_real, positions_of
from jaxprop.core.layer import Layer
from jaxprop.core.serialization import serializable
from jaxprop.core.types import PyTree

X = Float[Array, "n t d"]


@serializable
class Leading(Factored):
    """The form of a table (R, ...) whose first T rows are used: g_n = ct[n] there, 0 elsewhere.

    Attributes:
        ct: (N, T, ...), the cotangent of the first T rows.
        rows: R.
    """

    is_pair: ClassVar[bool] = True
    ct: Float[Array, "n t ..."]
    rows: int = dataclasses.field(metadata={"static": True})

    def per_example(self) -> Float[Array, "n r ..."]:
        return jax.vmap(self._padded)(self.ct)

    def sum(self) -> Float[Array, "r ..."]:
        return self._padded(Stacked(self.ct).sum())

    def scaled(self, weights: Float[Array, " n"]) -> Leading:
        return Leading(weighted(wide(self.ct), weights), self.rows)

    def sq_norms(self) -> Float[Array, " n"]:
        return Stacked(self.ct).sq_norms()

    def inner_products(self) -> Float[Array, "n n"]:
        return Stacked(self.ct).inner_products()

    def for_products(self, other: Factored) -> Leading:
        return self

    def products_with(self, other: Factored) -> Float[Array, "n m"]:
        if not isinstance(other, Leading):
            return super().products_with(other)
        rows = min(self.ct.shape[1], other.ct.shape[1])
        return Stacked(self.ct[:, :rows]).products_with(Stacked(other.ct[:, :rows]))

    def squares(self) -> Float[Array, "r ..."]:
        return self._padded(Stacked(self.ct).squares())

    def counted(self, real: Bool[Array, "n ..."] | None) -> Bool[Array, "n t"] | None:
        return positions_of(self.ct.reshape(*self.ct.shape[:2], math.prod(self.ct.shape[2:])), real)

    def gram_of_x(
        self, real: Bool[Array, "n ..."] | None = None, weights: Float[Array, " n"] | None = None
    ) -> OfX:
        """Return how often each row is used, a diagonal."""
        ones = jnp.ones(self.ct.shape[:2], wide(self.ct).dtype)
        one = of_real(ones, real, weights) ** 2
        return OfX(self._padded(one.sum(axis=0)), one.sum())

    def in_one_position(self, real: Bool[Array, "n ..."] | None = None) -> Leading:
        """Return the form itself: each position has its own row."""
        return self

    def gram_of_ct(self) -> Float[Array, "d d"]:
        return gram(self.ct)

    def _padded(self, g: Float[Array, "t ..."]) -> Float[Array, "r ..."]:
        return jnp.pad(g, ((0, self.rows - g.shape[0]), *[(0, 0)] * (g.ndim - 1)))


class Positions(Layer):
    """Learned positions, y[n, t] = x[n, t] + table[t], with a row of the table for each position.

    dE/dx = ct. dE/dtable[t] = sum_n ct[n, t] for the first T rows, and 0 for the others.

    x is (N, T, D), floating, with T at most ``length``, and y is like x. params are the table
    (length, D), and start as normal with standard deviation 0.02 (as in GPT-2).

    Args:
        length: the number of positions.

    Raises:
        TypeError: for a length that is not a whole number, and for x that is not floating.
        ValueError: for a length below 1, and for x that is longer or not (N, T, D).
    """

    length: int

    def __post_init__(self) -> None:
        check_counts(self, "length")

    def init(self, key: Array, x: PyTree) -> Float[Array, "r d"]:
        check_x(self, x, "N, T, D")
        if x.shape[1] > self.length:
            raise ValueError(f"{self} has {self.length} positions, x {shapes(x)} has {x.shape[1]}")
        dtype = jax.dtypes.canonicalize_dtype(x.dtype)
        return jax.nn.initializers.normal(0.02)(key, (self.length, x.shape[2]), dtype)

    def forward(self, params: Float[Array, "r d"], x: X) -> tuple[X, tuple[()]]:
        return x + params[: x.shape[1]][None].astype(x.dtype), ()

    def backward(
        self, params: Float[Array, "r d"], residuals: tuple[()], ct: X
    ) -> tuple[Leading, X]:
        return Leading(ct, self.length), ct


class SinusoidalPositions(Layer):
    """Sinusoidal positions, y[n, t] = x[n, t] + table[t], so dE/dx = ct.

    The table has the sines and cosines of t at D / 2 frequencies:
    table[t, 2i] = sin(t / 10000^(2i/D)) and table[t, 2i + 1] = cos(t / 10000^(2i/D))
    (Vaswani et al. 2017, https://arxiv.org/abs/1706.03762, section 3.5).

    x is (N, T, D), floating, and y is like x. There are no params.

    Raises:
        TypeError: for x that is not floating.
        ValueError: for x that is not (N, T, D).
    """

    def init(self, key: Array, x: PyTree) -> tuple[()]:
        check_x(self, x, "N, T, D")
        return ()

    def forward(self, params: tuple[()], x: X) -> tuple[X, tuple[()]]:
        _, t, d = x.shape
        column = np.arange(d)
        angles = _angles(t, 10000.0, 2 * (column // 2) / d)
        table = np.where(column % 2, np.cos(angles), np.sin(angles))
        return x + jnp.asarray(table[None], x.dtype), ()

    def backward(self, params: tuple[()], residuals: tuple[()], ct: X) -> tuple[tuple[()], X]:
        return (), ct


class Rotary(Layer):
    """Rotary positions, which rotate the queries and keys in x by angles that grow with position t.

    The d features of a head are d/2 pairs (i, j), each a point in a plane. By default j = i + d/2,
    which pairs the halves of the head, as in GPT-NeoX and Llama. At position t, with the angle
    a = t base^(-2i/d) of the i-th pair,

        y[i] = x[i] cos a - x[j] sin a
        y[j] = x[i] sin a + x[j] cos a

    so that <q_t, k_s> depends on t and s only through t - s. v is left as it is. A rotation's
    transpose is its inverse, so dE/dx is ct rotated by -a (Su et al. 2021,
    https://arxiv.org/abs/2104.09864). ``interleaved`` pairs neighbours, features 2i and 2i + 1, as
    do the paper and GPT-J. That is the same rotation with the features in another order, so trained
    weights need the pairing that they were trained with.

    x and y are (N, T, 3D), or (N, T, D + 2 kv_heads d), floating, with q, k and v packed as
    ``Attention(heads, kv_heads=)`` takes them, and d = D / heads. There are no params.

    Args:
        heads: the number of heads, with an even number of features each.
        base: the base of the angles, a positive number.
        interleaved: whether to pair neighbours instead of the halves of a head.
        kv_heads: the number of heads of k and of v; None for ``heads``.

    Raises:
        TypeError: for an argument of the wrong type, and for x that is not floating.
        ValueError: for heads below 1 or a base that is not positive, and for x of another shape.

    Example:
        >>> import jaxprop as jp
        >>> d = 8
        >>> block = jp.chain(jp.Dense(3 * d), jp.Rotary(2), jp.Attention(2), jp.Dense(d))
    """

    heads: int
    base: float = 10000.0
    interleaved: bool = False
    kv_heads: int | None = None

    def __post_init__(self) -> None:
        check_counts(self, "heads")
        check_flags(self, "interleaved")
        if self.kv_heads is not None:
            check_counts(self, "kv_heads")
        check_number("Rotary: base", self.base, positive=True)

    def init(self, key: Array, x: PyTree) -> tuple[()]:
        check_x(self, x, "N, T, D")
        if not x.shape[2] or x.shape[2] % (2 * sum(self._heads)):
            packed = "3D" if self.kv_heads is None else "D + 2 kv_heads d"
            raise ValueError(
                f"{self} takes x of shape (N, T, {packed}), q, k and v packed, with {self.heads} "
                f"heads of an even number of features each, not {shapes(x)}"
            )
        return ()

    def forward(self, params: tuple[()], x: X) -> tuple[X, tuple[()]]:
        return self._turned(x, 1), ()

    def backward(self, params: tuple[()], residuals: tuple[()], ct: X) -> tuple[tuple[()], X]:
        return (), self._turned(ct, -1)

    @property
    def _heads(self) -> tuple[int, int]:
        """The number of heads of q and k together, and of v."""
        kv_heads = self.kv_heads or self.heads
        return self.heads + kv_heads, kv_heads

    def _turned(self, x: X, sign: int) -> X:
        n, t, c = x.shape
        heads, others = self._heads
        half = c // (2 * (heads + others))
        angles = _angles(t, self.base, np.arange(half) / half)[None, :, None]
        wide = jnp.float32 if x.dtype.itemsize < 4 else x.dtype
        cos, sin = jnp.asarray(np.cos(angles), wide), jnp.asarray(sign * np.sin(angles), wide)
        qk, v = jnp.split(x, [2 * half * heads], -1)
        axis, pair = (-1, (half, 2)) if self.interleaved else (-2, (2, half))
        pairs = qk.reshape(n, t, heads, *pair).astype(wide)
        a, b = (jax.lax.index_in_dim(pairs, i, pairs.ndim + axis, keepdims=False) for i in (0, 1))
        turned = jnp.stack([a * cos - b * sin, a * sin + b * cos], axis)
        return jnp.concatenate([turned.reshape(qk.shape).astype(x.dtype), v], -1)


def _angles(t: int, base: float, powers: np.ndarray) -> np.ndarray:
    """Return position / base^power, (T, len(powers)), in float64."""
    return np.arange(t)[:, None] * np.float64(base) ** -powers
