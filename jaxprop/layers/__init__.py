"""The layers, a file for each family."""

from jaxprop.core.affine import AffineParams
from jaxprop.layers.activations import (
    Elementwise,
    Elu,
    Gelu,
    LeakyRelu,
    LogSigmoid,
    Relu,
    Sigmoid,
    Silu,
    Softplus,
    Tanh,
)
from jaxprop.layers.attention import Attention
from jaxprop.layers.axes import Moveaxis, Take
from jaxprop.layers.batch_norm import BatchNorm, BatchNormParams
from jaxprop.layers.conv_transpose import ConvTranspose
from jaxprop.layers.convolution import Conv
from jaxprop.layers.dense import Dense
from jaxprop.layers.dropout import Dropout
from jaxprop.layers.embedding import Embedding, Rows
from jaxprop.layers.group_norm import GroupNorm
from jaxprop.layers.item import Item
from jaxprop.layers.linear_cross_entropy import LinearCrossEntropy
from jaxprop.layers.normalization import LayerNorm, NormParams, RMSNorm
from jaxprop.layers.patches import Patches
from jaxprop.layers.pooling import AvgPool, GlobalAvgPool, MaxPool
from jaxprop.layers.positions import Leading, Positions, Rotary, SinusoidalPositions
from jaxprop.layers.recurrence import RecurrentParams
from jaxprop.layers.recurrent import Gru, Lstm, Rnn
from jaxprop.layers.shape import Flatten, Pad, Reshape

__all__ = [
    "AffineParams",
    "Attention",
    "AvgPool",
    "BatchNorm",
    "BatchNormParams",
    "Conv",
    "ConvTranspose",
    "Dense",
    "Dropout",
    "Elementwise",
    "Elu",
    "Embedding",
    "Flatten",
    "Gelu",
    "GlobalAvgPool",
    "GroupNorm",
    "Gru",
    "Item",
    "LayerNorm",
    "Leading",
    "LeakyRelu",
    "LinearCrossEntropy",
    "LogSigmoid",
    "Lstm",
    "MaxPool",
    "Moveaxis",
    "NormParams",
    "Pad",
    "Patches",
    "Positions",
    "RMSNorm",
    "RecurrentParams",
    "Relu",
    "Reshape",
    "Rnn",
    "Rotary",
    "Rows",
    "Sigmoid",
    "Silu",
    "SinusoidalPositions",
    "Softplus",
    "Take",
    "Tanh",
]
