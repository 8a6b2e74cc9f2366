"""Factored cotangents: a parameter's cotangent kept as its factors until somebody asks for its sum.

The chain rule's last product for y = x w is dE/dw = sum_n x_n (outer) ct_n. Multiplied out, the
examples are gone. Kept as the pair (x, ct), it still answers for each example, for squared norms,
for curvature, at the price of what is asked and no more. Each form says how its parameter's share
of one example, g_n, is made of factors; every other question has an answer through ``per_example``,
and a faster one where the factors allow it.
"""

from __future__ import annotations

import abc
import dataclasses
from typing import Any, NamedTuple, dataclass_transform

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float


class Kronecker(NamedTuple):
    """a (outer) b, the Kronecker product of an (I, I) and an (O, O) matrix, for a param (I, O)."""

    a: Float[Array, "i i"]
    b: Float[Array, "o o"]


@dataclass_transform(frozen_default=True)
class Factored(abc.ABC):
    """The cotangent of one parameter, sum_n g_n, not yet summed over the examples n.

    Axis 0 of every factor is the example; of a ``Repeated`` one axis 1, behind the layer. A
    parameter may have several cotangents, one for each column of a Hessian root: ``squares`` is
    what can be added up over them, and ``kronecker`` takes the name of the ``jax.vmap`` axis that
    they lie on.
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        jax.tree_util.register_dataclass(dataclasses.dataclass(frozen=True)(cls))

    @abc.abstractmethod
    def per_example(self) -> Float[Array, "n ..."]:
        """g_n for each example: the parameter's shape behind an example axis."""

    def sum(self) -> Array:
        """sum_n g_n, what autodiff returns, in at least float32."""
        return wide(self.per_example()).sum(axis=0)

    def sq_norm_of_sum(self) -> Float[Array, ""]:
        """|sum_n g_n|^2, the gradient's."""
        return jnp.sum(self.sum() ** 2)

    def weighted_sum(self, weights: Float[Array, " n"]) -> Array:
        """sum_n weights_n g_n."""
        g = wide(self.per_example())
        return jnp.tensordot(weights.astype(g.dtype), g, axes=1)

    def sq_norms(self) -> Float[Array, " n"]:
        """|g_n|^2 for each example."""
        return sq_norms(self.per_example())

    def bounding_sq_norms(self) -> Float[Array, " n"]:
        """|g_n|^2 in a way that cannot cancel, for whoever relies on it as a bound."""
        return self.sq_norms()

    def inner_products(self) -> Float[Array, "n n"]:
        """<g_n, g_m> for each pair of examples."""
        g = wide(self.per_example())
        g = g.reshape(len(g), -1)
        return g @ g.T

    def second_moment(self) -> Array:
        """sum_n g_n^2, elementwise."""
        return self.of_squares(self.squares())

    def squares(self) -> Array:
        """What ``of_squares`` makes the second moment of; that of several cotangents adds up."""
        return jnp.sum(wide(self.per_example()) ** 2, axis=0)

    def of_squares(self, squares: Array) -> Array:
        """The second moment, summed like squares. It does not look at the form's own cotangent."""
        return squares

    def kronecker(self, over: str | None = None) -> Kronecker:
        """The two Gram matrices, sums over examples and positions: of the input and of ct."""
        raise TypeError(f"{type(self).__name__} has no Kronecker factors")


class Stacked(Factored):
    """g_n itself, of shape (N, ...): what any layer's backward gives, one example at a time."""

    g: Float[Array, "n ..."]

    def per_example(self) -> Float[Array, "n ..."]:
        return self.g


def is_factored(leaf: object) -> bool:
    return isinstance(leaf, Factored)


def wide(x: Array) -> Array:
    narrow = x.dtype.itemsize < 4 and jnp.issubdtype(x.dtype, jnp.floating)
    return x.astype(jnp.float32) if narrow else x


def sq_norms(x: Float[Array, "n ..."]) -> Float[Array, " n"]:
    return jnp.sum(wide(x) ** 2, axis=tuple(range(1, x.ndim)))
