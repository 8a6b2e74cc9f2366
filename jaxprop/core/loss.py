"""The contract of a loss: a value for each example, and the cotangent that starts the walk."""

from __future__ import annotations

import abc
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float

from jaxprop.core.arrays import is_inexact
from jaxprop.core.describe import is_array, shapes
from jaxprop.core.static import Static
from jaxprop.core.types import Cotangent, PyTree, Residuals


class Loss(Static):
    """A differentiable function (y, target) -> one value for each example.

    The scalar loss is the mean over examples. The 1/N enters where the mean is taken, not here:
    ``backward`` returns the cotangent of y for each example's *own* loss.

    Subclass it and write ``forward`` and ``backward``; for curvature also ``hessian_root`` (or
    ``hessian_columns`` and ``hessian_column``) and ``sample``.
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        forward = vars(cls).get("forward")
        if forward is not None and not getattr(forward, "__isabstractmethod__", False):
            cls.forward = _held_to_values(forward)

    @abc.abstractmethod
    def forward(self, y: PyTree, target: PyTree, /) -> tuple[Float[Array, " n"], Residuals]:
        """Return ``(values, residuals)``, one value for each example."""

    @abc.abstractmethod
    def backward(self, residuals: Residuals, /) -> Cotangent:
        """Return the cotangent of y, for each example's own loss."""

    def real(self, residuals: Residuals, /) -> Bool[Array, "n ..."] | None:
        """Return an array that is False where a target marks an example, or a position, as padding.

        The default is None: all are real.
        """
        return None

    def hessian_root(self, residuals: Residuals, /) -> Cotangent:
        """Return S such that sum_c S_c S_c^T is the Hessian in y of each example's own loss.

        S is like y, with a leading axis of columns. Column c is a cotangent of y, so that a walk
        back from it returns a column of J^T S: the root of the generalised Gauss-Newton matrix
        (Schraudolph 2002, https://doi.org/10.1162/08997660260028683).
        """
        return jax.vmap(self.hessian_column, (None, 0))(
            residuals, jnp.arange(self.hessian_columns(residuals))
        )

    def hessian_columns(self, residuals: Residuals, /) -> int:
        """Return how many columns ``hessian_root`` has."""
        if type(self).hessian_root is Loss.hessian_root:
            raise NotImplementedError(f"{self} has no hessian_root")
        root = jax.eval_shape(self.hessian_root, residuals)
        return jax.tree.leaves(root)[0].shape[0]

    def hessian_column(self, residuals: Residuals, c: int | Array, /) -> Cotangent:
        """Return column c of ``hessian_root``; if c is traced, only that column is computed."""
        return jax.tree.map(lambda root: root[c], self.hessian_root(residuals))

    def sample(self, key: Array, residuals: Residuals, /) -> Cotangent:
        """Return a random cotangent s of y such that E s = 0 and E s s^T is the Hessian in y.

        It is the gradient at a target drawn from the model's own distribution. Its covariance is
        the Fisher information (Martens 2020, https://jmlr.org/papers/v21/17-678.html).
        """
        raise NotImplementedError(f"{self} has no sample")


def check_cotangent(loss: Loss, ct: Cotangent, y: PyTree) -> None:
    """Raise ``ValueError`` unless a loss's cotangent of y has the structure and shapes of y.

    The cotangent of a leaf of integers or bools may be None.
    """
    of_y, of_ct = (jax.tree.map(jnp.shape, tree) for tree in (y, ct))
    moving = jax.tree.map(lambda leaf: leaf.shape if is_inexact(leaf) else None, y)
    if of_ct not in (of_y, moving):
        raise ValueError(
            f"{loss} gives {shapes(ct)} for the cotangent of the net's output, which is {shapes(y)}"
        )


def _held_to_values(forward: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(forward)
    def held(self: Loss, y: PyTree, target: PyTree) -> tuple[Array, Residuals]:
        result = forward(self, y, target)
        values: Any = result[0] if isinstance(result, tuple) and len(result) == 2 else None
        if not is_array(values) or not jnp.issubdtype(values.dtype, jnp.floating):
            raise TypeError(
                f"{self}: forward returns {shapes(result)}, not (values, residuals) with a "
                "floating value for each example"
            )
        return result

    return held
