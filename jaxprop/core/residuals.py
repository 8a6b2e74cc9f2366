"""Where the arrays that a layer saves have their examples: on axis 0, or behind axes of layers."""

from __future__ import annotations

import abc

import jax
import jax.numpy as jnp

from jaxprop.core.describe import shapes
from jaxprop.core.types import PyTree, Residuals


class OfLayers(abc.ABC):
    """A node of residuals that holds those of a stack of layers, with the layers in front."""

    @abc.abstractmethod
    def axes_of_examples(self) -> PyTree:
        """Return a node like this one, with the axis of the examples for each array."""


def residual_axes(residuals: Residuals) -> PyTree:
    """Return the axis of the examples for each array of residuals, a tree like them."""

    def is_stack(node: object) -> bool:
        return isinstance(node, OfLayers)

    def axes(node: object) -> PyTree:
        return node.axes_of_examples() if isinstance(node, OfLayers) else 0

    return jax.tree.map(axes, residuals, is_leaf=is_stack)


def check_residuals(layer: object, residuals: Residuals, examples: int) -> None:
    """Raise ``ValueError`` unless each array of residuals has so many examples where it should."""
    axes = jax.tree.leaves(residual_axes(residuals))
    for (path, leaf), axis in zip(jax.tree.leaves_with_path(residuals), axes, strict=True):
        if jnp.shape(leaf)[axis : axis + 1] != (examples,):
            raise ValueError(
                f"{layer}: residuals{jax.tree_util.keystr(path)} is {shapes(leaf)}, where axis "
                f"{axis} is the example, and there are {examples}; those of a scan over layers "
                "have the example first too, or come from jp.repeat"
            )
