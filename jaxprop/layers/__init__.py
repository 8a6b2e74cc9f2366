"""The layers, a file for each family."""

from jaxprop.layers.activations import Elementwise, Gelu, Relu, Sigmoid, Silu, Softplus, Tanh
from jaxprop.layers.convolution import Conv, ConvTranspose
from jaxprop.layers.dense import Affine, Dense
from jaxprop.layers.patches import Patches
from jaxprop.layers.pooling import AvgPool, GlobalAvgPool, MaxPool
from jaxprop.layers.shape import Flatten, Pad, Reshape

__all__ = [
    "Affine",
    "AvgPool",
    "Conv",
    "ConvTranspose",
    "Dense",
    "Elementwise",
    "Flatten",
    "Gelu",
    "GlobalAvgPool",
    "MaxPool",
    "Pad",
    "Patches",
    "Relu",
    "Reshape",
    "Sigmoid",
    "Silu",
    "Softplus",
    "Tanh",
]
