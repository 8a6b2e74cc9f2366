"""Forms: a parameter's cotangent kept as its factors until somebody asks for its sum.

The chain rule's last product for y = x w is dE/dw = sum_n x_n (outer) ct_n. Once it is multiplied
out, the examples are gone. The pair (x, ct) still yields each example's gradient, squared norms and
curvature, and only what is asked for is computed. Each form defines how one example's share of the
cotangent, g_n, is made of factors. Every other result has a default through ``per_example``, and a
faster way where the factors allow it.
"""

from __future__ import annotations

import abc
import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any, ClassVar, NamedTuple, dataclass_transform

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float

from jaxprop.core.arrays import added, known, root, selected, weighted, wide
from jaxprop.core.forms.moves import Place
from jaxprop.core.loops import map_examples, sum_examples
from jaxprop.core.serialization import serializable
from jaxprop.core.types import PyTree


@serializable
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Kronecker:
    """The Kronecker product a (outer) b, for a param of shape (I, O).

    A convolution in G groups has a product for each group, (G, I, I) and (G, O / G, O / G). The
    params of a stack of layers have one for each layer, on leading axes.

    Attributes:
        a: (I, I), the factor of the layer's input; (I,) if it is diagonal, as for a table's rows.
        b: (O, O), the factor of the cotangent of the layer's output.
        place: how the matrix (I, O) lies in the param; by default the param's last axis is O.
    """

    a: Float[Array, "... i i"] | Float[Array, "... i"]
    b: Float[Array, "... o o"]
    place: Place = dataclasses.field(
        default=Place(), metadata={"static": True, "read": Place._make}
    )

    @property
    def size(self) -> int:
        """The number of the param's entries in the block."""
        return math.prod(self.b.shape[:-1]) * self.a.shape[-1]

    def __iter__(self) -> Iterator[Array]:
        """Iterate over the two factors."""
        return iter((self.a, self.b))


@serializable
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class InBlockBefore:
    """A placeholder for the block of a bias that is the last row of the matrix before it."""


class Sides(NamedTuple):
    """Two thin matrices that project a param (I, O) or its cotangent g: left^T g right.

    Attributes:
        left: (I, K), or None for the identity.
        right: (O, L), or None for the identity.
    """

    left: Float[Array, "i k"] | None
    right: Float[Array, "o l"] | None


class OfX(NamedTuple):
    """The second moment of a form's input, for the factor a = gram / rows.

    Attributes:
        gram: the Gram matrix, summed over examples and positions, or its diagonal.
        rows: the number of these positions, over all examples.
    """

    gram: Float[Array, "i i"] | Float[Array, " i"]
    rows: Float[Array, ""]


