"""Networks in Flax Linen and their rows, by jaxprop and by ``jax.value_and_grad`` alone."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from jax import Array

from jaxprop.bench.case import Case, with_key, without_key
from jaxprop.bench.measure import Function
from jaxprop.bench.networks import Network
from jaxprop.core.layer import Layer
from jaxprop.core.loss import Loss
from jaxprop.core.types import Params, PyTree
from jaxprop.losses import CrossEntropy
from jaxprop.quantity.functions import clipped_grad, kronecker_factors, per_example_sq_norms
from jaxprop.traced.function import function

Data = tuple[Array, Array]


class Mlp(nn.Module):
    """Dense layers with ReLU between them."""

    widths: tuple[int, ...]

    @nn.compact
    def __call__(self, x: Array) -> Array:
        for width in self.widths[:-1]:
            x = nn.relu(nn.Dense(width)(x))
        return nn.Dense(self.widths[-1])(x)


class Cnn(nn.Module):
    """3 x 3 convolutions, each with ReLU and max-pooling after it, and two dense layers."""

    channels: tuple[int, ...]
    features: int

    @nn.compact
    def __call__(self, x: Array) -> Array:
        for channels in self.channels:
            x = nn.relu(nn.Conv(channels, (3, 3))(x))
            x = nn.max_pool(x, (2, 2), strides=(2, 2))
        x = nn.relu(nn.Dense(self.features)(x.reshape(x.shape[0], -1)))
        return nn.Dense(10)(x)


class Block(nn.Module):
    """A pre-norm block of a GPT, as the body of a scan."""

    heads: int

    @nn.compact
    def __call__(self, x: Array, _: None = None) -> tuple[Array, None]:
        features, mask = x.shape[-1], nn.make_causal_mask(x[..., 0])
        y = nn.LayerNorm()(x)
        x = x + nn.MultiHeadDotProductAttention(self.heads)(y, mask=mask)
        y = nn.gelu(nn.Dense(4 * features)(nn.LayerNorm()(x)))
        return x + nn.Dense(features)(y), None


class Gpt(nn.Module):
    """A GPT with learned positions.

    Attributes:
        vocab: the number of tokens.
        features: the width.
        heads: the number of heads.
        layers: the number of blocks.
        scan: whether the blocks are one ``nn.scan``; otherwise they are unrolled.
        remat: whether the backward pass recomputes each block.
    """

    vocab: int
    features: int
    heads: int
    layers: int
    scan: bool
    remat: bool = False

    @nn.compact
    def __call__(self, tokens: Array) -> Array:
        positions = self.param(
            "positions", nn.initializers.normal(0.02), (tokens.shape[1], self.features)
        )
        x = nn.Embed(self.vocab, self.features)(tokens) + positions[None]
        block = nn.remat(Block, prevent_cse=not self.scan) if self.remat else Block
        if self.scan:
            blocks = nn.scan(
                block, variable_axes={"params": 0}, split_rngs={"params": True}, length=self.layers
            )
            x, _ = blocks(self.heads)(x, None)
        else:
            for _ in range(self.layers):
                x, _ = block(self.heads)(x)
        return nn.Dense(self.vocab)(nn.LayerNorm()(x))


class Lstm(nn.Module):
    """An LSTM with ten classes at every step."""

    features: int

    @nn.compact
    def __call__(self, x: Array) -> Array:
        return nn.Dense(10)(nn.RNN(nn.OptimizedLSTMCell(self.features))(x))


class Residual(nn.Module):
    """A residual block: two 3 x 3 convolutions with GroupNorm, and a skip around them."""

    channels: int
    stride: int

    @nn.compact
    def __call__(self, x: Array) -> Array:
        y = nn.Conv(self.channels, (3, 3), self.stride, use_bias=False)(x)
        y = nn.Conv(self.channels, (3, 3), use_bias=False)(nn.relu(nn.GroupNorm(8)(y)))
        if x.shape != y.shape:
            x = nn.Conv(self.channels, (1, 1), self.stride, use_bias=False)(x)
        return nn.relu(x + nn.GroupNorm(8)(y))


class ResNet(nn.Module):
    """A residual network for 32 x 32 images; with four widths, ResNet-18 (He et al. 2016).

    It has GroupNorm in place of BatchNorm, which couples the examples of a batch.
    https://arxiv.org/abs/1512.03385
    """

    widths: tuple[int, ...]

    @nn.compact
    def __call__(self, x: Array) -> Array:
        x = nn.Conv(self.widths[0], (3, 3), use_bias=False)(x)
        x = nn.relu(nn.GroupNorm(8)(x))
        for number, channels in enumerate(self.widths):
            x = Residual(channels, 1 if number == 0 else 2)(x)
            x = Residual(channels, 1)(x)
        return nn.Dense(10)(x.mean((1, 2)))


def classified(*shape: int) -> Data:
    """Return random inputs of this shape, examples on axis 0, and one of ten classes for each."""
    keys = jax.random.split(jax.random.key(0))
    x = jax.random.normal(keys[0], shape, jnp.float32)
    return x, jax.random.randint(keys[1], shape[:1], 0, 10)


def tokens(batch: int, length: int, vocab: int) -> Data:
    """Return random tokens, and the tokens that follow them."""
    drawn = jax.random.randint(jax.random.key(0), (batch, length + 1), 0, vocab, jnp.int32)
    return drawn[:, :-1], drawn[:, 1:]


def sequences(batch: int, length: int, features: int) -> Data:
    """Return random sequences, and one of ten classes for every step."""
    x, _ = classified(batch, length, features)
    return x, jax.random.randint(jax.random.key(1), (batch, length), 0, 10)


def case(
    model: nn.Module, data: Data, hand: Callable[[Layer, Loss], Function], key: bool = False
) -> Case:
    """Return the case of a quantity of the model, against ``jax.value_and_grad`` of its loss.

    Args:
        model: the model, with one input.
        data: x and target.
        hand: makes the function to measure, which takes (params, x, target).
        key: whether that function also takes a key.
    """
    args: tuple[PyTree, ...] = model.init(jax.random.key(2), data[0]), *data

    def make() -> Function:
        return hand(function(model.apply), CrossEntropy())

    def plain() -> Function:
        return jax.value_and_grad(loss_of(model))

    if not key:
        return Case(make, plain, args)
    return Case(lambda: with_key(make()), lambda: without_key(plain()), (*args, jax.random.key(3)))


def loss_of(model: nn.Module) -> Callable[[Params, Array, Array], Array]:
    """Return ``f(params, x, target)``, the model's mean cross-entropy in plain JAX."""

    def loss(params: Params, x: Array, target: Array) -> Array:
        y: Any = model.apply(params, x)
        return optax.softmax_cross_entropy_with_integer_labels(y, target).mean()

    return loss


