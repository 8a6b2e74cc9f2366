"""Oracles for ``jp.function``: the function itself, differentiated by JAX alone."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import oracles

import jaxprop as jp
from jaxprop.core.tree import learned

TOLERANCE = 1e-10
NEVER = r"(?!)"
NOTHING = 1e-12  # what rounding leaves of a gradient that is 0


class Untapped(jp.Layer):
    """The function as a layer for the oracles, which call only its forward."""

    fn: Any

    def check_params(self, params, x):
        pass

    def forward(self, params, x):
        y = self.fn(params, x)
        return (y[None] if getattr(y, "shape", None) == () else y), ()

    def backward(self, params, residuals, ct):
        raise AssertionError("an oracle is of autodiff")


@jax.custom_jvp
def squashed(x):
    return jnp.tanh(x)


@squashed.defjvp
def _(primals, tangents):
    y = jnp.tanh(*primals)
    return y, tangents[0] * (1 - y**2)


def drawn(shapes: Any, seed: int = 0, dtype: Any = np.float64) -> Any:
    """Return normal numbers for floating leaves, of a size that keeps activations near 1."""
    rng = np.random.default_rng(seed)

    def of(leaf):
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            return leaf
        size = 1 / np.sqrt(max(np.prod(leaf.shape[:-1]), 1)) if len(leaf.shape) > 1 else 0.3
        offset = 1.0 if len(leaf.shape) == 1 else 0.0  # scales of norms, not near 0
        return jnp.asarray((rng.normal(size=leaf.shape) + offset) * size, dtype)

    return jax.tree.map(of, shapes)


def normal(*shape: int, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape))


def integers(most: int, *shape: int, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).integers(0, most, shape))


def own_shares(net: jp.Layer, params: Any, x: Any) -> dict[str, tuple[int, ...]]:
    """Return the params of rank two or more that have each example's own share."""
    covered = net.coverage(params, x).params
    return {each.param: each.shape for each in covered if each.owned and len(each.shape) > 1}


def hold_coverage(net: jp.Layer, params: Any, x: Any, *, owned: str = NEVER) -> None:
    """Assert that of the params of rank two or more, only those of these names have own shares."""
    without_need = [n for n in own_shares(net, params, x) if not re.search(owned, n)]
    assert without_need == [], net.coverage(params, x)


def hold(
    fn: Any,
    params: Any,
    x: Any,
    target: Any = None,
    loss: Any = None,
    *,
    owned: str = NEVER,
    zero: str = NEVER,
    moments: bool = False,
    diagonal: bool = False,
    tolerance: float = TOLERANCE,
    nothing: float = NOTHING,
) -> None:
    """Assert that the function has the quantities of vmap(grad), and the expected coverage.

    Args:
        fn: the function.
        params: its params, in float64.
        x: a batch.
        target: for the loss.
        loss: by default the squared error, or ``jp.Mean()`` without a target.
        owned: a regular expression: params of rank two or more that have an own share.
        zero: a regular expression: params whose gradient is 0 for all examples.
        moments: whether to ask for the variance and the noise scale too.
        diagonal: whether to ask for the diagonal of the Gauss-Newton matrix too.
        tolerance: the largest relative error of a leaf.
        nothing: what rounding leaves of a gradient that is 0.
    """
    loss = loss or (jp.Mean() if target is None else jp.HalfSquaredError())
    net = jp.function(fn)
    hold_coverage(net, params, x, owned=owned)
    got, want = jax.jit(lambda *args: both(fn, loss, moments, diagonal, *args))(params, x, target)
    hold_leaves(got, want, zero=zero, tolerance=tolerance, nothing=nothing)


