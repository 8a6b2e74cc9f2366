"""Decoding position by position gives the same as the whole sequence at once."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from table import Around, Doubled, normal, relative_error

import jaxprop as jp
from jaxprop.models import Gpt2Config, decoder, decoding, generate, generation, gpt2

GPT = Gpt2Config(vocab=11, length=12, features=8, heads=2, layers=2)
ROTARY = jp.chain(jp.Dense(12), jp.Rotary(2), jp.Attention(2), jp.Dense(4))
GROUPED = jp.chain(jp.Dense(8), jp.Attention(4, kv_heads=2, window=3), jp.RMSNorm(), jp.Dense(4))
NETS = {
    "attention": jp.Attention(2),
    "block by block": jp.Attention(2, save="logsumexp", block=2),
    "one head of keys": jp.Attention(2, kv_heads=1),
    "window": jp.Attention(6, kv_heads=3, window=3),
    "rotary": jp.chain(ROTARY, jp.skip(jp.chain(jp.Silu(), ROTARY))),
    "recurrent": jp.chain(jp.Lstm(4), jp.repeat(jp.skip(jp.Gru(4)), 2), jp.Rnn(3)),
    "grouped rotary": jp.chain(
        jp.Dense(16), jp.Rotary(4, interleaved=True, kv_heads=2), jp.Attention(4, kv_heads=2)
    ),
    "deep": jp.chain(jp.Dense(4), jp.repeat(jp.repeat(jp.skip(jp.recompute(GROUPED)), 2), 3)),
    "shared": jp.chain(jp.Dense(4), jp.shared(ROTARY, 3), jp.frozen(GROUPED), jp.Dropout(0.5)),
    "branch": jp.chain(
        jp.branch(ROTARY, jp.Tanh(), join="concatenate"),
        jp.branch(jp.Dense(4), GROUPED, join="tuple"),
        jp.Item(1),
        jp.SinusoidalPositions(),
        Around(jp.LayerNorm()),
        Doubled(jp.chain(jp.Dense(3), jp.Gelu())),
    ),
}
PIECES = (3, 1, 1, 2, 5)


def in_pieces(net, params, x, pieces=PIECES):
    start, step = decoder(net, sum(pieces) + 1)
    state, ys = start(params, x), []
    for piece in jnp.split(x, np.cumsum(pieces)[:-1], 1):
        y, state = step(params, state, piece)
        ys.append(y)
    return jnp.concatenate(ys, 1)


@pytest.mark.few(1)
@pytest.mark.parametrize("name", NETS)
def test_in_pieces_and_one_by_one(name):
    net, x = NETS[name], jnp.asarray(normal(2, 12, 24))
    x = x[..., :12] if name == "window" else x
    params = net.init(jax.random.key(0), x)

    @jax.jit
    def one_by_one(params, x):
        start, step = decoder(net, 12)

        def ahead(state, x):
            y, state = step(params, state, x[:, None])
            return state, y

        return jax.lax.scan(ahead, start(params, x[:, :1]), x.swapaxes(0, 1))[1]

    whole, _ = net.forward(params, x)
    assert relative_error(jax.jit(functools.partial(in_pieces, net))(params, x), whole) <= 1e-12
    assert relative_error(one_by_one(params, x)[:, :, 0].swapaxes(0, 1), whole) <= 1e-12


@pytest.mark.full
@pytest.mark.few(1)
@pytest.mark.parametrize("scan", [True, False])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_gpt2_generates_what_its_logits_say(scan, dtype):
    """Each token is the most likely one by the whole forward pass; also at a low temperature."""
    net = jp.cast(gpt2(GPT, scan=scan, recomputing=not scan), dtype)
    prompt = jnp.array([[1, 7, 3], [2, 2, 10]], jnp.int32)
    params = jax.tree.map(lambda p: 10 * p.astype(jnp.float32), net.init(jax.random.key(0), prompt))
    ids = generate(net, params, prompt, 9)
    assert ids.dtype == prompt.dtype
    np.testing.assert_array_equal(ids[:, :3], prompt)
    whole, _ = net.forward(params, ids)
    np.testing.assert_array_equal(ids[:, 3:], whole[:, 2:-1].argmax(-1))
    rtol = 1e-5 if dtype == jnp.float32 else 0.02
    assert relative_error(in_pieces(net, params, ids[:, :11], (4, 1, 6)), whole[:, :11]) <= rtol
    cold = generate(net, params, prompt, 9, key=jax.random.key(1), temperature=1e-6)
    np.testing.assert_array_equal(cold, ids)


@pytest.mark.full
def test_what_is_drawn_has_the_probabilities_of_the_logits():
    net = gpt2(GPT._replace(vocab=3))
    prompt = jnp.zeros((4000, 2), int)
    params = net.init(jax.random.key(0), prompt)
    draw = jax.jit(lambda key, t: generate(net, params, prompt, 2, key=key, temperature=t))
    logits = net.forward(params, jnp.zeros((1, 3), int))[0][0]
    for temperature in (0.5, 3.0):
        ids = np.asarray(draw(jax.random.key(1), temperature))
        for t, drawn in ((2, ids[:, 2]), (3, ids[ids[:, 2] == 0, 3])):
            got = np.bincount(drawn, minlength=3) / len(drawn)
            expected = jax.nn.softmax(logits[t - 1] / temperature)
            np.testing.assert_allclose(got, expected, atol=4 * np.sqrt(0.25 / len(drawn)))


@pytest.mark.full
def test_an_id_that_the_table_lacks_and_an_empty_batch():
    net = jp.tied(jp.Embedding(11, 8), jp.chain(jp.Dense(24), jp.Attention(2), jp.Dense(8)))
    params = net.init(jax.random.key(0), jnp.zeros((1, 2), int))
    for key in (None, jax.random.key(1)):
        tokens = jp.models.generate(net, params, jnp.array([[99, 1], [2, 1]]), 2, key=key)
        assert (tokens[0, 2:] == -1).all()
        assert (tokens[1, 2:] >= 0).all()
    assert jp.models.generate(net, params, jnp.zeros((0, 2), int), 2).shape == (0, 4)


def test_tokens_that_the_prompt_s_dtype_cannot_hold():
    net = jp.chain(jp.Embedding(300, 4), jp.Dense(300))
    prompt = jnp.asarray([[1, 2]], jnp.uint8)
    table, last = net.init(jax.random.key(0), prompt)
    params = table, last._replace(b=last.b.at[290].set(50.0))
    tokens = jp.models.generate(net, params, prompt, 2)
    assert tokens.tolist() == [[1, 2, 290, 290]]
    params = table, last._replace(b=last.b * jnp.nan)
    for dtype in (jnp.uint8, jnp.uint32, jnp.int16, jnp.int64):
        tokens = jp.models.generate(net, params, prompt.astype(dtype), 2)
        assert tokens.tolist() == [[1, 2, -1, -1]]
    assert tokens.dtype == jnp.int64


def test_params_that_are_gathered():
    mesh = jax.make_mesh((2,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    net, prompt = gpt2(GPT), jnp.ones((2, 2), int)
    params = net.init(jax.random.key(0), prompt)
    there = jax.device_put(params, jp.sharding.fully_sharded(params, mesh, smallest=0))
    tokens = jp.models.generate(jp.sharding.gathered(net, mesh), there, prompt, 3)
    np.testing.assert_array_equal(tokens, jp.models.generate(net, params, prompt, 3))


def test_generate_compiles_once():
    net = gpt2(GPT)
    prompt = jnp.ones((1, 2), int)
    params = net.init(jax.random.key(0), prompt)
    generate(net, params, prompt, 3)
    before = generation._generated._cache_size()
    generate(gpt2(GPT), jax.tree.map(lambda p: 2 * p, params), prompt, 3)
    assert generation._generated._cache_size() == before


@pytest.mark.full
def test_a_decoder_with_a_memory():
    """Every step gets the whole memory, an encoder's output with padding."""
    cross = jp.chain(
        jp.branch(
            jp.chain(jp.Item(0), jp.LayerNorm(), jp.Dense(4)),
            jp.chain(jp.Item(1), jp.Dense(8)),
            join="tuple",
        ),
        jp.Attention(2, causal=False),
        jp.Dense(4),
    )
    attend = jp.chain(jp.Dense(12), jp.Attention(2, masked=False), jp.Dense(4))
    block = jp.chain(
        jp.branch(jp.chain(jp.Item(0), jp.skip(attend)), jp.Item(1), join="tuple"),
        jp.branch(jp.branch(jp.Item(0), cross), jp.Item(1), join="tuple"),
    )
    net = jp.chain(jp.repeat(block, 2), jp.Item(0))
    x, memory = jnp.asarray(normal(2, 6, 4)), jnp.asarray(normal(2, 5, 4))
    params = net.init(jax.random.key(0), (x, memory))
    params = net.bind(params, mask=jnp.array([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]], bool))
    start, step = decoder(net, 6)
    state, ys = start(params, (x[:, :1], memory)), []
    for t in range(6):
        y, state = step(params, state, (x[:, t : t + 1], memory))
        ys.append(y)
    whole, _ = net.forward(params, (x, memory))
    assert relative_error(jnp.concatenate(ys, 1), whole) <= 1e-12


