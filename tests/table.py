"""The table: a row is a layer and an input. Add a layer, add a row, and every property runs."""

from collections import Counter
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxprop as jp
from jaxprop.core.tree import learned


class Row(NamedTuple):
    layer: jp.Layer
    x: Any

    def __repr__(self) -> str:
        return (
            f"{self.layer} on {' and '.join('x'.join(map(str, x.shape)) for x in arrays(self.x))}"
        )


def arrays(x: Any) -> list[Any]:
    """The arrays of an input; there are several if it is a tuple."""
    return jax.tree.leaves(x)


def normal(*shape: int) -> Any:
    return np.random.default_rng(0).normal(size=shape)


def edge(*shape: int) -> Any:
    """Normal numbers with exact zeros and large ones of both signs among them."""
    x = normal(*shape)
    x.flat[::3] = np.resize([0.0, 30.0, -30.0], x.flat[::3].shape)
    return x


def ids(*shape: int) -> Any:
    """Token ids below 7, many of them more than once."""
    return np.random.default_rng(0).integers(0, 7, shape) // 2 * 2


def likely(*shape: int) -> Any:
    """Probabilities along the last axis."""
    return np.random.default_rng(0).dirichlet(np.ones(shape[-1]), shape[:-1])


def weights(*shape: int) -> Any:
    """Weights, of which some are 0."""
    return np.random.default_rng(1).integers(0, 4, shape) / 2


class Around(jp.Layer):
    """A user's layer that holds a layer, and is neither a Wrapper nor a Combinator."""

    inner: jp.Layer

    def init(self, key, x):
        return self.inner.init(key, x)

    def forward(self, params, x):
        return self.inner.forward(params, x)

    def backward(self, params, residuals, ct):
        return self.inner.backward(params, residuals, ct)


class Doubled(jp.Wrapper):
    """A user's wrapper: 2 f(x)."""

    def forward(self, params, x):
        y, residuals = self.layer.forward(params, x)
        return 2 * y, residuals

    def backward(self, params, residuals, ct):
        return self.layer.backward(params, residuals, 2 * ct)


BLOCK = jp.skip(jp.chain(jp.Dense(5), jp.Tanh(), jp.Dense(4)))
MLP = jp.chain(jp.Dense(7), jp.Gelu(), jp.Dense(5), jp.Tanh(), jp.Dense(3))
ACTIVATIONS = (
    jp.Sigmoid(),
    jp.Tanh(),
    jp.Relu(),
    jp.LeakyRelu(0.3),
    jp.Elu(0.7),
    jp.Gelu(),
    jp.Gelu(approximate=False),
    jp.Silu(),
    jp.Softplus(),
    jp.LogSigmoid(),
)

CROSS = jp.branch(jp.Dense(4), jp.Dense(8), join="tuple")
DECODER_BLOCK = jp.branch(
    jp.branch(
        jp.Item(0),
        jp.chain(
            jp.branch(
                jp.Item(0),
                jp.chain(jp.Item(1), jp.Dense(8)),
                join="tuple",
            ),
            jp.Attention(2, causal=False),
            jp.Dense(4),
        ),
    ),
    jp.Item(1),
    join="tuple",
)
DECODER = jp.chain(
    jp.branch(
        jp.chain(jp.Item(1), jp.Embedding(7, 4)),
        jp.chain(jp.Item(0), jp.Embedding(7, 4)),
        join="tuple",
    ),
    DECODER_BLOCK,
    jp.Item(0),
    jp.Dense(2),
)

