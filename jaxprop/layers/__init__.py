"""The layers, a file for each family."""

from jaxprop.layers.activations import Elementwise, Gelu, Relu, Sigmoid, Silu, Softplus, Tanh
from jaxprop.layers.dense import Affine, Dense
from jaxprop.layers.recurrent import Gru, Lstm, Rnn
from jaxprop.layers.through_time import Recurrent

__all__ = [
    "Affine",
    "Dense",
    "Elementwise",
    "Gelu",
    "Gru",
    "Lstm",
    "Recurrent",
    "Relu",
    "Rnn",
    "Sigmoid",
    "Silu",
    "Softplus",
    "Tanh",
]
