"""Curvature of the mean loss, from walks that start at a root of the loss Hessian.

The generalised Gauss-Newton matrix is the mean over examples of J_n^T H_n J_n, with J_n the
Jacobian of the net's output and H_n the Hessian of the loss by that output. With H_n = S_n S_n^T
its root is J_n^T S_n: one walk back for each column of S_n. For the losses here it is also the
Fisher information matrix, whose root may be sampled: one walk back from the gradient at a target
drawn from the model (Martens 2020, https://jmlr.org/papers/v21/17-678.html).

With a ``key`` these functions sample; without, they are exact.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp

from jaxprop.backprop import Pull, ahead, check_net_and_loss
from jaxprop.factored import Factored, Kronecker, factored, is_factored
from jaxprop.layer import Layer
from jaxprop.losses import Loss
from jaxprop.of_batch import OfBatch, PerExample

ROOT = "jaxprop.root"


class Root(NamedTuple):
    """A root of the loss Hessian, a column at a time; each is a cotangent of y."""

    columns: int
    column: Callable[[Any], Any]

    def whole(self) -> Any:
        return jax.vmap(self.column)(jnp.arange(self.columns))


def diag_ggn(net: Layer, loss: Loss, *, samples: int = 1) -> OfBatch:
    """``f(params, x, target, key=None)``: the diagonal of the Gauss-Newton matrix; like params.

    Exact by one walk back for each output, or with a key by ``samples`` of them. One column of the
    root after the other, only squares are added up; they meet a layer's input once, at the end:
    (x^2)^T sum_c ct_c^2. Each column of the root is made as it is needed.
    """

    def of_walk(root: Root, examples: int, pull: Pull) -> Any:
        def squares(ct: Any) -> Any:
            left, _ = pull(ct, lambda step: _map_forms(lambda form: form.squares(), factored(step)))
            return left

        def add(total: Any, c: Any) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, total, squares(root.column(c))), None

        first = root.column(0)
        total, _ = jax.lax.scan(add, squares(first), jnp.arange(1, root.columns))
        forms, _ = pull(first, factored)
        return jax.tree.map(
            lambda form, squares: form.of_squares(squares) / examples,
            forms,
            total,
            is_leaf=is_factored,
        )

    return _from_root(net, loss, samples, of_walk)


def kronecker_factors(net: Layer, loss: Loss, *, samples: int = 1) -> OfBatch:
    """``f(params, x, target, key=None)``: KFAC's factors with a key, KFLR's (exact) without.

    Like params, with ``Kronecker(a, b)`` at each leaf: a and b are the means over examples of
    sum_t x_t x_t^T and of sum_c sum_t ct_t ct_t^T, and their Kronecker product stands for that
    param's block of the Gauss-Newton matrix, rows of w outermost (Martens and Grosse 2015,
    https://arxiv.org/abs/1503.05671; Botev et al. 2017, https://arxiv.org/abs/1706.03662). For one
    example without positions it is that block. A bias has a = [[1]]. A position that nothing
    comes back to, as one that is padded, counts in neither.

    ``exact=True`` in the place of a key says KFLR in so many words. Raises ``TypeError`` for a
    param whose cotangent has no two factors.
    """

    def of_walk(root: Root, examples: int, pull: Pull) -> Any:
        def factors(form: Factored) -> Kronecker:
            a, b = form.kronecker(over=ROOT)
            return Kronecker(a / examples, b / examples)

        def back(ct: Any) -> Any:
            left, _ = pull(ct, lambda step: _map_forms(factors, factored(step)))
            return left

        return jax.vmap(back, axis_name=ROOT, out_axes=None)(root.whole())

    return _from_root(net, loss, samples, of_walk)


def ggn_root(net: Layer, loss: Loss, *, samples: int = 1) -> OfBatch:
    """``f(params, x, target, key=None)``: V, like params behind axes (C, N), of each example's GGN.

    Example n's own Gauss-Newton matrix is sum_c V_cn V_cn^T; the mean over n is that of the mean
    loss. C is the number of columns of the loss Hessian's root, or with a key of ``samples``.
    """

    def of_walk(root: Root, examples: int, pull: Pull) -> Any:
        def back(ct: Any) -> Any:
            left, _ = pull(ct, factored)
            return _map_forms(lambda form: form.per_example(), left)

        each = jax.vmap(back)(root.whole())
        return jax.tree.map(lambda each: PerExample(each, axis=1), each)

    return _from_root(net, loss, samples, of_walk)


def _from_root(
    net: Layer, loss: Loss, samples: int, of_walk: Callable[[Root, int, Pull], Any]
) -> OfBatch:
    """``of_walk(root, N, pull)`` from the loss's root, exact or sampled."""
    check_net_and_loss(net, loss)
    if samples < 1:
        raise ValueError(f"samples must be at least 1, not {samples}")

    def parts(
        params: Any, x: Any, target: Any, key: chex.PRNGKey | None = None, *, exact: Any = None
    ) -> Any:
        if key is not None and exact is not None and exact is not False:
            raise TypeError("a key samples and exact does not: give one of them")
        if key is None and (samples != 1 or exact is False):
            raise TypeError("to sample takes a key; without one the whole root is used")
        _, examples, residuals, pull = ahead(net, loss, params, x, target)
        if key is None:
            columns = loss.hessian_columns(residuals)
            root = Root(columns, lambda c: loss.hessian_column(residuals, c))
        else:
            keys = jax.random.split(key, samples)
            root = Root(samples, lambda c: loss.sample(keys[c], residuals) / math.sqrt(samples))
        return of_walk(root, examples, pull)

    return OfBatch(parts)


def _map_forms(f: Callable[[Factored], Any], forms: Any) -> Any:
    return jax.tree.map(f, forms, is_leaf=is_factored)
