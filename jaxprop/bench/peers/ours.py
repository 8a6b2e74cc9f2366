"""The networks of the rows, jaxprop's functions on them, and their params in peers' layouts."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from jaxprop.bench import networks
from jaxprop.bench.measure import Function
from jaxprop.bench.networks import Network
from jaxprop.core.types import Params, PyTree
from jaxprop.quantity.functions import clipped_grad, per_example_sq_norms
from jaxprop.training.gradients import value_and_grad

HEADS = 4
PARTS = 4  # micro-batches

FULL: dict[str, Callable[[], Network]] = {
    "mlp": lambda: networks.mlp(batch=128),
    "gpt": lambda: networks.gpt(scan=False),
    "lstm": lambda: networks.lstm(batch=32, length=64, features=256),
    "3c3d": lambda: networks.three_c3d(batch=64),
}
"""The networks as they are measured: those of the rows mlp-2x1024, gpt, lstm and 3c3d."""


class Linear(NamedTuple):
    """The params of a dense layer, a convolution or a normalization, or their cotangents.

    Attributes:
        w: (I, O); (*window, C, O) for a convolution, and (C,) for a normalization.
        b: (O,).
    """

    w: Array
    b: Array


def layers(params: Params) -> list[Linear]:
    """Return the layers of a chain that have params, in order."""
    return [Linear(layer.w, layer.b) for layer in params if layer]


class Block(NamedTuple):
    """The params of a block of the GPT, or their cotangents.

    Attributes:
        norm_1: the LayerNorm before attention.
        qkv: the projections of queries, keys and values.
        out: the projection of attention's output.
        norm_2: the LayerNorm before the dense layers.
        up: the dense layer to more features.
        down: the dense layer back.
    """

    norm_1: Linear
    qkv: tuple[Linear, Linear, Linear]
    out: Linear
    norm_2: Linear
    up: Linear
    down: Linear


class Gpt(NamedTuple):
    """The params of the GPT, or their cotangents.

    Attributes:
        table: (V, D), for both tokens and logits.
        positions: (T, D).
        blocks: the blocks.
        norm: the last LayerNorm.
    """

    table: Array
    positions: Array
    blocks: list[Block]
    norm: Linear


def gpt(params: Params) -> Gpt:
    """Return the params of ``networks.gpt`` by their names."""
    table, (positions, *blocks, norm) = params
    return Gpt(table, positions, list(map(_block, blocks)), Linear(*norm))


def _block(params: Params) -> Block:
    (norm_1, qkv, _, out), (norm_2, up, _, down) = params
    parts = zip(jnp.split(qkv.w, 3, axis=1), jnp.split(qkv.b, 3), strict=True)
    q, k, v = (Linear(w, b) for w, b in parts)
    return Block(
        Linear(*norm_1), (q, k, v), Linear(*out), Linear(*norm_2), Linear(*up), Linear(*down)
    )


def channels_first(w: Array) -> Array:
    """Return a convolution's weights as (O, C, *window)."""
    return jnp.moveaxis(w, (-1, -2), (0, 1))


def of_flattened(w: Array, channels: int) -> Array:
    """Return weights (I, O) on a flattened image, moved from channels last to channels first."""
    side = round((w.shape[0] // channels) ** 0.5)
    return jnp.moveaxis(w.reshape(side, side, channels, -1), 2, 0).reshape(w.shape)


def images_first(params: Params) -> Iterator[tuple[Array, Array]]:
    """Yield each layer of 3C3D as weights (O, ...) and a bias, for a peer with channels first."""
    channels = 0
    for w, b in layers(params):
        if w.ndim > 2:
            channels = w.shape[-1]
            yield channels_first(w), b
        else:
            yield (of_flattened(w, channels) if channels else w).T, b
            channels = 0


def gradient(network: Network) -> Function:
    """Return the function for the value and the gradient, by hand."""
    net, loss, _ = network
    return value_and_grad(net, loss)


def accumulated(network: Network) -> Function:
    """Return the same function in micro-batches, one after the other."""
    net, loss, _ = network
    return value_and_grad(net, loss, micro_batches=PARTS)


def norms(network: Network) -> Function:
    """Return the function for the squared norm of each example's gradient."""
    net, loss, _ = network
    return per_example_sq_norms(net, loss)


def bound(network: Network) -> float:
    """Return the median norm of the examples' gradients, so that half of them are larger."""
    return float(jnp.sqrt(jnp.median(jax.jit(norms(network))(*network[2]))))


def clipped(network: Network, max_norm: float) -> Function:
    """Return the function for the value and the mean of the clipped gradients."""
    net, loss, _ = network
    return clipped_grad(net, loss, max_norm=max_norm)


def of_grads(convert: Callable[[Any], PyTree]) -> Callable[[tuple[Array, Params]], PyTree]:
    """Return a conversion of (value, gradient) that applies ``convert`` to the gradient."""
    return functools.partial(_with_value, convert)


def _with_value(convert: Callable[[Any], PyTree], result: tuple[Array, Params]) -> PyTree:
    value, grads = result
    return {"value": value, "grads": convert(grads)}
