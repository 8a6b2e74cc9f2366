"""Central differences of ``forward``: the oracle that does not use autodiff."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxprop.checking.compare import d_name
from jaxprop.checking.oracles import JIT, Answer, Drawn, Expected
from jaxprop.checking.points import inner, norm, normal, size_of, wide, with_noise
from jaxprop.core.arrays import is_floating
from jaxprop.core.layer import Layer
from jaxprop.core.types import Cotangent, Params, PyTree


class Precision(NamedTuple):
    """The step sizes and tolerances of central differences.

    Attributes:
        eps: the relative rounding of the function's floats.
        step: the step, relative to the direction.
        rtol: the largest relative difference allowed.
    """

    eps: float
    step: float
    rtol: float


# With a step of 1e-6, rounding and truncation errors are near 1e-10 of the slope.
DOUBLE = Precision(float(np.finfo(np.float64).eps), 1e-6, 1e-6)
KINK = 1e-3  # relative to the slope: how far the one-sided slopes may differ without a kink


def differences_of(
    layer: Layer, expected_of: Callable[[Params, PyTree, Cotangent, Drawn], Expected]
) -> Callable[[np.random.Generator, Params, PyTree, Cotangent, Drawn], None]:
    """Return ``check(rng, params, x, ct, drawn)``, which compares backward with differences.

    It first moves the point off any kinks by noise, and raises unless the two agree.

    Args:
        layer: the layer.
        expected_of: the compiled oracles, used only for the layer's own cotangents.
    """
    output = jax.jit(lambda params, x: layer.forward(params, x)[0])

    def check(
        rng: np.random.Generator, params: Params, x: PyTree, ct: Cotangent, drawn: Drawn
    ) -> None:
        point = with_noise(rng, {"params": params, "x": x}, 0.01)
        directions = normal(rng, point)
        cotangents = expected_of(point["params"], point["x"], ct, drawn).answers[JIT]
        moving = {
            # A param that forward holds constant has zeros here, which jax.vjp confirmed before.
            path: d_leaf
            for path, d_leaf in jax.tree.leaves_with_path(cotangents)
            if path[0].key != "params" or np.any(d_leaf)
        }
        check_differences(
            layer, "forward", "backward", lambda p: output(**p), point, directions, moving, ct
        )

    return check


def check_differences(
    who: object,
    function: str,
    giver: str,
    output: Callable[[Answer], PyTree],
    point: Answer,
    directions: Answer,
    cotangents: dict[tuple[Any, ...], PyTree],
    ct: Cotangent,
    precision: Precision = DOUBLE,
    kinks: bool = False,
) -> None:
    """Raise unless the cotangents at a point agree with central differences.

    Each leaf p is moved along a direction v that is proportional to the size of each element, so
    that a positive number stays positive. With d the leaf's cotangent, <d, v> must be <ct, s> with
    s = (f(p + h v) - f(p - h v)) / 2h.

    The error is relative to |ct| |s|, which bounds both sides and, unlike them, cannot cancel. An
    error near eps |ct| (|f| + |p|) / h, which the rounding of f may cause, is allowed.

    Args:
        who: what is checked, for the messages.
        function: the function's name, for the messages.
        giver: the name of what computed the cotangents, for the messages.
        output: the function f of a point.
        point: the point.
        directions: a normal number for each element of the point.
        cotangents: the cotangent of each leaf that is moved, by its path.
        ct: the cotangent of the output.
        precision: the step h and what is allowed.
        kinks: whether the point may be at a kink, where there is no derivative along v. A leaf
            whose slopes on the two sides differ is then not checked.
    """
    y = output(point)
    if not all(np.isfinite(wide(leaf)).all() for leaf in jax.tree.leaves(y)):
        raise AssertionError(f"{who}: {function} is not finite near the point that is checked")
    hidden = 16 * precision.eps * norm(ct) * (norm(y) + norm(point)) / precision.step
    leaves = dict(jax.tree.leaves_with_path(point))
    drawn = dict(jax.tree.leaves_with_path(directions))
    for path, d_leaf in cotangents.items():
        v = wide(drawn[path]) * size_of(leaves[path])

        def along(h: float, path: tuple[Any, ...] = path, v: np.ndarray = v) -> list[np.ndarray]:
            def moved(at: tuple[Any, ...], leaf: PyTree) -> PyTree:
                if at != path or not is_floating(leaf):
                    return leaf
                return jax.device_put((wide(leaf) + h * v).astype(leaf.dtype))

            return [
                wide(leaf) for leaf in jax.tree.leaves(output(jax.tree.map_with_path(moved, point)))
            ]

        ahead, behind = along(precision.step), along(-precision.step)
        slope = [(a - b) / (2 * precision.step) for a, b in zip(ahead, behind, strict=True)]
        got, expected = inner(d_leaf, v), inner(ct, slope)
        scale = norm(ct) * norm(slope) or abs(got)
        if abs(got - expected) <= precision.rtol * scale + hidden:
            continue
        if kinks:
            here = [wide(leaf) for leaf in jax.tree.leaves(y)]
            bends = [
                (a + b - 2 * c) / precision.step
                for a, b, c in zip(ahead, behind, here, strict=True)
            ]
            if not norm(bends) <= KINK * norm(slope):
                continue
        raise AssertionError(
            f"{who}: {d_name(path)} disagrees with central differences of {function}: in a "
            f"random direction {giver} gives {got!r}, they {expected!r} (relative error "
            f"{abs(got - expected) / scale:.1e}, allowed {precision.rtol:.0e})"
        )
