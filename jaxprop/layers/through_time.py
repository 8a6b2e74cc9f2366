"""The base of recurrent layers: their params, and the scans forward and backward in time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from jaxprop.core.arrays import wide
from jaxprop.core.checks import check_counts, check_x
from jaxprop.core.layer import Layer
from jaxprop.core.serialization import serializable
from jaxprop.core.types import PyTree

X = Float[Array, "n t i"]
Y = Float[Array, "n t f"]


@serializable
class RecurrentParams(NamedTuple):
    """The params of a recurrent layer with G gates side by side, or their cotangents.

    Attributes:
        w: (I, G F), the weights of the input.
        u: (F, G F), the weights of the hidden state.
        b: (G F,), the bias.
        b_u: (F,), the bias of the recurrent product in n of a Gru; None in other layers.
    """

    w: Any
    u: Any
    b: Any
    b_u: Any = None


class Recurrence(Layer):
    """The base of the recurrent layers, from x (N, T, I) to the hidden states y (N, T, features).

    w starts as LeCun normal, each gate's block of u as orthogonal, and b as zeros.

    Attributes:
        features: the size of the hidden state.
        gates: the number of gates.
    """

    features: int
    gates: ClassVar[int]
    mixes_positions = True

    def __post_init__(self) -> None:
        check_counts(self, "features")

    def init(self, key: Array, x: PyTree) -> RecurrentParams:
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
    step: Callable[..., tuple[PyTree, tuple[Array, ...]]],
    params: RecurrentParams,
    x: X,
    states: int = 1,
) -> list[Array]:
    """Return the outputs of a scan of ``step(carry, x_t w) -> (carry, outputs)`` along time.

    Args:
        step: a function of the carry, a tuple of arrays (N, F) that starts as zeros, and of the
            inputs' part of a step's pre-activations. The outputs are a tuple of arrays (N, ...).
        params: the layer's params.
        x: the layer's input.
        states: the number of arrays in the carry.

    Returns:
        An array (N, T, ...) for each of the outputs, in x's dtype.
    """
    from_x = swap(x) @ params.w
    zero = wide(jnp.zeros_like(from_x[0, :, : params.u.shape[0]]))
    _, left = jax.lax.scan(step, (zero,) * states, from_x)
    return [swap(leaf.astype(x.dtype)) for leaf in left]


def through_time(
    step: Callable[..., tuple[PyTree, PyTree]],
    ct: Y,
    slopes: PyTree,
    *kept: Array,
    states: int = 1,
) -> PyTree:
    """Return the d_t of a reverse scan of ``step(carry, ct_t, slopes_t, *kept_t) -> (carry, d_t)``.

    d_t is written over slopes_t, so that their memory serves twice. XLA does this in place if a
    step uses each of slopes_t and d_t whole, not in slices. ct is read with the example first, as
    it lies in memory. The other arrays lie time first there, as the scan along time has left them.

    Args:
        step: a function whose d_t is like slopes_t, an array or a tuple of arrays.
        ct: the cotangent of y.
        slopes: the slopes of all steps, (N, T, ...).
        kept: other residuals, (N, T, ...).
        states: the number of arrays (N, F) in the carry, which start as zeros.

    Returns:
        d_t for all steps, in the structure and the shapes of slopes.
    """

    def at(carry: tuple[PyTree, PyTree], now: tuple[Array, ...]) -> tuple[PyTree, None]:
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
    """Return h_(t-1) at each step, with zeros at the first."""
    return jnp.pad(y[:, :-1], ((0, 0), (1, 0), (0, 0)))


def swap(x: Float[Array, "a b c"]) -> Float[Array, "b a c"]:
    """Return x with its first two axes swapped."""
    return jnp.swapaxes(x, 0, 1)


def turned(u: Float[Array, "k m"]) -> Float[Array, "m k"]:
    """Return u^T. Without the barrier XLA transposes u in the matmul, and so at every step."""
    return jax.lax.optimization_barrier(u.T)


def dot(x: Float[Array, "n k"], u: Float[Array, "k m"]) -> Float[Array, "n m"]:
    """Return x u with x in u's dtype, accumulated in at least float32."""

    def product(x: Array, u: Array) -> Array:
        return jnp.matmul(x, u, preferred_element_type=wide(u).dtype)

    x = x.astype(u.dtype)
    if wide(u).dtype == u.dtype:
        return product(x, u)
    # A CPU multiplies in float32 in any case, but in a fusion XLA of jax 0.8 does not see that.
    return jax.lax.platform_dependent(
        x, u, cpu=lambda x, u: product(wide(x), wide(u)), default=product
    )


def check_ct(layer: Layer, ct: Y, y: Y) -> None:
    """Raise ``ValueError`` unless ct has the shape of y."""
    if ct.shape != y.shape:
        raise ValueError(f"{layer}: ct has shape {ct.shape}, but y has {y.shape}")
