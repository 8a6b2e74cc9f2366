"""K-FAC: natural gradient descent by Kronecker factors, as an optax optimizer."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.sharding import Mesh
from jax.typing import ArrayLike
from jaxtyping import Float, Int

from jaxprop.core.arrays import added, wide
from jaxprop.core.batch import Batch, weighted_batch
from jaxprop.core.checks import (
    check_count,
    check_flag,
    check_number,
    check_share,
    given as described,
    require,
)
from jaxprop.core.describe import shapes
from jaxprop.core.layer import Layer
from jaxprop.core.loss import Loss
from jaxprop.core.mesh import shard_map_axes
from jaxprop.core.serialization import serializable
from jaxprop.core.tree import learned, like_params, merged
from jaxprop.core.types import Params, PyTree
from jaxprop.core.walk import check_net_and_loss, loss_fn
from jaxprop.curvature.algebra import eigh, solve
from jaxprop.curvature.products import quadratic_form
from jaxprop.quantity.curvature import KroneckerFactors
from jaxprop.quantity.together import alone
from jaxprop.training.apply import LossOfStep
from jaxprop.training.shares import in_shares

LEAST, TINY = 1e-8, 1e-30  # the least adapted damping; the least divisor


@serializable
class KfacState(NamedTuple):
    """The state of ``jp.kfac``.

    Attributes:
        steps: the number of steps taken.
        factors: the bias-corrected moving average of the Kronecker factors.
        basis: the factors with each ``Kronecker`` decomposed into an ``Eigen``.
        step: the last step, a tree like the learned params.
        damping: the damping, added to each eigenvalue.
    """

    steps: Int[Array, ""]
    factors: PyTree
    basis: PyTree
    step: Params
    damping: Float[Array, ""]


def kfac(
    net: Layer,
    loss: Loss,
    like: tuple[Params, PyTree, PyTree],
    *,
    learning_rate: float | optax.Schedule | None = None,
    momentum: float | None = None,
    damping: float = 1e-1,
    adapt_damping: bool = True,
    norm_constraint: float | None = None,
    decay: float = 0.95,
    samples: int | None = 1,
    positions: Literal["expand", "reduce"] = "expand",
    joint_bias: bool = True,
    every: int = 1,
    inverse_every: int = 10,
    damping_every: int = 5,
    damping_decay: float = 0.95,
    micro_batches: int = 1,
    seed: int = 0,
    mesh: Mesh | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Return K-FAC (Martens and Grosse 2015, https://arxiv.org/abs/1503.05671) as an optimizer.

    For a gradient g, the direction is d = -(F + damping)^-1 g, where F is the moving average of the
    Kronecker factors, and the step is alpha d + mu (the last step). Without a learning rate, alpha
    and mu minimise the quadratic model <g, s> + <s, (F + damping) s> / 2, in which F is the exact
    Gauss-Newton matrix of the batch; this is for large batches (section 7 there). The damping
    follows Levenberg and Marquardt (section 6.5): it shrinks where the loss falls as the model
    predicts. It is added to the eigenvalues of each block instead of being split between the two
    factors, so the damped block is exact where the factors are.

        optimizer = jp.kfac(net, loss, (params, x, target))
        update = jp.make_update(net, loss, optimizer)

    In a loop of your own: ``optimizer.update(grads, state, params, batch=(x, target))``.

    Args:
        net: the network. A param without Kronecker factors gets a diagonal.
        loss: the loss.
        like: (params, x, target), of which only the shapes matter; any number of examples that
            ``micro_batches`` divides will do.
        learning_rate: alpha, or a schedule for it; None for the quadratic model's.
        momentum: mu; by default the quadratic model's, or 0.9 with a learning rate. With a momentum
            and no learning rate, alpha minimises the model for this mu.
        damping: the initial damping.
        adapt_damping: whether the damping then follows Levenberg and Marquardt.
        norm_constraint: a bound on -alpha^2 <g, d>, the squared length of alpha d in the metric of
            F + damping, for a given learning rate.
        decay: the decay of the moving average, in [0, 1). The average is bias-corrected, so that
            at first it is about the mean so far.
        samples: the number of walks that sample F, each with targets drawn from the model; None for
            the exact root, with one walk for each output.
        positions: "expand" or "reduce", as in ``jp.kronecker_factors``.
        joint_bias: whether to treat a bias as a further row of its layer's matrix.
        every: the number of steps from one computation of the factors to the next.
        inverse_every: the number of steps from one eigendecomposition of the factors to the next.
        damping_every: the number of steps from one adaptation of the damping to the next. Each
            costs a forward pass.
        damping_decay: the factor for each step. An adaptation multiplies the damping by
            ``damping_decay**damping_every`` to shrink it, or divides by that to let it grow.
        micro_batches: the number of parts to split the batch into for the factors.
        seed: the seed of the targets that are drawn.
        mesh: a mesh of devices, each of which decomposes its share of the factors.

    Raises:
        TypeError: for an argument of the wrong type.
        ValueError: for a number out of its range, for a norm_constraint without a learning rate,
            and from ``update`` without a batch, with params unlike those of ``like``, and inside
            ``jax.shard_map``.
    """
    check_net_and_loss(net, loss)
    if type(like) is not tuple or len(like) != 3 or not jax.tree.leaves(like[1]):
        raise TypeError(f"kfac: like is (params, x, target), not {described(like)}")
    _check_numbers(damping=damping, norm_constraint=norm_constraint, momentum=momentum)
    check_share("kfac: decay", decay)
    check_share("kfac: damping_decay", damping_decay)
    _check_numbers(damping_decay=damping_decay)
    check_flag("kfac: adapt_damping", adapt_damping)
    check_count("kfac: seed", seed, least=0)
    if mesh is not None:
        require(mesh, Mesh, "kfac: mesh")
    counts = {"every": every, "inverse_every": inverse_every, "damping_every": damping_every}
    for name, count in counts.items():
        check_count(f"kfac: {name}", count)
    if learning_rate is None and norm_constraint is not None:
        raise ValueError("kfac: norm_constraint bounds a learning_rate, and none is given")
    if not callable(learning_rate):
        _check_numbers(learning_rate=learning_rate)
    asked = KroneckerFactors(samples, positions=positions, others="diagonal", joint_bias=joint_bias)
    made = _Kfac(
        net=net,
        loss=loss,
        like=jax.eval_shape(lambda like: like, like),
        factors=alone(net, loss, asked, micro_batches),
        decomposed=None if mesh is None else in_shares(mesh),
        learning_rate=learning_rate,
        momentum=momentum,
        damping=damping,
        adapt_damping=adapt_damping,
        norm_constraint=norm_constraint,
        decay=decay,
        every=every,
        inverse_every=inverse_every,
        damping_every=damping_every,
        damping_decay=damping_decay,
        seed=seed,
    )
    return optax.GradientTransformationExtraArgs(made.init, made.update)  # pyright: ignore[reportArgumentType]


