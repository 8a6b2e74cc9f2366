"""Hold a layer's ``backward`` against what it must be: ``jax.vjp`` of its ``forward``, and more."""

from __future__ import annotations

import functools
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.tree_util import keystr

from jaxprop.factored import summed
from jaxprop.layer import Layer, shapes

DIRECTIONS = 3
STEP = 1e-6  # of the central differences: rounding and truncation are then near 1e-10 of the slope
DIFFERENCES_RTOL = 1e-6


def check_layer(
    layer: Layer, x: Any, params: Any = None, *, seed: int = 0, rtol: float = 1e-12
) -> None:
    """Check ``layer.backward`` in float64: return nothing, or raise and say what is wrong.

    In several random directions of the output's cotangent ct, every leaf of d_params and d_x

    - has the structure, shape and dtype of what it is the cotangent of,
    - equals ``jax.vjp`` of ``forward``,
    - is linear in ct,
    - is, for a batch, the sum over its examples taken one by one (for d_x: their stack),
    - is the same under ``jit``,
    - is the same when forward and backward are scanned, with the residuals stacked in between,
    - agrees with central differences of ``forward`` in a random direction near the point.

    Residuals must be arrays with the example on axis 0.

    Args:
        layer: the layer, the user's own or the library's.
        x: an input of at least one example (axis 0); floats are taken to float64.
        params: the point to check at. By default that of ``init`` with noise added, so that no
            zero or one there hides an error.
        seed: of init, noise and directions.
        rtol: the largest difference allowed in a leaf, relative to the leaf's largest element.
            It does not grow with the size of the array. Central differences are held to 1e-6.

    Raises:
        AssertionError: one, that names the layer, the leaf (``d_params.w``), the index of the
            worst element, both values and the relative error.

    Example:
        >>> import jax.numpy as jnp, jaxprop as jp
        >>> jp.check_layer(jp.Dense(3), jnp.ones((4, 2)))
    """
    with jax.enable_x64(True):
        keys = jax.random.split(jax.random.key(seed), 4)
        x = _float64(x)
        if params is None:
            params = _with_noise(keys[0], _float64(layer.init(keys[1], x)), 0.1)
        params = _float64(params)
        y, residuals = layer.forward(params, x)
        _check_residuals(layer, residuals, len(jax.tree.leaves(x)[0]))
        oracles = {
            words: jax.jit(functools.partial(oracle, layer)) for words, oracle in _ORACLES.items()
        }
        for key in jax.random.split(keys[2], DIRECTIONS):
            ct = _with_noise(key, jax.tree.map(jnp.zeros_like, y), 1.0)
            got = _backward(layer, params, x, residuals, ct)
            for words, oracle in oracles.items():
                _compare(layer, got, oracle(params, x, ct, key), words, rtol)
            _check_differences(layer, params, x, ct, key)


def _backward(layer: Layer, params: Any, x: Any, residuals: Any, ct: Any) -> dict[str, Any]:
    """The layer's own answer, summed, once its form is found right."""
    result = layer.backward(params, residuals, ct)
    if not isinstance(result, tuple) or len(result) != 2:
        raise AssertionError(f"{layer}: backward returns {shapes(result)}, not (d_params, d_x)")
    d_params, d_x = result
    return _in_form(layer, {"params": params, "x": x}, {"params": summed(d_params), "x": d_x})


def _at(layer: Layer, params: Any, x: Any, ct: Any) -> dict[str, Any]:
    _, residuals = layer.forward(params, x)
    return _backward(layer, params, x, residuals, ct)


# Each oracle says, in its own way, what backward should have given for ct.


def _by_vjp(layer: Layer, params: Any, x: Any, ct: Any, key: chex.PRNGKey) -> dict[str, Any]:
    _, pull = jax.vjp(lambda params, x: layer.forward(params, x)[0], params, x)
    d_params, d_x = pull(ct)
    return _in_form(layer, {"params": params, "x": x}, {"params": d_params, "x": d_x})


