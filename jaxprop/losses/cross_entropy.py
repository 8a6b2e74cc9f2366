"""The cross-entropy of one class among several."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Bool, Float, Int

from jaxprop.core.arrays import of_indices, on_device, wide
from jaxprop.core.loss import Loss
from jaxprop.core.types import PyTree
from jaxprop.losses.arguments import (
    check_arrays,
    check_plain_number,
    check_target,
    check_weights,
    counted,
    in_pair,
    only,
    outputs,
    positions,
    times,
)

Logits = Float[Array, "n ... c"]
One = Float[Array, "n ... 1"]
Soft = Logits | tuple[()]
Residuals = tuple[Logits, One, One, One, Int[Array, "n ... 1"], One, Soft]
Target = Int[Array, "n ..."] | Logits


class CrossEntropy(Loss):
    """Cross-entropy E = log sum_j exp(y_j) - y_t of logits y and a class t, a mean over positions.

    The derivative of log-sum-exp is the softmax, p_j = exp(y_j) / sum_k exp(y_k), so
    dE/dy_j = p_j - [j = t] (Bridle 1990, https://doi.org/10.1007/978-3-642-76153-9_28). For a
    target that is almost certain, both would cancel. With r the sum of exp(y_j - max y) over the
    other classes, E = log(1 + r) if y_t is the largest, and 1 - p_t = r / (r + exp(y_t - max y)).
    The Hessian is diag(p) - p p^T = sum_c p_c (e_c - p)(e_c - p)^T, the covariance of e_c - p for a
    class c drawn from p.

    In general E = -sum_j a_j log p_j with a_j = c_j ((1 - s) q_j + s / C), for a distribution q
    over the C classes ([j = t], or the target itself), label smoothing s (Szegedy et al. 2016,
    https://arxiv.org/abs/1512.00567) and class weights c. With A = sum_j a_j,
    dE/dy_j = A p_j - a_j, and the Hessian is A (diag(p) - p p^T).

    y is (N, C) or (N, T, C), floating. The target is (N,) or (N, T), integers in [0, C), or
    floating in the shape of y: the probability of each class. A class of -1 or less is padding: it
    has no weight, whatever its logits are, and the mean is over an example's other positions. An
    example that is all padding has value 0 and still counts in N.

    The target may be a pair (target, weights), with weights (N, T) of the positions, of any real
    dtype. An example's loss is then sum_t w_t E_t / sum_t w_t over its positions (0 if the sum of
    weights is 0), and a position with weight 0 is padding. (Weights of whole examples are
    ``weights=`` of the functions that take the batch.) Class weights scale E_t, but do not enter
    the mean, in which each E_t counts once. (PyTorch divides by the batch's sum of class weights.)

    In a traced program, a class of C or more, a negative probability and a negative weight each
    make the value and the cotangent NaN, and the sum of probabilities is not checked.

    Attributes:
        label_smoothing: s, from 0 to 1.
        class_weights: c, a tuple of C numbers that are not negative; None for ones. A position
            whose class has weight 0 still counts in the mean, but is padding to curvature.

    Raises:
        TypeError: for y that is not floating, and a target that is not an array of numbers.
        ValueError: for a target of another shape, for weights of a target without positions, for
            the wrong number of class weights, and where values are known (outside of ``jax.jit``)
            for a class of C or more, probabilities that are negative or whose sum is not 1 within
            0.001 (or 8 eps of their dtype), and weights that are negative or not finite.
    """

    label_smoothing: float = 0.0
    class_weights: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        check_plain_number("CrossEntropy: label_smoothing", self.label_smoothing, most=1)
        if self.class_weights is None:
            return
        if not isinstance(self.class_weights, tuple) or not self.class_weights:
            raise TypeError(
                "CrossEntropy: class_weights is a tuple of numbers, one a class, not "
                f"{self.class_weights!r}"
            )
        for c, weight in enumerate(self.class_weights):
            check_plain_number(f"CrossEntropy: class_weights[{c}]", weight)

    def forward(self, y: Logits, target: PyTree) -> tuple[Float[Array, " n"], Residuals]:
        target, weights = in_pair(self, target)
        self._check(y, target, weights)
        logits, target = wide(y), on_device(target)
        soft, valid, chosen = self._read(logits, target)
        top = jax.lax.stop_gradient(logits.max(axis=-1, keepdims=True))
        own = jax.lax.platform_dependent(logits, chosen, cpu=_gathered, default=_picked)
        own = jnp.where((chosen < 0) | ((own == top) & jnp.isinf(own)), 0, own - top)
        # Not exp(y - max y), which XLA would keep for backward instead of the narrower y.
        others = jnp.exp(jnp.where(_is(chosen, logits), -jnp.inf, logits - top))
        others = others.sum(axis=-1, keepdims=True)
        total = others + jnp.exp(own)
        each = jnp.log1p(others + jnp.expm1(own)) - own
        weight = self._weight(valid, weights, logits)
        if self._spread(soft):
            a, mass = self._masses(chosen, soft, logits)
            far = jnp.where(_is(chosen, a), each, top - logits + jnp.log(total))
            each = times(a, far).sum(axis=-1, keepdims=True) / jnp.where(mass == 0, 1, mass)
            weight = times(weight, mass)
        elif self.class_weights is not None:
            of_class = jnp.take(jnp.asarray(self.class_weights, logits.dtype), chosen)
            weight = times(weight, of_class)
        if weights is not None or self.class_weights is not None:
            chosen = jnp.where(weight == 0, -1, chosen)  # a weight of 0 makes padding, too
        values = jnp.sum(times(weight, each)[..., 0], axis=positions(valid))
        return values, (y, top, total, others, chosen, weight, soft)

    def backward(self, residuals: Residuals) -> Logits:
        _, _, total, others, chosen, weight, soft = residuals
        exps, mine = _exps(residuals), _is(chosen, residuals[0])
        if not self._spread(soft):
            ct = weight / total * jnp.where(mine, -others, exps)
            return jnp.where(_is_padding(chosen, ct), 0, ct)
        p, others = exps / total, others / total
        a, mass = self._masses(chosen, soft, p)
        q = a / jnp.where(mass == 0, 1, mass)
        others = others - jnp.where(mine, 0, q).sum(axis=-1, keepdims=True)
        return times(weight, jnp.where(mine, -others, p - q))

    def real(self, residuals: Residuals) -> Bool[Array, "n ..."]:
        return residuals[-2][..., 0] != 0

    def hessian_columns(self, residuals: Residuals) -> int:
        return outputs(residuals[0])

    def hessian_column(self, residuals: Residuals, c: int | Array) -> Logits:
        """Return sqrt(w p_k) (e_k - p) at position t of weight w, for c = t C + k."""
        weight = residuals[-2]
        p = jnp.where(weight != 0, _softmax(residuals), 0)
        root = only(c, jnp.sqrt(p * weight))
        at = root.sum(axis=-1, keepdims=True)
        return -at * _less_one(p, only(c, jnp.ones_like(p)) > 0)

    def sample(self, key: Array, residuals: Residuals) -> Logits:
        p, weight = _softmax(residuals), residuals[-2]
        drawn = jax.random.categorical(key, jnp.log(p))[..., None]
        return times(jnp.sqrt(weight), _less_one(p, _is(drawn, p)))

    def _spread(self, soft: Soft) -> bool:
        """Return whether the target is a distribution over more than one class."""
        return not isinstance(soft, tuple) or self.label_smoothing > 0

    def _read(
        self, logits: Logits, target: Target
    ) -> tuple[Soft, Bool[Array, "n ..."], Int[Array, "n ... 1"]]:
        """Return the probabilities, which positions are not padding, and the (likeliest) class."""
        if jnp.issubdtype(target.dtype, jnp.integer):
            if jnp.issubdtype(target.dtype, jnp.unsignedinteger):
                target = jnp.minimum(of_indices(target), logits.shape[-1]).astype(jnp.int32)
            target = of_indices(target)
            return (), target >= 0, target[..., None]
        soft = jnp.where(target >= 0, target.astype(logits.dtype), jnp.nan)
        likeliest = jnp.argmax(target, axis=-1, keepdims=True)
        return soft, jnp.ones(target.shape[:-1], bool), likeliest

    def _weight(self, valid: Bool[Array, "n ..."], weights: Array | None, logits: Logits) -> One:
        """Return the weight of each position in the mean over an example's positions."""
        if weights is None:
            count = jnp.maximum(valid.sum(positions(valid), keepdims=True), 1)
            return (valid.astype(logits.dtype) / count.astype(logits.dtype))[..., None]
        weights = jnp.where(valid, counted(weights, logits.dtype), 0)
        total = weights.sum(positions(valid), keepdims=True)
        return (weights / jnp.where(total == 0, 1, total))[..., None]

    def _masses(
        self, chosen: Int[Array, "n ... 1"], soft: Soft, like: Logits
    ) -> tuple[Logits, One]:
        """Return a_j for each class, and their sum."""
        a = _is(chosen, like).astype(like.dtype) if isinstance(soft, tuple) else soft
        if self.label_smoothing > 0:
            smoothing = float(self.label_smoothing)
            a = (1 - smoothing) * a + smoothing / like.shape[-1]
        if self.class_weights is not None:
            of_classes = jnp.asarray(self.class_weights, like.dtype)
            a = a * jnp.expand_dims(of_classes, range(like.ndim - 1))
        return a, a.sum(axis=-1, keepdims=True)

    def _check(self, y: Logits, target: Target, weights: Array | None) -> None:
        of_y = getattr(y, "shape", ())
        soft = jnp.issubdtype(getattr(target, "dtype", int), jnp.floating)
        if soft and target.shape == of_y[:-1]:
            raise TypeError(
                f"{self} takes a target of dtype integer, or the probability of each class, of "
                f"shape {of_y}, not {target.dtype} {target.shape}"
            )
        check_arrays(self, y, target, jnp.integer, jnp.floating, of_classes=not soft)
        check_weights(self, weights, of_y[:-1])
        classes = y.shape[-1]
        if self.class_weights is not None and len(self.class_weights) != classes:
            raise ValueError(
                f"{self}: {len(self.class_weights)} class weights, and the net's output has "
                f"{classes} classes: {y.shape}"
            )
        if weights is not None and y.ndim == 2:
            raise ValueError(
                f"{self}: weights beside the target are of an example's positions, and y {y.shape} "
                "has none; for weights of the examples give weights= to the function of the batch"
            )
        if not soft:
            words = f"{self} takes a target below {classes}"
            check_target(words, target, weights, lambda t: t < classes)
            return
        allowed = max(1e-3, 8 * float(jnp.finfo(target.dtype).eps))

        def right(q: Any) -> Any:
            return (abs(q.astype(np.float64).sum(-1) - 1) <= allowed) & (q >= 0).all(-1)

        words = f"{self} takes probabilities of the classes that sum to 1"
        check_target(words, target, weights, right)


def _softmax(residuals: Residuals) -> Logits:
    return _exps(residuals) / residuals[2]


def _exps(residuals: Residuals) -> Logits:
    y, top, *_ = residuals
    logits = wide(y)
    infinite = (logits == top) & jnp.isinf(logits)  # only there: a finite top has a derivative, too
    return jnp.exp(jnp.where(infinite, 0, logits - top))


def _less_one(p: Logits, at: Array) -> Logits:
    """Return p - 1 at one class of each position, as minus all other p, and p elsewhere."""
    others = jnp.sum(p, axis=-1, keepdims=True, where=~at)
    return jnp.where(at, -others, p)


def _gathered(logits: Logits, chosen: Int[Array, "n ... 1"]) -> One:
    """Return the chosen logit, NaN for a class of C or more; for padding it is not used."""
    return jnp.take_along_axis(logits, chosen, axis=-1)


def _picked(logits: Logits, chosen: Int[Array, "n ... 1"]) -> One:
    """Return the chosen logit as ``_gathered`` does, in the same pass as the other sums.

    On a TPU a gather would be four more programs.
    """
    own = jnp.sum(jnp.where(_is(chosen, logits), logits, 0), axis=-1, keepdims=True)
    return jnp.where(chosen < logits.shape[-1], own, jnp.nan)


def _is_padding(chosen: Int[Array, "n ... 1"], y: Logits) -> Array:
    """Return where the class is negative, in the shape of y.

    It is computed for each entry, since a TPU would compute it for each position in a separate
    program.
    """
    classes = jax.lax.broadcasted_iota(chosen.dtype, y.shape, y.ndim - 1)
    return (chosen | classes) < 0


def _is(chosen: Int[Array, "n ... 1"], y: Logits) -> Array:
    """Return where the last axis of y is at the chosen class."""
    return jax.lax.broadcasted_iota(chosen.dtype, y.shape, y.ndim - 1) == chosen
