"""Layers one after the other."""

from __future__ import annotations

import jax
from jax import Array

from jaxprop.combinators.several import Several
from jaxprop.core.combinator import in_layer
from jaxprop.core.describe import structs
from jaxprop.core.layer import Layer
from jaxprop.core.step import Visit
from jaxprop.core.types import Cotangent, Params, PyTree, Residuals, Visited


class Chain(Several):
    """y = f_k(... f_2(f_1(x))); the chain rule is the same walk from the other end.

    Attributes:
        layers: the layers, in order.
    """

    def __repr__(self) -> str:
        return f"chain({', '.join(map(repr, self.layers))})"

    def init_with_output(self, key: Array, x: PyTree) -> tuple[Params, PyTree]:
        params = []
        for index, layer in enumerate(self.layers):
            with in_layer(index, layer):
                p, x = layer.init_with_output(jax.random.fold_in(key, index), structs(x))
            params.append(p)
        return tuple(params), x

    def forward(self, params: Params, x: PyTree) -> tuple[PyTree, Residuals]:
        residuals = []
        for index, (layer, p) in enumerate(zip(self.layers, params, strict=True)):
            with in_layer(index, layer):
                x, r = layer.forward(p, x)
            residuals.append(r)
        return x, tuple(residuals)

    def walk(
        self, place: PyTree, residuals: Residuals, ct: Cotangent, visit: Visit
    ) -> tuple[Visited, Cotangent]:
        self.check_places(place)
        self.check_residuals(residuals)
        visited = []
        steps = list(enumerate(zip(self.layers, place, residuals, strict=True)))
        for index, (layer, p, r) in reversed(steps):
            with in_layer(index, layer):
                here, ct = layer.walk(p, r, ct, visit)
            visited.append(here)
        return tuple(reversed(visited)), ct


def chain(*layers: Layer) -> Chain:
    """Return the layers one after the other, as one layer.

    params and residuals are tuples with one entry per layer.

    Args:
        layers: at least one layer.

    Raises:
        ValueError: for no layers.
        TypeError: for an argument that is not a layer.

    Example:
        >>> import jaxprop as jp
        >>> jp.chain(jp.Dense(512), jp.Relu(), jp.Dense(10))
        chain(Dense(512), Relu(), Dense(10))
    """
    return Chain(layers)
