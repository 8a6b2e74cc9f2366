"""The embedding, a table whose rows are picked, and the form of its cotangent."""

from __future__ import annotations

import dataclasses
from typing import Any

import chex
import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from jaxprop.core.arrays import wide
from jaxprop.core.checks import check_counts
from jaxprop.core.describe import shapes
from jaxprop.core.forms import Factored, Kronecker, gram, reached, weighted
from jaxprop.core.layer import Layer
from jaxprop.core.mesh import laid_out


class Rows(Factored):
    """g_n = the rows ct[n, t] put at ids[n, t] of a table of zeros (V, D), repeated ids added up.

    The table is only formed where it is asked for. Equal ids of one example are added to the first
    of them; after that an example's rows are all different, and squares need no cross terms.
    """

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

    def weighted_sum(self, weights: Float[Array, " n"]) -> Float[Array, "v d"]:
        ids, ct = self._sequences()
        return Rows(ids, weighted(wide(ct), weights), self.vocab).sum()

    def sq_norms(self) -> Float[Array, " n"]:
        return jnp.sum(self.squares(), axis=(1, 2))

    def inner_products(self) -> Float[Array, "n n"]:
        """sum_ts [ids_nt = ids_ms] ct_nt . ct_ms, through the tables where those are smaller."""
        ids, ct = self._sequences()
        if self.vocab < ids.shape[1] ** 2:
            return super().inner_products()

        def with_all(one: tuple[Array, Array]) -> Array:
            same = one[0][:, None, None] == ids
            return jnp.einsum("tms,td,msd->m", same.astype(ct.dtype), one[1], ct)

        return jax.lax.map(with_all, (ids, ct))

    def squares(self) -> Float[Array, "n t d"]:
        ids, ct = self._sequences()
        length = ids.shape[1]
        if length == 1:
            return ct**2
        first = jnp.argmax(ids[:, :, None] == ids[:, None, :], axis=-1)
        return jnp.einsum("nts,ntd->nsd", jax.nn.one_hot(first, length, dtype=ct.dtype), ct) ** 2

    def of_squares(self, squares: Float[Array, "n t d"]) -> Float[Array, "v d"]:
        return Rows(self.ids, squares, self.vocab).sum()

    def kronecker(self, over: str | None = None) -> Kronecker:
        """a is diagonal, with the number of times that each id occurs: (V, V)."""
        ids, ct = self._sequences()
        met = reached(ct, over)[..., 0]
        ids = jnp.where(met, _inside(ids, self.vocab), self.vocab)
        counts = jnp.zeros(self.vocab, ct.dtype).at[ids.ravel()].add(1, mode="drop")
        return Kronecker(jnp.diag(counts), gram(ct, over))

    def _table(self, ids: Int[Array, " m"], ct: Float[Array, "m d"]) -> Float[Array, "v d"]:
        zeros = jnp.zeros((self.vocab, ct.shape[-1]), ct.dtype)
        whole = laid_out(ct, None, jax.typeof(ct).sharding.spec[-1])
        return zeros.at[_inside(ids, self.vocab)].add(ct, mode="drop", out_sharding=whole)

    def _sequences(self) -> tuple[Int[Array, "n t"], Float[Array, "n t d"]]:
        ct = wide(self.ct)
        n = self.ids.shape[0]
        return self.ids.reshape(n, -1), ct.reshape(n, -1, ct.shape[-1])


class Embedding(Layer):
    """y = W[x], the rows of the table W that the ids x name.

    It is one_hot(x) W, so dE/dW has ct in the rows x, those of equal ids added up; the one_hot is
    never formed. The ids have no cotangent: d_x is None.

    x is (N, ...), integers in [0, vocab); y is (N, ..., features). params are the table
    (vocab, features), normal with standard deviation 1 / sqrt(features). An id outside gives a row
    of NaN. Raises ``TypeError`` for ids that are not integers.
    """

    vocab: int
    features: int

    def __post_init__(self) -> None:
        check_counts(self, "vocab", "features")

    def init(self, key: chex.PRNGKey, x: Any) -> Float[Array, "v d"]:
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
        return rows, x

    def backward(
        self, params: Float[Array, "v d"], x: Int[Array, "n ..."], ct: Float[Array, "n ... d"]
    ) -> tuple[Rows, None]:
        return Rows(x, ct, self.vocab), None


def _inside(ids: Int[Array, "..."], vocab: int) -> Int[Array, "..."]:
    """Negative ids as ids past the end, which JAX can be told to drop: no wrapping around."""
    return jnp.where(ids < 0, vocab, ids)
