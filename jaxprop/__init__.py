"""jaxprop: backpropagation for JAX with the backward pass in the open.

    import jaxprop as jp

    net = jp.chain(jp.Dense(512), jp.Relu(), jp.Dense(10))
    loss = jp.CrossEntropy()
    params = net.init(key, x)
    value, grads = jp.value_and_grad(net, loss)(params, x, target)

A layer holds its hand-written ``backward`` next to its ``forward``; ``jp.check_layer`` holds one
against the other. The names, by group:

    layers       Dense  Sigmoid Tanh Relu Gelu Silu Softplus  Dropout
                 Embedding Positions SinusoidalPositions Rotary  Attention
                 LayerNorm RMSNorm GroupNorm BatchNorm
                 Conv ConvTranspose MaxPool AvgPool GlobalAvgPool Flatten Reshape Pad
                 Rnn Lstm Gru
    combinators  chain skip branch repeat recompute shared tied cast frozen
    losses       CrossEntropy HalfSquaredError BinaryCrossEntropy
    gradients    value_and_grad autodiff loss_fn walk custom_vjp
    updates      make_update learned_only inference_mode update_batch_stats
    quantities   quantities clipped_grad per_example_grads per_example_sq_norms gram second_moment
                 variance noise_scale diag_ggn kronecker_factors ggn_root
    to see       explain find_nonfinite
    to check     check_layer
    to extend    Layer Elementwise Combinator Chain Wrapper Loss Step Unlearned freeze
    modules      forms models plot quantity sharding

The quantities' classes are in ``jp.quantity`` and the forms in ``jp.forms``; both are also here,
as ``jp.SqNorms`` and ``jp.Sum``.
"""

import jaxprop._command  # noqa: F401
from jaxprop import (
    forms,
    models,
    plot,
    quantity,
    sharding,
)
from jaxprop.checking.check import check_layer
from jaxprop.combinators.branch import branch
from jaxprop.combinators.cast import cast
from jaxprop.combinators.chain import (
    Chain,
    chain,
)
from jaxprop.combinators.frozen import frozen
from jaxprop.combinators.recompute import recompute
from jaxprop.combinators.repeat import repeat
from jaxprop.combinators.shared import shared
from jaxprop.combinators.skip import skip
from jaxprop.combinators.tied import tied
from jaxprop.core.combinator import (
    Combinator,
    Wrapper,
)
from jaxprop.core.layer import (
    Child as Child,
)
from jaxprop.core.layer import (
    Layer,
)
from jaxprop.core.loss import Loss
from jaxprop.core.step import (
    Step,
)
from jaxprop.core.step import (
    Total as Total,
)
from jaxprop.core.tree import (
    Key as Key,
)
from jaxprop.core.tree import (
    Mask as Mask,
)
from jaxprop.core.tree import (
    Unlearned,
    freeze,
)
from jaxprop.core.walk import (
    loss_fn,
    walk,
)
from jaxprop.explanation.nonfinite import (
    Finding as Finding,
)
from jaxprop.explanation.nonfinite import (
    find_nonfinite,
)
from jaxprop.explanation.record import explain
from jaxprop.explanation.terms import Explanation as Explanation
from jaxprop.forms import (
    Factored as Factored,
)
from jaxprop.forms import (
    Joint as Joint,
)
from jaxprop.forms import (
    Kronecker as Kronecker,
)
from jaxprop.forms import (
    Leading as Leading,
)
from jaxprop.forms import (
    Outer as Outer,
)
from jaxprop.forms import (
    Patches as Patches,
)
from jaxprop.forms import (
    Repeated as Repeated,
)
from jaxprop.forms import (
    Rows as Rows,
)
from jaxprop.forms import (
    Stacked as Stacked,
)
from jaxprop.forms import (
    Sum as Sum,
)
from jaxprop.layers import (
    AffineParams as AffineParams,
)
from jaxprop.layers import (
    Attention,
    AvgPool,
    BatchNorm,
    Conv,
    ConvTranspose,
    Dense,
    Dropout,
    Elementwise,
    Embedding,
    Flatten,
    Gelu,
    GlobalAvgPool,
    GroupNorm,
    Gru,
    LayerNorm,
    Lstm,
    MaxPool,
    Pad,
    Positions,
    Relu,
    Reshape,
    RMSNorm,
    Rnn,
    Rotary,
    Sigmoid,
    Silu,
    SinusoidalPositions,
    Softplus,
    Tanh,
)
from jaxprop.layers import (
    BatchNormParams as BatchNormParams,
)
from jaxprop.layers import (
    NormParams as NormParams,
)
from jaxprop.layers import (
    RecurrentParams as RecurrentParams,
)
from jaxprop.losses import (
    BinaryCrossEntropy,
    CrossEntropy,
    HalfSquaredError,
)
from jaxprop.quantity import (
    Clipped as Clipped,
)
from jaxprop.quantity import (
    DiagGGN as DiagGGN,
)
from jaxprop.quantity import (
    GGNRoot as GGNRoot,
)
from jaxprop.quantity import (
    Gradient as Gradient,
)
from jaxprop.quantity import (
    Gram as Gram,
)
from jaxprop.quantity import (
    KroneckerFactors as KroneckerFactors,
)
from jaxprop.quantity import (
    NoiseScale as NoiseScale,
)
from jaxprop.quantity import (
    PerExample as PerExample,
)
from jaxprop.quantity import (
    PerExampleGrads as PerExampleGrads,
)
from jaxprop.quantity import (
    Quantity as Quantity,
)
from jaxprop.quantity import (
    SecondMoment as SecondMoment,
)
from jaxprop.quantity import (
    SqNorms as SqNorms,
)
from jaxprop.quantity import (
    Variance as Variance,
)
from jaxprop.quantity.functions import (
    clipped_grad,
    diag_ggn,
    ggn_root,
    gram,
    kronecker_factors,
    noise_scale,
    per_example_grads,
    per_example_sq_norms,
    second_moment,
    variance,
)
from jaxprop.quantity.together import quantities
from jaxprop.training.custom import custom_vjp
from jaxprop.training.gradients import (
    autodiff,
    value_and_grad,
)
from jaxprop.training.optimizer import learned_only
from jaxprop.training.statistics import (
    inference_mode,
    update_batch_stats,
)
from jaxprop.training.update import (
    Skipping as Skipping,
)
from jaxprop.training.update import (
    Update as Update,
)
from jaxprop.training.update import (
    make_update,
)

__all__ = [
    # layers
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
    "LayerNorm",
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
    "branch",
    "cast",
    "chain",
    "frozen",
    "recompute",
    "repeat",
    "shared",
    "skip",
    "tied",
    # losses
    "BinaryCrossEntropy",
    "CrossEntropy",
    "HalfSquaredError",
    # gradients and updates
    "autodiff",
    "custom_vjp",
    "inference_mode",
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
    "noise_scale",
    "per_example_grads",
    "per_example_sq_norms",
    "quantities",
    "second_moment",
    "variance",
    # to see, and to check
    "check_layer",
    "explain",
    "find_nonfinite",
    # to extend
    "Chain",
    "Combinator",
    "Elementwise",
    "Layer",
    "Loss",
    "Step",
    "Unlearned",
    "Wrapper",
    "freeze",
    # modules
    "forms",
    "models",
    "plot",
    "quantity",
    "sharding",
]


def __dir__() -> list[str]:
    return sorted(__all__)
