"""A part of a function as a layer, whose backward a rule may replace."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jaxprop.core.arrays import is_inexact
from jaxprop.core.describe import shapes
from jaxprop.core.layer import Layer
from jaxprop.core.types import Cotangent, Params, PyTree
from jaxprop.traced.views import placed


class PartLayer(Layer):
    """y = run(params, x), a part of a function, as the layer that a rule is given.

    x holds those inputs of the part that depend on the function's x, with the one example on axis
    0; params holds the others. If no input depends on x, as in a part that rounds params, the
    params are its x.

    Attributes:
        name: the rule's key.
        number: its number among the parts with a rule.
        run: the function of one example, without an axis for it.
        others: the names of the primitives in it that are not affine in x.
        of_data: whether it has several inputs in x and no floating params, like attention's scores.
    """

    name: str
    number: int
    run: Callable[[Params, PyTree], PyTree]
    others: tuple[str, ...] = ()
    of_data: bool = False

    def __repr__(self) -> str:
        return self.name

    def init(self, key: Array, x: PyTree) -> Params:
        raise TypeError(f"{self} is a part of a function, and its params are of that")

    def check_affine(self, rule: str) -> None:
        """Raise ``TypeError`` if the part is not affine in x, as the rule requires."""
        if self.others:
            raise TypeError(
                f"{rule} is for products, and {self} does more ({', '.join(self.others)}): name "
                f"its products alone, such as '{self}/dot_general'"
            )

    def check_params(self, params: Params, x: PyTree) -> None:
        """Accept whatever the function passes."""

    def forward(self, params: Params, x: PyTree) -> tuple[PyTree, PyTree]:
        return jax.vmap(self.run, (None, 0))(params, x), x

    def backward(self, params: Params, x: PyTree, ct: Cotangent) -> tuple[Cotangent, Cotangent]:
        leaves, structure = jax.tree.flatten(x)
        moving = list(map(is_inexact, leaves))

        def of_moving(params: Params, some: list[Array]) -> PyTree:
            return self.forward(params, structure.unflatten(placed(some, moving, leaves)))[0]

        _, pull = jax.vjp(of_moving, params, list(filter(is_inexact, leaves)))
        d_params, d_some = pull(ct)
        return d_params, structure.unflatten(placed(d_some, moving, [None] * len(moving)))


def turned(
    layer: Layer, params: Params, x: PyTree, run: Callable[..., PyTree], scope: str
) -> PyTree:
    """Return y = run(params, x), where the layer's backward makes the cotangent of x.

    The params have their true derivative, since y is computed from an x that is cut off.

    Args:
        layer: the part as a layer, for a batch of one.
        params: its params.
        x: its x, without an axis for the example.
        run: its function.
        scope: the named scopes around it, which an explanation shows.
    """
    with _scoped(scope):
        cut_off = jax.tree.map(
            lambda leaf: jaxprop_cut(leaf) if is_inexact(leaf) else leaf, (params, x)
        )
    fixed, apart = cut_off
    y = run(params, apart)
    leaves = jax.tree.leaves(y)
    if not leaves:
        return y
    if not all(map(is_inexact, leaves)):
        raise ValueError(f"function: {layer} gives {shapes(y)}, and integers have no cotangent")
    if _passes_on(layer, fixed, x, y):
        with _scoped(scope):
            return jaxprop_passed_on(y, x)

    @jax.custom_vjp
    def by_layer(params: Params, x: PyTree, y: PyTree) -> PyTree:
        del params
        return jax.tree.map(lambda leaf: _separate(leaf, x), y)

    def ahead(params: Params, x: PyTree, y: PyTree) -> tuple[PyTree, PyTree]:
        y = jax.tree.map(lambda leaf: _separate(leaf, x), y)
        return y, (params, layer.forward(params, _alone(x))[1])

    def back(saved: PyTree, ct: Cotangent) -> tuple[None, PyTree, Cotangent]:
        params, inner = saved
        d_x = layer.backward(params, inner, _alone(ct))[1]
        return None, jax.tree.map(lambda leaf: leaf[0], d_x), ct

    by_layer.defvjp(ahead, back)
    with _scoped(scope):
        return by_layer(fixed, x, y)


def _scoped(scope: str) -> contextlib.AbstractContextManager[Any]:
    return jax.named_scope(scope) if scope else contextlib.nullcontext()


@jax.custom_jvp
def jaxprop_cut(x: Any) -> Any:
    """Return x, with an innermost derivative of 0; derivatives further out are those of x.

    For a view of params this is the view's value, without the example's own share.
    """
    return x


@jaxprop_cut.defjvp
def _cut_off(primals: tuple[Any], tangents: tuple[Any]) -> tuple[Any, Any]:
    (x,), (tangent,) = primals, tangents
    return x, jax.tree.map(jnp.zeros_like, tangent)


def _separate(y: Array, x: PyTree) -> Array:
    """Return y as a separate value for each example, if x is.

    An x made of params may be separate for each example where y is the same for all examples. The
    cotangent of that y would be a sum over examples.
    """
    for leaf in filter(is_inexact, jax.tree.leaves(x)):
        never = jnp.zeros((), bool)
        y = y + jnp.where(never, leaf.ravel()[:1].sum(), 0).astype(y.dtype)
    return y


def _passes_on(layer: Layer, params: Params, x: PyTree, y: PyTree) -> bool:
    """Return whether the layer hands back ct as it is; raise if what it hands back is unlike x."""
    passes: list[bool] = []

    def trial(params: Params, x: PyTree, ct: Cotangent) -> Cotangent:
        d_x = layer.backward(params, layer.forward(params, x)[1], ct)[1]
        passes.append(d_x is ct)
        return d_x

    d_x = jax.eval_shape(trial, params, *map(_alone, (x, y)))
    like = jax.tree.map(lambda leaf: leaf[None] if is_inexact(leaf) else None, x)
    if shapes(d_x) != shapes(like):
        raise ValueError(f"function: {layer} hands back {shapes(d_x)} for an x {shapes(like)}")
    return passes[0]


@jax.custom_vjp
def jaxprop_passed_on(y: Array, x: Array) -> Array:
    """Return y, whose cotangent goes to x too; if x is a view of params, so is it (``moving``)."""
    return _separate(y, x)


def _passed_on_ahead(y: Array, x: Array) -> tuple[Array, tuple[()]]:
    return _separate(y, x), ()


def _passed_on_back(saved: tuple[()], ct: Array) -> tuple[Array, Array]:
    del saved
    return ct, ct


jaxprop_passed_on.defvjp(_passed_on_ahead, _passed_on_back)


def _alone(tree: PyTree) -> PyTree:
    """Return the one example of a tree as a batch."""
    return jax.tree.map(lambda leaf: leaf[None], tree)
