"""Each oracle says, in its own way, what backward should have given for ct."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.tree_util import keystr

from jaxprop.checking.points import is_floating, normal, tenth, with_noise
from jaxprop.core.cotangents import summed
from jaxprop.core.describe import shapes
from jaxprop.core.layer import Layer
from jaxprop.core.tree import (
    axes_of_examples,
    learned,
    learned_cotangents,
    of_one_example,
    with_cotangents,
)
from jaxprop.core.types import Cotangent, Params, PyTree, Residuals


def backward_of(layer: Layer, params: Any, x: Any, residuals: Any, ct: Any) -> dict[str, Any]:
    """The layer's own answer, summed, once its form is found right."""
    result = layer.backward(params, residuals, ct)
    if not isinstance(result, tuple) or len(result) != 2:
        raise AssertionError(f"{layer}: backward returns {shapes(result)}, not (d_params, d_x)")
    d_params, d_x = result
    d_params = summed(learned_cotangents(params, d_params))
    return in_form(layer, {"params": params, "x": x}, {"params": d_params, "x": d_x})


def answer(layer: Layer, params: Any, x: Any, ct: Any) -> dict[str, Any]:
    _, residuals = layer.forward(params, x)
    return backward_of(layer, params, x, residuals, ct)


def _by_vjp(layer: Layer, params: Any, x: Any, ct: Any, key: chex.PRNGKey) -> dict[str, Any]:
    _, pull = jax.vjp(lambda params, x: layer.forward(params, x)[0], params, x)
    d_params, d_x = pull(ct)
    _, residuals = layer.forward(params, x)
    own, _ = layer.backward(params, residuals, ct)
    d_params = with_cotangents(learned(d_params), learned_cotangents(params, own))
    return in_form(layer, {"params": params, "x": x}, {"params": d_params, "x": d_x})


def _by_linearity(layer: Layer, params: Any, x: Any, ct: Any, key: chex.PRNGKey) -> dict[str, Any]:
    other = normal(key, ct)
    both = jax.tree.map(lambda a, b: 2 * a + b, ct, other)
    return jax.tree.map(
        lambda of_both, of_other: (of_both - of_other) / 2,
        answer(layer, params, x, both),
        answer(layer, params, x, other),
    )


def each_alone(layer: Layer, params: Any, x: Any, ct: Any) -> dict[str, Any]:
    """What every example alone gives, stacked."""

    def alone(params: Params, x: PyTree, ct: Cotangent) -> dict[str, Any]:
        x, ct = jax.tree.map(lambda leaf: leaf[None], (x, ct))
        return answer(layer, of_one_example(params), x, ct)

    return jax.vmap(alone, (axes_of_examples(params), 0, 0))(params, x, ct)


def _by_examples(layer: Layer, params: Any, x: Any, ct: Any, key: chex.PRNGKey) -> dict[str, Any]:
    each = each_alone(layer, params, x, ct)
    return {
        "params": jax.tree.map(lambda d: d.sum(0), each["params"]),
        "x": jax.tree.map(lambda d: d[:, 0], each["x"]),
    }


def _by_jit(layer: Layer, params: Any, x: Any, ct: Any, key: chex.PRNGKey) -> dict[str, Any]:
    return answer(layer, params, x, ct)


def _by_scan(layer: Layer, params: Any, x: Any, ct: Any, key: chex.PRNGKey) -> dict[str, Any]:
    """Between two other steps, as in a repeated layer: residuals go through scan's stacking."""
    xs, cts = jax.tree.map(
        lambda leaf, noisy: jnp.stack([noisy, leaf, noisy]),
        (x, ct),
        with_noise(key, (x, ct), tenth),
    )

    def there(carry: None, x: Any) -> tuple[None, Any]:
        return carry, layer.forward(params, x)[1]

    def back(carry: None, step: tuple[Any, Any, Any]) -> tuple[None, Any]:
        return carry, backward_of(layer, params, *step)

    _, residuals = jax.lax.scan(there, None, xs)
    _, answers = jax.lax.scan(back, None, (xs, residuals, cts), reverse=True)
    return jax.tree.map(lambda leaf: leaf[1], answers)


ORACLES = {
    "jax.vjp of forward": _by_vjp,
    "linearity in ct": _by_linearity,
    "its examples one by one": _by_examples,
    "itself under jit": _by_jit,
    "itself under lax.scan": _by_scan,
}


def oracles_for(layer: Layer) -> dict[str, Any]:
    """All of them, but for a batch-coupled layer the one that takes its examples apart."""
    apart = _by_examples if layer.batch_coupled else None
    return {words: oracle for words, oracle in ORACLES.items() if oracle is not apart}


def in_form(layer: Layer, primals: dict[str, Any], cotangents: dict[str, Any]) -> dict[str, Any]:
    """The cotangents, held to the form of their primals; None for an integer, which has none."""

    def fit(path: Any, leaf: Array, d_leaf: Any) -> Any:
        if not is_floating(leaf):
            return None
        if not isinstance(d_leaf, Array | np.ndarray) or shapes(d_leaf) != shapes(leaf):
            name = d_name(path)
            raise AssertionError(
                f"{layer}: {name} is {shapes(d_leaf)}, but {name[2:]} is {shapes(leaf)}"
            )
        return d_leaf

    primals = {
        "params": with_cotangents(learned(primals["params"]), cotangents["params"]),
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


def d_name(path: Any) -> str:
    return f"d_{path[0].key}{keystr(path[1:])}"
