"""jaxprop: backpropagation for JAX with the backward pass in the open.

    import jaxprop as jp

    net = jp.chain(jp.Dense(512), jp.Relu(), jp.Dense(10))
    loss = jp.CrossEntropy()
    params = net.init(key, x)
    value, grads = jp.value_and_grad(net, loss)(params, x, target)

A layer holds its hand-written ``backward`` next to its ``forward``; ``jp.check_layer`` holds one
against the other.
"""

import jaxprop._command  # noqa: F401
from jaxprop.backprop import loss_fn, walk
from jaxprop.checking import check_layer
from jaxprop.clipping import clipped_grad
from jaxprop.combinators import chain, skip
from jaxprop.curvature import diag_ggn, ggn_root, kronecker_factors
from jaxprop.explain.nonfinite import Finding, find_nonfinite
from jaxprop.explain.record import explain
from jaxprop.explain.terms import Explanation
from jaxprop.factored import Factored, Kronecker, Outer, Stacked, Sum
from jaxprop.interop import custom_vjp
from jaxprop.layer import Combinator, Layer, Step
from jaxprop.layers import Affine, Dense, Gelu, Relu, Sigmoid, Silu, Softplus, Tanh
from jaxprop.losses import BinaryCrossEntropy, CrossEntropy, HalfSquaredError, Loss
from jaxprop.quantities import (
    Gradient,
    Gram,
    NoiseScale,
    PerExampleGrads,
    Quantity,
    SecondMoment,
    SqNorms,
    Variance,
    gram,
    noise_scale,
    per_example_grads,
    per_example_sq_norms,
    quantities,
    second_moment,
    variance,
)
from jaxprop.training import make_update, value_and_grad

__all__ = [
    "Affine",
    "BinaryCrossEntropy",
    "Combinator",
    "CrossEntropy",
    "Dense",
    "Explanation",
    "Factored",
    "Finding",
    "Gelu",
    "Gradient",
    "Gram",
    "HalfSquaredError",
    "Kronecker",
    "Layer",
    "Loss",
    "NoiseScale",
    "Outer",
    "PerExampleGrads",
    "Quantity",
    "Relu",
    "SecondMoment",
    "Sigmoid",
    "Silu",
    "Softplus",
    "SqNorms",
    "Stacked",
    "Step",
    "Sum",
    "Tanh",
    "Variance",
    "chain",
    "check_layer",
    "clipped_grad",
    "custom_vjp",
    "diag_ggn",
    "explain",
    "find_nonfinite",
    "ggn_root",
    "gram",
    "kronecker_factors",
    "loss_fn",
    "make_update",
    "noise_scale",
    "per_example_grads",
    "per_example_sq_norms",
    "quantities",
    "second_moment",
    "skip",
    "value_and_grad",
    "variance",
    "walk",
]
