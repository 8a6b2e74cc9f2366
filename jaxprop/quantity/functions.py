"""Functions for a single quantity each, such as ``jp.per_example_sq_norms``.

The scalar loss is the mean over the N examples. A per-example quantity refers to each example's
*own* loss, without the 1/N of the mean, so that the mean of the per-example gradients is the
gradient.

Like ``jp.value_and_grad``, each function here takes a net and a loss and returns a function of
(params, x, target). Layers whose cotangents are not factored work too: their backward then runs one
example at a time. A layer that couples the examples of a batch has no per-example gradient, and
raises ``ValueError``. A user's own layer is tried on two examples, to detect one that couples them
without declaring it.
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
from jaxprop.quantity.also import alongside
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
    """Return ``f(params, x, target)``, which computes each example's own gradient.

    The result is like params, with a leading example axis. Its mean over that axis is the gradient.

    Args:
        net: the network.
        loss: the loss.
        micro_batches: the number of parts to split the batch into.
    """
    return _of_quantity("per_example_grads", net, loss, PerExampleGrads(), micro_batches)


def per_example_sq_norms(
    net: Layer, loss: Loss, *, per_layer: bool = False, micro_batches: int = 1
) -> OfBatch[PyTree]:
    """Return ``f(params, x, target)``, which computes each example's squared gradient norm, (N,).

    For a dense layer it is |x_n|^2 |ct_n|^2 (Goodfellow 2015, https://arxiv.org/abs/1510.01799), or
    along positions <X X^T, C C^T>. Per-example gradients are materialized only where that costs
    less (long sequences, small weights).

    Args:
        net: the network.
        loss: the loss.
        per_layer: whether to return a tree like the net's params, with (N,) in place of each
            layer's params (``()`` for a layer without params); inside ``repeat``, (L, N).
        micro_batches: the number of parts to split the batch into.
    """
    return _of_quantity("per_example_sq_norms", net, loss, SqNorms(per_layer), micro_batches)


def gram(
    net: Layer, loss: Loss, *, per_layer: bool = False, micro_batches: int = 1
) -> OfBatch[PyTree]:
    """Return ``f(params, x, target)``, which computes <g_n, g_m> for all pairs of examples, (N, N).

    Args:
        net: the network.
        loss: the loss.
        per_layer: whether to return a tree like the net's params, with (N, N) in place of each
            layer's params (``()`` for a layer without params); inside ``repeat``, (L, N, N).
        micro_batches: 1; any other number raises ``ValueError``, since the examples of two
            micro-batches never meet.
    """
    return _of_quantity("gram", net, loss, Gram(per_layer), micro_batches)


def second_moment(net: Layer, loss: Loss, *, micro_batches: int = 1) -> OfBatch[Params]:
    """Return ``f(params, x, target)``, which computes the mean of squared per-example gradients.

    The result is like params, in at least float32. It is not the square of the gradient: each
    example's gradient is squared before the mean.

    Args:
        net: the network.
        loss: the loss.
        micro_batches: the number of parts to split the batch into.
    """
    return _of_quantity("second_moment", net, loss, SecondMoment(), micro_batches)


def variance(net: Layer, loss: Loss, *, micro_batches: int = 1) -> OfBatch[Params]:
    """Return ``f(params, x, target)``, which computes the variance over examples of each entry.

    The result is like params, in at least float32: ``second_moment`` minus the square of the
    gradient, with N, not N - 1, in the denominator.

    Args:
        net: the network.
        loss: the loss.
        micro_batches: the number of parts to split the batch into.
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
    """Return ``f(params, x, target)``, which estimates the simple noise scale tr(S) / |G|^2.

    S is the covariance of the per-example gradients and G the true gradient; each part is estimated
    without bias from one batch (McCandlish et al. 2018, https://arxiv.org/abs/1812.06162). The
    noise scale tells up to what size a batch is worth its cost. On a small batch the estimate of
    |G|^2, and with it the ratio, may be negative. ``f`` raises ``ValueError`` for a batch of one.

    Args:
        net: the network.
        loss: the loss.
        where: which params to include, such as those of ``(jp.LayerNorm, jp.RMSNorm)``; all by
            default (``jp.quantity.NoiseScale``).
        parts: whether to return, instead of the ratio, tr(S) and |G|^2 as a
            ``jp.quantity.NoiseParts``, which ``jp.quantity.NoiseAverage`` averages over steps.
        axis_name: the ``jax.shard_map`` axis, or tuple of axes, that splits the batch.
        micro_batches: the number of parts to split the batch into.
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
    """Return ``f(params, x, target) -> (value, grads)``, with the mean of the clipped gradients.

    With g_n the gradient of example n's own loss, grads is 1/N sum_n g_n min(1, max_norm / |g_n|).
    It can replace ``value_and_grad`` in ``make_update``. An example whose gradient is not finite
    makes grads not finite, unless it is dropped. In a net that computes in bfloat16, XLA may round
    an array for one use and not for another, so that under ``jit`` a clipped norm may slightly
    exceed its bound (by 1e-4 of it, as measured).

    Args:
        net: the network. A layer that couples the examples of a batch raises ``ValueError``.
        loss: the loss; ``value`` is its mean, without clipping.
        max_norm: the bound on |g_n|, positive; with ``per_layer`` also a tree with a bound in place
            of each layer's params.
        noise_multiplier: the standard deviation of DP-SGD's noise, in units of the bound
            (``jp.quantity.Clipped``). If it is above 0, ``f`` takes a key, a new one each step.
        per_layer: whether to bound each layer's part of g_n by max_norm separately.
        two_pass: whether to walk back twice, which needs less memory in ``repeat``.
        drop_nonfinite: whether to count a gradient that is not finite as 0, and a loss that is not
            finite as 0.
        weight: a function ``weight(norms, max_norm)`` to use instead of min(1, max_norm / |g_n|),
            such as ``jp.quantity.automatic`` or ``normalized``; max_norm remains the bound.
        micro_batches: the number of parts to split the batch into. Noise is drawn once.
        aux: whether ``f`` returns ``((value, aux), grads)``, with a ``jp.Aux`` that holds the net's
            output, the norms, and the share of examples that were clipped.
        also: extra quantities by name, returned in ``aux.also`` as in ``jp.value_and_grad``. They
            are computed from gradients that are not clipped.

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
    f = alongside(net, loss, asked, also, micro_batches, aux)

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
    """Return ``f(params, x, target)``, which computes the diagonal of the Gauss-Newton matrix.

    The result is like params. Without a key it is exact, from one walk back per output; with a key
    it is sampled.

    Args:
        net: the network.
        loss: the loss.
        samples: how many walks to sample if ``f`` is given a key.
        per_example: whether to return the diagonal for each example's own loss, with a leading
            example axis. The mean over that axis is the diagonal for the mean loss.
        micro_batches: the number of parts to split the batch into. Each draws its own samples.
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
    """Return ``f(params, x, target)``, which computes Kronecker factors of Gauss-Newton blocks.

    The result is like params, with a ``jp.quantity.Kronecker(a, b)`` at each leaf for that param's
    block: KFAC's factors if ``f`` is given a key, and otherwise KFLR's, which are exact
    (``jp.quantity.KroneckerFactors``).

    Args:
        net: the network. A param whose cotangent has no two factors raises ``TypeError``.
        loss: the loss.
        samples: how many walks to sample if ``f`` is given a key.
        positions: "expand" or "reduce", how to treat the positions of a sequence or an image.
        others: what to do for a param without factors: "raise", "skip" or "diagonal".
        joint_bias: whether to treat a bias as one more row of its layer's matrix.
        micro_batches: the number of parts to split the batch into. Each draws its own samples.
    """
    exact, sampled = (
        KroneckerFactors(number, positions=positions, others=others, joint_bias=joint_bias)
        for number in (None, samples)
    )
    return _exact_or_sampled("kronecker_factors", net, loss, exact, sampled, micro_batches)


def ggn_root(
    net: Layer, loss: Loss, *, samples: int = 1, micro_batches: int = 1
) -> OfBatch[Params]:
    """Return ``f(params, x, target)``, which computes a root V of each example's GGN matrix.

    V is like params, with leading axes (C, N). Example n's own Gauss-Newton matrix is
    sum_c V_cn V_cn^T; the mean over n is the matrix of the mean loss. C is the number of columns of
    the loss Hessian's root or, if ``f`` is given a key, ``samples``.

    Args:
        net: the network.
        loss: the loss.
        samples: how many walks to sample if ``f`` is given a key.
        micro_batches: the number of parts to split the batch into. Each draws its own samples.
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
    """Return ``f(params, x, target)``, which projects gradients by two thin matrices per param.

    The result is like params, with (N, K L) at each leaf: left^T g_n right for each example's
    gradient g_n, which is never larger than g_n (``jp.quantity.Projected``). Inner products of
    these rows compare the gradients of two batches, if both use the same key.

    Args:
        net: the network.
        loss: the loss.
        rank: how many columns a random matrix has.
        key: the key to draw the matrices from, the same for all batches that are compared.
        sides: matrices to use instead of random ones, such as from ``jp.quantity.principal``.
        micro_batches: the number of parts to split the batch into.
    """
    asked = Projected(rank, key, sides)
    return _of_quantity("projected_grads", net, loss, asked, micro_batches)


def _of_quantity(
    name: str, net: Layer, loss: Loss, quantity: Quantity, micro_batches: int
) -> OfBatch[Any]:
    """Return the function of a batch that computes one quantity, named after its maker."""
    f = alone(net, loss, quantity, micro_batches)
    return of_batch(name, type(quantity).__doc__, net, f)


def _exact_or_sampled(
    name: str, net: Layer, loss: Loss, exact: Quantity, sampled: Any, micro_batches: int
) -> OfBatch[Any]:
    """Return the function of a batch that samples if given a key, and is exact otherwise."""
    without_key, with_key = (
        alone(net, loss, quantity, micro_batches) for quantity in (exact, sampled)
    )

    def either(params: Params, batch: Batch) -> Any:
        if batch.key is None:
            check_exact(sampled.samples)
        return (without_key if batch.key is None else with_key)(params, batch)

    return of_batch(name, type(exact).__doc__, net, either)


def check_exact(samples: int) -> None:
    """Raise ``TypeError`` for samples that are requested without a key to draw them from."""
    if samples != 1:
        raise TypeError("sampling takes a key; without one the whole root is used")