TABLE = [
    Row(jp.Dense(3), normal(5, 4)),
    Row(jp.Dense(1), normal(1, 1)),
    Row(jp.Dense(6), normal(2, 3, 5)),
    Row(jp.Dense(2), normal(2, 3, 2, 3)),
    Row(jp.Dense(3, bias=False), normal(5, 4)),
    *(Row(layer, normal(3, 5)) for layer in ACTIVATIONS),
    Row(jp.Gelu(), normal(1, 2, 3)),
    Row(jp.LayerNorm(), normal(5, 4)),
    Row(jp.LayerNorm(eps=0.1), 3 + normal(2, 3, 5)),
    Row(jp.LayerNorm(), normal(1, 2, 3, 4)),
    Row(jp.RMSNorm(), normal(5, 4)),
    Row(jp.RMSNorm(), normal(1, 3, 5)),
    Row(jp.GroupNorm(2), normal(3, 2, 5, 6)),
    Row(jp.GroupNorm(1), normal(3, 8)),
    Row(jp.GroupNorm(3), normal(1, 7, 3)),
    Row(jp.BatchNorm(), normal(7, 4)),
    Row(jp.BatchNorm(), normal(3, 2, 5, 4)),
    Row(jp.BatchNorm(eps=0.1), normal(1, 6, 3)),
    Row(jp.BatchNorm(axis_name="data"), normal(4, 3)),
    Row(jp.chain(jp.Dense(4, bias=False), jp.BatchNorm(), jp.Tanh()), normal(7, 3)),
    Row(jp.BatchNorm(training=False), normal(4, 3)),
    Row(jp.chain(jp.BatchNorm(training=False), jp.Silu(), jp.Dense(3)), normal(3, 2, 4)),
    Row(jp.skip(jp.chain(jp.LayerNorm(), jp.Dense(5), jp.Gelu(), jp.Dense(4))), normal(3, 2, 4)),
    Row(jp.Attention(2), normal(2, 5, 12)),
    Row(jp.Attention(1), normal(3, 1, 9)),
    Row(jp.Attention(3, causal=False), normal(2, 7, 27)),
    Row(jp.Attention(2, save="logsumexp", block=2), normal(2, 5, 12)),
    Row(jp.Attention(1, save="logsumexp"), normal(1, 1, 3)),
    Row(jp.Attention(3, causal=False, save="logsumexp", block=3), normal(2, 7, 27)),
    Row(jp.Attention(4, kv_heads=2), normal(2, 5, 16)),
    Row(jp.Attention(3, kv_heads=1, window=2), normal(2, 4, 5)),
    Row(jp.Attention(2, causal=False, window=3), normal(2, 6, 6)),
    Row(jp.Attention(2, save="logsumexp", block=2, window=3), normal(2, 7, 6)),
    Row(jp.Attention(2), (normal(2, 5, 12), normal(2, 2, 5, 5))),
    Row(
        jp.Attention(4, save="logsumexp", block=3, kv_heads=2),
        (normal(3, 4, 8), normal(3, 1, 4, 4)),
    ),
    Row(jp.Attention(2, causal=False), (normal(2, 3, 4), normal(2, 5, 8))),
    Row(
        jp.Attention(4, causal=False, save="logsumexp", block=2, kv_heads=2),
        (normal(2, 3, 4), normal(2, 5, 4), normal(2, 4, 3, 5)),
    ),
    Row(jp.Item(1), (normal(3, 2), normal(3, 5, 2), ids(3, 4))),
    Row(jp.Item("b"), {"a": normal(3, 2), "b": normal(3, 1)}),
    Row(jp.chain(CROSS, jp.Attention(2, causal=False), jp.Dense(3)), normal(2, 3, 4)),
    Row(DECODER, (ids(2, 3), ids(2, 4))),
    Row(jp.chain(jp.repeat(DECODER_BLOCK, 2), jp.Item(0)), (normal(2, 3, 4), normal(2, 5, 4))),
    Row(jp.Positions(5), normal(3, 5, 4)),
    Row(jp.Positions(7), normal(2, 3, 1)),
    Row(jp.SinusoidalPositions(), normal(2, 3, 5)),
    Row(jp.Rotary(2), normal(2, 5, 12)),
    Row(jp.Rotary(1, interleaved=True), normal(3, 4, 12)),
    Row(jp.Rotary(2, kv_heads=1), normal(2, 5, 8)),
    Row(jp.chain(jp.Dense(12), jp.Rotary(2), jp.Attention(2), jp.Dense(3)), normal(2, 3, 4)),
    Row(jp.chain(jp.Dense(12), jp.Attention(2), jp.Dense(3)), normal(3, 5, 4)),
    Row(jp.skip(jp.Tanh()), normal(3, 4)),
    Row(jp.skip(jp.Dense(4)), normal(3, 4)),
    Row(jp.skip(jp.chain(jp.Dense(6), jp.Silu(), jp.Dense(4))), normal(3, 2, 4)),
    Row(jp.chain(jp.Relu()), normal(3, 4)),
    Row(MLP, normal(4, 6)),
    Row(MLP, normal(1, 6)),
    Row(jp.branch(jp.Dense(3), jp.chain(jp.Dense(2), jp.Tanh(), jp.Dense(3))), normal(3, 4)),
    Row(jp.branch(jp.Tanh(), jp.Dense(3), jp.Dense(1), join="concatenate"), normal(2, 3, 4)),
    Row(jp.repeat(BLOCK, 3), normal(3, 4)),
    Row(jp.repeat(jp.recompute(BLOCK), 2), normal(1, 3, 4)),
    Row(jp.chain(jp.repeat(jp.repeat(jp.Dense(4), 2), 3), jp.Dense(2)), normal(2, 4)),
    Row(jp.recompute(MLP), normal(4, 6)),
    Row(jp.shared(jp.Dense(4), 1), normal(3, 4)),
    Row(jp.shared(jp.Dense(4, bias=False), 3), normal(3, 4)),
    Row(jp.repeat(jp.shared(BLOCK, 2), 2), normal(2, 3, 4)),
    Row(jp.Dropout(0.5), normal(3, 4)),
    Row(jp.Embedding(7, 3), ids(4)),
    Row(jp.chain(jp.Embedding(7, 3), jp.Dense(2)), ids(3, 9)),
    Row(jp.chain(jp.Embedding(99, 3), jp.Tanh(), jp.Dense(2)), ids(1, 5)),
    Row(jp.tied(jp.Embedding(7, 4), BLOCK), ids(3, 5)),
    Row(jp.tied(jp.Embedding(7, 4), jp.repeat(BLOCK, 2)), ids(1, 2, 2)),
    *(
        Row(layer(features), normal(*shape))
        for layer in (jp.Rnn, jp.Lstm, jp.Gru)
        for features, shape in ((4, (3, 5, 2)), (3, (2, 1, 4)))
    ),
    Row(jp.Rnn(3, reverse=True), normal(2, 4, 3)),
    Row(jp.Lstm(3, output="last"), normal(3, 4, 2)),
    Row(jp.Gru(2, reverse=True, output="last"), normal(2, 3, 3)),
    Row(jp.bidirectional(jp.Lstm(2)), normal(2, 4, 3)),
    Row(jp.chain(jp.Lstm(2, output="both"), jp.Lstm(2, reverse=True)), normal(3, 3, 2)),
    Row(jp.chain(jp.Gru(3, output="both"), jp.Gru(3, output="last")), normal(2, 4, 2)),
    Row(jp.chain(jp.Lstm(1), jp.Gru(2)), normal(1, 7, 1)),
    Row(jp.chain(jp.chain(jp.Dense(4), jp.Relu()), jp.skip(jp.chain(jp.Dense(4)))), normal(3, 2)),
]

