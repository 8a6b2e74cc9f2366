"""Several layers on the same x."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Literal

import jax
import jax.numpy as jnp
from jax import Array

from jaxprop.combinators.several import Several
from jaxprop.core.arrays import added, empty_like
from jaxprop.core.combinator import in_layer
from jaxprop.core.describe import shapes, structs
from jaxprop.core.layer import Layer
from jaxprop.core.step import Visit
from jaxprop.core.types import Cotangent, Params, PyTree, Residuals, Visited

Join = Literal["sum", "concatenate", "tuple"]


class Branch(Several):
    """y = f_1(x) + ... + f_k(x), or the f_i(x) next to each other.

    They stand next to each other on the last axis, in a tuple, or in a dict. The transpose of a
    copy is a sum, and that of a sum is a copy: if f_i pulls back d_i from ct (or from its own part
    of ct), then dE/dx = d_1 + ... + d_k.

    Attributes:
        layers: the layers, each of which is given x.
        join: "sum", "concatenate" or "tuple"; for a dict its keys, one per layer.
    """

    join: Join | tuple[str, ...] = "sum"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.join not in ("sum", "concatenate", "tuple") and not isinstance(self.join, tuple):
            raise ValueError(f"branch: join is 'sum', 'concatenate' or 'tuple', not {self.join!r}")

    def __repr__(self) -> str:
        if isinstance(self.join, tuple):
            named = zip(self.join, self.layers, strict=True)
            return f"branch({', '.join(f'{name}={layer!r}' for name, layer in named)})"
        join = "" if self.join == "sum" else f", join={self.join!r}"
        return f"branch({', '.join(map(repr, self.layers))}{join})"

    def init_with_output(self, key: Array, x: PyTree) -> tuple[Params, PyTree]:
        params, ys = [], []
        for index, layer in enumerate(self.layers):
            with in_layer(index, layer):
                p, y = layer.init_with_output(jax.random.fold_in(key, index), structs(x))
            params.append(p)
            ys.append(y)
        return tuple(params), jax.eval_shape(lambda *ys: self._joined(x, list(ys)), *ys)

    def forward(self, params: Params, x: PyTree) -> tuple[PyTree, Residuals]:
        ys, residuals = [], []
        for index, (layer, p) in enumerate(zip(self.layers, params, strict=True)):
            with in_layer(index, layer):
                y, r = layer.forward(p, x)
            ys.append(y)
            residuals.append(r)
        y = self._joined(x, ys)
        # Shapes and dtypes are static: only as those of an array do they survive a scan.
        likes = tuple(map(empty_like, ys)) if self.join in ("sum", "concatenate") else ()
        return y, (tuple(residuals), likes)

    def walk(
        self, place: PyTree, residuals: Residuals, ct: Cotangent, visit: Visit
    ) -> tuple[Visited, Cotangent]:
        self.check_places(place)
        residuals, likes = residuals
        cts = self._parts(ct, likes)
        visited, d_x = [], None
        steps = zip(self.layers, place, residuals, cts, strict=True)
        for index, (layer, p, r, ct) in enumerate(steps):
            with in_layer(index, layer):
                here, d = layer.walk(p, r, ct, visit)
            visited.append(here)
            d_x = d if d_x is None else jax.tree.map(jnp.add, d_x, d)
        return tuple(visited), d_x

    def _joined(self, x: PyTree, ys: list[PyTree]) -> PyTree:
        if self.join == "tuple":
            return tuple(ys)
        if isinstance(self.join, tuple):
            return dict(zip(self.join, ys, strict=True))
        if any(not hasattr(y, "shape") for y in ys):
            raise TypeError(
                f"{self}: to join by {self.join} takes arrays, and the layers give "
                f"{', '.join(map(shapes, ys))}"
            )
        same = [y.shape if self.join == "sum" else y.shape[:-1] for y in ys]
        if len(set(same)) > 1:
            raise ValueError(
                f"{self}: the layers turn {shapes(x)} into {', '.join(map(shapes, ys))}, which "
                f"cannot be joined by {self.join}"
            )
        if self.join == "sum":
            return added(*ys)
        with jax.numpy_dtype_promotion("standard"):
            return jnp.concatenate(ys, axis=-1)

    def _parts(self, ct: Cotangent, likes: tuple[Array, ...]) -> Sequence[Cotangent]:
        """Return each layer's part of the cotangent of the joined output.

        Args:
            ct: the cotangent.
            likes: for a sum or a concatenation, an array of each output's width and dtype.
        """
        if self.join == "tuple":
            return ct
        if isinstance(self.join, tuple):
            return [ct[name] for name in self.join]
        cts = [ct] * len(likes)
        if self.join == "concatenate":
            ends = itertools.accumulate(like.shape[-1] for like in likes)
            cts = jnp.split(ct, [*ends][:-1], axis=-1)
        return [part.astype(like.dtype) for part, like in zip(cts, likes, strict=True)]


def branch(*layers: Layer, join: Join = "sum", **named: Layer) -> Branch:
    """Return the layers side by side on the same x, their outputs joined.

    params are a tuple with one entry per layer.

    Args:
        layers: at least one layer.
        join: "sum" adds the outputs up; "concatenate" joins them on the last axis; "tuple" returns
            a tuple of them.
        named: layers by name, instead of ``layers``: y is then a dict of their outputs.

    Raises:
        ValueError: for no layers, for layers of which only some have names, and for outputs whose
            shapes do not fit together.
        TypeError: for an argument that is not a layer, and for outputs that are not arrays where
            they are added up or concatenated.

    Example:
        >>> import jaxprop as jp
        >>> jp.branch(jp.Dense(3), jp.chain(jp.Dense(8), jp.Relu(), jp.Dense(3)))
        branch(Dense(3), chain(Dense(8), Relu(), Dense(3)))
        >>> jp.branch(digit=jp.Dense(10), angle=jp.Dense(1))  # y is a dict
        branch(digit=Dense(10), angle=Dense(1))
    """
    if not named:
        return Branch(layers, join)
    if layers or join != "sum":
        raise ValueError("branch: layers by name give a dict; give all a name, and no join")
    return Branch(tuple(named.values()), tuple(named))
