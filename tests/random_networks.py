"""Random networks, each with a batch and a loss that fit it, all drawn from the case's number."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from table import ACTIVATIONS, Row, at

import jaxprop as jp
from jaxprop.core.arrays import rounded
from jaxprop.core.combinator import holds_stacks
from jaxprop.core.side_inputs import takes_side_input
from jaxprop.core.tree import learned

VOCAB = 7
RECURRENT = (jp.Rnn, jp.Lstm, jp.Gru)
DTYPES = {  # the dtype of params and x, and the dtype that the net is cast to
    "float64": (jnp.float64, None),
    "float32": (jnp.float32, None),
    "bfloat16": (jnp.bfloat16, None),
    "float16": (jnp.float16, None),
    "cast to bfloat16": (jnp.float32, jnp.bfloat16),
    "cast to float16": (jnp.float32, jnp.float16),
}


class Case(NamedTuple):
    """A network and its arguments.

    Attributes:
        net: the network, as it computes.
        exact: the same network without a ``jp.cast``, for the oracle in float64.
        loss: a loss that fits its output.
        params: of the dtype that was drawn, as are x and the floating leaves of the target.
        x: the batch.
        target: for the loss.
        given: those of key, mask, weights and divisor that were drawn.
        narrowest: the narrowest dtype that anything is computed in.
    """

    net: jp.Layer
    exact: jp.Layer
    loss: jp.Loss
    params: Any
    x: Any
    target: Any
    given: dict[str, Any]
    narrowest: Any


def draw_case(rng: np.random.Generator, dtype: str) -> Case:
    """Return a case of this dtype."""
    shape = draw_shape(rng)
    net = draw_network(rng, shape)
    floating, narrow = DTYPES[dtype]
    ids = len(shape) == 2 and _takes_ids(net)
    x = rng.integers(-1, VOCAB, shape) if ids else rng.normal(size=shape)
    params, x = at(Row(net, x), floating)
    params = rounded(params, floating) if ids else params  # for ids, init uses the default dtype
    y, _ = jax.eval_shape(net.forward, params, x)
    loss, target = draw_target(rng, y.shape)
    computing = net if narrow is None else jp.cast(net, narrow)
    given = draw_given(rng, net, x)
    target = jax.tree.map(jnp.asarray, rounded(target, floating))
    return Case(computing, net, loss, params, x, target, given, narrow or floating)


def draw_shape(rng: np.random.Generator) -> tuple[int, ...]:
    """Return the shape of a batch of vectors (or ids), sequences or images; any size may be 1."""
    examples = int(rng.choice([1, 2, 3, 4, 6], p=[0.15, 0.25, 0.1, 0.3, 0.2]))
    rank = int(rng.choice([1, 2, 3], p=[0.35, 0.4, 0.25]))
    return (examples, *(_size(rng, 5) for _ in range(rank)))


def draw_network(rng: np.random.Generator, shape: tuple[int, ...]) -> jp.Layer:
    """Return a chain of layers that fits x of this shape, integers if it starts with a table."""
    if len(shape) == 2 and rng.random() < 0.5:
        table = jp.Embedding(VOCAB, _size(rng, 4))
        inside = (*shape, table.features)
        if rng.random() < 0.5:
            return jp.tied(table, _block(rng, inside, depth=2))
        layers, shape = [table], inside
    else:
        layers = []
    params: list[Any] = [_params(table, shape) for table in layers]
    for _ in range(rng.integers(1, 5)):
        layers.append(_layer(rng, shape, depth=2))
        params.append(_params(layers[-1], shape))
        shape = shape_after(layers[-1], shape)
    if rng.random() < 0.6 or not jax.tree.leaves(learned(params)):
        layers.append(jp.Dense(_size(rng, 4)))
    return jp.chain(*layers)


def shape_after(layer: jp.Layer, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape of y for x of this shape."""
    x = jax.ShapeDtypeStruct(shape, jnp.float64)
    return jax.eval_shape(layer.forward, _params(layer, shape), x)[0].shape


