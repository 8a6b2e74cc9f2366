"""Factored cotangents: a parameter's cotangent kept as its factors until somebody asks for its sum.

The chain rule's last product for y = x w is dE/dw = sum_n x_n (outer) ct_n. Multiplied out, the
examples are gone. Kept as the pair (x, ct), it still answers for each example, for squared
norms, for curvature, at the price of what is asked and no more.
"""

from __future__ import annotations

import abc
import dataclasses
from typing import Any, dataclass_transform

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float


@dataclass_transform(frozen_default=True)
class Factored(abc.ABC):
    """The cotangent of one parameter, not yet summed over examples (axis 0 of every factor)."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        jax.tree_util.register_dataclass(dataclasses.dataclass(frozen=True)(cls))

    @abc.abstractmethod
    def sum(self) -> Array:
        """The parameter's cotangent, summed over examples and positions: what autodiff returns."""


class Outer(Factored):
    """sum over n and positions t of x[n, t] (outer) ct[n, t], of shape (I, O)."""

    x: Float[Array, "n ... i"]
    ct: Float[Array, "n ... o"]

    def sum(self) -> Float[Array, "i o"]:
        summed = tuple(range(self.x.ndim - 1))
        return jnp.tensordot(self.x, self.ct, axes=(summed, summed))


class Sum(Factored):
    """sum over n and positions t of ct[n, t], of shape (O,)."""

    ct: Float[Array, "n ... o"]

    def sum(self) -> Float[Array, " o"]:
        return self.ct.sum(axis=tuple(range(self.ct.ndim - 1)))


def summed(d_params: Any) -> Any:
    """d_params with every factored leaf multiplied out and summed."""
    return jax.tree.map(
        lambda leaf: leaf.sum() if isinstance(leaf, Factored) else leaf,
        d_params,
        is_leaf=lambda leaf: isinstance(leaf, Factored),
    )


def gradient(params: Any, d_params: Any) -> Any:
    """The summed d_params in the dtypes of params."""
    return jax.tree.map(lambda p, d: d.astype(p.dtype), params, summed(d_params))
