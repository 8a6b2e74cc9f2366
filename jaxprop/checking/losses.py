"""``check_loss``: a loss's hand-written ``backward`` and curvature against autodiff."""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxprop.checking.points import float64
from jaxprop.core.checks import require
from jaxprop.core.loss import Loss
from jaxprop.core.types import PyTree

ORACLES = {
    "forward": "each example alone",
    "backward": "jax.grad",
    "hessian_root": "jax.hessian",
}
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
        values = jax.eval_shape(loss.forward, y, target)[0]
        if values.shape != y.shape[:1]:
            raise AssertionError(
                f"{loss}: values have shape {values.shape}, but there are {len(y)} examples"
            )
        found = _found(loss, y, target, jax.random.key(seed))
    for name in ORACLES:
        if name in found.pairs:
            got, expected = map(np.asarray, found.pairs[name])
            _compare(loss, name, got, expected, rtol)
    for name, (error, allowed) in sorted(found.draws.items(), reverse=True):  # the mean first
        if not np.all(np.asarray(error) <= np.asarray(allowed)):
            right = "0" if name == "mean" else "the Hessian"
            raise AssertionError(
                f"{loss}: the {name} of sample is off by {np.max(error):.3g}, where it should be "
                f"{right}"
            )


class Found(NamedTuple):
    """What a loss gives, and what it should give.

    Attributes:
        pairs: what ``forward`` and so on give, and what the oracle does, by name.
        draws: how far the moments of ``sample`` are off, and how far chance may take them.
    """

    pairs: dict[str, tuple[Array, Array]]
    draws: dict[str, tuple[Array, Array]]


@functools.partial(jax.jit, static_argnums=0)
def _found(loss: Loss, y: Array, target: PyTree, key: Array) -> Found:
    """Return all of it from one program, which XLA compiles faster than each by itself."""

    def own(y: Array, target: PyTree) -> Array:
        one = jax.tree.map(lambda leaf: leaf[None], target)
        return loss.forward(y[None], one)[0][0]

    examples, size = len(y), y[0].size
    values, residuals = loss.forward(y, target)
    hessian = jax.vmap(jax.hessian(own))(y, target).reshape(examples, size, size)
    pairs = {
        "forward": (values, jax.vmap(own)(y, target)),
        "backward": (loss.backward(residuals), jax.vmap(jax.grad(own))(y, target)),
    }
    if _has(loss, "hessian_root", "hessian_column"):
        root = loss.hessian_root(residuals)
        root = root.reshape(len(root), examples, size)
        pairs["hessian_root"] = jnp.einsum("cni,cnj->nij", root, root), hessian
    draws = {}
    if _has(loss, "sample"):
        keys = jax.random.split(key, DRAWS)
        drawn = jax.vmap(loss.sample, (0, None))(keys, residuals).reshape(DRAWS, examples, size)
        draws["mean"] = _off(drawn, jnp.zeros(()))
        draws["covariance"] = _off(jnp.einsum("kni,knj->knij", drawn, drawn), hessian)
    return Found(pairs, draws)


def _has(loss: Loss, *names: str) -> bool:
    return any(getattr(type(loss), name) is not getattr(Loss, name) for name in names)


def _off(draws: Array, expected: Array) -> tuple[Array, Array]:
    """Return how far the mean of the draws is off, and how far chance may take it."""
    rare = 12 / DRAWS * jnp.max(jnp.abs(draws))  # what is too rare to have been drawn
    return jnp.abs(draws.mean(0) - expected), 6 * draws.std(0) / np.sqrt(DRAWS) + rare


def _compare(loss: Loss, name: str, got: np.ndarray, expected: np.ndarray, rtol: float) -> None:
    oracle = ORACLES[name]
    if got.shape != expected.shape:
        raise AssertionError(f"{loss}: {name} has shape {got.shape}, and {oracle} {expected.shape}")
    difference = np.abs(got - expected)
    allowed = rtol * max(np.max(np.abs(expected), initial=0), 1e-300)
    wrong = np.argwhere(~(difference <= allowed))
    if len(wrong):
        at = tuple(int(i) for i in wrong[0])
        raise AssertionError(
            f"{loss}: {name} disagrees with {oracle}: at {list(at)} it gives {got[at]}, and "
            f"{oracle} {expected[at]}"
        )
