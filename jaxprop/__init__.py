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
from jaxprop import models, sharding
from jaxprop.accumulation import accumulate
from jaxprop.backprop import loss_fn, walk
from jaxprop.checking import check_layer
from jaxprop.clipping import clipped_grad
from jaxprop.combinators import Wrapper, branch, cast, chain, recompute, repeat, shared, skip, tied
from jaxprop.curvature import diag_ggn, ggn_root, kronecker_factors
from jaxprop.explain.nonfinite import Finding, find_nonfinite
from jaxprop.explain.record import explain
from jaxprop.explain.terms import Explanation
from jaxprop.factored import Factored, Joint, Kronecker, Outer, Repeated, Stacked, Sum
from jaxprop.interop import custom_vjp
from jaxprop.layer import Combinator, Layer, Step, Total
from jaxprop.layers import (
    Affine,
    Attention,
    AvgPool,
    BatchNorm,
    BatchNormParams,
    Conv,
    ConvTranspose,
    Dense,
    Dropout,
    Embedding,
    Flatten,
    Gelu,
    GlobalAvgPool,
    GroupNorm,
    Gru,
    LayerNorm,
    Leading,
    Lstm,
    MaxPool,
    Norm,
    Pad,
    Patches,
    Positions,
    Recurrent,
    Relu,
    Reshape,
    RMSNorm,
    Rnn,
    Rotary,
    Rows,
    Sigmoid,
    Silu,
    SinusoidalPositions,
    Softplus,
    Tanh,
)
from jaxprop.losses import BinaryCrossEntropy, CrossEntropy, HalfSquaredError, Loss
from jaxprop.of_batch import OfBatch, PerExample
from jaxprop.quantities import (
    gram,
    noise_scale,
    per_example_grads,
    per_example_sq_norms,
    quantities,
    second_moment,
    variance,
)
from jaxprop.quantity import (
    Gradient,
    Gram,
    NoiseScale,
    PerExampleGrads,
    Quantity,
    SecondMoment,
    SqNorms,
    Variance,
)
from jaxprop.training import evaluation, value_and_grad, with_statistics
from jaxprop.update import Skipping, Update, make_update

__all__ = [
    "Affine",
    "Attention",
    "AvgPool",
    "BatchNorm",
    "BatchNormParams",
    "BinaryCrossEntropy",
    "Combinator",
    "Conv",
    "ConvTranspose",
    "CrossEntropy",
    "Dense",
    "Dropout",
    "Embedding",
    "Explanation",
    "Factored",
    "Finding",
    "Flatten",
    "Gelu",
    "GlobalAvgPool",
    "Gradient",
    "Gram",
    "GroupNorm",
    "Gru",
    "HalfSquaredError",
    "Joint",
    "Kronecker",
    "Layer",
    "LayerNorm",
    "Leading",
    "Loss",
    "Lstm",
    "MaxPool",
    "NoiseScale",
    "Norm",
    "OfBatch",
    "Outer",
    "Pad",
    "Patches",
    "PerExample",
    "PerExampleGrads",
    "Positions",
    "Quantity",
    "RMSNorm",
    "Recurrent",
    "Relu",
    "Repeated",
    "Reshape",
    "Rnn",
    "Rotary",
    "Rows",
    "SecondMoment",
    "Sigmoid",
    "Silu",
    "SinusoidalPositions",
    "Skipping",
    "Softplus",
    "SqNorms",
    "Stacked",
    "Step",
    "Sum",
    "Tanh",
    "Total",
    "Update",
    "Variance",
    "Wrapper",
    "accumulate",
    "branch",
    "cast",
    "chain",
    "check_layer",
    "clipped_grad",
    "custom_vjp",
    "diag_ggn",
    "evaluation",
    "explain",
    "find_nonfinite",
    "ggn_root",
    "gram",
    "kronecker_factors",
    "loss_fn",
    "make_update",
    "models",
    "noise_scale",
    "per_example_grads",
    "per_example_sq_norms",
    "quantities",
    "recompute",
    "repeat",
    "second_moment",
    "sharding",
    "shared",
    "skip",
    "tied",
    "value_and_grad",
    "variance",
    "walk",
    "with_statistics",
]