def hold_curvature(net: jp.Layer, loss: jp.Loss, params: Any, x: Any, target: Any) -> None:
    """Assert that EKFAC has the trace of the Gauss-Newton matrix, and that solving undoes it."""
    curvature = jp.curvature.ekfac_factors(net, loss, others="diagonal")(params, x, target)
    diagonal = jp.diag_ggn(net, loss)(params, x, target)
    blocks = jax.tree.leaves(learned(curvature), is_leaf=jp.curvature.is_block)
    values = [getattr(block, "values", block).sum() for block in blocks]
    totals = [leaf.sum() for leaf in jax.tree.leaves(learned(diagonal))]
    largest = max(map(abs, totals))
    for value, total in zip(values, totals, strict=True):
        assert abs(value - total) <= TOLERANCE * largest
    tree = drawn(params, seed=3)
    solved = jp.curvature.solve(curvature, tree, 0.1 * largest)
    again = jp.curvature.times(curvature, solved)
    leaves = zip(*map(jax.tree.leaves, map(learned, (again, solved, tree))), strict=True)
    for product, half, want in leaves:
        assert jnp.abs(product + 0.1 * largest * half - want).max() <= 1e-8


def both(
    fn: Any, loss: Any, moments: bool, diagonal: bool, params: Any, x: Any, target: Any
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the quantities, computed in one walk, and those of the oracles."""
    plain = Untapped(fn)
    each = oracles.per_example_grads(plain, loss)(params, x, target)
    norms = oracles.per_example_sq_norms.of(each)
    bound = jnp.maximum(jnp.median(jnp.sqrt(norms)) * 0.9, 1e-6)
    want = {
        "value": jp.loss_fn(plain, loss)(params, x, target),
        "grads": jax.tree.map(lambda g: g.mean(0), each),
        "each": each,
        "norms": norms,
        "clipped": oracles.clipped.of(each, bound),
        "moment": oracles.second_moment.of(each),
        "gram": oracles.gram.of(each),
    }
    asked: dict[str, jp.Quantity] = {
        "grads": jp.Gradient(),
        "each": jp.PerExampleGrads(),
        "norms": jp.SqNorms(),
        "clipped": jp.Clipped(bound),
        "moment": jp.SecondMoment(),
        "gram": jp.Gram(),
    }
    if moments:
        asked |= {"variance": jp.Variance(), "noise": jp.NoiseScale()}
        want |= {"variance": oracles.variance.of(each), "noise": oracles.noise_scale.of(each)}
    if diagonal:
        asked |= {"diagonal": jp.DiagGGN(), "diagonals": jp.DiagGGN(per_example=True)}
        blocks = oracles.ggn_blocks(plain, loss)(params, x, target)
        want |= {"diagonal": oracles.diagonal(params, blocks)}
        want |= {"diagonals": oracles.diagonals(params, blocks)}
    got = jp.quantities(jp.function(fn), loss, **asked)(params, x, target)
    if moments:  # a difference of moments: its error is relative to those
        for side in (got, want):
            side["variance"] = jax.tree.map(jnp.add, learned(side["variance"]), want["moment"])
    return {name: learned(got[name]) for name in want}, want


def hold_leaves(
    got: Any,
    want: Any,
    *,
    zero: str = NEVER,
    tolerance: float = TOLERANCE,
    nothing: float = NOTHING,
) -> None:
    """Assert that leaves are equal, relative to the largest entry of each.

    Args:
        got: a tree.
        want: what is right.
        zero: a regular expression for the paths of leaves that are 0 except for rounding.
        tolerance: the largest error, relative to the largest entry.
        nothing: the largest number that counts as 0.
    """
    got, want = learned(got), learned(want)
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for (path, a), b in zip(jax.tree.leaves_with_path(got), jax.tree.leaves(want), strict=True):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        assert a.shape == b.shape, name
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        largest = np.max(np.abs(b), initial=0)
        if re.search(zero, name):
            assert largest <= nothing, f"{name} is not 0: {largest}"
            assert np.max(np.abs(a), initial=0) <= nothing, name
            continue
        assert largest > nothing, f"{name} is 0"
        error = np.max(np.abs(a - b), initial=0) / largest
        assert error <= tolerance, f"{name}: relative error {error:.1e}"
