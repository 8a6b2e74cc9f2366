"""Attention with fewer heads of keys, windows, masks, biases and memories, against jax.nn's."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from table import normal, relative_error

import jaxprop as jp

saves = pytest.mark.parametrize("save", ["weights", "logsumexp"])
LOSS = jp.HalfSquaredError()
N, HEADS, FEATURES = 2, 4, 3


@functools.partial(jax.jit, static_argnums=0)
def both_ways(layer, params, x, ct):
    """(y, d_x) by hand."""
    y, residuals = layer.forward(params, x)
    return y, layer.backward(params, residuals, ct)[1]


def by_jax(layer, mask, x):
    """``jax.nn.dot_product_attention`` of the same x; its softmax is in float32."""
    x, *beside = x if isinstance(x, tuple) else (x,)
    memory = [z for z in beside if z.ndim == 3]
    (bias,) = [z for z in beside if z.ndim == 4] or [None]
    n, t, _ = x.shape
    kv_heads = layer.kv_heads or layer.heads
    if memory:
        q, kv = x, memory[0]
    else:
        q, kv = jnp.split(x, [x.shape[-1] * layer.heads // (layer.heads + 2 * kv_heads)], -1)
    k, v = jnp.split(kv, 2, -1)
    q = q.reshape(n, t, layer.heads, -1)
    k, v = (z.reshape(n, -1, kv_heads, q.shape[-1]) for z in (k, v))
    window = layer.window and (layer.window - 1, 0 if layer.causal else layer.window - 1)
    with jax.numpy_dtype_promotion("standard"):
        y = jax.nn.dot_product_attention(
            q, k, v, bias, mask, is_causal=layer.causal, local_window_size=window
        )
    return y.reshape(n, t, -1)


def packed(t, kv_heads=HEADS):
    return normal(N, t, (HEADS + 2 * kv_heads) * FEATURES)


def crossed(t, s, kv_heads=HEADS):
    return normal(N, t, HEADS * FEATURES), normal(N, s, 2 * kv_heads * FEATURES)


def some(*shape):
    """A random mask in which every query sees the first key and the one at its own position."""
    *_, t, s = shape
    own = np.eye(t, s, dtype=bool) | (np.arange(s) == 0)
    return (np.random.default_rng(3).uniform(size=shape) < 0.5) | own


CASES = {
    "grouped": ({"kv_heads": 2}, packed(7, 2), None),
    "one head of keys": ({"kv_heads": 1, "causal": False}, packed(7, 1), None),
    "window": ({"window": 3}, packed(7), None),
    "window of one": ({"window": 1}, packed(7), None),
    "long window": ({"window": 50, "kv_heads": 2}, packed(200, 2), None),
    "window, both sides": ({"window": 70, "causal": False}, packed(200), None),
    "window wider than x": ({"window": 9}, packed(7), None),
    "mask": ({"causal": False}, packed(7), some(N, 7, 7)),
    "mask, causal": ({"kv_heads": 2}, packed(150, 2), some(N, 150, 150)),
    "mask of heads": ({"window": 5}, packed(7), some(N, HEADS, 7, 7)),
    "bias": ({}, (packed(150), normal(N, HEADS, 150, 150)), None),
    "one bias": ({"causal": False, "kv_heads": 2}, (packed(7, 2), normal(N, 1, 7, 7)), None),
    "bias and mask": ({"window": 80}, (packed(150), normal(N, 1, 150, 150)), some(N, 150, 150)),
    "memory": ({"causal": False, "kv_heads": 2}, crossed(7, 9, 2), None),
    "long memory": ({"causal": False}, crossed(1, 70), None),
    "masked memory": ({"causal": False}, crossed(7, 5), some(N, 1, 5)[:, 0]),
    "mask of a memory": ({"causal": False, "kv_heads": 1}, crossed(7, 5, 1), some(N, 7, 5)),
    "all at once": (
        {"causal": False, "kv_heads": 2},
        (*crossed(7, 9, 2), normal(N, HEADS, 7, 9)),
        some(N, HEADS, 7, 9),
    ),
}


@pytest.mark.few(1)
@saves
@pytest.mark.parametrize("case", CASES)
def test_against_jax_nn(case, save):
    fields, x, mask = CASES[case]
    layer = jp.Attention(HEADS, save=save, block=48, **fields)
    params, wider = (), None
    if mask is not None:
        params = jp.Mask(mask)
        wider = mask.reshape(N, *(1,) * (4 - mask.ndim), *mask.shape[1:])

    @jax.jit
    def by_autodiff(x, ct):
        y, pull = jax.vjp(functools.partial(by_jax, layer, wider), x)
        return y, pull(ct)[0]

    ct = normal(*jax.eval_shape(functools.partial(by_jax, layer, wider), x).shape)[::-1]
    assert relative_error(both_ways(layer, params, x, ct), by_autodiff(x, ct)) <= 2e-6


@saves
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_narrow_dtypes_and_large_scores(save, dtype):
    layer = jp.Attention(HEADS, save=save, block=3, kv_heads=2, window=4)
    x = packed(7, 2), normal(N, 1, 7, 7)
    ct = normal(N, 7, HEADS * FEATURES)
    x, ct = jax.tree.map(lambda leaf: leaf.astype(dtype), (x, ct))
    got = both_ways(layer, (), x, ct)
    assert all(leaf.dtype == dtype for leaf in jax.tree.leaves(got))
    wide = jax.tree.map(lambda leaf: leaf.astype(np.float64), (x, ct))
    expected = both_ways(layer, (), *wide)
    assert relative_error(got, expected) <= (2e-6 if dtype == jnp.float32 else 0.03)
    large = both_ways(layer, (), jax.tree.map(lambda x: x * 1000, x), ct)
    assert all(np.all(np.isfinite(np.asarray(leaf, float))) for leaf in jax.tree.leaves(large))


@saves
@pytest.mark.parametrize("bad", [1e10, np.inf, np.nan])
@pytest.mark.parametrize("heads", [(), (HEADS,)], ids=["all heads", "each head"])
def test_a_key_that_no_query_sees_and_a_query_that_sees_none_do_not_matter(heads, bad, save):
    mask = some(N, *heads, 5, 5)
    mask[..., 3], mask[..., 2, :] = False, False
    for x, kv_heads in ((packed(5, 2), 2), (crossed(5, 5), None)):
        layer = jp.Attention(HEADS, causal=False, save=save, block=2, kv_heads=kv_heads)
        ct = normal(N, 5, HEADS * FEATURES)
        q, *memory = (np.array(z) for z in (x if isinstance(x, tuple) else (x,)))
        width = HEADS * FEATURES
        start = 0 if memory else width
        spoiled = [np.array(z) for z in (q, *memory)]
        spoiled[-1][:, 3, start:] = bad
        spoiled[0][:, 2, :width] = bad
        pack = tuple if memory else lambda parts: parts[0]
        expected = both_ways(layer, jp.Mask(mask), pack([q, *memory]), ct)
        got = both_ways(layer, jp.Mask(mask), pack(spoiled), ct)
        assert relative_error(got, expected) == 0
        assert np.all(np.asarray(got[0])[:, 2] == 0)


@saves
def test_a_key_that_mask_and_causality_hide_together_does_not_matter(save):
    """By the mask, the first query sees only the last key, and no other query sees that key."""
    mask, x = np.ones((1, 3, 3), bool), normal(1, 3, 3 * FEATURES)
    mask[:, 0, :2], mask[:, 1:, 2] = False, False
    spoiled = x.copy()
    spoiled[:, 0, :FEATURES], spoiled[:, 2, FEATURES:] = np.nan, np.nan
    layer, ct = jp.Attention(1, save=save), normal(1, 3, FEATURES)
    expected, got = (both_ways(layer, jp.Mask(mask), z, ct) for z in (x, spoiled))
    assert relative_error(got, expected) == 0


@saves
@pytest.mark.parametrize("heads", [1, HEADS])
def test_the_bias_at_padding_does_not_matter(heads, save):
    real = np.array([[1, 1, 1, 0, 0], [0, 1, 1, 0, 1]], bool)
    layer, params = jp.Attention(HEADS, False, save, block=2), jp.Mask(real)
    x, ct = packed(5), normal(N, 5, HEADS * FEATURES)
    both, bias = (real[:, None, :, None] & real[:, None, None, :]), normal(N, heads, 5, 5)
    results = [
        both_ways(layer, params, (x, np.where(both, bias, bad)), ct) for bad in (0, 1e10, np.nan)
    ]
    assert relative_error(results[1], results[0]) == relative_error(results[2], results[0]) == 0
    assert np.all(np.asarray(results[0][1][1])[~np.broadcast_to(both, bias.shape)] == 0)


@saves
@pytest.mark.parametrize("causal", [True, False])
def test_a_bias_of_minus_infinity_is_a_mask(causal, save):
    layer = jp.Attention(HEADS, causal, save, block=2)
    mask, bias = some(N, HEADS, 5, 5), normal(N, HEADS, 5, 5)
    mask[:, 1:, [0, 2]] = False
    x, ct = packed(5), normal(N, 5, HEADS * FEATURES)
    got = both_ways(layer, (), (x, np.where(mask, bias, -np.inf)), ct)
    expected = both_ways(layer, jp.Mask(mask), (x, np.where(mask, bias, np.nan)), ct)
    assert relative_error(got, expected) <= 1e-12
    assert np.all(np.asarray(got[1][1])[~mask] == 0)
    y = np.asarray(got[0]).reshape(N, 5, HEADS, FEATURES)
    assert np.all(y[:, [0, 2], 1:] == 0)


@saves
def test_a_padded_memory_is_no_memory(save):
    layer = jp.Attention(HEADS, causal=False, save=save, block=2)
    q, memory = crossed(3, 5)
    ct, spoiled = normal(N, 3, HEADS * FEATURES), memory.copy()
    real = np.array([[1, 1, 1, 0, 0]] * N, bool)
    spoiled[:, 3:] = np.nan
    y, (d_q, d_memory) = both_ways(layer, jp.Mask(real), (q, spoiled), ct)
    alone = both_ways(layer, (), (q, memory[:, :3]), ct)
    d_memory = np.asarray(d_memory)
    assert relative_error((y, (d_q, d_memory[:, :3])), alone) <= 1e-12
    assert np.all(d_memory[:, 3:] == 0)


@pytest.mark.full
@saves
@pytest.mark.parametrize("causal", [True, False])
def test_a_window_takes_memory_linear_in_t(save, causal):
    """Forward saves T times the window (plus part of a block), or T alone for the logsumexp."""

    def kept(t):
        layer = jp.Attention(2, causal, save, block=32, window=16)
        x = jax.ShapeDtypeStruct((1, t, 12), jnp.float32)
        return sum(leaf.size for leaf in jax.tree.leaves(jax.eval_shape(layer.forward, (), x)[1]))

    def temp(t):
        layer = jp.Attention(2, causal, "logsumexp", block=32, window=16)
        x = jax.ShapeDtypeStruct((1, t, 12), jnp.float32)
        ct = jax.ShapeDtypeStruct((1, t, 4), jnp.float32)
        return both_ways.lower(layer, (), x, ct).compile().memory_analysis().temp_size_in_bytes

    assert kept(512) <= 512 * (12 + 4 + 2 * (64 + 2 * 16 + 1))
    if save == "logsumexp":
        assert kept(2048) == 4 * kept(512)
        assert temp(2048) <= 4.2 * temp(512)


class Scale(jp.Layer):
    """A user's layer with a plain array as cotangent, so ``shared`` recomputes it by example."""

    def init(self, key, x):
        return jnp.ones(x.shape[-1], x.dtype)

    def forward(self, params, x):
        return x * params[None, None], x

    def backward(self, params, x, ct):
        return jnp.sum(ct * x, (0, 1)), ct * params[None, None]


