"""The networks that are measured, each with a loss and random data."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxprop.combinators.chain import chain
from jaxprop.core.layer import Layer
from jaxprop.core.loss import Loss
from jaxprop.core.types import Params, PyTree
from jaxprop.layers import Conv, Dense, Flatten, Lstm, MaxPool, Relu
from jaxprop.layers.attention import Save
from jaxprop.losses import CrossEntropy
from jaxprop.models import Gpt2Config, gpt2, images

Network = tuple[Layer, Loss, tuple[Params, PyTree, PyTree]]
"""A net, a loss, and (params, x, target)."""


def gpt(*, scan: bool, recomputing: bool = False, batch: int = 8, vocab: int = 128) -> Network:
    """Return a GPT with six blocks, 256 features and 4 heads, on 128 tokens.

    Args:
        scan: whether the blocks are one ``repeat``.
        recomputing: whether a block saves only its input and recomputes the rest for backward.
        batch: the number of examples.
        vocab: the number of tokens.
    """
    config = Gpt2Config(vocab=vocab, length=128, features=256, heads=4, layers=6)
    net, keys = (
        gpt2(config, scan=scan, recomputing=recomputing),
        jax.random.split(jax.random.key(0)),
    )
    tokens = jax.random.randint(keys[0], (batch, config.length + 1), 0, config.vocab, jnp.int32)
    x, target = tokens[:, :-1], tokens[:, 1:]
    return net, CrossEntropy(), (net.init(keys[1], x), x, target)


def gpt2_small(*, batch: int, length: int = 512, save: Save = "weights") -> Network:
    """Return GPT-2 with 124 M params, its blocks in one scan.

    Args:
        batch: the number of examples.
        length: the number of tokens in each.
        save: what attention saves for backward.
    """
    config = Gpt2Config(vocab=50257, length=length, features=768, heads=12, layers=12)
    net, keys = gpt2(config, scan=True, save=save), jax.random.split(jax.random.key(0))
    tokens = jax.random.randint(keys[0], (batch, config.length + 1), 0, config.vocab, jnp.int32)
    x, target = tokens[:, :-1], tokens[:, 1:]
    return net, CrossEntropy(), (net.init(keys[1], x), x, target)


def lstm(*, batch: int, length: int, features: int) -> Network:
    """Return an LSTM with ten classes at every step.

    Args:
        batch: the number of examples.
        length: the number of steps.
        features: the width of the inputs and of the state.
    """
    net, keys = chain(Lstm(features), Dense(10)), jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (batch, length, features), jnp.float32)
    target = jax.random.randint(keys[1], (batch, length), 0, 10)
    return net, CrossEntropy(), (net.init(keys[2], x), x, target)


def mlp(*, batch: int) -> Network:
    """Return dense layers of 1024, 1024 and 10 features with ReLU between, on 784 inputs."""
    net = chain(Dense(1024), Relu(), Dense(1024), Relu(), Dense(10))
    return _classified(net, batch, 784)


def small_mlp(*, batch: int) -> Network:
    """Return dense layers of 256, 256 and 10 features with ReLU between, on 784 inputs."""
    net = chain(Dense(256), Relu(), Dense(256), Relu(), Dense(10))
    return _classified(net, batch, 784)


def cnn(*, batch: int) -> Network:
    """Return 3 x 3 convolutions of 64, 96 and 128 channels with max-pooling, on 28 x 28 images."""
    layers: list[Layer] = []
    for channels in (64, 96, 128):
        layers += [Conv(channels, (3, 3), padding="SAME"), Relu(), MaxPool((2, 2))]
    net = chain(*layers, Flatten(), Dense(256), Relu(), Dense(10))
    return _classified(net, batch, 28, 28, 3)


def three_c3d(batch: int) -> Network:
    """Return 3C3D on random images of CIFAR-10's size."""
    return _on_random_images(images.three_c3d(), batch, classes=10)


def all_cnn_c(batch: int) -> Network:
    """Return All-CNN-C on random images of CIFAR-100's size."""
    return _on_random_images(images.all_cnn_c(), batch, classes=100)


def _on_random_images(net: Layer, batch: int, classes: int) -> Network:
    return _classified(net, batch, 32, 32, 3, classes=classes)


def _classified(net: Layer, batch: int, *shape: int, classes: int = 10) -> Network:
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (batch, *shape), jnp.float32)
    target = jax.random.randint(keys[1], (batch,), 0, classes)
    return net, CrossEntropy(), (net.init(keys[2], x), x, target)
