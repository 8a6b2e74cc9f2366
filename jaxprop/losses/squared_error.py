"""The squared error."""

from __future__ import annotations

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
    check_weights,
    counted,
    in_pair,
    only,
    outputs,
    positions,
)

Residuals = tuple[Y, Y | tuple[()]]  # the error, and the weights if there are any


class HalfSquaredError(Loss):
    """Half the squared error, E = 1/2 sum_j (y_j - t_j)^2 for each example, so dE/dy_j = y_j - t_j.

    The Hessian is the identity. ``sample`` draws the target from a normal distribution with mean y
    and unit variance. With weights it is E = 1/2 sum_j w_j (y_j - t_j)^2, whose derivative is
    w_j (y_j - t_j) and whose Hessian is diag(w).

    y and target are both (N, ...), floating. All axes except the first are summed over. The target
    may be a pair (target, weights), with weights of any real dtype in the shape of y. For an output
    with weight 0, neither y nor the target is looked at. In a traced program a negative weight
    makes the loss and the cotangent NaN.

    Raises:
        TypeError: for y or a target that is not a floating array.
        ValueError: for a target or weights of another shape than y, and for weights that are known
            to be negative or not finite.
    """

    def forward(self, y: Y, target: PyTree) -> tuple[Float[Array, " n"], Residuals]:
        target, weights = in_pair(self, target)
        check_arrays(self, y, target, jnp.floating)
        check_weights(self, weights, y.shape)
        predicted = wide(y)
        error = predicted - target.astype(predicted.dtype)
        if weights is None:
            return 0.5 * jnp.sum(error**2, axis=positions(error)), (error, ())
        weights = counted(weights, error.dtype)
        error = jnp.where(weights == 0, 0, error)
        return 0.5 * jnp.sum(weights * error**2, axis=positions(error)), (error, weights)

    def backward(self, residuals: Residuals) -> Y:
        error, weights = residuals
        return error if isinstance(weights, tuple) else weights * error

    def real(self, residuals: Residuals) -> Bool[Array, "n ..."] | None:
        """Return False at positions whose outputs all have weight 0."""
        _, weights = residuals
        if isinstance(weights, tuple):
            return None
        return (weights != 0).any(axis=-1) if weights.ndim > 1 else weights != 0

    def hessian_columns(self, residuals: Residuals) -> int:
        return outputs(residuals[0])

    def hessian_column(self, residuals: Residuals, c: int | Array) -> Y:
        return only(c, self._root(residuals))

    def sample(self, key: Array, residuals: Residuals) -> Y:
        error, weights = residuals
        drawn = jax.random.normal(key, error.shape, error.dtype)
        return drawn if isinstance(weights, tuple) else self._root(residuals) * drawn

    def _root(self, residuals: Residuals) -> Y:
        """Return the diagonal of the Hessian's root."""
        error, weights = residuals
        return jnp.ones_like(error) if isinstance(weights, tuple) else jnp.sqrt(weights)
