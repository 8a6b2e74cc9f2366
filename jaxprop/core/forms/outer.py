"""The forms that most layers need: for a matrix that multiplies x, and for an added bias."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import ClassVar

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float

from jaxprop.core.arrays import known, root, weighted, wide
from jaxprop.core.forms.form import Factored, OfX, Sides, Stacked, norms, sq_norms, through
from jaxprop.core.loops import map_examples, sum_examples
from jaxprop.core.mesh import laid_out
from jaxprop.core.serialization import serializable


@serializable
class Sum(Factored):
    """The form of a bias (O,): g_n = sum over positions t of ct[n, t].

    Attributes:
        ct: (N, ..., O), the cotangent of the array that the bias was added to.
    """

    is_pair: ClassVar[bool] = True
    ct: Float[Array, "n ... o"]

    def per_example(self) -> Float[Array, "n o"]:
        return self.ct.sum(axis=tuple(range(1, self.ct.ndim - 1)))

    def sum(self) -> Float[Array, " o"]:
        return wide(self.ct).sum(axis=tuple(range(self.ct.ndim - 1)))

    def compact(self) -> Sum:
        return Sum(Sum(wide(self.ct)).per_example())

    def scaled(self, weights: Float[Array, " n"]) -> Sum:
        return Sum(weighted(wide(self.ct), weights))

    def projected(self, sides: Sides) -> Float[Array, "n 1 l"]:
        return self.seen(sides).per_example()[:, None]

    def seen(self, sides: Sides) -> Sum:
        """Return the form of g_n right; the left side has one entry and is left out."""
        return Sum(through(wide(self.ct), sides.right))

    def squares(self) -> Float[Array, "n o"]:
        return wide(self.per_example()) ** 2

    def of_squares(self, squares: Float[Array, "n o"]) -> Float[Array, " o"]:
        return squares.sum(axis=0)

    def counted(self, real: Bool[Array, "n ..."] | None) -> Bool[Array, "n ..."] | None:
        return positions_of(self.ct, real)

    def gram_of_x(
        self, real: Bool[Array, "n ..."] | None = None, weights: Float[Array, " n"] | None = None
    ) -> OfX:
        count = count_of(self.ct[..., 0], real, weights)
        return OfX(count.reshape(1, 1), count)

    def in_one_position(self, real: Bool[Array, "n ..."] | None = None) -> Sum:
        return Sum(self.per_example())

    def gram_of_ct(self) -> Float[Array, "o o"]:
        return gram(self.ct)


Sequences = Float[Array, "n t d"]
# On a TPU, whose matmuls take the square too, |X^T C|^2 is used up to this multiple of the cost of
# <X X^T, C C^T>.
DEARER = 3


@serializable
class Outer(Factored):
    """The form of a matrix (I, O): g_n = sum over positions t of x[n, t] (outer) ct[n, t].

    Attributes:
        x: (N, ..., I), the input that the matrix multiplied. It does not depend on ct.
        ct: (N, ..., O), the cotangent of the product, linear in that of the layer's output.
    """

    is_pair: ClassVar[bool] = True
    x: Float[Array, "n ... i"]
    ct: Float[Array, "n ... o"]

    def per_example(self) -> Float[Array, "n i o"]:
        return _each(*self._sequences())

    def sum(self) -> Float[Array, "i o"]:
        """Return x^T ct, or (ct^T x)^T if cheaper: a CPU copies the operand that is transposed."""
        i, o = self.x.shape[-1], self.ct.shape[-1]
        rows = math.prod(self.x.shape[:-1])
        if known(lambda: rows * i <= rows * o + i * o):
            return _product(self.x, self.ct)
        return jax.lax.platform_dependent(
            self.x, self.ct, cpu=_transposed_product, default=_product
        )

    def norm_of_sum(self) -> Float[Array, ""]:
        """Return |X^T C| from <X X^T, C C^T> over all rows of X and C, where that is cheaper.

        If the products nearly cancel, their sum is mostly rounding error; if X and C are far apart
        in size, one of the products overflows. Then |X^T C| is computed after all.
        """
        rows, i, o = math.prod(self.x.shape[:-1]), self.x.shape[-1], self.ct.shape[-1]
        if not known(lambda: rows * (i + o) < i * o):
            return super().norm_of_sum()
        x, ct = wide(self.x).reshape(rows, i), wide(self.ct).reshape(rows, o)
        whole = laid_out(self.x, None, None)
        products = jnp.matmul(x, x.T, out_sharding=whole) * jnp.matmul(ct, ct.T, out_sharding=whole)
        total = products.sum()
        holds = _holds(total, jnp.abs(products).sum()) & (total >= _least(total))
        holds &= jnp.isfinite(total)
        return jax.lax.cond(holds, lambda: root(total), super().norm_of_sum)

    def scaled(self, weights: Float[Array, " n"]) -> Outer:
        return Outer(wide(self.x), weighted(wide(self.ct), weights))

    def sq_norms(self) -> Float[Array, " n"]:
        """Return |x|^2 |ct|^2, or along T positions the cheaper of <X X^T, C C^T> and |X^T C|^2."""
        return self._cheapest(sq_norms, _sums_of_products, _sums_of_squares)

    def weighed_sq_norms(self, entries: Array) -> Float[Array, " n"]:
        x, ct = map(wide, self._sequences())
        if x.shape[1] != 1:
            return super().weighed_sq_norms(entries)
        x, ct = x[:, 0] ** 2, ct[:, 0] ** 2
        entries = jnp.broadcast_to(entries.astype(x.dtype), (x.shape[1], ct.shape[1]))
        return jnp.sum((x @ entries) * ct, axis=1)

    def norms(self) -> Float[Array, " n"]:
        """Return |x| |ct|, or along positions |X^T C|, for all examples at once where it is small.

        Where <X X^T, C C^T> is cheaper, and shows no sign of cancellation, overflow or underflow,
        its root is used.
        """
        return self._cheapest(norms, _roots_of_products, _norms_of_products)

    def _cheapest(
        self,
        of_each: Callable[[Array], Float[Array, " n"]],
        of_products: Callable[[Sequences, Sequences], Float[Array, " n"]],
        one_by_one: Callable[[Sequences, Sequences], Float[Array, " n"]],
    ) -> Float[Array, " n"]:
        """Return a norm of each X^T C in the cheapest way.

        Args:
            of_each: returns the norm of each X^T C itself; for an outer product of two rows it must
                be the product of the rows' norms.
            of_products: returns the norm from X and C by <X X^T, C C^T>.
            one_by_one: returns the norm from X and C by one X^T C at a time.
        """
        x, ct = map(wide, self._sequences())
        (_, t, i), o = x.shape, ct.shape[-1]
        if t == 1:
            return of_each(x) * of_each(ct)
        if known(lambda: DEARER * t * (i + o) < i * o):
            return of_products(x, ct)
        if known(lambda: t * (i + o) < i * o):
            return jax.lax.platform_dependent(
                x, ct, tpu=lambda x, ct: of_each(_each(x, ct)), default=of_products
            )
        if known(lambda: t * (i + o) >= i * o):  # then X^T C is no larger than X and C
            return of_each(_each(x, ct))
        return one_by_one(x, ct)

    def inner_products(self) -> Float[Array, "n n"]:
        """Return <g_n, g_m> from each g_n, or by pairs of positions where that is cheaper.

        By pairs it is the sum of (x_n . x_m)(ct_n . ct_m) over all pairs of positions.
        """
        x, ct = map(wide, self._sequences())
        (n, t, i), o = x.shape, ct.shape[-1]
        if not known(lambda: n * t * t * (i + o) <= (t + n) * i * o):
            return super().inner_products()
        return _products_of_pairs(x, ct)

    def for_products(self, other: Factored) -> Factored:
        if not isinstance(other, Outer):
            return super().for_products(other)
        return (
            self if self._in_pairs(other) else Stacked(_each(*map(wide, self._sequences()[::-1])))
        )

    def products_with(self, other: Factored) -> Float[Array, "n m"]:
        """Return <g_n, h_m>, where cheaper by pairs of positions, as in ``inner_products``."""
        if not isinstance(other, Outer) or not self._in_pairs(other):
            return super().products_with(other)
        (x, ct), (x2, ct2) = (map(wide, form._sequences()) for form in (self, other))
        products = jnp.einsum("nti,msi->ntms", x, x2) * jnp.einsum("nto,mso->ntms", ct, ct2)
        return products.sum(axis=(1, 3))

    def _in_pairs(self, other: Outer) -> bool:
        (x, ct), (x2, _) = self._sequences(), other._sequences()
        (n, t, i), (m, s, _), o = x.shape, x2.shape, ct.shape[-1]
        return pairs_are_cheaper(n, t, m, s, i, o)

    @property
    def sizes(self) -> tuple[int, int]:
        return self.x.shape[-1], self.ct.shape[-1]

    def projected(self, sides: Sides) -> Float[Array, "n k l"]:
        """Return (x left)^T (ct right), without computing g_n."""
        return self.seen(sides).per_example()

    def seen(self, sides: Sides) -> Outer:
        return Outer(through(wide(self.x), sides.left), through(wide(self.ct), sides.right))

    def squares(self) -> Array:
        """Return ct^2, for the product (x^2)^T (ct^2); along positions, sum_n g_n^2 itself."""
        x, ct = map(wide, self._sequences())
        if x.shape[1] == 1:
            return ct[:, 0] ** 2

        return sum_examples(lambda example: (example[0].T @ example[1]) ** 2, (x, ct))

    def of_squares(self, squares: Array) -> Float[Array, "i o"]:
        x, _ = self._sequences()
        if x.shape[1] != 1:
            return squares
        return Outer(wide(x[:, 0]) ** 2, squares).sum()

    def squares_of_each(self) -> Array:
        """Return ct^2, for the product x^2 (outer) ct^2; along positions, g_n^2 itself."""
        return super().squares_of_each() if self._sequences()[0].shape[1] != 1 else self.squares()

    def each_of_squares(self, squares: Array) -> Float[Array, "n i o"]:
        x, _ = self._sequences()
        if x.shape[1] != 1:
            return squares
        return wide(x[:, 0, :, None]) ** 2 * squares[:, None]

    def counted(self, real: Bool[Array, "n ..."] | None) -> Bool[Array, "n ..."] | None:
        return positions_of(self.ct, real)

    def gram_of_x(
        self, real: Bool[Array, "n ..."] | None = None, weights: Float[Array, " n"] | None = None
    ) -> OfX:
        return OfX(gram(of_real(self.x, real, weights)), count_of(self.x[..., 0], real, weights))

    def in_one_position(self, real: Bool[Array, "n ..."] | None = None) -> Outer:
        ct = self._sequences()[1]
        return Outer(mean_of_real(self.x, real), wide(ct).sum(axis=1))

    def gram_of_ct(self) -> Float[Array, "o o"]:
        return gram(self.ct)

    def _sequences(self) -> tuple[Float[Array, "n t i"], Float[Array, "n t o"]]:
        """Return the factors with their positions on one axis, which has length 1 without any."""
        length = math.prod(self.x.shape[1:-1])
        return (
            self.x.reshape(self.x.shape[0], length, self.x.shape[-1]),
            self.ct.reshape(self.ct.shape[0], length, self.ct.shape[-1]),
        )


def pairs_are_cheaper(n: int, t: int, m: int, s: int, i: int, o: int) -> bool:
    """Return whether <g_n, h_m> costs less by pairs of positions than by the gradients.

    Args:
        n: the number of examples of one batch.
        t: the number of positions of each of them.
        m: the number of examples of the other batch.
        s: the number of positions of each of them.
        i: the size of x.
        o: the size of ct.
    """
    return known(lambda: n * m * t * s * (i + o) <= (n * t + m * s + n * m) * i * o)


@jax.jit
def _sums_of_products(x: Sequences, ct: Sequences) -> Float[Array, " n"]:
    """Return <X X^T, C C^T> of each example, or |X^T C|^2 after all if its terms cancel.

    The terms are as large as |X|^2 |C|^2, and their rounding errors are in proportion.
    """
    total, size = _products(x, ct)
    holds = _holds(total, size)
    return jax.lax.cond(holds, lambda: total, lambda: _sums_of_squares(x, ct))


@jax.jit
def _roots_of_products(x: Sequences, ct: Sequences) -> Float[Array, " n"]:
    """Return the root of <X X^T, C C^T> of each example, or |X^T C| if rounding dominates any."""
    total, size = _products(x, ct)
    some = jnp.any(ct != 0, axis=(1, 2))  # otherwise the total is truly 0
    sound = (total >= 1e-2 * size) & jnp.isfinite(total) & ((total >= _least(total)) | ~some)
    return jax.lax.cond(jnp.all(sound), lambda: root(total), lambda: _norms_of_products(x, ct))


def _each(x: Sequences, ct: Sequences) -> Float[Array, "n i o"]:
    """Return X^T C of each example, for all at once."""
    return jnp.einsum("nti,nto->nio", x, ct)


def _norms_of_products(x: Sequences, ct: Sequences) -> Float[Array, " n"]:
    """Return |X^T C|, one example at a time."""
    return map_examples(lambda pair: norms((pair[0].T @ pair[1])[None])[0], (x, ct))


def _products(x: Sequences, ct: Sequences) -> tuple[Float[Array, " n"], Float[Array, " n"]]:
    """Return <X X^T, C C^T> of each example, and the sum of the absolute values of its terms."""
    products = jnp.einsum("nti,nsi->nts", x, x) * jnp.einsum("nto,nso->nts", ct, ct)
    return products.sum(axis=(1, 2)), jnp.abs(products).sum(axis=(1, 2))


def _sums_of_squares(x: Sequences, ct: Sequences) -> Float[Array, " n"]:
    """Return |X^T C|^2 as a sum of squares, one example at a time."""
    return map_examples(lambda pair: jnp.sum((pair[0].T @ pair[1]) ** 2), (x, ct))


@jax.jit
def _products_of_pairs(x: Sequences, ct: Sequences) -> Float[Array, "n n"]:
    """Return <g_n, g_m> from products of positions, or from each g_n if the products cancel."""
    products = jnp.einsum("nti,msi->ntms", x, x) * jnp.einsum("nto,mso->ntms", ct, ct)
    total = products.sum(axis=(1, 3))
    holds = _holds(jnp.diagonal(total), jnp.diagonal(jnp.abs(products).sum(axis=(1, 3))))

    def with_all(pair: tuple[Array, Array]) -> Float[Array, " n"]:
        return jnp.einsum("mti,io,mto->m", x, pair[0].T @ pair[1], ct)

    return jax.lax.cond(holds, lambda: total, lambda: map_examples(with_all, (x, ct)))


def _least(total: Array) -> float:
    """Return the size from which on a sum of products has lost little by flushing to 0."""
    info = jnp.finfo(total.dtype)
    return float(info.tiny) / float(info.eps)


def _holds(total: Array, size: Array) -> Array:
    """Return whether sums are large compared with their terms, so that rounding is a small part."""
    return jnp.all(total >= 1e-3 * size)  # False for NaN


def _product(a: Float[Array, "n ... i"], b: Float[Array, "n ... o"]) -> Float[Array, "i o"]:
    """Return a^T b over examples and positions, added up in at least float32.

    On a mesh with explicit axes, each axis of the product is sharded as it is in its factor.
    """
    sharding = laid_out(a, jax.typeof(a).sharding.spec[-1], jax.typeof(b).sharding.spec[-1])
    axes, dtype = tuple(range(a.ndim - 1)), jnp.promote_types(wide(a).dtype, wide(b).dtype)
    return jnp.tensordot(a, b, (axes, axes), preferred_element_type=dtype, out_sharding=sharding)


def _transposed_product(
    a: Float[Array, "n ... i"], b: Float[Array, "n ... o"]
) -> Float[Array, "i o"]:
    """Return (b^T a)^T, with the outer transpose hidden from XLA by a barrier.

    The barrier is put on a flat array, which has one layout only.
    """
    transposed = _product(b, a)
    return jax.lax.optimization_barrier(transposed.ravel()).reshape(transposed.shape).T


def positions_of(
    ct: Float[Array, "n ... d"], real: Bool[Array, "n ..."] | None
) -> Bool[Array, "n ..."] | None:
    """Return which positions count: those that are not padding, or that a cotangent reaches.

    A position that is padding for the loss may still have a part in it, such as a prompt that is
    attended to, or an encoder's output that has as many positions as the target.

    Args:
        ct: the cotangent at each position.
        real: False where an example, or one of its positions, is padding. If ct does not have these
            positions, an example is real if any of its positions is.
    """
    if real is None:
        return None
    if real.shape != ct.shape[:-1][: real.ndim]:
        real = jnp.any(real, axis=tuple(range(1, real.ndim)))
    return jnp.expand_dims(real, range(real.ndim, ct.ndim - 1)) | jnp.any(ct != 0, axis=-1)


def of_real(
    x: Float[Array, "n ..."],
    real: Bool[Array, "n ..."] | None,
    weights: Float[Array, " n"] | None = None,
) -> Float[Array, "n ..."]:
    """Return x with zeros for padding, and with each example times the root of its weight.

    Args:
        x: an array with the example on axis 0.
        real: False where an example, or a position of x, is padding.
        weights: the weight of each example in a sum of squares; 1 by default.
    """
    if weights is not None:
        x = weighted(wide(x), jnp.sqrt(weights))
    return x if real is None else jnp.where(jnp.expand_dims(real, range(real.ndim, x.ndim)), x, 0)


def count_of(
    like: Float[Array, "n ..."],
    real: Bool[Array, "n ..."] | None,
    weights: Float[Array, " n"] | None,
) -> Float[Array, ""]:
    """Return the weighted number of real positions; ``like`` has one entry for each position."""
    return jnp.sum(of_real(jnp.ones_like(wide(like)), real, weights) ** 2)


def mean_of_real(
    x: Float[Array, "n ... d"], real: Bool[Array, "n ..."] | None
) -> Float[Array, "n d"]:
    """Return the mean of each example's rows that are not padding."""
    axes = tuple(range(1, x.ndim - 1))
    total = of_real(wide(x), real).sum(axis=axes)
    count = of_real(jnp.ones_like(wide(x[..., :1])), real).sum(axis=axes)
    return total / jnp.maximum(count, 1)


def gram(x: Float[Array, "n ... d"]) -> Float[Array, "d d"]:
    """Return x^T x over all rows of x."""
    x = wide(x).reshape(-1, x.shape[-1])
    return x.T @ x
