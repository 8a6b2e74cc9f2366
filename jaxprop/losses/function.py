"""A loss from any function."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.flatten_util import ravel_pytree
from jaxtyping import Float

from jaxprop.core.arrays import is_inexact, wide
from jaxprop.core.describe import shapes
from jaxprop.core.loss import Loss
from jaxprop.core.types import Cotangent, PyTree

Residuals = tuple[PyTree, PyTree]  # y in at least float32, and the target


class FunctionLoss(Loss):
    """The loss E = fn(y, t) for each example, with its derivatives by autodiff.

    Let H = V diag(l) V^T be the Hessian with respect to all of an example's C outputs. For a convex
    fn, l is not negative, and S = V diag(l)^(1/2) is a root of H. ``sample`` is S r for random
    signs r, since E r r^T is the identity. A Gauss-Newton matrix needs a convex loss: if an
    eigenvalue is negative by more than rounding, the example's root and sample are NaN.

    Attributes:
        fn: a function of one example's y and target that returns a scalar. The cotangent of a leaf
            of y that holds integers or bools is None.
    """

    fn: Callable[..., Array]

    def __repr__(self) -> str:
        return f"loss({getattr(self.fn, '__name__', self.fn)})"

    def forward(self, y: PyTree, target: PyTree) -> tuple[Float[Array, " n"], Residuals]:
        y = jax.tree.map(wide, y)
        return jax.vmap(self._value)(y, target), (y, target)

    def backward(self, residuals: Residuals) -> Cotangent:
        return jax.vmap(self._gradient)(*residuals)

    def hessian_root(self, residuals: Residuals) -> Cotangent:
        return jax.vmap(self._root, out_axes=1)(*residuals)

    def sample(self, key: Array, residuals: Residuals) -> Cotangent:
        root = self.hessian_root(residuals)
        columns, examples = jax.tree.leaves(root)[0].shape[:2]
        signs = jax.random.rademacher(key, (columns, examples))
        return jax.tree.map(
            lambda root: jnp.einsum("cn,cn...->n...", signs.astype(root.dtype), root), root
        )

    def _value(self, y: PyTree, target: PyTree) -> Array:
        """Return E of one example."""
        value: Any = self.fn(y) if target is None else self.fn(y, target)
        if getattr(value, "shape", None) != () or not jnp.issubdtype(value.dtype, jnp.floating):
            raise TypeError(
                f"{self}: the function of one example gives {shapes(value)}, not a floating scalar"
            )
        return value

    def _gradient(self, y: PyTree, target: PyTree) -> Cotangent:
        """Return the gradient of E of one example: like y, with None for integers."""
        moving, like_y = _moving(y)
        gradient = jax.grad(lambda moving: self._value(like_y(moving, y), target))(moving)
        return like_y(gradient)

    def _root(self, y: PyTree, target: PyTree) -> Cotangent:
        """Return the root of one example's Hessian: like y, with a leading axis of columns."""
        moving, like_y = _moving(y)
        flat, unflatten = ravel_pytree(moving)

        def value(flat: Array) -> Array:
            return self._value(like_y(unflatten(flat), y), target)

        hessian = jax.hessian(value)(flat)
        values, vectors = jnp.linalg.eigh(hessian)
        rounding = flat.size * jnp.finfo(flat.dtype).eps * jnp.abs(values).max()
        convex = values.min() >= -4 * rounding
        root = jnp.sqrt(jnp.where(convex, jnp.maximum(values, 0), jnp.nan))
        return jax.vmap(lambda column: like_y(unflatten(column)))((vectors * root[None]).T)


def _moving(y: PyTree) -> tuple[list[Array], Callable[..., PyTree]]:
    """Return the leaves of y that have a derivative, and ``like_y(moving, others=None)``.

    ``like_y`` returns a tree like y with these leaves. In place of integers and bools it has the
    leaves of others, another tree like y, or None.
    """
    leaves, structure = jax.tree.flatten(y)
    moves = list(map(is_inexact, leaves))

    def like_y(moving: list[Array], others: PyTree = None) -> PyTree:
        new = iter(moving)
        rest = [None] * len(leaves) if others is None else structure.flatten_up_to(others)
        return structure.unflatten(
            next(new) if here else other for here, other in zip(moves, rest, strict=True)
        )

    return list(itertools.compress(leaves, moves)), like_y


def loss(fn: Callable[..., Array]) -> FunctionLoss:
    """Return the loss whose value for an example is ``fn(y, target)``.

    Its derivatives come from autodiff: ``jax.grad`` for the cotangent, and for curvature the
    eigenvectors of ``jax.hessian`` with respect to an example's outputs, at a cost cubic in their
    number.

    The net and the loss are static to ``jax.jit``, and two functions count as the same only if they
    are one object. A new lambda for each call is compiled each time: define fn once.

    Args:
        fn: a function of y and target of *one* example, without the example axis, that returns a
            scalar; of y alone if there is no target. Both may be pytrees; y is in at least float32.

    Raises:
        TypeError: for an fn that is not callable, and in ``forward`` for one that does not return a
            floating scalar.

    Example:
        >>> import jax.numpy as jnp, jaxprop as jp
        >>> def huber(y, t):
        ...     return jnp.sum(jnp.sqrt(1 + (y - t) ** 2) - 1)
        >>> jp.check_loss(jp.loss(huber), jnp.eye(3), jnp.ones((3, 3)))
    """
    if isinstance(fn, Loss) or not callable(fn):
        raise TypeError(f"loss takes a function of one example's y and target, not {fn!r}")
    return FunctionLoss(fn)
