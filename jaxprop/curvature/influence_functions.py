"""Influence of training examples: inner products in the metric of an inverse curvature."""

from __future__ import annotations

from typing import Any, Protocol

import jax
from jax import Array
from jaxtyping import Float

from jaxprop.core.batch import Batch
from jaxprop.core.checks import check_number
from jaxprop.core.cotangents import factored
from jaxprop.core.coupling import check_uncoupled
from jaxprop.core.forms import Factored, is_factored
from jaxprop.core.layer import Layer
from jaxprop.core.loss import Loss
from jaxprop.core.tree import learned, merged
from jaxprop.core.types import Params, PyTree
from jaxprop.core.walk import check_net_and_loss, forward
from jaxprop.curvature.algebra import Eigen, eigh, forms_of_blocks, inverse_values, solve
from jaxprop.quantity.base import everything
from jaxprop.quantity.between import Pair, check_pair
from jaxprop.traced.function import with_forward_rules


class Influence(Protocol):
    """A function of two batches and a curvature, as returned by ``influence(net, loss)``."""

    def __call__(
        self,
        params: Params,
        batch: Pair,
        other: Pair,
        curvature: PyTree,
        damping: float | Array = 0.0,
        *,
        key: Array | None = None,
        mask: Array | None = None,
        other_mask: Array | None = None,
    ) -> Float[Array, "n m"]: ...


class SelfInfluence(Protocol):
    """A function of a batch and a curvature, as returned by ``self_influence(net, loss)``."""

    def __call__(
        self,
        params: Params,
        x: PyTree,
        target: PyTree,
        curvature: PyTree,
        damping: float | Array = 0.0,
        *,
        key: Array | None = None,
        mask: Array | None = None,
    ) -> Float[Array, " n"]: ...


def influence(net: Layer, loss: Loss) -> Influence:
    """Return ``f(params, batch, other, curvature, damping)``, which computes influences (N, M).

    The influences are <g_n, (F + damping)^-1 h_m>, with g_n the gradient of example n's own loss in
    ``batch``, (x, target), and h_m that of example m in ``other``. A positive entry says that
    example n, counted for more in training, lowers the loss of m: to first order, by the entry over
    the number of training examples (Koh and Liang 2017, https://arxiv.org/abs/1703.04730, with the
    other sign; with Kronecker factors Grosse et al. 2023, https://arxiv.org/abs/2308.03296). The
    h_m are computed and solved for one at a time. The losses of all n are then differentiated along
    each solution, so that no g_n is materialized.

    The curvature F is that of the mean loss, such as from ``ekfac_factors``, and the damping is
    added to each of its eigenvalues. ``f`` also takes ``key=`` for layers that draw, ``mask=`` for
    ``batch`` and ``other_mask=`` for ``other``, by default the same mask.

    Args:
        net: the network. One that couples the examples of a batch raises ``ValueError``.
        loss: the loss.

    Example:
        >>> import jax, jax.numpy as jnp, jaxprop as jp
        >>> net, loss, x = jp.chain(jp.Dense(3)), jp.CrossEntropy(), jnp.ones((4, 2))
        >>> params, target = net.init(jax.random.key(0), x), jnp.array([0, 1, 2, 0])
        >>> curvature = jp.curvature.ekfac_factors(net, loss)(params, x, target)
        >>> test = x[:1], target[:1]
        >>> of = jp.curvature.influence(net, loss)
        >>> of(params, (x, target), test, curvature, damping=1e-3).shape
        (4, 1)
    """
    check_net_and_loss(net, loss)

    def of_batches(
        params: Params,
        batch: Pair,
        other: Pair,
        curvature: PyTree,
        damping: float | Array = 0.0,
        *,
        key: Array | None = None,
        mask: Array | None = None,
        other_mask: Array | None = None,
    ) -> Float[Array, "n m"]:
        """Return the inner products of the gradients of two batches in the inverse curvature."""
        check_number("influence: damping", damping)
        bound = net.bind(params, key=key, mask=mask)
        bound_of_other = net.bind(params, key=key, mask=mask if other_mask is None else other_mask)
        for each, of_each in ((batch, bound), (other, bound_of_other)):
            check_pair("influence", each)
            check_uncoupled(net, of_each, each[0])
        blocks = eigh(learned(curvature))
        along_params = with_forward_rules(net)

        def losses(arrays: Params) -> Float[Array, " n"]:
            return forward(along_params, loss, merged(bound, arrays), Batch(*batch)).values

        _, along = jax.linearize(losses, learned(bound))
        ahead = forward(net, loss, bound_of_other, Batch(*other))
        visited, _ = ahead.back(ahead.own_gradient(), factored)
        forms, structure = jax.tree.flatten(visited, is_leaf=is_factored)
        factors, alone = zip(*(form.one_by_one() for form in forms), strict=True)

        def with_all(one: tuple[list[Array], ...]) -> Float[Array, " n"]:
            each = [of(factors) for of, factors in zip(alone, one, strict=True)]
            solved = solve(blocks, structure.unflatten(each), damping)
            return along(jax.tree.map(lambda p, d: d.astype(p.dtype), learned(params), solved))

        return jax.lax.map(with_all, factors).T

    of_batches.__name__ = of_batches.__qualname__ = "influence"
    return of_batches


def self_influence(net: Layer, loss: Loss) -> SelfInfluence:
    """Return ``f(params, x, target, curvature, damping)``, which computes self-influences (N,).

    The self-influence <g_n, (F + damping)^-1 g_n> says what an example did for itself. It is large
    for an example that is learned from itself alone, such as a wrong label. With the identity in
    place of F it is |g_n|^2, ``jp.per_example_sq_norms``. Each gradient is squared in the basis of
    the factors' eigenvectors, and materialized only where its factors do not suffice. ``f`` takes
    the same arguments as for ``influence``, but one batch.

    Args:
        net: the network. One that couples the examples of a batch raises ``ValueError``.
        loss: the loss.
    """
    check_net_and_loss(net, loss)

    def of_batch(
        params: Params,
        x: PyTree,
        target: PyTree,
        curvature: PyTree,
        damping: float | Array = 0.0,
        *,
        key: Array | None = None,
        mask: Array | None = None,
    ) -> Float[Array, " n"]:
        """Return the squared norm of each example's gradient in the inverse curvature."""
        check_number("self_influence: damping", damping)
        bound = net.bind(params, key=key, mask=mask)
        check_uncoupled(net, bound, x)
        ahead = forward(net, loss, bound, Batch(x, target))
        visited, _ = ahead.back(ahead.own_gradient(), factored)
        pairs = forms_of_blocks("self_influence", eigh(learned(curvature)), params, visited)
        return everything([_sq_norms(*pair, damping) for pair in pairs])

    of_batch.__name__ = of_batch.__qualname__ = "self_influence"
    return of_batch


def _sq_norms(block: Any, form: Factored, damping: float | Array) -> Float[Array, " n"]:
    if isinstance(block, Eigen):
        form = form.seen(block.sides)
    return form.weighed_sq_norms(inverse_values(block, damping))
