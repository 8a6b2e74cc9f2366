"""``jp.check_layer``: a layer's cotangents compared with those of each oracle."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np
from jax import Array
from jax.tree_util import keystr

from jaxprop.checking.compare import compare
from jaxprop.checking.differences import differences_of
from jaxprop.checking.oracles import (
    LINEARITY,
    ONE_BY_ONE,
    ORACLES,
    VJP,
    Answer,
    Drawn,
    backward_of,
    by_oracles,
)
from jaxprop.checking.points import float64, normal, with_noise
from jaxprop.core.arrays import angle, is_floating
from jaxprop.core.checks import check_number, require
from jaxprop.core.child import layers_within
from jaxprop.core.combinator import Combinator
from jaxprop.core.coupling import coupled, couples
from jaxprop.core.describe import shapes
from jaxprop.core.layer import Layer
from jaxprop.core.tree import Mask, is_not_learned
from jaxprop.core.types import Params, PyTree, Residuals

DIRECTIONS = 3
OF_CT = "the sum of squares (of_squares looks at the form's own ct)"


def check_layer(
    layer: Layer, x: PyTree, params: Params = None, *, seed: int = 0, rtol: float = 1e-12
) -> Angles | None:
    """Check ``layer.backward`` against ``layer.forward`` in float64; raise if they disagree.

    y and residuals must be arrays with the example on axis 0. For several random cotangents ct of
    y, every leaf of d_params and d_x must

    - have the structure, shape and dtype of its primal,
    - equal ``jax.vjp`` of ``forward``,
    - be linear in ct,
    - be the sum of the cotangents for each example alone; for d_x, their stack,
    - if it is a form, return as each example's share the cotangent for that example alone,
    - if it is a form, return the second moment from another form's ``squares`` (``of_squares`` must
      not use the form's own ct),
    - be the same under ``jax.jit``,
    - be the same in a ``jax.lax.scan``, with the residuals stacked between forward and backward,
    - agree with central differences of ``forward`` in a random direction near the point.

    A layer whose rule is not the derivative (``jp.rules``) is not compared with ``jax.vjp`` or with
    central differences. If the rule is not linear in ct, linearity and the two conditions on forms
    are not checked either.

    A ``batch_coupled`` layer is not checked on single examples, and a param that ``forward`` holds
    constant by ``jax.lax.stop_gradient`` is not compared with differences.

    Args:
        layer: the layer.
        x: an input of at least one example, on axis 0. Floats are converted to float64.
        params: the params to check at. By default those of ``init`` with noise added, so that no
            zero or one there hides an error.
        seed: the seed of init, noise and directions.
        rtol: the largest difference allowed in a leaf, relative to the leaf's largest element; for
            d_x, to the example's. It does not grow with the size of the array. Central differences
            are allowed 1e-6.

    Returns:
        None; for a layer whose rule is not the derivative, the ``Angles`` between its cotangents
        and the derivative.

    Raises:
        AssertionError: for the first disagreement. The message names the layer, the leaf
            (``d_params.w``), the index of the worst element, both values and the relative error.
        TypeError: for a layer, x or params that cannot be checked, such as complex numbers.
        ValueError: if neither params nor x hold floats, and for x without an example.

    Example:
        >>> import jax.numpy as jnp, jaxprop as jp
        >>> jp.check_layer(jp.Dense(3), jnp.ones((4, 2)))
    """
    require(layer, Layer, "check_layer: layer")
    check_number("check_layer: rtol", rtol)
    with jax.enable_x64(True):
        rng = np.random.default_rng(seed)
        x = float64("x", x)
        if params is None:
            params = float64("params", jax.jit(layer.init)(jax.random.key(seed), x))
            params = with_noise(rng, params, 0.1)
        params = float64("params", params)
        if not any(leaf.size and is_floating(leaf) for leaf in jax.tree.leaves((params, x))):
            raise ValueError(f"{layer}: nothing to check, neither params nor x hold floats")
        if not all(leaf.ndim and len(leaf) for leaf in jax.tree.leaves(x)):
            raise ValueError(f"check_layer takes x of at least one example, not {shapes(x)}")
        y, residuals = layer.forward(params, x)
        examples = len(jax.tree.leaves(x)[0])
        _check_forward(layer, y, residuals, examples)
        _check_of_more(layer, params, x, examples + 1)
        expected_of = jax.jit(functools.partial(by_oracles, layer))
        differences = differences_of(layer, expected_of)
        is_derivative = all(each.is_derivative for each in layers_within(layer))
        is_linear = all(each.is_linear for each in layers_within(layer))
        left_out = (*[VJP] * (not is_derivative), *[LINEARITY] * (not is_linear))
        oracles = [words for words in ORACLES if words not in left_out]
        angles: list[Angles] = []
        for _ in range(DIRECTIONS):
            ct, other = normal(rng, y), normal(rng, y)
            drawn = Drawn(other, with_noise(rng, (x, ct), 0.1))
            got = backward_of(layer, params, x, residuals, ct)
            expected = expected_of(params, x, ct, drawn)
            if not is_derivative:
                angles.append(Angles.between(got, expected.answers[VJP]))
            for words in oracles:
                if words in expected.answers:
                    try:
                        compare(layer, got, expected.answers[words], words, rtol, ct)
                    except AssertionError as error:
                        if words == ONE_BY_ONE and couples(layer, params, x):
                            raise AssertionError(f"{error}. {coupled(layer)}") from None
                        raise
            if is_linear and expected.shares is not None and expected.squares is not None:
                (shares, alone), (squares, moments) = expected.shares, expected.squares
                compare(layer, shares, alone, "each example alone", rtol, ct, by_example=True)
                compare(layer, squares, moments, OF_CT, rtol, other)
            if is_derivative:
                differences(rng, params, x, ct, drawn)
        return Angles.mean(angles) if angles else None


class Angles(NamedTuple):
    """The angles between a layer's cotangents and the derivative, in degrees.

    0 where they agree, 90 where they have nothing in common, NaN where one of them is 0 or absent.

    Attributes:
        d_params: the angle for all params together.
        d_x: the angle for x.
    """

    d_params: float
    d_x: float

    @classmethod
    def between(cls, got: Answer, expected: Answer) -> Angles:
        """Return the angles between two answers."""
        return cls(*(float(angle(got[name], expected[name])) for name in ("params", "x")))

    @classmethod
    def mean(cls, angles: Sequence[Angles]) -> Angles:
        """Return the means of several angles."""
        return cls(*(float(np.mean(each)) for each in zip(*angles, strict=True)))


def _check_of_more(layer: Layer, params: Params, x: PyTree, examples: int) -> None:
    """Check the shapes for a larger batch too: a residual's first axis may be N by chance."""
    if any(isinstance(node, Mask) for node in jax.tree.leaves(params, is_leaf=is_not_learned)):
        return
    more = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct((examples, *leaf.shape[1:]), leaf.dtype), x
    )
    y, residuals = jax.eval_shape(layer.forward, params, more)
    _check_forward(layer, y, residuals, examples)


def _check_forward(layer: Layer, y: PyTree, residuals: Residuals, examples: int) -> None:
    """Raise unless y and residuals are arrays with the example on axis 0."""
    for name, tree in (("y", y), ("residuals", residuals)):
        for path, leaf in jax.tree.leaves_with_path(tree):
            at = f"{layer}: {name}{keystr(path)}"
            if not isinstance(leaf, Array | jax.ShapeDtypeStruct):
                raise AssertionError(
                    f"{at} is the {type(leaf).__name__} {leaf!r}, which would not survive jit or "
                    "scan; a fact that is known beforehand is a field of the layer"
                )
            # The residuals of a combinator may have other leading axes, such as one of layers, and
            # those of a function are whatever jax.vjp saves, params included.
            inner = name == "residuals" and (
                isinstance(layer, Combinator) or layer.hands_down_types
            )
            if not inner and leaf.shape[:1] != (examples,):
                raise AssertionError(
                    f"{at} has shape {leaf.shape}, but axis 0 is the example and x has {examples}"
                )
            if name == "y" and not is_floating(leaf):
                raise AssertionError(f"{at} is {leaf.dtype}, which has no cotangent")
