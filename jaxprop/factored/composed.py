"""Forms made of forms: of a stack of layers, and of a parameter that is used more than once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from jaxprop.factored.form import Factored, Kronecker, is_factored, sq_norms, wide
from jaxprop.factored.outer import Outer, Sum


class Repeated(Factored):
    """The cotangent of a stack of params (L, ...): that of each layer, its factors (L, N, ...)."""

    form: Factored

    def per_example(self) -> Float[Array, "n l ..."]:
        return jax.vmap(lambda form: form.per_example(), out_axes=1)(self.form)

    def sum(self) -> Float[Array, "l ..."]:
        return jax.vmap(lambda form: form.sum())(self.form)

    def weighted_sum(self, weights: Float[Array, " n"]) -> Float[Array, "l ..."]:
        return jax.vmap(lambda form: form.weighted_sum(weights))(self.form)

    def sq_norms(self) -> Float[Array, " n"]:
        return jax.vmap(lambda form: form.sq_norms())(self.form).sum(axis=0)

    def bounding_sq_norms(self) -> Float[Array, " n"]:
        return jax.lax.map(lambda form: form.bounding_sq_norms(), self.form).sum(axis=0)

    def inner_products(self) -> Float[Array, "n n"]:
        return jax.lax.map(lambda form: form.inner_products(), self.form).sum(axis=0)

    def squares(self) -> Array:
        return jax.lax.map(lambda form: form.squares(), self.form)

    def of_squares(self, squares: Array) -> Float[Array, "l ..."]:
        return jax.vmap(lambda form, squares: form.of_squares(squares))(self.form, squares)

    def kronecker(self, over: str | None = None) -> Kronecker:
        return jax.vmap(lambda form: form.kronecker(over))(self.form)


class Joint(Factored):
    """The cotangent of a param that is used more than once: g_n is the sum of each use's share.

    |a + b|^2 is not |a|^2 + |b|^2, so whatever is not linear in g_n is asked of the sum, which is
    formed for one example after the other and not kept.
    """

    uses: tuple[Factored, ...]

    def per_example(self) -> Float[Array, "n ..."]:
        return _added([use.per_example() for use in self.uses])

    def sum(self) -> Array:
        return _added([use.sum() for use in self.uses])

    def weighted_sum(self, weights: Float[Array, " n"]) -> Array:
        return _added([use.weighted_sum(weights) for use in self.uses])

    def sq_norms(self) -> Float[Array, " n"]:
        return self._one_by_one(lambda g: sq_norms(g[None])[0])

    def squares(self) -> Array:
        def add(total: Array, uses: tuple[Factored, ...]) -> tuple[Array, None]:
            return total + _alone(uses) ** 2, None

        shape = jax.eval_shape(self.sum)
        return jax.lax.scan(add, jnp.zeros(shape.shape, shape.dtype), self.uses)[0]

    def _one_by_one(self, f: Callable[[Array], Array]) -> Float[Array, " n"]:
        return jax.lax.map(lambda uses: f(_alone(uses)), self.uses)


def joint(forms: tuple[Factored, ...]) -> Factored:
    """The form of one param with several uses; for two matrix products, one over more positions."""
    first = forms[0]
    if len(forms) == 1:
        return first
    if isinstance(first, Outer | Sum) and all(type(form) is type(first) for form in forms):
        sequences = [jax.tree.map(_with_positions, form) for form in forms]
        return jax.tree.map(lambda *factors: jnp.concatenate(factors, axis=1), *sequences)
    return Joint(forms)


def over_layers(left: Any) -> Any:
    """What a scan over layers stacked, with its forms as ``Repeated`` ones."""
    return jax.tree.map(
        lambda leaf: Repeated(leaf) if is_factored(leaf) else leaf, left, is_leaf=is_factored
    )


def _with_positions(factor: Float[Array, "n ... d"]) -> Float[Array, "n t d"]:
    return factor.reshape(factor.shape[0], -1, factor.shape[-1])


def _alone(uses: tuple[Factored, ...]) -> Array:
    """g_n of one example, from its factors."""
    batch = jax.tree.map(lambda factor: factor[None], uses)
    return _added([wide(use.sum()) for use in batch])


def _added(shares: list[Array]) -> Array:
    return sum(shares[1:], start=shares[0])
