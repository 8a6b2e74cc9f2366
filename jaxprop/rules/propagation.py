"""Layer-wise relevance propagation: the share of each entry of x in an output.

Relevance R is handed back as a cotangent c with R = x c, entry by entry. A layer that keeps its
derivative thus gets the gradient times the input as its R, which is right for anything linear in x
without a bias: layers that sum, average, pick or reorder entries need no rule. The rules for the
other layers are here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import jax.numpy as jnp
from jax import Array

from jaxprop.core.arrays import aligned, wide
from jaxprop.core.combinator import Wrapper, seen_through
from jaxprop.core.layer import Layer
from jaxprop.core.types import Cotangent, Params, PyTree, Residuals
from jaxprop.layers import (
    Attention,
    AvgPool,
    BatchNorm,
    Dropout,
    Embedding,
    Flatten,
    GlobalAvgPool,
    Item,
    LayerNorm,
    MaxPool,
    Moveaxis,
    Pad,
    Positions,
    Reshape,
    RMSNorm,
    Rotary,
    SinusoidalPositions,
    Take,
)
from jaxprop.layers.activations import Elementwise
from jaxprop.layers.heads import Inputs
from jaxprop.rules.affine import AFFINE, Epsilon, Relevance
from jaxprop.rules.select import Where, with_rules
from jaxprop.traced.ruled import Rule

BY_DERIVATIVE = (
    *(AvgPool, BatchNorm, Dropout, Embedding, Flatten, GlobalAvgPool, Item, MaxPool, Moveaxis),
    *(Pad, Positions, Reshape, Rotary, SinusoidalPositions, Take),
)


class Same(Relevance):
    """The rule for activations y_i = f(x_i): R_x = R_y, each entry passes its relevance on.

    AttnLRP, Achtibat et al. 2024, https://arxiv.org/abs/2402.05602.
    """

    def shared(self, params: Params, x: Array, relevance: Array) -> Array:
        return relevance


class Steady(Wrapper):
    """A normalization y = (x - mean) rstd scale + bias, with rstd held constant.

    So R_x = R_y, except for what the mean and the bias absorb (AttnLRP, as in ``Same``).

    Attributes:
        layer: a ``LayerNorm`` or an ``RMSNorm``.
    """

    is_derivative: ClassVar[bool] = False

    def forward(self, params: Params, x: Array) -> tuple[Array, Residuals]:
        return self.layer.forward(params, x)

    def backward(self, params: Params, residuals: Residuals, ct: Array) -> tuple[Cotangent, Array]:
        d_params, _ = self.layer.backward(params, residuals, ct)
        scaled = wide(ct) * aligned(wide(params.scale), ct)
        if isinstance(seen_through(self.layer), LayerNorm):
            scaled = scaled - jnp.mean(scaled, -1, keepdims=True)
        return d_params, (residuals[-1] * scaled).astype(ct.dtype)


class Halved(Wrapper):
    """Attention in which each factor of its two products gets half of the relevance.

    With p = softmax(q k^T scale) and y = p v, the cotangents of v are halved, and those of q and k,
    which come through both products, are quartered; softmax keeps its derivative (AttnLRP, as in
    ``Same``). The share of v is conserved; softmax absorbs some of the rest.

    Attributes:
        layer: an ``Attention``.
    """

    is_derivative: ClassVar[bool] = False

    def forward(self, params: Params, x: PyTree) -> tuple[PyTree, Residuals]:
        return self.layer.forward(params, x)

    def backward(self, params: Params, residuals: Residuals, ct: Array) -> tuple[Cotangent, PyTree]:
        d_params, d_x = self.layer.backward(params, residuals, ct)
        each, d = Inputs.of(d_x), ct.shape[-1]
        if each.memory is None:
            of_v = (each.x.shape[-1] - d) // 2
            halved = each._replace(x=_halved(each.x, of_v))
        else:
            memory = _halved(each.memory, each.memory.shape[-1] // 2)
            halved = each._replace(x=each.x / 4, memory=memory)
        if each.bias is not None:
            halved = halved._replace(bias=each.bias / 2)
        return d_params, halved.like(d_x)


def lrp(net: Layer, rules: Mapping[Where, Rule] | None = None) -> Layer:
    """Return the net with a rule of relevance for every layer, for ``jp.rules.relevance``.

    By default affine layers have LRP-epsilon, activations pass relevance on unchanged,
    ``LayerNorm`` and ``RMSNorm`` are treated as linear, and attention has the rules of AttnLRP.
    Pooling, dropout, positions, a batch norm in inference mode and layers that reorder entries keep
    their derivative, which is the rule for a linear layer.

    Args:
        net: the network.
        rules: rules by kind of layer or by path. A rule is any function of a layer, such as those
            of ``jp.rules``. The first one that matches a layer applies, before the default rules.

    Raises:
        TypeError: for a layer without a rule, such as a recurrent one.

    Example:
        A composite for a net of pixels, as in Montavon et al. 2019:

        >>> import functools, jax, jax.numpy as jnp, jaxprop as jp
        >>> net = jp.chain(jp.Dense(8), jp.Relu(), jp.Dense(8), jp.Relu(), jp.Dense(3))
        >>> params = net.init(jax.random.key(0), jnp.ones((1, 4)))
        >>> net = jp.rules.lrp(net, {(0,): jp.rules.lrp_z_box, jp.Dense: jp.rules.lrp_gamma})
        >>> x, target = jnp.array([[0.0, 0.3, 0.7, 1.0]]), jnp.array([2])
        >>> shares = jp.rules.relevance(net)(params, x, target)
        >>> bool(jnp.allclose(shares.sum(), net(params, x)[0, 2], rtol=1e-5))
        True
    """
    return with_rules(net, rules or {}, _by_default)


def _by_default(layer: Layer) -> Layer:
    inner = seen_through(layer)
    if layer.batch_coupled:
        raise ValueError(f"lrp: {layer} is in training; take jp.rules.lrp(jp.inference_mode(net))")
    if isinstance(inner, BY_DERIVATIVE):
        return layer
    for kinds, rule in DEFAULTS.items():
        if isinstance(inner, kinds):
            return rule(layer)
    raise TypeError(
        f"lrp knows no rule for {layer}; give one, such as rules={{{type(inner).__name__}: "
        "functools.partial(jp.rules.scale_gradient, scale=1.0)}, which is the derivative"
    )


DEFAULTS: dict[tuple[type[Layer], ...], Rule] = {
    AFFINE: Epsilon,
    (Elementwise,): Same,
    (LayerNorm, RMSNorm): Steady,
    (Attention,): Halved,
}


def _halved(d: Array, of_v: int) -> Array:
    """Return a cotangent of q, k and v: the last ``of_v`` entries halved, the others quartered."""
    return jnp.concatenate([d[..., :-of_v] / 4, d[..., -of_v:] / 2], -1)
