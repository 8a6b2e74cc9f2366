"""Layers one after the other, and the skip connection."""

from __future__ import annotations

from typing import Any

import chex
import jax

from jaxprop.combinators.wrapper import Wrapper
from jaxprop.layer import Combinator, Layer, Leave, in_layer
from jaxprop.shapes import require, shapes, structs


class Several(Combinator):
    """Layers whose params are a tuple with one entry a layer."""

    layers: tuple[Layer, ...]

    def __post_init__(self) -> None:
        name = type(self).__name__.lower()
        if not self.layers:
            raise ValueError(f"{name}() needs at least one layer")
        for index, layer in enumerate(self.layers):
            require(layer, Layer, f"{name}: layer {index}")

    def check_params(self, params: Any, x: Any) -> None:
        """Only the length: each layer holds its own params to its own ``init``."""
        self.check_length(params)

    def check_length(self, params: Any) -> None:
        if type(params) is not tuple or len(params) != len(self.layers):
            got = len(params) if type(params) is tuple else shapes(params)
            raise ValueError(
                f"a {type(self).__name__.lower()} of {len(self.layers)} layers takes a tuple of "
                f"{len(self.layers)} params, one a layer, not {got}: {self}"
            )

    def given(
        self, params: tuple[Any, ...], *, key: chex.PRNGKey | None = None, mask: Any = None
    ) -> tuple[Any, ...]:
        """A key of its own for each."""
        self.check_length(params)
        return tuple(
            layer.given(p, key=None if key is None else jax.random.fold_in(key, index), mask=mask)
            for index, (layer, p) in enumerate(zip(self.layers, params, strict=True))
        )


class Chain(Several):
    """y = f_k(... f_2(f_1(x))); the chain rule is the same walk from the other end."""

    def __repr__(self) -> str:
        return f"chain({', '.join(map(repr, self.layers))})"

    def init(self, key: chex.PRNGKey, x: Any) -> tuple[Any, ...]:
        params = []
        for index, layer in enumerate(self.layers):
            with in_layer(index, layer):
                x = structs(x)
                params.append(layer.init(jax.random.fold_in(key, index), x))
                x, _ = jax.eval_shape(layer.forward, params[-1], x)
        return tuple(params)

    def forward(self, params: tuple[Any, ...], x: Any) -> tuple[Any, tuple[Any, ...]]:
        residuals = []
        for index, (layer, p) in enumerate(zip(self.layers, params, strict=True)):
            with in_layer(index, layer):
                x, r = layer.forward(p, x)
            residuals.append(r)
        return x, tuple(residuals)

    def walk(
        self, params: tuple[Any, ...], residuals: tuple[Any, ...], ct: Any, leave: Leave
    ) -> tuple[tuple[Any, ...], Any]:
        self.check_length(params)
        left = []
        steps = list(zip(self.layers, params, residuals, strict=True))
        for index, (layer, p, r) in reversed(list(enumerate(steps))):
            with in_layer(index, layer):
                here, ct = layer.walk(p, r, ct, leave)
            left.append(here)
        return tuple(reversed(left)), ct


class Skip(Wrapper, Combinator):
    """y = x + f(x), so dE/dx = ct + (what f pulls back from ct); params and residuals are f's."""

    def __post_init__(self) -> None:
        require(self.layer, Layer, "skip")

    def __repr__(self) -> str:
        return f"skip({self.layer!r})"

    def forward(self, params: Any, x: Any) -> tuple[Any, Any]:
        y, residuals = self.layer.forward(params, x)
        if y.shape != x.shape:
            raise ValueError(
                f"{self}: the layer turns {shapes(x)} into {shapes(y)}, "
                "but x + f(x) needs one shape for both"
            )
        return x + y, residuals

    def walk(self, params: Any, residuals: Any, ct: Any, leave: Leave) -> tuple[Any, Any]:
        left, d_x = self.layer.walk(params, residuals, ct, leave)
        return left, (ct + d_x).astype(d_x.dtype)


def chain(*layers: Layer) -> Chain:
    """Layers one after the other; params and residuals are tuples with one entry a layer.

    Raises ``ValueError`` for no layers and ``TypeError`` for an argument that is not a layer.

    Example:
        >>> import jaxprop as jp
        >>> jp.chain(jp.Dense(512), jp.Relu(), jp.Dense(10))
        chain(Dense(512), Relu(), Dense(10))
    """
    return Chain(layers)


def skip(layer: Layer) -> Skip:
    """x + layer(x), the skip connection (He et al. 2015, https://arxiv.org/abs/1512.03385).

    The layer keeps the shape of x; another shape raises ``ValueError``.
    """
    return Skip(layer)
