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
from typing import Any

import chex
import jax
from jax import Array

from jaxprop.backprop import ahead
from jaxprop.factored import Factored, Kronecker
from jaxprop.layer import Layer, Step, require
from jaxprop.losses import Loss
from jaxprop.quantities import factored

ROOTS = "jaxprop.root"


def diag_ggn(net: Layer, loss: Loss, *, samples: int = 1) -> Callable[..., Any]:
    """``f(params, x, target, key=None)``: the diagonal of the Gauss-Newton matrix; like params.

    Exact by one walk back for each output, or with a key by ``samples`` of them. What is squared
    is summed over the columns before it meets a layer's input, (x^2)^T sum_c ct_c^2, so that the
    columns cost no contraction each.
    """

    def diagonal(form: Factored, examples: int) -> Array:
        return form.second_moment(over=ROOTS) / examples

    return _of_roots(net, loss, samples, diagonal, stacked=False)


def kronecker_factors(net: Layer, loss: Loss, *, samples: int = 1) -> Callable[..., Any]:
    """``f(params, x, target, key=None)``: KFAC's factors with a key, KFLR's (exact) without.

    Like params, with ``Kronecker(a, b)`` at each leaf: a and b are the means over examples of
    sum_t x_t x_t^T and of sum_c sum_t ct_t ct_t^T, and their Kronecker product stands for that
    param's block of the Gauss-Newton matrix, rows of w outermost (Martens and Grosse 2015,
    https://arxiv.org/abs/1503.05671; Botev et al. 2017, https://arxiv.org/abs/1706.03662). For one
    example without positions it is that block. A bias has a = [[1]].

    ``exact=True`` in the place of a key says KFLR in so many words. Raises ``TypeError`` for a
    param whose cotangent has no two factors.
    """

    def factors(form: Factored, examples: int) -> Kronecker:
        a, b = form.kronecker(over=ROOTS)
        return Kronecker(a / examples, b / examples)

    return _of_roots(net, loss, samples, factors, stacked=False)


def ggn_root(net: Layer, loss: Loss, *, samples: int = 1) -> Callable[..., Any]:
    """``f(params, x, target, key=None)``: V, like params behind axes (C, N), of each example's GGN.

    Example n's own Gauss-Newton matrix is sum_c V_cn V_cn^T; the mean over n is that of the mean
    loss. C is the number of columns of the loss Hessian's root, or with a key of ``samples``.
    """
    return _of_roots(net, loss, samples, lambda form, _: form.per_example(), stacked=True)


def _of_roots(
    net: Layer,
    loss: Loss,
    samples: int,
    take: Callable[[Factored, int], Any],
    stacked: bool,
) -> Callable[..., Any]:
    require(net, Layer, "net")
    require(loss, Loss, "loss")
    if samples < 1:
        raise ValueError(f"samples must be at least 1, not {samples}")

    def of_batch(
        params: Any, x: Any, target: Any, key: chex.PRNGKey | None = None, *, exact: Any = None
    ) -> Any:
        if key is not None and exact is not None:
            raise TypeError("a key samples and exact does not: give one of them")
        _, examples, residuals, pull = ahead(net, loss, params, x, target)
        if key is None:
            root = loss.hessian_root(residuals)
        else:
            keys = jax.random.split(key, samples)
            root = jax.vmap(loss.sample, (0, None))(keys, residuals) / math.sqrt(samples)

        def leave(step: Step) -> Any:
            return jax.tree.map(lambda _, form: take(form, examples), step.params, factored(step))

        def back(ct: Any) -> Any:
            left, _ = pull(ct, leave)
            return left

        return jax.vmap(back, axis_name=ROOTS, out_axes=0 if stacked else None)(root)

    return of_batch
