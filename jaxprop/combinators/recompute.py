"""Residuals that are computed anew."""

from __future__ import annotations

from typing import Any

import jax

from jaxprop.combinators.wrapper import Wrapper
from jaxprop.layer import Combinator, Layer, Leave
from jaxprop.seats import bare
from jaxprop.shapes import require


class Recompute(Wrapper, Combinator):
    """y = f(x), keeping x alone: the way back runs f forward again for the residuals.

    Inside ``repeat`` these are one layer's: for the price of a second forward, of the residuals of
    all layers there remain those of one, and an x each (Chen et al. 2016,
    https://arxiv.org/abs/1604.06174). Elsewhere XLA for CPUs may find that it has computed them
    before, and keep them after all.
    """

    def __post_init__(self) -> None:
        require(self.layer, Layer, "recompute")

    def __repr__(self) -> str:
        return f"recompute({self.layer!r})"

    def forward(self, params: Any, x: Any) -> tuple[Any, Any]:
        y, _ = self.layer.forward(params, x)
        return y, x

    def walk(self, params: Any, residuals: Any, ct: Any, leave: Leave) -> tuple[Any, Any]:
        x, ct = jax.lax.optimization_barrier((residuals, ct))
        _, residuals = self.layer.forward(bare(params), x)
        return self.layer.walk(params, residuals, ct, leave)


def recompute(layer: Layer) -> Recompute:
    """The layer, with no residuals kept but x; the way back computes them anew.

    ``repeat(recompute(block), times)`` keeps one x a block. params are the layer's.
    """
    return Recompute(layer)
