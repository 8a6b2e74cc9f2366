"""Oracles: independent ways to compute the cotangents that a layer's ``backward`` should give."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.tree_util import KeyPath, keystr

from jaxprop.checking.points import is_floating, normal, tenth, with_noise
from jaxprop.core.cotangents import summed
from jaxprop.core.describe import shapes
from jaxprop.core.layer import Layer
from jaxprop.core.tree import (
    axes_of_examples,
    learned,
    learned_cotangents,
    of_one_example,
    without_unmarked,
)
from jaxprop.core.types import Cotangent, Params, PyTree, Residuals

Answer = dict[str, Cotangent]
"""The cotangents of "params" and of "x"."""

Oracle = Callable[[Layer, Params, PyTree, Cotangent, Array], Answer]
"""A function of a layer, params, x, ct and a key."""


def backward_of(
    layer: Layer, params: Params, x: PyTree, residuals: Residuals, ct: Cotangent
) -> Answer:
    """Return the layer's own cotangents, with forms summed.

    Raises:
        AssertionError: for cotangents that do not have the structure and shapes of their primals.
    """
    result = layer.backward(params, residuals, ct)
    if not isinstance(result, tuple) or len(result) != 2:
        raise AssertionError(f"{layer}: backward returns {shapes(result)}, not (d_params, d_x)")
    d_params, d_x = result
    d_params = summed(learned_cotangents(params, d_params))
    return in_form(layer, {"params": params, "x": x}, {"params": d_params, "x": d_x})


def answer(layer: Layer, params: Params, x: PyTree, ct: Cotangent) -> Answer:
    """Return the layer's own cotangents, after a forward pass."""
    _, residuals = layer.forward(params, x)
    return backward_of(layer, params, x, residuals, ct)


def _by_vjp(layer: Layer, params: Params, x: PyTree, ct: Cotangent, key: Array) -> Answer:
    _, pull = jax.vjp(lambda params, x: layer.forward(params, x)[0], params, x)
    d_params, d_x = pull(ct)
    _, residuals = layer.forward(params, x)
    own, _ = layer.backward(params, residuals, ct)
    d_params = without_unmarked(learned(d_params), learned_cotangents(params, own))
    return in_form(layer, {"params": params, "x": x}, {"params": d_params, "x": d_x})


def _by_linearity(layer: Layer, params: Params, x: PyTree, ct: Cotangent, key: Array) -> Answer:
    other = normal(key, ct)
    both = jax.tree.map(lambda a, b: 2 * a + b, ct, other)
    return jax.tree.map(
        lambda of_both, of_other: (of_both - of_other) / 2,
        answer(layer, params, x, both),
        answer(layer, params, x, other),
    )


def each_alone(layer: Layer, params: Params, x: PyTree, ct: Cotangent) -> Answer:
    """Return the layer's cotangents for every example alone, stacked."""

    def alone(params: Params, x: PyTree, ct: Cotangent) -> Answer:
        x, ct = jax.tree.map(lambda leaf: leaf[None], (x, ct))
        return answer(layer, of_one_example(params), x, ct)

    return jax.vmap(alone, (axes_of_examples(params), 0, 0))(params, x, ct)


def _by_examples(layer: Layer, params: Params, x: PyTree, ct: Cotangent, key: Array) -> Answer:
    each = each_alone(layer, params, x, ct)
    return {
        "params": jax.tree.map(lambda d: d.sum(0), each["params"]),
        "x": jax.tree.map(lambda d: d[:, 0], each["x"]),
    }


def _by_jit(layer: Layer, params: Params, x: PyTree, ct: Cotangent, key: Array) -> Answer:
    return answer(layer, params, x, ct)


def _by_scan(layer: Layer, params: Params, x: PyTree, ct: Cotangent, key: Array) -> Answer:
    """Run as the middle step of a scan, as in a ``repeat``, where residuals are stacked."""
    xs, cts = jax.tree.map(
        lambda leaf, noisy: jnp.stack([noisy, leaf, noisy]),
        (x, ct),
        with_noise(key, (x, ct), tenth),
    )

    def there(carry: None, x: PyTree) -> tuple[None, Residuals]:
        return carry, layer.forward(params, x)[1]

    def back(carry: None, step: tuple[PyTree, Residuals, Cotangent]) -> tuple[None, Answer]:
        return carry, backward_of(layer, params, *step)

    _, residuals = jax.lax.scan(there, None, xs)
    _, answers = jax.lax.scan(back, None, (xs, residuals, cts), reverse=True)
    return jax.tree.map(lambda leaf: leaf[1], answers)


ORACLES: dict[str, Oracle] = {
    "jax.vjp of forward": _by_vjp,
    "linearity in ct": _by_linearity,
    "its examples one by one": _by_examples,
    "itself under jit": _by_jit,
    "itself under lax.scan": _by_scan,
}


def oracles_for(layer: Layer) -> dict[str, Oracle]:
    """Return the oracles by name; for a batch-coupled layer not the one by single examples."""
    apart = _by_examples if layer.batch_coupled else None
    return {words: oracle for words, oracle in ORACLES.items() if oracle is not apart}


def in_form(layer: Layer, primals: dict[str, PyTree], cotangents: Answer) -> Answer:
    """Return the cotangents, with None for that of an integer.

    Raises:
        AssertionError: unless they have the structure, shapes and dtypes of their primals.
    """

    def fit(path: KeyPath, leaf: Array, d_leaf: PyTree) -> PyTree:
        if not is_floating(leaf):
            return None
        if not isinstance(d_leaf, Array | np.ndarray) or shapes(d_leaf) != shapes(leaf):
            name = d_name(path)
            raise AssertionError(
                f"{layer}: {name} is {shapes(d_leaf)}, but {name[2:]} is {shapes(leaf)}"
            )
        return d_leaf

    primals = {
        "params": without_unmarked(learned(primals["params"]), cotangents["params"]),
        "x": primals["x"],
    }
    for name, primal in primals.items():
        try:
            jax.tree.map(lambda leaf, d_leaf: None, primal, cotangents[name])
        except ValueError:
            raise AssertionError(
                f"{layer}: d_{name} is {shapes(cotangents[name])}, but {name} is {shapes(primal)}"
            ) from None
    return jax.tree.map_with_path(fit, primals, cotangents)


def d_name(path: KeyPath) -> str:
    """Return the name of the cotangent at a path of an answer, such as "d_params.w"."""
    return f"d_{path[0].key}{keystr(path[1:])}"
