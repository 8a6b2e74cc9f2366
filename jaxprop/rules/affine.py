"""Rules of relevance for layers that are affine in x: dense and convolution layers.

Relevance R is handed back as a cotangent c with R = x c, entry by entry.
"""

from __future__ import annotations

import abc
from collections.abc import Sequence
from typing import Any, ClassVar, TypeAlias

import jax
import jax.numpy as jnp
from jax import Array

from jaxprop.core.arrays import wide
from jaxprop.core.checks import check_number
from jaxprop.core.combinator import Wrapper
from jaxprop.core.describe import shapes
from jaxprop.core.layer import Layer
from jaxprop.core.types import Cotangent, Params, Residuals
from jaxprop.layers import Conv, ConvTranspose, Dense
from jaxprop.rules.feedback import is_matrix
from jaxprop.rules.select import Where, with_rule
from jaxprop.traced.part import PartLayer

Term: TypeAlias = tuple[Params, Array]
AFFINE = (Dense, Conv, ConvTranspose)


def nonzero(z: Array, dtype: Any = None) -> Array:
    """Return z with every entry at least a tiny number away from 0, so that z can divide.

    Args:
        z: an array.
        dtype: a narrower dtype to choose the tiny number for; by default that of z.
    """
    narrow = jnp.finfo(dtype or z.dtype).maxexp < 32  # float16: R / tiny must stay below 65504
    tiny = 2.0**-9 if narrow else 1e-12
    return jnp.where(jnp.abs(z) < tiny, jnp.where(z < 0, -tiny, tiny), z)


class Relevance(Wrapper):
    """A layer y = f(x) that shares out its relevance R_y = y ct among the entries of x.

    The cotangent of x is R_x / x. The gradient of the params is that of f for ct.

    Attributes:
        layer: f.
    """

    is_derivative: ClassVar[bool] = False

    @abc.abstractmethod
    def shared(self, params: Params, x: Array, relevance: Array) -> Array:
        """Return R_x, given R_y."""

    def forward(self, params: Params, x: Array) -> tuple[Array, Residuals]:
        if not hasattr(x, "dtype"):
            raise TypeError(f"{self} shares out the relevance of one x, not of {shapes(x)}")
        y, residuals = self.layer.forward(params, x)
        return y, (x, y, residuals)

    def backward(self, params: Params, residuals: Residuals, ct: Array) -> tuple[Cotangent, Array]:
        x, y, inner = residuals
        d_params, _ = self.layer.backward(params, inner, ct)
        shared = self.shared(params, x, wide(nonzero(y)) * wide(ct))
        most = float(jnp.finfo(x.dtype).max)
        d_x = jnp.clip(shared / wide(nonzero(x)), -most, most)
        return d_params, d_x.astype(x.dtype)

    def inside(self, residuals: Residuals) -> tuple[Layer, Residuals]:
        return self.layer, residuals[2]


class Affine(Relevance):
    """Rules for affine f, from terms f(p_i, x_i) of sum z: R_x = sum_i x_i f(p_i)^T (R_y / z)."""

    epsilon: ClassVar[float] = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.layer, PartLayer):
            self.layer.check_affine(type(self).__name__)

    @abc.abstractmethod
    def groups(self, params: Params, x: Array) -> list[tuple[float, Sequence[Term]]]:
        """Return groups of terms (p_i, x_i), each with its share of the relevance."""

    def shared(self, params: Params, x: Array, relevance: Array) -> Array:
        each = [w * self._by(relevance, terms) for w, terms in self.groups(params, x)]
        return sum(each[1:], each[0])

    def _by(self, relevance: Array, terms: Sequence[Term]) -> Array:
        ys, saved = zip(*(self.layer.forward(*term) for term in terms), strict=True)
        z = nonzero(sum(map(wide, ys[1:]), wide(ys[0])), ys[0].dtype)
        ct = (relevance / (z + jnp.copysign(self.epsilon, z))).astype(ys[0].dtype)
        each = [
            wide(x) * wide(self.layer.backward(p, residuals, ct)[1])
            for (p, x), residuals in zip(terms, saved, strict=True)
        ]
        return sum(each[1:], each[0])


class Epsilon(Affine):
    """The LRP-epsilon rule, R_x = x w^T (R_y / (y + epsilon sign y)).

    Bach et al. 2015, https://doi.org/10.1371/journal.pone.0130140.

    Attributes:
        epsilon: the least divisor; it and the bias absorb their share of the relevance.
    """

    epsilon: float = 1e-6  # pyright: ignore[reportIncompatibleVariableOverride]

    def groups(self, params: Params, x: Array) -> list[tuple[float, Sequence[Term]]]:
        return [(1, [(params, x)])]


class Gamma(Affine):
    """The LRP-gamma rule for x >= 0, R_x = x (w + g w+)^T (R_y / z), z = x (w + g w+) + b + g b+.

    w+ is the positive part of w (Montavon et al. 2019, doi.org/10.1007/978-3-030-28954-6_10).

    Attributes:
        gamma: g.
    """

    gamma: float = 0.25

    def groups(self, params: Params, x: Array) -> list[tuple[float, Sequence[Term]]]:
        def more(w: Array) -> Array:
            return w + jnp.asarray(self.gamma, w.dtype) * jnp.maximum(w, 0)

        return [(1, [(jax.tree.map(more, params), x)])]