MASKS = {"of examples": (4, 5, 5), "of heads": (4, 2, 5, 5), "padding": (4, 5)}


@pytest.mark.full
@pytest.mark.few(1)
@pytest.mark.parametrize("shape", MASKS.values(), ids=MASKS)
def test_masks_reach_every_layer_and_go_with_the_examples(shape):
    """Under repeat and shared, in micro-batches, and for single examples."""
    attend = jp.chain(jp.Dense(6), jp.Attention(2, causal=False), Scale(), jp.Dense(4))
    twice = jp.skip(jp.recompute(jp.shared(jp.chain(Scale(), jp.Dense(6), *attend.layers[1:]), 2)))
    deep = jp.repeat(jp.repeat(jp.skip(attend), 2), 3)
    net = jp.chain(jp.Dense(4), deep, twice, jp.Dense(2))
    x, target = jnp.asarray(normal(4, 5, 3)), jnp.asarray(normal(4, 5, 2)[::-1])
    mask = jnp.asarray(some(*shape) if len(shape) > 2 else some(*shape, 5)[:, 0])
    assert not mask.all()
    params = net.init(jax.random.key(0), x)
    bound = net.bind(params, mask=mask)
    nodes = jax.tree.leaves(bound, is_leaf=lambda node: isinstance(node, jp.Mask))
    shapes = [node.value.shape for node in nodes if isinstance(node, jp.Mask)]
    assert shapes == [(3, 2, *shape), shape]

    def alone(x, target, mask):
        one = x[None], target[None]
        return jax.grad(lambda params: jp.loss_fn(net, LOSS)(params, *one, mask=mask[None]))(params)

    each = jax.jit(jax.vmap(alone))(x, target, mask)
    norms = sum(jnp.sum(g**2, range(1, g.ndim)) for g in jax.tree.leaves(each))
    mean = jax.tree.map(lambda g: g.mean(0), each)
    for parts in (1, 2):
        given = ((params, {"mask": mask}), (bound, {}))
        for tree, masks in given[:parts]:
            f = jp.quantities(
                net, LOSS, micro_batches=parts, grads=jp.Gradient(), norms=jp.SqNorms()
            )
            got = jax.jit(f)(tree, x, target, **masks)
            assert relative_error(got["norms"], norms) <= 1e-12
            assert relative_error(got["grads"], mean) <= 1e-12