@pytest.mark.full
def test_a_memory_in_a_dict_is_not_counted():
    cross = (jp.chain(jp.Item("x"), jp.Dense(4)), jp.chain(jp.Item("memory"), jp.Dense(8)))
    body = jp.chain(jp.branch(*cross, join="tuple"), jp.Attention(2, causal=False))
    net = jp.chain(jp.on("x", jp.Positions(4)), body)
    x = {"memory": jnp.asarray(normal(2, 5, 4)), "x": jnp.asarray(normal(2, 4, 4))}
    params = net.init(jax.random.key(0), x)
    start, step = decoder(net, 4)
    state, ys = start(params, x), []
    for t in range(4):
        y, state = step(params, state, x | {"x": x["x"][:, t : t + 1]})
        ys.append(y)
    assert relative_error(jnp.concatenate(ys, 1), net(params, x)) <= 1e-12
    start, step = decoder(net.layers[0], 4)
    with pytest.raises(ValueError, match="not of a number of next positions"):
        step(params[0], start(params[0], x), x)


def test_past_the_room_is_nan():
    net, x = jp.Attention(2), jnp.asarray(normal(1, 4, 6))
    start, step = decoder(net, 5)
    y, state = step((), start((), x), x)
    assert np.all(np.isfinite(y))
    assert np.all(np.isnan(step((), state, x)[0]))


