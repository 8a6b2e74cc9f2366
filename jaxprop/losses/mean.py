"""The mean of a net's output, for a net that ends in its own loss."""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from jaxprop.core.arrays import wide
from jaxprop.core.describe import shapes
from jaxprop.core.loss import Loss
from jaxprop.losses.arguments import Y, outputs, positions


class Mean(Loss):
    """The mean of an example's M outputs, E = 1/M sum_j y_j, so dE/dy_j = 1/M.

    It takes no target, and is for a net whose output is a loss already, such as
    ``jp.LinearCrossEntropy``. The Hessian is 0, and so is the Gauss-Newton matrix: curvature needs
    a net without its loss, and is refused here.

    y is (N, ...), floating.

    Raises:
        TypeError: for y that is not a floating array, and for a target.
    """

    def forward(self, y: Y, target: None) -> tuple[Float[Array, " n"], Y]:
        if not jnp.issubdtype(getattr(y, "dtype", object), jnp.floating):
            raise TypeError(f"{self} takes floating y, not {shapes(y)}")
        if target is not None:
            raise TypeError(f"{self} takes no target, and was given {shapes(target)}")
        return wide(y).sum(axis=positions(y)) / outputs(y), wide(y)

    def backward(self, residuals: Y) -> Y:
        return jnp.full_like(residuals, 1 / outputs(residuals))

    def hessian_columns(self, residuals: Y) -> int:
        raise NotImplementedError(
            f"{self} is linear in y, so that its Gauss-Newton matrix is 0; for curvature leave the "
            "loss out of the net"
        )
