"""Direct feedback alignment: fixed matrices carry the error at the output to every layer."""

from __future__ import annotations

import math
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from jaxprop.combinators.chain import Chain
from jaxprop.core.arrays import wide
from jaxprop.core.checks import require
from jaxprop.core.child import Child
from jaxprop.core.combinator import Combinator, Wrapper, in_layer, runs, seen_through
from jaxprop.core.describe import structs
from jaxprop.core.layer import Layer
from jaxprop.core.serialization import serializable
from jaxprop.core.step import Replacing, Visit, params_of
from jaxprop.core.tree import Unlearned, is_not_learned
from jaxprop.core.types import Cotangent, Params, PyTree, Residuals, Visited
from jaxprop.rules.feedback import MATRICES


@serializable
class DirectParams(NamedTuple):
    """The params of a chain whose layers are given the error directly.

    Attributes:
        params: the chain's params.
        feedback: for each layer of the chain, an unlearned array (E, *x.shape[1:]) that maps the E
            entries of the error to the layer's x; ``()`` where none is needed.
    """

    params: tuple[Any, ...]
    feedback: tuple[Any, ...]


class DirectFeedbackAlignment(Wrapper, Combinator):
    """A chain y = f_k(... f_1(x)) in which each h before a layer with matrices has cotangent e B.

    e is the cotangent of y (N, ...), and B a fixed random matrix, drawn like the w of a dense layer
    from h to y, with variance 1 / (size of h): dE/dh is not passed on from the layer above
    (Nøkland 2016, https://arxiv.org/abs/1609.01596). A layer between two such layers, such as an
    activation, takes e B back by its own derivative.

    Attributes:
        layer: the chain.
    """

    is_derivative: ClassVar[bool] = False

    def __post_init__(self) -> None:
        require(self.layer, Chain, "direct_feedback_alignment: net")

    def __repr__(self) -> str:
        return f"direct_feedback_alignment({self.layer!r})"

    def children(self) -> tuple[Child, ...]:
        return (Child(self.layer, "params"),)

    def init(self, key: Array, x: PyTree) -> DirectParams:
        return self.init_with_output(key, x)[0]

    def init_with_output(self, key: Array, x: PyTree) -> tuple[DirectParams, PyTree]:
        params, y = self.layer.init_with_output(key, x)
        if not hasattr(y, "shape"):
            raise TypeError(f"{self}: y is not a single array, so it has no single error")
        size, inputs = math.prod(y.shape[1:]), self._inputs(params, x)
        feedback: list[Any] = []
        for index, h in enumerate(inputs):
            if index == 0 or not _has_matrices(self.layers[index]):
                feedback.append(())
                continue
            own = jax.random.fold_in(jax.random.fold_in(key, 1), index)
            fixed = jax.random.normal(own, (size, *h.shape[1:]), h.dtype)
            feedback.append(Unlearned(fixed / math.sqrt(math.prod(h.shape[1:]))))
        return DirectParams(params, tuple(feedback)), y

    @property
    def layers(self) -> tuple[Layer, ...]:
        """The layers of the chain."""
        assert isinstance(self.layer, Chain)
        return self.layer.layers

    def _inputs(self, params: Params, x: PyTree) -> list[Any]:
        """Return the shapes of each layer's x."""
        inputs = [structs(x)]
        for layer, p in zip(self.layers, params, strict=True):
            inputs.append(jax.eval_shape(lambda p, x, f=layer: f.forward(p, x)[0], p, inputs[-1]))
        return inputs[:-1]

    def forward(self, params: DirectParams, x: PyTree) -> tuple[PyTree, Residuals]:
        return self.layer.forward(params.params, x)

    def walk(
        self, place: DirectParams, residuals: Residuals, ct: Cotangent, visit: Visit
    ) -> tuple[Visited, Cotangent]:
        feedback = params_of(place, visit).feedback
        error = ct.reshape(len(ct), math.prod(ct.shape[1:]))
        visited: list[Visited] = []
        steps = zip(self.layers, place.params, residuals, feedback, strict=True)
        for index, (layer, p, r, fixed) in reversed(list(enumerate(steps))):
            with in_layer(index, layer):
                here, ct = layer.walk(p, r, ct, visit)
            visited.append(here)
            if fixed != ():
                b = fixed.value if is_not_learned(fixed) else fixed
                ct = jnp.tensordot(wide(error), wide(b), 1).astype(ct.dtype)
        unvisited = place.feedback if isinstance(visit, Replacing) else tuple(() for _ in feedback)
        return DirectParams(tuple(reversed(visited)), unvisited), ct


def direct_feedback_alignment(net: Layer) -> DirectFeedbackAlignment:
    """Return the chain with the error given to each layer directly (Nøkland 2016).

    The error enters before each layer of the chain that has matrices (dense, convolution,
    recurrent), except before the chain's first layer; inside a layer made of layers the chain rule
    holds. params become a ``DirectParams``, whose feedback is unlearned.

    Args:
        net: a ``jp.chain``, whose y is one array.

    Raises:
        TypeError: for a net that is not a chain.
    """
    return DirectFeedbackAlignment(net)


def _has_matrices(layer: Layer) -> bool:
    return any(isinstance(seen_through(run.layer), MATRICES) for run in runs(layer))