@dataclass_transform(frozen_default=True)
class Factored(abc.ABC):
    """The cotangent of one parameter, sum_n g_n, not yet summed over the examples n.

    A subclass declares its factors as fields and writes ``per_example``; it becomes a frozen
    dataclass and a pytree without a decorator. Axis 0 of every factor is the example; in a
    ``Repeated`` form the example is axis 1, after the layer.

    A parameter may have several cotangents, one for each column of a root of the loss Hessian.
    ``squares`` and ``gram_of_ct`` can be added up over these cotangents.

    Attributes:
        is_pair: whether the form has two Kronecker factors.
        unfactored: the reason why a form without Kronecker factors has none.
        room: the largest size of g_n, as a multiple of the factors' size, at which ``compact``
            computes it.
    """

    room: ClassVar[int] = 1
    is_pair: ClassVar[bool] = False
    unfactored: ClassVar[str] = "it is not kept as the input and the cotangent of a matrix"

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        jax.tree_util.register_dataclass(dataclasses.dataclass(frozen=True)(cls))

    def factors(self) -> Iterator[tuple[Array, int]]:
        """Yield the factors, each with its example axis."""
        for factor in jax.tree.leaves(self):
            yield factor, 0

    @abc.abstractmethod
    def per_example(self) -> Float[Array, "n ..."]:
        """Return g_n for each example: the parameter's shape after an example axis."""

    def sum(self) -> Array:
        """Return sum_n g_n, the gradient that autodiff returns, in at least float32."""
        return wide(self.per_example()).sum(axis=0)

    def norm_of_sum(self) -> Float[Array, ""]:
        """Return |sum_n g_n|, the norm of the gradient, even where its square would overflow."""
        return norms(self.sum()[None])[0]

    def scaled(self, weights: Float[Array, " n"]) -> Factored:
        """Return the form of weights_n g_n, with its factors in at least float32."""
        return Stacked(weighted(wide(self.per_example()), weights))

    def compact(self) -> Factored:
        """Return g_n itself as a form if there is room for it, else this form.

        Several results, such as norms and a weighted sum, then share one computation of g_n.
        """
        form = jax.tree.map(lambda a: wide(a) if jnp.issubdtype(a.dtype, jnp.inexact) else a, self)
        g = jax.eval_shape(lambda form: form.per_example(), form)
        factors = [(factor.size, factor.dtype.itemsize) for factor in jax.tree.leaves(self)]
        size = sum(size * itemsize for size, itemsize in factors)
        if known(lambda: g.size * g.dtype.itemsize <= self.room * size):
            return Stacked(form.per_example())
        return self

    def only(self, kept: Bool[Array, " n"]) -> Factored:
        """Return the form with zeros in the factors of the examples that are not kept."""
        return selected(kept, self)

    def weighted_sum(self, weights: Float[Array, " n"]) -> Array:
        """Return sum_n weights_n g_n."""
        return self.scaled(weights).sum()

    def sq_norms(self) -> Float[Array, " n"]:
        """Return |g_n|^2 for each example."""
        return sq_norms(self.per_example())

    def weighed_sq_norms(self, entries: Array) -> Float[Array, " n"]:
        """Return the sum of entries * g_n^2 for each example, with a weight for each entry."""
        each, alone = self.one_by_one()

        def of_one(one: list[Array]) -> Array:
            squares = alone(one) ** 2
            weights = entries.astype(squares.dtype)
            return jnp.sum(weights.reshape(squares.shape if weights.ndim else ()) * squares)

        return map_examples(of_one, each)

    def norms(self) -> Float[Array, " n"]:
        """Return |g_n| without cancellation or overflow, so that a bound on it can be trusted."""
        return norms(self.per_example())

    def inner_products(self) -> Float[Array, "n n"]:
        """Return <g_n, g_m> for each pair of examples."""
        g = wide(self.per_example())
        g = g.reshape(g.shape[0], math.prod(g.shape[1:]))
        return g @ g.T

    def for_products(self, other: Factored) -> Factored:
        """Return the form, g_n or this one, to call ``products_with(other.for_products(self))`` on.

        The entries of g_n may lie in another order, if that order is the same in both.
        """
        return Stacked(wide(self.per_example()))

    def products_with(self, other: Factored) -> Float[Array, "n m"]:
        """Return <g_n, h_m> for each h_m of another batch's form of the same param."""
        g, h = (wide(form.per_example()) for form in (self, other))
        size = math.prod(g.shape[1:])
        return jnp.einsum("ni,mi->nm", g.reshape(g.shape[0], size), h.reshape(h.shape[0], size))

    @property
    def place(self) -> Place:
        """The layout, in the param, of the matrices that the factors multiply out to."""
        return Place()

    @property
    def sizes(self) -> tuple[int, int]:
        """I and O of g_n as a matrix: by default O is the last axis, and I is all the others."""
        shape = jax.eval_shape(lambda form: form.per_example(), self).shape[1:]
        return math.prod(shape[:-1]), shape[-1] if shape else 1

    @property
    def matrix_shape(self) -> tuple[int, ...]:
        """The shape of the matrices that the factors multiply out to."""
        return self.sizes

    def matrices(self, g: Array) -> Array:
        """Return a g_n as the matrices that the factors multiply out to."""
        return self.place.matrices(g, self.matrix_shape)

    def projected(self, sides: Sides) -> Float[Array, "n k l"]:
        """Return left^T g_n right for each example, with g_n a matrix of ``sizes``."""
        each, alone = self.one_by_one()
        sizes = self.sizes
        return map_examples(lambda one: _between(sides, alone(one).reshape(sizes)), each)

    def seen(self, sides: Sides) -> Factored:
        """Return the form of left^T g_n right, with g_n laid out as by ``matrices``."""
        return Through(self, sides)

    def second_moment(self) -> Array:
        """Return sum_n g_n^2, elementwise."""
        return self.of_squares(self.squares())

    def squares(self) -> Array:
        """Return the squares from which ``of_squares`` computes the second moment.

        The squares of several cotangents may be added up first.
        """
        return jnp.sum(wide(self.per_example()) ** 2, axis=0)

    def of_squares(self, squares: Array) -> Array:
        """Return the second moment from the sum of squares, without using the form's own ct.

        It is linear in squares, so that a mean can divide the squares, which may be fewer, instead.
        """
        return squares

    def squares_of_each(self) -> Array:
        """Return the squares from which ``each_of_squares`` computes g_n^2, the example on axis 0.

        The squares of several cotangents may be added up first.
        """
        return wide(self.per_example()) ** 2

    def each_of_squares(self, squares: Array) -> Float[Array, "n ..."]:
        """Return g_n^2 for each example, without using the form's own ct."""
        return squares

    def one_by_one(self) -> tuple[list[Array], Callable[[list[Array]], Array]]:
        """Return arrays with the example on axis 0, and a function from one entry of each to g_n.

        A loop over these has one g_n at a time in memory.
        """
        axes, structure = [axis for _, axis in self.factors()], jax.tree.structure(self)

        def alone(one: list[Array]) -> Array:
            each = zip(one, axes, strict=True)
            factors = [jnp.expand_dims(factor, axis) for factor, axis in each]
            return wide(jax.tree.unflatten(structure, factors).sum())

        return [jnp.moveaxis(factor, axis, 0) for factor, axis in self.factors()], alone

    def squares_around(self, mean: Array, weights: Float[Array, " n"]) -> Array:
        """Return sum_n weights_n (g_n - mean)^2, elementwise, not as a difference that cancels."""
        each, alone = self.one_by_one()

        def of_one(one: tuple[list[Array], Array]) -> Array:
            apart = alone(one[0]) - mean
            return apart**2 * one[1].astype(apart.dtype)

        return sum_examples(of_one, (each, weights))

    def counted(self, real: Bool[Array, "n ..."] | None) -> Bool[Array, "n ..."] | None:
        """Return which of the form's examples, or positions, count in its factors; None for all.

        Args:
            real: False where an example, or a position, is padding; None if there is no padding.
        """
        return None if real is None else jnp.any(real, axis=tuple(range(1, real.ndim)))

    def gram_of_x(
        self, real: Bool[Array, "n ..."] | None = None, weights: Float[Array, " n"] | None = None
    ) -> OfX:
        """Return the Gram matrix of the input, summed over examples and positions, and their count.

        Args:
            real: the result of ``counted``: False where an example, or a position, does not count.
            weights: the weight of each example; 1 by default.

        Raises:
            TypeError: for a form without two Kronecker factors.
        """
        raise TypeError(f"{type(self).__name__} has no Kronecker factors: {self.unfactored}")

    def sum_of_x(
        self, real: Bool[Array, "n ..."] | None = None, weights: Float[Array, " n"] | None = None
    ) -> Float[Array, "... i"]:
        """Return the sum of the input over examples and positions, for a bias next to the matrix.

        Args:
            real: as in ``gram_of_x``.
            weights: as in ``gram_of_x``.

        Raises:
            TypeError: for a form without two Kronecker factors.
        """
        raise TypeError(f"{type(self).__name__} has no Kronecker factors: {self.unfactored}")

    def in_one_position(self, real: Bool[Array, "n ..."] | None = None) -> Factored:
        """Return the form with a single position: the mean of the input and the sum of ct.

        Args:
            real: as in ``gram_of_x``.

        Raises:
            TypeError: for a form without two Kronecker factors.
        """
        raise TypeError(f"{type(self).__name__} has no Kronecker factors: {self.unfactored}")

    def gram_of_ct(self) -> Float[Array, "o o"]:
        """Return the Gram matrix of ct, summed like ``gram_of_x`` and with the same error."""
        raise TypeError(f"{type(self).__name__} has no Kronecker factors: {self.unfactored}")


