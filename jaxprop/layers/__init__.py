"""The layers, a file for each family."""

from jaxprop.layers.activations import Elementwise, Gelu, Relu, Sigmoid, Silu, Softplus, Tanh
from jaxprop.layers.attention import Attention
from jaxprop.layers.dense import Affine, Dense

__all__ = [
    "Affine",
    "Attention",
    "Dense",
    "Elementwise",
    "Gelu",
    "Relu",
    "Sigmoid",
    "Silu",
    "Softplus",
    "Tanh",
]
