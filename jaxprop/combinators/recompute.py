"""Residuals that are recomputed on the way back."""

from __future__ import annotations

import jax
from jax import Array

from jaxprop.core.combinator import Combinator, Wrapper
from jaxprop.core.layer import Layer
from jaxprop.core.step import Visit, params_of
from jaxprop.core.types import Cotangent, Params, PyTree, Residuals, Visited


class Recompute(Wrapper, Combinator):
    """y = f(x), saving x alone: the way back runs f forward again for the residuals.

    This is rematerialization, ``jax.checkpoint`` ("remat") of f. Inside ``repeat`` only one layer's
    residuals and an x for each layer are in memory, at the price of a second forward (Chen et al.
    2016, https://arxiv.org/abs/1604.06174). Elsewhere XLA for CPUs may find that it has computed
    the residuals before, and keep them after all.

    Attributes:
        layer: f.
    """

    def __repr__(self) -> str:
        return f"recompute({self.layer!r})"

    def init_with_output(self, key: Array, x: PyTree) -> tuple[Params, PyTree]:
        return self.layer.init_with_output(key, x)

    def forward(self, params: Params, x: PyTree) -> tuple[PyTree, Residuals]:
        y, _ = self.layer.forward(params, x)
        return y, x

    def walk(
        self, place: PyTree, residuals: Residuals, ct: Cotangent, visit: Visit
    ) -> tuple[Visited, Cotangent]:
        x, ct = jax.lax.optimization_barrier((residuals, ct))
        _, residuals = self.layer.forward(params_of(place, visit), x)
        return self.layer.walk(place, residuals, ct, visit)


def recompute(layer: Layer) -> Recompute:
    """Return the layer saving only x; the way back recomputes its residuals (remat).

    ``repeat(recompute(block), times)`` keeps one x per block. params are the layer's.

    Args:
        layer: the layer.

    Raises:
        TypeError: for an argument that is not a layer.
    """
    return Recompute(layer)
