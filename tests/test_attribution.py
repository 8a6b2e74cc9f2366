"""Attribution: each method against its equation, written out in plain JAX."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxprop as jp
from jaxprop import rules


def normal(*shape, seed=0):
    return jax.device_put(np.random.default_rng(seed + sum(shape)).normal(size=shape))


def close(got, want, rtol=1e-11, atol=1e-13):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=atol), got, want)


def pixels(*shape, seed=0):
    """Numbers between 0 and 1, some of them exactly 0, like black pixels."""
    x = np.random.default_rng(seed).uniform(size=shape)
    return jax.device_put(np.where(x < 0.2, 0.0, x))


X, TARGET = pixels(6, 5), jax.device_put(np.array([0, 1, 2, 2, 1, 0]))
IMAGES = pixels(4, 8, 8, 2)
MLP = jp.chain(jp.Dense(9), jp.Relu(), jp.Dense(8), jp.Relu(), jp.Dense(3))
UNBIASED = jp.chain(
    *(jp.Dense(9, bias=False), jp.Relu(), jp.Dense(8, bias=False), jp.Relu()),
    jp.Dense(3, bias=False),
)
CNN = jp.chain(
    *(jp.Conv(6, (3, 3), bias=False), jp.Relu(), jp.MaxPool((2, 2))),
    *(jp.Conv(5, (2, 2), bias=False), jp.Relu(), jp.AvgPool((2, 2)), jp.Flatten()),
    *(jp.Dense(7, bias=False), jp.Relu(), jp.Dense(3, bias=False)),
)


@functools.partial(jax.jit, static_argnums=0)
def init(net, x=X):
    params = net.init(jax.random.key(1), x)
    noise = normal(10_000, seed=3)
    return jax.tree.map(lambda w: w + 0.1 * noise[: w.size].reshape(w.shape), params)


@functools.partial(jax.jit, static_argnums=0)
def output(net, params, x, target):
    return net(params, x)[jnp.arange(len(x)), target]


# Relevance as in the papers: R itself is walked back, and each layer shares out what it receives.


def by_epsilon(w, b, x, r, epsilon=1e-6):
    z = x @ w + b
    return x * ((r / (z + epsilon * jnp.where(z < 0, -1, 1))) @ w.T)


def by_gamma(w, b, x, r, gamma=0.25):
    more = w + gamma * jnp.clip(w, 0)
    z = x @ more + b + gamma * jnp.clip(b, 0)
    return x * ((r / z) @ more.T)


def by_alpha_beta(w, b, x, r, alpha=2.0):
    products = x[:, :, None] * w[None]
    plus, minus = jnp.clip(products, 0), jnp.clip(products, max=0)
    beta = alpha - 1

    def shares(z, bias):
        total = z.sum(1) + bias
        return z * jnp.where(total == 0, 0, r / jnp.where(total == 0, 1, total))[:, None]

    shared = alpha * shares(plus, jnp.clip(b, 0)) - beta * shares(minus, jnp.clip(b, max=0))
    return shared.sum(2)


def by_z_box(w, b, x, r, low=0.0, high=1.0):
    del b
    z = x[:, :, None] * w - low * jnp.clip(w, 0) - high * jnp.clip(w, max=0)
    return (z / z.sum(1, keepdims=True) * r[:, None]).sum(2)


def by_flat(w, b, x, r):
    del b
    return jnp.broadcast_to(r.sum(1, keepdims=True) / len(w), x.shape)


EQUATIONS = {
    rules.lrp_epsilon: by_epsilon,
    rules.lrp_gamma: by_gamma,
    rules.lrp_alpha_beta: by_alpha_beta,
    rules.lrp_z_box: by_z_box,
    rules.lrp_flat: by_flat,
}


@pytest.mark.few(1)
@pytest.mark.parametrize("first", EQUATIONS)
@pytest.mark.parametrize("rest", [rules.lrp_epsilon, rules.lrp_gamma, rules.lrp_alpha_beta])
@pytest.mark.usefixtures("standard_promotion")
def test_relevance_is_its_equation_layer_by_layer(first, rest):
    params = init(MLP)
    net = rules.lrp(MLP, {(0,): first, jp.Dense: rest})

    @jax.jit
    def by_equations(params, x, target):
        hs = [x]
        for w, b in (params[0], params[2]):
            hs.append(jax.nn.relu(hs[-1] @ w + b[None]))
        r = jax.nn.one_hot(target, 3) * MLP(params, x)
        for (w, b), h, rule in zip(
            (params[4], params[2], params[0]), reversed(hs), (rest, rest, first), strict=True
        ):
            r = EQUATIONS[rule](w, b[None], h, r)
        return r

    got, want = (f(params, X, TARGET) for f in (jax.jit(rules.relevance(net)), by_equations))
    close(got, want, rtol=1e-9, atol=1e-11)


@pytest.fixture
def standard_promotion():
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


CONSERVING = {
    "zero": {jp.Dense: functools.partial(rules.lrp_epsilon, epsilon=0.0)},
    "gamma": {jp.Dense: rules.lrp_gamma},
    "positive": {jp.Dense: functools.partial(rules.lrp_alpha_beta, alpha=1.0)},
    "box": {(0,): rules.lrp_z_box, jp.Dense: rules.lrp_gamma},
    "flat": {(0,): rules.lrp_flat, jp.Dense: rules.lrp_gamma},
}


@pytest.mark.full
@pytest.mark.parametrize("name", CONSERVING)
@pytest.mark.parametrize("images", [False, True])
def test_relevance_is_conserved(name, images):
    net, x = (CNN, IMAGES) if images else (UNBIASED, X)
    params, target = init(net, x), TARGET[: len(x)]
    composite = {}
    for where, rule in CONSERVING[name].items():
        composite[(jp.Conv, jp.Dense) if where is jp.Dense else where] = rule
    shares = rules.relevance(rules.lrp(net, composite))(params, x, target)
    assert shares.shape == x.shape
    total = shares.sum(axis=tuple(range(1, x.ndim)))
    close(total, output(net, params, x, target), rtol=1e-6, atol=1e-9)


@pytest.mark.full
def test_what_biases_keep_is_the_rest():
    """With LRP-0 the relevance of a bias is the bias times its cotangent."""
    params = init(MLP)
    net = rules.lrp(MLP, {jp.Dense: functools.partial(rules.lrp_epsilon, epsilon=0.0)})
    y, saved = net.forward(params, X)
    ct = jax.nn.one_hot(TARGET, 3, dtype=y.dtype)
    grads = jax.vmap(lambda s, c: _grads(net, params, s, c))(saved, ct)
    kept = sum((params[i].b[None] * grads[i].b).sum(1) for i in (0, 2, 4))
    shares = rules.relevance(net)(params, X, TARGET)
    close(shares.sum(1) + kept, (y * ct).sum(1), rtol=1e-6)


def _grads(net, params, saved, ct):
    alone = jax.tree.map(lambda leaf: leaf[None], (saved, ct))
    return jp.core.cotangents.summed(net.backward(params, *alone)[0])


@pytest.mark.full
@pytest.mark.usefixtures("standard_promotion")
def test_an_encoder_has_the_rules_of_attnlrp():
    """LayerNorm, skip, attention and GELU against relevance that is passed on step by step."""
    heads, d = 2, 4
    net = jp.chain(
        jp.skip(jp.chain(jp.LayerNorm(), jp.Dense(3 * 4), jp.Attention(heads, causal=False))),
        *(jp.Dense(6), jp.Gelu(), jp.GlobalAvgPool(), jp.Dense(3)),
    )
    x = normal(3, 5, d)
    params = init(net, x)
    net = rules.lrp(net, {jp.Dense: functools.partial(rules.lrp_epsilon, epsilon=0.0)})
    (norm, qkv, _), dense, _, _, head = params[0], *params[1:]

    def matrix(w, b, x, r):
        z = x @ w + b
        return x * ((r / z) @ w.T)

    mean = x.mean(-1, keepdims=True)
    std = jnp.sqrt(x.var(-1, keepdims=True) + 1e-5)
    n = (x - mean) / std * norm.scale + norm.bias
    packed = n @ qkv.w + qkv.b
    q, k, v = (z.reshape(3, 5, heads, 2).swapaxes(1, 2) for z in jnp.split(packed, 3, -1))
    s = q @ k.swapaxes(2, 3) / np.sqrt(2)
    p = jax.nn.softmax(s)
    out = (p @ v).swapaxes(1, 2).reshape(3, 5, d)
    h = x + out
    pre = h @ dense.w + dense.b
    act = jax.nn.gelu(pre)
    pooled = act.mean(1)
    y = pooled @ head.w + head.b
    r = jax.nn.one_hot(TARGET[:3], 3) * y
    r = matrix(*head, pooled, r)
    r = act / 5 * (r / pooled)[:, None]
    r = matrix(*dense, h, r)  # the activation passes it on
    r_skip, r_out = r * x / h, r * out / h
    r_heads = r_out.reshape(3, 5, heads, 2).swapaxes(1, 2)
    o = p @ v
    shared = p[..., None] * v[:, :, None] * (r_heads / o)[:, :, :, None] / 2
    r_p, r_v = shared.sum(-1), shared.sum(2)
    r_s = s * (r_p - p * r_p.sum(-1, keepdims=True))
    each = q[:, :, :, None] * k[:, :, None] / np.sqrt(2) * (r_s / s)[..., None] / 2
    r_q, r_k = each.sum(3), each.sum(2)
    r = jnp.concatenate([z.swapaxes(1, 2).reshape(3, 5, d) for z in (r_q, r_k, r_v)], -1)
    r = matrix(*qkv, n, r)
    c = norm.scale * (r / n) / std
    r = x * (c - c.mean(-1, keepdims=True))
    close(rules.relevance(net)(params, x, TARGET[:3]), r + r_skip, rtol=1e-8)


ATTENDING = [
    ("packed", jp.Attention(2), normal(2, 3, 12)),
    ("grouped", jp.Attention(4, kv_heads=2), normal(2, 3, 16)),
    ("memory", jp.Attention(2, causal=False), (normal(2, 3, 4), normal(2, 5, 8))),
    ("bias", jp.Attention(2), (normal(2, 3, 12), normal(2, 2, 3, 3))),
    ("all", jp.Attention(2, causal=False), (normal(2, 3, 4), normal(2, 5, 8), normal(2, 2, 3, 5))),
]


@pytest.mark.few(1)
@pytest.mark.parametrize(
    ("layer", "x"), [row[1:] for row in ATTENDING], ids=[r[0] for r in ATTENDING]
)
def test_halves_of_attention(layer, x):
    """Half of y's relevance goes to v and half to the scores, which halve it between q and k."""
    net = rules.lrp(layer)
    jp.check_layer(net, x)
    y, saved = jax.jit(net.forward)((), x)
    ct = normal(*y.shape, seed=5)
    _, plain = jax.jit(layer.backward)((), saved, ct)
    _, halved = jax.jit(net.backward)((), saved, ct)
    parts, whole = (
        jax.tree.map(np.asarray, z if isinstance(x, tuple) else (z,)) for z in (halved, plain)
    )
    d, v = y.shape[-1], {"grouped": 4}.get("", 4)
    if isinstance(x, tuple) and x[1].ndim == 3:
        close(parts[0], whole[0] / 4)
        close(parts[1], whole[1] * np.repeat([0.25, 0.5], v))
    else:
        scale = np.concatenate(
            [
                np.full(parts[0].shape[-1] - (parts[0].shape[-1] - d) // 2, 0.25),
                np.full((parts[0].shape[-1] - d) // 2, 0.5),
            ]
        )
        close(parts[0], whole[0] * scale)
    if isinstance(x, tuple) and x[-1].ndim == 4:
        close(parts[-1], whole[-1] / 2)


LAYERS = {
    "epsilon": (rules.lrp_epsilon(jp.Dense(3)), normal(4, 5)),
    "gamma": (rules.lrp_gamma(jp.Conv(3, (2, 2))), pixels(3, 4, 4, 2)),
    "alpha beta": (rules.lrp_alpha_beta(jp.Dense(3)), normal(4, 5)),
    "box": (rules.lrp_z_box(jp.Conv(3, (2, 2), strides=2)), pixels(3, 4, 4, 2)),
    "flat": (rules.lrp_flat(jp.ConvTranspose(3, (2, 2))), pixels(3, 4, 4, 2)),
    "net": (rules.lrp(CNN), IMAGES),
    "repeat": (
        rules.lrp(jp.repeat(jp.skip(jp.chain(jp.RMSNorm(), jp.Dense(4), jp.Silu())), 2)),
        normal(3, 4),
    ),
    "guided": (rules.guided_backprop(MLP), normal(4, 5)),
    "deconvolution": (rules.deconvolution(MLP), normal(4, 5)),
}


@pytest.mark.few(1)
@pytest.mark.parametrize("name", LAYERS)
def test_all_but_the_derivative_is_checked(name):
    jp.check_layer(*LAYERS[name])


def test_guided_backprop_and_deconvolution_are_their_equations():
    params = init(MLP)
    (w1, b1), _, (w2, b2), _, (w3, _) = jax.tree.map(np.asarray, params)
    a1 = np.asarray(X) @ w1 + b1
    a2 = np.maximum(a1, 0) @ w2 + b2
    ct = w3.T[np.asarray(TARGET)]
    for rule, factor in (
        (rules.guided_backprop, lambda a: a > 0),
        (rules.deconvolution, np.ones_like),
    ):
        d = np.maximum(ct, 0) * factor(a2)
        d = np.maximum(d @ w2.T, 0) * factor(a1)
        close(jax.jit(rules.saliency(rule(MLP)))(params, X, TARGET), d @ w1.T)


def test_saliency_and_gradient_times_input_are_those_of_autodiff():
    params, weights = init(MLP), normal(6, 3)
    saliency, products = (jax.jit(f(MLP)) for f in (rules.saliency, rules.gradient_times_input))

    def grad(f):
        return jax.jit(jax.grad(f))(X)

    d_x = grad(lambda x: output(MLP, params, x, TARGET).sum())
    close(saliency(params, X, TARGET), d_x)
    close(products(params, X, TARGET), np.asarray(X) * d_x)
    close(saliency(params, X, weights), grad(lambda x: (MLP(params, x) * weights).sum()))
    close(saliency(params, X), grad(lambda x: MLP(params, x).sum()))


def test_integrated_gradients_add_up_to_the_difference():
    net = jp.chain(jp.Dense(8), jp.Tanh(), jp.Dense(3))
    params = init(net)
    x = np.asarray(X)
    for baseline in (0.0, 0.5, x[::-1], jnp.full((1, 5), 0.3)):
        start = np.broadcast_to(baseline, x.shape)
        each = rules.integrated_gradients(net, baseline=baseline, steps=300)(params, X, TARGET)
        end, begin = (np.asarray(output(net, params, z, TARGET)) for z in (x, start))
        close(np.asarray(each).sum(1), end - begin, rtol=1e-4, atol=1e-5)
    points = [start + (x - start) * (k + 0.5) / 3 for k in range(3)]
    saliency = jax.jit(rules.saliency(net))
    d_x = sum(np.asarray(saliency(params, p, TARGET)) for p in points) / 3
    got = rules.integrated_gradients(net, baseline=0.3, steps=3)(params, X, TARGET)
    close(got, (x - start) * d_x)


def test_smooth_grad_is_the_mean_where_noise_is_added():
    params, key = init(MLP), jax.random.key(4)
    got = rules.smooth_grad(MLP, deviation=0.2, samples=3)(params, X, TARGET, key=key)

    @jax.jit
    def at_noise(deviation, key):
        noise = jax.random.normal(jax.random.split(key, 1)[0], X.shape)
        return rules.saliency(MLP)(params, X + deviation * noise, TARGET)

    each = [np.asarray(at_noise(0.2, k)) for k in jax.random.split(key, 3)]
    close(got, sum(each) / 3)
    assert not np.allclose(got, each[0])
    exact = rules.smooth_grad(MLP, deviation=0.0, samples=2)(params, X, TARGET, key=key)
    close(exact, at_noise(0.0, key))


@pytest.mark.full
@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float32])
def test_narrow_relevance_is_finite_at_black_pixels(dtype):
    net = rules.lrp(UNBIASED, {(0,): rules.lrp_z_box, jp.Dense: rules.lrp_gamma})
    params = init(net)
    x = X.at[0].set(0.0).at[1, 1].set(1e-7)
    want = rules.relevance(net)(params, x, TARGET)
    narrow = jax.tree.map(lambda leaf: leaf.astype(dtype), (params, x))
    got = rules.relevance(net)(*narrow, TARGET)
    assert got.dtype == dtype
    scale = float(jnp.abs(want).max())
    np.testing.assert_allclose(got.astype(float), want, atol=0.05 * scale)


