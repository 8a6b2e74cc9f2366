"""Curvature of the mean loss, from walks that start at a root of the loss Hessian.

The generalised Gauss-Newton matrix (GGN) is the mean over examples of J_n^T H_n J_n, with J_n the
Jacobian of the net's output and H_n the Hessian of the loss by that output. With H_n = S_n S_n^T
its root is J_n^T S_n: one walk back for each column of S_n (``HessianRoot``).
"""

from __future__ import annotations

import abc
import dataclasses
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
from jax import Array

from jaxprop.core.affine import AffineParams
from jaxprop.core.batch import Examples
from jaxprop.core.checks import check_flag, check_flags, check_one_of
from jaxprop.core.forms import Factored, InBlockBefore, Kronecker, Place, is_factored, with_bias
from jaxprop.core.types import Params, PyTree
from jaxprop.quantity.base import PerExample, Quantity, examples_at, map_forms
from jaxprop.quantity.per_example import per_example, rooted
from jaxprop.quantity.source import HessianRoot, LossGradient, Source, check_samples


class AddedUp(Quantity):
    """A quantity of which a part is added up over the columns of its source.

    It is taken in two steps, whether there are several columns or one: ``part`` of each column's
    walk, and ``whole`` of their sum.
    """

    layerwise: ClassVar[bool] = True

    @abc.abstractmethod
    def part(self, forms: PyTree, examples: Examples) -> PyTree:
        """Return of one column what is added up over the columns, at one layer."""

    @abc.abstractmethod
    def whole(self, forms: PyTree, parts: PyTree, examples: Examples) -> PyTree:
        """Return what is taken, from the sum of the parts and the forms of any one column."""

    def take(self, params: Params, forms: PyTree, examples: Examples) -> PyTree:
        return self.whole(forms, self.part(forms, examples), examples)


