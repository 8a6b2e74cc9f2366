"""``jp.function`` on models written in Equinox, for single examples, and in Haiku."""

import jax
import jax.numpy as jnp
import pytest
from functions import drawn, hold, hold_leaves, integers, normal, own_shares

import jaxprop as jp

eqx = pytest.importorskip("equinox")
pytestmark = pytest.mark.usefixtures("standard_promotion")

VOCAB, WIDTH, HEADS, LENGTH = 7, 8, 2, 4


def function_of(model, call=None):
    """A model as a function of its arrays and a batch, and random arrays for it in float64."""
    arrays, static = eqx.partition(model, eqx.is_inexact_array)

    def fn(params, x):
        whole = eqx.combine(params, static)
        return jax.vmap(whole if call is None else lambda x: call(whole, x))(x)

    return fn, drawn(arrays)


def mlp():
    return eqx.nn.MLP(4, 3, 6, 2, activation=jax.nn.gelu, key=jax.random.key(0))


class Cnn(eqx.Module):
    layers: list
    head: eqx.nn.Linear

    def __init__(self, key):
        keys = jax.random.split(key, 5)
        self.layers = [
            eqx.nn.Conv2d(3, 4, 3, stride=2, padding=1, key=keys[0]),
            eqx.nn.GroupNorm(2, 4),
            jnp.tanh,
            eqx.nn.Conv2d(4, 6, (2, 3), groups=2, key=keys[1]),
            jax.nn.silu,
            eqx.nn.Conv2d(6, 4, 2, dilation=2, padding="SAME", use_bias=False, key=keys[2]),
            eqx.nn.ConvTranspose2d(4, 2, 3, stride=2, output_padding=1, key=keys[3]),
            eqx.nn.AvgPool2d(2, 2),
        ]
        self.head = eqx.nn.Linear(24, 3, key=keys[4])

    def __call__(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.head(x.ravel())


class Block(eqx.Module):
    attention: eqx.nn.MultiheadAttention
    norms: list
    mlp: eqx.nn.MLP

    def __init__(self, key):
        keys = jax.random.split(key)
        self.attention = eqx.nn.MultiheadAttention(HEADS, WIDTH, use_key_bias=True, key=keys[0])
        self.norms = [eqx.nn.LayerNorm(WIDTH), eqx.nn.RMSNorm(WIDTH)]
        self.mlp = eqx.nn.MLP(WIDTH, WIDTH, 2 * WIDTH, 1, jax.nn.gelu, key=keys[1])

    def __call__(self, x):
        h = jax.vmap(self.norms[0])(x)
        x = x + self.attention(h, h, h, mask=jnp.tril(jnp.ones((len(x), len(x)), bool)))
        return x + jax.vmap(lambda h: self.mlp(self.norms[1](h)))(x)


class Gpt(eqx.Module):
    table: eqx.nn.Embedding
    positions: jax.Array
    blocks: Block
    norm: eqx.nn.LayerNorm
    scan: bool = eqx.field(static=True)

    def __init__(self, key, scan):
        keys = jax.random.split(key, 3)
        self.table = eqx.nn.Embedding(VOCAB, WIDTH, key=keys[0])
        self.positions = jax.random.normal(keys[1], (LENGTH, WIDTH))
        each = jax.random.split(keys[2], 2)
        self.blocks = eqx.filter_vmap(Block)(each) if scan else [Block(key) for key in each]
        self.norm = eqx.nn.LayerNorm(WIDTH)
        self.scan = scan

    def __call__(self, ids):
        x = jax.vmap(self.table)(ids) + self.positions
        if self.scan:
            layers, static = eqx.partition(self.blocks, eqx.is_array)
            x, _ = jax.lax.scan(lambda x, of: (eqx.combine(of, static)(x), None), x, layers)
        else:
            for block in self.blocks:
                x = block(x)
        return jax.vmap(self.norm)(x) @ self.table.weight.T


class Recurrent(eqx.Module):
    cell: eqx.Module
    head: eqx.nn.Linear

    def __init__(self, kind, key):
        keys = jax.random.split(key)
        self.cell, self.head = kind(3, 4, key=keys[0]), eqx.nn.Linear(4, 2, key=keys[1])

    def __call__(self, xs):
        zero = jnp.zeros(4, xs.dtype)
        start = (zero, zero) if isinstance(self.cell, eqx.nn.LSTMCell) else zero
        last, _ = jax.lax.scan(lambda carry, x: (self.cell(x, carry), None), start, xs)
        return self.head(jax.tree.leaves(last)[0])


def test_an_mlp():
    fn, params = function_of(mlp())
    hold(fn, params, normal(5, 4), integers(3, 5), jp.CrossEntropy(), moments=True, diagonal=True)


def test_a_whole_loss_as_equinox_users_write_it():
    arrays, static = eqx.partition(mlp(), eqx.is_inexact_array)

    def loss_fn(params, batch):
        x, y = batch
        logits = jax.vmap(eqx.combine(params, static))(x)
        return -jnp.mean(jax.nn.log_softmax(logits)[jnp.arange(len(y)), y])

    hold(loss_fn, drawn(arrays), (normal(5, 4), integers(3, 5)))


@pytest.mark.full
def test_a_cnn():
    fn, params = function_of(Cnn(jax.random.key(0)))
    hold(fn, params, normal(2, 3, 8, 8), integers(3, 2), jp.CrossEntropy(), owned=r"bias$")


@pytest.mark.full
@pytest.mark.parametrize("scan", [True, False])
def test_a_gpt(scan):
    fn, params = function_of(Gpt(jax.random.key(0), scan))
    ids, target = integers(VOCAB, 3, LENGTH), integers(VOCAB, 3, LENGTH, seed=1)
    vectors = r"positions|bias$|norms/\d/weight$"  # added to x, or stacks of vectors
    hold(
        fn,
        params,
        ids,
        target,
        jp.CrossEntropy(),
        owned=vectors if scan else "positions",
        zero="key_proj/bias",
    )


@pytest.mark.full
def test_attention_alone():
    model = eqx.nn.MultiheadAttention(HEADS, WIDTH, key=jax.random.key(0))
    fn, params = function_of(model, lambda model, x: model(x, x, x))
    hold(fn, params, normal(3, LENGTH, WIDTH), normal(3, LENGTH, WIDTH), diagonal=True)


@pytest.mark.parametrize("kind", ["LSTMCell", pytest.param("GRUCell", marks=pytest.mark.full)])
def test_a_recurrent_network_by_scan(kind):
    fn, params = function_of(Recurrent(getattr(eqx.nn, kind), jax.random.key(0)))
    hold(fn, params, normal(3, 5, 3), normal(3, 2))


def test_the_weight_is_scaled_by_a_constant():
    """Equinox users write equalized learning rates like this: a linear layer with weight w * c."""
    linear = eqx.nn.Linear(4, 3, key=jax.random.key(0))
    scaled = eqx.tree_at(lambda layer: layer.weight, linear, replace_fn=lambda w: w / 0.5)
    arrays, static = eqx.partition(scaled, eqx.is_inexact_array)

    def fn(params, x):
        halved = jax.tree.map(lambda p: p * 0.5, params)
        return jax.vmap(eqx.combine(halved, static))(x)

    hold(fn, drawn(arrays), normal(5, 4), normal(5, 3))


def test_dropout_with_a_key_for_each_example():
    class Dropping(eqx.Module):
        linear: eqx.nn.Linear
        dropout: eqx.nn.Dropout

        def __call__(self, pair):
            x, key = pair
            return self.linear(self.dropout(jnp.tanh(x), key=key))

    model = Dropping(eqx.nn.Linear(4, 3, key=jax.random.key(0)), eqx.nn.Dropout(0.5))
    fn, params = function_of(model)
    keys = jax.random.split(jax.random.key(1), 5)
    hold(fn, params, (normal(5, 4), keys), normal(5, 3))


def test_the_whole_model_may_be_the_params():
    """A model is a pytree: leaves that are no arrays are static, and integers are not learned."""

    class Counting(eqx.Module):
        linear: eqx.nn.Linear
        count: jax.Array

        def __call__(self, x):
            return self.linear(x) * self.count

    model = Counting(eqx.nn.Linear(4, 3, key=jax.random.key(0)), jnp.array(2))
    x, target = normal(5, 4), normal(5, 3)
    fn, params = function_of(model)
    whole = eqx.combine(params, model)
    norms = jp.per_example_sq_norms(
        jp.function(lambda model, x: jax.vmap(model)(x)), jp.HalfSquaredError()
    )
    other = jp.per_example_sq_norms(jp.function(fn), jp.HalfSquaredError())
    hold_leaves(norms(whole, x, target), other(params, x, target))


@pytest.mark.full
def test_a_gpt_has_own_shares_of_positions_alone():
    fn, params = function_of(Gpt(jax.random.key(0), scan=False))
    ids = integers(VOCAB, 3, LENGTH)
    assert own_shares(jp.function(fn), params, ids) == {"positions": (LENGTH, WIDTH)}


def haiku_mlp(haiku):
    def forward(x):
        return haiku.nets.MLP([6, 5, 3], activation=jnp.tanh)(x)

    return haiku.without_apply_rng(haiku.transform(forward))


def test_a_haiku_mlp():
    haiku = pytest.importorskip("haiku")
    model, x = haiku_mlp(haiku), normal(5, 4)
    params = drawn(jax.eval_shape(model.init, jax.random.key(0), x))
    hold(model.apply, params, x, integers(3, 5), jp.CrossEntropy(), diagonal=True)


@pytest.mark.full
def test_a_haiku_stack_of_layers():
    haiku = pytest.importorskip("haiku")

    def forward(x):
        h = haiku.experimental.layer_stack(3)(lambda h: h + jnp.tanh(haiku.Linear(4)(h)))(x)
        return haiku.Linear(2)(h)

    model, x = haiku.without_apply_rng(haiku.transform(forward)), normal(5, 4)
    params = drawn(jax.eval_shape(model.init, jax.random.key(0), x))
    hold(model.apply, params, x, normal(5, 2), owned=r"/b$")
