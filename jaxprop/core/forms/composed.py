"""Forms made of forms: for a stack of layers, and for a parameter that is used more than once."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float

from jaxprop.core.arrays import wide
from jaxprop.core.forms.form import Factored, OfX, Sides, norms, norms_of_all, sq_norms
from jaxprop.core.forms.moves import Place, Scanned
from jaxprop.core.forms.outer import Outer, Sum
from jaxprop.core.loops import map_examples, sum_examples
from jaxprop.core.serialization import serializable


@serializable
class Repeated(Factored):
    """The form of a stack of params (L, ...), one for each layer of a ``repeat``.

    Attributes:
        form: the form of one layer's param, with a leading axis of layers: factors (L, N, ...).
    """

    form: Factored

    @property
    def is_pair(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.form.is_pair

    def factors(self) -> Iterator[tuple[Array, int]]:
        for factor, axis in self.form.factors():
            yield factor, axis + 1

    def per_example(self) -> Float[Array, "n l ..."]:
        return jax.vmap(lambda form: form.per_example(), out_axes=1)(self.form)

    def sum(self) -> Float[Array, "l ..."]:
        return jax.vmap(lambda form: form.sum())(self.form)

    def compact(self) -> Repeated:
        return Repeated(jax.vmap(lambda form: form.compact())(self.form))

    def only(self, kept: Bool[Array, " n"]) -> Repeated:
        return Repeated(jax.vmap(lambda form: form.only(kept))(self.form))

    def scaled(self, weights: Float[Array, " n"]) -> Repeated:
        return Repeated(jax.vmap(lambda form: form.scaled(weights))(self.form))

    def weighted_sum(self, weights: Float[Array, " n"]) -> Float[Array, "l ..."]:
        return jax.vmap(lambda form: form.weighted_sum(weights))(self.form)

    def sq_norms(self) -> Float[Array, " n"]:
        return jax.lax.map(lambda form: form.sq_norms(), self.form).sum(axis=0)

    def weighed_sq_norms(self, entries: Array) -> Float[Array, " n"]:
        layers = jax.tree.leaves(self.form)[0].shape[0]
        each = entries if entries.ndim else jnp.broadcast_to(entries, (layers,))
        pair = self.form, each
        return jax.lax.map(lambda pair: pair[0].weighed_sq_norms(pair[1]), pair).sum(axis=0)

    def norms(self) -> Float[Array, " n"]:
        return norms_of_all(jax.lax.map(lambda form: form.norms(), self.form))

    def inner_products(self) -> Float[Array, "n n"]:
        return jax.lax.map(lambda form: form.inner_products(), self.form).sum(axis=0)

    def for_products(self, other: Factored) -> Repeated:
        return self

    def products_with(self, other: Factored) -> Float[Array, "n m"]:
        if not isinstance(other, Repeated):
            return super().products_with(other)
        pair = self.form, other.form
        return jax.lax.map(lambda pair: pair[0].products_with(pair[1]), pair).sum(axis=0)

    @property
    def sizes(self) -> tuple[int, int]:
        """The sizes of one layer."""
        alone = jax.tree.map(lambda factor: jax.eval_shape(lambda f: f[0], factor), self.form)
        return alone.sizes

    def projected(self, sides: Sides) -> Float[Array, "n l ..."]:
        """Return the projections of each layer, by its own sides: (L, I, K) and (L, O, M)."""
        return jax.vmap(lambda form, sides: form.projected(sides), out_axes=1)(self.form, sides)

    @property
    def place(self) -> Place:
        return Place.of((Scanned(), *self.form.place.moves))

    def seen(self, sides: Sides) -> Repeated:
        return Repeated(jax.vmap(lambda form, sides: form.seen(sides))(self.form, sides))

    def squares(self) -> Array:
        return jax.lax.map(lambda form: form.squares(), self.form)

    def of_squares(self, squares: Array) -> Float[Array, "l ..."]:
        return jax.vmap(lambda form, squares: form.of_squares(squares))(self.form, squares)

    def squares_of_each(self) -> Array:
        return jax.vmap(lambda form: form.squares_of_each())(self.form)

    def each_of_squares(self, squares: Array) -> Float[Array, "n l ..."]:
        each = jax.vmap(lambda form, squares: form.each_of_squares(squares), out_axes=1)
        return each(self.form, squares)

    def counted(self, real: Bool[Array, "n ..."] | None) -> Bool[Array, "l n ..."] | None:
        return jax.vmap(lambda form: form.counted(real))(self.form)

    def gram_of_x(
        self, real: Bool[Array, "l n ..."] | None = None, weights: Float[Array, " n"] | None = None
    ) -> OfX:
        return _of_layers(lambda form, real: form.gram_of_x(real, weights), self.form, real)

    def in_one_position(self, real: Bool[Array, "l n ..."] | None = None) -> Repeated:
        return Repeated(_of_layers(lambda form, real: form.in_one_position(real), self.form, real))

    def gram_of_ct(self) -> Float[Array, "l o o"]:
        return jax.vmap(lambda form: form.gram_of_ct())(self.form)


@serializable
class Joint(Factored):
    """The form of a param that is used more than once: g_n is the sum of its uses' shares.

    |a + b|^2 is not |a|^2 + |b|^2, so anything that is not linear in g_n is computed from the sum,
    for one example at a time, and the sum is not kept.

    Attributes:
        uses: a form for each use.
    """

    uses: tuple[Factored, ...]
    unfactored: ClassVar[str] = "the param is used more than once, and each use has its own"

    def factors(self) -> Iterator[tuple[Array, int]]:
        for use in self.uses:
            yield from use.factors()

    def per_example(self) -> Float[Array, "n ..."]:
        return _added([wide(use.per_example()) for use in self.uses])

    def sum(self) -> Array:
        return _added([wide(use.sum()) for use in self.uses])

    def only(self, kept: Bool[Array, " n"]) -> Joint:
        return Joint(tuple(use.only(kept) for use in self.uses))

    def scaled(self, weights: Float[Array, " n"]) -> Joint:
        return Joint(tuple(use.scaled(weights) for use in self.uses))

    def sq_norms(self) -> Float[Array, " n"]:
        return self._of_each(lambda g: sq_norms(g[None])[0])

    def norms(self) -> Float[Array, " n"]:
        return self._of_each(lambda g: norms(g[None])[0])

    def squares(self) -> Array:
        each, alone = self.one_by_one()
        return sum_examples(lambda one: alone(one) ** 2, each)

    def _of_each(self, f: Callable[[Array], Array]) -> Float[Array, " n"]:
        each, alone = self.one_by_one()
        return map_examples(lambda one: f(alone(one)), each)


def joint(forms: tuple[Factored, ...]) -> Factored:
    """Return the form of one param with several uses.

    Several matrix products, or several biases, become one form of their kind over more positions:
    each position of a use has one for every use, where all uses have the same positions.
    """
    first = forms[0]
    if len(forms) == 1:
        return first
    if isinstance(first, Outer | Sum) and all(type(form) is type(first) for form in forms):
        if all(jax.tree.map(jnp.shape, form) == jax.tree.map(jnp.shape, first) for form in forms):
            return jax.tree.map(lambda *factors: jnp.stack(factors, axis=-2), *forms)
        sequences = [jax.tree.map(_with_positions, form) for form in forms]
        return jax.tree.map(lambda *factors: jnp.concatenate(factors, axis=1), *sequences)
    return Joint(forms)


def _of_layers(f: Callable[..., Any], form: Factored, real: Array | None) -> Any:
    """Return ``f(form, real)`` for each layer of a stack, where real is None for all of them."""
    return jax.vmap(f, (0, None if real is None else 0))(form, real)


def _with_positions(factor: Float[Array, "n ... d"]) -> Float[Array, "n t d"]:
    n, *length, features = factor.shape
    return factor.reshape(n, math.prod(length), features)


def _added(shares: list[Array]) -> Array:
    return sum(shares[1:], start=shares[0])