class DiagGGN(AddedUp):
    """The diagonal of the Gauss-Newton matrix; like params.

    One column of the root after the other, only squares are added up. They meet a layer's input
    once, at the end: (x^2)^T sum_c ct_c^2, or x_n^2 (outer) sum_c ct_cn^2 of each example.

    Attributes:
        samples: how many columns are sampled; None for the exact root.
        per_example: False for the diagonal of the mean loss; True for that of each example's own
            loss, like params behind an example axis.
    """

    samples: int | None = None
    per_example: bool = False

    like_params: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_samples(self.samples)
        check_flags(self, "per_example")

    @property
    def axes(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        return int(self.per_example)

    @property
    def source(self) -> Source:
        return HessianRoot(self.samples)

    def part(self, forms: PyTree, examples: Examples) -> PyTree:
        if self.per_example:
            return map_forms(lambda form: form.squares_of_each(), forms)
        return map_forms(lambda form: rooted(form, examples).squares(), forms)

    def whole(self, forms: PyTree, parts: PyTree, examples: Examples) -> PyTree:
        def diagonal(form: Factored, squares: Array) -> Any:
            if self.per_example:
                each = form.each_of_squares(squares)
                return PerExample(each, axis=-each.ndim)
            return form.of_squares(examples.over(squares))

        return jax.tree.map(diagonal, forms, parts, is_leaf=is_factored)

    def finish(self, settled: PyTree, examples: Examples) -> PyTree:
        return examples_at(0, settled)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Means:
    """Means of what a ``Kronecker`` is made of, over the same number.

    Attributes:
        gram: of the input, summed over positions.
        rows: of the number of positions.
        b: of ct, summed over positions.
        place: how the matrix lies in the param.
    """

    gram: Array
    rows: Array
    b: Array
    place: Place = dataclasses.field(metadata={"static": True})

    def factors(self) -> Kronecker:
        rows = jnp.maximum(self.rows, jnp.finfo(self.rows.dtype).tiny)
        axes = range(rows.ndim, self.gram.ndim)
        return Kronecker(self.gram / jnp.expand_dims(rows, axes), self.b, self.place)


POSITIONS, OTHERS = ("expand", "reduce"), ("raise", "skip", "diagonal")


class KroneckerFactors(AddedUp):
    """Two factors for each param's block of the Gauss-Newton matrix; like params.

    A ``Kronecker(a, b)`` at each leaf, whose product stands for that param's block, rows of w
    outermost. Sampled they are KFAC's (Martens and Grosse 2015, https://arxiv.org/abs/1503.05671),
    from the exact root KFLR's (Botev et al. 2017, https://arxiv.org/abs/1706.03662), and from the
    loss gradient those of the empirical Fisher matrix. For one example without positions the
    product is the block. A bias has a = [[1]].

    Along T positions there are two (Eschenhagen et al. 2023, https://arxiv.org/abs/2311.00636).
    "expand" takes positions for independent: a is the mean over examples and positions of
    x_t x_t^T, and b the mean over examples of sum_c sum_t ct_t ct_t^T, as in Grosse and Martens
    2016 (https://arxiv.org/abs/1602.01407), where T divides b. "reduce" is of x's mean over
    positions and of ct's sum, exact where y is linear in the mean of a linear net. Examples and
    positions that are padding by the target count in neither, nor by a mask (N, T) where the target
    has no positions.

    Attributes:
        samples: how many columns are sampled; None for the exact root.
        empirical: whether the source is the loss gradient.
        positions: "expand" or "reduce".
        others: what a param has whose cotangent has no two factors, as one that is used in two
            ways, or is in no form: "raise" for ``TypeError``, "skip" for ``()``, "diagonal" for the
            diagonal of its block, an array like the param.
        joint_bias: whether a bias is a further row of the matrix before it, whose x is 1, so that
            both have one block, with a (I + 1, I + 1), as in KFAC's paper. It is where params are
            ``jp.AffineParams``, as ``Dense``'s and ``Conv``'s; in the place of b's block stands a
            mark.
    """

    samples: int | None = None
    empirical: bool = False
    positions: Literal["expand", "reduce"] = "expand"
    others: Literal["raise", "skip", "diagonal"] = "raise"
    joint_bias: bool = False

    like_params: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_source(self.samples, self.empirical, "KroneckerFactors")
        check_flags(self, "joint_bias")
        for name, words in (("positions", POSITIONS), ("others", OTHERS)):
            check_one_of(f"KroneckerFactors: {name}", getattr(self, name), words)

    @property
    def source(self) -> Source:
        return LossGradient() if self.empirical else HessianRoot(self.samples)

    def part(self, forms: PyTree, examples: Examples) -> PyTree:
        def of(form: Factored) -> Any:
            form = rooted(form, examples)
            if (pair := self._pair(form, examples)) is not None:
                return pair.gram_of_ct()
            return form.squares() if self.others == "diagonal" else ()

        return map_forms(of, self._joined(forms))

    def whole(self, forms: PyTree, parts: PyTree, examples: Examples) -> PyTree:
        leaves, structure = jax.tree.flatten(self._joined(forms), is_leaf=is_factored)

        def factors(form: Factored, part: Any) -> Any:
            if (pair := self._pair(form, examples)) is not None:
                of_x = pair.gram_of_x(examples.real, examples.weights)
                gram, rows, b = map(examples.over, (*of_x, part))
                return _Means(gram, rows, b, pair.place)
            return form.of_squares(examples.over(part)) if self.others == "diagonal" else ()

        each = map(factors, leaves, structure.flatten_up_to(parts))
        return jax.tree.unflatten(structure, each)

    def _joined(self, forms: PyTree) -> PyTree:
        """Return the forms with that of a matrix and its bias in the place of the matrix's."""

        def is_node(node: Any) -> bool:
            return is_factored(node) or isinstance(node, AffineParams)

        def of(node: Any) -> Any:
            if is_factored(node) or not is_factored(node.w) or not is_factored(node.b):
                return node
            both = with_bias(node.w, node.b)
            return node if both is None else node._replace(w=both, b=InBlockBefore())

        return jax.tree.map(of, forms, is_leaf=is_node) if self.joint_bias else forms

    def _pair(self, form: Factored, examples: Examples) -> Factored | None:
        """Return the form that the factors are of; None for one that has no two."""
        if self.others != "raise" and not form.is_pair:
            return None
        return form if self.positions == "expand" else form.in_one_position(examples.real)

    def finish(self, settled: PyTree, examples: Examples) -> PyTree:
        return jax.tree.map(
            lambda node: node.factors() if isinstance(node, _Means) else node,
            settled,
            is_leaf=lambda node: isinstance(node, _Means),
        )


def check_source(samples: int | None, empirical: bool, name: str) -> None:
    """Raise unless a root is exact, or sampled, or of the loss gradient, which is not sampled."""
    check_samples(samples)
    check_flag(f"{name}: empirical", empirical)
    if empirical and samples is not None:
        raise ValueError("empirical factors are of the loss gradient: there is nothing to sample")


class GGNRoot(Quantity):
    """A root of each example's own Gauss-Newton matrix; like params, behind axes (C, N).

    With V the result, example n's matrix is sum_c V_cn V_cn^T; the mean over n is that of the mean
    loss. C is the number of columns of the loss Hessian's root.

    Attributes:
        samples: how many columns are sampled; None for the exact root.
    """

    layerwise: ClassVar[bool] = True
    samples: int | None = None

    like_params: ClassVar[bool] = True
    axes: ClassVar[int] = 2
    stacked: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_samples(self.samples)

    @property
    def source(self) -> Source:
        return HessianRoot(self.samples)

    def take(self, params: Params, forms: PyTree, examples: Examples) -> PyTree:
        return per_example(params, forms)

    def finish(self, settled: PyTree, examples: Examples) -> PyTree:
        return examples_at(1, settled)
