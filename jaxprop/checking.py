"""Hold a layer's ``backward`` against what it must be: ``jax.vjp`` of its ``forward``, and more."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.tree_util import keystr

from jaxprop.factored import is_factored, summed
from jaxprop.layer import Layer, require, shapes

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
    - is, for a batch, the sum over its examples taken one by one (for d_x: their stack), and each
      example's share of it, where it is factored, that of the example alone,
    - is the same under ``jit``,
    - is the same when forward and backward are scanned, with the residuals stacked in between,
    - agrees with central differences of ``forward`` in a random direction near the point.

    y and residuals must be arrays with the example on axis 0.

    Args:
        layer: the layer, the user's own or the library's.
        x: an input of at least one example (axis 0); floats are taken to float64.
        params: the point to check at. By default that of ``init`` with noise added, so that no
            zero or one there hides an error.
        seed: of init, noise and directions.
        rtol: the largest difference allowed in a leaf, relative to the leaf's largest element (in
            d_x: to the example's). It does not grow with the size of the array. Central differences
            are held to 1e-6.

    Raises:
        AssertionError: one, that names the layer, the leaf (``d_params.w``), the index of the
            worst element, both values and the relative error.
        TypeError, ValueError: for what cannot be checked, such as x and params without floats.

    Example:
        >>> import jax.numpy as jnp, jaxprop as jp
        >>> jp.check_layer(jp.Dense(3), jnp.ones((4, 2)))
    """
    require(layer, Layer, "check_layer: layer")
    with jax.enable_x64(True):
        keys = jax.random.split(jax.random.key(seed), 4)
        x = _float64("x", x)
        if params is None:
            params = _float64("params", layer.init(keys[1], x))
            params = _with_noise(keys[0], params, lambda leaf: 0.1)
        params = _float64("params", params)
        if not any(leaf.size and _is_floating(leaf) for leaf in jax.tree.leaves((params, x))):
            raise ValueError(f"{layer}: nothing to check, neither params nor x hold floats")
        y, residuals = layer.forward(params, x)
        _check_forward(layer, y, residuals, len(jax.tree.leaves(x)[0]))
        oracles = {
            words: jax.jit(functools.partial(oracle, layer)) for words, oracle in _ORACLES.items()
        }
        for key in jax.random.split(keys[2], DIRECTIONS):
            ct = _normal(key, y)
            got = _backward(layer, params, x, residuals, ct)
            for words, oracle in oracles.items():
                _compare(layer, got, oracle(params, x, ct, key), words, rtol, ct)
            _check_shares(layer, params, x, residuals, ct, rtol)
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
    other = _normal(key, ct)
    both = jax.tree.map(lambda a, b: 2 * a + b, ct, other)
    return jax.tree.map(
        lambda of_both, of_other: (of_both - of_other) / 2,
        _at(layer, params, x, both),
        _at(layer, params, x, other),
    )


def _each(layer: Layer, params: Any, x: Any, ct: Any) -> dict[str, Any]:
    """What every example alone gives, stacked."""

    def alone(x: Any, ct: Any) -> dict[str, Any]:
        x, ct = jax.tree.map(lambda leaf: leaf[None], (x, ct))
        return _at(layer, params, x, ct)

    return jax.vmap(alone)(x, ct)


def _by_examples(layer: Layer, params: Any, x: Any, ct: Any, key: chex.PRNGKey) -> dict[str, Any]:
    each = _each(layer, params, x, ct)
    return {
        "params": jax.tree.map(lambda d: d.sum(0), each["params"]),
        "x": jax.tree.map(lambda d: d[:, 0], each["x"]),
    }


def _by_jit(layer: Layer, params: Any, x: Any, ct: Any, key: chex.PRNGKey) -> dict[str, Any]:
    return _at(layer, params, x, ct)


