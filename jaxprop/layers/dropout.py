"""Dropout."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float

from jaxprop.core.layer import Layer
from jaxprop.core.tree import Key


class Dropout(Layer):
    """y = x m / (1 - rate), m = 1 with probability 1 - rate, else 0: so d_x = ct m / (1 - rate).

    The mean of y is x (Srivastava et al. 2014, https://jmlr.org/papers/v15/srivastava14a.html).
    Randomness is an input: with params ``()`` y is x, and with a ``jp.Key`` in their place, put
    there for each step by ``net.bind(params, key=key)``, x is dropped out. There is nothing to
    learn.

    x is floating, (N, ...). Raises ``ValueError`` for a rate outside [0, 1).

    Args:
        rate: the share of entries that is dropped.
    """

    rate: float
    takes = Key

    def __post_init__(self) -> None:
        if not 0 <= self.rate < 1:
            raise ValueError(f"Dropout takes a rate in [0, 1), not {self.rate!r}")

    def forward(self, params: Any, x: Float[Array, "n ..."]) -> tuple[Float[Array, "n ..."], Any]:
        if not isinstance(params, Key):
            return x, ()
        kept = jax.random.bernoulli(params.value, 1 - self.rate, x.shape)
        return self._scaled(kept, x), kept

    def backward(
        self, params: Any, kept: Bool[Array, "n ..."] | tuple[()], ct: Float[Array, "n ..."]
    ) -> tuple[tuple[()], Float[Array, "n ..."]]:
        return (), ct if isinstance(kept, tuple) else self._scaled(kept, ct)

    def _scaled(self, kept: Bool[Array, "n ..."], x: Float[Array, "n ..."]) -> Array:
        return jnp.where(kept, x / (1 - self.rate), 0)
