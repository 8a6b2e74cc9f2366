"""The example axes of the arrays that a layer saves: axis 0, or after axes of layers."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jaxprop.core.describe import shapes
from jaxprop.core.types import PyTree, Residuals


class OfLayers(abc.ABC):
    """A node that holds the residuals of a stack of layers, with the layer on the leading axis."""

    @abc.abstractmethod
    def axes_of_examples(self) -> PyTree:
        """Return a node like this one, with each array replaced by its example axis."""


def residual_axes(residuals: Residuals) -> PyTree:
    """Return a tree like residuals, with each array replaced by its example axis."""

    def is_stack(node: object) -> bool:
        return isinstance(node, OfLayers)

    def axes(node: object) -> PyTree:
        return node.axes_of_examples() if isinstance(node, OfLayers) else 0

    return jax.tree.map(axes, residuals, is_leaf=is_stack)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Distinct(OfLayers):
    """The residuals of one layer of a stack, or of the whole stack, with each array kept once.

    Two parts of a layer often save the same array, or one that the way back has anyway, such as a
    param. If a layer saves both its x and its y, only y is kept: x is the y of the layer before.

    Attributes:
        leaves: the arrays that are kept.
        places: for each leaf of the residuals, its index in ``leaves``, or a negative index into
            the known arrays, the last of which is x.
        structure: the tree structure of the residuals.
        y: the index of y in ``leaves`` if x is not kept, else None.
        axes: for each of ``leaves``, the example axis in the residuals of one layer.
    """

    leaves: tuple[Array, ...]
    places: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    structure: Any = dataclasses.field(metadata={"static": True})
    y: int | None = dataclasses.field(metadata={"static": True})
    axes: tuple[int, ...] = dataclasses.field(metadata={"static": True})

    @classmethod
    def of(cls, residuals: Residuals, known: Sequence[Array], x: PyTree, y: PyTree) -> Distinct:
        """Return the arrays to keep of the residuals that a layer saved on the way from x to y.

        Args:
            residuals: the layer's residuals.
            known: arrays that will be passed to ``tree`` again.
            x: the layer's input.
            y: the layer's output.
        """
        leaves, structure = jax.tree.flatten(residuals)
        given = {id(leaf): ~index for index, leaf in enumerate(reversed([*known, x]))}
        distinct = {id(leaf): leaf for leaf in leaves}
        twice = x is not y and id(x) in distinct and id(y) in distinct.keys() - given.keys()
        if not twice:
            given.pop(id(x))
        distinct = {key: leaf for key, leaf in distinct.items() if key not in given}
        place = given | {key: index for index, key in enumerate(distinct)}
        places = tuple(place[id(leaf)] for leaf in leaves)
        where = dict(zip(map(id, leaves), jax.tree.leaves(residual_axes(residuals)), strict=True))
        axes = tuple(where[key] for key in distinct)
        of_y = place[id(y)] if twice else None
        return cls(tuple(distinct.values()), places, structure, of_y, axes)

    def axes_of_examples(self) -> Distinct:
        return dataclasses.replace(self, leaves=tuple(axis + 1 for axis in self.axes))

    def before(self, index: Array, first: PyTree) -> PyTree:
        """Return the x of one layer of a stack, the y of the layer before; ``()`` if not needed.

        Args:
            index: the layer's index.
            first: the x of the first layer.
        """
        if self.y is None:
            return ()
        ys = self.leaves[self.y]
        y = jax.lax.dynamic_index_in_dim(ys, jnp.maximum(index - 1, 0), keepdims=False)
        return jnp.where(index == 0, first, y)

    def tree(self, known: Sequence[Array], x: PyTree) -> Residuals:
        """Return the residuals of a layer, from the arrays that were known and its input."""
        leaves = *self.leaves, *known, x
        return jax.tree.unflatten(self.structure, [leaves[place] for place in self.places])


def check_residuals(layer: object, residuals: Residuals, examples: int) -> None:
    """Raise ``ValueError`` unless each array has this number of examples on its example axis."""
    axes = jax.tree.leaves(residual_axes(residuals))
    for (path, leaf), axis in zip(jax.tree.leaves_with_path(residuals), axes, strict=True):
        if jnp.shape(leaf)[axis : axis + 1] != (examples,):
            raise ValueError(
                f"{layer}: residuals{jax.tree_util.keystr(path)} is {shapes(leaf)}, where axis "
                f"{axis} is the example, and there are {examples}; those of a scan over layers "
                "have the example first too, or come from jp.repeat"
            )
