"""Losses: one value for each example, and the cotangent that the walk starts from.

``forward`` takes the net's output y and the target, with the example on axis 0, and returns a value
for each example. ``backward`` returns the cotangent of y for each example's *own* loss. The scalar
loss is the mean over examples. The 1/N enters where the mean is taken, not here.

Values and cotangents are computed in at least float32: in bfloat16, p - 1 is 0 from p = 0.998 on.
The walk casts the cotangent to the dtype of y.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Int

from jaxprop.core.arrays import of_indices, on_device, wide
from jaxprop.core.checks import check_values
from jaxprop.core.loss import Loss

Y = Float[Array, "n ..."]
Logits = Float[Array, "n ... c"]
OfClasses = tuple[Logits, Y, Int[Array, "n ... 1"], Y]  # the residuals of CrossEntropy


class HalfSquaredError(Loss):
    """E = 1/2 sum_j (y_j - t_j)^2 for each example, so dE/dy_j = y_j - t_j.

    The Hessian is the identity. ``sample`` draws the target from a normal distribution with mean y
    and unit variance.

    y and target are both (N, ...), floating. All axes but the first are summed.

    Raises:
        TypeError: for y or a target that is not a floating array.
        ValueError: for a target of another shape than y.
    """

    def forward(self, y: Y, target: Y) -> tuple[Float[Array, " n"], Y]:
        _check(self, y, target, y.shape, jnp.floating)
        outputs = wide(y)
        error = outputs - target.astype(outputs.dtype)
        return 0.5 * jnp.sum(error**2, axis=_positions(error)), error

    def backward(self, residuals: Y) -> Y:
        return residuals

    def hessian_columns(self, residuals: Y) -> int:
        return _outputs(residuals)

    def hessian_column(self, residuals: Y, c: int | Array) -> Y:
        return _only(c, jnp.ones_like(residuals))

    def sample(self, key: Array, residuals: Y) -> Y:
        return jax.random.normal(key, residuals.shape, residuals.dtype)


class CrossEntropy(Loss):
    """E = log sum_j exp(y_j) - y_t for logits y and the target class t; a mean over positions.

    The derivative of log-sum-exp is the softmax, p_j = exp(y_j) / sum_k exp(y_k), so
    dE/dy_j = p_j - [j = t] (Bridle 1990, https://doi.org/10.1007/978-3-642-76153-9_28). For a
    target that is almost certain both would cancel. With r the sum of exp(y_j - max y) over the
    other classes, E = log(1 + r) for the largest y, and 1 - p_t = r / (r + exp(y_t - max y)). The
    Hessian is diag(p) - p p^T = sum_c p_c (e_c - p)(e_c - p)^T, the covariance of e_c - p for a
    class c drawn from p.

    y is (N, C) or (N, T, C), floating, and target is (N,) or (N, T), integers in [0, C). A target
    of -1 (or less) is padding: it weighs nothing, whatever its logits are, and the mean is over an
    example's other positions. An example that is all padding has value 0 and still counts in N. In
    a traced program a target of C or more makes the value and the cotangent NaN.

    Raises:
        TypeError: for y that is not floating, and a target that is not an array of integers.
        ValueError: for a target of another shape than y without its last axis, and where its values
            are known (outside of ``jax.jit``) for one of C or more.
    """

    def forward(
        self, y: Logits, target: Int[Array, "n ..."]
    ) -> tuple[Float[Array, " n"], OfClasses]:
        _check(self, y, target, y.shape[:-1], jnp.integer)
        classes = y.shape[-1]
        check_values(f"{self} takes a target below {classes}", target, lambda t: t < classes)
        logits, target = wide(y), of_indices(on_device(target))
        top = jax.lax.stop_gradient(logits.max(axis=-1, keepdims=True))
        valid = target >= 0
        chosen = jnp.where(valid, target, 0)[..., None]
        own = jnp.take_along_axis(logits, chosen, axis=-1)  # NaN for a target of C or more
        own = jnp.where((own == top) & jnp.isinf(own), 0, own - top)
        mine, powers, own_power = _is(chosen, logits), jnp.exp(logits - top), jnp.exp(own)
        others = jnp.where(mine, 0, powers).sum(axis=-1, keepdims=True)
        each = jnp.log1p(others + jnp.expm1(own)) - own
        total = others + own_power
        p = jnp.where(mine, own_power, powers) / total
        count = jnp.maximum(valid.sum(_positions(valid), keepdims=True), 1)
        weight = valid.astype(logits.dtype) / count.astype(logits.dtype)
        values = jnp.sum(jnp.where(valid, each[..., 0], 0) * weight, axis=_positions(valid))
        return values, (p, others / total, chosen, weight[..., None])

    def backward(self, residuals: OfClasses) -> Logits:
        p, others, chosen, weight = residuals
        ct = jnp.where(_is(chosen, p), -others, p)
        return jnp.where(weight > 0, ct * weight, 0)

    def real(self, residuals: OfClasses) -> Bool[Array, "n ..."]:
        return residuals[-1][..., 0] > 0

    def hessian_columns(self, residuals: OfClasses) -> int:
        return _outputs(residuals[0])

    def hessian_column(self, residuals: OfClasses, c: int | Array) -> Logits:
        """Return sqrt(w p_k) (e_k - p) at position t of weight w, for c = t C + k."""
        p, _, _, weight = residuals
        p = jnp.where(weight > 0, p, 0)
        root = _only(c, jnp.sqrt(p * weight))
        at = root.sum(axis=-1, keepdims=True)
        return -at * _less_one(p, _only(c, jnp.ones_like(p)) > 0)

    def sample(self, key: Array, residuals: OfClasses) -> Logits:
        p, _, _, weight = residuals
        drawn = jax.random.categorical(key, jnp.log(p))[..., None]
        return jnp.where(weight > 0, _less_one(p, _is(drawn, p)) * jnp.sqrt(weight), 0)


class BinaryCrossEntropy(Loss):
    """E = (1 - t) log(1 + exp(y)) + t log(1 + exp(-y)) for logits y and targets t.

    A mean over an example's M outputs. This is -t log s - (1 - t) log(1 - s) with s = sigmoid(y),
    without its overflow and without cancellation. The derivative of log(1 + exp(y)) is s, and
    sigmoid(-y) is 1 - s, so dE/dy = ((1 - t) s - t (1 - s)) / M = (s - t) / M. The Hessian is
    diagonal, s (1 - s) / M: the variance of a target that is 1 with probability s, over M.

    y is (N, ...), floating. target has the same shape, with values in [0, 1] of any real dtype or
    bool. In a traced program another value makes the loss and the cotangent NaN.

    Raises:
        TypeError: for y that is not floating, and a target that is not a real or a bool array.
        ValueError: for a target of another shape than y, and where its values are known (outside of
            ``jax.jit``) for one outside [0, 1].
    """

    def forward(self, y: Y, target: Array) -> tuple[Float[Array, " n"], tuple[Y, Y]]:
        _check(self, y, target, y.shape, jnp.floating, jnp.integer, jnp.bool_)
        check_values(f"{self} takes a target in [0, 1]", target, lambda t: (t >= 0) & (t <= 1))
        logits = wide(y)
        t = target.astype(logits.dtype)
        t = jnp.where((t >= 0) & (t <= 1), t, jnp.nan)
        each = _times(1 - t, jax.nn.softplus(logits)) + _times(t, jax.nn.softplus(-logits))
        return jnp.sum(each, axis=_positions(y)) / _outputs(y), (logits, t)

    def backward(self, residuals: tuple[Y, Y]) -> Y:
        logits, t = residuals
        return ((1 - t) * jax.nn.sigmoid(logits) - t * jax.nn.sigmoid(-logits)) / _outputs(t)

    def hessian_columns(self, residuals: tuple[Y, Y]) -> int:
        return _outputs(residuals[0])

    def hessian_column(self, residuals: tuple[Y, Y], c: int | Array) -> Y:
        logits, _ = residuals
        variance = jax.nn.sigmoid(logits) * jax.nn.sigmoid(-logits)
        return _only(c, jnp.sqrt(variance / _outputs(logits)))

    def sample(self, key: Array, residuals: tuple[Y, Y]) -> Y:
        logits, _ = residuals
        s = jax.nn.sigmoid(logits)
        drawn = jax.random.bernoulli(key, s)
        return jnp.where(drawn, -jax.nn.sigmoid(-logits), s) / math.sqrt(_outputs(s))


def _less_one(p: Logits, at: Array) -> Logits:
    """Return p - 1 at one class of each position, and p elsewhere: p - 1 is minus all other p."""
    others = jnp.sum(p, axis=-1, keepdims=True, where=~at)
    return jnp.where(at, -others, p)


def _times(weight: Y, value: Y) -> Y:
    """Return the product, which is 0 for a weight of 0 and a value of infinity."""
    return jnp.where(weight == 0, 0, weight * value)


def _is(chosen: Int[Array, "n ... 1"], y: Logits) -> Array:
    """Return where on the last axis of y the chosen class is."""
    return jax.lax.broadcasted_iota(chosen.dtype, y.shape, y.ndim - 1) == chosen


def _only(c: int | Array, root: Y) -> Y:
    """Return root with zeros for all of an example's outputs but the one numbered c."""
    one = jnp.arange(_outputs(root)) == c
    return jnp.where(one.reshape(root.shape[1:]), root, 0)


def _outputs(y: Array) -> int:
    return max(math.prod(y.shape[1:]), 1)


def _positions(y: Array) -> tuple[int, ...]:
    return tuple(range(1, y.ndim))


def _check(loss: Loss, y: Array, target: Array, shape: tuple[int, ...], *kinds: type) -> None:
    if not jnp.issubdtype(y.dtype, jnp.floating):
        raise TypeError(f"{loss} takes floating y, not {y.dtype}")
    if not hasattr(target, "dtype"):
        raise TypeError(f"{loss} takes the target as an array, not {target!r}")
    if not any(jnp.issubdtype(target.dtype, kind) for kind in kinds):
        words = " or ".join(kind.__name__.rstrip("_") for kind in kinds)
        raise TypeError(f"{loss} takes a target of dtype {words}, not {target.dtype}")
    if target.shape != shape:
        raise ValueError(
            f"{loss}: the net's output has shape {y.shape}, which takes a target of shape {shape}, "
            f"not {target.shape}"
        )
