"""Inner products between the gradients of two batches, and the tangent kernel of a net."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from jaxprop.core.batch import Batch
from jaxprop.core.checks import check_flag, require
from jaxprop.core.cotangents import factored
from jaxprop.core.coupling import check_uncoupled
from jaxprop.core.describe import shapes
from jaxprop.core.forms import Factored, Outer, Rearranged, Stacked, is_factored
from jaxprop.core.layer import Layer
from jaxprop.core.loops import sum_over
from jaxprop.core.loss import Loss
from jaxprop.core.step import Layerwise, Visit
from jaxprop.core.types import Params, PyTree
from jaxprop.core.walk import check_net_and_loss, forward
from jaxprop.quantity.base import everything, map_forms

Pair = tuple[PyTree, PyTree]
OUTPUTS = 16  # how many outputs to walk back from at a time, for a trace


class InnerProducts(Protocol):
    """A function of two batches, as returned by ``jp.inner_products(net, loss)``."""

    def __call__(
        self,
        params: Params,
        batch: Pair,
        other: Pair,
        *,
        key: Array | None = None,
        mask: Array | None = None,
        other_mask: Array | None = None,
    ) -> Float[Array, "n m"]: ...


class TangentKernel(Protocol):
    """A function of the inputs of one or two batches, as returned by ``jp.ntk(net)``."""

    def __call__(
        self,
        params: Params,
        x: PyTree,
        x2: PyTree = None,
        *,
        key: Array | None = None,
        mask: Array | None = None,
        other_mask: Array | None = None,
    ) -> Array: ...


def inner_products(net: Layer, loss: Loss) -> InnerProducts:
    """Return ``f(params, (x, target), (x2, target2))``, which computes all <g_n, h_m>, (N, M).

    g_n is the gradient of example n's own loss in the first batch, h_m that of example m in the
    second. Their products are computed from factors: for a dense layer as
    (x_n . x_m)(ct_n . ct_m), summed over pairs of positions where that is cheaper than with the
    gradients themselves. TracIn (Pruthi et al. 2020, https://arxiv.org/abs/2002.08484) sums these
    products over checkpoints; its self-influence is ``jp.per_example_sq_norms``.

    ``f`` also takes ``key=`` for layers that draw, ``mask=`` for the first batch and
    ``other_mask=`` for the second, by default the same mask.

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
        params: Params,
        batch: Pair,
        other: Pair,
        *,
        key: Array | None = None,
        mask: Array | None = None,
        other_mask: Array | None = None,
    ) -> Float[Array, "n m"]:
        """Return the inner products of the gradients of two batches."""
        masks = mask, mask if other_mask is None else other_mask
        each = zip((batch, other), masks, strict=True)
        return products(*(_of_loss(net, loss, params, batch, key, mask) for batch, mask in each))

    of_batches.__name__ = of_batches.__qualname__ = "inner_products"
    return of_batches


