"""Quantities computed from each example's own gradient: mean, norms and moments."""

from __future__ import annotations

import abc
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from jaxprop.core.arrays import wide
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
    examples_at,
    map_forms,
    of_examples,
    total,
    unmarked,
)


class Moments(NamedTuple):
    """Means over a batch, or over one of its micro-batches.

    Attributes:
        part: W, the total weight of the examples over the divisor of their sums.
        mean: W times the mean.
        square: W times the square of the mean, of each entry or summed over entries; None for a
            whole batch, where the mean does not vary between micro-batches.
        within: W times the variance around the mean, of each entry or summed over entries.
    """

    part: Array
    mean: Array
    square: Array | None
    within: Array

    @classmethod
    def of(cls, form: Factored, examples: Examples, entries: bool) -> Moments:
        """Return the moments of one param.

        Args:
            form: its form.
            examples: the number of examples, and their weights in a mean.
            entries: whether to keep the squares of each entry, instead of their sum.
        """
        mean = wide(_mean(form, examples))
        counted = examples.number if examples.weights is None else jnp.sum(examples.weights)
        part = jnp.asarray(counted, mean.dtype) / jnp.asarray(examples.divisor, mean.dtype)
        center = mean / jnp.where(part == 0, 1, part)
        square = mean * center if entries else jnp.sum(mean * center)
        second = _mean_of_squares(form, examples) if entries else examples.mean(form.sq_norms())
        apart = second.astype(mean.dtype) - square

        def around() -> Array:
            squares = form.squares_around(center, examples.shares()).astype(mean.dtype)
            return squares if entries else squares.sum()

        holds = jnp.all((apart >= CANCELLED * square) | (square == 0))
        within = jax.lax.cond(holds, lambda: apart, around)
        return cls(part, mean, None if examples.whole else square, within)

    def variance(self) -> Array:
        """Return the variance of each entry around the mean over all micro-batches."""
        return self.within + self._between(self.mean**2)

    def spread(self) -> Float[Array, "... 2"]:
        """Return the variance summed over all entries, and the squared norm of the mean.

        Both are those of true means, whatever the divisor.
        """
        square = jnp.sum(self.mean**2, axis=tuple(range(self.within.ndim, self.mean.ndim)))
        variance, part = self.within + self._between(square), self._whole_part()
        return jnp.stack([variance / part, square / part**2], axis=-1)

    def _between(self, square_of_mean: Array) -> Array:
        """Return the variance of the micro-batches' means, or 0 where it is mere rounding."""
        if self.square is None:
            return jnp.zeros((), square_of_mean.dtype)
        square = square_of_mean / self._whole_part()
        apart = self.square - square
        return jnp.where(apart > 16 * jnp.finfo(apart.dtype).eps * square, apart, 0)

    def _whole_part(self) -> Array:
        """Return W, which is the same for all layers of a stack, or 1 if all weights are 0."""
        part = self.part.reshape(-1)[0]
        return jnp.where(part == 0, 1, part)


CANCELLED = 1e-3  # relative to the mean's square: a smaller difference is partly rounding


class Gradient(Quantity):
    """The gradient of the mean over examples; like params."""

    layerwise: ClassVar[bool] = True
    like_params: ClassVar[bool] = True

    def take(self, params: Params, forms: PyTree, examples: Examples) -> PyTree:
        return jax.tree.map(lambda p, form: like(p, _mean(form, examples)), params, forms)


class OfForward(Quantity):
    """A quantity computed from the forward pass alone."""

    layerwise: ClassVar[bool] = True

    @abc.abstractmethod
    def of_forward(self, ahead: Forward) -> PyTree:
        """Return the quantity: means over examples, or arrays marked as ``PerExample``."""

    def take(self, params: Params, forms: PyTree, examples: Examples) -> PyTree:
        return ()


class Output(OfForward):
    """The net's output y, to compute an accuracy, say."""

    def of_forward(self, ahead: Forward) -> PyTree:
        return of_examples(ahead.y)


class FiniteLoss(OfForward):
    """The mean of the loss, with 0 for the examples whose loss is not finite."""

    def of_forward(self, ahead: Forward) -> Float[Array, ""]:
        finite = jnp.where(jnp.isfinite(ahead.values), ahead.values, 0)
        return ahead.examples.mean(finite)


class PerExampleGrads(Quantity):
    """Each example's gradient g_n; like params, with a leading example axis."""

    layerwise: ClassVar[bool] = True
    like_params: ClassVar[bool] = True
    axes: ClassVar[int] = 1

    def take(self, params: Params, forms: PyTree, examples: Examples) -> PyTree:
        return per_example(params, forms)

    def finish(self, settled: PyTree, examples: Examples) -> PyTree:
        return examples_at(0, settled)


