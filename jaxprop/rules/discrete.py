"""Functions without a useful derivative, with that of another function in its place."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float

from jaxprop.core.checks import check_number, check_x, given
from jaxprop.core.describe import shapes
from jaxprop.core.layer import Layer
from jaxprop.core.types import PyTree
from jaxprop.traced.part import PartLayer

X = Float[Array, "n ..."]


class StraightThrough(Layer):
    """A layer y = fn(x) that passes ct as if y were x: d_x = ct, or 0 where |x| exceeds a bound.

    Bengio et al. 2013, https://arxiv.org/abs/1308.3432; for the sign with the bound 1, Hubara et
    al. 2016, https://arxiv.org/abs/1602.02830.

    Attributes:
        fn: a function of x that keeps its shape, or a part of a function that does.
        passing: the largest |x| at which ct passes; None for no bound.
    """

    fn: Callable[[Array], Array] | PartLayer
    passing: float | None = None
    is_derivative: ClassVar[bool] = False

    def __post_init__(self) -> None:
        is_part = isinstance(self.fn, PartLayer)
        if not is_part and (isinstance(self.fn, type | Layer) or not callable(self.fn)):
            raise TypeError(f"straight_through takes a function of x, not {given(self.fn)}")
        if self.passing is not None:
            check_number("straight_through: passing", self.passing, positive=True)

    def init(self, key: Array, x: PyTree) -> tuple[()]:
        check_x(self, x, "N, ...")
        return ()

    def check_params(self, params: Any, x: PyTree) -> None:
        if not isinstance(self.fn, PartLayer):
            super().check_params(params, x)

    def forward(self, params: Any, x: X) -> tuple[X, Bool[Array, "n ..."] | tuple[()]]:
        y = self.fn.forward(params, x)[0] if isinstance(self.fn, PartLayer) else self.fn(x)
        if jnp.shape(y) != x.shape:
            raise ValueError(f"{self}: fn turns {shapes(x)} into {shapes(y)}, not its shape")
        return y.astype(x.dtype), () if self.passing is None else jnp.abs(x) <= self.passing

    def backward(
        self, params: Any, passes: Bool[Array, "n ..."] | tuple[()], ct: X
    ) -> tuple[tuple[()], X]:
        return (), ct if isinstance(passes, tuple) else jnp.where(passes, ct, 0)


def straight_through(
    fn: Callable[[Array], Array] | PartLayer, *, passing: float | None = None
) -> StraightThrough:
    """Return the layer y = fn(x) whose backward is that of y = x.

    Args:
        fn: a function that keeps the shape of x, such as ``jnp.round``, ``jnp.sign``,
            ``jp.rules.one_hot_argmax`` or ``functools.partial(jp.rules.top_k, k=3)``; or a part of
            a function, for ``jp.function(fn, rules={"round": jp.rules.straight_through})``.
        passing: the largest |x| at which the cotangent passes; by default there is no bound.

    Example:
        >>> import jax.numpy as jnp, jaxprop as jp
        >>> layer = jp.rules.straight_through(jnp.sign, passing=1.0)
        >>> y, saved = layer.forward((), jnp.array([[-2.0, 0.5]]))
        >>> y.tolist(), layer.backward((), saved, jnp.ones((1, 2)))[1].tolist()
        ([[-1.0, 1.0]], [[0.0, 1.0]])
    """
    return StraightThrough(fn, passing)


def one_hot_argmax(x: Float[Array, "... d"]) -> Float[Array, "... d"]:
    """Return 1 at the largest entry along the last axis, the first of equals, and 0 elsewhere.

    Args:
        x: an array (..., D).
    """
    return jax.nn.one_hot(jnp.argmax(x, axis=-1), x.shape[-1], dtype=x.dtype)


def top_k(x: Float[Array, "... d"], k: int) -> Float[Array, "... d"]:
    """Return x with its k largest entries along the last axis, and 0 elsewhere.

    Args:
        x: an array (..., D).
        k: the number of entries to keep.
    """
    _, kept = jax.lax.top_k(x, k)
    return jnp.where(jax.nn.one_hot(kept, x.shape[-1], dtype=bool).any(axis=-2), x, 0)
