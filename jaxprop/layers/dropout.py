"""Dropout."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float

from jaxprop.core.checks import check_flags, check_share, check_x
from jaxprop.core.layer import Layer
from jaxprop.core.tree import Key
from jaxprop.core.types import Params, PyTree

Kept = Bool[Array, "n ..."] | tuple[()]


class Dropout(Layer):
    """Dropout, y = x m / (1 - rate) where m is 1 with probability 1 - rate, else 0.

    d_x = ct m / (1 - rate), and the mean of y is x (Srivastava et al. 2014,
    https://jmlr.org/papers/v15/srivastava14a.html).

    There is nothing to learn, and randomness is an input. With params ``()``, y is x. Entries are
    dropped in a step for which ``net.bind(params, key=key)`` puts a ``jp.Key`` in place of ``()``.

    x is (N, ...), floating, and y is like x.

    Args:
        rate: the probability of dropping an entry, in [0, 1).
        training: whether to take a key and drop entries; ``jp.inference_mode`` makes it False.

    Raises:
        TypeError: for a rate that is not a number, a training that is not a bool, and for x that is
            not floating.
        ValueError: for a rate outside [0, 1), and for x without an example axis.
    """

    rate: float
    training: bool = True

    @property
    def takes(self) -> type[Key] | None:  # pyright: ignore[reportIncompatibleVariableOverride]
        return Key if self.training and self.rate > 0 else None

    def __post_init__(self) -> None:
        check_share("Dropout: rate", self.rate)
        check_flags(self, "training")

    def init(self, key: Array, x: PyTree) -> tuple[()]:
        check_x(self, x, "N, ...")
        return ()

    def forward(
        self, params: Params, x: Float[Array, "n ..."]
    ) -> tuple[Float[Array, "n ..."], Kept]:
        if not isinstance(params, Key):
            return x, ()
        kept = jax.random.bernoulli(params.value, 1 - self.rate, x.shape)
        return self._scaled(kept, x), kept

    def backward(
        self, params: Params, kept: Kept, ct: Float[Array, "n ..."]
    ) -> tuple[tuple[()], Float[Array, "n ..."]]:
        return (), ct if isinstance(kept, tuple) else self._scaled(kept, ct)

    def _scaled(
        self, kept: Bool[Array, "n ..."], x: Float[Array, "n ..."]
    ) -> Float[Array, "n ..."]:
        return jnp.where(kept, x / (1 - float(self.rate)), 0)
