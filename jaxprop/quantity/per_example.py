"""Quantities of each example's own gradient: their mean, their norms, their moments."""

from __future__ import annotations

import abc
from collections.abc import Callable
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from jaxprop.core.arrays import known, wide
from jaxprop.core.batch import Examples
from jaxprop.core.checks import check_flags
from jaxprop.core.forms import Factored
from jaxprop.core.mesh import like
from jaxprop.core.step import Total
from jaxprop.core.types import Params, PyTree
from jaxprop.core.walk import Forward
from jaxprop.quantity.base import (
    PerExample,
    Quantity,
    everything,
    is_marked,
    of_examples,
    total,
    unmarked,
)


class Moments(NamedTuple):
    """The gradient of one param, and a second moment of its per-example gradients."""

    mean: Array
    second: Array


class Gradient(Quantity):
    """The gradient of the mean over examples; like params."""

    layerwise: ClassVar[bool] = True
    like_params: ClassVar[bool] = True

    def take(self, params: Params, forms: PyTree, examples: Examples) -> PyTree:
        return jax.tree.map(lambda p, form: like(p, _mean(form, examples)), params, forms)


class OfForward(Quantity):
    """A quantity that is taken of the pass forward alone."""

    layerwise: ClassVar[bool] = True

    @abc.abstractmethod
    def of_forward(self, ahead: Forward) -> PyTree:
        """Return what is taken, a mean over examples or marked as ``PerExample``."""

    def take(self, params: Params, forms: PyTree, examples: Examples) -> PyTree:
        return ()


class Output(OfForward):
    """The net's output y, for an accuracy, say."""

    def of_forward(self, ahead: Forward) -> PyTree:
        return of_examples(ahead.y)


class FiniteLoss(OfForward):
    """The mean of the loss, with 0 for the examples whose loss is not finite."""

    def of_forward(self, ahead: Forward) -> Float[Array, ""]:
        finite = jnp.where(jnp.isfinite(ahead.values), ahead.values, 0)
        return ahead.examples.mean(finite)


class PerExampleGrads(Quantity):
    """Each example's gradient g_n; like params, behind an example axis."""

    layerwise: ClassVar[bool] = True
    like_params: ClassVar[bool] = True
    axes: ClassVar[int] = 1

    def take(self, params: Params, forms: PyTree, examples: Examples) -> PyTree:
        return per_example(params, forms)

    def finish(self, settled: PyTree, examples: Examples) -> PyTree:
        """Behind the example axis come the layers of a ``repeat``, as in params."""
        return jax.tree.map(
            lambda each: jnp.moveaxis(each.value, each.axis, 0), settled, is_leaf=is_marked
        )


