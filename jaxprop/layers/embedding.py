"""The embedding, which looks up rows of a table, and the form of the table's cotangent."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import ClassVar

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Int

from jaxprop.core.arrays import known, of_indices, weighted, wide
from jaxprop.core.checks import check_counts
from jaxprop.core.describe import shapes
from jaxprop.core.forms import (
    Factored,
    OfX,
    Outer,
    Sides,
    gram,
    norms,
    of_real,
    positions_of,
    sq_norms,
    through,
)
from jaxprop.core.layer import Layer
from jaxprop.core.loops import map_examples
from jaxprop.core.mesh import laid_out
from jaxprop.core.serialization import serializable
from jaxprop.core.types import PyTree


@serializable
class Rows(Factored):
    """The form of a table (V, D): g_n = sum over positions t of ct[n, t] in the row ids[n, t].

    For squares, the cotangents of equal ids within an example are added up first. The remaining
    rows all belong to different ids, so that squares need no cross terms. A table with at most two
    rows for each position is materialized for this; otherwise each row stays where its id comes
    first. Positions are not compared in pairs, so that memory is linear in T. (On a CPU the table
    takes a third of the time at V = T / 2 and as long at V = 2T. Comparing positions in pairs takes
    12 times as long at T = 512, for inner products, and 60 times at 2048, for squares.)

    Attributes:
        ids: (N, ...), integers; an id outside [0, V) has no row.
        ct: (N, ..., D), the cotangent of the rows that were looked up.
        vocab: V.
    """

    is_pair: ClassVar[bool] = True
    ids: Int[Array, "n ..."]
    ct: Float[Array, "n ... d"]
    vocab: int = dataclasses.field(metadata={"static": True})

    def per_example(self) -> Float[Array, "n v d"]:
        def alone(ids: Array, ct: Array) -> Array:
            return self._table(ids, ct)

        return jax.vmap(alone)(*self._sequences())

    def sum(self) -> Float[Array, "v d"]:
        ids, ct = self._sequences()
        return self._table(ids.ravel(), ct.reshape(-1, ct.shape[-1]))

    def scaled(self, weights: Float[Array, " n"]) -> Rows:
        ids, ct = self._sequences()
        return Rows(ids, weighted(ct, weights), self.vocab)

    def sq_norms(self) -> Float[Array, " n"]:
        return sq_norms(self._different_rows())

    def norms(self) -> Float[Array, " n"]:
        return norms(self._different_rows())

    def inner_products(self) -> Float[Array, "n n"]:
        return self.products_with(self)

    def for_products(self, other: Factored) -> Rows:
        return self

    def products_with(self, other: Factored) -> Float[Array, "n m"]:
        """Return sum_ts [ids_nt = ids_ms] ct_nt . ct_ms, or <g_n, h_m> itself for a small table.

        For the sum, the ids of one example are sorted, and those of the other batch are looked up.
        """
        if not isinstance(other, Rows) or self._is_small() or other._is_small():
            return super().products_with(other)
        ids, ct = other._sequences()

        def with_all(one: tuple[Array, Array]) -> Array:
            order = jnp.argsort(one[0])
            in_order, shares = one[0][order], one[1][order]
            rows = jnp.zeros_like(shares).at[jnp.searchsorted(in_order, in_order)].add(shares)
            found = jnp.minimum(jnp.searchsorted(in_order, ids), len(order) - 1)
            there = (in_order[found] == ids)[..., None]
            return jnp.sum(jnp.where(there, rows[found], 0) * ct, axis=(1, 2))

        return map_examples(with_all, self._sequences())

    @property
    def sizes(self) -> tuple[int, int]:
        return self.vocab, self.ct.shape[-1]

    def projected(self, sides: Sides) -> Float[Array, "n k l"]:
        """Return the sum over positions of left[id] (outer) ct right."""
        if sides.left is None:
            return map_examples(
                lambda one: through(self._table(*one), sides.right), self._sequences()
            )
        ids, ct = self._sequences()
        rows = sides.left.astype(ct.dtype)[jnp.clip(ids, 0, self.vocab - 1)]
        return jnp.einsum("ntk,ntl->nkl", rows, through(ct, sides.right))

    def seen(self, sides: Sides) -> Factored:
        """Return the form of g_n right if the left side is None, as for a diagonal of counts."""
        if sides.left is not None:
            return super().seen(sides)
        ids, ct = self._sequences()
        return Rows(ids, through(ct, sides.right), self.vocab)

    def squares(self) -> Float[Array, "n t d"]:
        return self._added_up() ** 2

    def of_squares(self, squares: Float[Array, "n t d"]) -> Float[Array, "v d"]:
        return Rows(self.ids, squares, self.vocab).sum()

    def counted(self, real: Bool[Array, "n ..."] | None) -> Bool[Array, "n ..."] | None:
        return positions_of(self.ct, real)

    def gram_of_x(
        self, real: Bool[Array, "n ..."] | None = None, weights: Float[Array, " n"] | None = None
    ) -> OfX:
        """Return the count of each id, a diagonal."""
        ones = jnp.ones(self.ids.shape, wide(self.ct).dtype)
        one = of_real(ones, real, weights) ** 2
        counts = jnp.zeros(self.vocab, one.dtype)
        ids = _inside(self.ids, self.vocab)
        return OfX(counts.at[ids.ravel()].add(one.ravel(), mode="drop"), one.sum())

    def in_one_position(self, real: Bool[Array, "n ..."] | None = None) -> Outer:
        """Return a form whose input, (N, V), is the share of positions with each id."""
        ids, ct = self._sequences()
        one = of_real(jnp.ones(self.ids.shape, ct.dtype), real).reshape(ids.shape)
        shares = one / jnp.maximum(one.sum(axis=1, keepdims=True), 1)
        return Outer(Rows(ids, shares[..., None], self.vocab).per_example()[..., 0], ct.sum(axis=1))

    def gram_of_ct(self) -> Float[Array, "d d"]:
        return gram(self._sequences()[1])

    def _is_small(self) -> bool:
        """Return whether the table has at most two rows for each position of an example."""
        return known(lambda: self.vocab <= 2 * math.prod(self.ids.shape[1:]))

    def _different_rows(self) -> Float[Array, "n r d"]:
        """Return all rows of g_n that are not 0, possibly among rows of zeros."""
        return self.per_example() if self._is_small() else self._added_up()

    def _added_up(self) -> Float[Array, "n t d"]:
        """Return the sums of ct over equal ids, each where its id comes first, and zeros elsewhere.

        If the table has no more rows than an example's ct has entries, V integers tell where each
        id comes first, in a fifth of the time of sorting.
        """
        ids, ct = self._sequences()
        if ids.shape[1] == 1:
            return ct
        first = _first
        if known(lambda: self.vocab <= ids.shape[1] * ct.shape[-1]):
            first = functools.partial(_first_by_place, vocab=self.vocab)

        def alone(ids: Array, ct: Array) -> Array:
            return jnp.zeros_like(ct).at[first(ids)].add(ct)

        return jax.vmap(alone)(ids, ct)

    def _table(self, ids: Int[Array, " m"], ct: Float[Array, "m d"]) -> Float[Array, "v d"]:
        zeros = jnp.zeros((self.vocab, ct.shape[-1]), ct.dtype)
        whole = laid_out(ct, None, jax.typeof(ct).sharding.spec[-1])
        return zeros.at[_inside(ids, self.vocab)].add(ct, mode="drop", out_sharding=whole)

    def _sequences(self) -> tuple[Int[Array, "n t"], Float[Array, "n t d"]]:
        """Return ids and ct, with 0 in ct where the id has no row."""
        n, features = self.ids.shape[0], self.ct.shape[-1]
        length = math.prod(self.ids.shape[1:])
        ids, ct = (
            of_indices(self.ids).reshape(n, length),
            wide(self.ct).reshape(n, length, features),
        )
        there = (ids >= 0) & (ids < self.vocab)
        return ids, jnp.where(there[..., None], ct, 0)


class Embedding(Layer):
    """An embedding, y = W[x], the rows of the table W at the ids x.

    y is one_hot(x) W, so dE/dW = one_hot(x)^T ct: ct in the rows x, added up for equal ids.
    one_hot(x) is never materialized. The ids have no cotangent: d_x is None.

    x is (N, ...), integers in [0, vocab), and y is (N, ..., features). An id of -1 or less is
    padding: its row is zeros, and no cotangent comes back from it. An id of vocab or more gives a
    row of NaN. params are the table (vocab, features), in JAX's default float dtype, and start as
    normal with standard deviation 1 / sqrt(features), as in Flax (1 in PyTorch).

    Args:
        vocab: the number of rows.
        features: the size of a row.

    Raises:
        TypeError: for an argument that is not a whole number, and for ids that are not integers.
        ValueError: for an argument below 1, and for ids without an example axis.
    """

    vocab: int
    features: int

    def __post_init__(self) -> None:
        check_counts(self, "vocab", "features")

    def init(self, key: Array, x: PyTree) -> Float[Array, "v d"]:
        if not hasattr(x, "dtype") or not jnp.issubdtype(x.dtype, jnp.integer):
            raise TypeError(f"{self} takes integer ids, not {shapes(x)}")
        if x.ndim < 1:
            raise ValueError(f"{self} takes ids of shape (N, ...), axis 0 the example, not ()")
        return jax.random.normal(key, (self.vocab, self.features)) / self.features**0.5

    def forward(
        self, params: Float[Array, "v d"], x: Int[Array, "n ..."]
    ) -> tuple[Float[Array, "n ... d"], Int[Array, "n ..."]]:
        ids = _inside(x, self.vocab)
        as_ids = laid_out(ids, *jax.typeof(ids).sharding.spec, jax.typeof(params).sharding.spec[-1])
        rows = params.at[ids].get(mode="fill", fill_value=jnp.nan, out_sharding=as_ids)
        return jnp.where((x < 0)[..., None], 0, rows), x

    def backward(
        self, params: Float[Array, "v d"], x: Int[Array, "n ..."], ct: Float[Array, "n ... d"]
    ) -> tuple[Rows, None]:
        return Rows(x, ct, self.vocab), None


def _first(ids: Int[Array, " t"]) -> Int[Array, " t"]:
    """Return, for each position, the first one with the same id, from runs of sorted ids."""
    order = jnp.argsort(ids, stable=True)
    in_order = ids[order]
    starts = jnp.append(True, in_order[1:] != in_order[:-1])
    start = jax.lax.cummax(jnp.where(starts, jnp.arange(ids.shape[0]), 0))
    return jnp.zeros_like(order).at[order].set(order[start])


def _first_by_place(ids: Int[Array, " t"], vocab: int) -> Int[Array, " t"]:
    """Return the same for ids in [0, vocab), from an array with an entry for each id."""
    here, places = jnp.arange(ids.shape[0]), _inside(ids, vocab)
    first = jnp.full(vocab, ids.shape[0], here.dtype).at[places].min(here, mode="drop")
    return first.at[places].get(mode="fill", fill_value=0)


def _inside(ids: Int[Array, "..."], vocab: int) -> Int[Array, "..."]:
    """Return ids with negative ones moved past the end, so that JAX does not wrap them around."""
    ids = of_indices(ids)
    return jnp.where(ids < 0, vocab, ids)
