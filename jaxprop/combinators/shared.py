"""One layer applied several times with the same params."""

from __future__ import annotations

from typing import Any

import jax

from jaxprop.core.checks import check_count, require
from jaxprop.core.combinator import Wrapper, holds_stacks
from jaxprop.core.forms import is_factored, joint
from jaxprop.core.layer import Layer
from jaxprop.core.types import Cotangent, Params, PyTree, Residuals


class Shared(Wrapper):
    """y = f(f(... f(x))), with the same params each time.

    dE/dparams is the sum of the cotangents that the uses pull back. An example's share is such a
    sum too, so its square has cross terms: the forms of the uses are joined before anything is
    asked of them. To the walk all uses are one layer.

    Attributes:
        layer: f.
        times: how often it runs.
    """

    times: int

    def __post_init__(self) -> None:
        require(self.layer, Layer, "shared: the layer")
        check_count("shared: times", self.times)
        if holds_stacks(self.layer):
            raise ValueError("shared: a repeat inside is not supported; share the repeated layer")

    def __repr__(self) -> str:
        return f"shared({self.layer!r}, {self.times})"

    def forward(self, params: Params, x: PyTree) -> tuple[PyTree, Residuals]:
        residuals = []
        for _ in range(self.times):
            x, r = self.layer.forward(params, x)
            residuals.append(r)
        return x, tuple(residuals)

    def backward(
        self, params: Params, residuals: Residuals, ct: Cotangent
    ) -> tuple[Cotangent, Cotangent]:
        uses = []
        for r in reversed(residuals):
            d_params, ct = self.layer.backward(params, r, ct)
            uses.append(d_params)

        def together(*leaves: Any) -> Any:
            return joint(leaves) if is_factored(leaves[0]) else sum(leaves[1:], start=leaves[0])

        return jax.tree.map(together, *uses, is_leaf=is_factored), ct

    def inside(self, residuals: Residuals) -> tuple[Layer, Residuals]:
        if self.layer.batch_coupled:
            raise ValueError(
                f"{self}: each use has statistics of its own, and there is one place for them"
            )
        return self.layer, residuals[0]


def shared(layer: Layer, times: int) -> Shared:
    """Return the layer applied ``times`` times with the same params, which are the layer's own.

    Every quantity counts a param's uses as one: ``|g_1 + g_2|^2`` is not ``|g_1|^2 + |g_2|^2``.
    A side input is shared too: a Dropout inside drops the same entries each time.

    Args:
        layer: a layer that keeps the shape of x, without a ``repeat`` inside.
        times: how often it runs, at least 1.

    Raises:
        TypeError: for a ``layer`` that is not a layer, or ``times`` that is not a whole number.
        ValueError: for ``times`` below 1, or a ``repeat`` inside.
    """
    return Shared(layer, times)