class Mixing(jp.Layer):
    """A user's layer: the sum over all positions up to each."""

    mixes_positions = True

    def forward(self, params, x):
        return jnp.cumsum(x, 1), ()

    def backward(self, params, residuals, ct):
        return (), jnp.cumsum(ct[:, ::-1], 1)[:, ::-1]


def test_a_layer_of_one_s_own_has_a_rule():
    net, x = jp.chain(jp.Dense(3), Mixing(), jp.Tanh()), jnp.asarray(normal(2, 12, 4))
    params = net.init(jax.random.key(0), x)
    with pytest.raises(ValueError, match=r"Mixing\(\) does not treat each position by itself"):
        in_pieces(net, params, x)

    @decoding.step.register(Mixing)
    def _(layer, params, state, x, now):
        y = jnp.cumsum(x, 1) + (0 if state is None else state)
        return y, y[:, -1:]

    whole, _ = net.forward(params, x)
    assert relative_error(in_pieces(net, params, x), whole) <= 1e-12


BY_ITSELF = "does not treat each position by itself"


@pytest.mark.parametrize(
    ("net", "message"),
    [
        (jp.Attention(2, causal=False), "it must be causal"),
        (jp.Gru(3, reverse=True), "it must start from zeros"),
        (jp.Lstm(3, output="last"), "it must start from zeros"),
        (jp.Take(-1), BY_ITSELF),
        (jp.Conv(3, (3,)), BY_ITSELF),
        (jp.GlobalAvgPool(), BY_ITSELF),
        (jp.Flatten(), BY_ITSELF),
        (jp.chain(jp.BatchNorm()), r"take jp\.inference_mode\(net\)"),
        (Around(jp.Attention(2)), BY_ITSELF),
        (Doubled(jp.chain(jp.Rotary(2))), BY_ITSELF),
        (jp.Positions(3), r"Positions\(3\) has 3 positions"),
    ],
    ids=str,
)
def test_what_cannot_go_on_is_refused(net, message):
    x = jnp.asarray(normal(2, 12, 12))
    params = jax.eval_shape(net.init, jax.random.key(0), x[:, :3])
    params = jax.tree.map(lambda p: jnp.ones(p.shape, p.dtype), params)
    with pytest.raises(ValueError, match=message):
        in_pieces(net, params, x)


def test_errors():
    net, prompt = gpt2(GPT), jnp.ones((2, 3), int)
    params = net.init(jax.random.key(0), prompt)
    with pytest.raises(ValueError, match=r"it must be causal, without a bias and a mask"):
        generate(net, net.bind(params, mask=prompt > 0), prompt, 2)
    with pytest.raises(ValueError, match="has 12 positions"):
        generate(net, params, prompt, 10)
    with pytest.raises(TypeError, match="net is not a Layer"):
        decoder(None, 3)
    with pytest.raises(ValueError, match="length is at least 1"):
        decoder(net, 0)
    with pytest.raises(ValueError, match="steps is at least 1, not 0"):
        generate(net, params, prompt, 0)
    with pytest.raises(ValueError, match="temperature must be positive, not 0"):
        generate(net, params, prompt, 2, temperature=0)
    with pytest.raises(TypeError, match=r"generate: key is a key such as jax.random.key\(0\)"):
        generate(net, params, prompt, 2, key=0)
    with pytest.raises(TypeError, match=r"prompt is token ids \(N, P\), not float64\[2,3\]"):
        generate(net, params, jnp.ones((2, 3)), 2)
    with pytest.raises(ValueError, match=r"prompt is \(N, P\) with P at least 1, not \(2, 0\)"):
        generate(net, params, prompt[:, :0], 2)