def _by_linearity(layer: Layer, params: Any, x: Any, ct: Any, key: chex.PRNGKey) -> dict[str, Any]:
    other = _with_noise(key, ct, 1.0)
    both = jax.tree.map(lambda a, b: 2 * a + b, ct, other)
    return jax.tree.map(
        lambda of_both, of_other: (of_both - of_other) / 2,
        _at(layer, params, x, both),
        _at(layer, params, x, other),
    )


def _by_examples(layer: Layer, params: Any, x: Any, ct: Any, key: chex.PRNGKey) -> dict[str, Any]:
    def alone(x: Any, ct: Any) -> dict[str, Any]:
        x, ct = jax.tree.map(lambda leaf: leaf[None], (x, ct))
        return _at(layer, params, x, ct)

    each = jax.vmap(alone)(x, ct)
    return {
        "params": jax.tree.map(lambda d: d.sum(0), each["params"]),
        "x": jax.tree.map(lambda d: d[:, 0], each["x"]),
    }


def _by_jit(layer: Layer, params: Any, x: Any, ct: Any, key: chex.PRNGKey) -> dict[str, Any]:
    return _at(layer, params, x, ct)


def _by_scan(layer: Layer, params: Any, x: Any, ct: Any, key: chex.PRNGKey) -> dict[str, Any]:
    """Between two other steps, as in a repeated layer: residuals go through scan's stacking."""
    xs, cts = jax.tree.map(
        lambda leaf, noisy: jnp.stack([noisy, leaf, noisy]), (x, ct), _with_noise(key, (x, ct), 0.1)
    )

    def there(carry: None, x: Any) -> tuple[None, Any]:
        return carry, layer.forward(params, x)[1]

    def back(carry: None, step: tuple[Any, Any, Any]) -> tuple[None, Any]:
        return carry, _backward(layer, params, *step)

    _, residuals = jax.lax.scan(there, None, xs)
    _, answers = jax.lax.scan(back, None, (xs, residuals, cts), reverse=True)
    return jax.tree.map(lambda leaf: leaf[1], answers)


_ORACLES = {
    "jax.vjp of forward": _by_vjp,
    "linearity in ct": _by_linearity,
    "its examples one by one": _by_examples,
    "itself under jit": _by_jit,
    "itself under lax.scan": _by_scan,
}


def _check_residuals(layer: Layer, residuals: Any, examples: int) -> None:
    for path, leaf in jax.tree.leaves_with_path(residuals):
        name = f"{layer}: residuals{keystr(path)}"
        if not isinstance(leaf, Array):
            raise AssertionError(
                f"{name} is the {type(leaf).__name__} {leaf!r}, which would not survive jit or "
                "scan; a fact that is known beforehand is a field of the layer"
            )
        if leaf.shape[:1] != (examples,):
            raise AssertionError(
                f"{name} has shape {leaf.shape}, but axis 0 is the example and x has {examples}"
            )


def _check_differences(layer: Layer, params: Any, x: Any, ct: Any, key: chex.PRNGKey) -> None:
    """The second oracle, which knows nothing of autodiff, one leaf after the other.

    For a direction v of the leaf, <d, v> against <ct, s> with s = (f(p + h v) - f(p - h v)) / 2h,
    at a point moved off whatever kinks it sat on. The error is measured against |ct| |s|, which
    bounds both sides and, unlike them, does not cancel to nothing.
    """
    point = _with_noise(key, {"params": params, "x": x}, 0.01)
    directions = _with_noise(key, jax.tree.map(jnp.zeros_like, point), 1.0)
    forward = jax.jit(lambda params, x: layer.forward(params, x)[0])
    cotangents = jax.jit(functools.partial(_at, layer))(**point, ct=ct)
    for path, d_leaf in jax.tree.leaves_with_path(cotangents):

        def moved(h: float, path: Any = path) -> Any:
            def move(at: Any, leaf: Array, v: Array) -> Array:
                return leaf + h * v if at == path else leaf

            return forward(**jax.tree.map_with_path(move, point, directions))

        slope = jax.tree.map(lambda a, b: (a - b) / (2 * STEP), moved(STEP), moved(-STEP))
        got = float(_inner(d_leaf, dict(jax.tree.leaves_with_path(directions))[path]))
        expected = float(_inner(ct, slope))
        scale = float(jnp.sqrt(_inner(ct, ct) * _inner(slope, slope))) or abs(got)
        if not abs(got - expected) <= DIFFERENCES_RTOL * scale:
            raise AssertionError(
                f"{layer}: {_d_name(path)} disagrees with central differences of forward: in a "
                f"random direction backward gives {got!r}, they {expected!r} (relative error "
                f"{abs(got - expected) / scale:.1e}, allowed {DIFFERENCES_RTOL:.0e})"
            )


