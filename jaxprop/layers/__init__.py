"""The layers, a file for each family."""

from jaxprop.layers.activations import Gelu, Relu, Sigmoid, Silu, Softplus, Tanh
from jaxprop.layers.dense import Affine, Dense

__all__ = ["Affine", "Dense", "Gelu", "Relu", "Sigmoid", "Silu", "Softplus", "Tanh"]