IMAGES = [
    Row(jp.Conv(3, (2, 3)), normal(2, 4, 3, 2)),
    Row(jp.Conv(4, (3, 3), (2, 1), "VALID", groups=2), normal(2, 5, 4, 2)),
    Row(jp.Conv(2, (3, 2), 2, ((1, 2), (0, 1)), (2, 1), bias=False), normal(1, 6, 5, 3)),
    Row(jp.Conv(3, (3,), 2), normal(3, 6, 2)),
    Row(jp.Conv(2, (1,)), normal(2, 3, 4)),
    Row(jp.Conv(2, (2, 1, 2)), normal(2, 3, 2, 3, 1)),
    Row(jp.Conv(2, (4, 3), (2, 1), "CIRCULAR", (1, 2)), normal(2, 4, 5, 3)),
    Row(jp.Conv(4, (3, 2), 1, "REFLECT", groups=2), normal(3, 2, 4, 2)),
    Row(jp.Conv(3, (3,), padding="CAUSAL", dilation=2), normal(2, 6, 2)),
    Row(jp.Conv(2, (3, 1), 2, 1), normal(1, 4, 3, 1)),
    Row(jp.ConvTranspose(2, (3, 2), (2, 3)), normal(2, 3, 2, 3)),
    Row(jp.ConvTranspose(4, (3, 2), (2, 1), dilation=(2, 3), groups=2), normal(2, 3, 4, 4)),
    Row(jp.ConvTranspose(2, (2,), padding="VALID", bias=False), normal(1, 4, 2)),
    Row(jp.MaxPool((2, 2)), np.round(normal(3, 5, 4, 2))),
    Row(jp.MaxPool((3, 2), (2, 1), "SAME"), np.round(normal(1, 5, 4, 2))),
    Row(jp.MaxPool((2,), 3, ((1, 0),)), normal(2, 7, 3)),
    Row(jp.AvgPool((2, 3), (2, 2), "SAME"), normal(2, 5, 4, 2)),
    Row(jp.AvgPool((2, 1, 2)), normal(1, 4, 3, 3, 2)),
    Row(jp.AvgPool((3, 2), (2, 1), "SAME", count_include_pad=False), normal(2, 5, 4, 2)),
    Row(jp.AvgPool((3,), 1, 1, count_include_pad=False), normal(3, 4, 2)),
    Row(jp.GlobalAvgPool(), normal(2, 3, 2, 4)),
    Row(jp.Flatten(), normal(3, 2, 2)),
    Row(jp.Take(-1), normal(3, 4, 2)),
    Row(jp.Take(1, axis=2), normal(2, 2, 3, 1)),
    Row(jp.Moveaxis(1, -1), normal(2, 3, 4, 2)),
    Row(jp.Moveaxis((1, -1), (2, 1)), normal(2, 3, 4, 2)),
    Row(jp.Reshape((3, 2)), normal(2, 6)),
    Row(jp.Pad(((1, 0), (2, 1)), 0.5), normal(2, 2, 3, 2)),
    *(
        Row(jp.Pad(((1, 2), (0, 1)), mode=mode), normal(2, 3, 2, 2))
        for mode in ("wrap", "reflect", "edge")
    ),
    Row(
        jp.chain(jp.Conv(3, (2, 2)), jp.Relu(), jp.MaxPool((2, 2)), jp.Flatten(), jp.Dense(2)),
        normal(3, 4, 5, 2),
    ),
]
TABLE += IMAGES

