"""The scans of recurrent layers, forward and backward in time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float

from jaxprop.core.arrays import wide
from jaxprop.core.types import PyTree

Real = Bool[Array, "n t"] | None
States = tuple[Array, ...]


def along_time(
    step: Callable[..., tuple[States, tuple[Array, ...]]],
    from_x: Float[Array, "t n m"],
    start: States,
    real: Real,
    reverse: bool,
) -> tuple[States, Float[Array, "n t f"], tuple[Array, ...]]:
    """Scan ``step(states, x_t w) -> (states, slopes)`` along time.

    Args:
        step: a function of the states, arrays (N, F), and of the inputs' part of a step's
            pre-activations. The slopes are a tuple of arrays (N, ...).
        from_x: the inputs' part of all pre-activations.
        start: the states before the first step.
        real: True where a step is real; the states pass other steps unchanged.
        reverse: whether to start from the last step.

    Returns:
        The states after the last step, h after each step, and the slopes, (N, T, ...) in the dtype
        of from_x.
    """

    def at(states: States, now: tuple[Array, Array | None]) -> tuple[States, tuple[Array, ...]]:
        from_x, real = now
        new, slopes = step(states, from_x)
        new = _where(real, new, states)
        return new, (new[0], *slopes)

    steps = from_x, None if real is None else real.T
    last, left = jax.lax.scan(at, start, steps, reverse=reverse)
    h, *slopes = [swap(leaf.astype(from_x.dtype)) for leaf in left]
    return last, h, tuple(slopes)


def through_time(
    step: Callable[..., tuple[States, PyTree]],
    ct: Float[Array, "n t f"] | None,
    ends: States,
    slopes: PyTree,
    kept: tuple[Array, ...],
    real: Real,
    reverse: bool,
) -> tuple[States, PyTree]:
    """Scan ``step(states, ct_t, slopes_t, *kept_t) -> (states, d_t)`` back through time.

    d_t is written over slopes_t, so that their memory serves twice. XLA does this in place if a
    step uses each of slopes_t and d_t whole, not in slices. ct is read with the example first, as
    it lies in memory. The other arrays lie there with time first, as the scan along time left them.

    Args:
        step: a function whose d_t is like slopes_t, an array or a tuple of arrays. Its states are
            the cotangents of the layer's states, arrays (N, F).
        ct: the cotangent of h at each step; None for zeros.
        ends: the cotangents of the states after the last step.
        slopes: the slopes of all steps, (N, T, ...).
        kept: other residuals, (N, T, ...).
        real: True where a step is real. The cotangents of the states pass other steps unchanged,
            and d_t is 0 there.
        reverse: whether the forward scan started from the last step.

    Returns:
        The cotangents of the states before the first step, and d_t for all steps, in the structure
        and the shapes of slopes.
    """

    def at(carry: tuple[States, PyTree], now: tuple[Any, ...]) -> tuple[PyTree, None]:
        (states, written), (t, real, *kept_t) = carry, now

        def read(array: Array, axis: int = 0) -> Array:
            return wide(jax.lax.dynamic_index_in_dim(array, t, axis, keepdims=False))

        def write(array: Array, d_t: Array) -> Array:
            return jax.lax.dynamic_update_index_in_dim(array, d_t.astype(array.dtype), t, 0)

        slopes_t = jax.tree.map(read, written)
        ct_t = 0 if ct is None else read(ct, 1)
        new, d_t = step(states, ct_t, slopes_t, *map(wide, kept_t))
        d_t = _where(real, d_t, jax.tree.map(jnp.zeros_like, d_t))
        return (_where(real, new, states), jax.tree.map(write, written, d_t)), None

    carry = ends, jax.tree.map(swap, slopes)
    steps = jnp.arange(jax.tree.leaves(slopes)[0].shape[1])
    now: tuple[Any, ...] = steps, None if real is None else real.T, *map(swap, kept)
    (starts, written), _ = jax.lax.scan(at, carry, now, reverse=not reverse)
    return starts, jax.tree.map(swap, written)


def before(
    h: Float[Array, "n t f"], start: Float[Array, "n f"] | None, real: Real, reverse: bool
) -> Float[Array, "n t f"]:
    """Return the state that each step starts from, and zeros where a step is not real.

    Args:
        h: the state after each step.
        start: the state before the first step; None for zeros.
        real: True where a step is real.
        reverse: whether the scan started from the last step.
    """
    others = h[:, 1:] if reverse else h[:, :-1]
    if start is None:
        states = jnp.pad(others, ((0, 0), (0, 1) if reverse else (1, 0), (0, 0)))
    else:
        first = start.astype(h.dtype)[:, None]
        states = jnp.concatenate([others, first] if reverse else [first, others], 1)
    return of_real(states, real)


def of_real(x: Float[Array, "n t f"], real: Real) -> Float[Array, "n t f"]:
    """Return x with zeros where a step is not real, whatever x holds there."""
    return x if real is None else jnp.where(real[..., None], x, 0)


def swap(x: Float[Array, "a b c"]) -> Float[Array, "b a c"]:
    """Return x with its first two axes swapped."""
    return jnp.swapaxes(x, 0, 1)


def turned(u: Float[Array, "k m"]) -> Float[Array, "m k"]:
    """Return u^T. Without the barrier XLA would transpose u in the matmul, at every step."""
    return jax.lax.optimization_barrier(u.T)


def dot(x: Float[Array, "n k"], u: Float[Array, "k m"]) -> Float[Array, "n m"]:
    """Return x u with x in u's dtype, in at least float32; in float64 if either is."""

    def product(x: Array, u: Array) -> Array:
        return jnp.matmul(x, u, preferred_element_type=wide(u).dtype)

    u = u.astype(x.dtype) if x.dtype.itemsize > wide(u).dtype.itemsize else u
    x = x.astype(u.dtype)
    if wide(u).dtype == u.dtype:
        return product(x, u)
    # A CPU multiplies in float32 in any case, but XLA in jax 0.8 does not see that in a fusion.
    return jax.lax.platform_dependent(
        x, u, cpu=lambda x, u: product(wide(x), wide(u)), default=product
    )


def _where(real: Bool[Array, " n"] | None, new: PyTree, old: PyTree) -> PyTree:
    """Return new where a step is real, else old."""
    if real is None:
        return new
    return jax.tree.map(lambda new, old: jnp.where(real[:, None], new, old), new, old)
