"""A part of a function as a layer, which a rule may put another backward into."""

from __future__ import annotations

from collections.abc import Callable

import jax
from jax import Array

from jaxprop.core.describe import shapes
from jaxprop.core.layer import Layer
from jaxprop.core.types import Cotangent, Params, PyTree
from jaxprop.traced.taps import is_inexact
from jaxprop.traced.views import placed


class Part(Layer):
    """y = run(params, x), a part of a function, as the layer that a rule is given.

    x is what the part takes of what depends on the function's x, with the one example on axis 0;
    params are what else it takes. One that takes nothing of x, such as one that rounds params, has
    these for its x.

    Attributes:
        name: the rule's key.
        number: which of the parts with a rule it is.
        run: the function of one example, without an axis for it.
    """

    name: str
    number: int
    run: Callable[[Params, PyTree], PyTree]

    def __repr__(self) -> str:
        return self.name

    def init(self, key: Array, x: PyTree) -> Params:
        raise TypeError(f"{self} is a part of a function, and its params are of that")

    def check_params(self, params: Params, x: PyTree) -> None:
        """Take what the function gives."""

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


def turned(layer: Layer, params: Params, x: PyTree, y: PyTree) -> PyTree:
    """Return y, whose cotangent goes to x by the layer's backward, and on to what made y.

    Args:
        layer: of a batch of one.
        params: its params.
        x: its x, without an axis for the example.
        y: its y, made of an x that has no cotangent.
    """
    if not all(map(is_inexact, jax.tree.leaves(y))):
        raise ValueError(f"function: {layer} gives {shapes(y)}, and integers have no cotangent")
    if _passes_on(layer, params, x, y):
        return passed_on(y, x)

    @jax.custom_vjp
    def by_layer(params: Params, x: PyTree, y: PyTree) -> PyTree:
        del params, x
        return y

    def ahead(params: Params, x: PyTree, y: PyTree) -> tuple[PyTree, PyTree]:
        y = by_layer(params, x, y)  # so that what differentiates this way forward takes the rule
        return y, (params, layer.forward(params, _alone(x))[1])

    def back(saved: PyTree, ct: Cotangent) -> tuple[None, PyTree, Cotangent]:
        params, inner = saved
        d_x = layer.backward(params, inner, _alone(ct))[1]
        return None, jax.tree.map(lambda leaf: leaf[0], d_x), ct

    by_layer.defvjp(ahead, back)
    return by_layer(params, x, y)


def _passes_on(layer: Layer, params: Params, x: PyTree, y: PyTree) -> bool:
    """Return whether the layer hands back ct as it is; raise if that is nothing like x."""
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
def passed_on(y: Array, x: Array) -> Array:
    """Return y, whose cotangent is that of x too: of a view of params it is a view (``moving``)."""
    del x
    return y


def _passed_on_ahead(y: Array, x: Array) -> tuple[Array, tuple[()]]:
    return passed_on(y, x), ()


def _passed_on_back(saved: tuple[()], ct: Array) -> tuple[Array, Array]:
    del saved
    return ct, ct


passed_on.defvjp(_passed_on_ahead, _passed_on_back)


def _alone(tree: PyTree) -> PyTree:
    """Return the one example of a tree as a batch."""
    return jax.tree.map(lambda leaf: leaf[None], tree)