@dataclasses.dataclass(frozen=True)
class _Kfac:
    """The ``init`` and ``update`` that ``kfac`` returns, with its arguments.

    Attributes:
        factors: the Kronecker factors as a function of (params, batch).
        decomposed: the function that decomposes them over a mesh, or None.
    """

    net: Layer
    loss: Loss
    like: tuple[Params, PyTree, PyTree]
    factors: Callable[[Params, Batch], PyTree]
    decomposed: Callable[..., PyTree] | None
    learning_rate: float | optax.Schedule | None
    momentum: float | None
    damping: float
    adapt_damping: bool
    norm_constraint: float | None
    decay: float
    every: int
    inverse_every: int
    damping_every: int
    damping_decay: float
    seed: int

    def init(self, params: Params) -> KfacState:
        if not jax.tree.leaves(learned(params)):
            raise ValueError("kfac: the net has no params that are learned")

        def factors_of(params: Params, x: PyTree, target: PyTree) -> PyTree:
            batch = Batch(x, target, jax.random.key(self.seed))
            return learned(self.factors(self.net.bind(params), batch))

        factors = jax.tree.map(jnp.zeros_like, jax.eval_shape(factors_of, *self.like))
        step = jax.tree.map(jnp.zeros_like, learned(params))
        start = jnp.asarray(self.damping, float)
        return KfacState(jnp.zeros((), jnp.int32), factors, eigh(factors), step, start)

    def update(
        self,
        updates: PyTree,
        state: KfacState,
        params: Params | None = None,
        *,
        value: Array | None = None,
        value_fn: Callable[..., Array] | None = None,
        batch: tuple[PyTree, PyTree] | None = None,
        **extra: Any,
    ) -> tuple[PyTree, KfacState]:
        whole, options = params, {}
        if batch is None and isinstance(value_fn, LossOfStep):
            whole, batch, options = value_fn.params, value_fn.batch, value_fn.given
        if batch is None or params is None:
            raise ValueError(
                "kfac: update takes params and batch=(x, target), as jp.make_update gives them "
                "with fused=False"
            )
        if type(batch) is not tuple or len(batch) != 2:
            raise TypeError(f"kfac: batch is (x, target), not {described(batch)}")
        if shard_map_axes():
            raise ValueError(
                "kfac: inside jax.shard_map its factors would be those of one device's examples; "
                "call update under jax.jit, with arrays that are sharded over the mesh"
            )
        if jax.tree.structure(whole) != jax.tree.structure(self.like[0]):
            raise ValueError(
                f"kfac: params are {shapes(whole)}, and in like {shapes(self.like[0])}; it takes "
                "whole params, without jp.learned_only or optax.masked, and leaves unlearned "
                "arrays alone by itself"
            )
        grads, count = learned(updates), state.steps
        bound = _bound(self.net, whole, batch, options)
        factors = _at_times(count, self.every, lambda: self._averaged(state, *bound), state.factors)
        basis = _at_times(
            count, self.inverse_every, lambda: eigh(factors, self.decomposed), state.basis
        )
        direction = jax.tree.map(jnp.negative, solve(basis, grads, state.damping))
        sizes, rise = self._sizes(state, *bound, grads, direction)
        step = jax.tree.map(
            lambda d, s: _along(wide(d), wide(s), sizes).astype(d.dtype), direction, state.step
        )

        def adapted() -> Array:
            mean_loss = loss_fn(self.net, self.loss)
            moved = merged(whole, jax.tree.map(jnp.add, learned(params), step))
            after = mean_loss(moved, *batch, **options)
            before = mean_loss(whole, *batch, **options) if value is None else value
            return self._adapted(state.damping, after - before, rise(sizes))

        new = state.damping
        if self.adapt_damping:
            new = _at_times(count + 1, self.damping_every, adapted, state.damping)
        return like_params(params, step), KfacState(count + 1, factors, basis, step, new)

    def _averaged(self, state: KfacState, params: Params, batch: Batch) -> PyTree:
        """Return the moving average of the factors, updated with those of this batch."""
        key = jax.random.fold_in(jax.random.key(self.seed), state.steps)
        new = learned(self.factors(params, batch._replace(key=key)))
        nth = (state.steps // self.every).astype(float)
        rest = self.decay * (1 - self.decay**nth) / (1 - self.decay ** (nth + 1))
        return jax.tree.map(lambda old, new: _mixed(old, new, rest), state.factors, new)

    def _sizes(
        self, state: KfacState, params: Params, batch: Batch, grads: Params, direction: Params
    ) -> tuple[Float[Array, " 2"], Callable[[Array], Array]]:
        """Return alpha and mu, and the function of them that predicts the rise of the loss."""

        def model() -> _Model:
            vectors = direction, state.step
            return _Model.of(self.net, self.loss, params, batch, grads, vectors)

        if self.learning_rate is None:
            found = model()
            return found.minimum(state.damping, self.momentum), found.change
        rate = self.learning_rate
        rate = rate(state.steps) if callable(rate) else rate
        square = -_dot(grads, direction)
        sizes = _given_sizes(rate, self.momentum, self.norm_constraint, square)
        return sizes, lambda sizes: model().change(sizes)

    def _adapted(self, damping: Array, rise: Array, expected: Array) -> Array:
        """Return the damping after a step, from the rise of the loss and the predicted rise."""
        expected = expected.astype(damping.dtype)
        ratio = rise.astype(expected.dtype) / jnp.minimum(expected, -TINY)
        factor = self.damping_decay**self.damping_every
        scale = jnp.where(ratio > 0.75, factor, jnp.where(ratio < 0.25, 1 / factor, 1))
        scale = jnp.where(jnp.isnan(ratio), 1 / factor, scale)
        return jnp.maximum(damping * scale, LEAST)


class _Model(NamedTuple):
    """The quadratic model <g, s> + <s, F s> / 2 of steps s along two vectors.

    Attributes:
        linear: (2,), <g, v_i>.
        quadratic: (2, 2), <v_i, F v_j>.
        products: (2, 2), <v_i, v_j>.
    """

    linear: Array
    quadratic: Array
    products: Array

    @classmethod
    def of(
        cls,
        net: Layer,
        loss: Loss,
        params: Params,
        batch: Batch,
        grads: Params,
        vectors: tuple[Params, Params],
    ) -> _Model:
        """Return the model of steps along these vectors."""
        linear = jnp.stack([_dot(grads, v) for v in vectors])
        quadratic = quadratic_form(net, loss, params, batch, vectors).astype(linear.dtype)
        products = jnp.stack([jnp.stack([_dot(v, w) for w in vectors]) for v in vectors])
        return cls(linear, quadratic, products)

    def minimum(self, damping: Array, momentum: float | None = None) -> Float[Array, " 2"]:
        """Return the sizes of both vectors at the minimum of the damped model.

        The second size is the momentum if that is given, and 0 where the vectors are parallel or
        the second is 0.
        """
        (aa, ab), (_, bb) = self.quadratic + damping.astype(self.linear.dtype) * self.products
        a, b = self.linear
        if momentum is not None:
            mu = jnp.asarray(momentum, a.dtype)
            return jnp.stack([-(a + mu * ab) / jnp.where(aa > 0, aa, 1), mu])
        determinant = aa * bb - ab**2
        both = determinant > 1e-5 * aa * bb
        safe = jnp.where(both, determinant, 1)
        along = -a / jnp.where(aa > 0, aa, 1)
        first = jnp.where(both, (ab * b - bb * a) / safe, along)
        return jnp.stack([first, jnp.where(both, (ab * a - aa * b) / safe, 0)])

    def change(self, sizes: Float[Array, " 2"]) -> Float[Array, ""]:
        """Return the rise of the loss that the model without damping predicts."""
        sizes = sizes.astype(self.linear.dtype)
        return self.linear @ sizes + sizes @ self.quadratic @ sizes / 2


def _given_sizes(
    rate: ArrayLike, momentum: float | None, bound: float | None, square: Float[Array, ""]
) -> Float[Array, " 2"]:
    """Return alpha and mu for a given learning rate.

    Args:
        rate: alpha, before it is bounded.
        momentum: mu; None for 0.9.
        bound: the largest alpha^2 times square, or None.
        square: <g, (F + damping)^-1 g>.
    """
    alpha = jnp.asarray(rate, square.dtype)
    if bound is not None:
        alpha *= jnp.sqrt(jnp.minimum(1, bound / jnp.maximum(alpha**2 * square, TINY)))
    return jnp.stack([alpha, jnp.asarray(0.9 if momentum is None else momentum, square.dtype)])


def _bound(
    net: Layer, params: Params, batch: tuple[PyTree, PyTree], options: Mapping[str, Any]
) -> tuple[Params, Batch]:
    bound = net.bind(params, key=options.get("key"), mask=options.get("mask"))
    weights, divisor = options.get("weights"), options.get("divisor")
    return bound, weighted_batch(net, bound, *batch, options.get("key"), weights, divisor)


def _dot(a: Params, b: Params) -> Float[Array, ""]:
    products = jax.tree.map(lambda a, b: jnp.sum(wide(a) * wide(b)), a, b)
    return added(*jax.tree.leaves(products))


def _along(d: Array, s: Array, sizes: Float[Array, " 2"]) -> Array:
    first, second = sizes.astype(d.dtype)
    return first * d + second * s


def _mixed(old: Array, new: Array, rest: Array) -> Array:
    rest = rest.astype(old.dtype)
    return rest * old + (1 - rest) * new.astype(old.dtype)


def _at_times(count: Array, every: int, new: Callable[[], PyTree], old: PyTree) -> PyTree:
    """Return ``new()`` if count is a multiple of ``every``, else old."""
    return new() if every == 1 else jax.lax.cond(count % every == 0, new, lambda: old)


def _check_numbers(**numbers: float | None) -> None:
    for name, number in numbers.items():
        if number is not None:
            check_number(f"kfac: {name}", number, positive=name != "momentum", finite=True)
