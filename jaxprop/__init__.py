"""jaxprop: backpropagation for JAX with the backward pass in the open.

    import jaxprop as jp

    net = jp.chain(jp.Dense(512), jp.Relu(), jp.Dense(10))
    loss = jp.CrossEntropy()
    params = net.init(key, x)
    value, grads = jp.value_and_grad(net, loss)(params, x, target)

A layer defines a hand-written ``backward`` next to its ``forward``; ``jp.check_layer`` checks one
against the other. The names, by group:

    layers       Dense  Sigmoid LogSigmoid Tanh Relu LeakyRelu Elu Gelu Silu Softplus  Dropout
                 Embedding Positions SinusoidalPositions Rotary  Attention
                 LayerNorm RMSNorm GroupNorm BatchNorm
                 Conv ConvTranspose MaxPool AvgPool GlobalAvgPool Pad
                 Flatten Reshape Moveaxis Take Item
                 Rnn Lstm Gru
    combinators  chain (a Chain) skip branch on bidirectional repeat recompute shared tied cast
                 frozen
    any model    function
    losses       CrossEntropy HalfSquaredError BinaryCrossEntropy  loss total_loss
                 LinearCrossEntropy (a layer) with Mean
    gradients    value_and_grad autodiff loss_fn walk custom_vjp
    updates      make_update kfac DynamicLossScale learned_only inference_mode update_batch_stats
    quantities   quantities clipped_grad per_example_grads per_example_sq_norms projected_grads gram
                 inner_products ntk second_moment variance noise_scale
                 diag_ggn kronecker_factors ggn_root hvp ggn_vp fisher_vp laplace
    to see       explain find_nonfinite
    to check     check_layer check_loss check_vjp
    to extend    Layer Elementwise Combinator Wrapper Loss Step Unlearned freeze
    modules      curvature forms models plot quantity rules sharding

``jp.quantity`` holds the classes of quantities and the sources that their walks start from, and
``jp.forms`` holds the forms. Most of both are also exported here, such as ``jp.SqNorms`` and
``jp.Sum``.
"""

import jaxprop._command  # noqa: F401
from jaxprop import curvature, forms, models, plot, quantity, rules, sharding
from jaxprop.checking.check import check_layer
from jaxprop.checking.losses import check_loss
from jaxprop.checking.vjp import check_vjp
from jaxprop.combinators.bidirectional import bidirectional
from jaxprop.combinators.branch import branch
from jaxprop.combinators.cast import cast
from jaxprop.combinators.chain import Chain as Chain, chain
from jaxprop.combinators.frozen import frozen
from jaxprop.combinators.on import on
from jaxprop.combinators.recompute import recompute
from jaxprop.combinators.repeat import repeat
from jaxprop.combinators.shared import shared
from jaxprop.combinators.skip import skip
from jaxprop.combinators.tied import tied
from jaxprop.core.child import Child as Child
from jaxprop.core.combinator import Combinator as Combinator, Wrapper, over_layers as over_layers
from jaxprop.core.layer import Layer
from jaxprop.core.loss import Loss
from jaxprop.core.step import Step as Step, Total as Total
from jaxprop.core.tree import Key as Key, Mask as Mask, Unlearned, freeze
from jaxprop.core.walk import loss_fn, walk
from jaxprop.curvature.laplace import Posterior as Posterior, laplace
from jaxprop.curvature.products import fisher_vp, ggn_vp, hvp
from jaxprop.explanation.nonfinite import Finding as Finding, find_nonfinite
from jaxprop.explanation.record import explain
from jaxprop.explanation.terms import Explanation as Explanation
from jaxprop.forms import (
    Factored as Factored,
    Joint as Joint,
    Kronecker as Kronecker,
    Leading as Leading,
    Outer as Outer,
    Patches as Patches,
    Rearranged as Rearranged,
    Repeated as Repeated,
    Rows as Rows,
    Stacked as Stacked,
    Sum as Sum,
)
from jaxprop.layers import (
    AffineParams as AffineParams,
    Attention,
    AvgPool,
    BatchNorm,
    BatchNormParams as BatchNormParams,
    Conv,
    ConvTranspose,
    Dense,
    Dropout,
    Elementwise,
    Elu,
    Embedding,
    Flatten,
    Gelu,
    GlobalAvgPool,
    GroupNorm,
    Gru,
    Item,
    LayerNorm,
    LeakyRelu,
    LinearCrossEntropy,
    LogSigmoid,
    Lstm,
    MaxPool,
    Moveaxis,
    NormParams as NormParams,
    Pad,
    Positions,
    RecurrentParams as RecurrentParams,
    Relu,
    Reshape,
    RMSNorm,
    Rnn,
    Rotary,
    Sigmoid,
    Silu,
    SinusoidalPositions,
    Softplus,
    Take,
    Tanh,
)
from jaxprop.losses import (
    BinaryCrossEntropy,
    CrossEntropy,
    HalfSquaredError,
    Mean,
    loss,
    total_loss,
)
from jaxprop.quantity import (
    Aux as Aux,
    Clipped as Clipped,
    DiagGGN as DiagGGN,
    GGNRoot as GGNRoot,
    Gradient as Gradient,
    Gram as Gram,
    KroneckerFactors as KroneckerFactors,
    NoiseAverage as NoiseAverage,
    NoiseScale as NoiseScale,
    Output as Output,
    PerExample as PerExample,
    PerExampleGrads as PerExampleGrads,
    Quantity as Quantity,
    SecondMoment as SecondMoment,
    SqNorms as SqNorms,
    Variance as Variance,
)
from jaxprop.quantity.between import inner_products, ntk
from jaxprop.quantity.functions import (
    clipped_grad,
    diag_ggn,
    ggn_root,
    gram,
    kronecker_factors,
    noise_scale,
    per_example_grads,
    per_example_sq_norms,
    projected_grads,
    second_moment,
    variance,
)
from jaxprop.quantity.together import quantities
from jaxprop.traced.coverage import Coverage as Coverage
from jaxprop.traced.function import function
from jaxprop.training.apply import DynamicLossScale, Scaling as Scaling, Skipping as Skipping
from jaxprop.training.custom import custom_vjp
from jaxprop.training.gradients import autodiff, value_and_grad
from jaxprop.training.kfac import KfacState as KfacState, kfac
from jaxprop.training.optimizer import learned_only
from jaxprop.training.statistics import inference_mode, update_batch_stats
from jaxprop.training.update import Update as Update, make_update

