"""The layers, a file for each family."""

from jaxprop.layers.activations import Elementwise, Gelu, Relu, Sigmoid, Silu, Softplus, Tanh
from jaxprop.layers.attention import Attention
from jaxprop.layers.batch_norm import BatchNorm, BatchNormParams, evaluation, with_statistics
from jaxprop.layers.dense import Affine, Dense
from jaxprop.layers.dropout import Dropout
from jaxprop.layers.embedding import Embedding, Rows
from jaxprop.layers.group_norm import GroupNorm
from jaxprop.layers.normalization import LayerNorm, Norm, RMSNorm
from jaxprop.layers.positions import Leading, Positions, Rotary, SinusoidalPositions
from jaxprop.layers.recurrent import Gru, Lstm, Rnn
from jaxprop.layers.through_time import Recurrent

__all__ = [
    "Affine",
    "Attention",
    "BatchNorm",
    "BatchNormParams",
    "Dense",
    "Dropout",
    "Elementwise",
    "Embedding",
    "Gelu",
    "GroupNorm",
    "Gru",
    "LayerNorm",
    "Leading",
    "Lstm",
    "Norm",
    "Positions",
    "RMSNorm",
    "Recurrent",
    "Relu",
    "Rnn",
    "Rotary",
    "Rows",
    "Sigmoid",
    "Silu",
    "SinusoidalPositions",
    "Softplus",
    "Tanh",
    "evaluation",
    "with_statistics",
]
