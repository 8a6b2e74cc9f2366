"""Per-example gradients projected by thin matrices, without materializing the gradients."""

from __future__ import annotations

import itertools
import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax import Array

from jaxprop.core.batch import Examples
from jaxprop.core.checks import check_count, check_key, given
from jaxprop.core.describe import shapes
from jaxprop.core.forms import Factored, Kronecker, Repeated, Sides, is_factored
from jaxprop.core.tree import learned
from jaxprop.core.types import Params, PyTree
from jaxprop.quantity.base import PerExample, Quantity, is_marked


class Projected(Quantity):
    """Each example's gradient projected by two thin matrices, left^T g_n right; like params.

    With g_n = sum_t x_t (outer) ct_t it is sum_t (left^T x_t) (outer) (right^T ct_t), which costs
    two thin products (LoGra, Choe et al. 2024, https://arxiv.org/abs/2405.13954). A leaf is
    (N, K L), the projected matrix flattened row by row, or (N, layers, K L) inside ``repeat``. K
    and L are the rank; a side of g_n that is no larger than the rank keeps its size and is not
    projected. A param with more than two axes counts as a matrix whose columns are its last axis.
    In a ``jp.function``, a param counts as the matrix that multiplies the data.

    The entries of random matrices are normal, of variance 1 / rank, so that the mean over keys of
    the rows' inner products is that of the gradients. The same key draws the same matrices.

    Attributes:
        rank: how many columns a side has at most.
        key: the key to draw random matrices from, of ``jax.random.key``; the same for all batches
            that are compared.
        sides: matrices to use instead of random ones, such as from ``jp.quantity.principal``: like
            params, with a ``Sides`` at each leaf.
    """

    rank: int | None = None
    key: Any = None
    sides: Any = None

    axes: ClassVar[int] = 1

    def __post_init__(self) -> None:
        if self.sides is not None:
            if self.rank is not None or self.key is not None:
                raise ValueError("Projected: sides are given, or drawn by a rank and a key")
            return
        if self.rank is None and self.key is None:
            raise TypeError("Projected: give a rank and a key, or sides")
        check_count("Projected: rank", self.rank)
        check_key("Projected", self.key)

    def take(self, params: Params, forms: PyTree, examples: Examples) -> PyTree:
        return forms

    def gather(self, params: Params, taken: PyTree, examples: Examples) -> PyTree:
        forms, structure = jax.tree.flatten(taken, is_leaf=is_factored)
        each = self._drawn(forms) if self.sides is None else _at(structure, self.sides, forms)
        pairs = zip(forms, each, strict=True)
        return structure.unflatten(PerExample(_rows(f, sides), axis=0) for f, sides in pairs)

    def finish(self, settled: PyTree, examples: Examples) -> PyTree:
        return jax.tree.map(lambda node: node.value, settled, is_leaf=is_marked)

    def _drawn(self, forms: list[Factored]) -> list[Sides]:
        """Return random sides, cut from one draw, which compiles faster than a draw for each."""
        rank = self.rank
        assert rank is not None
        wanted = [
            (*_stacks(form), size, rank) if size > rank else None
            for form in forms
            for size in form.sizes
        ]
        sizes = [0 if shape is None else math.prod(shape) for shape in wanted]
        numbers = jax.random.normal(self.key, (sum(sizes),)) / math.sqrt(rank)
        ends = list(itertools.accumulate(sizes))
        each = [
            None if shape is None else numbers[end - size : end].reshape(shape)
            for shape, size, end in zip(wanted, sizes, ends, strict=True)
        ]
        return list(itertools.starmap(Sides, zip(each[::2], each[1::2], strict=True)))


def principal(factors: PyTree, rank: int) -> PyTree:
    """Return ``Sides`` made of the Kronecker factors' eigenvectors with the largest eigenvalues.

    They keep the directions in which the gradients of the data vary (LoGra's initialization).

    Args:
        factors: the result of ``jp.kronecker_factors``.
        rank: how many columns a side has at most.
    """
    check_count("principal: rank", rank)

    def side(matrix: Array) -> Array | None:
        if matrix.shape[-1] <= rank:
            return None
        return jnp.linalg.eigh(matrix)[1][..., -rank:]

    def axes_of(diagonal: Array) -> Array | None:
        size = diagonal.shape[-1]
        if size <= rank:
            return None
        _, largest = jax.lax.top_k(diagonal, rank)
        return jax.nn.one_hot(largest, size, dtype=diagonal.dtype).swapaxes(-1, -2)

    def of(node: Any) -> Sides:
        if not isinstance(node, Kronecker):
            raise TypeError(
                f"principal takes a Kronecker for each param, not {given(node)}; put the sides of "
                "others there by hand"
            )
        if node.a.ndim == node.b.ndim:
            return Sides(side(node.a), side(node.b))
        return Sides(axes_of(node.a), side(node.b))

    return jax.tree.map(of, factors, is_leaf=lambda node: isinstance(node, Kronecker))


def _stacks(form: Factored) -> tuple[int, ...]:
    """Return the sizes of a form's layer axes."""
    stacks: tuple[int, ...] = ()
    while isinstance(form, Repeated):
        stacks = (*stacks, jax.tree.leaves(form)[0].shape[len(stacks)])
        form = form.form
    return stacks


def _rows(form: Factored, sides: Sides) -> Array:
    seen = form.projected(sides)
    return seen.reshape(*seen.shape[:-2], seen.shape[-2] * seen.shape[-1])


def _at(structure: Any, sides: PyTree, forms: list[Factored]) -> list[Sides]:
    """Return the given sides for each form; raise if their structure or sizes do not fit."""
    each, found = jax.tree.flatten(learned(sides), is_leaf=lambda node: isinstance(node, Sides))
    if found != structure or not all(isinstance(node, Sides) for node in each):
        raise ValueError(f"Projected: sides are like params, with Sides at each leaf, not {found}")
    for form, one in zip(forms, each, strict=True):
        for size, side in zip(form.sizes, one, strict=True):
            if side is not None and side.shape[-2] != size:
                raise ValueError(f"Projected: {shapes(one)} are sides of a param of {form.sizes}")
    return each
