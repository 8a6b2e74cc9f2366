"""Curvature of the mean loss, from walks that start at a root of the loss Hessian.

The generalised Gauss-Newton matrix (GGN) is the mean over examples of J_n^T H_n J_n, with J_n the
Jacobian of the net's output and H_n the Hessian of the loss by that output. With H_n = S_n S_n^T
its root is J_n^T S_n: one walk back for each column of S_n (``HessianRoot``).
"""

from __future__ import annotations

import abc
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool

from jaxprop.core.checks import check_flags
from jaxprop.core.forms import Factored, Kronecker, is_factored
from jaxprop.core.types import Params, PyTree
from jaxprop.quantity.base import PerExample, Quantity, is_marked, map_forms
from jaxprop.quantity.per_example import per_example
from jaxprop.quantity.source import HessianRoot, LossGradient, Source, check_samples


class Counted(NamedTuple):
    """The examples of a batch.

    Attributes:
        examples: how many.
        real: False where one, or a position of one, is padding; None where all are real.
    """

    examples: int
    real: Bool[Array, "n ..."] | None = None


class AddedUp(Quantity):
    """A quantity of which a part is added up over the columns of its source.

    It is taken in two steps, whether there are several columns or one: ``part`` of each column's
    walk, and ``whole`` of their sum.
    """

    @abc.abstractmethod
    def part(self, forms: PyTree) -> PyTree:
        """Return of one column what is added up over the columns, at one layer."""

    @abc.abstractmethod
    def whole(self, forms: PyTree, parts: PyTree, batch: Counted) -> PyTree:
        """Return what is taken, from the sum of the parts and the forms of any one column."""

    def take(self, params: Params, forms: PyTree, examples: int) -> PyTree:
        return self.whole(forms, self.part(forms), Counted(examples))


class DiagGGN(AddedUp):
    """The diagonal of the Gauss-Newton matrix; like params.

    One column of the root after the other, only squares are added up. They meet a layer's input
    once, at the end: (x^2)^T sum_c ct_c^2.

    Attributes:
        samples: how many columns are sampled; None for the exact root.
    """

    samples: int | None = None

    like_params: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_samples(self.samples)

    @property
    def source(self) -> Source:
        return HessianRoot(self.samples)

    def part(self, forms: PyTree) -> PyTree:
        return map_forms(lambda form: form.squares(), forms)

    def whole(self, forms: PyTree, parts: PyTree, batch: Counted) -> PyTree:
        return jax.tree.map(
            lambda form, squares: form.of_squares(squares) / batch.examples,
            forms,
            parts,
            is_leaf=is_factored,
        )


class KroneckerFactors(AddedUp):
    """Two factors for each param's block of the Gauss-Newton matrix; like params.

    A ``Kronecker(a, b)`` at each leaf: a and b are the means over examples of sum_t x_t x_t^T and
    of sum_c sum_t ct_t ct_t^T, and their Kronecker product stands for that param's block, rows of w
    outermost. Sampled they are KFAC's (Martens and Grosse 2015, https://arxiv.org/abs/1503.05671),
    from the exact root KFLR's (Botev et al. 2017, https://arxiv.org/abs/1706.03662), and from the
    loss gradient those of the empirical Fisher matrix. For one example without positions the
    product is the block. A bias has a = [[1]]. Examples and positions whose target says that they
    are padding count in neither.

    Raises ``TypeError`` for a param whose cotangent has no two factors.

    Attributes:
        samples: how many columns are sampled; None for the exact root.
        empirical: whether the source is the loss gradient.
    """

    samples: int | None = None
    empirical: bool = False

    like_params: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_samples(self.samples)
        check_flags(self, "empirical")
        if self.empirical and self.samples is not None:
            raise ValueError(
                "empirical factors are of the loss gradient: there is nothing to sample"
            )

    @property
    def source(self) -> Source:
        return LossGradient() if self.empirical else HessianRoot(self.samples)

    def part(self, forms: PyTree) -> PyTree:
        return map_forms(lambda form: form.gram_of_ct(), forms)

    def whole(self, forms: PyTree, parts: PyTree, batch: Counted) -> PyTree:
        def factors(form: Factored, of_ct: Array) -> Kronecker:
            return Kronecker(form.gram_of_x(batch.real) / batch.examples, of_ct / batch.examples)

        return jax.tree.map(factors, forms, parts, is_leaf=is_factored)


class GGNRoot(Quantity):
    """A root of each example's own Gauss-Newton matrix; like params, behind axes (C, N).

    With V the result, example n's matrix is sum_c V_cn V_cn^T; the mean over n is that of the mean
    loss. C is the number of columns of the loss Hessian's root.

    Attributes:
        samples: how many columns are sampled; None for the exact root.
    """

    samples: int | None = None

    like_params: ClassVar[bool] = True
    axes: ClassVar[int] = 2
    stacked: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_samples(self.samples)

    @property
    def source(self) -> Source:
        return HessianRoot(self.samples)

    def take(self, params: Params, forms: PyTree, examples: int) -> PyTree:
        return per_example(params, forms)

    def finish(self, settled: PyTree, examples: int) -> PyTree:
        """Behind the columns and the examples come the layers of a ``repeat``, as in params."""

        def ahead(each: PerExample) -> PyTree:
            return jnp.moveaxis(each.value, each.axis, 1)

        return jax.tree.map(ahead, settled, is_leaf=is_marked)