def _by_scan(layer: Layer, params: Any, x: Any, ct: Any, key: chex.PRNGKey) -> dict[str, Any]:
    """Between two other steps, as in a repeated layer: residuals go through scan's stacking."""
    xs, cts = jax.tree.map(
        lambda leaf, noisy: jnp.stack([noisy, leaf, noisy]),
        (x, ct),
        _with_noise(key, (x, ct), _tenth),
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


def _check_forward(layer: Layer, y: Any, residuals: Any, examples: int) -> None:
    for name, tree in (("y", y), ("residuals", residuals)):
        for path, leaf in jax.tree.leaves_with_path(tree):
            at = f"{layer}: {name}{keystr(path)}"
            if not isinstance(leaf, Array):
                raise AssertionError(
                    f"{at} is the {type(leaf).__name__} {leaf!r}, which would not survive jit or "
                    "scan; a fact that is known beforehand is a field of the layer"
                )
            if leaf.shape[:1] != (examples,):
                raise AssertionError(
                    f"{at} has shape {leaf.shape}, but axis 0 is the example and x has {examples}"
                )
            if name == "y" and not _is_floating(leaf):
                raise AssertionError(f"{at} is {leaf.dtype}, which has no cotangent")


def _check_shares(layer: Layer, params: Any, x: Any, residuals: Any, ct: Any, rtol: float) -> None:
    """Each example's share, as the factored cotangents give it, against that example alone."""
    d_params, _ = layer.backward(params, residuals, ct)
    forms = jax.tree.leaves(d_params, is_leaf=is_factored)
    alone = jax.tree.leaves_with_path(_each(layer, params, x, ct)["params"])
    for form, (path, expected) in zip(forms, alone, strict=len(forms) == len(alone)):
        if is_factored(form):
            got = {"params": form.per_example()}
            where = f"each example alone, at d_params{keystr(path)}"
            _compare(layer, got, {"params": expected}, where, rtol, ct, by_example=True)


def _check_differences(layer: Layer, params: Any, x: Any, ct: Any, key: chex.PRNGKey) -> None:
    """The second oracle, which knows nothing of autodiff, one leaf after the other.

    For a direction v of the leaf, <d, v> against <ct, s> with s = (f(p + h v) - f(p - h v)) / 2h,
    at a point moved off whatever kinks it sat on. Noise and v are in proportion to each element,
    so that a positive number stays positive. The error is measured against |ct| |s|, which bounds
    both sides and, unlike them, does not cancel to nothing; what the rounding of f hides, near
    eps |ct| (|f| + |p|) / h, is allowed.
    """
    for_noise, for_directions = jax.random.split(key)
    point = _with_noise(for_noise, {"params": params, "x": x}, _hundredth)
    directions = jax.tree.map(
        lambda leaf, v: v * _size(leaf) if _is_floating(leaf) else leaf,
        point,
        _normal(for_directions, point),
    )
    forward = jax.jit(lambda params, x: layer.forward(params, x)[0])
    y = forward(**point)
    if not all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(y)):
        raise AssertionError(f"{layer}: forward is not finite near the point that is checked")
    hidden = 16 * jnp.finfo(jnp.float64).eps * _norm(ct) * (_norm(y) + _size_of(point)) / STEP
    cotangents = jax.jit(functools.partial(_at, layer))(**point, ct=ct)
    for path, d_leaf in jax.tree.leaves_with_path(cotangents):

        def moved(h: float, path: Any = path) -> Any:
            def move(at: Any, leaf: Array, v: Array) -> Array:
                return leaf + h * v if at == path else leaf

            return forward(**jax.tree.map_with_path(move, point, directions))

        slope = jax.tree.map(lambda a, b: (a - b) / (2 * STEP), moved(STEP), moved(-STEP))
        got = float(_inner(d_leaf, dict(jax.tree.leaves_with_path(directions))[path]))
        expected = float(_inner(ct, slope))
        scale = float(_norm(ct) * _norm(slope)) or abs(got)
        if not abs(got - expected) <= DIFFERENCES_RTOL * scale + float(hidden):
            raise AssertionError(
                f"{layer}: {_d_name(path)} disagrees with central differences of forward: in a "
                f"random direction backward gives {got!r}, they {expected!r} (relative error "
                f"{abs(got - expected) / scale:.1e}, allowed {DIFFERENCES_RTOL:.0e})"
            )


