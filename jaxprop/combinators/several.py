"""The base of layers that are made of several others."""

from __future__ import annotations

from jax import Array

from jaxprop.core.checks import require
from jaxprop.core.child import Child
from jaxprop.core.combinator import Combinator
from jaxprop.core.describe import shapes
from jaxprop.core.layer import Layer
from jaxprop.core.types import Params, PyTree, Residuals


class Several(Combinator):
    """Layers whose params are a tuple with one entry per layer.

    Attributes:
        layers: the layers, in the order in which they run.
    """

    layers: tuple[Layer, ...]

    def __post_init__(self) -> None:
        name = type(self).__name__.lower()
        if not self.layers:
            raise ValueError(f"{name}() needs at least one layer")
        for index, layer in enumerate(self.layers):
            require(layer, Layer, f"{name}: layer {index}")

    def children(self) -> tuple[Child, ...]:
        return tuple(Child(layer, index) for index, layer in enumerate(self.layers))

    def init(self, key: Array, x: PyTree) -> Params:
        return self.init_with_output(key, x)[0]

    def check_residuals(self, residuals: Residuals) -> None:
        """Raise ``ValueError`` unless residuals are a tuple of the right length."""
        if type(residuals) is not tuple or len(residuals) != len(self.layers):
            raise ValueError(
                f"{self} takes the residuals that its forward returned, not {shapes(residuals)}"
            )

    def check_places(self, params: Params) -> None:
        """Raise ``ValueError`` unless params are a tuple of the right length."""
        if type(params) is not tuple or len(params) != len(self.layers):
            got = len(params) if type(params) is tuple else shapes(params)
            raise ValueError(
                f"a {type(self).__name__.lower()} of {len(self.layers)} layers takes a tuple of "
                f"{len(self.layers)} params, one a layer, not {got}: {self}"
            )
