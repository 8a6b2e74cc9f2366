"""Products of curvature matrices with a vector, without the matrices."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from jaxprop.core.arrays import weighted, wide
from jaxprop.core.batch import Batch, weighted_batch
from jaxprop.core.checks import check_flag
from jaxprop.core.cotangents import gradient
from jaxprop.core.describe import shapes
from jaxprop.core.layer import Layer
from jaxprop.core.loops import sum_over
from jaxprop.core.loss import Loss
from jaxprop.core.step import Layerwise
from jaxprop.core.tree import learned, like_params, merged
from jaxprop.core.types import Cotangent, Params, PyTree
from jaxprop.core.walk import Forward, check_net_and_loss, forward
from jaxprop.quantity.source import HessianRoot, LossGradient, Source
from jaxprop.quantity.together import SAMPLES
from jaxprop.traced.function import with_forward_rules

Product = Callable[[Params], Params]


class OfVector(Protocol):
    """A function of a batch and of a vector v, as returned by ``jp.hvp(net, loss)``.

    Args:
        params: the net's params.
        x: the inputs.
        target: the targets.
        v: like params; None to return the product as a function of v. For many v, this computes
            once whatever does not depend on v.
        key: a key, as for any function of a batch.
        mask: a mask, as for any function of a batch.
        weights: weights, as for any function of a batch.
        divisor: a divisor, as for any function of a batch.
    """

    def __call__(
        self,
        params: Params,
        x: PyTree,
        target: PyTree = None,
        v: Params | None = None,
        *,
        key: Array | None = None,
        mask: Array | None = None,
        weights: Array | None = None,
        divisor: float | Array | None = None,
    ) -> Any: ...


def hvp(net: Layer, loss: Loss) -> OfVector:
    """Return ``f(params, x, target, v)``, which multiplies v by the Hessian of the mean loss.

    The product, like params, is the derivative along v of the gradient by the hand-written chain,
    forward over reverse (Pearlmutter 1994, https://doi.org/10.1162/neco.1994.6.1.147). Without v,
    ``f`` returns the product as a function, linear in v, for CG or Lanczos:

        product = jp.hvp(net, loss)(params, x, target)
        lineax.FunctionLinearOperator(product, jax.eval_shape(lambda: params))

    Args:
        net: the network.
        loss: the loss.

    Example:
        >>> import jax, jax.numpy as jnp, jaxprop as jp
        >>> net, loss, x = jp.chain(jp.Dense(2)), jp.HalfSquaredError(), jnp.eye(3)
        >>> params = net.init(jax.random.key(0), x)
        >>> jp.hvp(net, loss)(params, x, x[:, :2], params)[0].w.shape
        (3, 2)
    """

    product = functools.partial(hessian, net, loss)
    return _of_vector("hvp", net, loss, product)


def hessian(net: Layer, loss: Loss, params: Params, batch: Batch) -> Product:
    """Return the product of the Hessian of the mean loss with v, for v like the learned params."""
    net = with_forward_rules(net)

    def grads(arrays: Params) -> Params:
        ahead = forward(net, loss, merged(params, arrays), batch)
        return learned(ahead.back(ahead.mean_gradient(), Layerwise(gradient))[0])

    return jax.linearize(grads, learned(params))[1]


def ggn_vp(net: Layer, loss: Loss) -> OfVector:
    """Return ``f(params, x, target, v)``, which multiplies v by the Gauss-Newton matrix.

    The product, like params, is the mean over examples of J_n^T H_n J_n v, with J_n the Jacobian of
    the net's output and H_n the Hessian of the loss with respect to it. J_n is applied by the
    forward derivative along v, and J_n^T by the hand-written chain (Schraudolph 2002,
    https://doi.org/10.1162/08997660260028683).

    Args:
        net: the network.
        loss: the loss.
    """

    def product(params: Params, batch: Batch) -> Product:
        of = _Jacobian.at(net, loss, params, batch)
        hessian = of.hessian(loss, batch)
        return lambda v: of.back(hessian(of.along(v)))

    return _of_vector("ggn_vp", net, loss, product)


def fisher_vp(
    net: Layer, loss: Loss, *, samples: int | None = None, empirical: bool = False
) -> OfVector:
    """Return ``f(params, x, target, v)``, which multiplies v by the Fisher information matrix.

    The product, like params, is the mean over examples of J_n^T E[s s^T] J_n v, with s the gradient
    of the loss with respect to the net's output at a target drawn from the model. For the losses
    here the expectation is the Hessian, and the matrix is that of ``jp.ggn_vp``.

    Args:
        net: the network.
        loss: the loss.
        samples: how many targets are drawn for each example, which takes a key; None for the
            expectation.
        empirical: whether s is the gradient at the example's own target instead.
    """
    check_flag("fisher_vp: empirical", empirical)
    if empirical and samples is not None:
        raise ValueError(
            "the empirical Fisher matrix is of the targets: there is nothing to sample"
        )
    source: Source = LossGradient() if empirical else HessianRoot(samples)

    def product(params: Params, batch: Batch) -> Product:
        of = _Jacobian.at(net, loss, params, batch)
        key = None if batch.key is None else jax.random.fold_in(batch.key, SAMPLES)
        columns = source.columns(of.ahead, key)

        def weighed(v: Params) -> Params:
            u = of.along(v)

            def of_column(c: Array) -> Cotangent:
                s = columns.column(c)
                dots = _inner(u, s)
                return jax.tree.map(lambda s: weighted(wide(s), dots), s)

            return of.back(sum_over(of_column, jnp.arange(columns.number)))

        return weighed

    return _of_vector("fisher_vp", net, loss, product)


class _Jacobian(NamedTuple):
    """The Jacobian J of the net's output with respect to its learned params.

    Attributes:
        ahead: the forward pass.
        y: the output, including that of examples with weight 0.
        along: the function from v, like the learned params, to J v.
    """

    ahead: Forward
    y: PyTree
    along: Callable[[Params], PyTree]

    @classmethod
    def at(cls, net: Layer, loss: Loss, params: Params, batch: Batch) -> _Jacobian:
        """Return the Jacobian at these params, for this batch."""
        net = with_forward_rules(net)
        ahead = forward(net, loss, params, batch)
        y, along = jax.linearize(
            lambda arrays: net.forward(merged(params, arrays), batch.x)[0], learned(params)
        )
        return cls(ahead, y, along)

    def hessian(self, loss: Loss, batch: Batch) -> Callable[[PyTree], Cotangent]:
        """Return the product of each example's loss Hessian in y with u, for u like y."""

        def gradient_of(y: PyTree) -> Cotangent:
            _, residuals = loss.forward(y, batch.target)
            return loss.backward(residuals)

        return jax.linearize(gradient_of, self.y)[1]

    def back(self, ct: Cotangent) -> Params:
        """Return the mean over examples of J_n^T ct_n."""
        mean = self.ahead.examples.mean_cotangent(self.ahead.examples.counting(ct))
        return learned(self.ahead.back(mean, Layerwise(gradient))[0])


def quadratic_form(
    net: Layer, loss: Loss, params: Params, batch: Batch, vectors: Sequence[Params]
) -> Float[Array, "k k"]:
    """Return <v_i, F v_j> for the Gauss-Newton matrix F, from forward passes alone.

    Args:
        net: the network.
        loss: the loss.
        params: its params, side inputs included.
        batch: the batch.
        vectors: like the learned params.
    """
    of = _Jacobian.at(net, loss, params, batch)
    hessian = of.hessian(loss, batch)
    along = [of.ahead.examples.counting(of.along(v)) for v in vectors]
    products = [hessian(u) for u in along]

    def mean(u: PyTree, hu: PyTree) -> Array:
        return of.ahead.examples.mean(_inner(u, hu))

    return jnp.stack([jnp.stack([mean(u, hu) for hu in products]) for u in along])


def _inner(u: PyTree, ct: Cotangent) -> Float[Array, " n"]:
    """Return each example's inner product of u, which is like y, with a cotangent of y."""

    def of_leaf(u: Array, ct: Array | None) -> Array | None:
        return None if ct is None else jnp.sum(wide(u) * wide(ct), axis=tuple(range(1, ct.ndim)))

    return jnp.stack(jax.tree.leaves(jax.tree.map(of_leaf, u, ct))).sum(axis=0)


def _of_vector(
    name: str, net: Layer, loss: Loss, product: Callable[[Params, Batch], Product]
) -> OfVector:
    check_net_and_loss(net, loss)

    def function(
        params: Params,
        x: PyTree,
        target: PyTree = None,
        v: Params | None = None,
        *,
        key: Array | None = None,
        mask: Array | None = None,
        weights: Array | None = None,
        divisor: float | Array | None = None,
    ) -> Any:
        bound = net.bind(params, key=key, mask=mask)
        times = product(bound, weighted_batch(net, bound, x, target, key, weights, divisor))

        def of(v: Params) -> Params:
            _check_like(name, v, params)
            arrays = jax.tree.map(lambda p, v: jnp.asarray(v, p.dtype), learned(params), learned(v))
            return like_params(params, times(arrays))

        return of if v is None else of(v)

    function.__name__ = function.__qualname__ = name
    return function


def _check_like(name: str, v: Params, params: Params) -> None:
    ours, theirs = (jax.tree.flatten(learned(tree)) for tree in (params, v))
    same = ours[1] == theirs[1]
    if not same or [jnp.shape(p) for p in ours[0]] != [jnp.shape(p) for p in theirs[0]]:
        raise ValueError(f"{name}: v is {shapes(v)}, and params are {shapes(params)}")
