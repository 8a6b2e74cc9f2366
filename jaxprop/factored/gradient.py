"""From the cotangents that backward gives to a gradient, and to forms of every leaf."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jaxprop.factored.form import Factored, Stacked, is_factored
from jaxprop.layer import Step
from jaxprop.seats import bare, is_mask
from jaxprop.shapes import shard_map_axes


def summed(d_params: Any) -> Any:
    """d_params with every factored leaf multiplied out and summed."""
    return jax.tree.map(
        lambda leaf: leaf.sum() if isinstance(leaf, Factored) else leaf,
        d_params,
        is_leaf=is_factored,
    )


def gradient(params: Any, d_params: Any, scale: float = 1.0) -> Any:
    """The summed d_params over scale, held to the form of params: what autodiff would return.

    Raises ``TypeError`` for a param that is not floating and ``ValueError`` for a cotangent whose
    structure or shape is not its param's.
    """
    totals = summed(d_params)
    _hold(params, totals)
    if scale != 1:
        totals = jax.tree.map(lambda total: total / scale, totals)
    return jax.tree.map(like, params, totals)


def _hold(params: Any, totals: Any) -> None:
    """Raise unless totals has the structure and the shapes of params, which are floating."""

    def fit(path: Any, param: Array, d_param: Any) -> None:
        name = jax.tree_util.keystr(path)
        if not jnp.issubdtype(jnp.result_type(param), jnp.floating):
            raise TypeError(f"params{name} is {jnp.result_type(param)}: no gradient by it exists")
        shape = getattr(d_param, "shape", type(d_param).__name__)
        if shape != jnp.shape(param):
            raise ValueError(
                f"d_params{name} has shape {shape}, but params{name} has {jnp.shape(param)}"
            )

    try:
        jax.tree.map(lambda param, d_param: None, params, totals)
    except ValueError as error:
        raise ValueError(f"d_params has another structure than params: {error}") from None
    jax.tree.map_with_path(fit, params, totals)


def like(primal: Any, cotangent: Array) -> Array:
    """The cotangent in its primal's dtype and, under ``jax.shard_map``, where its primal is.

    There a param that is the same on all devices meets another share of the batch on each. Its
    cotangent is the sum over them, which is JAX's own rule for using the one beside the other.
    """
    if shard_map_axes():
        beside = jnp.zeros_like(cotangent)
        _, pull = jax.vjp(lambda primal: primal.astype(cotangent.dtype) + beside, primal)
        return pull(cotangent)[0]
    return cotangent.astype(jnp.result_type(primal))


def factored(step: Step) -> Any:
    """d_params with a ``Factored`` cotangent at every leaf.

    Where backward gave a plain array, that array has lost its examples; the layer's backward is
    then taken again, one example at a time. Raises ``ValueError`` for a batch-coupled layer, and
    what ``gradient`` raises.
    """
    if step.layer.batch_coupled:
        raise ValueError(
            f"{step.layer} couples the examples of a batch: an example has no gradient of its own, "
            "and no per-example quantity exists"
        )
    _hold(step.params, jax.eval_shape(summed, step.d_params))
    leaves = jax.tree.leaves(step.d_params, is_leaf=is_factored)
    if all(map(is_factored, leaves)):
        return step.d_params

    seat = bare(step.seat)
    axes = jax.tree.map(lambda leaf: 0 if is_mask(leaf) else None, seat)

    def alone(seat: Any, residuals: Any, ct: Any) -> Any:
        residuals, ct = jax.tree.map(lambda leaf: leaf[None], (residuals, ct))
        seat = jax.tree.map(lambda leaf: leaf[None] if is_mask(leaf) else leaf, seat)
        return summed(step.layer.backward(seat, residuals, ct)[0])

    each = jax.vmap(alone, (axes, 0, 0))(seat, step.residuals, step.ct)
    return jax.tree.map(
        lambda _, d, g: d if is_factored(d) else Stacked(g), step.params, step.d_params, each
    )