@serializable
class Stacked(Factored):
    """The form of any parameter: g_n itself, for each example.

    Attributes:
        g: (N, ...), the parameter's shape after an example axis.
    """

    g: Float[Array, "n ..."]

    def per_example(self) -> Float[Array, "n ..."]:
        return self.g

    def weighted_sum(self, weights: Float[Array, " n"]) -> Array:
        g = wide(self.g)
        return jnp.tensordot(weights.astype(g.dtype), g, axes=1)

    def projected(self, sides: Sides) -> Float[Array, "n k l"]:
        return _between(sides, wide(self.g).reshape(self.g.shape[0], *self.sizes))


class Through(Factored):
    """The form of another form's matrices, projected by two sides, one example at a time.

    Attributes:
        form: the other form.
        sides: (..., I, K) and (..., O, L).
    """

    form: Factored
    sides: Sides

    def factors(self) -> Iterator[tuple[Array, int]]:
        return self.form.factors()

    def per_example(self) -> Float[Array, "n ... k l"]:
        each, alone = self.one_by_one()
        return map_examples(alone, each)

    def squares(self) -> Float[Array, "... k l"]:
        each, alone = self.one_by_one()
        return sum_examples(lambda one: alone(one) ** 2, each)

    def one_by_one(self) -> tuple[list[Array], Callable[[list[Array]], Array]]:
        each, alone = self.form.one_by_one()
        return each, lambda one: _between(self.sides, self.form.matrices(alone(one)))


