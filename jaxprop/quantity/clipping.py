"""Clipping: each example's own gradient is bounded before the mean is taken."""

from __future__ import annotations

import math
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float

from jaxprop.core.combinator import layers_with_params
from jaxprop.core.mesh import like
from jaxprop.core.step import Total
from jaxprop.core.tree import without_unmarked
from jaxprop.core.types import Params, PyTree
from jaxprop.quantity.base import Batch, PerExample, Quantity, everything, total, unmarked

NOISE = 0x6E6F6973  # folded into the key, so that noise is drawn apart from what the layers draw


class Clipped(Quantity):
    """The mean of clipped gradients, 1/N sum_n g_n min(1, max_norm / |g_n|); like params.

    The g_n are not kept: one walk back leaves the factors, the norms come from them, and so does
    the weighted sum. An example whose gradient is not finite makes the mean not finite.

    With a noise_multiplier it is DP-SGD (Abadi et al. 2016, https://arxiv.org/abs/1607.00133):
    normal noise of standard deviation noise_multiplier * max_norm is added to each entry of the
    *sum* of clipped gradients before the division by N. This is the definition of
    ``optax.contrib.differentially_private_aggregate``, and of the accountants that take a noise
    multiplier.

    Attributes:
        max_norm: the bound on |g_n|, positive.
        noise_multiplier: the standard deviation of the noise in units of the bound. With more than
            0 the function takes a key, a new one each step, and raises ``TypeError`` for params
            narrower than float32, which would round the noise away.
        per_layer: whether each layer's part of g_n is bounded by max_norm by itself. The whole of L
            layers with params is then bounded by sqrt(L) max_norm, and the noise is that much
            larger.
        two_pass: whether to walk back twice, for the norms and then for the sum, so that no
            layer's cotangents are needed after it. Through ``repeat`` this saves their memory; for
            unrolled layers it is up to XLA's schedule, which on a CPU goes back through the whole
            chain first, and saves nothing.
    """

    max_norm: float
    noise_multiplier: float = 0.0
    per_layer: bool = False
    two_pass: bool = False

    like_params: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if isinstance(self.max_norm, int | float | np.generic) and not self.max_norm > 0:
            raise ValueError(f"max_norm must be positive, not {self.max_norm}")
        if not self.noise_multiplier >= 0:
            raise ValueError(f"noise_multiplier must not be negative, not {self.noise_multiplier}")
        if self.per_layer and self.two_pass:
            raise ValueError("per_layer needs one pass: a layer's norms are known at that layer")

    @property
    def before(self) -> Quantity | None:
        return BoundingSqNorms() if self.two_pass else None

    def take(self, params: Params, forms: PyTree, examples: int, before: PyTree = None) -> PyTree:
        if self.two_pass:
            return _mean(params, forms, self._weights(before))
        if self.per_layer and jax.tree.leaves(params):
            sq_norms = everything(total(lambda form: form.bounding_sq_norms(), forms))
            return _mean(params, forms, self._weights(sq_norms))
        return forms

    def gather(self, params: Params, taken: PyTree, examples: int) -> PyTree:
        if not self.two_pass and not self.per_layer:
            sq_norms = everything(total(lambda form: form.bounding_sq_norms(), taken))
            taken = _mean(without_unmarked(params, taken), taken, self._weights(sq_norms))
        if not jax.tree.leaves(taken):
            everything(taken)
        return taken

    def end(self, settled: PyTree, batch: Batch) -> PyTree:
        if self.noise_multiplier:
            settled = self._noisy(settled, batch)
        return super().end(settled, batch)

    def _weights(self, sq_norms: Float[Array, " n"]) -> Float[Array, " n"]:
        """Return min(1, max_norm / |g_n|) / N."""
        tiny = jnp.finfo(sq_norms.dtype).tiny
        scale = self.max_norm * jax.lax.rsqrt(jnp.maximum(sq_norms, tiny))
        return jnp.minimum(1, scale) / sq_norms.size

    def _noisy(self, grads: PyTree, batch: Batch) -> PyTree:
        leaves, structure = jax.tree.flatten(grads)
        if batch.key is None:
            raise ValueError("a noise_multiplier needs a key, a new one each step")
        if any(leaf.dtype.itemsize < 4 for leaf in leaves):
            raise TypeError("noise is for params of float32 or float64: narrower ones round it")
        layers = layers_with_params(batch.net, batch.params) if self.per_layer else 1
        bound = self.max_norm * math.sqrt(layers)
        deviation = self.noise_multiplier * bound / batch.examples
        keys = jax.random.split(jax.random.fold_in(batch.key, NOISE), len(leaves))
        noisy = [
            leaf + (deviation * jax.random.normal(key, leaf.shape)).astype(leaf.dtype)
            for key, leaf in zip(keys, leaves, strict=True)
        ]
        return jax.tree.unflatten(structure, noisy)


class BoundingSqNorms(Quantity):
    """|g_n|^2 over all params, in a way that cannot cancel; (N,)."""

    def take(self, params: Params, forms: PyTree, examples: int) -> PyTree:
        return Total(PerExample(total(lambda form: form.bounding_sq_norms(), forms), axis=-1))

    def finish(self, settled: PyTree, examples: int) -> Float[Array, " n"]:
        return everything(unmarked(settled))


def _mean(params: Params, forms: PyTree, weights: Float[Array, " n"]) -> PyTree:
    return jax.tree.map(lambda param, form: like(param, form.weighted_sum(weights)), params, forms)
