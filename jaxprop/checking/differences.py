"""Central differences of ``forward``: the oracle that does not use autodiff."""

from __future__ import annotations

from collections.abc import Callable

import jax
import numpy as np
from jax.tree_util import KeyPath

from jaxprop.checking.oracles import JIT, Drawn, Expected, d_name
from jaxprop.checking.points import inner, is_floating, norm, normal, size_of, with_noise
from jaxprop.core.layer import Layer
from jaxprop.core.types import Cotangent, Params, PyTree

STEP = 1e-6  # for which rounding and truncation are near 1e-10 of the slope
RTOL = 1e-6


def differences_of(
    layer: Layer, expected_of: Callable[[Params, PyTree, Cotangent, Drawn], Expected]
) -> Callable[[np.random.Generator, Params, PyTree, Cotangent, Drawn], None]:
    """Return ``check(rng, params, x, ct, drawn)``: raise unless backward agrees with differences.

    Each leaf is moved along a random direction v. With d the leaf's cotangent by backward, <d, v>
    must be <ct, s> with s = (f(p + h v) - f(p - h v)) / 2h. First noise moves the point p off any
    kinks. Noise and v are proportional to each element, so that a positive number stays positive.

    The error is relative to |ct| |s|: it bounds both sides and, unlike them, cannot cancel. An
    error near eps |ct| (|f| + |p|) / h, which the rounding of f may cause, is allowed.

    Args:
        layer: the layer.
        expected_of: the compiled oracles; of them only the layer's own cotangents are asked.
    """
    output = jax.jit(lambda params, x: layer.forward(params, x)[0])

    def check(
        rng: np.random.Generator, params: Params, x: PyTree, ct: Cotangent, drawn: Drawn
    ) -> None:
        point = with_noise(rng, {"params": params, "x": x}, 0.01)
        directions = jax.tree.map(
            lambda leaf, v: np.asarray(v) * size_of(leaf) if is_floating(leaf) else leaf,
            point,
            normal(rng, point),
        )
        cotangents = expected_of(point["params"], point["x"], ct, drawn).answers[JIT]
        y = output(**point)
        if not all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(y)):
            raise AssertionError(f"{layer}: forward is not finite near the point that is checked")
        eps = float(np.finfo(np.float64).eps)
        hidden = 16 * eps * norm(ct) * (norm(y) + norm(point)) / STEP
        by_path = dict(jax.tree.leaves_with_path(directions))
        for path, d_leaf in jax.tree.leaves_with_path(cotangents):
            if path[0].key == "params" and not np.any(d_leaf):
                continue  # held constant by forward: jax.vjp, compared before, gave zeros

            def along(h: float, path: KeyPath = path) -> PyTree:
                def moved(at: KeyPath, leaf: PyTree) -> PyTree:
                    if at != path:
                        return leaf
                    return jax.device_put(np.asarray(leaf) + h * by_path[path])

                return output(**jax.tree.map_with_path(moved, point))

            slope = jax.tree.map(
                lambda a, b: (np.asarray(a) - np.asarray(b)) / (2 * STEP), along(STEP), along(-STEP)
            )
            got, expected = inner(d_leaf, by_path[path]), inner(ct, slope)
            scale = norm(ct) * norm(slope) or abs(got)
            if not abs(got - expected) <= RTOL * scale + hidden:
                raise AssertionError(
                    f"{layer}: {d_name(path)} disagrees with central differences of forward: in a "
                    f"random direction backward gives {got!r}, they {expected!r} (relative error "
                    f"{abs(got - expected) / scale:.1e}, allowed {RTOL:.0e})"
                )

    return check
