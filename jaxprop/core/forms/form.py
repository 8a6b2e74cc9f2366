"""Forms: a parameter's cotangent kept as its factors until somebody asks for its sum.

The chain rule's last product for y = x w is dE/dw = sum_n x_n (outer) ct_n. Multiplied out, the
examples are gone. Kept as the pair (x, ct), it still answers for each example, for squared norms
and for curvature, at the price of what is asked and no more. Each form says how its parameter's
share of one example, g_n, is made of factors. Every other question has an answer through
``per_example``, and a faster one where the factors allow it.
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

    A convolution in G groups has a product for each, (G, I, I) and (G, O / G, O / G), and the
    params of a stack of layers one for each layer, on axes in front.

    Attributes:
        a: (I, I), of the layer's input; (I,) where it is diagonal, as of a table's rows.
        b: (O, O), of the cotangent of its output.
        place: how the matrix (I, O) lies in the param; by default its last axis is O.
    """

    a: Float[Array, "... i i"] | Float[Array, "... i"]
    b: Float[Array, "... o o"]
    place: Place = dataclasses.field(
        default=Place(), metadata={"static": True, "read": Place._make}
    )

    @property
    def size(self) -> int:
        """The number of entries that the block is of."""
        return math.prod(self.b.shape[:-1]) * self.a.shape[-1]

    def __iter__(self) -> Iterator[Array]:
        """Go through the two factors."""
        return iter((self.a, self.b))


@serializable
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class InBlockBefore:
    """Stands for the block of a bias that is the last row of the matrix before it."""


class Sides(NamedTuple):
    """Two thin matrices, which a param (I, O) or its cotangent g is seen through: left^T g right.

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
        rows: how many positions those are, of all examples together.
    """

    gram: Float[Array, "i i"] | Float[Array, " i"]
    rows: Float[Array, ""]


