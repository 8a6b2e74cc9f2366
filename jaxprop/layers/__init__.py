"""The layers, a file for each family."""

from jaxprop.layers.activations import Elementwise, Gelu, Relu, Sigmoid, Silu, Softplus, Tanh
from jaxprop.layers.attention import Attention
from jaxprop.layers.dense import Affine, Dense
from jaxprop.layers.positions import Leading, Positions, Rotary, SinusoidalPositions

__all__ = [
    "Affine",
    "Attention",
    "Dense",
    "Elementwise",
    "Gelu",
    "Leading",
    "Positions",
    "Relu",
    "Rotary",
    "Sigmoid",
    "Silu",
    "SinusoidalPositions",
    "Softplus",
    "Tanh",
]
