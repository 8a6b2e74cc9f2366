"""The oracles: independent ways to compute the cotangents that ``backward`` should return.

All of them, and the layer's own cotangents under ``jit``, are one program, which XLA compiles much
faster than a program for each.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.tree_util import keystr

from jaxprop.checking.compare import d_name
from jaxprop.core.arrays import is_floating
from jaxprop.core.cotangents import summed
from jaxprop.core.describe import shapes
from jaxprop.core.forms import is_factored
from jaxprop.core.layer import Layer
from jaxprop.core.tree import (
    axes_of_examples,
    learned,
    learned_cotangents,
    of_one_example,
    without_unmarked,
)
from jaxprop.core.types import Cotangent, Params, PyTree, Residuals

Answer = dict[str, PyTree]
"""The cotangents of "params" and "x"."""

Pair = tuple[dict[str, Array], dict[str, Array]]
"""The results of a layer's forms, and the expected results, each by the name of the leaf."""


class Drawn(NamedTuple):
    """The random draws for the oracles of one direction.

    Attributes:
        other: another cotangent of y.
        noisy: x and ct with noise.
    """

    other: Cotangent
    noisy: tuple[PyTree, Cotangent]


class Expected(NamedTuple):
    """The results that the oracles expect of ``backward`` for one direction.

    Attributes:
        answers: each oracle's cotangents, by the name of the oracle.
        shares: each example's share of the factored leaves; None for a batch-coupled layer.
        squares: the second moments of the factored leaves; None for a batch-coupled layer.
    """

    answers: dict[str, Answer]
    shares: Pair | None
    squares: Pair | None


VJP = "jax.vjp of forward"
LINEARITY = "linearity in ct"
JIT = "itself under jit"
ONE_BY_ONE = "its examples one by one"
ORACLES = (
    VJP,
    LINEARITY,
    ONE_BY_ONE,
    JIT,
    "itself under lax.scan",
)


def by_oracles(layer: Layer, params: Params, x: PyTree, ct: Cotangent, drawn: Drawn) -> Expected:
    """Return the results of the oracles that apply to the layer."""
    y, pull = jax.vjp(lambda params, x: layer.forward(params, x)[0], params, x)
    del y
    d_params, d_x = pull(ct)
    _, residuals = layer.forward(params, x)
    forms, own = _cotangents(layer, params, x, residuals, ct)
    other_forms, of_other = _cotangents(layer, params, x, residuals, drawn.other)
    both = jax.tree.map(lambda a, b: 2 * a + b, ct, drawn.other)
    _, of_both = _cotangents(layer, params, x, residuals, both)
    of_params = without_unmarked(learned(d_params), learned_cotangents(params, forms))
    answers = {
        VJP: in_form(layer, params, x, of_params, d_x),
        LINEARITY: jax.tree.map(lambda a, b: (a - b) / 2, of_both, of_other),
        JIT: own,
        "itself under lax.scan": _by_scan(layer, params, x, ct, drawn),
    }
    if layer.batch_coupled:
        return Expected(answers, None, None)
    each = _each_alone(layer, params, x, ct)
    answers[ONE_BY_ONE] = {
        "params": jax.tree.map(lambda d: d.sum(0), each["params"]),
        "x": jax.tree.map(lambda d: d[:, 0], each["x"]),
    }
    return Expected(answers, *_of_forms(forms, other_forms, each["params"]))


def backward_of(
    layer: Layer, params: Params, x: PyTree, residuals: Residuals, ct: Cotangent
) -> Answer:
    """Return the layer's own cotangents, with forms summed.

    Raises:
        AssertionError: for cotangents that do not have the structure and shapes of their primals.
    """
    return _cotangents(layer, params, x, residuals, ct)[1]


def in_form(layer: Layer, params: Params, x: PyTree, d_params: Cotangent, d_x: Cotangent) -> Answer:
    """Return the cotangents, with None for integers.

    Raises:
        AssertionError: unless they have the structure, shapes and dtypes of their primals.
    """

    primals = {"params": without_unmarked(learned(params), d_params), "x": x}
    return fitted(layer, primals, {"params": d_params, "x": d_x})


