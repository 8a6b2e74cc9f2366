"""The base class of quantities: a part from each layer, and a result made from all the parts."""

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
    """A mark for arrays with an entry for each example; an unmarked array is a mean over examples.

    Attributes:
        value: an array, or a pytree of arrays.
        axis: the example axis, counted from the end where ``repeat`` may stack the arrays of its
            layers on leading axes.
    """

    value: Any
    axis: int = dataclasses.field(metadata={"static": True})


class Whole(NamedTuple):
    """Facts about the whole batch that a quantity may use at the end.

    Attributes:
        params: the net's params, side inputs included.
        examples: the number of examples, and their weights in a mean.
        key: the key that was given, or None.
    """

    params: Params
    examples: Examples
    key: Array | None


class Quantity(Static):
    """A statistic of the cotangents of params: a part from each layer, and a result for the net.

    A per-example quantity refers to each example's *own* loss, without the 1/N of the mean, so that
    the mean of the per-example gradients is the gradient.

    Subclass it and write ``take``. It returns means over examples, or arrays marked as
    ``PerExample``, so that the results for micro-batches can be combined into the result for the
    batch. Anything that is not linear in the examples belongs in ``settle`` and ``finish``, which
    see the whole batch.

    Attributes:
        like_params: whether the result has the structure of params. Zeros then fill in for params
            that are not learned.
        axes: how many leading axes such a result has before those of params.
        of_pairs: whether it compares pairs of examples, which micro-batches would separate.
        stacked: whether it has a leading axis for the columns of its source.
        layerwise: whether its part for a stack of layers is the stack of its parts for each layer,
            as for anything computed param by param. A scan over layers in a function is then
            visited layer by layer and keeps no forms; otherwise its modules are visited as a whole.
    """

    like_params: ClassVar[bool] = False
    axes: ClassVar[int] = 0
    of_pairs: ClassVar[bool] = False
    stacked: ClassVar[bool] = False
    layerwise: ClassVar[bool] = False

    @property
    def source(self) -> Source:
        """The cotangent that the walk starts from. Quantities with the same source share a walk.

        If a source has several columns, the parts for them are stacked (``stacked``) or added up
        (``jp.quantity.AddedUp``).
        """
        return LossGradient()

    @property
    def before(self) -> Quantity | None:
        """Another quantity with the same source, computed first in a separate walk.

        ``take`` then receives its result as ``before=``. With micro-batches this is the result for
        the micro-batch, so it must be per example.
        """
        return None

    def chosen(self, layer: Layer, tree: PyTree) -> PyTree:
        """Return the tree with ``()`` in place of the params that this quantity leaves out.

        Args:
            layer: the layer.
            tree: its learned params, or forms in their places.
        """
        del layer
        return tree

    @abc.abstractmethod
    def take(self, params: Params, forms: PyTree, examples: Examples) -> PyTree:
        """Return the quantity's part from one layer.

        Args:
            params: the layer's learned params.
            forms: like params, with a form at each leaf that keeps each example's own cotangent.
            examples: how many there are (``examples.number``), and their weights in a mean
                (``examples.shares()``, which ``form.weighted_sum`` takes).
        """

    def gather(self, params: Params, taken: PyTree, examples: Examples) -> PyTree:
        """Return the combined parts of all layers; by default the parts themselves.

        Args:
            params: the net's learned params.
            taken: the results of ``take``, in the structure of the net's params.
            examples: the same examples as for ``take``.
        """
        del params, examples
        return taken

    def settle(self, taken: PyTree) -> PyTree:
        """Return what to keep of the parts that were taken.

        It may be called at each layer, or once for all layers, so it must work entry by entry or
        return a ``Total``.
        """
        return taken

    def finish(self, settled: PyTree, examples: Examples) -> PyTree:
        """Return the result, from the settled parts in the structure of the net's params."""
        del examples
        return unmarked(settled)

    def end(self, settled: PyTree, batch: Whole) -> PyTree:
        """Return the result of ``finish``, with zeros for unlearned params if it is like params."""
        result = self.finish(settled, batch.examples)
        if not self.like_params:
            return result
        shape = next((leaf.shape[: self.axes] for leaf in jax.tree.leaves(result)), ())
        return like_params(batch.params, result, shape=shape)


def of_examples(tree: PyTree) -> PyTree:
    """Return the tree with each array marked as ``PerExample``, with the example on axis 0."""
    return jax.tree.map(lambda leaf: PerExample(leaf, axis=0), tree)


def unmarked(tree: PyTree) -> PyTree:
    """Return the tree with each ``PerExample`` mark replaced by its value."""
    return jax.tree.map(
        lambda node: node.value if is_marked(node) else node, tree, is_leaf=is_marked
    )


def examples_at(axis: int, tree: PyTree) -> PyTree:
    """Return the tree without marks, with the example axis of each marked array moved to ``axis``.

    The layer axes of a ``repeat`` come after it, as in params.
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
    """Return the sum of the parts of all layers.

    Raises:
        ValueError: for a net without params.
    """
    leaves: list[Array] = jax.tree.leaves(taken)
    if not leaves:
        raise ValueError("the net has no params that are learned, and so no gradient to ask about")
    return added(*leaves)