@dataclass_transform(frozen_default=True)
class Factored(abc.ABC):
    """The cotangent of one parameter, sum_n g_n, not yet summed over the examples n.

    A subclass names its factors as fields and writes ``per_example``; it becomes a frozen dataclass
    and a pytree by itself. Axis 0 of every factor is the example; in a ``Repeated`` form it is
    axis 1, behind the layer.

    A parameter may have several cotangents, one for each column of a root of the loss Hessian.
    ``squares`` and ``gram_of_ct`` are what can be added up over them.

    Attributes:
        is_pair: whether it has two Kronecker factors.
        unfactored: why it has none, if it has none.
        room: how many times as large as the factors g_n may be where ``compact`` forms it.
    """

    room: ClassVar[int] = 1
    is_pair: ClassVar[bool] = False
    unfactored: ClassVar[str] = "it is not kept as the input and the cotangent of a matrix"

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        jax.tree_util.register_dataclass(dataclasses.dataclass(frozen=True)(cls))

    def factors(self) -> Iterator[tuple[Array, int]]:
        """Yield the factors, each with the axis of its examples."""
        for factor in jax.tree.leaves(self):
            yield factor, 0

    @abc.abstractmethod
    def per_example(self) -> Float[Array, "n ..."]:
        """Return g_n for each example: the parameter's shape behind an example axis."""

    def sum(self) -> Array:
        """Return sum_n g_n, the gradient that autodiff returns, in at least float32."""
        return wide(self.per_example()).sum(axis=0)

    def norm_of_sum(self) -> Float[Array, ""]:
        """Return |sum_n g_n|, the norm of the gradient, also where its square would overflow."""
        return norms(self.sum()[None])[0]

    def scaled(self, weights: Float[Array, " n"]) -> Factored:
        """Return the form of weights_n g_n, with its factors in at least float32."""
        return Stacked(weighted(wide(self.per_example()), weights))

    def compact(self) -> Factored:
        """Return the form of g_n itself where there is room for it, else this one.

        What is asked for more than one thing, such as norms and a weighted sum, then forms g_n
        once.
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
        """Return |g_n| in a way that neither cancels nor overflows, as a bound must be."""
        return norms(self.per_example())

    def inner_products(self) -> Float[Array, "n n"]:
        """Return <g_n, g_m> for each pair of examples."""
        g = wide(self.per_example())
        g = g.reshape(g.shape[0], math.prod(g.shape[1:]))
        return g @ g.T

    def for_products(self, other: Factored) -> Factored:
        """Return what to ask for ``products_with(other.for_products(self))``: g_n, or this form.

        The entries of g_n may lie in another order, if they do so in both.
        """
        return Stacked(wide(self.per_example()))

    def products_with(self, other: Factored) -> Float[Array, "n m"]:
        """Return <g_n, h_m> with each h_m of another batch's form of the same param."""
        g, h = (wide(form.per_example()) for form in (self, other))
        size = math.prod(g.shape[1:])
        return jnp.einsum("ni,mi->nm", g.reshape(g.shape[0], size), h.reshape(h.shape[0], size))

    @property
    def place(self) -> Place:
        """The layout, in the param, of the matrices that its factors are of."""
        return Place()

    @property
    def sizes(self) -> tuple[int, int]:
        """I and O, of g_n as a matrix: by default the last axis is O, and all others are I."""
        shape = jax.eval_shape(lambda form: form.per_example(), self).shape[1:]
        return math.prod(shape[:-1]), shape[-1] if shape else 1

    @property
    def matrix_shape(self) -> tuple[int, ...]:
        """The shape of the matrices that its factors are of."""
        return self.sizes

    def matrices(self, g: Array) -> Array:
        """Return a g_n as the matrices that the factors are of."""
        return self.place.matrices(g, self.matrix_shape)

    def projected(self, sides: Sides) -> Float[Array, "n k l"]:
        """Return left^T g_n right for each example, with g_n a matrix of ``sizes``."""
        each, alone = self.one_by_one()
        sizes = self.sizes
        return map_examples(lambda one: _between(sides, alone(one).reshape(sizes)), each)

    def seen(self, sides: Sides) -> Factored:
        """Return the form of left^T g_n right, of the matrices that its factors are of."""
        return Through(self, sides)

    def second_moment(self) -> Array:
        """Return sum_n g_n^2, elementwise."""
        return self.of_squares(self.squares())

    def squares(self) -> Array:
        """Return what ``of_squares`` makes the second moment of.

        Those of several cotangents may be added up first.
        """
        return jnp.sum(wide(self.per_example()) ** 2, axis=0)

    def of_squares(self, squares: Array) -> Array:
        """Return the second moment from the sum of squares, without a look at the form's own ct.

        It is linear in squares, so that these, which may be fewer, are divided for a mean.
        """
        return squares

    def squares_of_each(self) -> Array:
        """Return what ``each_of_squares`` makes g_n^2 of, with the example on axis 0.

        Those of several cotangents may be added up first.
        """
        return wide(self.per_example()) ** 2

    def each_of_squares(self, squares: Array) -> Float[Array, "n ..."]:
        """Return g_n^2 for each example, without a look at the form's own ct."""
        return squares

    def one_by_one(self) -> tuple[list[Array], Callable[[list[Array]], Array]]:
        """Return arrays with the example on axis 0, and a function from an entry of each to g_n.

        So a loop has one g_n at a time in memory.
        """
        axes, structure = [axis for _, axis in self.factors()], jax.tree.structure(self)

        def alone(one: list[Array]) -> Array:
            each = zip(one, axes, strict=True)
            factors = [jnp.expand_dims(factor, axis) for factor, axis in each]
            return wide(jax.tree.unflatten(structure, factors).sum())

        return [jnp.moveaxis(factor, axis, 0) for factor, axis in self.factors()], alone

    def squares_around(self, mean: Array, weights: Float[Array, " n"]) -> Array:
        """Return sum_n weights_n (g_n - mean)^2, elementwise, without what squares would cancel."""
        each, alone = self.one_by_one()

        def of_one(one: tuple[list[Array], Array]) -> Array:
            apart = alone(one[0]) - mean
            return apart**2 * one[1].astype(apart.dtype)

        return sum_examples(of_one, (each, weights))

    def gram_of_x(
        self, real: Bool[Array, "n ..."] | None = None, weights: Float[Array, " n"] | None = None
    ) -> OfX:
        """Return the Gram matrix of the input, summed over examples and positions, and their count.

        Args:
            real: False where an example, or a position, is padding that does not count.
            weights: what each example counts; 1 by default.

        Raises:
            TypeError: for a form that has no two factors.
        """
        raise TypeError(f"{type(self).__name__} has no Kronecker factors: {self.unfactored}")

    def sum_of_x(
        self, real: Bool[Array, "n ..."] | None = None, weights: Float[Array, " n"] | None = None
    ) -> Float[Array, "... i"]:
        """Return the sum of the input over examples and positions, for a bias beside the matrix.

        Args:
            real: as in ``gram_of_x``.
            weights: as in ``gram_of_x``.

        Raises:
            TypeError: for a form that has no two factors.
        """
        raise TypeError(f"{type(self).__name__} has no Kronecker factors: {self.unfactored}")

    def in_one_position(self, real: Bool[Array, "n ..."] | None = None) -> Factored:
        """Return the form with the mean of the input and the sum of ct for its one position.

        Args:
            real: as in ``gram_of_x``.

        Raises:
            TypeError: for a form that has no two factors.
        """
        raise TypeError(f"{type(self).__name__} has no Kronecker factors: {self.unfactored}")

    def gram_of_ct(self) -> Float[Array, "o o"]:
        """Return the Gram matrix of ct, likewise, and with the same error."""
        raise TypeError(f"{type(self).__name__} has no Kronecker factors: {self.unfactored}")


