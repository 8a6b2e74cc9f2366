"""The chain-rule terms of one walk, as values."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array

from jaxprop.backprop import walk
from jaxprop.layer import Layer, Step, map_layers
from jaxprop.layers import Elementwise
from jaxprop.losses import Loss


class Terms(NamedTuple):
    """What passed through one layer: x and y on the way there, ct and d_x on the way back.

    ``slope`` is the local derivative dy/dx of an elementwise layer, None for any other.
    """

    x: Any
    y: Any
    ct: Any
    slope: Any
    d_params: Any
    d_x: Any


class Recorded(Layer):
    """The layer it holds, with x and y kept among the residuals."""

    layer: Layer

    def forward(self, params: Any, x: Any) -> tuple[Any, Any]:
        y, residuals = self.layer.forward(params, x)
        return y, (x, y, residuals)

    def backward(self, params: Any, residuals: Any, ct: Any) -> tuple[Any, Any]:
        return self.layer.backward(params, residuals[2], ct)

    def check_params(self, params: Any, x: Any) -> None:
        """Nothing: the layer it holds does that."""


def terms(net: Layer, loss: Loss, params: Any, x: Any, target: Any) -> tuple[Array, Any]:
    """``(value, left)`` with the ``Terms`` of each layer where its params stand in the net's."""
    value, left, _ = walk(map_layers(net, Recorded), loss, _read)(params, x, target)
    return value, left


def _read(step: Step) -> Terms:
    assert isinstance(step.layer, Recorded)
    x, y, residuals = step.residuals
    slope = None
    if isinstance(step.layer.layer, Elementwise):
        _, slope = step.layer.layer.backward(step.params, residuals, jnp.ones_like(y))
    return Terms(x, y, step.ct, slope, step.d_params, step.d_x)
