"""Feedback rules: a ``backward`` through other matrices than those of ``forward``."""

from __future__ import annotations

import abc
import itertools
import math
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from jaxprop.core.arrays import rounded, wide
from jaxprop.core.checks import check_count
from jaxprop.core.combinator import Wrapper
from jaxprop.core.layer import Layer
from jaxprop.core.serialization import serializable
from jaxprop.core.tree import Unlearned, is_not_learned
from jaxprop.core.types import Cotangent, Params, PyTree, Residuals
from jaxprop.layers import Conv, ConvTranspose, Dense, Gru, Lstm, Rnn
from jaxprop.rules.select import Where, with_rule
from jaxprop.traced.part import PartLayer
from jaxprop.traced.ruled import Rule

MATRICES = (Dense, Conv, ConvTranspose, Rnn, Lstm, Gru)
UNIFORM, FORWARD = "uniform", "forward"


@serializable
class FeedbackParams(NamedTuple):
    """The params of a layer with separate matrices for feedback.

    Attributes:
        params: the layer's params.
        feedback: an array for each of the layer's params of rank two or more.
    """

    params: Any
    feedback: tuple[Any, ...]


class Feedback(Wrapper):
    """A layer y = f(x) that runs f's ``backward`` with other matrices than its ``forward``.

    Wherever f's backward uses a matrix, the other one takes its place: for a dense layer
    d_x = ct B^T instead of ct w^T, for a recurrent one also from step to step. dE/dw = x^T ct is
    that of f itself.

    Attributes:
        layer: f.
    """

    is_derivative: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.layer.by_module:
            raise TypeError(
                f"{self.layer} walks back through its own trace, in which its params stand: no "
                "others can be put in their place"
            )
        if isinstance(self.layer, PartLayer):
            self.layer.check_affine(type(self).__name__)

    def _own(self, params: Params) -> Params:
        return params

    @abc.abstractmethod
    def _matrices(self, params: Params) -> list[Array]:
        """Return the matrices for ``backward``, one for each of the layer's own."""

    def _cotangent(self, params: Params, d_own: Cotangent) -> Cotangent:
        return d_own

    def forward(self, params: Params, x: PyTree) -> tuple[PyTree, Residuals]:
        own = self._own(params)
        y, residuals = self.layer.forward(own, x)
        saved = set(map(id, jax.tree.leaves(residuals)))
        if any(id(matrix) in saved for matrix in matrices(own)):
            raise TypeError(
                f"{self}: {self.layer} saves its params among its residuals, so that backward "
                "cannot be taken at others"
            )
        return y, residuals

    def backward(
        self, params: Params, residuals: Residuals, ct: Cotangent
    ) -> tuple[Cotangent, Cotangent]:
        others = with_matrices(self._own(params), self._matrices(params))
        d_own, d_x = self.layer.backward(others, residuals, ct)
        return self._cotangent(params, d_own), d_x


