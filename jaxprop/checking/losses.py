"""``check_loss``: a loss's hand-written ``backward`` and curvature against autodiff."""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.flatten_util import ravel_pytree
from jax.tree_util import keystr
from jaxtyping import Float

from jaxprop.checking.points import float64
from jaxprop.core.checks import require
from jaxprop.core.describe import shapes
from jaxprop.core.loss import Loss
from jaxprop.core.types import PyTree

ORACLES = {
    "forward": "each example alone",
    "backward": "jax.grad",
    "hessian_root": "jax.hessian",
}
DRAWS = 4096  # samples that the covariance is estimated from


def check_loss(
    loss: Loss, y: PyTree, target: PyTree = None, *, rtol: float = 1e-10, seed: int = 0
) -> None:
    """Check a loss against autodiff; raise ``AssertionError`` where they disagree.

    In float64, ``forward`` must return one value per example, the same as for that example alone.
    ``backward`` must be the gradient of each example's own value by ``jax.grad``. If the loss
    defines them, ``hessian_root`` must return an S with S S^T = ``jax.hessian``, and ``sample``
    must have mean 0 and that Hessian as its covariance, within six standard errors of 4096 draws.

    Args:
        loss: the loss.
        y: an output of the net, (N, ...), floating, or a pytree of such arrays. It should have few
            outputs, since the full Hessian is computed.
        target: targets for it, with the example on axis 0; left out for a loss that takes none.
        rtol: the largest relative error allowed.
        seed: the seed of the draws.

    Raises:
        AssertionError: where something disagrees.
        TypeError: for an argument that is not a loss.

    Example:
        >>> import jax.numpy as jnp, jaxprop as jp
        >>> jp.check_loss(jp.CrossEntropy(), jnp.eye(3), jnp.array([0, 2, 1]))
    """
    require(loss, Loss, "check_loss: loss")
    with jax.enable_x64(True):
        y, target = float64("y", y), float64("target", target)
        values, examples = jax.eval_shape(loss.forward, y, target)[0], len(jax.tree.leaves(y)[0])
        if values.shape != (examples,):
            raise AssertionError(
                f"{loss}: values have shape {values.shape}, but there are {examples} examples"
            )
        found = _found(loss, y, target, jax.random.key(seed))
    for name in ORACLES:
        if name in found.pairs:
            got, expected = jax.device_get(found.pairs[name])
            _compare(loss, name, got, expected, rtol)
    for name, (error, allowed) in sorted(found.draws.items(), reverse=True):  # the mean first
        if not np.all(np.asarray(error) <= np.asarray(allowed)):
            right = "0" if name == "mean" else "the Hessian"
            raise AssertionError(
                f"{loss}: the {name} of sample is off by {np.max(error):.3g}, where it should be "
                f"{right}"
            )


class Found(NamedTuple):
    """The results of a loss, with the expected ones.

    Attributes:
        pairs: by the name of a method, such as "forward", its result and the oracle's.
        draws: by the name of a moment of ``sample``, its error and the error that chance allows.
    """

    pairs: dict[str, tuple[PyTree, PyTree]]
    draws: dict[str, tuple[Array, Array]]


@functools.partial(jax.jit, static_argnums=0)
def _found(loss: Loss, y: PyTree, target: PyTree, key: Array) -> Found:
    """Return all results from one program, which XLA compiles faster than one for each."""
    _, unflatten = ravel_pytree(jax.tree.map(lambda leaf: leaf[0], y))

    def own(y: PyTree, target: PyTree) -> Array:
        return loss.forward(*jax.tree.map(lambda leaf: leaf[None], (y, target)))[0][0]

    def own_of_flat(y: Array, target: PyTree) -> Array:
        return own(unflatten(y), target)

    values, residuals = loss.forward(y, target)
    hessian = jax.vmap(jax.hessian(own_of_flat))(_flat(y), target)
    pairs = {
        "forward": (values, jax.vmap(own)(y, target)),
        "backward": (loss.backward(residuals), jax.vmap(jax.grad(own))(y, target)),
    }
    if _has(loss, "hessian_root", "hessian_column"):
        root = jax.vmap(_flat)(loss.hessian_root(residuals))
        pairs["hessian_root"] = jnp.einsum("cni,cnj->nij", root, root), hessian
    draws = {}
    if _has(loss, "sample"):
        keys = jax.random.split(key, DRAWS)
        drawn = jax.vmap(lambda key: _flat(loss.sample(key, residuals)))(keys)
        draws["mean"] = _off(drawn, jnp.zeros(()))
        draws["covariance"] = _off(jnp.einsum("kni,knj->knij", drawn, drawn), hessian)
    return Found(pairs, draws)


def _flat(y: PyTree) -> Float[Array, "n m"]:
    """Return all outputs of each example, flattened into one row."""
    return jax.vmap(lambda y: ravel_pytree(y)[0])(y)


def _has(loss: Loss, *names: str) -> bool:
    return any(getattr(type(loss), name) is not getattr(Loss, name) for name in names)


def _off(draws: Array, expected: Array) -> tuple[Array, Array]:
    """Return the error of the mean of the draws, and the error that chance allows."""
    rare = 12 / DRAWS * jnp.max(jnp.abs(draws))  # for values too rare to have been drawn
    return jnp.abs(draws.mean(0) - expected), 6 * draws.std(0) / np.sqrt(DRAWS) + rare


def _compare(loss: Loss, name: str, got: PyTree, expected: PyTree, rtol: float) -> None:
    oracle = ORACLES[name]
    if shapes(got) != shapes(expected):
        raise AssertionError(f"{loss}: {name} is {shapes(got)}, and {oracle} {shapes(expected)}")
    largest = max(np.max(np.abs(leaf), initial=0) for leaf in jax.tree.leaves(expected))
    pairs = zip(jax.tree.leaves_with_path(got), jax.tree.leaves(expected), strict=True)
    for (path, leaf), want in pairs:
        wrong = np.argwhere(~(np.abs(leaf - want) <= rtol * max(largest, 1e-300)))
        if len(wrong):
            at = tuple(int(i) for i in wrong[0])
            raise AssertionError(
                f"{loss}: {name}{keystr(path)} disagrees with {oracle}: at {list(at)} it gives "
                f"{leaf[at]}, and {oracle} {want[at]}"
            )