def _compare(
    layer: Layer,
    got: Any,
    expected: Any,
    oracle: str,
    rtol: float,
    ct: Any,
    by_example: bool = False,
) -> None:
    """Leaf by leaf, relative to the leaf's largest element; for d_x, to the example's.

    A hundredth of that again, of the largest ct, is allowed to a leaf that should be zero.
    """
    floor = rtol / 100 * max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(ct))
    pairs = zip(jax.tree.leaves_with_path(got), jax.tree.leaves(expected), strict=True)
    for (path, leaf), want in pairs:
        a, b = np.asarray(leaf), np.asarray(want).reshape(np.shape(leaf))
        with np.errstate(invalid="ignore"):
            difference = np.where(a == b, 0.0, np.abs(a - b))
        difference = np.where(np.isnan(difference), np.inf, difference)
        axes = tuple(range(1, b.ndim)) if by_example or path[0].key == "x" else None
        scale = np.broadcast_to(np.max(np.abs(b), axes, keepdims=True, initial=0.0), b.shape)
        excess = difference - np.maximum(rtol * scale, floor)
        if not np.any(excess > 0):
            continue
        at = np.unravel_index(np.argmax(excess), difference.shape)
        error = difference[at] / scale[at] if scale[at] else np.inf
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
        if not isinstance(d_leaf, Array | np.ndarray) or shapes(d_leaf) != shapes(leaf):
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


def _float64(name: str, tree: Any) -> Any:
    """The tree with its floats in float64. Raises ``TypeError`` for what has no cotangent."""

    def widen(path: Any, leaf: Any) -> Array:
        if not hasattr(leaf, "dtype"):
            raise TypeError(f"{name}{keystr(path)} must be an array, not {shapes(leaf)}")
        leaf = jnp.asarray(leaf)
        if _is_floating(leaf):
            return leaf.astype(jnp.float64)
        if jnp.issubdtype(leaf.dtype, jnp.complexfloating) or (
            name == "params" and jnp.issubdtype(leaf.dtype, jnp.number)
        ):
            raise TypeError(f"{name}{keystr(path)} is {leaf.dtype}; check_layer takes real floats")
        return leaf

    return jax.tree.map_with_path(widen, tree)


def _normal(key: chex.PRNGKey, tree: Any) -> Any:
    """Normal numbers in the place of floats."""
    leaves, structure = jax.tree.flatten(tree)
    keys = jax.random.split(key, max(len(leaves), 1))
    drawn = [
        jax.random.normal(key, leaf.shape, leaf.dtype) if _is_floating(leaf) else leaf
        for leaf, key in zip(leaves, keys, strict=False)
    ]
    return jax.tree.unflatten(structure, drawn)


def _with_noise(key: chex.PRNGKey, tree: Any, size: Callable[[Array], Any]) -> Any:
    def add(leaf: Array, noise: Array) -> Array:
        return leaf + size(leaf) * noise if _is_floating(leaf) else leaf

    return jax.tree.map(add, tree, _normal(key, tree))


def _size(leaf: Array) -> Array:
    """The size of each element; for a zero, that of the leaf, and for a leaf of zeros 1."""
    typical = jnp.sqrt(jnp.mean(leaf**2))
    return jnp.where(leaf == 0, jnp.where(typical == 0, 1, typical), jnp.abs(leaf))


def _tenth(leaf: Array) -> Array:
    return 0.1 * _size(leaf)


def _hundredth(leaf: Array) -> Array:
    return 0.01 * _size(leaf)


def _inner(a: Any, b: Any) -> Array:
    return sum(jax.tree.leaves(jax.tree.map(lambda a, b: jnp.sum(a * b), a, b)), jnp.zeros(()))


def _size_of(tree: Any) -> Array:
    """The norm of the tree's floats."""
    floats = [leaf for leaf in jax.tree.leaves(tree) if _is_floating(leaf)]
    return _norm(floats)


def _norm(a: Any) -> Array:
    return jnp.sqrt(_inner(a, a))


def _d_name(path: Any) -> str:
    return f"d_{path[0].key}{keystr(path[1:])}"