def fitted(who: object, primals: Answer, cotangents: Answer) -> Answer:
    """Return the cotangents, with None for leaves that are not floating.

    Args:
        who: what is checked, for the message.
        primals: the primals, by name.
        cotangents: the cotangents, by the same names.

    Raises:
        AssertionError: unless they have the structure, shapes and dtypes of their primals.
    """

    def fit(path: tuple[Any, ...], leaf: Array, d_leaf: PyTree) -> PyTree:
        if not is_floating(leaf):
            return None
        if not isinstance(d_leaf, Array | np.ndarray) or shapes(d_leaf) != shapes(leaf):
            name = d_name(path)
            raise AssertionError(
                f"{who}: {name} is {shapes(d_leaf)}, but {name[2:]} is {shapes(leaf)}"
            )
        return d_leaf

    for name, primal in primals.items():
        try:
            jax.tree.map(lambda leaf, d_leaf: None, primal, cotangents[name])
        except ValueError:
            raise AssertionError(
                f"{who}: d_{name} is {shapes(cotangents[name])}, but {name} is {shapes(primal)}"
            ) from None
    return jax.tree.map_with_path(fit, primals, cotangents)


def _cotangents(
    layer: Layer, params: Params, x: PyTree, residuals: Residuals, ct: Cotangent
) -> tuple[Cotangent, Answer]:
    """Return d_params with its forms, and the cotangents with forms summed."""
    d_params, d_x = layer.backward(params, residuals, ct)
    d_params = learned_cotangents(params, d_params)
    return d_params, in_form(layer, params, x, summed(d_params), d_x)


def _each_alone(layer: Layer, params: Params, x: PyTree, ct: Cotangent) -> Answer:
    """Return the layer's cotangents for every example alone, stacked."""

    def alone(params: Params, x: PyTree, ct: Cotangent) -> Answer:
        x, ct = jax.tree.map(lambda leaf: leaf[None], (x, ct))
        params = of_one_example(params)
        _, residuals = layer.forward(params, x)
        return backward_of(layer, params, x, residuals, ct)

    return jax.vmap(alone, (axes_of_examples(params), 0, 0))(params, x, ct)


def _by_scan(layer: Layer, params: Params, x: PyTree, ct: Cotangent, drawn: Drawn) -> Answer:
    """Return the cotangents from the middle of a scan, with residuals stacked as in ``repeat``."""
    xs, cts = jax.tree.map(
        lambda leaf, noisy: jnp.stack([noisy, leaf, noisy]), (x, ct), drawn.noisy
    )

    def there(carry: None, x: PyTree) -> tuple[None, Residuals]:
        return carry, layer.forward(params, x)[1]

    def back(carry: None, step: tuple[PyTree, Residuals, Cotangent]) -> tuple[None, Answer]:
        return carry, backward_of(layer, params, *step)

    _, residuals = jax.lax.scan(there, None, xs)
    _, answers = jax.lax.scan(back, None, (xs, residuals, cts), reverse=True)
    return jax.tree.map(lambda leaf: leaf[1], answers)


def _of_forms(forms: Cotangent, other_forms: Cotangent, each: Params) -> tuple[Pair, Pair]:
    """Return the examples' shares and the second moments, by the layer's forms and as expected.

    The form of ct computes the second moment from the squares of the form of another ct.
    """
    shares: Pair = ({}, {})
    squares: Pair = ({}, {})
    named, others = (
        jax.tree.leaves_with_path(tree, is_leaf=is_factored) for tree in (forms, other_forms)
    )
    for (path, form), (_, other), share in zip(named, others, jax.tree.leaves(each), strict=True):
        if is_factored(form):
            name = f"params{keystr(path)}"
            shares[0][name], shares[1][name] = form.per_example(), share
            squares[0][name] = form.of_squares(other.squares())
            squares[1][name] = other.second_moment()
    return shares, squares