class SqNorms(Quantity):
    """The squared norm of each example's gradient, |g_n|^2.

    Attributes:
        per_layer: False for (N,), over all params; True for one (N,) a layer, where its params
            stand.
    """

    per_layer: bool = False

    def __post_init__(self) -> None:
        check_flags(self, "per_layer")

    @property
    def layerwise(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return not self.per_layer

    def take(self, params: Params, forms: PyTree, examples: Examples) -> PyTree:
        norms = PerExample(total(lambda form: form.sq_norms(), forms), axis=-1)
        return norms if self.per_layer else Total(norms)

    def finish(self, settled: PyTree, examples: Examples) -> PyTree:
        norms = unmarked(settled)
        return norms if self.per_layer else everything(norms)


class Gram(Quantity):
    """The inner products <g_n, g_m> of all pairs of examples, over all params; (N, N)."""

    layerwise: ClassVar[bool] = True
    of_pairs: ClassVar[bool] = True

    def take(self, params: Params, forms: PyTree, examples: Examples) -> PyTree:
        return Total(total(lambda form: form.inner_products(), forms))

    def finish(self, settled: PyTree, examples: Examples) -> Float[Array, "n n"]:
        return everything(settled)


class SecondMoment(Quantity):
    """The mean over examples of g_n^2, elementwise; like params, in at least float32."""

    layerwise: ClassVar[bool] = True
    like_params: ClassVar[bool] = True

    def take(self, params: Params, forms: PyTree, examples: Examples) -> PyTree:
        return jax.tree.map(lambda _, form: _mean_of_squares(form, examples), params, forms)


class Variance(Quantity):
    """The mean over examples of (g_n - mean)^2, elementwise: second moment - gradient^2.

    Like params, in at least float32. It raises ``ValueError`` for a divisor that was given: what is
    divided by it is no mean.
    """

    layerwise: ClassVar[bool] = True
    like_params: ClassVar[bool] = True

    def take(self, params: Params, forms: PyTree, examples: Examples) -> PyTree:
        def moments(_: Array, form: Factored) -> Moments:
            return Moments(_mean(form, examples), _mean_of_squares(form, examples))

        return jax.tree.map(moments, params, forms)

    def settle(self, taken: PyTree) -> PyTree:
        def variance(of: Moments) -> Array:
            square = of.mean.astype(of.second.dtype) ** 2
            return jnp.maximum(of.second - square, 0)  # of equal examples it is rounding alone

        return _map_moments(variance, taken)

    def finish(self, settled: PyTree, examples: Examples) -> PyTree:
        if examples.given is not None:
            raise ValueError(
                "the variance is around the mean of the batch: leave out the divisor, or ask for "
                "the second moment"
            )
        return settled


class NoiseScale(Quantity):
    """tr(S) / |G|^2, with S the covariance of g_n and G its mean, each by its unbiased estimate.

    With m the mean of |g_n|^2 and g the gradient, E m = |G|^2 + tr S and E |g|^2 = |G|^2 + tr S / N
    give tr S = (m - |g|^2) N / (N - 1) and |G|^2 = (N |g|^2 - m) / (N - 1): the simple noise scale
    of McCandlish et al. 2018 (https://arxiv.org/abs/1812.06162, appendix A), from one batch. Where
    example n counts w_n, E |g|^2 = |G|^2 + tr S sum_n w_n^2 / (sum_n w_n)^2, so that
    (sum_n w_n)^2 / sum_n w_n^2 stands for N.
    """

    layerwise: ClassVar[bool] = True

    def take(self, params: Params, forms: PyTree, examples: Examples) -> PyTree:
        def moments(_: Array, form: Factored) -> Moments:
            form = form.compact()
            return Moments(wide(_mean(form, examples)), examples.mean(form.sq_norms()))

        return jax.tree.map(moments, params, forms)

    def settle(self, taken: PyTree) -> PyTree:
        each = jax.tree.leaves(
            _map_moments(lambda of: jnp.stack([jnp.sum(of.second), jnp.sum(of.mean**2)]), taken)
        )
        return Total(sum(each[1:], start=each[0]) if each else ())

    def finish(self, settled: PyTree, examples: Examples) -> Float[Array, ""]:
        if known(lambda: examples.number < 2):
            words = "the noise scale is estimated from at least 2 examples"
            raise ValueError(f"{words}, not {examples.number}")
        mean_of_squares, square_of_mean = everything(settled)
        n = examples.number
        if examples.weights is not None:
            n = examples.total**2 / jnp.sum(examples.weights**2)
            n = n.astype(mean_of_squares.dtype)
        if examples.given is not None:  # then neither is a mean yet
            scale = examples.to_mean().astype(mean_of_squares.dtype)
            mean_of_squares, square_of_mean = mean_of_squares * scale, square_of_mean * scale**2
        trace = (mean_of_squares - square_of_mean) * n / (n - 1)
        return trace * (n - 1) / (n * square_of_mean - mean_of_squares)


def per_example(params: Params, forms: PyTree) -> PyTree:
    """Return g_n of each form in its param's dtype, marked, so that ``repeat`` may stack it."""

    def each(p: Array, form: Factored) -> PerExample:
        return PerExample(form.per_example().astype(jnp.result_type(p)), axis=-1 - jnp.ndim(p))

    return jax.tree.map(each, params, forms)


def _mean(form: Factored, examples: Examples) -> Array:
    return form.weighted_sum(examples.shares())


def _mean_of_squares(form: Factored, examples: Examples) -> Array:
    return examples.over(rooted(form, examples).second_moment())


def rooted(form: Factored, examples: Examples) -> Factored:
    """Return the form with the root of its weight in each example, for sums of squares."""
    return form if examples.weights is None else form.scaled(jnp.sqrt(examples.weights))


def _map_moments(f: Callable[[Moments], Array], taken: PyTree) -> PyTree:
    return jax.tree.map(f, taken, is_leaf=lambda node: isinstance(node, Moments))