def draw_target(rng: np.random.Generator, shape: tuple[int, ...]) -> tuple[jp.Loss, Any]:
    """Return a loss and a target for y of this shape, with padding if the target may have it."""
    kind = rng.integers(3)
    if kind == 1:
        return jp.BinaryCrossEntropy(), rng.integers(0, 2, shape)
    if kind == 2:
        return jp.HalfSquaredError(), rng.normal(size=shape)
    each = tuple(float(c) for c in rng.integers(0, 3, shape[-1])) if rng.random() < 0.2 else None
    loss = jp.CrossEntropy(float(rng.choice([0.0, 0.1])), each)
    if rng.random() < 0.2:
        return loss, rng.dirichlet(np.ones(shape[-1]), shape[:-1])
    target = rng.integers(-1, shape[-1], shape[:-1])
    if len(shape) == 3 and rng.random() < 0.2:
        return loss, (target, rng.integers(0, 3, shape[:-1]))
    return loss, target


def draw_given(rng: np.random.Generator, net: jp.Layer, x: Any) -> dict[str, Any]:
    """Return side inputs that the net takes, and integer weights, some of which may be 0."""
    given: dict[str, Any] = {}
    if takes_side_input(net, jp.Key) and rng.random() < 0.7:
        given["key"] = jax.random.key(int(rng.integers(99)))
    sequences = x.ndim == 3 or (x.ndim == 2 and x.dtype.kind == "i")
    takes_mask = sequences and takes_side_input(net, jp.Mask) and not _mixes_positions(net)
    if takes_mask and rng.random() < 0.6:
        given["mask"] = jnp.asarray(rng.random(x.shape[:2]) < 0.7)
    if not net.batch_coupled and rng.random() < 0.4:
        given["weights"] = jnp.asarray(rng.permutation([*rng.integers(0, 4, len(x) - 1), 2]))
    if rng.random() < 0.2:
        given["divisor"] = float(rng.integers(1, 9))
    return given


def _layer(rng: np.random.Generator, shape: tuple[int, ...], depth: int) -> jp.Layer:
    """Return any layer for x of this shape."""
    if depth and rng.random() < 0.35:
        return _combined(rng, shape, depth - 1)
    if len(shape) > 2 and rng.random() < 0.35:
        return _moving(rng, shape)
    return _in_place(rng, shape)


def _combined(rng: np.random.Generator, shape: tuple[int, ...], depth: int) -> jp.Layer:
    """Return a layer made of layers."""
    kind = rng.integers(7)
    if kind == 0:
        return jp.skip(_block(rng, shape, depth))
    if kind == 1:
        return jp.branch(*(_block(rng, shape, depth) for _ in range(rng.integers(1, 4))))
    if kind == 2:
        parts = _block(rng, shape, depth), jp.Dense(_size(rng, 3)), _in_place(rng, shape)
        return jp.branch(*parts, join="concatenate")
    if kind == 3:
        return jp.repeat(_block(rng, shape, depth), int(rng.integers(1, 4)))
    if kind == 4:
        return jp.recompute(jp.chain(_layer(rng, shape, depth)))
    inner = _block(rng, shape, depth)
    if kind == 5 and not holds_stacks(inner) and not inner.batch_coupled:
        return jp.shared(inner, int(rng.integers(1, 4)))
    return jp.frozen(inner)


def _block(rng: np.random.Generator, shape: tuple[int, ...], depth: int) -> jp.Layer:
    """Return a chain that keeps the shape of x."""
    layers, inside = [], shape
    for _ in range(rng.integers(1, 3)):
        nested = depth and rng.random() < 0.3
        layers.append(
            (_combined if nested else _in_place)(rng, inside, *[depth - 1] * bool(nested))
        )
        inside = shape_after(layers[-1], inside)
    if inside[:-1] != shape[:-1]:  # something inside moved positions
        return jp.chain(_in_place(rng, shape), jp.Dense(shape[-1]))
    return jp.chain(*layers) if inside == shape else jp.chain(*layers, jp.Dense(shape[-1]))