class Factors(Quantity):
    """Each example's gradient, kept as its factors: like params, with a form at each leaf.

    For a matrix applied at T positions the factors are exact, of rank T, and hold T (I + O) numbers
    where g_n holds I O. If g_n holds fewer, it is kept itself. A form can later compute anything
    that a quantity computes from it in a walk, by ``form.products_with(other)``,
    ``form.projected(sides)`` or ``form.per_example()``.
    """

    layerwise: ClassVar[bool] = True

    def take(self, params: Params, forms: PyTree, examples: Examples) -> PyTree:
        def each(form: Factored) -> Factored:
            form = form.compact()
            marked = [PerExample(factor, axis - factor.ndim) for factor, axis in form.factors()]
            return jax.tree.unflatten(jax.tree.structure(form), marked)

        return map_forms(each, forms)


class SqNorms(Quantity):
    """The squared norm of each example's gradient, |g_n|^2.

    Attributes:
        per_layer: False for (N,), over all params; True for one (N,) per layer, in place of its
            params.
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
    """The inner products <g_n, g_m> of all pairs of examples.

    Attributes:
        per_layer: False for (N, N), over all params; True for one (N, N) per layer, in place of
            its params.
    """

    of_pairs: ClassVar[bool] = True
    per_layer: bool = False

    def __post_init__(self) -> None:
        check_flags(self, "per_layer")

    @property
    def layerwise(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return not self.per_layer

    def take(self, params: Params, forms: PyTree, examples: Examples) -> PyTree:
        products = total(lambda form: form.inner_products(), forms)
        return products if self.per_layer else Total(products)

    def finish(self, settled: PyTree, examples: Examples) -> PyTree:
        return settled if self.per_layer else everything(settled)


class SecondMoment(Quantity):
    """The mean over examples of g_n^2, elementwise; like params, in at least float32."""

    layerwise: ClassVar[bool] = True
    like_params: ClassVar[bool] = True

    def take(self, params: Params, forms: PyTree, examples: Examples) -> PyTree:
        return jax.tree.map(lambda _, form: _mean_of_squares(form, examples), params, forms)


class Variance(Quantity):
    """The mean over examples of (g_n - mean)^2, elementwise; like params, in at least float32.

    It is computed as the second moment minus the square of the mean. Where that would cancel,
    because deviations are small compared with the mean, the deviations are squared instead, one
    example at a time. The variance between the means of micro-batches is always such a difference;
    where it is below rounding, 1e-6 of the mean's square in float32, it counts as 0.

    It raises ``ValueError`` for a given divisor, since sums divided by it are not means.
    """

    layerwise: ClassVar[bool] = True
    like_params: ClassVar[bool] = True

    def take(self, params: Params, forms: PyTree, examples: Examples) -> PyTree:
        return jax.tree.map(lambda _, form: Moments.of(form, examples, True), params, forms)

    def settle(self, taken: PyTree) -> PyTree:
        return map_moments(Moments.variance, taken)

    def finish(self, settled: PyTree, examples: Examples) -> PyTree:
        if examples.given is not None:
            raise ValueError(
                "the variance is around the mean of the batch: leave out the divisor, or ask for "
                "the second moment"
            )
        return settled


def per_example(params: Params, forms: PyTree) -> PyTree:
    """Return g_n of each form in its param's dtype, marked so that ``repeat`` may stack it."""

    def each(p: Array, form: Factored) -> PerExample:
        return PerExample(form.per_example().astype(jnp.result_type(p)), axis=-1 - jnp.ndim(p))

    return jax.tree.map(each, params, forms)


def _mean(form: Factored, examples: Examples) -> Array:
    return form.weighted_sum(examples.shares())


def _mean_of_squares(form: Factored, examples: Examples) -> Array:
    form = rooted(form, examples)
    return form.of_squares(examples.over(form.squares()))


def rooted(form: Factored, examples: Examples) -> Factored:
    """Return the form with each example scaled by the root of its weight, for sums of squares."""
    return form if examples.weights is None else form.scaled(jnp.sqrt(examples.weights))


def map_moments(f: Callable[[Moments], Any], taken: PyTree) -> PyTree:
    """Return the tree with ``f(moments)`` for the moments of each param."""
    return jax.tree.map(f, taken, is_leaf=lambda node: isinstance(node, Moments))
