"""Dropout."""

from __future__ import annotations

from typing import Any

import chex
import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float

from jaxprop.layer import Layer
from jaxprop.shapes import shapes


class Dropout(Layer):
    """y = x m / (1 - rate), m = 1 with probability 1 - rate, else 0: so d_x = ct m / (1 - rate).

    The mean of y is x (Srivastava et al. 2014, https://jmlr.org/papers/v15/srivastava14a.html).
    Randomness is an input: with params ``()`` y is x, and with a key in their place, put there for
    each step by ``net.given(params, key=key)``, x is dropped out. There is nothing to learn.

    x is floating, (N, ...). Raises ``ValueError`` for a rate outside [0, 1).
    """

    rate: float

    def __post_init__(self) -> None:
        if not 0 <= self.rate < 1:
            raise ValueError(f"Dropout takes a rate in [0, 1), not {self.rate!r}")

    def check_params(self, params: Any, x: Any) -> None:
        dtype = getattr(params, "dtype", bool)
        if not _absent(params) and not jnp.issubdtype(dtype, jax.dtypes.prng_key):
            raise ValueError(
                f"{self} takes params () or a key of jax.random.key, not {shapes(params)}"
            )

    def forward(self, params: Any, x: Float[Array, "n ..."]) -> tuple[Float[Array, "n ..."], Any]:
        if _absent(params):
            return x, ()
        kept = jax.random.bernoulli(params, 1 - self.rate, x.shape)
        return self._scaled(kept, x), kept

    def backward(
        self, params: Any, kept: Bool[Array, "n ..."] | tuple[()], ct: Float[Array, "n ..."]
    ) -> tuple[tuple[()], Float[Array, "n ..."]]:
        return (), ct if isinstance(kept, tuple) else self._scaled(kept, ct)

    def given(self, params: Any, *, key: chex.PRNGKey | None = None, mask: Any = None) -> Any:
        return params if key is None else key

    def _scaled(self, kept: Bool[Array, "n ..."], x: Float[Array, "n ..."]) -> Array:
        return jnp.where(kept, x / (1 - self.rate), 0)


def _absent(params: Any) -> bool:
    return isinstance(params, tuple) and params == ()