class Separate(Feedback):
    """Feedback whose matrices are separate arrays; params are a ``FeedbackParams``."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.layer, PartLayer):
            raise TypeError(
                f"rules for {self.layer}, a part of a function, have no params of their own: use "
                "sign_symmetric, or functools.partial(jp.rules.feedback_alignment, seed=0)"
            )

    @abc.abstractmethod
    def _kept(self, matrix: Array) -> Any:
        """Return the entry of params for a feedback matrix that ``init`` drew."""

    def init(self, key: Array, x: PyTree) -> FeedbackParams:
        params, others = (self.layer.init(k, x) for k in (key, jax.random.fold_in(key, 1)))
        return FeedbackParams(params, tuple(map(self._kept, _some(self, others))))

    def rounded(self, params: FeedbackParams, dtype: Any) -> FeedbackParams:
        own = self.layer.rounded(params.params, dtype)
        return FeedbackParams(own, rounded(params.feedback, dtype))

    def _own(self, params: FeedbackParams) -> Params:
        return params.params

    def _matrices(self, params: FeedbackParams) -> list[Array]:
        return [b.value if is_not_learned(b) else b for b in params.feedback]


class FeedbackAlignment(Separate):
    """Fixed random feedback, d_x = ct B^T (Lillicrap et al. 2016, doi.org/10.1038/ncomms13276).

    B is ``Unlearned``, and drawn by the layer's ``init`` like w, but independently.
    """

    def __repr__(self) -> str:
        return f"feedback_alignment({self.layer!r})"

    def _kept(self, matrix: Array) -> Unlearned:
        return Unlearned(matrix)

    def _cotangent(self, params: FeedbackParams, d_own: Cotangent) -> FeedbackParams:
        return FeedbackParams(d_own, tuple(() for _ in params.feedback))


class Seeded(Feedback):
    """Fixed random feedback, drawn at each use from the same seed: B of variance 2 / (I + O).

    Attributes:
        seed: the seed that B is drawn from.
        number: the number of this layer among those with the rule, folded into the seed.
    """

    seed: int = 0
    number: int = 0

    def __repr__(self) -> str:
        return f"feedback_alignment({self.layer!r}, seed={self.seed})"

    def _matrices(self, params: Params) -> list[Array]:
        key = jax.random.fold_in(jax.random.key(self.seed), self.number)
        found = _some(self, params)
        keys = jax.random.split(key, len(found))
        return [_glorot(key, w) for key, w in zip(keys, found, strict=True)]


class KolenPollack(Separate):
    """Feedback that is learned like w: dE/dB is dE/dw, in the same form.

    With weight decay, equal steps make B and w equal (Kolen and Pollack 1994; Akrout et al. 2019,
    https://arxiv.org/abs/1904.05391): B - w shrinks by the decay alone. So the optimizer must be
    elementwise and decay weights, such as ``optax.adamw`` or ``optax.add_decayed_weights`` with
    SGD. A norm over all params counts both B and w.
    """

    def __repr__(self) -> str:
        return f"kolen_pollack({self.layer!r})"

    def _kept(self, matrix: Array) -> Array:
        return matrix

    def _cotangent(self, params: FeedbackParams, d_own: Cotangent) -> FeedbackParams:
        own, structure = jax.tree.flatten(params.params, is_leaf=is_not_learned)
        pairs = zip(own, structure.flatten_up_to(d_own), strict=True)
        return FeedbackParams(d_own, tuple(d for leaf, d in pairs if is_matrix(leaf)))


class SignSymmetric(Feedback):
    """Feedback by the signs of w, B = sign(w) s (Liao et al. 2016, https://arxiv.org/abs/1510.05067).

    Attributes:
        magnitude: "uniform" for s = 1; "forward" for the s that gives B the norm of w.
    """

    magnitude: str = FORWARD

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.magnitude not in (UNIFORM, FORWARD):
            raise ValueError(
                f"sign_symmetric: magnitude is {UNIFORM!r} or {FORWARD!r}, not {self.magnitude!r}"
            )

    def __repr__(self) -> str:
        return f"sign_symmetric({self.layer!r}, {self.magnitude!r})"

    def _matrices(self, params: Params) -> list[Array]:
        return [self._of(w) for w in _some(self, params)]

    def _of(self, w: Array) -> Array:
        signs = jnp.sign(w)
        if self.magnitude == UNIFORM:
            return signs
        number = jnp.maximum(jnp.sum(jnp.abs(wide(signs))), 1)
        return signs * jnp.sqrt(jnp.sum(wide(w) ** 2) / number).astype(w.dtype)


def feedback_alignment(net: Layer, *, seed: int | None = None, where: Where = MATRICES) -> Layer:
    """Return the net with fixed random matrices in ``backward`` (Lillicrap et al. 2016).

    The params of a layer become a ``FeedbackParams``: its own, and one unlearned array for each of
    its matrices, which no optimizer, norm or noise touches.

    Args:
        net: the network, or a part of a function, for ``jp.function(fn, rules=)``.
        seed: a seed to draw the matrices from at each step instead, so that params stay the net's;
            layers that a ``jp.repeat`` or a scan stacks then share their matrices.
        where: which layers; by default all dense, convolution and recurrent ones, which include the
            projections of attention.

    Raises:
        TypeError: for a net that is not a layer, and for a layer with params in its residuals.
        ValueError: if no layer is selected, or one has no matrix.

    Example:
        >>> import jax, jax.numpy as jnp, jaxprop as jp
        >>> net = jp.rules.feedback_alignment(jp.chain(jp.Dense(8), jp.Tanh(), jp.Dense(3)))
        >>> params = net.init(jax.random.key(0), jnp.ones((2, 4)))
        >>> params[2].params.w.shape, params[2].feedback[0].value.shape
        ((8, 3), (8, 3))
    """
    if seed is None:
        return _with(net, FeedbackAlignment, where)
    check_count("feedback_alignment: seed", seed, least=0)
    numbers = itertools.count(net.number if isinstance(net, PartLayer) else 0)
    return _with(net, lambda layer: Seeded(layer, seed, next(numbers)), where)


def kolen_pollack(net: Layer, *, where: Where = MATRICES) -> Layer:
    """Return the net with feedback matrices that are learned as w is (Akrout et al. 2019).

    They become equal to w only with weight decay: use ``optax.adamw``, say.

    Args:
        net: as in ``feedback_alignment``.
        where: as in ``feedback_alignment``.
    """
    return _with(net, KolenPollack, where)


def sign_symmetric(net: Layer, *, magnitude: str = FORWARD, where: Where = MATRICES) -> Layer:
    """Return the net with the signs of w in ``backward`` (Liao et al. 2016); params are the net's.

    Args:
        net: as in ``feedback_alignment``.
        magnitude: "uniform" for the signs alone; "forward" for signs with the norm of w.
        where: as in ``feedback_alignment``.
    """
    return _with(net, lambda layer: SignSymmetric(layer, magnitude), where)


def _with(net: Layer, rule: Rule, where: Where) -> Layer:
    """Return the net with the rule, or as it is for a product of data alone, as in attention."""
    if isinstance(net, PartLayer) and net.of_data:
        return net
    return with_rule(net, rule, where)


def is_matrix(leaf: Any) -> bool:
    """Return whether a leaf of params is learned and of rank two or more."""
    return not is_not_learned(leaf) and jnp.ndim(leaf) > 1


def matrices(params: Params) -> list[Array]:
    """Return the params that feedback replaces."""
    return list(filter(is_matrix, jax.tree.leaves(params, is_leaf=is_not_learned)))


def with_matrices(params: Params, others: Sequence[Array]) -> Params:
    """Return params with others in place of their matrices."""
    each = iter(others)
    return jax.tree.map(
        lambda leaf: next(each) if is_matrix(leaf) else leaf, params, is_leaf=is_not_learned
    )


def _glorot(key: Array, w: Array) -> Array:
    outs = w.shape[-1]
    deviation = math.sqrt(2 / (w.size // outs + outs))
    return jax.random.normal(key, w.shape, w.dtype) * jnp.asarray(deviation, w.dtype)


def _some(layer: Wrapper, params: Params) -> list[Array]:
    found = matrices(params)
    if not found:
        raise ValueError(f"{layer}: {layer.layer} has no matrix for feedback to go through")
    return found
