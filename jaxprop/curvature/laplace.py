"""The Laplace approximation: a normal distribution of the params around the trained ones."""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from jaxprop.core.arrays import scalar_of, wide
from jaxprop.core.batch import Batch
from jaxprop.core.checks import check_count, check_key, check_number, check_one_of, check_values
from jaxprop.core.cotangents import factored
from jaxprop.core.coupling import check_uncoupled
from jaxprop.core.describe import shapes
from jaxprop.core.forms import Factored, Outer
from jaxprop.core.functions import of_batch
from jaxprop.core.layer import Layer
from jaxprop.core.loops import map_examples
from jaxprop.core.loss import Loss
from jaxprop.core.tree import learned, merged, unbound
from jaxprop.core.types import OfBatch, Params, PyTree
from jaxprop.core.walk import check_net_and_loss
from jaxprop.curvature.algebra import (
    Eigen,
    eigh,
    forms_of_blocks,
    inverse_values,
    is_block,
    logdet,
    whiten,
)
from jaxprop.losses import BinaryCrossEntropy, CrossEntropy
from jaxprop.quantity.base import everything
from jaxprop.quantity.curvature import DiagGGN, KroneckerFactors
from jaxprop.quantity.together import together

STRUCTURES = ("kronecker", "diagonal")


class Posterior(NamedTuple):
    """A normal distribution of the learned params, N(params, (N F + prior I)^-1).

    F is the Gauss-Newton matrix of the mean loss over the N training examples, and the prior is
    N(0, I / prior).

    Attributes:
        net: the network.
        loss: the loss that it was trained with.
        params: its trained params, the mean.
        curvature: F, by the eigenvectors of its factors, or a diagonal.
        examples: N, the number of examples, or their total weight, or the given divisor.
        value: the mean loss of the examples, at the mean of the params.
        prior: the precision of the prior.
    """

    net: Layer
    loss: Loss
    params: Params
    curvature: PyTree
    examples: Float[Array, ""]
    value: Float[Array, ""]
    prior: Float[Array, ""]

    def with_prior(self, precision: float | Array) -> Posterior:
        """Return the posterior for a prior of another precision."""
        check_number("with_prior: precision", precision, positive=True)
        return self._replace(prior=jnp.asarray(precision, self.value.dtype))

    def tuned(self, precisions: Float[Array, " k"] | None = None) -> Posterior:
        """Return the posterior for the prior precision with the most evidence.

        Args:
            precisions: the precisions to choose from; by default 41 from 1e-4 to 1e4.
        """
        if precisions is None:
            precisions = jnp.logspace(-4, 4, 41)
        precisions = jnp.asarray(precisions, self.value.dtype)
        if precisions.ndim != 1 or not precisions.size:
            raise ValueError(f"tuned: precisions are one or more, (k,), not {shapes(precisions)}")
        check_values("tuned: precisions are positive", precisions, lambda values: values > 0)
        evidence = jax.lax.map(lambda prior: self._replace(prior=prior).log_evidence(), precisions)
        return self._replace(prior=precisions[jnp.argmax(evidence)])

    def log_evidence(self) -> Float[Array, ""]:
        """Return log p(training targets), to choose a prior or a net by.

        It uses Laplace's method (MacKay 1992, https://doi.org/10.1162/neco.1992.4.3.415), without
        any term that the loss omits from -log p, such as the constant of a ``HalfSquaredError``.
        """
        leaves = jax.tree.leaves(learned(self.params))
        square = everything([jnp.sum(wide(leaf) ** 2) for leaf in leaves]).astype(self.value.dtype)
        blocks = jax.tree.leaves(learned(self.curvature), is_leaf=is_block)
        number = sum(block.size for block in blocks)
        damping = self.prior / self.examples
        determinant = logdet(self.curvature, damping).astype(self.value.dtype)
        apart = determinant - number * jnp.log(damping)  # log det(N F + prior) - log det(prior)
        return -self.examples * self.value - (self.prior * square + apart) / 2

    def sample(self, key: Array, number: int = 1) -> Params:
        """Return samples of the params, like params with a leading sample axis.

        Args:
            key: a key of ``jax.random.key``.
            number: how many samples to draw.
        """
        check_key("sample", key)
        check_count("sample: number", number)
        leaves, structure = jax.tree.flatten(learned(self.params))

        def of(key: Array) -> Params:
            keys = jax.random.split(key, len(leaves))
            normal = [
                jax.random.normal(key, leaf.shape, wide(leaf).dtype)
                for key, leaf in zip(keys, leaves, strict=True)
            ]
            apart = whiten(self.curvature, structure.unflatten(normal), self.prior / self.examples)
            root = jnp.sqrt(self.examples)
            moved = [
                (wide(leaf) + d / scalar_of(root, d)).astype(leaf.dtype)
                for leaf, d in zip(leaves, jax.tree.leaves(apart), strict=True)
            ]
            return merged(self.params, structure.unflatten(moved))

        return jax.lax.map(of, jax.random.split(key, number))

    def outputs(
        self, x: PyTree, *, mask: Array | None = None
    ) -> tuple[Array, Float[Array, "n c c"]]:
        """Return the net's output, and its covariance with the net linearized in its params.

        The covariance is J_n Sigma J_n^T, with J_n the Jacobian of the output of example n (Immer
        et al. 2021, https://arxiv.org/abs/2008.08400). Several output axes are treated as one.

        Args:
            x: the inputs.
            mask: bool (N, T), True where a position is real.
        """
        bound = self.net.bind(self.params, mask=mask)
        check_uncoupled(self.net, bound, x)
        y, residuals = self.net.forward(bound, x)
        if not hasattr(y, "shape"):
            raise TypeError(f"outputs: {self.net} gives {shapes(y)}, not one array")
        number = math.prod(y.shape[1:])

        def forms(one: Array) -> PyTree:
            ct = jnp.broadcast_to(one.reshape(1, *y.shape[1:]), y.shape)
            return self.net.walk(bound, residuals, ct, factored)[0]

        visited = jax.vmap(forms)(jnp.eye(number, dtype=y.dtype))
        damping = self.prior / self.examples
        pairs = forms_of_blocks("outputs", self.curvature, self.params, visited)
        total = everything([_covariance(*pair, damping) for pair in pairs])
        return y, total / scalar_of(self.examples, total)

    def probabilities(self, x: PyTree, *, mask: Array | None = None) -> Float[Array, "n c"]:
        """Return the probability of each class, with the logits' variance v taken into account.

        It is softmax(y / sqrt(1 + pi v / 8)), which approximates the mean of the softmax over the
        logits' distribution (MacKay 1992, https://doi.org/10.1162/neco.1992.4.5.720). For a net
        trained with ``jp.BinaryCrossEntropy`` the sigmoid replaces the softmax.

        Args:
            x: the inputs.
            mask: bool (N, T), True where a position is real.

        Raises:
            TypeError: for a net that was trained with another loss.
        """
        if not isinstance(self.loss, CrossEntropy | BinaryCrossEntropy):
            raise TypeError(
                "probabilities is of a net that classifies, by CrossEntropy or BinaryCrossEntropy, "
                f"not by {self.loss}; outputs(x) has the mean and the covariance"
            )
        y, covariance = self.outputs(x, mask=mask)
        variance = jnp.diagonal(covariance, axis1=1, axis2=2).reshape(y.shape)
        logits = wide(y) / jnp.sqrt(1 + jnp.pi / 8 * variance)
        binary = isinstance(self.loss, BinaryCrossEntropy)
        return jax.nn.sigmoid(logits) if binary else jax.nn.softmax(logits)


