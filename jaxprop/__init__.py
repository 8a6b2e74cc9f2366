"""jaxprop: backpropagation for JAX with the backward pass in the open.

    import jaxprop as jp

    net = jp.chain(jp.Dense(512), jp.Relu(), jp.Dense(10))
    loss = jp.CrossEntropy()
    params = net.init(key, x)
    value, grads = jp.value_and_grad(net, loss)(params, x, target)

A layer holds its hand-written ``backward`` next to its ``forward``; ``jp.check_layer`` holds one
against the other.
"""

from jaxprop.backprop import loss_fn, walk
from jaxprop.checking import check_layer
from jaxprop.combinators import chain, skip
from jaxprop.factored import Factored, Outer, Sum
from jaxprop.interop import custom_vjp
from jaxprop.layer import Layer, Step
from jaxprop.layers import Affine, Dense, Gelu, Relu, Sigmoid, Silu, Softplus, Tanh
from jaxprop.losses import BinaryCrossEntropy, CrossEntropy, HalfSquaredError, Loss
from jaxprop.training import make_update, value_and_grad

__all__ = [
    "Affine",
    "BinaryCrossEntropy",
    "CrossEntropy",
    "Dense",
    "Factored",
    "Gelu",
    "HalfSquaredError",
    "Layer",
    "Loss",
    "Outer",
    "Relu",
    "Sigmoid",
    "Silu",
    "Softplus",
    "Step",
    "Sum",
    "Tanh",
    "chain",
    "check_layer",
    "custom_vjp",
    "loss_fn",
    "make_update",
    "skip",
    "value_and_grad",
    "walk",
]
