"""Several layers on the same x."""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp
from jax import Array

from jaxprop.combinators.several import Several
from jaxprop.core.arrays import empty_like
from jaxprop.core.combinator import in_layer
from jaxprop.core.describe import shapes, structs
from jaxprop.core.layer import Layer
from jaxprop.core.step import Visit
from jaxprop.core.types import Cotangent, Params, PyTree, Residuals, Visited

Join = Literal["sum", "concatenate", "tuple"]


class Branch(Several):
    """y = f_1(x) + ... + f_k(x), or the f_i(x) beside each other on the last axis, or as a tuple.

    A copy has the sum for its transpose, and a sum the copy: with d_i what f_i pulls back from ct
    (or from its own part of ct), dE/dx = d_1 + ... + d_k.

    Attributes:
        layers: the layers, each of which is given x.
        join: "sum", "concatenate" or "tuple".
    """

    join: Join = "sum"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.join not in ("sum", "concatenate", "tuple"):
            raise ValueError(
                f"branch: join is 'sum' or 'concatenate' or 'tuple', not {self.join!r}"
            )

    def __repr__(self) -> str:
        join = "" if self.join == "sum" else f", join={self.join!r}"
        return f"branch({', '.join(map(repr, self.layers))}{join})"

    def init_with_output(self, key: Array, x: PyTree) -> tuple[Params, PyTree]:
        params, ys = [], []
        for index, layer in enumerate(self.layers):
            with in_layer(index, layer):
                p, y = layer.init_with_output(jax.random.fold_in(key, index), structs(x))
            params.append(p)
            ys.append(y)
        return tuple(params), jax.eval_shape(lambda *ys: self.joined(x, list(ys)), *ys)

    def forward(self, params: Params, x: PyTree) -> tuple[PyTree, Residuals]:
        ys, residuals = [], []
        for index, (layer, p) in enumerate(zip(self.layers, params, strict=True)):
            with in_layer(index, layer):
                y, r = layer.forward(p, x)
            ys.append(y)
            residuals.append(r)
        # A width is static, and survives a scan as the shape of an array.
        widths = tuple(map(empty_like, ys)) if self.join == "concatenate" else ()
        return self.joined(x, ys), (tuple(residuals), widths)

    def walk(
        self, place: PyTree, residuals: Residuals, ct: Cotangent, visit: Visit
    ) -> tuple[Visited, Cotangent]:
        self.check_places(place)
        residuals, widths = residuals
        ends = [sum(w.shape[-1] for w in widths[: i + 1]) for i in range(len(widths))]
        cts = jnp.split(ct, ends[:-1], axis=-1) if widths else [ct] * len(self.layers)
        cts = ct if self.join == "tuple" else cts
        visited, d_x = [], None
        steps = zip(self.layers, place, residuals, cts, strict=True)
        for index, (layer, p, r, ct) in enumerate(steps):
            with in_layer(index, layer):
                here, d = layer.walk(p, r, ct, visit)
            visited.append(here)
            d_x = d if d_x is None else jax.tree.map(jnp.add, d_x, d)
        return tuple(visited), d_x

    def joined(self, x: PyTree, ys: list[PyTree]) -> PyTree:
        """Return the layers' outputs on x, joined.

        Raises:
            ValueError: for outputs whose shapes do not fit together.
        """
        if self.join == "tuple":
            return tuple(ys)
        same = [y.shape if self.join == "sum" else y.shape[:-1] for y in ys]
        if len(set(same)) > 1:
            raise ValueError(
                f"{self}: the layers turn {shapes(x)} into {', '.join(map(shapes, ys))}, which "
                f"cannot be joined by {self.join}"
            )
        return sum(ys[1:], start=ys[0]) if self.join == "sum" else jnp.concatenate(ys, axis=-1)


def branch(*layers: Layer, join: Join = "sum") -> Branch:
    """Return the layers side by side on the same x, their outputs joined.

    params and residuals are tuples with one entry a layer.

    Args:
        layers: at least one layer.
        join: "sum" adds the outputs up; "concatenate" puts them beside each other on the last axis;
            "tuple" hands all of them on, to a layer that takes several inputs (``jp.Attention``) or
            one of them (``jp.Item``).

    Raises:
        ValueError: for no layers, and for outputs whose shapes do not fit together.
        TypeError: for an argument that is not a layer.

    Example:
        >>> import jaxprop as jp
        >>> jp.branch(jp.Dense(3), jp.chain(jp.Dense(8), jp.Relu(), jp.Dense(3)))
        branch(Dense(3), chain(Dense(8), Relu(), Dense(3)))
    """
    return Branch(layers, join)
