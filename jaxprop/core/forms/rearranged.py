"""The form of a param whose entries were rearranged before they met data."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import jax
from jax import Array
from jaxtyping import Bool, Float

from jaxprop.core.forms.form import Factored, OfX, Sides
from jaxprop.core.forms.moves import Moves, Place, Scanned, moved_back


class Rearranged(Factored):
    """The form of a param that met data with its entries rearranged, or with only some of them.

    Results that do not depend on where an entry lies are those of the inner form.

    Attributes:
        form: the inner form, of the array that met the data.
        moves: the moves from the param to that array.
    """

    form: Factored
    moves: Moves = dataclasses.field(metadata={"static": True})

    @property
    def is_pair(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.form.is_pair

    def factors(self) -> Iterator[tuple[Array, int]]:
        return self.form.factors()

    def per_example(self) -> Float[Array, "n ..."]:
        return jax.vmap(self._back)(self.form.per_example())

    def sum(self) -> Array:
        return self._back(self.form.sum())

    def norm_of_sum(self) -> Float[Array, ""]:
        return self.form.norm_of_sum()

    def scaled(self, weights: Float[Array, " n"]) -> Rearranged:
        return Rearranged(self.form.scaled(weights), self.moves)

    def compact(self) -> Rearranged:
        return Rearranged(self.form.compact(), self.moves)

    def only(self, kept: Bool[Array, " n"]) -> Rearranged:
        return Rearranged(self.form.only(kept), self.moves)

    def weighted_sum(self, weights: Float[Array, " n"]) -> Array:
        return self._back(self.form.weighted_sum(weights))

    def sq_norms(self) -> Float[Array, " n"]:
        return self.form.sq_norms()

    def norms(self) -> Float[Array, " n"]:
        return self.form.norms()

    def inner_products(self) -> Float[Array, "n n"]:
        return self.form.inner_products()

    def for_products(self, other: Factored) -> Factored:
        if not isinstance(other, Rearranged) or other.moves != self.moves:
            return super().for_products(other)
        return Rearranged(self.form.for_products(other.form), self.moves)

    def products_with(self, other: Factored) -> Float[Array, "n m"]:
        if not isinstance(other, Rearranged) or other.moves != self.moves:
            return super().products_with(other)
        return self.form.products_with(other.form)

    @property
    def sizes(self) -> tuple[int, int]:
        """The sizes of the inner form: sides apply to the array that met the data."""
        return self.form.sizes

    def projected(self, sides: Sides) -> Float[Array, "n ..."]:
        return self.form.projected(sides)

    @property
    def place(self) -> Place:
        scans = sum(isinstance(move, Scanned) for move in self.moves)
        shape = jax.eval_shape(lambda form: form.per_example(), self.form).shape[1 + scans :]
        return self.form.place.within(self.moves, shape)

    def seen(self, sides: Sides) -> Factored:
        return self.form.seen(sides)

    def squares(self) -> Array:
        return self.form.squares()

    def of_squares(self, squares: Array) -> Array:
        return self._back(self.form.of_squares(squares))

    def squares_of_each(self) -> Array:
        return self.form.squares_of_each()

    def each_of_squares(self, squares: Array) -> Float[Array, "n ..."]:
        return jax.vmap(self._back)(self.form.each_of_squares(squares))

    def counted(self, real: Bool[Array, "n ..."] | None) -> Bool[Array, "n ..."] | None:
        return self.form.counted(real)

    def gram_of_x(
        self, real: Bool[Array, "n ..."] | None = None, weights: Float[Array, " n"] | None = None
    ) -> OfX:
        return self.form.gram_of_x(real, weights)

    def in_one_position(self, real: Bool[Array, "n ..."] | None = None) -> Rearranged:
        return Rearranged(self.form.in_one_position(real), self.moves)

    def gram_of_ct(self) -> Float[Array, "... o o"]:
        return self.form.gram_of_ct()

    def _back(self, g: Array) -> Array:
        return moved_back(self.moves, g)
