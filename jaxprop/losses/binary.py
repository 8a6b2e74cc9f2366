"""The cross-entropy of binary targets."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float

from jaxprop.core.arrays import wide
from jaxprop.core.loss import Loss
from jaxprop.core.types import PyTree
from jaxprop.losses.arguments import (
    Y,
    check_arrays,
    check_plain_number,
    check_target,
    check_weights,
    counted,
    in_pair,
    only,
    outputs,
    positions,
    times,
)

Residuals = tuple[Y, Y, Y, Bool[Array, "n ..."] | tuple[()]]


class BinaryCrossEntropy(Loss):
    """Binary cross-entropy of logits y and targets t, a mean over an example's M outputs.

    E = (1 - t) log(1 + exp(y)) + t log(1 + exp(-y)). This is -t log s - (1 - t) log(1 - s) with
    s = sigmoid(y), without its overflow and without cancellation. The derivative of log(1 + exp(y))
    is s, and sigmoid(-y) is 1 - s, so dE/dy = ((1 - t) s - t (1 - s)) / M = (s - t) / M. The
    Hessian is diagonal, s (1 - s) / M: the variance of a target that is 1 with probability s, over
    M.

    With a weight a of the positive class and weights w of the outputs, w a t replaces t and
    w (1 - t) replaces 1 - t, and the mean is over sum_j w_j instead of M.

    y is (N, ...), floating. target has the same shape, with values in [0, 1] of any real dtype or
    bool. It may be a pair (target, weights), with weights of any real dtype in the shape of y. For
    an output with weight 0, neither y nor the target is looked at; an example with only such
    outputs has value 0. In a traced program a target outside [0, 1] or a negative weight makes the
    loss and the cotangent NaN.

    Attributes:
        positive_weight: a, not negative.

    Raises:
        TypeError: for y that is not floating, and a target that is not a real or a bool array.
        ValueError: for a target or weights of another shape than y, and where their values are
            known (outside of ``jax.jit``) for a target outside [0, 1] and a weight that is negative
            or not finite.
    """

    positive_weight: float = 1.0

    def __post_init__(self) -> None:
        check_plain_number("BinaryCrossEntropy: positive_weight", self.positive_weight)

    def forward(self, y: Y, target: PyTree) -> tuple[Float[Array, " n"], Residuals]:
        target, weights = in_pair(self, target)
        check_arrays(self, y, target, jnp.floating, jnp.integer, jnp.bool_)
        check_weights(self, weights, y.shape)
        words = f"{self} takes a target in [0, 1]"
        check_target(words, target, weights, lambda t: (t >= 0) & (t <= 1))
        logits = wide(y)
        t = target.astype(logits.dtype)
        t = jnp.where((t >= 0) & (t <= 1), t, jnp.nan)
        yes, no, real = t, 1 - t, ()
        if self.positive_weight != 1:
            yes = float(self.positive_weight) * t
        if weights is not None:
            weights = counted(weights, logits.dtype)
            total = weights.sum(axis=positions(y), keepdims=True)
            share = weights * (outputs(y) / jnp.where(total == 0, 1, total))
            yes, no, real = times(share, yes), times(share, no), weights != 0
        each = times(no, jax.nn.softplus(logits)) + times(yes, jax.nn.softplus(-logits))
        return jnp.sum(each, axis=positions(y)) / outputs(y), (logits, yes, no, real)

    def backward(self, residuals: Residuals) -> Y:
        logits, yes, no, real = residuals
        ct = (no * jax.nn.sigmoid(logits) - yes * jax.nn.sigmoid(-logits)) / outputs(logits)
        return ct if isinstance(real, tuple) else jnp.where(real, ct, 0)

    def real(self, residuals: Residuals) -> Bool[Array, "n ..."] | None:
        """Return False at positions whose outputs all have weight 0."""
        real = residuals[-1]
        if isinstance(real, tuple):
            return None
        return real.any(axis=-1) if real.ndim > 1 else real

    def hessian_columns(self, residuals: Residuals) -> int:
        return outputs(residuals[0])

    def hessian_column(self, residuals: Residuals, c: int | Array) -> Y:
        logits = residuals[0]
        variance = jax.nn.sigmoid(logits) * jax.nn.sigmoid(-logits)
        return only(c, self._weighted(residuals, jnp.sqrt(variance / outputs(logits))))

    def sample(self, key: Array, residuals: Residuals) -> Y:
        s = jax.nn.sigmoid(residuals[0])
        drawn = jax.random.bernoulli(key, s)
        error = jnp.where(drawn, -jax.nn.sigmoid(-residuals[0]), s)
        return self._weighted(residuals, error / math.sqrt(outputs(s)))

    def _weighted(self, residuals: Residuals, root: Y) -> Y:
        """Return ``root``, for a target of weight 1, times the root of the target's weight."""
        _, yes, no, real = residuals
        if self.positive_weight == 1 and isinstance(real, tuple):
            return root
        return times(jnp.sqrt(yes + no), root)
