"""The networks in Flax Linen, as its users write them, with their loss in plain JAX."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from jaxprop.bench.linen import Mlp, loss_of
from jaxprop.bench.networks import Network
from jaxprop.bench.peers import ours
from jaxprop.bench.peers.in_jax import InJax
from jaxprop.core.types import Params, PyTree


class Block(nn.Module):
    """A pre-norm block with causal attention."""

    @nn.compact
    def __call__(self, x: Array) -> Array:
        features, mask = x.shape[-1], nn.make_causal_mask(x[..., 0])
        y = nn.LayerNorm(epsilon=1e-5)(x)
        x = x + nn.MultiHeadDotProductAttention(ours.HEADS)(y, mask=mask)
        y = nn.gelu(nn.Dense(4 * features)(nn.LayerNorm(epsilon=1e-5)(x)))
        return x + nn.Dense(features)(y)


class Gpt(nn.Module):
    """A GPT with learned positions, whose table also computes the logits.

    Attributes:
        vocab: the number of tokens.
        features: the width.
        blocks: the number of blocks.
    """

    vocab: int
    features: int
    blocks: int

    @nn.compact
    def __call__(self, tokens: Array) -> Array:
        embed, normal = nn.Embed(self.vocab, self.features), nn.initializers.normal(0.02)
        x = embed(tokens)
        x = x + self.param("positions", normal, x.shape[1:])[None]
        for _ in range(self.blocks):
            x = Block()(x)
        return embed.attend(nn.LayerNorm(epsilon=1e-5)(x))


class Lstm(nn.Module):
    """An LSTM with logits at every step."""

    features: int
    classes: int

    @nn.compact
    def __call__(self, x: Array) -> Array:
        return nn.Dense(self.classes)(nn.RNN(nn.OptimizedLSTMCell(self.features))(x))


class ThreeC3d(nn.Module):
    """3C3D: three convolutions with max-pooling, and three dense layers."""

    @nn.compact
    def __call__(self, x: Array) -> Array:
        for channels, size, padding in ((64, 5, "VALID"), (96, 3, "VALID"), (128, 3, "SAME")):
            x = nn.relu(nn.Conv(channels, (size, size), padding=padding)(x))
            x = nn.max_pool(x, (3, 3), strides=(2, 2), padding="SAME")
        x = x.reshape(x.shape[0], -1)
        for features in (512, 256):
            x = nn.relu(nn.Dense(features)(x))
        return nn.Dense(10)(x)


def peer(name: str, network: Network) -> InJax:
    """Return one of the networks in Flax.

    Args:
        name: a name in ``ours.FULL``.
        network: ours, of any size.
    """
    params, x, target = network[2]
    model, convert = MODELS[name](params)
    shapes = jax.eval_shape(model.init, jax.random.key(0), x)
    theirs = jax.eval_shape(convert, params)
    assert jax.tree.structure(theirs) == jax.tree.structure(shapes)
    return InJax(loss_of(model), convert, convert(params), x, target)


def _mlp(params: Params) -> tuple[nn.Module, Callable[[Params], PyTree]]:
    def convert(params: Params) -> PyTree:
        each = enumerate(ours.layers(params))
        return {"params": {f"Dense_{index}": _dense(layer) for index, layer in each}}

    return Mlp(tuple(len(layer.b) for layer in ours.layers(params))), convert


def _three_c3d(params: Params) -> tuple[nn.Module, Callable[[Params], PyTree]]:
    names = [*(f"Conv_{index}" for index in range(3)), *(f"Dense_{index}" for index in range(3))]

    def convert(params: Params) -> PyTree:
        each = zip(names, ours.layers(params), strict=True)
        return {"params": {name: _dense(layer) for name, layer in each}}

    return ThreeC3d(), convert


def _lstm(params: Params) -> tuple[nn.Module, Callable[[Params], PyTree]]:
    def convert(params: Params) -> PyTree:
        cell, head = params
        gates = [jnp.split(part, 4, axis=-1) for part in cell[:3]]
        each = {}
        for gate, w, u, b in zip("ifgo", *gates, strict=True):
            each |= {f"i{gate}": {"kernel": w}, f"h{gate}": {"kernel": u, "bias": b}}
        return {"params": {"OptimizedLSTMCell_0": each, "Dense_0": _dense(head)}}

    cell, head = params
    return Lstm(cell.u.shape[0], len(head.b)), convert


def _gpt(params: Params) -> tuple[nn.Module, Callable[[Params], PyTree]]:
    def convert(params: Params) -> PyTree:
        net = ours.gpt(params)
        blocks = {f"Block_{index}": _block(block) for index, block in enumerate(net.blocks)}
        table, norm = {"embedding": net.table}, _norm(net.norm)
        own = {"Embed_0": table, "positions": net.positions, "LayerNorm_0": norm}
        return {"params": own | blocks}

    net = ours.gpt(params)
    vocab, features = net.table.shape
    return Gpt(vocab, features, len(net.blocks)), convert


def _block(block: ours.Block) -> PyTree:
    def of_heads(layer: ours.Linear) -> PyTree:
        w = layer.w.reshape(layer.w.shape[0], ours.HEADS, -1)
        return {"kernel": w, "bias": layer.b.reshape(ours.HEADS, -1)}

    q, k, v = map(of_heads, block.qkv)
    out = {"kernel": block.out.w.reshape(ours.HEADS, -1, block.out.w.shape[1]), "bias": block.out.b}
    return {
        "LayerNorm_0": _norm(block.norm_1),
        "MultiHeadDotProductAttention_0": {"query": q, "key": k, "value": v, "out": out},
        "LayerNorm_1": _norm(block.norm_2),
        "Dense_0": _dense(block.up),
        "Dense_1": _dense(block.down),
    }


def _dense(layer: ours.Linear) -> PyTree:
    return {"kernel": layer.w, "bias": layer.b}


def _norm(layer: ours.Linear) -> PyTree:
    return {"scale": layer.w, "bias": layer.b}


MODELS = {"mlp": _mlp, "gpt": _gpt, "lstm": _lstm, "3c3d": _three_c3d}
