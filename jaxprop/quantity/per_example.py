"""Quantities of each example's own gradient: their mean, their norms, their moments."""

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
    """Means over a batch, or over a micro-batch of it.

    Attributes:
        part: W, what the examples count together, by what their sums are divided by.
        mean: W times the mean.
        square: W times the square of the mean, of each entry or of all together; None where there
            are no other micro-batches for it to vary between.
        within: W times the variance around it, likewise.
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
            examples: what the examples count.
            entries: whether squares are of each entry, or of all entries together.
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
        """Return the variance around the mean of all micro-batches, of each entry."""
        return self.within + self._between(self.mean**2)

    def spread(self) -> Float[Array, "... 2"]:
        """Return the sum of the variance over all entries, and the squared norm of the mean.

        They are of true means, whatever the sums are divided by.
        """
        square = jnp.sum(self.mean**2, axis=tuple(range(self.within.ndim, self.mean.ndim)))
        variance, part = self.within + self._between(square), self._whole_part()
        return jnp.stack([variance / part, square / part**2], axis=-1)

    def _between(self, square_of_mean: Array) -> Array:
        """Return the variance of the micro-batches' means; what is no more than rounding is 0."""
        if self.square is None:
            return jnp.zeros((), square_of_mean.dtype)
        square = square_of_mean / self._whole_part()
        apart = self.square - square
        return jnp.where(apart > 16 * jnp.finfo(apart.dtype).eps * square, apart, 0)

    def _whole_part(self) -> Array:
        """Return W, which is the same of all layers of a stack, or 1 where nothing counts."""
        part = self.part.reshape(-1)[0]
        return jnp.where(part == 0, 1, part)


CANCELLED = 1e-3  # of the mean's square: of a difference that is less, a part is rounding


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
        return examples_at(0, settled)


class Factors(Quantity):
    """Each example's gradient as its factors, to be kept: like params, with a form at each leaf.

    Of a matrix that meets T positions they are of rank T, and exact: T (I + O) numbers where g_n
    has I O; where that is fewer, g_n itself. A form answers later what a quantity asks it now, as
    ``form.products_with(other)``, ``form.projected(sides)`` and ``form.per_example()`` do.
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
    """The inner products <g_n, g_m> of all pairs of examples.

    Attributes:
        per_layer: False for (N, N), over all params; True for one (N, N) a layer, where its params
            stand.
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

    It is the second moment less the square of the mean, unless that cancels: where deviations are
    small against the mean, they are squared one example after the other. Between micro-batches it
    is the difference always, so that of their means what is below rounding, 1e-6 of the mean's
    square in float32, is 0.

    It raises ``ValueError`` for a divisor that was given: what is divided by it is no mean.
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
    """Return g_n of each form in its param's dtype, marked, so that ``repeat`` may stack it."""

    def each(p: Array, form: Factored) -> PerExample:
        return PerExample(form.per_example().astype(jnp.result_type(p)), axis=-1 - jnp.ndim(p))

    return jax.tree.map(each, params, forms)


def _mean(form: Factored, examples: Examples) -> Array:
    return form.weighted_sum(examples.shares())


def _mean_of_squares(form: Factored, examples: Examples) -> Array:
    form = rooted(form, examples)
    return form.of_squares(examples.over(form.squares()))


def rooted(form: Factored, examples: Examples) -> Factored:
    """Return the form with the root of its weight in each example, for sums of squares."""
    return form if examples.weights is None else form.scaled(jnp.sqrt(examples.weights))


def map_moments(f: Callable[[Moments], Any], taken: PyTree) -> PyTree:
    """Return the tree with ``f(moments)`` for the moments of each param."""
    return jax.tree.map(f, taken, is_leaf=lambda node: isinstance(node, Moments))
