"""EKFAC: Kronecker factors by their eigenvectors, with corrected eigenvalues."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, Literal

import jax
from jax import Array

from jaxprop.core.batch import Batch, Examples
from jaxprop.core.forms import Factored, InBlockBefore
from jaxprop.core.functions import of_batch
from jaxprop.core.layer import Layer
from jaxprop.core.loss import Loss
from jaxprop.core.tree import learned
from jaxprop.core.types import OfBatch, Params, PyTree
from jaxprop.curvature.algebra import Eigen, eigh, forms_of_blocks, is_block
from jaxprop.quantity.base import Quantity
from jaxprop.quantity.curvature import AddedUp, KroneckerFactors, check_source
from jaxprop.quantity.functions import check_exact
from jaxprop.quantity.per_example import rooted
from jaxprop.quantity.source import HessianRoot, LossGradient, Source
from jaxprop.quantity.together import alone


class EigenvalueCorrection(AddedUp):
    """Corrected eigenvalues of Kronecker factors; like params, with an ``Eigen`` at each leaf.

    In the basis of the factors' eigenvectors the diagonal of the block is E (U^T g V)^2, with g the
    cotangents that the factors were computed from. It replaces the products of the factors'
    eigenvalues; no other diagonal in that basis is nearer to the block (EKFAC, George et al. 2018,
    https://arxiv.org/abs/1806.03884).

    Attributes:
        basis: the result of ``jp.curvature.eigh`` for the factors.
        samples: how many columns are sampled; None for the exact root.
        empirical: whether the source is the loss gradient.
    """

    basis: Any
    samples: int | None = None
    empirical: bool = False

    like_params: ClassVar[bool] = True
    layerwise: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_source(self.samples, self.empirical, "EigenvalueCorrection")

    @property
    def source(self) -> Source:
        return LossGradient() if self.empirical else HessianRoot(self.samples)

    def part(self, forms: PyTree, examples: Examples) -> PyTree:
        return forms

    def gather(self, params: Params, taken: PyTree, examples: Examples) -> PyTree:
        def values(block: Any, form: Factored) -> Any:
            form = rooted(form, examples)
            if isinstance(block, Eigen):
                squares = form.seen(block.sides).second_moment().reshape(block.values.shape)
                return examples.over(squares)
            return () if isinstance(block, tuple) else examples.over(form.second_moment())

        structure = jax.tree.structure(params)
        each = iter(forms_of_blocks("ekfac", self.basis, params, taken))
        return structure.unflatten(
            block if isinstance(block, InBlockBefore) else values(*next(each))
            for block in structure.flatten_up_to(learned(self.basis))
        )

    def whole(self, forms: PyTree, parts: PyTree, examples: Examples) -> PyTree:
        return parts

    def take(self, params: Params, forms: PyTree, examples: Examples) -> PyTree:
        return forms

    def finish(self, settled: PyTree, examples: Examples) -> PyTree:
        def of(block: Any, values: Any) -> Any:
            return dataclasses.replace(block, values=values) if isinstance(block, Eigen) else values

        return jax.tree.map(of, learned(self.basis), settled, is_leaf=is_block)


def ekfac_factors(
    net: Layer,
    loss: Loss,
    *,
    samples: int = 1,
    positions: Literal["expand", "reduce"] = "expand",
    others: Literal["raise", "skip", "diagonal"] = "raise",
    joint_bias: bool = False,
    micro_batches: int = 1,
) -> OfBatch[Params]:
    """Return ``f(params, x, target)``, which computes Kronecker factors with corrected eigenvalues.

    The result is like params, with a ``jp.curvature.Eigen`` at each leaf, for
    ``jp.curvature.solve`` and the other functions there. It holds the eigenvectors of
    ``jp.kronecker_factors`` and, from a second walk, the diagonal of the curvature in their basis
    (``EigenvalueCorrection``).

    Args:
        net: the network. A param whose cotangent has no two factors raises ``TypeError``.
        loss: the loss.
        samples: how many walks to sample if ``f`` is given a key, both for the eigenvectors and for
            the eigenvalues.
        positions: "expand" or "reduce", how to treat the positions of a sequence or an image.
        others: what to do for a param without factors: "raise", "skip" or "diagonal".
        joint_bias: whether to treat a bias as one more row of its layer's matrix.
        micro_batches: the number of parts to split the batch into. Each draws its own samples.
    """
    exact, sampled = (
        KroneckerFactors(number, positions=positions, others=others, joint_bias=joint_bias)
        for number in (None, samples)
    )

    def corrected(params: Params, batch: Batch) -> PyTree:
        def asked(quantity: Quantity, key: Array | None) -> PyTree:
            return alone(net, loss, quantity, micro_batches)(params, batch._replace(key=key))

        if batch.key is None:
            check_exact(samples)
            factors, key, drawn = asked(exact, None), None, None
        else:
            key, for_factors = jax.random.split(batch.key)
            factors, drawn = asked(sampled, for_factors), samples
        return asked(EigenvalueCorrection(eigh(factors), drawn), key)

    doc = "Return Kronecker factors by their eigenvectors, with corrected eigenvalues."
    return of_batch("ekfac_factors", doc, net, corrected)
