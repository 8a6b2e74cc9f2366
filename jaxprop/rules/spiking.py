"""Spiking units, with the derivative of a smooth step in place of that of the step."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import ClassVar

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from jaxprop.core.arrays import known, wide
from jaxprop.core.checks import check_flags, check_number, check_share, check_x
from jaxprop.core.describe import shapes
from jaxprop.core.forms import Stacked
from jaxprop.core.layer import Layer
from jaxprop.core.types import PyTree

X = Float[Array, "n ..."]

SURROGATES: dict[str, Callable[[Array], Array]] = {
    "fast_sigmoid": lambda z: 0.5 / (1 + jnp.abs(z)) / (1 + jnp.abs(z)),
    "arctan": lambda z: 0.5 / (1 + (math.pi / 2 * z) ** 2),
    "triangle": lambda z: jnp.maximum(0, 1 - jnp.abs(z)),
    "sigmoid": lambda z: jax.nn.sigmoid(z) * jax.nn.sigmoid(-z),
    "boxcar": lambda z: jnp.where(jnp.abs(z) <= 1, 0.5, 0).astype(z.dtype),
}


class Spike(Layer):
    """A step, y = 1 where x > 0, else 0, with g(x) = k h(k x) in place of the derivative.

    k h(k x) is the derivative of a smooth step H(k x) from 0 to 1, of slope k:

        fast_sigmoid  h(z) = 1 / (2 (1 + |z|)^2)
        arctan        h(z) = 1 / (2 (1 + (pi z / 2)^2))
        triangle      h(z) = max(0, 1 - |z|)
        sigmoid       h(z) = s(z) s(-z), s the logistic function
        boxcar        h(z) = 1/2 where |z| <= 1, else 0

    (Zenke and Ganguli 2018, https://arxiv.org/abs/1705.11146; Fang et al. 2021,
    https://arxiv.org/abs/2007.05785; Bellec et al. 2018, https://arxiv.org/abs/1803.09574; here
    the first and the third are multiplied by k / 2 and k, for a step of height 1.)
    Each is finite for every x. The derivative by a learned slope is that of H(k x), x h(k x).

    x is (N, ...), floating, and y is like x. params are ``()``, or the slope, a scalar.

    Args:
        surrogate: the name of h.
        slope: k, positive; the initial value if it is learned.
        learned: whether the slope is learned.

    Raises:
        TypeError: for a slope that is not a number, and for x that is not floating.
        ValueError: for an unknown surrogate, and for a slope that is not positive.
    """

    surrogate: str = "fast_sigmoid"
    slope: float = 10.0
    learned: bool = False
    is_derivative: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_surrogate(self, self.surrogate, self.slope)
        check_flags(self, "learned")

    def init(self, key: Array, x: PyTree) -> Array | tuple[()]:
        check_x(self, x, "N, ...")
        return jnp.asarray(self.slope, x.dtype) if self.learned else ()

    def forward(self, params: Array | tuple[()], x: X) -> tuple[X, X]:
        return (x > 0).astype(x.dtype), x

    def backward(self, params: Array | tuple[()], x: X, ct: X) -> tuple[Stacked | tuple[()], X]:
        k = jnp.asarray(self.slope if isinstance(params, tuple) else params, wide(x).dtype)
        h = SURROGATES[self.surrogate](k * wide(x))
        d_x = (wide(ct) * (k * h)).astype(x.dtype)
        if isinstance(params, tuple):
            return (), d_x
        each = wide(ct) * (wide(x) * h)  # x h first: small where x is large
        return Stacked(each.sum(axis=tuple(range(1, x.ndim)))), d_x


class Lif(Layer):
    """Leaky integrate-and-fire units through time, with a surrogate derivative.

    v_t = b v_{t-1} - c s_{t-1} + x_t and s_t = 1 where v_t > c, from v_0 = s_0 = 0: a unit that
    fires is reset by its threshold c. y is s. With a_t = dE/dv_t, from the last step backwards

        dE/ds_t = ct_t - c a_{t+1}
        a_t = g(v_t - c) dE/ds_t + b a_{t+1},    dE/dx_t = a_t

    with ``Spike``'s g (Neftci et al. 2019, https://arxiv.org/abs/1901.09948). Without ``reset``
    the walk back leaves out - c a_{t+1}, as if the reset were constant.

    x is (N, T, ...), floating, and y is like x. There are no params.

    Args:
        decay: b, in [0, 1).
        threshold: c, positive.
        surrogate: as in ``Spike``.
        slope: as in ``Spike``.
        reset: whether to differentiate through the reset too.

    Raises:
        TypeError: for an argument of the wrong type, and for x that is not floating.
        ValueError: for a decay outside [0, 1), and for a threshold or a slope that is not positive.
    """

    decay: float = 0.9
    threshold: float = 1.0
    surrogate: str = "fast_sigmoid"
    slope: float = 10.0
    reset: bool = True
    is_derivative: ClassVar[bool] = False
    mixes_positions = True

    def __post_init__(self) -> None:
        check_surrogate(self, self.surrogate, self.slope)
        check_share("Lif: decay", self.decay)
        check_number("Lif: threshold", self.threshold, positive=True)
        check_flags(self, "reset")

    def init(self, key: Array, x: PyTree) -> tuple[()]:
        check_x(self, x, "N, T, ...")
        if known(lambda: x.shape[1] == 0):
            raise ValueError(f"{self} takes x of at least one step, not {shapes(x)}")
        return ()

    def forward(self, params: tuple[()], x: X) -> tuple[X, X]:
        b, c = (jnp.asarray(number, x.dtype) for number in (self.decay, self.threshold))

        def step(before: X, x: X) -> tuple[X, X]:
            v = b * before - c * _fires(before, c) + x
            return v, v

        xs = jnp.moveaxis(x, 1, 0)
        _, vs = jax.lax.scan(step, jnp.zeros_like(xs[0]), xs)
        v = jnp.moveaxis(vs, 0, 1)
        return _fires(v, c), v

    def backward(self, params: tuple[()], v: X, ct: X) -> tuple[tuple[()], X]:
        b, c = (jnp.asarray(number, v.dtype) for number in (self.decay, self.threshold))
        k = jnp.asarray(self.slope, wide(v).dtype)

        def step(later: X, here: tuple[X, X]) -> tuple[X, X]:
            v, ct = here
            g = (k * SURROGATES[self.surrogate](k * wide(v - c))).astype(v.dtype)
            d_s = ct - c * later if self.reset else ct
            a = g * d_s + b * later
            return a, a

        steps = jnp.moveaxis(v, 1, 0), jnp.moveaxis(ct, 1, 0)
        _, a = jax.lax.scan(step, jnp.zeros_like(steps[1][0]), steps, reverse=True)
        return (), jnp.moveaxis(a, 0, 1)


def check_surrogate(layer: Layer, surrogate: str, slope: float) -> None:
    """Raise for an unknown surrogate, or a slope that is not a positive number."""
    name = type(layer).__name__
    if surrogate not in SURROGATES:
        raise ValueError(f"{name}: surrogate is one of {', '.join(SURROGATES)}, not {surrogate!r}")
    check_number(f"{name}: slope", slope, positive=True)


def _fires(v: X, threshold: Array) -> X:
    return (v > threshold).astype(v.dtype)
