"""The check: what a layer answers, beside what each oracle says it should."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.tree_util import keystr

from jaxprop.checking.differences import differences_of
from jaxprop.checking.oracles import backward_of, d_name, each_alone, oracles_for
from jaxprop.checking.points import float64, is_floating, normal, tenth, with_noise
from jaxprop.core.checks import require
from jaxprop.core.combinator import Combinator
from jaxprop.core.forms import is_factored
from jaxprop.core.tree import learned_cotangents
from jaxprop.core.layer import Layer

DIRECTIONS = 3
OF_CT = "the sum of squares (of_squares looks at the form's own ct)"


def check_layer(
    layer: Layer, x: Any, params: Any = None, *, seed: int = 0, rtol: float = 1e-12
) -> None:
    """Check ``layer.backward`` in float64: return nothing, or raise and say what is wrong.

    In several random directions of the output's cotangent ct, every leaf of d_params and d_x

    - has the structure, shape and dtype of what it is the cotangent of,
    - equals ``jax.vjp`` of ``forward``,
    - is linear in ct,
    - is, for a batch, the sum over its examples taken one by one (for d_x: their stack), and each
      example's share of it, where it is factored, that of the example alone (a layer that is
      ``batch_coupled`` says that this does not hold, and is spared it),
    - where it is factored, has in its first factor nothing of ct (``Factored.of_squares``),
    - is the same under ``jit``,
    - is the same when forward and backward are scanned, with the residuals stacked in between,
    - agrees with central differences of ``forward`` in a random direction near the point; a param
      that forward holds constant by ``jax.lax.stop_gradient`` is spared that.

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
        x = float64("x", x)
        if params is None:
            params = float64("params", jax.jit(layer.init)(keys[1], x))
            params = jax.jit(lambda key, tree: with_noise(key, tree, tenth))(keys[0], params)
        params = float64("params", params)
        if not any(leaf.size and is_floating(leaf) for leaf in jax.tree.leaves((params, x))):
            raise ValueError(f"{layer}: nothing to check, neither params nor x hold floats")
        y, residuals = layer.forward(params, x)
        _check_forward(layer, y, residuals, len(jax.tree.leaves(x)[0]))
        cts = jax.jit(lambda key, y: (normal(key, y), normal(jax.random.fold_in(key, 1), y)))
        oracles = {
            words: jax.jit(functools.partial(oracle, layer))
            for words, oracle in oracles_for(layer).items()
        }
        shares, differences = jax.jit(functools.partial(_shares, layer)), differences_of(layer)
        for key in jax.random.split(keys[2], DIRECTIONS):
            ct, other = cts(key, y)
            got = backward_of(layer, params, x, residuals, ct)
            for words, oracle in oracles.items():
                _compare(layer, got, oracle(params, x, ct, key), words, rtol, ct)
            if not layer.batch_coupled:
                (each, alone), (squares, moments) = shares(params, x, residuals, ct, other)
                _compare(layer, each, alone, "each example alone", rtol, ct, by_example=True)
                _compare(layer, squares, moments, OF_CT, rtol, other)
            differences(params, x, ct, key)


def _check_forward(layer: Layer, y: Any, residuals: Any, examples: int) -> None:
    for name, tree in (("y", y), ("residuals", residuals)):
        for path, leaf in jax.tree.leaves_with_path(tree):
            at = f"{layer}: {name}{keystr(path)}"
            if not isinstance(leaf, Array):
                raise AssertionError(
                    f"{at} is the {type(leaf).__name__} {leaf!r}, which would not survive jit or "
                    "scan; a fact that is known beforehand is a field of the layer"
                )
            inner = name == "residuals" and isinstance(layer, Combinator)  # a stack of layers', say
            if not inner and leaf.shape[:1] != (examples,):
                raise AssertionError(
                    f"{at} has shape {leaf.shape}, but axis 0 is the example and x has {examples}"
                )
            if name == "y" and not is_floating(leaf):
                raise AssertionError(f"{at} is {leaf.dtype}, which has no cotangent")


def _shares(
    layer: Layer, params: Any, x: Any, residuals: Any, ct: Any, other_ct: Any
) -> tuple[tuple[Any, Any], tuple[Any, Any]]:
    """What factored leaves say beside what is so: of each example, and of the sum of squares.

    The latter is asked of the form of ct, with the squares of another's.
    """
    forms, others = (
        jax.tree.leaves_with_path(
            learned_cotangents(params, layer.backward(params, residuals, ct)[0]),
            is_leaf=is_factored,
        )
        for ct in (ct, other_ct)
    )
    alone = jax.tree.leaves(each_alone(layer, params, x, ct)["params"])
    each: tuple[Any, Any] = ({}, {})
    squares: tuple[Any, Any] = ({}, {})
    for (path, form), (_, other), share in zip(forms, others, alone, strict=True):
        if is_factored(form):
            name = f"params{keystr(path)}"
            each[0][name], each[1][name] = form.per_example(), share
            squares[0][name] = form.of_squares(other.squares())
            squares[1][name] = other.second_moment()
    return each, squares


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
            f"{layer}: {d_name(path)} disagrees with {oracle}: at {[int(i) for i in at]} backward "
            f"gives {float(a[at])!r}, the oracle {float(b[at])!r} (relative error {error:.1e}, "
            f"allowed {rtol:.0e})"
        )
