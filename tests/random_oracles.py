"""The right results for a random network, by autodiff, and how far others may be from them."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import oracles
from random_networks import Case

import jaxprop as jp
from jaxprop.core.arrays import rounded
from jaxprop.core.tree import learned, merged

BOUND = 0.3  # on the norm of a gradient
TIMES, ROUNDINGS = 3, 8  # allowed multiples of autodiff's error in the dtype, and of its eps
HOPELESS = 0.05  # an error of autodiff that leaves nothing to compare


def answers(case: Case, net: jp.Layer, names: tuple[str, ...], dropped: int | None = None) -> Any:
    """Return a jitted f(params, batch) that returns the quantities by their names.

    They come from the gradients of single examples or, if a key or the net itself couples
    examples, from the Jacobian of all losses. An integer weight counts copies of an example, and
    a divisor scales every mean.

    Args:
        case: the case.
        net: the network to differentiate: ``case.net`` or ``case.exact``.
        names: the quantities.
        dropped: an example whose loss and gradient are replaced by 0.
    """
    examples = len(case.x)
    weights = np.asarray(case.given.get("weights", np.ones(examples, int)))
    times = np.repeat(np.arange(examples), weights)
    scale = len(times) / case.given.get("divisor", len(times))
    kept = np.arange(examples) != dropped

    def of_mean(tree: Any) -> Any:
        return jax.tree.map(lambda leaf: leaf * scale, tree)

    @jax.jit
    def f(params: Any, batch: dict[str, Any]) -> dict[str, Any]:
        values, each = (on(kept, tree) for tree in losses_of(case, net, params, batch))
        own, copies = on(weights > 0, each), jax.tree.map(lambda g: g[times], each)
        moment = of_mean(oracles.second_moment.of(copies))
        grads = of_mean(jax.tree.map(lambda g: g.mean(0), copies))
        by_name = {
            "value": lambda: of_mean(values[times].mean()),
            "grads": lambda: grads,
            "each": lambda: own,
            "norms": lambda: oracles.per_example_sq_norms.of(own),
            "gram": lambda: oracles.gram.of(own),
            "moment": lambda: moment,
            "variance": lambda: jax.tree.map(lambda m, g: 2 * m - g**2, moment, grads),
            "noise": lambda: bounded(oracles.noise_scale.of(each, weights)),
            "clipped": lambda: of_mean(oracles.clipped.of(copies, BOUND)),
            "automatic": lambda: of_mean(automatic(copies)),
            "projected": lambda: oracles.per_example_sq_norms.of(own),
            "hvp": lambda: of_mean(hvp(case, net, params, batch, times)),
            "ggn": lambda: of_mean(ggn_product(case, net, params, batch, times)),
            "clipped by layer": lambda: of_mean(clipped_by_layer(case, net, params, batch, copies)),
            "diagonal": lambda: of_mean(
                oracles.diagonal(params, jax.tree.map(lambda b: b[times], blocks()))
            ),
            "root": lambda: on(weights > 0, blocks()),
        }
        by_name["in two passes"] = by_name["finite"] = by_name["clipped"]
        blocks = functools.cache(lambda: ggn_blocks(case, net, params, batch))
        return {name: by_name[name]() for name in names}

    return f


def of_each(case: Case, net: jp.Layer, params: Any, batch: dict[str, Any], f: Any) -> Any:
    """Return f(y, target), with one result per example, and its Jacobian by the learned params."""

    def of_batch(arrays: Any, batch: dict[str, Any]) -> Any:
        bound = net.bind(params, mask=batch.get("mask"), key=batch.get("key"))
        return f(net.forward(merged(bound, arrays), batch["x"])[0], batch["target"])

    def of_one(arrays: Any, one: dict[str, Any]) -> Any:
        return of_batch(arrays, jax.tree.map(lambda leaf: leaf[None], one))[0]

    def both(f: Any, arrays: Any, batch: Any) -> Any:
        return f(arrays, batch), jax.jacrev(f)(arrays, batch)

    batch = {name: batch[name] for name in ("x", "target", "mask", "key") if name in batch}
    if net.batch_coupled or "key" in batch:
        return wide(both(of_batch, learned(params), batch))
    return wide(jax.vmap(functools.partial(both, of_one), (None, 0))(learned(params), batch))


def losses_of(case: Case, net: jp.Layer, params: Any, batch: dict[str, Any]) -> Any:
    """Return the loss of each example, and its gradient."""
    return of_each(case, net, params, batch, lambda *of: case.loss.forward(*of)[0])


def hvp(case: Case, net: jp.Layer, params: Any, batch: dict[str, Any], times: Any) -> Any:
    """Return the Hessian of the mean loss of the examples in ``times``, applied to the params."""

    def mean(arrays: Any) -> Any:
        bound = net.bind(params, mask=batch.get("mask"), key=batch.get("key"))
        y = net.forward(merged(bound, arrays), batch["x"])[0]
        return wide(case.loss.forward(y, batch["target"])[0])[times].mean()

    arrays = learned(params)
    return jax.jvp(jax.grad(mean), (arrays,), (arrays,))[1]


def ggn_product(case: Case, net: jp.Layer, params: Any, batch: dict[str, Any], times: Any) -> Any:
    """Return the mean of J^T H J of the examples in ``times``, applied to the params."""
    jacobian, hessian = curvatures(case, net, params, batch)
    along = jax.tree.map(lambda j, p: j @ jnp.ravel(wide(p)), jacobian, learned(params))
    ends = jnp.einsum("nop,np->no", hessian, sum(jax.tree.leaves(along)))

    def product(j: Any, p: Any) -> Any:
        return jnp.einsum("noi,no->ni", j, ends)[times].mean(0).reshape(p.shape)

    return jax.tree.map(product, jacobian, learned(params))


def ggn_blocks(case: Case, net: jp.Layer, params: Any, batch: dict[str, Any]) -> Any:
    """Return J^T H J of each example and param, (N, P, P)."""
    jacobian, hessian = curvatures(case, net, params, batch)
    return jax.tree.map(lambda j: jnp.einsum("noi,nop,npj->nij", j, hessian, j), jacobian)


def curvatures(case: Case, net: jp.Layer, params: Any, batch: dict[str, Any]) -> Any:
    """Return J of each example and param, (N, O, P), and H of each example's loss, (N, O, O)."""

    def own(y: Any, target: Any) -> Any:
        return case.loss.forward(y[None], jax.tree.map(lambda t: t[None], target))[0][0]

    y, jacobian = of_each(case, net, params, batch, lambda y, _: y)
    size = y[0].size
    hessian = jax.vmap(jax.hessian(own))(y, wide(batch["target"])).reshape(len(y), size, size)
    return jax.tree.map(lambda j: j.reshape(len(y), size, -1), jacobian), hessian


