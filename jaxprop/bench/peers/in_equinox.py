"""The networks in Equinox, as its users write them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from equinox import nn
from jax import Array

from jaxprop.bench.networks import Network
from jaxprop.bench.peers import ours
from jaxprop.bench.peers.in_jax import InJax
from jaxprop.core.types import Params, PyTree

KEY = jax.random.key(0)  # draws initial params, which ours then replace


class Block(eqx.Module):
    """A pre-norm block with causal attention, for one sequence."""

    norm_1: nn.LayerNorm
    attention: nn.MultiheadAttention
    norm_2: nn.LayerNorm
    up: nn.Linear
    down: nn.Linear

    def __init__(self, features: int) -> None:
        biases = dict.fromkeys(("use_query_bias", "use_key_bias", "use_value_bias"), True)
        self.norm_1, self.norm_2 = nn.LayerNorm(features), nn.LayerNorm(features)
        self.attention = nn.MultiheadAttention(
            ours.HEADS, features, use_output_bias=True, **biases, key=KEY
        )
        self.up = nn.Linear(features, 4 * features, key=KEY)
        self.down = nn.Linear(4 * features, features, key=KEY)

    def __call__(self, x: Array) -> Array:
        y, mask = jax.vmap(self.norm_1)(x), jnp.tril(jnp.ones((len(x), len(x)), bool))
        x = x + self.attention(y, y, y, mask)
        y = jax.nn.gelu(jax.vmap(self.up)(jax.vmap(self.norm_2)(x)))
        return x + jax.vmap(self.down)(y)


class Gpt(eqx.Module):
    """A GPT with learned positions, for one sequence, whose table also computes the logits."""

    embedding: nn.Embedding
    positions: Array
    blocks: list[Block]
    norm: nn.LayerNorm

    def __init__(self, vocab: int, length: int, features: int, blocks: int) -> None:
        self.embedding = nn.Embedding(vocab, features, key=KEY)
        self.positions = jnp.zeros((length, features))
        self.blocks = [Block(features) for _ in range(blocks)]
        self.norm = nn.LayerNorm(features)

    def __call__(self, tokens: Array) -> Array:
        x = jax.vmap(self.embedding)(tokens) + self.positions
        for block in self.blocks:
            x = block(x)
        return jax.vmap(self.norm)(x) @ self.embedding.weight.T


class Lstm(eqx.Module):
    """An LSTM with logits at every step, for one sequence."""

    cell: nn.LSTMCell
    head: nn.Linear

    def __init__(self, inputs: int, features: int, classes: int) -> None:
        self.cell = nn.LSTMCell(inputs, features, key=KEY)
        self.head = nn.Linear(features, classes, key=KEY)

    def __call__(self, x: Array) -> Array:
        def step(state: tuple[Array, Array], x: Array) -> tuple[tuple[Array, Array], Array]:
            state = self.cell(x, state)
            return state, state[0]

        zeros = jnp.zeros(self.cell.hidden_size)
        _, h = jax.lax.scan(step, (zeros, zeros), x)
        return jax.vmap(self.head)(h)


class ThreeC3d(eqx.Module):
    """3C3D, for one image with the channels first."""

    layers: nn.Sequential

    def __init__(self) -> None:
        layers, before = [], 3
        for channels, size, padding in ((64, 5, 0), (96, 3, 0), (128, 3, 1)):
            conv = nn.Conv2d(before, channels, size, padding=padding, key=KEY)
            layers += [conv, nn.Lambda(jax.nn.relu), nn.MaxPool2d(3, 2, padding=((0, 1), (0, 1)))]
            before = channels
        layers += [nn.Lambda(jnp.ravel)]
        for inputs, outputs in ((1152, 512), (512, 256), (256, 10)):
            layers += [nn.Linear(inputs, outputs, key=KEY), nn.Lambda(jax.nn.relu)]
        self.layers = nn.Sequential(layers[:-1])

    def __call__(self, x: Array) -> Array:
        return self.layers(x)


def peer(name: str, network: Network) -> InJax:
    """Return one of the networks in Equinox.

    Args:
        name: a name in ``ours.FULL``.
        network: ours, of any size.
    """
    params, x, target = network[2]
    model, arrays = MODELS[name](params)
    template, static = eqx.partition(model, eqx.is_inexact_array)
    structure = jax.tree.structure(template)

    def convert(params: Params) -> PyTree:
        return jax.tree.unflatten(structure, arrays(params))

    def loss(params: PyTree, x: Array, target: Array) -> Array:
        y = jax.vmap(eqx.combine(params, static))(x)
        return optax.softmax_cross_entropy_with_integer_labels(y, target).mean()

    if name == "3c3d":
        x = jnp.moveaxis(x, -1, 1)
    return InJax(loss, convert, convert(params), x, target)


Arrays = Callable[[Params], list[Array]]


def _mlp(params: Params) -> tuple[Any, Arrays]:
    (inputs, width), *_ = (layer.w.shape for layer in ours.layers(params))
    classes = len(ours.layers(params)[-1].b)
    model = nn.MLP(inputs, classes, width, len(ours.layers(params)) - 1, key=KEY)
    return model, lambda params: [a for w, b in ours.layers(params) for a in (w.T, b)]


def _three_c3d(params: Params) -> tuple[Any, Arrays]:
    def arrays(params: Params) -> list[Array]:
        each = ours.images_first(params)
        return [a for w, b in each for a in (w, b[:, None, None] if w.ndim > 2 else b)]

    return ThreeC3d(), arrays


def _lstm(params: Params) -> tuple[Any, Arrays]:
    cell, head = params
    model = Lstm(cell.w.shape[0], cell.u.shape[0], len(head.b))
    return model, lambda params: [params[0].w.T, params[0].u.T, params[0].b, *_linear(params[1])]


def _gpt(params: Params) -> tuple[Any, Arrays]:
    def arrays(params: Params) -> list[Array]:
        net = ours.gpt(params)
        blocks = [array for block in net.blocks for array in _block(block)]
        return [net.table, net.positions, *blocks, *net.norm]

    net = ours.gpt(params)
    length, features = net.positions.shape
    return Gpt(len(net.table), length, features, len(net.blocks)), arrays


def _block(block: ours.Block) -> list[Array]:
    attention = [array for layer in (*block.qkv, block.out) for array in _linear(layer)]
    dense = [array for layer in (block.up, block.down) for array in _linear(layer)]
    return [*block.norm_1, *attention, *block.norm_2, *dense]


def _linear(layer: ours.Linear) -> list[Array]:
    return [layer.w.T, layer.b]


MODELS = {"mlp": _mlp, "gpt": _gpt, "lstm": _lstm, "3c3d": _three_c3d}