def _in_place(rng: np.random.Generator, shape: tuple[int, ...]) -> jp.Layer:
    """Return a layer that leaves all axes but the last as they are."""
    features = shape[-1]
    groups = _divisor(rng, features)
    options = [
        jp.Dense(_size(rng, 5)),
        jp.Dense(_size(rng, 5), bias=False),
        ACTIVATIONS[rng.integers(len(ACTIVATIONS))],
        jp.LayerNorm(eps=float(rng.choice([1e-5, 0.1]))),
        jp.RMSNorm(),
        jp.GroupNorm(groups),
        jp.Dropout(0.4),
        jp.BatchNorm(training=bool(rng.random() < 0.15)),
    ]
    if len(shape) > 2:
        window = tuple(int(w) for w in rng.integers(1, 4, len(shape) - 2))
        fits = all(size >= taps for size, taps in zip(shape[1:], window, strict=False))
        paddings = ["SAME", *["CIRCULAR"] * fits, *["CAUSAL"] * (len(shape) == 3)]
        conv = jp.Conv(
            groups * _size(rng, 2),
            window,
            padding=paddings[rng.integers(len(paddings))],
            groups=groups,
            bias=bool(rng.random() < 0.5),
        )
        options.append(conv)
    if len(shape) == 3:
        options += [
            _attention(rng),
            _attention(rng),
            *(layer(_size(rng, 4), bool(rng.random() < 0.3)) for layer in RECURRENT),
            jp.bidirectional(RECURRENT[rng.integers(3)](_size(rng, 2))),
            jp.Positions(shape[1] + int(rng.integers(3))),
            jp.SinusoidalPositions(),
        ]
    return options[rng.integers(len(options))]


def _attention(rng: np.random.Generator) -> jp.Layer:
    """Return attention after the layers that compute q, k and v from x."""
    heads, each = _size(rng, 4), _size(rng, 3)
    kv_heads = _divisor(rng, heads)
    rotary = [jp.Rotary(heads, interleaved=bool(rng.random() < 0.5), kv_heads=kv_heads)]
    attention = jp.Attention(
        heads,
        causal=bool(rng.random() < 0.5),
        save=["weights", "logsumexp"][rng.integers(2)],
        block=_size(rng, 3),
        kv_heads=kv_heads,
        window=_size(rng, 3) if rng.random() < 0.3 else None,
    )
    packed = jp.Dense((heads + 2 * kv_heads) * each)
    return jp.chain(packed, *rotary * (each % 2 == 0), attention)


def _moving(rng: np.random.Generator, shape: tuple[int, ...]) -> jp.Layer:
    """Return a layer that changes the axes between the first and the last."""
    space = shape[1:-1]
    window = tuple(int(rng.integers(1, size + 1)) for size in space)
    strides = tuple(int(s) for s in rng.integers(1, 3, len(space)))
    padding = ["SAME", "VALID"][rng.integers(2)]
    widths = tuple((int(a), int(b)) for a, b in rng.integers(0, 2, (len(space), 2)))
    groups = _divisor(rng, shape[-1])
    options = [
        jp.Conv(_size(rng, 3), window, strides, padding),
        jp.ConvTranspose(groups * _size(rng, 2), window, strides, padding, groups=groups),
        jp.MaxPool(window, strides, padding),
        jp.AvgPool(window, strides, padding, bool(rng.random() < 0.5)),
        jp.GlobalAvgPool(),
        jp.Flatten(),
        jp.Pad(widths, 0.5),
        jp.Pad(widths, mode=["wrap", "edge"][rng.integers(2)]),
        jp.Take(-1),
        jp.Moveaxis(1, -1),
        jp.Reshape((math.prod(space), shape[-1])),
    ]
    if len(space) == 1:
        options += [layer(_size(rng, 3), output="last") for layer in RECURRENT]
    return options[rng.integers(len(options))]


def _size(rng: np.random.Generator, most: int) -> int:
    return int(rng.integers(1, most + 1))


def _divisor(rng: np.random.Generator, number: int) -> int:
    return int(rng.choice([d for d in range(1, number + 1) if number % d == 0]))


def _params(layer: jp.Layer, shape: tuple[int, ...]) -> Any:
    dtype = jnp.int64 if _takes_ids(layer) else jnp.float64
    return jax.eval_shape(layer.init, jax.random.key(0), jax.ShapeDtypeStruct(shape, dtype))


def _takes_ids(net: jp.Layer) -> bool:
    first = next(iter(net.children()), None)
    return isinstance(net, jp.Embedding) or (first is not None and _takes_ids(first.layer))


def _mixes_positions(layer: jp.Layer) -> bool:
    return layer.mixes_positions or any(_mixes_positions(c.layer) for c in layer.children())
