"""Central differences of ``forward``: the oracle that does not use autodiff."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array
from jax.tree_util import KeyPath

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
from jaxprop.core.types import Cotangent, Params, PyTree

STEP = 1e-6  # for which rounding and truncation are near 1e-10 of the slope
RTOL = 1e-6


def differences_of(layer: Layer) -> Callable[[Params, PyTree, Cotangent, Array], None]:
    """Return ``check(params, x, ct, key)``, which raises unless backward agrees with differences.

    Each leaf is moved along a random direction v. With d the leaf's cotangent by backward, <d, v>
    must be <ct, s> with s = (f(p + h v) - f(p - h v)) / 2h. First noise moves the point p off any
    kinks. Noise and v are proportional to each element, so that a positive number stays positive.

    The error is relative to |ct| |s|: it bounds both sides and, unlike them, cannot cancel. An
    error near eps |ct| (|f| + |p|) / h, which the rounding of f may cause, is allowed.
    """

    @jax.jit
    def prepare(
        params: Params, x: PyTree, ct: Cotangent, key: Array
    ) -> tuple[PyTree, PyTree, Cotangent]:
        for_noise, for_directions = jax.random.split(key)
        point = with_noise(for_noise, {"params": params, "x": x}, hundredth)
        directions = jax.tree.map(
            lambda leaf, v: v * size_of(leaf) if is_floating(leaf) else leaf,
            point,
            normal(for_directions, point),
        )
        return point, directions, answer(layer, **point, ct=ct)

    @jax.jit
    def forward(point: PyTree, directions: PyTree, steps: PyTree) -> PyTree:
        def move(leaf: Array, v: Array, h: Array) -> Array:
            return leaf + h * v if is_floating(leaf) else leaf

        moved = jax.tree.map(move, point, directions, steps)
        return layer.forward(moved["params"], moved["x"])[0]

    def check(params: Params, x: PyTree, ct: Cotangent, key: Array) -> None:
        point, directions, cotangents = prepare(params, x, ct, key)
        still = jax.tree.map(lambda leaf: 0.0, point)
        y = forward(point, directions, still)
        if not all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(y)):
            raise AssertionError(f"{layer}: forward is not finite near the point that is checked")
        eps = float(jnp.finfo(jnp.float64).eps)
        hidden = 16 * eps * float(norm(ct)) * float(norm(y) + norm_of_floats(point)) / STEP
        for path, d_leaf in jax.tree.leaves_with_path(cotangents):
            if path[0].key == "params" and not jnp.any(d_leaf):
                continue  # held constant by forward: jax.vjp, compared before, gave zeros

            def along(h: float, path: KeyPath = path) -> PyTree:
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
