"""Central differences: the oracle that knows nothing of autodiff."""

from __future__ import annotations

from collections.abc import Callable
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
from jaxprop.core.layer import Layer

STEP = 1e-6  # rounding and truncation are then near 1e-10 of the slope
RTOL = 1e-6


def differences_of(layer: Layer) -> Callable[[Any, Any, Any, chex.PRNGKey], None]:
    """``check(params, x, ct, key)``: raise unless backward agrees with differences of forward.

    One leaf after the other: for a direction v of the leaf, <d, v> against <ct, s> with
    s = (f(p + h v) - f(p - h v)) / 2h, at a point moved off whatever kinks it sat on. Noise and v
    are in proportion to each element, so that a positive number stays positive. The error is
    measured against |ct| |s|, which bounds both sides and, unlike them, does not cancel to nothing;
    what the rounding of f hides, near eps |ct| (|f| + |p|) / h, is allowed.
    """

    @jax.jit
    def prepare(params: Any, x: Any, ct: Any, key: chex.PRNGKey) -> tuple[Any, ...]:
        for_noise, for_directions = jax.random.split(key)
        point = with_noise(for_noise, {"params": params, "x": x}, hundredth)
        directions = jax.tree.map(
            lambda leaf, v: v * size_of(leaf) if is_floating(leaf) else leaf,
            point,
            normal(for_directions, point),
        )
        return point, directions, answer(layer, **point, ct=ct)

    @jax.jit
    def forward(point: Any, directions: Any, steps: Any) -> Any:
        def move(leaf: Array, v: Array, h: Array) -> Array:
            return leaf + h * v if is_floating(leaf) else leaf

        moved = jax.tree.map(move, point, directions, steps)
        return layer.forward(moved["params"], moved["x"])[0]

    def check(params: Any, x: Any, ct: Any, key: chex.PRNGKey) -> None:
        point, directions, cotangents = prepare(params, x, ct, key)
        still = jax.tree.map(lambda leaf: 0.0, point)
        y = forward(point, directions, still)
        if not all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(y)):
            raise AssertionError(f"{layer}: forward is not finite near the point that is checked")
        eps = float(jnp.finfo(jnp.float64).eps)
        hidden = 16 * eps * float(norm(ct)) * float(norm(y) + norm_of_floats(point)) / STEP
        for path, d_leaf in jax.tree.leaves_with_path(cotangents):
            if path[0].key == "params" and not jnp.any(d_leaf):
                continue  # no derivative by choice: jax.vjp, which found none either, compared it

            def along(h: float, path: Any = path) -> Any:
                steps = jax.tree.map_with_path(lambda at, _: h if at == path else 0.0, point)
                return forward(point, directions, steps)

            slope = jax.tree.map(lambda a, b: (a - b) / (2 * STEP), along(STEP), along(-STEP))
            got = float(inner(d_leaf, dict(jax.tree.leaves_with_path(directions))[path]))
            expected = float(inner(ct, slope))
            scale = float(norm(ct) * norm(slope)) or abs(got)
            if not abs(got - expected) <= RTOL * scale + hidden:
                raise AssertionError(
                    f"{layer}: {d_name(path)} disagrees with central differences of forward: in a "
                    f"random direction backward gives {got!r}, they {expected!r} (relative error "
                    f"{abs(got - expected) / scale:.1e}, allowed {RTOL:.0e})"
                )

    return check
