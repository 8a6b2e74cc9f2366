"""What recurrent layers share: their params, and the scans along time and back through it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import chex
import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from jaxprop.core.arrays import wide
from jaxprop.core.checks import check_counts, check_x
from jaxprop.core.layer import Layer

X = Float[Array, "n t i"]
Y = Float[Array, "n t f"]


class RecurrentParams(NamedTuple):
    """Params w (I, GF), u (F, GF) and b (GF,), G gates side by side, and b_u (F,) in a Gru."""

    w: Any
    u: Any
    b: Any
    b_u: Any = None


class Recurrence(Layer):
    """x (N, T, I), floating, to all hidden states (N, T, features), through ``gates`` gates.

    w starts as LeCun normal, each gate's block of u orthogonal, b as zeros.
    Raises ``ValueError`` for x of another rank, without steps or without features, and
    ``TypeError`` for x not floating.
    """

    features: int
    gates: ClassVar[int]

    def __post_init__(self) -> None:
        check_counts(self, "features")

    def init(self, key: chex.PRNGKey, x: Any) -> RecurrentParams:
        check_x(self, x, "N, T, I")
        if not x.shape[1] or not x.shape[2]:
            raise ValueError(f"{self} takes x of at least one step and one feature, not {x.shape}")
        dtype = jax.dtypes.canonicalize_dtype(x.dtype)
        for_w, *for_u = jax.random.split(key, 1 + self.gates)
        width, square = self.gates * self.features, (self.features, self.features)
        w = jax.nn.initializers.lecun_normal()(for_w, (x.shape[2], width), dtype)
        orthogonal = jax.nn.initializers.orthogonal(dtype=wide(jnp.zeros((), dtype)).dtype)
        u = jnp.concatenate([orthogonal(key, square) for key in for_u], axis=1)
        return RecurrentParams(w, u.astype(dtype), jnp.zeros(width, dtype))


def along_time(
    step: Callable[..., Any], params: RecurrentParams, x: X, states: int = 1
) -> list[Array]:
    """What ``step(carry, x_t w) -> (carry, left)`` leaves at each step, example first.

    carry is a tuple of ``states`` arrays (N, F), zeros before the first step, left one of arrays
    (N, ...). Each of left comes out as (N, T, ...) in x's dtype.
    """
    from_x = swap(x) @ params.w
    zero = wide(jnp.zeros_like(from_x[0, :, : params.u.shape[0]]))
    _, left = jax.lax.scan(step, (zero,) * states, from_x)
    return [swap(leaf.astype(x.dtype)) for leaf in left]


def through_time(
    step: Callable[..., Any], ct: Y, slopes: Any, *kept: Array, states: int = 1
) -> Any:
    """What ``step(carry, ct_t, slopes_t, *kept_t) -> (carry, d_t)`` leaves, from the last step on.

    d_t is like slopes_t, an array or a tuple of them, and is written over it, so that the slopes'
    memory serves twice. (XLA does so in place where a step uses each of slopes_t and d_t whole, not
    in slices.) ct is read where it lies, example first; the others lie time first in memory, as the
    scan along time has left them.
    """

    def at(carry: tuple[Any, Any], now: tuple[Array, ...]) -> tuple[Any, None]:
        (states, written), (t, *kept_t) = carry, now

        def read(array: Array, axis: int = 0) -> Array:
            return wide(jax.lax.dynamic_index_in_dim(array, t, axis, keepdims=False))

        def write(array: Array, d_t: Array) -> Array:
            return jax.lax.dynamic_update_index_in_dim(array, d_t.astype(array.dtype), t, 0)

        slopes_t = jax.tree.map(read, written)
        states, d_t = step(states, read(ct, 1), slopes_t, *map(wide, kept_t))
        return (states, jax.tree.map(write, written, d_t)), None

    carry = (wide(jnp.zeros_like(ct[:, 0])),) * states, jax.tree.map(swap, slopes)
    steps = jnp.arange(ct.shape[1]), *map(swap, kept)
    (_, written), _ = jax.lax.scan(at, carry, steps, reverse=True)
    return jax.tree.map(swap, written)


def before(y: Y) -> Y:
    """h_(t-1) at each step, zeros at the first."""
    return jnp.pad(y[:, :-1], ((0, 0), (1, 0), (0, 0)))


def swap(x: Float[Array, "a b c"]) -> Float[Array, "b a c"]:
    return jnp.swapaxes(x, 0, 1)


def turned(u: Float[Array, "k m"]) -> Float[Array, "m k"]:
    """u^T. Without the barrier XLA leaves the turning to the matmul, and so to every step."""
    return jax.lax.optimization_barrier(u.T)


def dot(x: Float[Array, "n k"], u: Float[Array, "k m"]) -> Float[Array, "n m"]:
    """x u with x in u's dtype, added up in at least float32."""

    def product(x: Array, u: Array) -> Array:
        return jnp.matmul(x, u, preferred_element_type=wide(u).dtype)

    x = x.astype(u.dtype)
    if wide(u).dtype == u.dtype:
        return product(x, u)
    # A CPU multiplies in float32 in any case, and XLA of jax 0.8 fails to see it in a fusion.
    return jax.lax.platform_dependent(
        x, u, cpu=lambda x, u: product(wide(x), wide(u)), default=product
    )


def check_ct(layer: Layer, ct: Y, y: Y) -> None:
    if ct.shape != y.shape:
        raise ValueError(f"{layer}: ct has shape {ct.shape}, but y has {y.shape}")