QUANTITIES: dict[str, Callable[[Layer, Loss], Function]] = {
    "norms": per_example_sq_norms,
    "clipped": functools.partial(clipped_grad, max_norm=1.0),
    "kfac": kronecker_factors,
}
GPT = functools.partial(Gpt, vocab=256, features=256, heads=4, layers=6)
MODELS: dict[str, tuple[nn.Module, Callable[[], Data]]] = {
    "mlp": (Mlp((1024, 1024, 10)), lambda: classified(128, 784)),
    "cnn": (Cnn((64, 96, 128), 256), lambda: classified(64, 28, 28, 3)),
    "gpt": (GPT(scan=False), lambda: tokens(8, 128, 256)),
    "gpt-scan": (GPT(scan=True), lambda: tokens(8, 128, 256)),
    "gpt-remat": (GPT(scan=True, remat=True), lambda: tokens(8, 128, 256)),
    "lstm": (Lstm(256), lambda: sequences(32, 64, 256)),
    "resnet": (ResNet((64, 128, 256, 512)), lambda: classified(16, 32, 32, 3)),
}


def row(network: str, quantity: str) -> Case:
    """Return the case of the row ``linen-network-quantity``."""
    model, data = MODELS[network]
    return case(model, data(), QUANTITIES[quantity], key=quantity == "kfac")


def beside_vmap(network: str) -> Case:
    """Return the case of the row ``linen-network-norms/vmap``, against ``jax.vmap(jax.grad)``."""
    model, data = MODELS[network]

    def vmapped() -> Function:
        loss = loss_of(model)

        def own(params: Params, x: Array, target: Array) -> Array:
            return loss(params, x[None], target[None])

        def norms(params: Params, x: Array, target: Array) -> Array:
            grads = jax.vmap(jax.grad(own), (None, 0, 0))(params, x, target)
            return jax.vmap(optax.tree.norm)(grads) ** 2

        return norms

    return case(model, data(), QUANTITIES["norms"])._replace(auto=vmapped)


def beside_own(network: str, own: Network) -> Case:
    """Return the case of the row ``linen-network-norms/own``, against the same in our layers."""
    net, loss, (ours, *_) = own
    model, data = MODELS[network]
    x, target = data()
    args = (model.init(jax.random.key(2), x), ours), x, target

    def of(layer: Layer, which: int) -> Function:
        norms = per_example_sq_norms(layer, loss)
        return lambda params, x, target: norms(params[which], x, target)

    return Case(lambda: of(function(model.apply), 0), lambda: of(net, 1), args)
