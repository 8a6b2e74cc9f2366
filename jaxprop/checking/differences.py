"""Central differences: the oracle that knows nothing of autodiff."""

from __future__ import annotations

import functools
from typing import Any

import chex
import jax
import jax.numpy as jnp
from jax import Array

from jaxprop.checking.oracles import answer, d_name
from jaxprop.checking.points import (
    hundredth,
    inner,
    is_floating,
    norm,
    norm_of_floats,
    normal,
    size_of,
    with_noise,
)
from jaxprop.layer import Layer

STEP = 1e-6  # rounding and truncation are then near 1e-10 of the slope
RTOL = 1e-6


def check_differences(layer: Layer, params: Any, x: Any, ct: Any, key: chex.PRNGKey) -> None:
    """Raise unless backward agrees with differences of forward, one leaf after the other.

    For a direction v of the leaf, <d, v> against <ct, s> with s = (f(p + h v) - f(p - h v)) / 2h,
    at a point moved off whatever kinks it sat on. Noise and v are in proportion to each element,
    so that a positive number stays positive. The error is measured against |ct| |s|, which bounds
    both sides and, unlike them, does not cancel to nothing; what the rounding of f hides, near
    eps |ct| (|f| + |p|) / h, is allowed.
    """
    for_noise, for_directions = jax.random.split(key)
    point = with_noise(for_noise, {"params": params, "x": x}, hundredth)
    directions = jax.tree.map(
        lambda leaf, v: v * size_of(leaf) if is_floating(leaf) else leaf,
        point,
        normal(for_directions, point),
    )
    forward = jax.jit(lambda params, x: layer.forward(params, x)[0])
    y = forward(**point)
    if not all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(y)):
        raise AssertionError(f"{layer}: forward is not finite near the point that is checked")
    hidden = 16 * jnp.finfo(jnp.float64).eps * norm(ct) * (norm(y) + norm_of_floats(point)) / STEP
    cotangents = jax.jit(functools.partial(answer, layer))(**point, ct=ct)
    for path, d_leaf in jax.tree.leaves_with_path(cotangents):
        if path[0].key == "params" and not jnp.any(d_leaf):
            continue  # no derivative by choice: jax.vjp, which found none either, has compared it

        def moved(h: float, path: Any = path) -> Any:
            def move(at: Any, leaf: Array, v: Array) -> Array:
                return leaf + h * v if at == path else leaf

            return forward(**jax.tree.map_with_path(move, point, directions))

        slope = jax.tree.map(lambda a, b: (a - b) / (2 * STEP), moved(STEP), moved(-STEP))
        got = float(inner(d_leaf, dict(jax.tree.leaves_with_path(directions))[path]))
        expected = float(inner(ct, slope))
        scale = float(norm(ct) * norm(slope)) or abs(got)
        if not abs(got - expected) <= RTOL * scale + float(hidden):
            raise AssertionError(
                f"{layer}: {d_name(path)} disagrees with central differences of forward: in a "
                f"random direction backward gives {got!r}, they {expected!r} (relative error "
                f"{abs(got - expected) / scale:.1e}, allowed {RTOL:.0e})"
            )