def automatic(each: Any) -> Any:
    """Return the mean of the gradients, each weighted by the bound over its norm plus 0.01."""
    weights = BOUND / (jnp.sqrt(oracles.per_example_sq_norms.of(each)) + 0.01)
    return jax.tree.map(lambda g: jnp.tensordot(weights, g, 1) / len(weights), each)


def clipped_by_layer(case: Case, net: jp.Layer, params: Any, batch: Any, each: Any) -> Any:
    """Return the mean of the gradients, with each layer's part of each clipped separately."""
    walk = jp.walk(net, case.loss, lambda step: jnp.zeros(()))
    sides = {name: batch[name] for name in ("key", "mask") if name in batch}
    walk = functools.partial(walk, **sides)
    _, places, _ = jax.eval_shape(walk, params, batch["x"], batch["target"])

    def of_layer(place: Any, grads: Any) -> Any:
        """Return the mean of a layer's grads (N, *layers, ...); place is (*layers,) in a repeat."""
        axes = 1 + place.ndim
        squares = [jnp.sum(g**2, range(axes, g.ndim)) for g in jax.tree.leaves(grads)]
        norms = jnp.maximum(jnp.sqrt(sum(squares)), BOUND)

        def mean(g: Any) -> Any:
            return jnp.mean(g * (BOUND / jnp.expand_dims(norms, range(axes, g.ndim))), 0)

        return jax.tree.map(mean, grads)

    return jax.tree.map(of_layer, places, each)


