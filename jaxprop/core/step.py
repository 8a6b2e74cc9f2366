"""One layer's moment in the walk back, and the visit that is paid to it."""

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
    """One layer in the walk back: its inputs, the cotangent of its output, and its own results.

    Attributes:
        layer: the layer.
        params: its params, unlearned arrays and side inputs included.
        residuals: what its ``forward`` saved.
        ct: the cotangent of its output.
        d_params: the cotangent of its params, a form or an array for each one that is learned and
            ``()`` for whatever is not.
        d_x: the cotangent of its input.
        place: what stands in the layer's place in the tree that the walk goes through: its params,
            or what a ``Placed`` visit keeps there.
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
        """Return the step, with nothing for what the types in params say is not learned."""
        d_params = tree.learned_cotangents(params, d_params)
        return cls(layer, params, residuals, ct, d_params, d_x, place)

    @property
    def learned(self) -> Params:
        """The params that are learned, with ``()`` for whatever is not."""
        params = tree.learned(self.params)
        if any(map(_is_counted, jax.tree.leaves(params))):
            params = tree.without_unmarked(params, self.d_params)
        return params


def _is_counted(leaf: Any) -> bool:
    """Return whether a leaf has no derivative: booleans, integers, Python's too, and keys."""
    if isinstance(leaf, int):
        return True
    return getattr(getattr(leaf, "dtype", FLOAT), "kind", "i") in "biu"  # keys have no kind


Visit: TypeAlias = Callable[[Step], Any]


class Total(NamedTuple):
    """A visit's result that is added up over the layers of a ``repeat``, where others are stacked.

    Attributes:
        value: a tree of arrays.
    """

    value: Any


class Layerwise(NamedTuple):
    """A visit that may be paid to each layer of a stack, where it would be paid to the stack.

    So may whatever is asked of each param, or of each entry; not what is asked of a layer's params
    together, where the layers of a function's scan count as one. Its results are stacked as those
    of a ``repeat`` are.

    Attributes:
        visit: the visit.
    """

    visit: Visit

    def __call__(self, step: Step) -> Any:
        return self.visit(step)


class Placed(abc.ABC):
    """A visit to a walk through a tree of places instead of a tree of params.

    Such a tree is like params, but with whatever the visit keeps in a param's place, such as the
    param and its optimizer's state. A layer's own is ``step.place``. Of a form it asks for nothing
    but the sum.
    """

    @abc.abstractmethod
    def params(self, place: PyTree) -> Params:
        """Return the params that a tree of places holds."""

    @abc.abstractmethod
    def __call__(self, step: Step) -> PyTree:
        """Return what is collected of a layer."""


class Replacing(Placed):
    """A visit whose results replace the places that the walk goes through, in the same memory.

    What it returns for a layer is that layer's new place. A ``repeat`` holds the places of its
    layers in stacks, and writes each new one where the old one was.
    """


def params_of(place: PyTree, visit: Visit) -> Params:
    """Return the params that stand in a place of the tree that the walk goes through."""
    return visit.params(place) if isinstance(visit, Placed) else place