def laplace(
    net: Layer,
    loss: Loss,
    *,
    structure: Literal["kronecker", "diagonal"] = "kronecker",
    samples: int | None = None,
    micro_batches: int = 1,
) -> OfBatch[Posterior]:
    """Return ``f(params, x, target)``, which computes a ``Posterior`` around the trained params.

    x and target are all the training data, split by ``micro_batches``. Each example's own loss is
    taken as a negative log likelihood. The losses here are one if outputs have no positions;
    ``jp.BinaryCrossEntropy``, a mean over outputs, also needs a single output. The posterior covers
    the learned params: with ``jp.freeze`` on all but the last layer's params it is that of the
    last layer (Daxberger et al. 2021, https://arxiv.org/abs/2106.14806). Its prior has precision 1;
    ``posterior.tuned()`` chooses a precision by the evidence.

        posterior = jp.laplace(net, loss)(params, x, target).tuned()
        p = posterior.probabilities(new)

    Args:
        net: the network, in ``jp.inference_mode`` if a layer draws random numbers.
        loss: the loss.
        structure: "kronecker" for a block for each param (Ritter et al. 2018,
            https://openreview.net/forum?id=Skdvd2xAZ), or its diagonal where a param has no
            factors; "diagonal" for diagonals alone.
        samples: how many walks sample the curvature, which takes a key; None for the exact one.
        micro_batches: the number of parts to split the data into.
    """
    check_net_and_loss(net, loss)
    check_one_of("laplace: structure", structure, STRUCTURES)
    asked = (
        DiagGGN(samples)
        if structure == "diagonal"
        else KroneckerFactors(samples, others="diagonal")
    )
    taken = together(net, loss, {"it": asked}, micro_batches)

    def around(params: Params, batch: Batch) -> Posterior:
        result = taken(params, batch)
        value = wide(result["value"])
        number = batch.examples(jax.tree.leaves(batch.x)[0].shape[0]).divisor
        curvature = eigh(learned(result["it"]))
        examples = jnp.asarray(number, value.dtype)
        return Posterior(
            net, loss, unbound(params), curvature, examples, value, jnp.ones((), value.dtype)
        )

    doc = "Return a normal distribution of the params around those that were trained."
    return of_batch("laplace", doc, net, around)


def _covariance(block: Any, form: Factored, damping: Array) -> Float[Array, "n c c"]:
    """Return <g_nc, (F + damping)^-1 g_nd>, for a form with a leading axis of outputs."""
    entries = inverse_values(block, damping)
    if isinstance(block, Eigen):
        form = jax.vmap(lambda form: form.seen(block.sides))(form)
    if isinstance(form, Outer) and form.ct.ndim == 3:
        x, ct = wide(form.x[0]) ** 2, wide(form.ct)
        return jnp.einsum("no,cno,dno->ncd", x @ entries.astype(x.dtype), ct, ct)

    each = jax.vmap(lambda form: form.one_by_one()[0])(form)
    _, alone = jax.tree.map(lambda factor: factor[0], form).one_by_one()

    def of_example(one: list[Array]) -> Float[Array, "c c"]:
        """Return one example's products, so that only its gradients are in memory."""
        g = wide(jax.vmap(alone)(one))
        rows = g.reshape(g.shape[0], math.prod(g.shape[1:]))
        root = jnp.sqrt(entries).astype(g.dtype).ravel()
        rows *= jnp.broadcast_to(root[None], rows.shape)
        return rows @ rows.T

    return map_examples(of_example, [jnp.moveaxis(factor, 1, 0) for factor in each])
