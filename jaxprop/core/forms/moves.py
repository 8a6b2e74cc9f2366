"""Moves: how a param's entries were rearranged before they met data, and the way back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax import Array

Sizes = tuple[int, ...]


class Reshaped(NamedTuple):
    """A reshape of an array of shape ``before``."""

    before: Sizes

    def back(self, g: Array) -> Array:
        return g.reshape(self.before)


class Transposed(NamedTuple):
    """A transpose by a permutation."""

    axes: Sizes

    def back(self, g: Array) -> Array:
        return jnp.transpose(g, sorted(range(len(self.axes)), key=self.axes.__getitem__))


class Sliced(NamedTuple):
    """A slice of an array of shape ``before``; entries that it leaves out have a cotangent of 0."""

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
    """A reversal of an array along some axes."""

    axes: Sizes

    def back(self, g: Array) -> Array:
        return jnp.flip(g, self.axes)


class Scanned(NamedTuple):
    """A layer of a stack that a scan iterates over: the moves that follow act on each layer."""


Move: TypeAlias = Reshaped | Transposed | Sliced | Turned | Scanned
Moves = tuple[Move, ...]
KINDS = {kind.__name__: kind for kind in (Reshaped, Transposed, Sliced, Turned, Scanned)}


def in_place(moves: Moves) -> bool:
    """Return whether the moves leave all entries where they are."""
    return all(isinstance(move, Scanned) for move in moves)


def moved_back(moves: Moves, g: Array) -> Array:
    """Return an array like the moved view with its entries where they are in the param."""
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


def named(moves: Moves) -> tuple[tuple[Any, ...], ...]:
    """Return the moves as plain facts, each as its name followed by its fields."""
    return tuple((type(move).__name__, *move) for move in moves)


class Place(NamedTuple):
    """The layout, in a param, of the matrices that its Kronecker factors belong to.

    Attributes:
        steps: the moves from the param to the matrices, in order, as plain facts.
    """

    steps: tuple[tuple[Any, ...], ...] = ()

    @classmethod
    def of(cls, moves: Moves) -> Place:
        """Return the place for these moves."""
        return cls(named(moves))

    @property
    def moves(self) -> Moves:
        """The steps as moves."""
        return tuple(KINDS[name](*facts) for name, *facts in self.steps)

    @property
    def is_whole(self) -> bool:
        """Whether the matrices hold all entries of the param."""
        return not any(isinstance(move, Sliced) for move in self.moves)

    def within(self, moves: Moves, shape: Sizes) -> Place:
        """Return the place in a param that has this place's own param as a view.

        Args:
            moves: the moves that made the view; for a stack they begin with the scans over it.
            shape: the shape of the view, for one layer.
        """
        scans = sum(isinstance(move, Scanned) for move in moves)
        return Place.of((*moves, Reshaped(shape), *self.moves[scans:]))

    def matrices(self, g: Array, shape: Sizes) -> Array:
        """Return an array like the param as matrices (..., I, O) of this shape."""
        if not self.steps:
            return g.reshape(shape)
        struct = jax.ShapeDtypeStruct(shape, g.dtype)
        return jax.linear_transpose(lambda m: self.param(m, g.shape), struct)(g)[0]

    def param(self, matrices: Array, shape: Sizes) -> Array:
        """Return the matrices as an array like the param, of this shape."""
        return moved_back(self.moves, matrices).reshape(shape)