LOSSES = [
    (jp.HalfSquaredError(), normal(4, 3), 1 - normal(4, 3)),
    (jp.HalfSquaredError(), normal(1, 2, 3), 1 - normal(1, 2, 3)),
    (jp.HalfSquaredError(), normal(4), 1 - normal(4)),
    (jp.CrossEntropy(), normal(4, 3), np.array([2, 0, 1, 1])),
    (jp.CrossEntropy(), normal(1, 1), np.array([0])),
    (jp.CrossEntropy(), 50 * normal(3, 5), np.array([4, -1, 0])),
    (jp.CrossEntropy(), normal(2, 3, 4), np.array([[0, -1, 3], [-1, -1, -1]])),
    (jp.BinaryCrossEntropy(), normal(4, 3), np.array(normal(4, 3) > 0)),
    (jp.BinaryCrossEntropy(), 50 * normal(5), np.array([0.0, 1.0, 0.5, 0.25, 1.0])),
    (jp.BinaryCrossEntropy(), normal(2, 2, 2), np.array(normal(2, 2, 2) > 0, np.int32)),
    (jp.HalfSquaredError(), normal(2, 3, 2), (1 - normal(2, 3, 2), weights(2, 3, 2))),
    (jp.BinaryCrossEntropy(3.0), normal(4, 3), np.array(normal(4, 3) > 0)),
    (jp.BinaryCrossEntropy(0.5), normal(4, 3), (likely(4, 3), weights(4, 3))),
    (jp.CrossEntropy(), normal(4, 3), likely(4, 3)),
    (jp.CrossEntropy(), 50 * normal(2, 3, 4), likely(2, 3, 4)),
    (jp.CrossEntropy(0.1), normal(4, 3), np.array([2, 0, -1, 1])),
    (jp.CrossEntropy(class_weights=(0.5, 2.0, 0.0)), normal(4, 3), np.array([0, 1, 2, -1])),
    (jp.CrossEntropy(0.3, (0.5, 2.0, 1.0)), normal(2, 2, 3), np.array([[0, 2], [1, 1]])),
    (jp.CrossEntropy(0.3, (0.5, 2.0, 1.0)), normal(4, 3), likely(4, 3)),
    (jp.CrossEntropy(), normal(2, 3, 4), (np.array([[0, -1, 3], [1, 2, 2]]), weights(2, 3))),
    (jp.CrossEntropy(0.1), normal(2, 3, 4), (likely(2, 3, 4), weights(2, 3))),
]