class AlphaBeta(Affine):
    """The LRP-alpha-beta rule: a R_y by positive products x w, (1 - a) R_y by negative ones.

    z+ = x+ w+ + x- w- + b+, z- = x+ w- + x- w+ + b- (Bach et al. 2015, as in ``Epsilon``).

    Attributes:
        alpha: a, at least 1.
    """

    alpha: float = 2.0

    def groups(self, params: Params, x: Array) -> list[tuple[float, Sequence[Term]]]:
        above, below = (jax.tree.map(half, params) for half in (_positive, _negative))
        positive = [(above, _positive(x)), (_unbiased(below), _negative(x))]
        if self.alpha == 1:
            return [(1, positive)]
        negative = [(below, _positive(x)), (_unbiased(above), _negative(x))]
        return [(self.alpha, positive), (1 - self.alpha, negative)]


class ZBox(Affine):
    """The z-box rule, R_x = (x w - l w+ - h w-)^T (R_y / z), for x in [l, h], such as pixels.

    z is the sum of the same terms, in which the bias cancels
    (Montavon et al. 2017, doi.org/10.1016/j.patcog.2016.11.008).

    Attributes:
        low: l, the smallest value that an entry of x can have.
        high: h, the largest.
    """

    low: float = 0.0
    high: float = 1.0

    def groups(self, params: Params, x: Array) -> list[tuple[float, Sequence[Term]]]:
        above, below = (jax.tree.map(half, params) for half in (_positive, _negative))
        bounds = (above, self.low), (below, self.high)
        less = [(jax.tree.map(jnp.negative, p), jnp.full_like(x, bound)) for p, bound in bounds]
        return [(1, [(params, x), *less])]


class Flat(Affine):
    """The flat rule, R_x = 1^T (R_y / z), the same for each entry of x that y depends on.

    It shows where, and nothing about the features there (Lapuschkin et al. 2019,
    https://doi.org/10.1038/s41467-019-08987-4).
    """

    def groups(self, params: Params, x: Array) -> list[tuple[float, Sequence[Term]]]:
        ones = jax.tree.map(lambda w: jnp.full_like(w, float(is_matrix(w))), params)
        return [(1, [(ones, jnp.ones_like(x))])]


def lrp_epsilon(net: Layer, *, epsilon: float = 1e-6, where: Where = AFFINE) -> Layer:
    """Return the net with the LRP-epsilon rule for its affine layers.

    Args:
        net: a layer or a network.
        epsilon: a number, 0 or more.
        where: which layers; by default all dense and convolution ones.
    """
    check_number("lrp_epsilon: epsilon", epsilon, finite=True)
    return with_rule(net, lambda layer: Epsilon(layer, epsilon), where)


def lrp_gamma(net: Layer, *, gamma: float = 0.25, where: Where = AFFINE) -> Layer:
    """Return the net with the LRP-gamma rule for its affine layers, for inputs from a ReLU.

    Args:
        net: a layer or a network.
        gamma: how much more positive weights count; 0 is LRP-0.
        where: as in ``lrp_epsilon``.
    """
    check_number("lrp_gamma: gamma", gamma, finite=True)
    return with_rule(net, lambda layer: Gamma(layer, gamma), where)


def lrp_alpha_beta(net: Layer, *, alpha: float = 2.0, where: Where = AFFINE) -> Layer:
    """Return the net with the LRP-alpha-beta rule for its affine layers, with beta = alpha - 1.

    The relevance of an output is conserved if it has products of both signs. If all are positive
    it is multiplied by alpha, and if all are negative by 1 - alpha.

    Args:
        net: a layer or a network.
        alpha: at least 1; 1 is the z+ rule.
        where: as in ``lrp_epsilon``.

    Raises:
        ValueError: for an alpha below 1.
    """
    check_number("lrp_alpha_beta: alpha", alpha, finite=True)
    if alpha < 1:
        raise ValueError(f"lrp_alpha_beta: alpha is at least 1, not {alpha}")
    return with_rule(net, lambda layer: AlphaBeta(layer, alpha), where)


def lrp_z_box(net: Layer, *, low: float = 0.0, high: float = 1.0, where: Where = AFFINE) -> Layer:
    """Return the net with the z-box rule, for the first layer of a net that takes pixels.

    Args:
        net: a layer or a network.
        low: the smallest value that an entry of x can have.
        high: the largest.
        where: as in ``lrp_epsilon``.

    Raises:
        ValueError: unless ``low`` is below ``high``.
    """
    for name, bound in (("low", low), ("high", high)):
        check_number(f"lrp_z_box: {name}", bound, finite=True, signed=True)
    if low >= high:
        raise ValueError(f"lrp_z_box: low is below high, not {low} and {high}")
    return with_rule(net, lambda layer: ZBox(layer, low, high), where)


def lrp_flat(net: Layer, *, where: Where = AFFINE) -> Layer:
    """Return the net with the flat rule for its affine layers.

    Args:
        net: a layer or a network.
        where: as in ``lrp_epsilon``.
    """
    return with_rule(net, Flat, where)


def _positive(z: Array) -> Array:
    return jnp.maximum(z, 0)


def _negative(z: Array) -> Array:
    return jnp.minimum(z, 0)


def _unbiased(params: Params) -> Params:
    return jax.tree.map(lambda w: w if is_matrix(w) else jnp.zeros_like(w), params)
