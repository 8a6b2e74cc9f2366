"""What may be taken from the factored cotangents: the kinds of quantity.

A per-example quantity is that of each example's *own* loss, so that the mean of the per-example
gradients is the gradient (there is no 1/N in them).
"""

from __future__ import annotations

import abc
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from jaxprop.factored import Factored, is_factored, like, wide
from jaxprop.layer import Total
from jaxprop.of_batch import PerExample, is_marked, unmarked
from jaxprop.static import Static


class Quantity(Static):
    """What is taken at each layer from its params' cotangents, and made of all of it at the end.

    ``take`` gives means over examples, or arrays marked as ``PerExample``, so that what it gives
    for micro-batches (``accumulate``) makes up what it gives for the batch. What is not linear in
    the examples is left to ``settle`` and ``finish``, which see the batch.
    """

    @abc.abstractmethod
    def take(self, params: Any, forms: Any, examples: int) -> Any:
        """At one layer: forms is like params, with each example's own cotangent, factored."""

    def settle(self, taken: Any) -> Any:
        """What is kept of what was taken at a layer, or at those of a ``repeat`` together.

        Either may be asked for, so that it goes entry by entry, or ends in a ``Total``.
        """
        return taken

    def finish(self, settled: Any, examples: int) -> Any:
        """settled is like the net's params, with what was kept where a layer's params stand."""
        del examples
        return unmarked(settled)


class Moments(NamedTuple):
    """Of one param: the gradient, and a second moment of its per-example gradients."""

    mean: Array
    second: Array


class Gradient(Quantity):
    """The gradient of the mean over examples; like params."""

    def take(self, params: Any, forms: Any, examples: int) -> Any:
        return jax.tree.map(lambda p, form: like(p, _mean(form, examples)), params, forms)


class PerExampleGrads(Quantity):
    """Each example's gradient; like params, behind an example axis."""

    def take(self, params: Any, forms: Any, examples: int) -> Any:
        def each(p: Array, form: Factored) -> PerExample:
            return PerExample(form.per_example().astype(p.dtype), axis=-1 - p.ndim)

        return jax.tree.map(each, params, forms)

    def finish(self, settled: Any, examples: int) -> Any:
        """Behind the example axis come the layers of a ``repeat``, as in params."""

        def ahead(each: PerExample) -> Array:
            return jnp.moveaxis(each.value, each.axis, 0)

        return jax.tree.map(ahead, settled, is_leaf=is_marked)


class SqNorms(Quantity):
    """|g_n|^2, (N,): over all params, or for each layer where its params stand (``per_layer``)."""

    per_layer: bool = False

    def take(self, params: Any, forms: Any, examples: int) -> Any:
        norms = PerExample(total(lambda form: form.sq_norms(), forms), axis=-1)
        return norms if self.per_layer else Total(norms)

    def finish(self, settled: Any, examples: int) -> Any:
        norms = unmarked(settled)
        return norms if self.per_layer else everything(norms)


class Gram(Quantity):
    """<g_n, g_m> over all params, (N, N)."""

    def take(self, params: Any, forms: Any, examples: int) -> Any:
        return Total(total(lambda form: form.inner_products(), forms))

    def finish(self, settled: Any, examples: int) -> Any:
        return everything(settled)


class SecondMoment(Quantity):
    """The mean over examples of g_n^2, elementwise; like params, in at least float32."""

    def take(self, params: Any, forms: Any, examples: int) -> Any:
        return jax.tree.map(lambda _, form: form.second_moment() / examples, params, forms)


class Variance(Quantity):
    """The mean over examples of (g_n - mean)^2, elementwise: second moment - gradient^2."""

    def take(self, params: Any, forms: Any, examples: int) -> Any:
        def moments(_: Array, form: Factored) -> Moments:
            return Moments(_mean(form, examples), form.second_moment() / examples)

        return jax.tree.map(moments, params, forms)

    def settle(self, taken: Any) -> Any:
        def variance(of: Moments) -> Array:
            square = of.mean.astype(of.second.dtype) ** 2
            return jnp.maximum(of.second - square, 0)  # of equal examples it is rounding alone

        return jax.tree.map(variance, taken, is_leaf=_is_moments)


class NoiseScale(Quantity):
    """tr(S) / |G|^2, with S the covariance of g_n and G its mean, each by its unbiased estimate.

    With m the mean of |g_n|^2 and g the gradient, E m = |G|^2 + tr S and E |g|^2 = |G|^2 + tr S / N
    give tr S = (m - |g|^2) N / (N - 1) and |G|^2 = (N |g|^2 - m) / (N - 1): the simple noise scale
    of McCandlish et al. 2018 (https://arxiv.org/abs/1812.06162, appendix A), from one batch.
    """

    def take(self, params: Any, forms: Any, examples: int) -> Any:
        def moments(_: Array, form: Factored) -> Moments:
            return Moments(wide(_mean(form, examples)), jnp.mean(form.sq_norms()))

        return jax.tree.map(moments, params, forms)

    def settle(self, taken: Any) -> Any:
        return Total(total(lambda of: jnp.stack([jnp.sum(of.second), jnp.sum(of.mean**2)]), taken))

    def finish(self, settled: Any, examples: int) -> Array:
        if examples < 2:
            raise ValueError("the noise scale is estimated from at least 2 examples, not 1")
        mean_of_squares, square_of_mean = everything(settled)
        trace = (mean_of_squares - square_of_mean) * examples / (examples - 1)
        return trace * (examples - 1) / (examples * square_of_mean - mean_of_squares)


def _mean(form: Factored, examples: int) -> Array:
    return form.weighted_sum(jnp.full(examples, 1 / examples))


def total(f: Callable[[Any], Array], forms: Any) -> Any:
    """f summed over the leaves, which may be forms or moments; () where there are none."""
    leaves = jax.tree.leaves(forms, is_leaf=lambda node: is_factored(node) or _is_moments(node))
    return sum(map(f, leaves[1:]), start=f(leaves[0])) if leaves else ()


def everything(taken: Any) -> Array:
    """The sum of what was taken at the layers. Raises ``ValueError`` for a net without params."""
    leaves: list[Array] = jax.tree.leaves(taken)
    if not leaves:
        raise ValueError("the net has no params, so that there is no gradient to ask about")
    return sum(leaves[1:], start=leaves[0])


def _is_moments(node: object) -> bool:
    return isinstance(node, Moments)
