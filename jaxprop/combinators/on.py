"""A layer on one part of an x that is a dict or a tuple."""

from __future__ import annotations

from jax import Array

from jaxprop.core.child import Child, part_of
from jaxprop.core.combinator import Combinator, Wrapper
from jaxprop.core.describe import structs
from jaxprop.core.layer import Layer
from jaxprop.core.step import Visit
from jaxprop.core.types import Cotangent, Params, PyTree, Residuals, Visited


class On(Wrapper, Combinator):
    """y is x with f(x_i) in place of x_i, so dE/dx is ct with f's own d_x in place of ct_i.

    params and residuals are f's.

    Attributes:
        layer: f.
        part: i, a key of a dict, an index of a tuple, or a field of a named tuple.
    """

    part: str | int

    def __repr__(self) -> str:
        return f"on({self.part!r}, {self.layer!r})"

    def init(self, key: Array, x: PyTree) -> Params:
        return self.layer.init(key, part_of(self, x, self.part))

    def init_with_output(self, key: Array, x: PyTree) -> tuple[Params, PyTree]:
        params, y = self.layer.init_with_output(key, part_of(self, x, self.part))
        return params, self._put(structs(x), y)

    def forward(self, params: Params, x: PyTree) -> tuple[PyTree, Residuals]:
        y, residuals = self.layer.forward(params, part_of(self, x, self.part))
        return self._put(x, y), residuals

    def walk(
        self, place: PyTree, residuals: Residuals, ct: Cotangent, visit: Visit
    ) -> tuple[Visited, Cotangent]:
        visited, d_part = self.layer.walk(place, residuals, part_of(self, ct, self.part), visit)
        return visited, self._put(ct, d_part)

    def _put(self, x: PyTree, part: PyTree) -> PyTree:
        return Child(self.layer, self.part).put(x, part)


def on(part: str | int, layer: Layer) -> On:
    """Return the layer acting on one part of x, a dict or a tuple; other parts pass through.

    params are the layer's.

    Args:
        part: the part's key, index or field.
        layer: the layer; its output stands in the part's place.

    Raises:
        TypeError: for a ``layer`` that is not a layer.
        ValueError: in ``init`` and ``forward``, for an x without that part.

    Example:
        >>> import jaxprop as jp
        >>> heads = jp.branch(digit=jp.Dense(10), angle=jp.Dense(8))
        >>> jp.chain(heads, jp.on("angle", jp.chain(jp.Tanh(), jp.Dense(1))))
        chain(branch(digit=Dense(10), angle=Dense(8)), on('angle', chain(Tanh(), Dense(1))))
    """
    return On(layer, part)
