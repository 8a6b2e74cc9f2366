"""The base of quantities: a part taken at each layer, and a result made of all parts at the end."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from jaxprop.core.arrays import added
from jaxprop.core.batch import Examples
from jaxprop.core.forms import Factored, is_factored
from jaxprop.core.layer import Layer
from jaxprop.core.static import Static
from jaxprop.core.tree import like_params
from jaxprop.core.types import Params, PyTree
from jaxprop.quantity.source import LossGradient, Source


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PerExample:
    """Marks arrays that hold something of each example; what has no mark is a mean over examples.

    Attributes:
        value: an array, or a pytree of them.
        axis: the axis of the examples. It counts from the end where ``repeat`` may stack the arrays
            of its layers in front.
    """

    value: Any
    axis: int = dataclasses.field(metadata={"static": True})


class Whole(NamedTuple):
    """The facts of the whole batch that a quantity may use at the end.

    Attributes:
        params: the net's params, side inputs included.
        examples: what the examples count.
        key: the key that was given, or None.
    """

    params: Params
    examples: Examples
    key: Array | None


class Quantity(Static):
    """A statistic of the cotangents of params: a part from each layer, and a result for the net.

    A per-example quantity is that of each example's *own* loss, so that the mean of the per-example
    gradients is the gradient: there is no 1/N in them.

    Subclass it and write ``take``. What it returns is a mean over examples, or marked as
    ``PerExample``, so that what it returns for micro-batches makes up what it returns for the
    batch. What is not linear in the examples is left to ``settle`` and ``finish``, which see the
    batch.

    Attributes:
        like_params: whether the result has the structure of params. It is then completed by zeros
            where params are not learned.
        axes: how many axes such a result has in front of those of params.
        of_pairs: whether it is of pairs of examples, which micro-batches would keep apart.
        stacked: whether it has an axis in front for the columns of its source.
        layerwise: whether what it takes of a stack of layers is what it takes of each, stacked, as
            whatever is of each param is. A scan over layers in a function is then asked layer by
            layer, and keeps no forms; else its modules are asked as a whole.
    """

    like_params: ClassVar[bool] = False
    axes: ClassVar[int] = 0
    of_pairs: ClassVar[bool] = False
    stacked: ClassVar[bool] = False
    layerwise: ClassVar[bool] = False

    @property
    def source(self) -> Source:
        """The cotangent that the walk starts from. Quantities of one source share a walk.

        Where a source has several columns, what is taken of them is stacked (``stacked``), or added
        up (``jp.quantity.AddedUp``).
        """
        return LossGradient()

    @property
    def before(self) -> Quantity | None:
        """Another quantity of the same source, taken in a walk of its own first.

        ``take`` is then given its result as ``before=``. With micro-batches it is that of the
        micro-batch, so that it must be of each example by itself.
        """
        return None

    def chosen(self, layer: Layer, tree: PyTree) -> PyTree:
        """Return a tree like a layer's params with ``()`` for what it is not taken of.

        Args:
            layer: the layer.
            tree: its learned params, or forms in their places.
        """
        del layer
        return tree

    @abc.abstractmethod
    def take(self, params: Params, forms: PyTree, examples: Examples) -> PyTree:
        """Return what is taken at one layer.

        Args:
            params: the layer's learned params.
            forms: like params, with each example's own cotangent in a form.
            examples: how many there are (``examples.number``), and what each counts in a mean
                (``examples.shares()``, as ``form.weighted_sum`` takes it).
        """

    def gather(self, params: Params, taken: PyTree, examples: Examples) -> PyTree:
        """Return what is made of what was taken at all layers, for the same examples.

        Args:
            params: the net's learned params.
            taken: what ``take`` returned, in the structure of the net's params.
            examples: what the examples count.
        """
        del params, examples
        return taken

    def settle(self, taken: PyTree) -> PyTree:
        """Return what is kept of what was taken.

        It may be asked at each layer, or of all layers together, so that it goes entry by entry or
        ends in a ``Total``.
        """
        return taken

    def finish(self, settled: PyTree, examples: Examples) -> PyTree:
        """Return the result: settled is in the structure of the net's params."""
        del examples
        return unmarked(settled)

    def end(self, settled: PyTree, batch: Whole) -> PyTree:
        """Return ``finish`` of settled, completed where params are not learned."""
        result = self.finish(settled, batch.examples)
        if not self.like_params:
            return result
        shape = next((leaf.shape[: self.axes] for leaf in jax.tree.leaves(result)), ())
        return like_params(batch.params, result, shape=shape)


def of_examples(tree: PyTree) -> PyTree:
    """Return the tree with each array, with the example on axis 0, marked so."""
    return jax.tree.map(lambda leaf: PerExample(leaf, axis=0), tree)


def unmarked(tree: PyTree) -> PyTree:
    """Return the tree with the arrays themselves where they are marked."""
    return jax.tree.map(
        lambda node: node.value if is_marked(node) else node, tree, is_leaf=is_marked
    )


def examples_at(axis: int, tree: PyTree) -> PyTree:
    """Return the tree with the arrays that are marked, each with its examples on this axis.

    Behind it come the layers of a ``repeat``, as in params.
    """

    def moved(node: Any) -> Any:
        return jnp.moveaxis(node.value, node.axis, axis) if is_marked(node) else node

    return jax.tree.map(moved, tree, is_leaf=is_marked)


def is_marked(node: object) -> bool:
    """Return whether a node of a tree is marked as ``PerExample``."""
    return isinstance(node, PerExample)


def map_forms(f: Callable[[Factored], Any], forms: PyTree) -> PyTree:
    """Return the tree with ``f(form)`` for every form."""
    return jax.tree.map(f, forms, is_leaf=is_factored)


def total(f: Callable[[Factored], Array], forms: PyTree) -> Array | tuple[()]:
    """Return f summed over the forms of a tree; ``()`` where there are none."""
    leaves = [f(form) for form in jax.tree.leaves(forms, is_leaf=is_factored)]
    return sum(leaves[1:], start=leaves[0]) if leaves else ()


def everything(taken: PyTree) -> Array:
    """Return the sum of what was taken at all layers.

    Raises:
        ValueError: for a net without params.
    """
    leaves: list[Array] = jax.tree.leaves(taken)
    if not leaves:
        raise ValueError("the net has no params that are learned, and so no gradient to ask about")
    return added(*leaves)
