"""A batch, and the weight of each of its examples in a mean."""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float

from jaxprop.core.arrays import filled, selected, weighted
from jaxprop.core.checks import check_number, check_values
from jaxprop.core.coupling import check_uncoupled
from jaxprop.core.describe import shapes
from jaxprop.core.layer import Layer
from jaxprop.core.types import Cotangent, Params, PyTree


class Batch(NamedTuple):
    """The arguments of a function of a batch, other than the params.

    Attributes:
        x: the inputs.
        target: the targets, or None.
        key: a key, or None.
        weights: (N,), the weight of each example in a mean, or None if each counts 1.
        divisor: the number that weighted sums are divided by; None for the sum of the weights.
        whole: whether this is a whole batch, and not a micro-batch of one.
    """

    x: PyTree
    target: PyTree = None
    key: Array | None = None
    weights: Array | None = None
    divisor: float | Array | None = None
    whole: bool = True

    def examples(self, number: int) -> Examples:
        """Return the weights of the batch's N examples in its means."""
        weights = self.weights
        if weights is not None:
            _check_length(weights, number)
        total = max(number, 1) if weights is None else jnp.sum(weights)
        if weights is not None:
            total = jnp.where(total == 0, 1, total)
        if not number and self.divisor is None:
            raise ValueError(
                "the batch is empty: the mean over 0 examples does not exist; give divisor= for a "
                "sum over them"
            )
        return Examples(number, weights, total, self.divisor, whole=self.whole)


def weighted_batch(
    net: Layer,
    params: Params,
    x: PyTree,
    target: PyTree,
    key: Array | None,
    weights: Array | None,
    divisor: float | Array | None,
) -> Batch:
    """Return the batch, with each example of weight 0 replaced by the first that has a weight.

    The replaced contents then reach no result, no error and no derivative, not even autodiff's. In
    a traced program a negative weight becomes NaN, and so does a divisor that is not positive.

    Args:
        net: the network.
        params: its params, side inputs included.
        x: the inputs.
        target: the targets, or None.
        key: a key, or None.
        weights: (N,), the weight of each example, or None.
        divisor: the number that weighted sums are divided by, or None.

    Raises:
        TypeError: for weights that are not an array of numbers or bools, and a divisor that is not
            a number.
        ValueError: for any weights if the net couples the examples of a batch; and, where the
            values are known, for a weight that is negative or not finite and for a divisor that is
            not positive.
    """
    if divisor is not None:
        check_number("divisor", divisor, positive=True)
        if hasattr(divisor, "dtype"):
            divisor = jnp.asarray(divisor, float)
            divisor = jnp.where(divisor > 0, divisor, jnp.nan)
        elif not isinstance(divisor, int):
            divisor = float(divisor)
    if weights is None:
        return Batch(x, target, key, None, divisor)
    dtype = getattr(weights, "dtype", object)
    kinds = jnp.floating, jnp.integer, jnp.bool_
    if not any(jnp.issubdtype(dtype, kind) for kind in kinds):
        words = "weights are an array of numbers, one for each example"
        raise TypeError(f"{words}, not {shapes(weights)}")
    check_values(
        "weights must be finite and not negative", weights, lambda w: (w >= 0) & (w < math.inf)
    )
    if net.batch_coupled:
        raise ValueError(
            f"{net} couples the examples of a batch: one that counts nothing would reach the others"
        )
    check_uncoupled(net, params, x)
    for leaf in jax.tree.leaves(x):
        if getattr(leaf, "ndim", 0):  # the net itself reports any other x
            _check_length(weights, leaf.shape[0])
    weights = jnp.asarray(weights, float)
    weights = jnp.where(weights >= 0, weights, jnp.nan)
    x, target = filled(weights != 0, (x, target))
    return Batch(x, target, key, weights, divisor)


class Examples(NamedTuple):
    """The weights of the examples of a batch in its means: sum_n weights_n q_n / divisor.

    Attributes:
        number: N.
        weights: (N,), or None if each counts 1.
        total: the sum of the weights, or 1 if that is 0.
        given: the divisor that was given, or None.
        real: (N, ...), False where the target, or the mask, says that an example or one of its
            positions is padding; None if all are real.
        whole: whether these are the examples of a whole batch, and not of a micro-batch.
    """

    number: int
    weights: Float[Array, " n"] | None
    total: float | Array
    given: float | Array | None = None
    real: Bool[Array, "n ..."] | None = None
    whole: bool = True

    @property
    def divisor(self) -> float | Array:
        """The number to divide a sum by for its mean: the total, if no divisor was given."""
        return self.total if self.given is None else self.given

    def over(self, sums: Array) -> Array:
        """Return sums over examples, divided by the divisor for a mean."""
        divisor = self.divisor
        return sums / (divisor.astype(sums.dtype) if isinstance(divisor, Array) else divisor)

    def shares(self) -> Float[Array, " n"]:
        """Return the factor of each example in a mean, weights_n / divisor."""
        if self.weights is None:
            return jnp.full(self.number, 1 / self.divisor)
        return self.over(self.weights)

    def mean(self, values: Float[Array, "... n"]) -> Float[Array, "..."]:
        """Return the mean over examples of ``values``, which holds one value for each."""
        if not jnp.issubdtype(values.dtype, jnp.floating):
            values = values.astype(float)
        if self.weights is not None:
            values = jnp.where(self.weights != 0, values * self.weights.astype(values.dtype), 0)
        elif self.given is None:
            return jnp.mean(values, axis=-1)
        return self.over(jnp.sum(values, axis=-1))

    def share(self, of_these: Bool[Array, "... n"]) -> Float[Array, "..."]:
        """Return the share of the total weight that falls on these examples."""
        return self._replace(given=self.total).mean(of_these)

    def counting(self, tree: PyTree) -> PyTree:
        """Return the tree with zeros for the examples of weight 0."""
        return tree if self.weights is None else selected(self.weights != 0, tree)

    def mean_cotangent(self, ct: Cotangent) -> Cotangent:
        """Return the cotangent for the mean loss, from the one for each example's own loss."""
        if self.weights is None:
            return jax.tree.map(self.over, ct)
        return jax.tree.map(lambda ct: weighted(ct, self.shares()), ct)


def _check_length(weights: Array, examples: int) -> None:
    if weights.shape != (examples,):
        raise ValueError(
            f"weights are one for each of the {examples} examples, not {shapes(weights)}"
        )
