"""``check_loss``: a loss's hand-written ``backward`` and curvature against autodiff."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxprop.checking.points import float64
from jaxprop.core.checks import require
from jaxprop.core.loss import Loss
from jaxprop.core.types import PyTree

DRAWS = 4096  # samples that the covariance is estimated from


def check_loss(loss: Loss, y: Array, target: PyTree, *, rtol: float = 1e-10, seed: int = 0) -> None:
    """Hold a loss against autodiff, and raise ``AssertionError`` where it disagrees.

    In float64, ``forward`` must give one value an example, that of the example alone. ``backward``
    must be the gradient of each example's own value by ``jax.grad``. Where the loss has them, S of
    ``hessian_root`` must give S S^T = ``jax.hessian``, and ``sample`` must have mean 0 and that
    Hessian for its covariance, within six standard errors of 4096 draws.

    Args:
        loss: the loss.
        y: an output of the net, (N, ...), floating, with few outputs: the Hessian is formed.
        target: targets for it, with the example on axis 0.
        rtol: the largest relative error allowed.
        seed: of the draws.

    Raises:
        AssertionError: where something disagrees.
        TypeError: for what is not a loss.

    Example:
        >>> import jax.numpy as jnp, jaxprop as jp
        >>> jp.check_loss(jp.CrossEntropy(), jnp.eye(3), jnp.array([0, 2, 1]))
    """
    require(loss, Loss, "check_loss: loss")
    with jax.enable_x64(True):
        y, target = float64("y", y), float64("target", target)
        values, residuals = loss.forward(y, target)
        if values.shape != y.shape[:1]:
            raise AssertionError(
                f"{loss}: values have shape {values.shape}, but there are {len(y)} examples"
            )

        def own(y: Array, target: PyTree) -> Array:
            one = jax.tree.map(lambda leaf: leaf[None], target)
            return loss.forward(y[None], one)[0][0]

        _compare(loss, "forward", values, jax.vmap(own)(y, target), "each example alone", rtol)
        ct = loss.backward(residuals)
        _compare(loss, "backward", ct, jax.vmap(jax.grad(own))(y, target), "jax.grad", rtol)
        size = y[0].size
        hessian = jax.vmap(jax.hessian(own))(y, target).reshape(len(y), size, size)
        if _has(loss, "hessian_root", "hessian_column"):
            root = loss.hessian_root(residuals)
            root = root.reshape(len(root), len(y), size)
            product = jnp.einsum("cni,cnj->nij", root, root)
            _compare(loss, "hessian_root", product, hessian, "jax.hessian", rtol)
        if _has(loss, "sample"):
            keys = jax.random.split(jax.random.key(seed), DRAWS)
            draws = jax.vmap(loss.sample, (0, None))(keys, residuals).reshape(DRAWS, len(y), size)
            _check_draws(loss, np.asarray(draws), np.asarray(hessian))


def _has(loss: Loss, *names: str) -> bool:
    return any(getattr(type(loss), name) is not getattr(Loss, name) for name in names)


def _compare(loss: Loss, name: str, got: Array, expected: Array, oracle: str, rtol: float) -> None:
    if got.shape != expected.shape:
        raise AssertionError(f"{loss}: {name} has shape {got.shape}, and {oracle} {expected.shape}")
    difference = np.abs(np.asarray(got - expected))
    allowed = rtol * max(float(jnp.max(jnp.abs(expected), initial=0)), 1e-300)
    if not difference.max(initial=0) <= allowed:
        at = np.unravel_index(np.nanargmax(np.where(difference == 0, -1, difference)), got.shape)
        where = [int(i) for i in at]
        raise AssertionError(
            f"{loss}: {name} disagrees with {oracle}: at {where} it gives {got[at]}, and "
            f"{oracle} {expected[at]}"
        )


def _check_draws(loss: Loss, draws: np.ndarray, hessian: np.ndarray) -> None:
    products = np.einsum("kni,knj->knij", draws, draws)
    for name, each, expected in (("mean", draws, 0), ("covariance", products, hessian)):
        error = np.abs(each.mean(0) - expected)
        rare = 12 / len(draws) * np.max(np.abs(each), initial=0)  # what may not have been drawn
        if not np.all(error <= 6 * each.std(0) / np.sqrt(len(draws)) + rare):
            raise AssertionError(
                f"{loss}: the {name} of sample is off by {error.max():.3g}, "
                f"where it should be {'0' if name == 'mean' else 'the Hessian'}"
            )
