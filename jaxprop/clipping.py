"""Clipped gradients: each example's own gradient is bounded before the mean is taken."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float

from jaxprop.backprop import ahead, check_net_and_loss, own_gradient, walk
from jaxprop.factored import factored, like
from jaxprop.layer import Layer, Step, Total
from jaxprop.losses import Loss
from jaxprop.of_batch import OfBatch
from jaxprop.quantities import Taken, picked
from jaxprop.quantity import everything, total
from jaxprop.seats import learned


def clipped_grad(
    net: Layer,
    loss: Loss,
    max_norm: float,
    noise_multiplier: float = 0.0,
    *,
    per_layer: bool = False,
    two_pass: bool = False,
) -> OfBatch:
    """``f(params, x, target, key=None) -> (value, grads)``: the mean of clipped gradients.

    With g_n the gradient of example n's own loss, grads is 1/N sum_n g_n min(1, max_norm / |g_n|),
    and the g_n are not kept: one walk back leaves the factors, the norms come from them, and so
    does the weighted sum. An example whose gradient is not finite makes grads not finite. Where a
    net computes in bfloat16, XLA may round an array for one of its uses and not for another, and a
    norm under ``jit`` comes out a little over its bound (1e-4 of it was seen).

    Args:
        net: the network. A layer that couples the examples of a batch raises ``ValueError``.
        loss: the loss; ``value`` is its mean, not clipped.
        max_norm: the bound on |g_n|, positive.
        noise_multiplier: with more than 0, DP-SGD (Abadi et al. 2016,
            https://arxiv.org/abs/1607.00133): normal noise of standard deviation
            noise_multiplier * max_norm is added to each entry of the *sum* of clipped gradients
            before the division by N. This is the definition of
            ``optax.contrib.differentially_private_aggregate`` and of the accountants that take a
            noise multiplier. It needs a ``key``, a new one each step, and raises ``TypeError`` for
            params narrower than float32, which would round the noise away.
        per_layer: bound each layer's part of g_n by max_norm by itself. The whole of L layers with
            params is then bounded by sqrt(L) max_norm, and the noise is that much larger.
        two_pass: walk back twice, for the norms and then for the sum, so that no layer's
            cotangents are needed after it, where one pass needs them all until the norms are
            known. Through ``repeat`` this saves their memory; for unrolled layers it is up to XLA's
            schedule, which on a CPU goes back through the whole chain first, and saves nothing.

    Returns:
        ``f``, whose grads are like params. Without noise it can stand for ``value_and_grad`` in
        ``make_update``.
    """
    if isinstance(max_norm, int | float | np.generic) and not max_norm > 0:
        raise ValueError(f"max_norm must be positive, not {max_norm}")
    if not noise_multiplier >= 0:
        raise ValueError(f"noise_multiplier must not be negative, not {noise_multiplier}")
    if per_layer and two_pass:
        raise ValueError("per_layer needs one pass: a layer's norms are known at that layer")
    check_net_and_loss(net, loss)
    clip = _by_layer if per_layer else _in_two_passes if two_pass else _in_one_pass

    def finish(
        parts: _Clipped, examples: int, params: Any, key: chex.PRNGKey | None = None
    ) -> tuple[Array, Any]:
        value, grads, layers = parts
        if noise_multiplier:
            if key is None:
                raise ValueError("a noise_multiplier needs a key, a new one each step")
            if any(leaf.dtype.itemsize < 4 for leaf in jax.tree.leaves(grads)):
                raise TypeError("noise is for params of float32 or float64: narrower ones round it")
            sensitivity = max_norm * jnp.sqrt(layers)
            grads = _noisy(key, grads, noise_multiplier * sensitivity / examples)
        return value, grads

    return OfBatch(clip(net, loss, max_norm), finish)


class _Clipped(NamedTuple):
    """Means over examples: the value, the clipped gradient, and how often max_norm bounds it."""

    value: Array
    grads: Any
    layers: Array


_Clip = Callable[..., _Clipped]


def _in_one_pass(net: Layer, loss: Loss, max_norm: float) -> _Clip:
    back = walk(net, loss, factored, own_gradient)

    def clipped(params: Any, x: Any, target: Any, key: Any = None) -> _Clipped:
        value, forms, _ = back(params, x, target)
        sq_norms = total(lambda form: form.bounding_sq_norms(), forms)
        weights = _weights(everything(sq_norms), max_norm)
        return _Clipped(value, _clipped_mean(learned(params, forms), forms, weights), jnp.ones(()))

    return clipped


def _in_two_passes(net: Layer, loss: Loss, max_norm: float) -> _Clip:
    def norms(step: Step) -> Any:
        return Total(total(lambda form: form.bounding_sq_norms(), factored(step)))

    def clipped(params: Any, x: Any, target: Any, key: Any = None) -> _Clipped:
        value, examples, residuals, pull = ahead(net, loss, params, x, target)
        ct = own_gradient(loss, residuals, examples)
        left, _ = pull(ct, norms)
        weights = _weights(everything(left), max_norm)
        grads, _ = pull(ct, lambda step: _clipped_mean(step.params, factored(step), weights))
        return _Clipped(value, grads, jnp.ones(()))

    return clipped


def _by_layer(net: Layer, loss: Loss, max_norm: float) -> _Clip:
    def leave(step: Step) -> Any:
        forms = factored(step)
        if not jax.tree.leaves(step.params):
            return Taken({"grads": step.params, "layers": ()})
        sq_norms = total(lambda form: form.bounding_sq_norms(), forms)
        grads = _clipped_mean(step.params, forms, _weights(sq_norms, max_norm))
        return Taken({"grads": grads, "layers": Total(jnp.ones(()))})

    back = walk(net, loss, leave, own_gradient)

    def clipped(params: Any, x: Any, target: Any, key: Any = None) -> _Clipped:
        value, left, _ = back(params, x, target)
        layers = everything(picked(left, "layers"))
        return _Clipped(value, picked(left, "grads"), layers)

    return clipped


def _weights(sq_norms: Float[Array, " n"], max_norm: float) -> Float[Array, " n"]:
    """min(1, max_norm / |g_n|) / N."""
    tiny = jnp.finfo(sq_norms.dtype).tiny
    return jnp.minimum(1, max_norm * jax.lax.rsqrt(jnp.maximum(sq_norms, tiny))) / sq_norms.size


def _clipped_mean(params: Any, forms: Any, weights: Float[Array, " n"]) -> Any:
    return jax.tree.map(lambda param, form: like(param, form.weighted_sum(weights)), params, forms)


def _noisy(key: chex.PRNGKey, grads: Any, deviation: Any) -> Any:
    leaves, structure = jax.tree.flatten(grads)
    keys = jax.random.split(key, len(leaves))
    noisy = [
        leaf + (deviation * jax.random.normal(k, leaf.shape)).astype(leaf.dtype)
        for k, leaf in zip(keys, leaves, strict=True)
    ]
    return jax.tree.unflatten(structure, noisy)
