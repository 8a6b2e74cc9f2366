"""The form of a param whose entries met data in another order than they lie in."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float

from jaxprop.core.forms.form import Factored, OfX, Sides

Sizes = tuple[int, ...]


class Reshaped(NamedTuple):
    """A reshape, of what had another shape before."""

    before: Sizes

    def back(self, g: Array) -> Array:
        return g.reshape(self.before)


class Transposed(NamedTuple):
    """A transpose by a permutation."""

    axes: Sizes

    def back(self, g: Array) -> Array:
        return jnp.transpose(g, sorted(range(len(self.axes)), key=self.axes.__getitem__))


class Sliced(NamedTuple):
    """A slice of an array of a shape; the entries that it leaves out have a cotangent of 0."""

    before: Sizes
    starts: Sizes
    strides: Sizes

    def back(self, g: Array) -> Array:
        config = [
            (start, size - start - (length - 1) * stride - 1, stride - 1)
            for size, start, stride, length in zip(*self, g.shape, strict=True)
        ]
        return jax.lax.pad(g, jnp.zeros((), g.dtype), config)


class Turned(NamedTuple):
    """An array turned around along some axes."""

    axes: Sizes

    def back(self, g: Array) -> Array:
        return jnp.flip(g, self.axes)


class Scanned(NamedTuple):
    """A layer of a stack that a scan goes through: what follows is done to each."""

    def back(self, g: Array) -> Array:
        return g


Move: TypeAlias = Reshaped | Transposed | Sliced | Turned | Scanned
Moves = tuple[Move, ...]


def in_place(moves: Moves) -> bool:
    """Return whether the moves leave all entries where they are."""
    return all(isinstance(move, Scanned) for move in moves)


def moved_back(moves: Moves, g: Array) -> Array:
    """Return what is like a view, with its entries where they are in the param."""
    depth = sum(isinstance(move, Scanned) for move in moves)
    for move in reversed(moves):
        if isinstance(move, Scanned):
            depth -= 1
            continue
        back: Callable[[Array], Array] = move.back
        for _ in range(depth):
            back = jax.vmap(back)
        g = back(g)
    return g


class Rearranged(Factored):
    """The form of a param whose entries met data in another order, or some of them only.

    Whatever does not look at where an entry lies is that of the form there.

    Attributes:
        form: the form of what met the data.
        moves: how the param's entries came to lie there.
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
        """Those of the form, so that sides are of what met the data."""
        return self.form.sizes

    def projected(self, sides: Sides) -> Float[Array, "n ..."]:
        return self.form.projected(sides)

    def squares(self) -> Array:
        return self.form.squares()

    def of_squares(self, squares: Array) -> Array:
        return self._back(self.form.of_squares(squares))

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