def comparable(result: dict[str, Any]) -> dict[str, Any]:
    """Return the library's results in a form with one right answer and no cancellation."""

    def block(v: Any) -> Any:
        v = v.reshape(*v.shape[:2], -1).astype(jnp.float64)
        return jnp.einsum("cni,cnj->nij", v, v)

    result = dict(result)
    if "root" in result:
        result["root"] = jax.tree.map(block, learned(result["root"]))
    if "projected" in result:
        rows = jax.tree.leaves(wide(result["projected"]))
        squares = [jnp.sum(row**2, range(1, row.ndim)) for row in rows]
        result["projected"] = sum(squares)
    if "variance" in result:
        result["variance"] = jax.tree.map(jnp.add, result["moment"], result["variance"])
    if "noise" in result:
        result["noise"] = bounded(result["noise"])
    return result


def bounded(noise_scale: Any) -> Any:
    """Return n / (1 + |n|), which moves little where the estimate of |G|^2 is close to 0.

    If all gradients are 0, the noise scale is 0 / 0, and the result -1.
    """
    return jnp.nan_to_num(1 + noise_scale / (1 + abs(noise_scale)), nan=-1)


class Judge:
    """A comparison with the oracle: tight in float64, otherwise allowing about autodiff's error.

    A kink may be one rounding away, so autodiff's error is also taken with params and x moved by
    one rounding.
    """

    def __init__(self, narrowest: Any, exact: Any, same: Any) -> None:
        self.exact, self.same = exact, same
        self.precise = narrowest == jnp.float64
        self.eps = float(jnp.finfo(narrowest).eps)

    def __call__(self, got: dict[str, Any], params: Any, batch: dict[str, Any]) -> None:
        want = self.exact(wide(params), wide(batch))
        allowed = dict.fromkeys(want, 1e-9) if self.precise else self.allowed(want, params, batch)
        for name in want:
            far = error(got[name], want[name], self.precise)
            assert far <= allowed[name], f"{name}: error {far:.1e}, allowed {allowed[name]:.1e}"

    def allowed(self, want: dict[str, Any], params: Any, batch: dict[str, Any]) -> Any:
        """Return the largest errors that are allowed, by name.

        Where autodiff itself is hopelessly wrong, the result only has to be finite, and only if
        autodiff's is.
        """
        others = [self.same(params, batch)]
        for seed in range(3):
            moved, x = self.moved((params, batch["x"]), seed)
            others.append(self.same(moved, batch | {"x": x}))
        worst = {name: max(error(other[name], want[name]) for other in others) for name in want}
        finite = np.finfo(np.float64).max
        return {
            name: TIMES * far + ROUNDINGS * self.eps if far < HOPELESS else max(far, finite)
            for name, far in worst.items()
        }

    def moved(self, tree: Any, seed: int) -> Any:
        """Return the tree with each number moved up or down by one rounding."""
        rng = np.random.default_rng(seed)

        def of(leaf: Any) -> Any:
            if not jnp.issubdtype(leaf.dtype, jnp.floating):
                return leaf
            factor = 1 + self.eps * rng.choice([-1.0, 1.0], size=leaf.shape)
            return (leaf.astype(jnp.float64) * factor).astype(leaf.dtype)

        return jax.tree.map(of, tree)


def error(got: Any, want: Any, by_leaf: bool = False) -> float:
    """Return the largest error of a leaf, relative to the norm of the tree; inf for NaN.

    Args:
        got: the result.
        want: what is right.
        by_leaf: whether relative to the leaf's norm instead, except for tiny leaves.
    """
    got, want = learned(got), learned(want)
    assert jax.tree.structure(got) == jax.tree.structure(want)
    pairs = [
        [np.asarray(leaf, np.float64) for leaf in pair]
        for pair in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True)
    ]
    assert all(a.shape == b.shape for a, b in pairs), [(a.shape, b.shape) for a, b in pairs]
    tree = np.sqrt(sum(np.sum(b**2) for _, b in pairs))
    far = [
        np.linalg.norm(a - b)
        / (np.linalg.norm(b) + 1e-4 * tree + 1e-4 if by_leaf else tree + 1e-30)
        for a, b in pairs
    ]
    return float(np.nan_to_num(max(far, default=0.0), nan=np.inf))


def wide(tree: Any) -> Any:
    """Return the tree with its floating leaves in float64."""
    return rounded(tree, jnp.float64)


def on(examples: np.ndarray, tree: Any) -> Any:
    """Return the tree with zeros for all but these examples."""
    return jax.tree.map(
        lambda leaf: jnp.where(examples.reshape(-1, *[1] * (leaf.ndim - 1)), leaf, 0), tree
    )
