"""The layers, a file for each family."""

from jaxprop.layers.activations import Elementwise, Gelu, Relu, Sigmoid, Silu, Softplus, Tanh
from jaxprop.layers.dense import Affine, Dense
from jaxprop.layers.normalization import LayerNorm, Norm, RMSNorm

__all__ = [
    "Affine",
    "Dense",
    "Elementwise",
    "Gelu",
    "LayerNorm",
    "Norm",
    "RMSNorm",
    "Relu",
    "Sigmoid",
    "Silu",
    "Softplus",
    "Tanh",
]
