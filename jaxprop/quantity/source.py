"""Sources: the cotangents of the net's output that a walk back starts from."""

from __future__ import annotations

import abc
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
from jax import Array

from jaxprop.core.checks import check_count
from jaxprop.core.static import Static
from jaxprop.core.types import Cotangent
from jaxprop.core.walk import Forward


class Columns(NamedTuple):
    """Cotangents of the net's output, made one at a time.

    Attributes:
        number: how many columns there are.
        column: ``column(c)`` returns the column c.
    """

    number: int
    column: Callable[[int | Array], Cotangent]


class Source(Static):
    """The cotangents that a walk back starts from, for each example's own loss."""

    @abc.abstractmethod
    def columns(self, ahead: Forward, key: Array | None) -> Columns:
        """Return the cotangents after a forward pass, drawn by key where the source is sampled."""


class LossGradient(Source):
    """The gradient of each example's own loss with respect to the net's output."""

    def columns(self, ahead: Forward, key: Array | None) -> Columns:
        return Columns(1, lambda c: ahead.own_gradient())


def check_samples(samples: object) -> None:
    """Raise unless samples is None, for the exact root, or a number of columns."""
    if samples is not None:
        check_count("samples", samples)


class HessianRoot(Source):
    """A root of the Hessian of each example's own loss with respect to the net's output.

    With H = S S^T, a walk back from each column of S gives a root of the generalised Gauss-Newton
    matrix (Schraudolph 2002, https://doi.org/10.1162/08997660260028683). For the losses here that
    is also the Fisher information matrix, whose root may be sampled by gradients at targets drawn
    from the model (Martens 2020, https://jmlr.org/papers/v21/17-678.html).

    Attributes:
        samples: how many columns are sampled, which takes a key; None for the exact root, which has
            one column per output.
    """

    samples: int | None = None

    def __post_init__(self) -> None:
        check_samples(self.samples)

    def columns(self, ahead: Forward, key: Array | None) -> Columns:
        loss, residuals, samples = ahead.loss, ahead.residuals, self.samples
        if samples is None:
            return Columns(
                loss.hessian_columns(residuals),
                lambda c: ahead.examples.counting(loss.hessian_column(residuals, c)),
            )
        if key is None:
            raise TypeError("sampling takes a key; without samples the whole root is used")
        keys = jax.random.split(key, samples)
        scale = 1 / math.sqrt(samples)

        def column(c: int | Array) -> Cotangent:
            sampled = jax.tree.map(lambda s: s * scale, loss.sample(keys[c], residuals))
            return ahead.examples.counting(sampled)

        return Columns(samples, column)
