"""The factors of the derivative for one entry of a param, from any form of its cotangent."""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.core import Tracer

from jaxprop.core.describe import is_array
from jaxprop.core.forms import Factored, Joint, Moves, Outer, Rearranged, Repeated, Stacked, Sum
from jaxprop.core.forms.rearranged import moved_back
from jaxprop.core.types import Cotangent
from jaxprop.layers.embedding import Rows
from jaxprop.layers.patches import Patches

Index = tuple[int, ...]


class Product(NamedTuple):
    """The chain rule for one weight and one example.

    Attributes:
        factors: the factors by name, "x" and "ct"; only "ct" for a bias, and only "share" where the
            layer has multiplied them, as for the scale of a ``LayerNorm``. In a layer with
            positions (a sequence, an image) each is an array over positions, and for a weight with
            several uses over the positions of all of them. For a look-up, x is 1 at the positions
            with the id of the row, and 0 elsewhere. Empty for a form without named factors.
        product: the product of the factors, summed over positions.
    """

    factors: dict[str, Array]
    product: Array


def product_of(form: Factored, ct: Cotangent, example: int, index: Index) -> Product:
    """Return the chain rule for one entry of a param.

    Args:
        form: the form of the param's cotangent.
        ct: the cotangent of the layer's output.
        example: the number of the example.
        index: the index of the entry, not negative.
    """
    alone = _of_example(form, example)
    factors = _factors(alone, index)
    if isinstance(form, Sum) and _are_others(form.ct, ct):
        factors = {"share": factors["ct"]}
    return Product(factors, alone.per_example()[0][index])


def _are_others(shares: Array, ct: Cotangent) -> bool:
    """Return whether shares of the same shape as ct are known to differ from it."""
    if not is_array(ct) or ct.shape != shares.shape or isinstance(shares, Tracer):
        return False
    return not np.array_equal(shares, ct)


def _of_example(form: Factored, example: int) -> Factored:
    """Return the form of a batch of this one example."""
    factors = [jnp.take(factor, jnp.array([example]), axis) for factor, axis in form.factors()]
    return jax.tree.unflatten(jax.tree.structure(form), factors)


def _factors(form: Factored, index: Index) -> dict[str, Array]:
    """Return the factors of an entry, in the form of one example."""
    match form:
        case Outer(x, ct):
            return {"x": x[0][..., index[0]], "ct": ct[0][..., index[1]]}
        case Sum(ct):
            return {"ct": ct[0][..., index[-1]]}
        case Rows(ids, ct):
            return {"x": (ids[0] == index[0]).astype(ct.dtype), "ct": ct[0][..., index[1]]}
        case Patches():
            return _of_patches(form, index)
        case Repeated(each):
            return _factors(jax.tree.map(lambda factor: factor[index[0]], each), index[1:])
        case Rearranged(before, moves):
            there = _before(before, moves, index)
            if there is not None:
                return _factors(before, there)
            none = jnp.zeros(0, jax.tree.leaves(before)[-1].dtype)  # that entry met no data
            return {"x": none, "ct": none}
        case Joint(uses):
            return _together([_use(use, index) for use in uses])
        case _:
            return {}


def _of_patches(form: Patches, index: Index) -> dict[str, Array]:
    """Return what one tap of the window reads of one channel as x, and ct, over all positions."""
    *tap, channel, feature = index
    channels, features = form.x.shape[-1] // form.groups, form.ct.shape[-1] // form.groups
    taps = form.windows.shifted(form.x)
    at = int(np.ravel_multi_index(tap, form.windows.window))
    channel += feature // features * channels
    return {"x": taps[at][0][..., channel], "ct": form.ct[0][..., feature]}


def _use(form: Factored, index: Index) -> dict[str, Array]:
    """Return x and ct of one of several uses; x is 1 where the param itself is added to y."""
    factors = _factors(form, index)
    if isinstance(form, Stacked):
        factors = {"ct": form.g[0][index]}
    if set(factors) == {"ct"}:
        return {"x": jnp.ones_like(factors["ct"]), **factors}
    return factors


def _together(uses: list[dict[str, Array]]) -> dict[str, Array]:
    """Return the factors of all uses, one after the other."""
    if not all(uses):
        return {}
    return {name: jnp.concatenate([use[name].ravel() for use in uses]) for name in ("x", "ct")}


def _before(form: Factored, moves: Moves, index: Index) -> Index | None:
    """Return the index of an entry where it met the data; None for an entry that did not."""
    shape = jax.eval_shape(form.per_example).shape[1:]
    with jax.ensure_compile_time_eval():
        numbers = jnp.arange(1, math.prod(shape) + 1, dtype=jnp.int32).reshape(shape)
        at = int(moved_back(moves, numbers)[index])
    return tuple(map(int, np.unravel_index(at - 1, shape))) if at else None