def row_id(row: Any) -> str:
    return repr(row)


def first_of_their_kind(rows: list[Row], most: int = 1) -> list[Any]:
    """The rows, marked as exhaustive after the first ``most`` of each kind of layer."""
    seen: Counter[type] = Counter()

    def marked(row: Row) -> Any:
        kind = jp.Elementwise if isinstance(row.layer, jp.Elementwise) else type(row.layer)
        seen[kind] += 1
        return row if seen[kind] <= most else pytest.param(row, marks=pytest.mark.full)

    return list(map(marked, rows))


def of_size(examples: int, batch: Any) -> Any:
    """A batch of this size with the examples of another one, repeated if they are too few."""
    return jax.tree.map(lambda leaf: jnp.resize(leaf, (examples, *leaf.shape[1:])), batch)


def at(row: Row, dtype: Any = jnp.float64) -> tuple[Any, Any]:
    """(params, x) of the dtype; params have init's shapes, and numbers that hide no mistake.

    They are drawn by NumPy, since compiling each row's init takes longer than most tests.
    """

    def given(x: Any) -> Any:
        return jax.device_put(x.astype(dtype) if np.issubdtype(x.dtype, np.floating) else x)

    x = jax.tree.map(given, row.x)
    rng = np.random.default_rng(2)

    def drawn(node: Any) -> Any:
        if isinstance(node, jp.Unlearned):  # running statistics: a variance is positive
            drawn = rng.uniform(0.5, 1.5, node.value.shape)
            return jp.Unlearned(jax.device_put(drawn.astype(node.value.dtype)))
        drawn = rng.normal(size=node.shape) / max(len(node.shape), 1)
        return jax.device_put(np.asarray(drawn).astype(dtype))

    shapes = jax.eval_shape(row.layer.init, jax.random.key(0), x)
    return jax.tree.map(drawn, shapes, is_leaf=lambda node: isinstance(node, jp.Unlearned)), x


def relative_error(got: Any, expected: Any) -> float:
    """The largest difference in any learned leaf, relative to that leaf's largest element."""
    got, expected = learned(got), learned(expected)
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    worst = 0.0
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert a.shape == b.shape
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        difference, scale = np.max(np.abs(a - b), initial=0.0), np.max(np.abs(b), initial=0.0)
        if difference:
            worst = max(worst, difference / scale if scale else np.inf)
        assert np.isfinite(difference)
    return float(worst)
