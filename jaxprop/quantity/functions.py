"""The functions that return one quantity each: ``jp.per_example_sq_norms`` and its like.

The scalar loss is the mean over the N examples. A per-example quantity is that of each example's
*own* loss, so that the mean of the per-example gradients is the gradient: there is no 1/N in them.

Each function here is called as ``jp.value_and_grad`` is, with a net and a loss, and returns a
function of (params, x, target). A layer whose cotangents are not factored serves as well: its
backward is then taken one example at a time. A layer that couples the examples of a batch has no
per-example gradient, and raises ``ValueError``; a layer of one's own that does so without saying so
is tried on two examples, and found out.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from jax import Array

from jaxprop.core.batch import Batch
from jaxprop.core.functions import of_batch
from jaxprop.core.layer import Layer
from jaxprop.core.loss import Loss
from jaxprop.core.types import OfBatch, Params, PyTree
from jaxprop.core.where import Where
from jaxprop.quantity.also import beside
from jaxprop.quantity.aux import Aux
from jaxprop.quantity.base import Quantity
from jaxprop.quantity.clipping import Clipped, Weight
from jaxprop.quantity.curvature import DiagGGN, GGNRoot, KroneckerFactors
from jaxprop.quantity.noise import NoiseScale
from jaxprop.quantity.per_example import (
    FiniteLoss,
    Gram,
    Output,
    PerExampleGrads,
    SecondMoment,
    SqNorms,
    Variance,
)
from jaxprop.quantity.projected import Projected
from jaxprop.quantity.together import alone


def per_example_grads(net: Layer, loss: Loss, *, micro_batches: int = 1) -> OfBatch[Params]:
    """Return ``f(params, x, target)``, each example's own gradient, behind an example axis.

    Their mean over the example axis is the gradient.

    Args:
        net: the network.
        loss: the loss.
        micro_batches: into how many parts the batch is split.
    """
    return _of_quantity("per_example_grads", net, loss, PerExampleGrads(), micro_batches)


def per_example_sq_norms(
    net: Layer, loss: Loss, *, per_layer: bool = False, micro_batches: int = 1
) -> OfBatch[PyTree]:
    """Return ``f(params, x, target)``, the squared norm of each example's own gradient, (N,).

    For a dense layer it is |x_n|^2 |ct_n|^2 (Goodfellow 2015, https://arxiv.org/abs/1510.01799),
    and along positions <X X^T, C C^T>. A per-example gradient is formed only where that costs less
    (long sequences, small weights).

    Args:
        net: the network.
        loss: the loss.
        per_layer: whether the result is like the net's params, with (N,) where a layer's params
            stand (and ``()`` for a layer without); inside ``repeat``, (L, N).
        micro_batches: into how many parts the batch is split.
    """
    return _of_quantity("per_example_sq_norms", net, loss, SqNorms(per_layer), micro_batches)


def gram(
    net: Layer, loss: Loss, *, per_layer: bool = False, micro_batches: int = 1
) -> OfBatch[PyTree]:
    """Return ``f(params, x, target)``, <g_n, g_m> of all pairs of per-example gradients, (N, N).

    Args:
        net: the network.
        loss: the loss.
        per_layer: whether the result is like the net's params, with (N, N) where a layer's params
            stand (and ``()`` for a layer without); inside ``repeat``, (L, N, N).
        micro_batches: 1; examples of two micro-batches never meet, so that another number raises
            ``ValueError``.
    """
    return _of_quantity("gram", net, loss, Gram(per_layer), micro_batches)


def second_moment(net: Layer, loss: Loss, *, micro_batches: int = 1) -> OfBatch[Params]:
    """Return ``f(params, x, target)``, the mean over examples of the squared per-example gradients.

    Like params, in at least float32. Not the square of the gradient: each example's gradient is
    squared first.

    Args:
        net: the network.
        loss: the loss.
        micro_batches: into how many parts the batch is split.
    """
    return _of_quantity("second_moment", net, loss, SecondMoment(), micro_batches)


def variance(net: Layer, loss: Loss, *, micro_batches: int = 1) -> OfBatch[Params]:
    """Return ``f(params, x, target)``, the variance over examples of each entry of the gradient.

    Like params, in at least float32: ``second_moment`` minus the square of the gradient, with N
    (not N - 1) below.

    Args:
        net: the network.
        loss: the loss.
        micro_batches: into how many parts the batch is split.
    """
    return _of_quantity("variance", net, loss, Variance(), micro_batches)


def noise_scale(
    net: Layer,
    loss: Loss,
    *,
    where: Where | str | None = None,
    parts: bool = False,
    axis_name: str | tuple[str, ...] | None = None,
    micro_batches: int = 1,
) -> OfBatch[Any]:
    """Return ``f(params, x, target)``, the simple noise scale tr(S) / |G|^2 from one batch.

    S is the covariance of the per-example gradients and G the true gradient, each replaced by its
    unbiased estimate (McCandlish et al. 2018, https://arxiv.org/abs/1812.06162). It says how large
    a batch is worth its cost. On a small batch the estimate of |G|^2 may come out negative, and the
    ratio with it. ``f`` raises ``ValueError`` for a batch of one.

    Args:
        net: the network.
        loss: the loss.
        where: of which params, such as those of ``(jp.LayerNorm, jp.RMSNorm)``; all by default
            (``jp.quantity.NoiseScale``).
        parts: whether to return tr(S) and |G|^2, a ``jp.quantity.NoiseParts`` to be averaged over
            steps by ``jp.quantity.NoiseAverage``, instead of their ratio.
        axis_name: the axis, or a tuple of axes, of ``jax.shard_map`` that split the batch.
        micro_batches: into how many parts the batch is split.
    """
    asked = NoiseScale(parts=parts, where=where, axis_name=axis_name)
    return _of_quantity("noise_scale", net, loss, asked, micro_batches)


def clipped_grad(
    net: Layer,
    loss: Loss,
    max_norm: float | Array | PyTree,
    noise_multiplier: float | Array = 0.0,
    *,
    per_layer: bool = False,
    two_pass: bool = False,
    drop_nonfinite: bool = False,
    weight: Weight | None = None,
    micro_batches: int = 1,
    aux: bool = False,
    also: Mapping[str, Quantity] | None = None,
) -> OfBatch[tuple[Any, Params]]:
    """Return ``f(params, x, target) -> (value, grads)``, the mean of the clipped gradients.

    With g_n the gradient of example n's own loss, grads is 1/N sum_n g_n min(1, max_norm / |g_n|).
    It can stand for ``value_and_grad`` in ``make_update``. An example whose gradient is not finite
    makes grads not finite, unless it is dropped. Where a net computes in bfloat16, XLA may round an
    array for one of its uses and not for another, and a norm under ``jit`` comes out a little over
    its bound (1e-4 of it was seen).

    Args:
        net: the network. A layer that couples the examples of a batch raises ``ValueError``.
        loss: the loss; ``value`` is its mean, not clipped.
        max_norm: the bound on |g_n|, positive; with ``per_layer`` also a tree with one where each
            layer's params stand.
        noise_multiplier: the standard deviation of the noise of DP-SGD, in units of the bound
            (``jp.quantity.Clipped``). With more than 0, ``f`` takes a key, a new one each step.
        per_layer: whether each layer's part of g_n is bounded by max_norm by itself.
        two_pass: whether to walk back twice, which needs less memory through ``repeat``.
        drop_nonfinite: whether an example whose gradient is not finite counts as a gradient of 0,
            and one whose loss is not as a loss of 0.
        weight: ``weight(norms, max_norm)`` in the place of min(1, max_norm / |g_n|), such as
            ``jp.quantity.automatic`` or ``normalized``; max_norm stays the bound.
        micro_batches: into how many parts the batch is split. Noise is drawn once.
        aux: whether ``f`` returns ``((value, aux), grads)``, with a ``jp.Aux`` that holds the net's
            output, the norms, and the share of the examples that was clipped.
        also: quantities by name, which come back in ``aux.also``, as in ``jp.value_and_grad``.
            Nothing is clipped in them.

    Raises:
        ValueError: for a bound that is not positive, a negative noise_multiplier, per_layer with
            two_pass, and ``also`` without ``aux``; ``f`` raises it for noise without a key.
        TypeError: ``f`` raises it for noise on params narrower than float32.
    """
    asked: dict[str, Quantity] = {
        "mean": Clipped(
            max_norm, noise_multiplier, per_layer, two_pass, drop_nonfinite, True, weight
        )
    }
    if aux:
        asked["y"] = Output()
    if drop_nonfinite:
        asked["finite"] = FiniteLoss()
    f = beside(net, loss, asked, also, micro_batches, aux)

    def value_and_clipped(params: Params, batch: Batch) -> tuple[Any, Params]:
        result, quantities = f(params, batch)
        value = result["finite" if drop_nonfinite else "value"]
        grads, norms, clipped = result["mean"]
        found = Aux(result["y"], norms, clipped, also=quantities) if aux else None
        return (value if found is None else (value, found)), grads

    doc = "Return the loss, and the mean of the clipped gradients."
    return of_batch("clipped_grad", doc, net, value_and_clipped)


def diag_ggn(
    net: Layer,
    loss: Loss,
    *,
    samples: int = 1,
    per_example: bool = False,
    micro_batches: int = 1,
) -> OfBatch[Params]:
    """Return ``f(params, x, target)``, the diagonal of the Gauss-Newton matrix; like params.

    It is exact without a key, by one walk back for each output, and sampled with one.

    Args:
        net: the network.
        loss: the loss.
        samples: how many walks a key samples.
        per_example: whether it is of each example's own loss, behind an example axis. The mean over
            that axis is the diagonal of the mean loss.
        micro_batches: into how many parts the batch is split. Each draws anew.
    """
    exact, sampled = (DiagGGN(number, per_example) for number in (None, samples))
    return _exact_or_sampled("diag_ggn", net, loss, exact, sampled, micro_batches)


def kronecker_factors(
    net: Layer,
    loss: Loss,
    *,
    samples: int = 1,
    positions: Literal["expand", "reduce"] = "expand",
    others: Literal["raise", "skip", "diagonal"] = "raise",
    joint_bias: bool = False,
    micro_batches: int = 1,
) -> OfBatch[Params]:
    """Return ``f(params, x, target)``, the Kronecker factors of each param's Gauss-Newton block.

    Like params, with a ``jp.quantity.Kronecker(a, b)`` at each leaf: KFAC's factors with a key, and
    KFLR's, which are exact, without (``jp.quantity.KroneckerFactors``).

    Args:
        net: the network. A param whose cotangent has no two factors raises ``TypeError``.
        loss: the loss.
        samples: how many walks a key samples.
        positions: "expand" or "reduce", what is made of the positions of a sequence or an image.
        others: what a param without factors has: "raise", "skip" or "diagonal".
        joint_bias: whether a bias is a further row of its layer's matrix.
        micro_batches: into how many parts the batch is split. Each draws anew.
    """
    exact, sampled = (
        KroneckerFactors(number, positions=positions, others=others, joint_bias=joint_bias)
        for number in (None, samples)
    )
    return _exact_or_sampled("kronecker_factors", net, loss, exact, sampled, micro_batches)


def ggn_root(
    net: Layer, loss: Loss, *, samples: int = 1, micro_batches: int = 1
) -> OfBatch[Params]:
    """Return ``f(params, x, target)``, V, like params behind axes (C, N), of each example's GGN.

    Example n's own Gauss-Newton matrix is sum_c V_cn V_cn^T; the mean over n is that of the mean
    loss. C is the number of columns of the loss Hessian's root, or with a key of ``samples``.

    Args:
        net: the network.
        loss: the loss.
        samples: how many walks a key samples.
        micro_batches: into how many parts the batch is split. Each draws anew.
    """
    return _exact_or_sampled("ggn_root", net, loss, GGNRoot(), GGNRoot(samples), micro_batches)


def projected_grads(
    net: Layer,
    loss: Loss,
    rank: int | None = None,
    *,
    key: Array | None = None,
    sides: PyTree = None,
    micro_batches: int = 1,
) -> OfBatch[PyTree]:
    """Return ``f(params, x, target)``, each example's gradient through two thin matrices a param.

    Like params, with (N, K L) at each leaf: left^T g_n right, which is never larger
    (``jp.quantity.Projected``). The gradients of two batches are compared by the inner products of
    these rows, for the same key.

    Args:
        net: the network.
        loss: the loss.
        rank: how many columns a random matrix has.
        key: what they are drawn from, the same for all that is compared.
        sides: given matrices instead, such as those of ``jp.quantity.principal``.
        micro_batches: into how many parts the batch is split.
    """
    asked = Projected(rank, key, sides)
    return _of_quantity("projected_grads", net, loss, asked, micro_batches)


def _of_quantity(
    name: str, net: Layer, loss: Loss, quantity: Quantity, micro_batches: int
) -> OfBatch[Any]:
    """Return the function of a batch that returns one quantity, under the name of its maker."""
    f = alone(net, loss, quantity, micro_batches)
    return of_batch(name, type(quantity).__doc__, net, f)


def _exact_or_sampled(
    name: str, net: Layer, loss: Loss, exact: Quantity, sampled: Any, micro_batches: int
) -> OfBatch[Any]:
    """Return the function of a batch that samples with a key, and is exact without."""
    without_key, with_key = (
        alone(net, loss, quantity, micro_batches) for quantity in (exact, sampled)
    )

    def either(params: Params, batch: Batch) -> Any:
        if batch.key is None:
            check_exact(sampled.samples)
        return (without_key if batch.key is None else with_key)(params, batch)

    return of_batch(name, type(exact).__doc__, net, either)


def check_exact(samples: int) -> None:
    """Raise for samples that are asked for without a key to draw them from."""
    if samples != 1:
        raise TypeError("to sample takes a key; without one the whole root is used")
