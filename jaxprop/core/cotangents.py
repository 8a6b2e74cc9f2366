"""The gradient, and a form for every param, from the cotangents that ``backward`` returns."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array

from jaxprop.core.arrays import is_one, scalar_of, wide
from jaxprop.core.describe import shapes
from jaxprop.core.forms import Factored, Stacked, is_factored
from jaxprop.core.mesh import like
from jaxprop.core.residuals import check_residuals, residual_axes
from jaxprop.core.step import Step
from jaxprop.core.tree import axes_of_examples, learned_cotangents, of_one_example
from jaxprop.core.types import Cotangent, Params, PyTree


def summed(d_params: Cotangent) -> Cotangent:
    """Return d_params with every form multiplied out and summed."""
    return jax.tree.map(
        lambda leaf: leaf.sum() if isinstance(leaf, Factored) else leaf,
        d_params,
        is_leaf=is_factored,
    )


def gradient(step: Step, scale: float | Array = 1.0) -> Params:
    """Return the gradient of the step's learned params, as autodiff would.

    Args:
        step: a layer's step.
        scale: the number that the sums are divided by.

    Returns:
        A tree like the layer's params, in their dtypes, with ``()`` where nothing is learned.

    Raises:
        TypeError: for a learned param that is not floating.
        ValueError: for a cotangent whose structure or shape differs from its param's.
    """
    totals = summed(step.d_params)
    params = held(step, totals)
    if not is_one(scale):
        totals = jax.tree.map(lambda total: wide(total) / scalar_of(scale, wide(total)), totals)
    return jax.tree.map(like, params, totals)


def scaled_up(ct: Cotangent, scale: float | Array) -> Cotangent:
    """Return the cotangent that a walk starts from, times the loss scale."""
    if is_one(scale):
        return ct
    return jax.tree.map(lambda ct: wide(ct) * scalar_of(scale, wide(ct)), ct)


def factored(step: Step) -> Cotangent:
    """Return the step's d_params with a form for every learned param.

    A plain array from ``backward`` is already summed over the examples. The layer's ``backward`` is
    then run again, for each example alone.

    Raises:
        ValueError: for a layer that couples the examples of a batch, and where ``gradient`` does.
        TypeError: where ``gradient`` does.
    """
    if step.layer.batch_coupled:
        raise ValueError(
            f"{step.layer} couples the examples of a batch: an example has no gradient of its own, "
            "and no per-example quantity exists; jp.value_and_grad has the gradient of the batch"
        )
    params = held(step, jax.eval_shape(summed, step.d_params))
    _check_examples(step)
    leaves = jax.tree.leaves(step.d_params, is_leaf=is_factored)
    if all(map(is_factored, leaves)):
        return step.d_params
    return jax.tree.map(
        lambda _, d, g: d if is_factored(d) else Stacked(g), params, step.d_params, _each(step)
    )


def _each(step: Step) -> Cotangent:
    """Return d_params for each example alone, stacked on a leading example axis."""
    axes = residual_axes(step.residuals)
    check_residuals(step.layer, step.residuals, jax.tree.leaves(step.ct)[0].shape[0])

    def alone(params: Params, residuals: PyTree, ct: PyTree) -> Cotangent:
        params = of_one_example(params)
        residuals = jax.tree.map(jnp.expand_dims, residuals, axes)
        ct = jax.tree.map(lambda leaf: leaf[None], ct)
        d_params, _ = step.layer.backward(params, residuals, ct)
        return summed(learned_cotangents(params, d_params))

    each = jax.vmap(alone, (axes_of_examples(step.params), axes, 0))
    return each(step.params, step.residuals, step.ct)


def _check_examples(step: Step) -> None:
    """Raise ``ValueError`` for a form with a factor that lacks the examples on its example axis."""
    forms = jax.tree.leaves_with_path(step.d_params, is_leaf=is_factored)
    if not forms:
        return
    examples = jax.tree.leaves(step.ct)[0].shape[0]
    for path, form in forms:
        for factor, axis in form.factors() if is_factored(form) else ():
            if factor.shape[axis : axis + 1] != (examples,):
                raise ValueError(
                    f"{step.layer}: d_params{jax.tree_util.keystr(path)} is {shapes(form)}, but "
                    f"axis {axis} of each factor is the example, of which there are {examples}"
                )


def held(step: Step, totals: Cotangent) -> Params:
    """Return the step's learned params, after a check that totals are their cotangents.

    Args:
        step: a layer's step.
        totals: its d_params, summed, or structs of these sums.
    """
    params = step.learned
    if jax.tree.structure(params) != jax.tree.structure(totals):
        raise ValueError(
            f"{step.layer}: d_params does not have the structure of params: {shapes(totals)}, for "
            f"{shapes(params)}"
        )
    names = jax.tree.leaves_with_path(params)
    for (path, param), d_param in zip(names, jax.tree.leaves(totals), strict=True):
        name = jax.tree_util.keystr(path)
        if not jnp.issubdtype(jnp.result_type(param), jnp.floating):
            raise TypeError(
                f"{step.layer}: params{name} is {jnp.result_type(param)}, which has no "
                "gradient; an array that is not learned is marked in init, by jp.Unlearned(array)"
            )
        if jnp.shape(d_param) != jnp.shape(param):
            raise ValueError(
                f"{step.layer}: d_params{name} has shape {jnp.shape(d_param)}, but params{name} "
                f"has {jnp.shape(param)}"
            )
    return params