def ntk(net: Layer, *, full: bool = False) -> TangentKernel:
    """Return ``f(params, x, x2=None)``, which computes the empirical neural tangent kernel.

    With J_n the Jacobian of example n's output y (C,) with respect to the params, the kernel
    between two batches is tr J_n J_m^T / C, (N, M), or in full J_n J_m^T, (N, M, C, C) (Jacot et
    al. 2018, https://arxiv.org/abs/1806.07572). A walk back from many outputs at once leaves
    factors. Each layer's products are computed from these without the Jacobian, as in the
    structured derivatives of Novak et al. 2022, https://arxiv.org/abs/2206.08720, or from the
    layer's g_n where that is cheaper.

    ``f`` also takes ``key=`` for layers that draw, ``mask=`` for x and ``other_mask=`` for x2, by
    default the same mask.

    Args:
        net: the network, whose y is one array; several output axes are treated as one.
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
        params: Params,
        x: PyTree,
        x2: PyTree = None,
        *,
        key: Array | None = None,
        mask: Array | None = None,
        other_mask: Array | None = None,
    ) -> Array:
        """Return the tangent kernel between the examples of x and those of x2."""
        if x2 is None and other_mask is not None:
            raise ValueError("ntk: other_mask is that of x2, and there is none")
        bound = net.bind(params, key=key, mask=mask)
        walk, outputs = _by_output(net, bound, x)
        between = _over_outputs(outputs, full)
        if x2 is None:

            def with_itself(form: Factored) -> Array:
                form = form.for_products(form)
                return between(form, form)

            def of_output(c: Array) -> PyTree:
                return walk(c, Layerwise(lambda step: map_forms(with_itself, factored(step))))

        else:
            other = net.bind(params, key=key, mask=mask if other_mask is None else other_mask)
            walk2, _ = _by_output(net, other, x2)

            def of_output(c: Array) -> PyTree:
                pairs = _paired(walk(c, factored), walk2(c, factored))
                return [between(f.for_products(o), o.for_products(f)) for f, o in pairs]

        def over(outputs: Array) -> Array:
            taken = jax.vmap(of_output, out_axes=-2 if full else None)(outputs)
            return _added(taken, 4 if full else 2)

        most = outputs if full else -(-outputs // -(-outputs // OUTPUTS))
        blocks = jnp.arange(-(-outputs // most) * most).reshape(-1, most)
        # A single step needs no loop, in which convolutions are slow on a CPU.
        total = over(blocks[0]) if len(blocks) == 1 else sum_over(over, blocks)
        return total if full else total / outputs

    kernel.__name__ = kernel.__qualname__ = "ntk"
    return kernel


def _over_outputs(outputs: int, full: bool) -> Callable[[Factored, Factored], Array]:
    """Return a function of two forms of one param, for a walk from one output under ``vmap``.

    Under ``vmap`` the forms' ct have an axis of outputs, and factors that do not depend on the
    output, such as x, do not. The function returns the products for equal outputs, summed, (N, M),
    or in full those for all pairs of outputs, (C, N, M, C).
    """

    @jax.custom_batching.custom_vmap
    def between(form: Factored, other: Factored) -> Array:
        products = _products(form, other)  # 0: linear in ct, yet the same for each output
        return jnp.stack([products] * outputs, axis=-1) if full else products

    @between.def_vmap
    def of_all(size: int, has: Any, form: Any, other: Any) -> tuple[Array, bool]:
        kinds, batched = {type(form), type(other)}, all(jax.tree.leaves(has))
        if kinds == {Rearranged} and form.moves == other.moves:
            return of_all(size, [each.form for each in has], form.form, other.form)
        if kinds == {Stacked} and batched:
            g, h = (jnp.moveaxis(each.g, 0, 1) for each in (form, other))  # (N, C, ...)
            if not full:
                return Stacked(g).products_with(Stacked(h)), False
            rows = [Stacked(jax.lax.collapse(each, 0, 2)) for each in (g, h)]
            products = rows[0].products_with(rows[1]).reshape(*g.shape[:2], *h.shape[:2])
            return jnp.moveaxis(products, 1, 0), True
        if kinds == {Outer} and not full and not (has[0].x or has[1].x):
            wider = [Outer(each.x, _columns_as_outputs(each.ct)) for each in (form, other)]
            return wider[0].products_with(wider[1]), False
        axes, others = jax.tree.map(lambda has: 0 if has else None, tuple(has))
        if full:
            of_row = jax.vmap(_products, (None, others), 2)
            return jax.vmap(of_row, (axes, None))(form, other), True
        return jax.vmap(_products, (axes, others))(form, other).sum(axis=0), False

    return between


def _products(form: Factored, other: Factored) -> Float[Array, "n m"]:
    return form.products_with(other)


def _columns_as_outputs(ct: Float[Array, "c n ... o"]) -> Float[Array, "n ... co"]:
    """Return ct with the features of all outputs side by side on the last axis."""
    return jnp.moveaxis(ct, 0, -2).reshape(*ct.shape[1:-1], ct.shape[0] * ct.shape[-1])


def _added(taken: PyTree, axes: int) -> Array:
    """Return the sum over all params, and over the leading layer axes of stacked ones."""
    return everything(
        [each.sum(axis=tuple(range(each.ndim - axes))) for each in jax.tree.leaves(taken)]
    )


def products(forms: PyTree, others: PyTree) -> Float[Array, "n m"]:
    """Return the inner products of two batches' gradients, over all params."""
    return everything([_products(*pair) for pair in _paired(forms, others)])


def _paired(forms: PyTree, others: PyTree) -> list[tuple[Factored, Factored]]:
    """Return a pair of forms for each param."""
    each, structure = jax.tree.flatten(forms, is_leaf=is_factored)
    return list(zip(each, structure.flatten_up_to(others), strict=True))


def _by_output(net: Layer, params: Params, x: PyTree) -> tuple[Callable[..., PyTree], int]:
    """Return a function that walks back from one output, and the number of outputs."""
    check_uncoupled(net, params, x)
    y, residuals = net.forward(params, x)
    if not hasattr(y, "shape"):
        raise TypeError(f"ntk: {net} gives {shapes(y)}, not one array")
    outputs = math.prod(y.shape[1:])

    def walk(c: Array, visit: Visit) -> PyTree:
        one = jax.nn.one_hot(c, outputs, dtype=y.dtype).reshape(1, *y.shape[1:])
        ct = jnp.broadcast_to(one, y.shape)
        return net.walk(params, residuals, ct, visit)[0]

    return walk, outputs


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
