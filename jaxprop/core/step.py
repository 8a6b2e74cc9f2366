"""One layer's step in the walk back, and the kinds of visit."""

from __future__ import annotations

import abc
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import jax
import numpy as np

from jaxprop.core import tree
from jaxprop.core.types import Cotangent, Params, PyTree, Residuals

if TYPE_CHECKING:
    from jaxprop.core.layer import Layer


FLOAT = np.dtype(float)


class Step(NamedTuple):
    """One layer's step in the walk back: the inputs and the results of its ``backward``.

    Attributes:
        layer: the layer.
        params: its params, unlearned arrays and side inputs included.
        residuals: what its ``forward`` saved.
        ct: the cotangent of its output.
        d_params: the cotangent of its params, with a form or an array for each learned param and
            ``()`` for anything else.
        d_x: the cotangent of its input.
        place: the layer's node in the tree that the walk iterates over: its params, or what a
            ``Placed`` visit keeps there.
    """

    layer: Layer
    params: Params
    residuals: Residuals
    ct: Cotangent
    d_params: Cotangent
    d_x: Cotangent
    place: PyTree

    @classmethod
    def of(
        cls,
        layer: Layer,
        params: Params,
        residuals: Residuals,
        ct: Cotangent,
        d_params: Cotangent,
        d_x: Cotangent,
        place: PyTree,
    ) -> Step:
        """Return the step, with ``()`` in d_params where a type in params says "not learned"."""
        d_params = tree.learned_cotangents(params, d_params)
        return cls(layer, params, residuals, ct, d_params, d_x, place)

    @property
    def learned(self) -> Params:
        """The learned params, with ``()`` for anything else."""
        params = tree.learned(self.params)
        if any(map(_is_counted, jax.tree.leaves(params))):
            params = tree.without_unmarked(params, self.d_params)
        return params


def _is_counted(leaf: Any) -> bool:
    """Return whether a leaf has no derivative: a bool, an integer (also Python's), or a key."""
    if isinstance(leaf, int):
        return True
    return getattr(getattr(leaf, "dtype", FLOAT), "kind", "i") in "biu"  # keys have no kind


Visit: TypeAlias = Callable[[Step], Any]


class Total(NamedTuple):
    """A visit's result that is added up over the layers of a ``repeat`` instead of stacked.

    Attributes:
        value: a tree of arrays.
    """

    value: Any


class Layerwise(NamedTuple):
    """A visit that may run at each layer of a stack, instead of once for the whole stack.

    This holds for a result that is computed for each param, or for each entry. It does not hold for
    a result of a layer's params together, because there the layers of a function's scan count as
    one layer. The results are stacked as those of a ``repeat`` are.

    Attributes:
        visit: the visit.
    """

    visit: Visit

    def __call__(self, step: Step) -> Any:
        return self.visit(step)


class Placed(abc.ABC):
    """A visit for a walk over a tree of places instead of a tree of params.

    Such a tree is like params, but with whatever the visit keeps in a param's place, such as the
    param and its optimizer's state. A layer's own place is ``step.place``. The visit asks a form
    for its sum only.
    """

    @abc.abstractmethod
    def params(self, place: PyTree) -> Params:
        """Return the params that a tree of places holds."""

    @abc.abstractmethod
    def __call__(self, step: Step) -> PyTree:
        """Return the result that the walk collects for a layer."""


class Replacing(Placed):
    """A visit whose results replace the places that the walk iterates over, in the same memory.

    Its result for a layer is that layer's new place. A ``repeat`` holds the places of its layers in
    stacks, and writes each new place where the old one was.
    """


def params_of(place: PyTree, visit: Visit) -> Params:
    """Return the params at one place of the tree that the walk iterates over."""
    return visit.params(place) if isinstance(visit, Placed) else place