@pytest.mark.full
def test_check_layer_takes_a_mask_of_any_kind():
    rng = np.random.default_rng(0)
    block = jp.repeat(jp.skip(jp.chain(jp.Dense(6), jp.Attention(2), jp.Dense(4))), 2)
    for shape in MASKS.values():
        mask = jnp.asarray(rng.uniform(size=shape) < 0.6)
        for save in ("weights", "logsumexp"):
            layer = jp.Attention(2, save=save, block=2)
            jp.check_layer(layer, normal(4, 5, 12), layer.bind((), mask=mask))
        x = normal(4, 5, 4)
        jp.check_layer(block, x, block.bind(block.init(jax.random.key(0), x), mask=mask))


def test_errors():
    x = jnp.ones((3, 4, 12))
    layer = jp.Attention(2)
    for shape, hint in (((4, 4), r"broadcast_to\(mask, \(3, 4, 4\)\)"), ((3, 4, 5), "")):
        with pytest.raises(
            ValueError, match=r"or bool\[3, 4, 4\] or bool\[3, 2, 4, 4\]" + ".*" + hint
        ):
            layer.forward(jp.Mask(jnp.ones(shape, bool)), x)
    for shape in ((4,), (1, 2, 3, 4, 5)):
        with pytest.raises(
            ValueError, match=r"mask is bool \(N, T\), .* or for attention \(N, T, S"
        ):
            layer.bind((), mask=jnp.ones(shape, bool))
    pooled = jp.chain(jp.Dense(12), layer, jp.GlobalAvgPool())
    params = jax.eval_shape(pooled.init, jax.random.key(0), x)
    params = pooled.bind(params, mask=jnp.ones((3, 4, 4), bool))
    with pytest.raises(ValueError, match=r"GlobalAvgPool\(\): the mask is .* takes a padding mask"):
        jax.eval_shape(pooled.forward, params, x)
    bias, memory = jnp.ones((3, 2, 4, 4)), jnp.ones((3, 5, 8))
    for wrong in (
        (x,),
        (x, bias[:, :, :3]),
        (x, bias[:1]),
        (x, bias, bias),
        (bias, x),
        (x[..., :4], memory[..., :6]),
        (x[..., :4], memory[:2]),
        (x[..., :4], bias, memory),
        [x, bias],
    ):
        with pytest.raises(ValueError, match=r"takes x of shape \(N, T, 3D\), .* not [(\[]float64"):
            jp.Attention(2, causal=False).forward((), wrong)
    for fields in ({}, {"causal": False, "window": 2}):
        with pytest.raises(ValueError, match="write causal=False, and no window"):
            jp.Attention(2, **fields).forward((), (x[..., :4], memory))
    with pytest.raises(
        ValueError, match=r"\(N, T, D \+ 2 kv_heads d\), .* 4 heads dividing D, not"
    ):
        jp.Attention(4, kv_heads=2).forward((), jnp.ones((3, 4, 12)))
    with pytest.raises(TypeError, match="takes floating x, not int32"):
        layer.forward((), (x, bias.astype(jnp.int32)))
    with pytest.raises(ValueError, match="kv_heads divides the 4 heads, but is 3"):
        jp.Attention(4, kv_heads=3)
    with pytest.raises(ValueError, match="window is at least 1, not 0"):
        jp.Attention(4, window=0)
    with pytest.raises(TypeError, match=r"kv_heads is a whole number, not 2\.0"):
        jp.Attention(4, kv_heads=2.0)
    with pytest.raises(TypeError, match="masked is True or False"):
        jp.Attention(4, masked=1)
    with pytest.raises(ValueError, match="no layer takes a mask"):
        jp.Attention(2, masked=False).bind((), mask=jnp.ones((3, 4), bool))
    for part, given in ((0, x), (2, (x, x)), ("a", {"b": x}), ("a", (x, x))):
        with pytest.raises(ValueError, match=r"Item\(.*\): x is .*float64.*, which has no part"):
            jp.Item(part).forward((), given)


