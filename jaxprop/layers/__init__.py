"""The layers, a file for each family."""

from jaxprop.layers.activations import Elementwise, Gelu, Relu, Sigmoid, Silu, Softplus, Tanh
from jaxprop.layers.batch_norm import BatchNorm, BatchNormParams, evaluation, with_statistics
from jaxprop.layers.dense import Affine, Dense
from jaxprop.layers.group_norm import GroupNorm
from jaxprop.layers.normalization import LayerNorm, Norm, RMSNorm

__all__ = [
    "Affine",
    "BatchNorm",
    "BatchNormParams",
    "Dense",
    "Elementwise",
    "Gelu",
    "GroupNorm",
    "LayerNorm",
    "Norm",
    "RMSNorm",
    "Relu",
    "Sigmoid",
    "Silu",
    "Softplus",
    "Tanh",
    "evaluation",
    "with_statistics",
]
