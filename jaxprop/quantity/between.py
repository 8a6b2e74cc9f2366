"""What the gradients of two batches have in common, and the tangent kernel of a net."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from jaxprop.core.arrays import sum_over
from jaxprop.core.batch import Batch
from jaxprop.core.checks import check_flag, require
from jaxprop.core.cotangents import factored
from jaxprop.core.coupling import check_uncoupled
from jaxprop.core.describe import shapes
from jaxprop.core.forms import is_factored
from jaxprop.core.layer import Layer
from jaxprop.core.loss import Loss
from jaxprop.core.types import Params, PyTree
from jaxprop.core.walk import check_net_and_loss, forward
from jaxprop.quantity.base import everything

Pair = tuple[PyTree, PyTree]


def inner_products(net: Layer, loss: Loss) -> Callable[..., Float[Array, "n m"]]:
    """Return ``f(params, (x, target), (x2, target2))``, <g_n, h_m> between two batches, (N, M).

    g_n is the gradient of example n's own loss in the first batch, h_m that of m in the second.
    From factors: for a dense layer (x_n . x_m)(ct_n . ct_m), summed over pairs of positions where
    that is cheaper than the gradients themselves. TracIn (Pruthi et al. 2020,
    https://arxiv.org/abs/2002.08484) sums these over checkpoints. ``jp.per_example_sq_norms`` is
    the self-influence.

    Args:
        net: the network. One that couples the examples of a batch raises ``ValueError``.
        loss: the loss.

    Example:
        >>> import jax, jax.numpy as jnp, jaxprop as jp
        >>> net, loss, x = jp.chain(jp.Dense(2)), jp.HalfSquaredError(), jnp.ones((3, 4))
        >>> params = net.init(jax.random.key(0), x)
        >>> batch = x, jnp.zeros((3, 2))
        >>> jp.inner_products(net, loss)(params, batch, (x[:2], jnp.ones((2, 2)))).shape
        (3, 2)
    """
    check_net_and_loss(net, loss)

    def of_batches(
        params: Params, batch: Pair, other: Pair, *, key: Any = None, mask: Any = None
    ) -> Float[Array, "n m"]:
        """Return the inner products of the gradients of two batches."""
        return products(*(_of_loss(net, loss, params, each, key, mask) for each in (batch, other)))

    of_batches.__name__ = of_batches.__qualname__ = "inner_products"
    return of_batches


def ntk(net: Layer, *, full: bool = False) -> Callable[..., Array]:
    """Return ``f(params, x, x2=None)``, the empirical neural tangent kernel between two batches.

    With J_n the Jacobian of the output y (C,) of example n by the params, it is
    tr J_n J_m^T / C, (N, M), or in full J_n J_m^T, (N, M, C, C) (Jacot et al. 2018,
    https://arxiv.org/abs/1806.07572). A walk back from each output leaves factors, whose products
    are formed without the Jacobian.

    Args:
        net: the network, whose y is one array; more axes than one count as one.
        full: whether to return the whole kernel instead of the mean over outputs.

    Example:
        >>> import jax, jax.numpy as jnp, jaxprop as jp
        >>> net, x = jp.chain(jp.Dense(8), jp.Tanh(), jp.Dense(3)), jnp.eye(4)
        >>> params = net.init(jax.random.key(0), x)
        >>> jp.ntk(net)(params, x).shape, jp.ntk(net, full=True)(params, x, x[:2]).shape
        ((4, 4), (4, 2, 3, 3))
    """
    require(net, Layer, "ntk: net")
    check_flag("ntk: full", full)

    def kernel(
        params: Params, x: PyTree, x2: PyTree = None, *, key: Any = None, mask: Any = None
    ) -> Array:
        """Return the tangent kernel between the examples of x and those of x2."""
        bound = net.bind(params, key=key, mask=mask)
        forms, outputs = _by_output(net, bound, x)
        others, _ = (forms, outputs) if x2 is None else _by_output(net, bound, x2)
        columns = jnp.arange(outputs)
        if not full:

            def trace(c: Array) -> Float[Array, "n m"]:
                return products(forms(c), others(c))

            return sum_over(trace, columns) / outputs
        row = jax.vmap(products, (None, 0))
        of_all = jax.vmap(others)(columns)
        return jnp.moveaxis(jax.lax.map(lambda c: row(forms(c), of_all), columns), (0, 1), (2, 3))

    kernel.__name__ = kernel.__qualname__ = "ntk"
    return kernel


def products(forms: PyTree, others: PyTree) -> Float[Array, "n m"]:
    """Return the inner products of two batches' gradients, over all params."""
    each, structure = jax.tree.flatten(forms, is_leaf=is_factored)
    beside = structure.flatten_up_to(others)
    return everything([form.products_with(o) for form, o in zip(each, beside, strict=True)])


def _by_output(net: Layer, params: Params, x: PyTree) -> tuple[Callable[[Array], PyTree], int]:
    """Return the forms for a walk back from one of the outputs, and how many there are."""
    check_uncoupled(net, params, x)
    y, residuals = net.forward(params, x)
    if not hasattr(y, "shape"):
        raise TypeError(f"ntk: {net} gives {shapes(y)}, not one array")
    outputs = math.prod(y.shape[1:])

    def forms(c: Array) -> PyTree:
        one = jax.nn.one_hot(c, outputs, dtype=y.dtype).reshape(1, *y.shape[1:])
        ct = jnp.broadcast_to(one, y.shape)
        return net.walk(params, residuals, ct, factored)[0]

    return forms, outputs


def check_pair(name: str, batch: object) -> None:
    """Raise ``TypeError``, whose message begins with name, unless batch is (x, target)."""
    if not isinstance(batch, tuple) or len(batch) != 2:
        raise TypeError(f"{name} takes two batches, (x, target) each, not {shapes(batch)}")


def _of_loss(
    net: Layer, loss: Loss, params: Params, batch: Pair, key: Array | None, mask: Array | None
) -> PyTree:
    """Return the forms of each example's own gradient."""
    check_pair("inner_products", batch)
    bound = net.bind(params, key=key, mask=mask)
    check_uncoupled(net, bound, batch[0])
    ahead = forward(net, loss, bound, Batch(*batch))
    return ahead.back(ahead.own_gradient(), factored)[0]
