"""Several layers on the same x."""

from __future__ import annotations

from typing import Any, Literal

import chex
import jax
import jax.numpy as jnp

from jaxprop.combinators.chain import Several
from jaxprop.layer import Layer, Leave, in_layer
from jaxprop.shapes import empty_like, shapes


class Branch(Several):
    """y = f_1(x) + ... + f_k(x), or the f_i(x) beside each other on the last axis.

    A copy has the sum for its transpose, and a sum the copy: with d_i what f_i pulls back from ct
    (or from its own part of ct), dE/dx = d_1 + ... + d_k.
    """

    join: Literal["sum", "concatenate"] = "sum"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.join not in ("sum", "concatenate"):
            raise ValueError(f"branch: join is 'sum' or 'concatenate', not {self.join!r}")

    def __repr__(self) -> str:
        join = "" if self.join == "sum" else f", join={self.join!r}"
        return f"branch({', '.join(map(repr, self.layers))}{join})"

    def init(self, key: chex.PRNGKey, x: Any) -> tuple[Any, ...]:
        params = []
        for index, layer in enumerate(self.layers):
            with in_layer(index, layer):
                params.append(layer.init(jax.random.fold_in(key, index), x))
        return tuple(params)

    def forward(self, params: tuple[Any, ...], x: Any) -> tuple[Any, Any]:
        ys, residuals = [], []
        for index, (layer, p) in enumerate(zip(self.layers, params, strict=True)):
            with in_layer(index, layer):
                y, r = layer.forward(p, x)
            ys.append(y)
            residuals.append(r)
        same = [y.shape if self.join == "sum" else y.shape[:-1] for y in ys]
        if len(set(same)) > 1:
            raise ValueError(
                f"{self}: the layers turn {shapes(x)} into {', '.join(map(shapes, ys))}, which "
                f"cannot be joined by {self.join}"
            )
        if self.join == "sum":
            return sum(ys[1:], start=ys[0]), (tuple(residuals), ())
        widths = tuple(map(empty_like, ys))  # a shape is static, and survives a scan
        return jnp.concatenate(ys, axis=-1), (tuple(residuals), widths)

    def walk(self, params: Any, residuals: Any, ct: Any, leave: Leave) -> tuple[Any, Any]:
        self.check_length(params)
        residuals, widths = residuals
        ends = [sum(w.shape[-1] for w in widths[: i + 1]) for i in range(len(widths))]
        cts = jnp.split(ct, ends[:-1], axis=-1) if widths else [ct] * len(self.layers)
        left, d_x = [], None
        steps = zip(self.layers, params, residuals, cts, strict=True)
        for index, (layer, p, r, ct) in enumerate(steps):
            with in_layer(index, layer):
                here, d = layer.walk(p, r, ct, leave)
            left.append(here)
            d_x = d if d_x is None else jax.tree.map(jnp.add, d_x, d)
        return tuple(left), d_x


def branch(*layers: Layer, join: Literal["sum", "concatenate"] = "sum") -> Branch:
    """Every layer on the same x, the results added up or, by ``join="concatenate"``, side by side.

    params and residuals are tuples with one entry a layer. Concatenation is on the last axis.
    Raises ``ValueError`` for no layers and for results whose shapes do not fit together.

    Example:
        >>> import jaxprop as jp
        >>> jp.branch(jp.Dense(3), jp.chain(jp.Dense(8), jp.Relu(), jp.Dense(3)))
        branch(Dense(3), chain(Dense(8), Relu(), Dense(3)))
    """
    return Branch(layers, join)
