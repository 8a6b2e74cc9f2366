"""The diagonal of the Hessian, from products of the Hessian with vectors."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array

from jaxprop.core.arrays import added, wide
from jaxprop.core.batch import Batch
from jaxprop.core.checks import check_flag
from jaxprop.core.cotangents import factored
from jaxprop.core.coupling import check_uncoupled
from jaxprop.core.functions import of_batch
from jaxprop.core.layer import Layer
from jaxprop.core.loops import sum_over
from jaxprop.core.loss import Loss
from jaxprop.core.step import Layerwise, Step
from jaxprop.core.tree import learned, like_params, merged
from jaxprop.core.types import OfBatch, Params, PyTree
from jaxprop.core.walk import check_net_and_loss, forward
from jaxprop.curvature.products import Product, hessian
from jaxprop.quantity.base import examples_at, of_examples, unmarked
from jaxprop.quantity.micro_batches import in_micro_batches
from jaxprop.quantity.per_example import per_example as each_gradient
from jaxprop.quantity.source import check_samples
from jaxprop.quantity.together import SAMPLES
from jaxprop.traced.function import with_forward_rules

AT_ONCE = 32  # unit vectors, each with its own walk in memory


def diag_hessian(
    net: Layer,
    loss: Loss,
    *,
    samples: int | None = None,
    per_example: bool = False,
    micro_batches: int = 1,
) -> OfBatch[Params]:
    """Return ``f(params, x, target)``, which computes the diagonal of the mean loss's Hessian.

    The result is like params. The exact diagonal is e_i^T H e_i for each entry i of the params: one
    Hessian product per entry, 32 at once, which suits small nets only. The sampled diagonal is the
    mean of v * H v over vectors v of random signs, without bias and with the variance
    sum_{j != i} H_ij^2 / samples (Bekas, Kokiopoulou and Saad 2007,
    https://doi.org/10.1016/j.apnum.2007.01.003).

    Args:
        net: the network.
        loss: the loss.
        samples: how many vectors are drawn, which takes a key; None for the exact diagonal.
        per_example: whether to return the diagonal for each example's own loss, with a leading
            example axis. The mean over that axis is the diagonal for the mean loss, also when both
            are sampled with the same key.
        micro_batches: the number of parts to split the batch into. Each draws its own samples.

    Raises:
        TypeError: ``f`` raises it for samples without a key.
        ValueError: for per_example with a net that couples the examples of a batch.

    Example:
        >>> import jax, jax.numpy as jnp, jaxprop as jp
        >>> net, loss, x = jp.chain(jp.Dense(2)), jp.HalfSquaredError(), 2 * jnp.ones((3, 1))
        >>> params = net.init(jax.random.key(0), x)
        >>> jp.curvature.diag_hessian(net, loss)(params, x, jnp.ones((3, 2)))[0].w.tolist()
        [[4.0, 4.0]]
    """
    check_net_and_loss(net, loss)
    check_samples(samples)
    check_flag("diag_hessian: per_example", per_example)
    product = _of_each if per_example else hessian

    def parts(params: Params, batch: Batch) -> PyTree:
        times, arrays = product(net, loss, params, batch), learned(params)
        if samples is None:
            diagonal = _exact(times, arrays)
        else:
            assert batch.key is not None
            diagonal = _sampled(times, arrays, batch.key, samples)
        return of_examples(diagonal) if per_example else diagonal

    over_parts = in_micro_batches(net, parts, micro_batches)

    def of_params(params: Params, batch: Batch) -> Params:
        if per_example:
            check_uncoupled(net, params, batch.x)
        if samples is not None:
            if batch.key is None:
                raise TypeError("sampling takes a key; without samples the diagonal is exact")
            batch = batch._replace(key=jax.random.fold_in(batch.key, SAMPLES))
        number = jax.tree.leaves(batch.x)[0].shape[0]
        shape = (number,) if per_example else ()
        return like_params(params, unmarked(over_parts(params, batch)), shape=shape)

    doc = "Return the diagonal of the Hessian of the mean loss, or of each example's own loss."
    return of_batch("diag_hessian", doc, net, of_params)


def _of_each(net: Layer, loss: Loss, params: Params, batch: Batch) -> Product:
    """Return the product of each example's own Hessian with v, with a leading example axis."""
    net = with_forward_rules(net)

    def visit(step: Step) -> PyTree:
        return each_gradient(step.learned, factored(step))

    def grads(arrays: Params) -> Params:
        ahead = forward(net, loss, merged(params, arrays), batch)
        return examples_at(0, learned(ahead.back(ahead.own_gradient(), Layerwise(visit))[0]))

    return jax.linearize(grads, learned(params))[1]


def _exact(times: Product, arrays: Params) -> PyTree:
    """Return e_i^T H e_i for each entry; for several H, with their axes before those of params."""
    leaves, structure = jax.tree.flatten(arrays)
    if not leaves:
        return arrays
    ends = [sum(leaf.size for leaf in leaves[: n + 1]) for n in range(len(leaves))]

    def unit(i: Array, leaf: Array, end: int) -> Array:
        here = jnp.arange(end - leaf.size, end) == i
        return here.astype(leaf.dtype).reshape(leaf.shape)

    def entry(i: Array) -> Array:
        e = [unit(i, *one) for one in zip(leaves, ends, strict=True)]
        column = jax.tree.leaves(times(structure.unflatten(e)))
        dots = [jnp.tensordot(h, e, axes=e.ndim) for h, e in zip(column, e, strict=True)]
        return added(*dots)

    each = jax.lax.map(entry, jnp.arange(ends[-1]), batch_size=min(AT_ONCE, ends[-1]))
    each = jnp.moveaxis(each, 0, -1)
    return structure.unflatten(
        each[..., end - leaf.size : end].reshape(*each.shape[:-1], *leaf.shape).astype(leaf.dtype)
        for leaf, end in zip(leaves, ends, strict=True)
    )


def _sampled(times: Product, arrays: Params, key: Array, samples: int) -> PyTree:
    """Return the mean of v * H v over vectors of random signs."""
    leaves, structure = jax.tree.flatten(arrays)
    keys = jax.random.split(key, (samples, len(leaves)))

    def one(c: Array) -> list[Array]:
        v = [
            jax.random.rademacher(k, p.shape, p.dtype) for k, p in zip(keys[c], leaves, strict=True)
        ]
        column = jax.tree.leaves(times(structure.unflatten(v)))
        return [wide(h * jnp.broadcast_to(v, h.shape)) for h, v in zip(column, v, strict=True)]

    total = sum_over(one, jnp.arange(samples))
    return structure.unflatten(
        (each / samples).astype(leaf.dtype) for each, leaf in zip(total, leaves, strict=True)
    )