__all__ = [
    # layers
    "Take",
    "Moveaxis",
    "LogSigmoid",
    "LeakyRelu",
    "Elu",
    "Attention",
    "AvgPool",
    "BatchNorm",
    "Conv",
    "ConvTranspose",
    "Dense",
    "Dropout",
    "Embedding",
    "Flatten",
    "Gelu",
    "GlobalAvgPool",
    "GroupNorm",
    "Gru",
    "Item",
    "LayerNorm",
    "LinearCrossEntropy",
    "Lstm",
    "MaxPool",
    "Pad",
    "Positions",
    "RMSNorm",
    "Relu",
    "Reshape",
    "Rnn",
    "Rotary",
    "Sigmoid",
    "Silu",
    "SinusoidalPositions",
    "Softplus",
    "Tanh",
    # combinators
    "bidirectional",
    "branch",
    "cast",
    "chain",
    "frozen",
    "on",
    "recompute",
    "repeat",
    "shared",
    "skip",
    "tied",
    # any JAX function
    "function",
    # losses
    "BinaryCrossEntropy",
    "CrossEntropy",
    "HalfSquaredError",
    "Mean",
    "loss",
    "total_loss",
    # gradients and updates
    "DynamicLossScale",
    "autodiff",
    "custom_vjp",
    "inference_mode",
    "kfac",
    "learned_only",
    "loss_fn",
    "make_update",
    "update_batch_stats",
    "value_and_grad",
    "walk",
    # quantities
    "clipped_grad",
    "diag_ggn",
    "ggn_root",
    "gram",
    "kronecker_factors",
    "laplace",
    "noise_scale",
    "per_example_grads",
    "per_example_sq_norms",
    "projected_grads",
    "inner_products",
    "hvp",
    "ggn_vp",
    "fisher_vp",
    "ntk",
    "quantities",
    "second_moment",
    "variance",
    # to see, and to check
    "check_layer",
    "check_loss",
    "check_vjp",
    "explain",
    "find_nonfinite",
    # to extend
    "Elementwise",
    "Layer",
    "Loss",
    "Unlearned",
    "Wrapper",
    "freeze",
    # modules
    "forms",
    "models",
    "plot",
    "curvature",
    "quantity",
    "rules",
    "sharding",
]


def __dir__() -> list[str]:
    return sorted(__all__)