@pytest.mark.full
@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("rule", [rules.lrp_flat, rules.lrp_alpha_beta, rules.lrp_z_box])
def test_large_scores_are_shared_out_in_narrow_numbers(rule, dtype):
    net = rules.lrp(UNBIASED, {(0,): rule})
    params = jax.tree.map(jnp.abs, init(net))
    x = X.at[0, 1:4].set(0.0)
    want = rules.relevance(net)(params, x, TARGET)
    assert float(output(net, params, x, TARGET).max()) > 10
    got = rules.relevance(net)(*jax.tree.map(lambda leaf: leaf.astype(dtype), (params, x)), TARGET)
    np.testing.assert_allclose(got.astype(float), want, atol=0.05 * float(jnp.abs(want).max()))


def test_rules_reach_what_is_shared():
    inner = jp.chain(jp.Dense(5), jp.Relu())
    net = jp.chain(jp.Dense(5), jp.shared(inner, 2), jp.Dense(3))
    unrolled = jp.chain(jp.Dense(5), *(jp.Dense(5), jp.Relu()) * 2, jp.Dense(3))
    params = init(net)
    ((w, _), last) = params[1], params[2]
    flat = (params[0], w, (), w, (), last)
    for rule in (rules.guided_backprop, rules.deconvolution, rules.sign_symmetric, rules.lrp):
        got, want = (jax.jit(rules.saliency(rule(each))) for each in (net, unrolled))
        close(got(params, X, TARGET), want(flat, X, TARGET))