@serializable
class Stacked(Factored):
    """The form of any parameter: g_n itself, for each example.

    Attributes:
        g: (N, ...), the parameter's shape behind an example axis.
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
    """The form of another's matrices, seen through two sides, one example after the other.

    Attributes:
        form: the other.
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
    """Return x seen through one side of ``Sides``."""
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
    """Return the norm of each example's part of x, also where its square would overflow."""
    axes = tuple(range(1, x.ndim))
    x = wide(x)
    if 0 in x.shape[1:]:
        return jnp.zeros_like(x, shape=x.shape[:1])
    unit = _unit(jnp.max(jnp.abs(x), axes))
    return root(jnp.sum((x / jnp.expand_dims(unit, axes)) ** 2, axis=axes)) * unit


def norm_of_all(norms: PyTree) -> Float[Array, ""]:
    """Return the norm of what has parts of these norms, the leaves of a tree."""
    leaves = jax.tree.leaves(norms)
    return norms_of_all([leaf[..., None] for leaf in leaves])[0] if leaves else jnp.zeros(())


def norms_of_all(norms_of_parts: PyTree) -> Float[Array, " n"]:
    """Return the norm of each example's whole, of which the leaves (..., N) are norms of parts."""
    leaves = jax.tree.leaves(norms_of_parts)
    rows = [leaf.reshape(math.prod(leaf.shape[:-1]), leaf.shape[-1]) for leaf in leaves]
    parts = [row[0] if row.shape[0] == 1 else norms(row.T) for row in rows]
    unit = _unit(functools.reduce(jnp.maximum, parts))
    return root(added(*((part / unit) ** 2 for part in parts))) * unit


def _unit(largest: Float[Array, " n"]) -> Float[Array, " n"]:
    """Return the unit in which to square numbers of which the largest is given; 1 where it is 0.

    Neither it nor its reciprocal, by which XLA may multiply, is flushed to 0. A norm does not
    depend on its unit, and neither do its derivatives.
    """
    tiny = jnp.asarray(jnp.finfo(largest.dtype).tiny, largest.dtype)
    unit = jnp.where(largest == 0, 1, jnp.clip(largest, tiny, 1 / tiny))
    return jax.lax.stop_gradient(unit)