def through(x: Float[Array, "... i"], side: Float[Array, "i k"] | None) -> Float[Array, "... k"]:
    """Return x projected by one side of ``Sides``."""
    return x if side is None else x @ side.astype(x.dtype)


def _between(sides: Sides, g: Float[Array, "... i o"]) -> Float[Array, "... k l"]:
    half = through(g, sides.right)
    return half if sides.left is None else sides.left.astype(g.dtype).swapaxes(-1, -2) @ half


def is_factored(leaf: object) -> bool:
    """Return whether a node of a tree is a form."""
    return isinstance(leaf, Factored)


def sq_norms(x: Float[Array, "n ..."]) -> Float[Array, " n"]:
    """Return the squared norm of each example's part of x."""
    return jnp.sum(wide(x) ** 2, axis=tuple(range(1, x.ndim)))


def norms(x: Float[Array, "n ..."]) -> Float[Array, " n"]:
    """Return the norm of each example's part of x, even where its square would overflow."""
    axes = tuple(range(1, x.ndim))
    x = wide(x)
    if 0 in x.shape[1:]:
        return jnp.zeros_like(x, shape=x.shape[:1])
    unit = _unit(jnp.max(jnp.abs(x), axes))
    return root(jnp.sum((x / jnp.expand_dims(unit, axes)) ** 2, axis=axes)) * unit


def norm_of_all(norms: PyTree) -> Float[Array, ""]:
    """Return the norm of a whole from the norms of its parts, the leaves of a tree."""
    leaves = jax.tree.leaves(norms)
    return norms_of_all([leaf[..., None] for leaf in leaves])[0] if leaves else jnp.zeros(())


def norms_of_all(norms_of_parts: PyTree) -> Float[Array, " n"]:
    """Return the norm of each example's whole from the norms of its parts, the leaves (..., N)."""
    leaves = jax.tree.leaves(norms_of_parts)
    rows = [leaf.reshape(math.prod(leaf.shape[:-1]), leaf.shape[-1]) for leaf in leaves]
    parts = [row[0] if row.shape[0] == 1 else norms(row.T) for row in rows]
    unit = _unit(functools.reduce(jnp.maximum, parts))
    return root(added(*((part / unit) ** 2 for part in parts))) * unit


def _unit(largest: Float[Array, " n"]) -> Float[Array, " n"]:
    """Return the unit in which to square numbers, given the largest of them; 1 where that is 0.

    Neither the unit nor its reciprocal, by which XLA may multiply, is flushed to 0. A norm does not
    depend on its unit, and neither do its derivatives.
    """
    tiny = jnp.asarray(jnp.finfo(largest.dtype).tiny, largest.dtype)
    unit = jnp.where(largest == 0, 1, jnp.clip(largest, tiny, 1 / tiny))
    return jax.lax.stop_gradient(unit)
