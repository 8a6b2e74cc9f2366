"""The form of a matrix and the bias that is added after it, as one matrix."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float

from jaxprop.core.forms.composed import Repeated
from jaxprop.core.forms.form import Factored, OfX
from jaxprop.core.forms.moves import Place
from jaxprop.core.forms.outer import Outer, Sum
from jaxprop.core.loops import map_examples, sum_examples
from jaxprop.core.serialization import serializable


@serializable
class Biased(Factored):
    """The form of matrices (..., I, O) with the bias as one more row, (..., I + 1, O).

    Attributes:
        w: the form of the matrices, which must define ``sum_of_x``.
        b: the form of the bias, with the same ct.
    """

    w: Factored
    b: Sum

    @property
    def is_pair(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.w.is_pair

    def factors(self) -> Iterator[tuple[Array, int]]:
        yield from self.w.factors()
        yield from self.b.factors()

    @property
    def place(self) -> Place:
        """The layout of the matrix in its param, without the bias."""
        return self.w.place

    def matrices(self, g: Array) -> Array:
        return g

    @property
    def matrix_shape(self) -> tuple[int, ...]:
        *groups, rows, features = self.w.matrix_shape
        return *groups, rows + 1, features

    def per_example(self) -> Float[Array, "n ..."]:
        each, alone = self.one_by_one()
        return map_examples(alone, each)

    def scaled(self, weights: Float[Array, " n"]) -> Biased:
        return Biased(self.w.scaled(weights), self.b.scaled(weights))

    def squares(self) -> Float[Array, "..."]:
        each, alone = self.one_by_one()
        return sum_examples(lambda one: alone(one) ** 2, each)

    def one_by_one(self) -> tuple[list[Array], Callable[[list[Array]], Array]]:
        (of_w, matrix), (of_b, bias) = self.w.one_by_one(), self.b.one_by_one()
        matrices, shape = self.w.matrices, self.w.matrix_shape

        def alone(one: list[Array]) -> Array:
            g = matrices(matrix(one[: len(of_w)]))
            row = bias(one[len(of_w) :]).reshape(*shape[:-2], 1, shape[-1])
            return jnp.concatenate([g, row.astype(g.dtype)], axis=-2)

        return [*of_w, *of_b], alone

    def counted(self, real: Bool[Array, "n ..."] | None) -> Bool[Array, "n ..."] | None:
        return self.w.counted(real)

    def gram_of_x(
        self, real: Bool[Array, "n ..."] | None = None, weights: Float[Array, " n"] | None = None
    ) -> OfX:
        gram, rows = self.w.gram_of_x(real, weights)
        column = self.w.sum_of_x(real, weights).astype(gram.dtype)[..., None]
        corner = jnp.broadcast_to(rows.astype(gram.dtype), (*gram.shape[:-2], 1, 1))
        above = jnp.concatenate([gram, column], axis=-1)
        below = jnp.concatenate([column.swapaxes(-1, -2), corner], axis=-1)
        return OfX(jnp.concatenate([above, below], axis=-2), rows)

    def in_one_position(self, real: Bool[Array, "n ..."] | None = None) -> Biased:
        return Biased(self.w.in_one_position(real), self.b.in_one_position(real))

    def gram_of_ct(self) -> Float[Array, "... o o"]:
        return self.w.gram_of_ct()


def with_bias(w: Factored, b: Factored) -> Factored | None:
    """Return the joint form of a matrix and the bias after it; None if they are not such a pair.

    If the shapes of their cts agree, the cts are taken to be the same.
    """
    if isinstance(w, Repeated) and isinstance(b, Repeated):
        inner = with_bias(w.form, b.form)
        return None if inner is None else Repeated(inner)
    if not isinstance(b, Sum) or getattr(getattr(w, "ct", None), "shape", None) != b.ct.shape:
        return None
    if isinstance(w, Outer):
        return Outer(jnp.concatenate([w.x, jnp.ones_like(w.x[..., :1])], axis=-1), w.ct)
    return Biased(w, b) if type(w).sum_of_x is not Factored.sum_of_x else None
