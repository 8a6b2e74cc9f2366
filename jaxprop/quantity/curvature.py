"""Curvature of the mean loss, from walks that start at a root of the loss Hessian.

The generalised Gauss-Newton matrix (GGN) is the mean over examples of J_n^T H_n J_n, with J_n the
Jacobian of the net's output and H_n the Hessian of the loss with respect to that output. With
H_n = S_n S_n^T, a root of example n's term is J_n^T S_n: one walk back for each column of S_n
(``HessianRoot``).
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
    """A quantity whose parts are added up over the columns of its source.

    It is computed in two steps, even for a single column: ``part`` in each column's walk, and then
    ``whole`` from the sum of the parts.
    """

    layerwise: ClassVar[bool] = True

    @abc.abstractmethod
    def part(self, forms: PyTree, examples: Examples) -> PyTree:
        """Return one column's part at one layer, to be added up over the columns."""

    @abc.abstractmethod
    def whole(self, forms: PyTree, parts: PyTree, examples: Examples) -> PyTree:
        """Return the layer's result, from the sum of the parts and the forms of any one column."""

    def take(self, params: Params, forms: PyTree, examples: Examples) -> PyTree:
        return self.whole(forms, self.part(forms, examples), examples)


class DiagGGN(AddedUp):
    """The diagonal of the Gauss-Newton matrix; like params.

    Columns of the root are processed one at a time, and only squares are added up. The layer's
    squared input is multiplied in once, at the end: (x^2)^T sum_c ct_c^2, or for each example
    x_n^2 (outer) sum_c ct_cn^2.

    Attributes:
        samples: how many columns are sampled; None for the exact root.
        per_example: False for the diagonal for the mean loss; True for that of each example's own
            loss, like params with a leading example axis.
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
    """The means that make up a ``Kronecker``, all with the same divisor.

    Attributes:
        gram: the mean Gram matrix of the input, summed over positions.
        rows: the mean number of positions.
        b: the mean Gram matrix of ct, summed over positions.
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

    Each leaf is a ``Kronecker(a, b)``, whose product approximates that param's block, with the rows
    of w outermost. Sampled columns give KFAC's factors (Martens and Grosse 2015,
    https://arxiv.org/abs/1503.05671), the exact root KFLR's (Botev et al. 2017,
    https://arxiv.org/abs/1706.03662), and the loss gradient those of the empirical Fisher matrix.
    For one example without positions the product equals the block. A bias has a = [[1]].

    Along T positions there are two variants (Eschenhagen et al. 2023,
    https://arxiv.org/abs/2311.00636). "expand" treats positions as independent: a is the mean over
    examples and positions of x_t x_t^T, and b the mean over examples of sum_c sum_t ct_t ct_t^T.
    This is as in Grosse and Martens 2016 (https://arxiv.org/abs/1602.01407), except that there T
    divides b. "reduce" uses the mean of x over positions and the sum of ct, and is exact for a
    linear net whose y is linear in the mean over positions. Examples and positions that the target
    marks as padding, and that no cotangent reaches, count in neither factor. Where the target has
    no positions, a mask (N, T) marks them.

    Attributes:
        samples: how many columns are sampled; None for the exact root.
        empirical: whether the source is the loss gradient.
        positions: "expand" or "reduce".
        others: what to do for a param whose cotangent does not have two factors, such as a param
            used in two ways or without a form: "raise" for ``TypeError``, "skip" for ``()``,
            "diagonal" for the diagonal of its block, an array like the param.
        joint_bias: whether to treat a bias as one more row of the matrix before it, with x = 1, so
            that both share one block, with a (I + 1, I + 1), as in KFAC's paper. This applies where
            params are ``jp.AffineParams``, as in ``Dense`` and ``Conv``; a mark takes the place of
            b's block.
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
            if self._has_pair(form):
                counted = form.counted(examples.real)
                counted = None if counted is None else counted.astype(jnp.int32)
                return self._in_positions(form).gram_of_ct(), counted
            return form.squares() if self.others == "diagonal" else ()

        return map_forms(of, self._joined(forms))

    def whole(self, forms: PyTree, parts: PyTree, examples: Examples) -> PyTree:
        leaves, structure = jax.tree.flatten(self._joined(forms), is_leaf=is_factored)

        def factors(form: Factored, part: Any) -> Any:
            if self._has_pair(form):
                of_ct, columns = part
                counted = None if columns is None else columns > 0
                pair = self._in_positions(form, counted)
                if pair is not form:
                    counted = pair.counted(examples.real)
                of_x = pair.gram_of_x(counted, examples.weights)
                gram, rows, b = map(examples.over, (*of_x, of_ct))
                return _Means(gram, rows, b, pair.place)
            return form.of_squares(examples.over(part)) if self.others == "diagonal" else ()

        each = map(factors, leaves, structure.flatten_up_to(parts))
        return jax.tree.unflatten(structure, each)

    def _joined(self, forms: PyTree) -> PyTree:
        """Return the forms; with ``joint_bias``, one form for each matrix and its bias."""

        def is_node(node: Any) -> bool:
            return is_factored(node) or isinstance(node, AffineParams)

        def of(node: Any) -> Any:
            if is_factored(node) or not is_factored(node.w) or not is_factored(node.b):
                return node
            both = with_bias(node.w, node.b)
            return node if both is None else node._replace(w=both, b=InBlockBefore())

        return jax.tree.map(of, forms, is_leaf=is_node) if self.joint_bias else forms

    def _has_pair(self, form: Factored) -> bool:
        """Return whether to take two factors from a form, which raises if it has none."""
        return self.others == "raise" or form.is_pair

    def _in_positions(self, form: Factored, counted: Array | None = None) -> Factored:
        """Return the form to take the factors from: with its positions, or in one of them."""
        return form if self.positions == "expand" else form.in_one_position(counted)

    def finish(self, settled: PyTree, examples: Examples) -> PyTree:
        return jax.tree.map(
            lambda node: node.factors() if isinstance(node, _Means) else node,
            settled,
            is_leaf=lambda node: isinstance(node, _Means),
        )


def check_source(samples: int | None, empirical: bool, name: str) -> None:
    """Raise unless samples and empirical are valid; the loss gradient cannot be sampled."""
    check_samples(samples)
    check_flag(f"{name}: empirical", empirical)
    if empirical and samples is not None:
        raise ValueError("empirical factors are of the loss gradient: there is nothing to sample")


class GGNRoot(Quantity):
    """A root of each example's own Gauss-Newton matrix; like params, with leading axes (C, N).

    With V the result, example n's matrix is sum_c V_cn V_cn^T; the mean over n is the matrix of the
    mean loss. C is the number of columns of the loss Hessian's root.

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
