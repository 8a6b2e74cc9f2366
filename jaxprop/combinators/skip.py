"""The skip connection."""

from __future__ import annotations

from jax import Array

from jaxprop.core.arrays import added
from jaxprop.core.combinator import Combinator, Wrapper
from jaxprop.core.describe import shapes
from jaxprop.core.layer import Layer
from jaxprop.core.step import Visit
from jaxprop.core.types import Cotangent, Params, PyTree, Residuals, Visited


class Skip(Wrapper, Combinator):
    """y = x + f(x), so dE/dx = ct + (f's own d_x); params and residuals are f's.

    Attributes:
        layer: f.
    """

    def __repr__(self) -> str:
        return f"skip({self.layer!r})"

    def init(self, key: Array, x: PyTree) -> Params:
        return self.init_with_output(key, x)[0]

    def init_with_output(self, key: Array, x: PyTree) -> tuple[Params, PyTree]:
        params, y = self.layer.init_with_output(key, x)
        self._check_shape(x, y)
        return params, y

    def forward(self, params: Params, x: Array) -> tuple[Array, Residuals]:
        y, residuals = self.layer.forward(params, x)
        self._check_shape(x, y)
        return added(x, y), residuals

    def walk(
        self, place: PyTree, residuals: Residuals, ct: Cotangent, visit: Visit
    ) -> tuple[Visited, Cotangent]:
        visited, d_x = self.layer.walk(place, residuals, ct, visit)
        return visited, added(ct, d_x).astype(d_x.dtype)

    def _check_shape(self, x: PyTree, y: PyTree) -> None:
        if getattr(y, "shape", None) != getattr(x, "shape", ()):
            raise ValueError(
                f"{self}: the layer turns {shapes(x)} into {shapes(y)}, "
                "but x + f(x) needs one shape for both"
            )


def skip(layer: Layer) -> Skip:
    """Return x + layer(x), the skip connection (He et al. 2015, https://arxiv.org/abs/1512.03385).

    Args:
        layer: a layer that keeps the shape of x; another shape raises ``ValueError``.

    Raises:
        TypeError: for an argument that is not a layer.
    """
    return Skip(layer)