class Near(jp.Layer):
    """A user's learned bias, with a number for each head and each distance below T."""

    heads: int

    def init(self, key, x):
        return jax.random.normal(key, (self.heads, x.shape[1]), x.dtype)

    def forward(self, params, x):
        bias = params[:, self._distance(x.shape[1])]
        return jnp.broadcast_to(bias, (x.shape[0], *bias.shape)), x

    def backward(self, params, x, ct):
        n, t, _ = x.shape
        zeros = jnp.zeros((n, self.heads, t), ct.dtype)
        each = zeros.at[:, :, self._distance(t)].add(ct)
        return jp.Stacked(each), jnp.zeros_like(x)

    def _distance(self, t):
        return abs(np.arange(t)[:, None] - np.arange(t))


@pytest.mark.full
@pytest.mark.few(1)
@saves
def test_a_learned_bias_is_a_layer_in_front(save):
    attention = jp.Attention(2, save=save, block=2)
    net = jp.chain(jp.branch(jp.Dense(12), Near(2), join="tuple"), attention, jp.Dense(2))
    x, target = jnp.asarray(normal(3, 4, 5)), jnp.asarray(normal(3, 4, 2))
    jp.check_layer(net, x)
    params = net.init(jax.random.key(0), x)
    each = oracles.per_example_grads(net, LOSS)(params, x, target)
    norms = jp.per_example_sq_norms(net, LOSS)(params, x, target)
    assert relative_error(norms, oracles.per_example_sq_norms.of(each)) <= 1e-12
    grads = jp.value_and_grad(net, LOSS)(params, x, target)[1]
    assert np.abs(grads[0][1]).max() > 1e-4


def test_no_shape_is_broadcast_unasked():
    for case in ("grouped", "mask of heads", "window", "bias and mask", "masked memory"):
        fields, x, mask = CASES[case]
        params = () if mask is None else jp.Mask(mask)
        layer = jp.Attention(HEADS, **fields)
        ct = np.ones((N, jax.tree.leaves(x)[0].shape[1], HEADS * FEATURES))
        for save in ("weights", "logsumexp"):
            layer = dataclasses.replace(layer, save=save)
            with jax.numpy_rank_promotion("raise"):
                jax.eval_shape(functools.partial(both_ways, layer), params, x, ct)