def _compare(layer: Layer, got: Any, expected: Any, oracle: str, rtol: float) -> None:
    pairs = zip(jax.tree.leaves_with_path(got), jax.tree.leaves(expected), strict=True)
    for (path, leaf), want in pairs:
        a, b = np.asarray(leaf), np.asarray(want)
        with np.errstate(invalid="ignore"):
            difference = np.where(a == b, 0.0, np.abs(a - b))
        difference = np.where(np.isnan(difference), np.inf, difference)
        scale = np.max(np.abs(b), initial=0.0)
        if np.all(difference <= rtol * scale):
            continue
        at = np.unravel_index(np.argmax(difference), difference.shape)
        error = difference[at] / scale if scale else np.inf
        raise AssertionError(
            f"{layer}: {_d_name(path)} disagrees with {oracle}: at {[int(i) for i in at]} backward "
            f"gives {float(a[at])!r}, the oracle {float(b[at])!r} (relative error {error:.1e}, "
            f"allowed {rtol:.0e})"
        )


def _in_form(layer: Layer, primals: dict[str, Any], cotangents: dict[str, Any]) -> dict[str, Any]:
    """The cotangents, held to the form of their primals; None for an integer, which has none."""

    def fit(path: Any, leaf: Array, d_leaf: Any) -> Any:
        if not _is_floating(leaf):
            return None
        if not isinstance(d_leaf, Array) or shapes(d_leaf) != shapes(leaf):
            name = _d_name(path)
            raise AssertionError(
                f"{layer}: {name} is {shapes(d_leaf)}, but {name[2:]} is {shapes(leaf)}"
            )
        return d_leaf

    for name, primal in primals.items():
        try:
            jax.tree.map(lambda leaf, d_leaf: None, primal, cotangents[name])
        except ValueError:
            raise AssertionError(
                f"{layer}: d_{name} is {shapes(cotangents[name])}, but {name} is {shapes(primal)}"
            ) from None
    return jax.tree.map_with_path(fit, primals, cotangents)


def _is_floating(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jnp.floating)


def _float64(tree: Any) -> Any:
    def widen(leaf: Any) -> Array:
        leaf = jnp.asarray(leaf)
        return leaf.astype(jnp.float64) if _is_floating(leaf) else leaf

    return jax.tree.map(widen, tree)


def _with_noise(key: chex.PRNGKey, tree: Any, scale: float) -> Any:
    leaves, structure = jax.tree.flatten(tree)
    noisy = [
        leaf + scale * jax.random.normal(k, leaf.shape, leaf.dtype) if _is_floating(leaf) else leaf
        for leaf, k in zip(leaves, jax.random.split(key, max(len(leaves), 1)), strict=False)
    ]
    return jax.tree.unflatten(structure, noisy)


def _inner(a: Any, b: Any) -> Array:
    return sum(jax.tree.leaves(jax.tree.map(lambda a, b: jnp.sum(a * b), a, b)), jnp.zeros(()))


def _d_name(path: Any) -> str:
    return f"d_{path[0].key}{keystr(path[1:])}"