@pytest.mark.full
def test_in_jit_vmap_and_of_one_example():
    params = init(MLP)
    for f in (rules.relevance(rules.lrp(MLP)), rules.integrated_gradients(MLP, steps=3)):
        want = f(params, X, TARGET)
        close(jax.jit(f)(params, X, TARGET), want)
        close(f(params, X[:1], TARGET[:1]), want[:1])
        alone = jax.vmap(lambda x, t, f=f: f(params, x[None], t[None])[0])(X, TARGET)
        close(alone, want)


def test_mistakes_are_said():
    params = init(MLP)
    with pytest.raises(TypeError, match="lrp knows no rule for Lstm"):
        rules.lrp(jp.chain(jp.Lstm(3), jp.Dense(2)))
    rules.lrp(jp.Lstm(3), {jp.Lstm: functools.partial(rules.scale_gradient, scale=1.0)})
    with pytest.raises(ValueError, match="matches no layer of"):
        rules.lrp(MLP, {jp.Conv: rules.lrp_gamma})
    with pytest.raises(ValueError, match="alpha is at least 1"):
        rules.lrp_alpha_beta(MLP, alpha=0.5)
    with pytest.raises(ValueError, match="low is below high"):
        rules.lrp_z_box(MLP, low=1.0, high=0.0)
    with pytest.raises(TypeError, match="it takes no weights"):
        rules.saliency(MLP)(params, X, TARGET, weights=jnp.ones(6))
    with pytest.raises(ValueError, match="give key="):
        rules.smooth_grad(MLP, deviation=0.1)(params, X, TARGET)
    with pytest.raises(ValueError, match="integer targets are"):
        rules.saliency(MLP)(params, X, TARGET[:3])
    with pytest.raises(ValueError, match="weights are like y"):
        rules.saliency(MLP)(params, X, normal(6, 2))
    with pytest.raises(ValueError, match="weights are like y"):
        rules.saliency(MLP)(params, X, [1.0])
    text = jp.chain(jp.Embedding(7, 4), jp.GlobalAvgPool(), jp.Dense(3))
    ids = jnp.zeros((6, 3), int)
    with pytest.raises(ValueError, match="from 0 to 2, not 3"):
        rules.saliency(MLP)(params, X, TARGET.at[0].set(3))
    with pytest.raises(ValueError, match="inference_mode"):
        rules.lrp(jp.chain(jp.Dense(3), jp.BatchNorm()))
    with pytest.raises(TypeError, match="explain what comes behind it"):
        rules.saliency(text)(text.init(jax.random.key(0), ids), ids, TARGET)
    with pytest.raises(ValueError, match="steps is at least 1"):
        rules.integrated_gradients(MLP, steps=0)
    with pytest.raises(ValueError, match="baseline"):
        rules.integrated_gradients(MLP, baseline=normal(4, 4))(params, X, TARGET)
