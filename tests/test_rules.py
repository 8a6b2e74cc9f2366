"""Other backward rules: each against its equation, written out in plain JAX."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxprop as jp
from jaxprop import rules
from jaxprop.rules.feedback import FeedbackParams
from jaxprop.rules.spiking import SURROGATES

LOSS = jp.HalfSquaredError()


def normal(*shape, seed=0):
    return np.random.default_rng(seed + sum(shape)).normal(size=shape)


X, TARGET = normal(6, 4), normal(6, 2)
NET = jp.chain(jp.Dense(5), jp.Tanh(), jp.Dense(3), jp.Tanh(), jp.Dense(2))


def init(net, x=X):
    return net.init(jax.random.key(1), x)


def by_hand(ws, bs, x, target, feedback):
    """The gradients of three dense layers with tanh, where feedback carries ct back.

    Args:
        ws: the weights.
        bs: the biases.
        x: the inputs.
        target: the targets.
        feedback: for each hidden layer, from the last, the matrix that multiplies ct, and whether
            that is the output's ct instead of the ct of the layer above.
    """
    hs = [x]
    for index, (w, b) in enumerate(zip(ws, bs, strict=True)):
        z = hs[-1] @ w + b
        hs.append(z if index == 2 else np.tanh(z))
    error = (hs[-1] - target) / len(x)
    cts, ct = [error], error
    for (b, direct), h in zip(reversed(feedback), (hs[2], hs[1]), strict=True):
        ct = ((error if direct else ct) @ b) * (1 - h**2)
        cts.append(ct)
    cts.reverse()
    return [h.T @ ct for h, ct in zip(hs, cts, strict=False)], [ct.sum(0) for ct in cts]


def close(got, want, rtol=1e-12):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=1e-14), got, want)


def test_feedback_alignment_is_its_equation():
    net = rules.feedback_alignment(NET)
    params = jax.device_get(init(net))
    layers = [params[index] for index in (0, 2, 4)]
    ws, bs = [p.params.w for p in layers], [p.params.b for p in layers]
    fixed = [p.feedback[0].value for p in layers]
    assert all(b.shape == w.shape and not np.allclose(b, w) for b, w in zip(fixed, ws, strict=True))
    dw, db = by_hand(ws, bs, X, TARGET, [(fixed[1].T, False), (fixed[2].T, False)])
    value, grads = jax.jit(jp.value_and_grad(net, LOSS))(params, X, TARGET)
    close([grads[i].params.w for i in (0, 2, 4)], dw)
    close([grads[i].params.b for i in (0, 2, 4)], db)
    plain = tuple(p.params if isinstance(p, FeedbackParams) else p for p in params)
    close(value, jax.jit(jp.loss_fn(NET, LOSS))(plain, X, TARGET))
    close(plain, init(NET), rtol=0)  # the params are those of the net without the rule


@pytest.mark.parametrize("magnitude", ["forward", "uniform"])
def test_sign_symmetric_is_its_equation(magnitude):
    net = rules.sign_symmetric(NET, magnitude=magnitude)
    params = jax.device_get(init(net))
    params = jax.tree.map(lambda leaf: np.where(np.abs(leaf) < 0.2, 0, leaf), params)  # pruned
    ws, bs = ([getattr(params[i], name) for i in (0, 2, 4)] for name in "wb")

    def of(w):
        size = np.linalg.norm(w) / np.sqrt((w != 0).sum()) if magnitude == "forward" else 1
        return np.sign(w).T * size

    dw, db = by_hand(ws, bs, X, TARGET, [(of(ws[1]), False), (of(ws[2]), False)])
    grads = jax.jit(jp.value_and_grad(net, LOSS))(params, X, TARGET)[1]
    close([grads[i].w for i in (0, 2, 4)], dw)
    close([grads[i].b for i in (0, 2, 4)], db)
    if magnitude == "forward":
        close([np.linalg.norm(of(w)) for w in ws], [np.linalg.norm(w) for w in ws])


def test_direct_feedback_alignment_is_its_equation():
    net = rules.direct_feedback_alignment(NET)
    params = jax.device_get(init(net))
    fixed = params.feedback
    assert [b == () for b in fixed] == [True, True, False, True, False]
    assert fixed[2].value.shape == (2, 5)
    assert fixed[4].value.shape == (2, 3)
    ws, bs = ([getattr(params.params[i], name) for i in (0, 2, 4)] for name in "wb")
    feedback = [(fixed[2].value, True), (fixed[4].value, True)]
    dw, db = by_hand(ws, bs, X, TARGET, feedback)
    grads = jax.jit(jp.value_and_grad(net, LOSS))(params, X, TARGET)[1]
    close([grads.params[i].w for i in (0, 2, 4)], dw)
    close([grads.params[i].b for i in (0, 2, 4)], db)


def test_kolen_pollack_steps_both_alike_and_they_meet_under_a_decay():
    net = rules.kolen_pollack(NET)
    params = jax.device_get(init(net))
    layers = [params[index] for index in (0, 2, 4)]
    ws, bs, others = (
        [p.params.w for p in layers],
        [p.params.b for p in layers],
        [p.feedback[0] for p in layers],
    )
    dw, _ = by_hand(ws, bs, X, TARGET, [(others[1].T, False), (others[2].T, False)])
    grads = jax.jit(jp.value_and_grad(net, LOSS))(params, X, TARGET)[1]
    for which, want in zip((0, 2, 4), dw, strict=True):
        close((grads[which].params.w, grads[which].feedback[0]), (want, want))
    rate, decay = 0.1, 0.5
    optimizer = optax.chain(optax.add_decayed_weights(decay), optax.sgd(rate))
    for fused in (False, True):
        update = jp.make_update(net, LOSS, optimizer, fused=fused, donate=False)
        now, state = params, update.init(params)
        for _ in range(3):
            now, state, _ = update(now, state, X, TARGET)
        now = jax.device_get(now)
        for i in (0, 2, 4):
            before, after = (p[i].feedback[0] - p[i].params.w for p in (params, now))
            close(after, before * (1 - rate * decay) ** 3, rtol=1e-9)


CONV = jp.chain(jp.Conv(3, (3, 3)), jp.Relu(), jp.Conv(2, (3, 3)), jp.Flatten(), jp.Dense(2))
NETS = {
    "dense": (NET, X),
    "convolutions": (CONV, normal(3, 6, 6, 2)),
    "lstm": (jp.chain(jp.Lstm(3), jp.Dense(2)), normal(3, 4, 2)),
    "gru": (jp.Gru(3), normal(3, 4, 2)),
    "attention": (jp.chain(jp.Dense(12), jp.Attention(2), jp.Dense(4)), normal(3, 4, 4)),
    "repeat": (jp.repeat(jp.skip(jp.chain(jp.Dense(4), jp.Tanh())), 3), normal(3, 4)),
}
FEEDBACK = {
    "feedback_alignment": rules.feedback_alignment,
    "sign_symmetric": rules.sign_symmetric,
    "kolen_pollack": rules.kolen_pollack,
}


def oracle(rule, net, params, x):
    """A target, and each example's gradient, from a batch of one."""
    y = jax.eval_shape(net, params, x)
    target = normal(*y.shape, seed=3)

    def alone(x, target):
        return jp.value_and_grad(net, LOSS)(params, x[None], target[None])[1]

    return target, jax.jit(jax.vmap(alone))(x, target)


@pytest.mark.full
@pytest.mark.parametrize(("rule", "name"), list(itertools.product(FEEDBACK, NETS)))
def test_feedback_in_every_kind_of_layer(rule, name):
    """check_layer checks all but the derivative; quantities use the rule's own backward."""
    net, x = NETS[name]
    net = FEEDBACK[rule](net)
    angles = jp.check_layer(net, x)
    assert 0 < angles.d_x < 180
    assert 0 < angles.d_params < 180
    params = init(net, x)
    target, each = oracle(rule, net, params, x)
    got = jp.quantities(
        net, LOSS, each=jp.PerExampleGrads(), norms=jp.SqNorms(), clipped=jp.Clipped(0.1)
    )(params, x, target)
    learned = jax.tree.leaves(jp.core.tree.learned(each))
    close(jax.tree.leaves(jp.core.tree.learned(got["each"])), learned, rtol=1e-9)
    norms = sum((g**2).sum(axis=tuple(range(1, g.ndim))) for g in learned)
    np.testing.assert_allclose(got["norms"], norms, rtol=1e-9)
    scales = jnp.minimum(1, 0.1 / jnp.sqrt(norms)) / len(norms)
    clipped = [jnp.tensordot(scales, g, 1) for g in learned]
    close(jax.tree.leaves(jp.core.tree.learned(got["clipped"])), clipped, rtol=1e-9)


@pytest.mark.few(1)
@pytest.mark.parametrize("name", ["dense", "convolutions"])
def test_direct_feedback_passes_all_checks_but_the_derivative(name):
    plain, x = NETS[name]
    net = rules.direct_feedback_alignment(plain)
    angles = jp.check_layer(net, x)
    assert 0 < angles.d_params < 180
    params = init(net, x)
    target, each = oracle("dfa", net, params, x)
    got = jax.jit(jp.per_example_grads(net, LOSS))(params, x, target)
    close(*map(jp.core.tree.learned, (got, each)), rtol=1e-9)


def test_unlearned_feedback_is_touched_by_nobody():
    for net in (rules.feedback_alignment(NET), rules.direct_feedback_alignment(NET)):
        params = init(net)
        for fused in (False, True):
            update = jp.make_update(net, LOSS, optax.adam(0.1), fused=fused, donate=False)
            with jax.numpy_dtype_promotion("standard"):
                after, _, _ = update(params, update.init(params), X, TARGET)
            fixed = [
                [leaf.value for leaf in jax.tree.leaves(tree, is_leaf=is_fixed) if is_fixed(leaf)]
                for tree in (params, after)
            ]
            assert len(fixed[0]) in (2, 3)
            close(*fixed, rtol=0)
            moved = jax.tree.map(
                lambda a, b: np.not_equal(a, b).any(), *map(jp.core.tree.learned, (params, after))
            )
            assert all(jax.tree.leaves(moved))


def is_fixed(leaf):
    return isinstance(leaf, jp.Unlearned)


@pytest.mark.full
def test_explained_and_clipped_by_layer():
    for net in (rules.feedback_alignment(NET), rules.direct_feedback_alignment(NET)):
        params = init(net)
        explained = jp.explain(net, LOSS, params, X, TARGET)
        assert "Tanh()" in str(explained)
        assert "is finite" in str(jp.find_nonfinite(net, LOSS, params, X, TARGET))
        grads = jp.clipped_grad(net, LOSS, 0.1, per_layer=True)(params, X, TARGET)[1]
        assert jax.tree.structure(grads) == jax.tree.structure(params)
        factors = jp.kronecker_factors(net, LOSS)(params, X, TARGET)
        assert sum(leaf.size for leaf in jax.tree.leaves(factors)) > 100


def test_top_k_of_what_is_masked():
    x = jnp.array([[1.0, -jnp.inf, 3.0]])
    np.testing.assert_array_equal(rules.top_k(x, 1), [[0, 0, 3]])


def test_where_selects_by_class_predicate_and_path():
    def changed(net):
        return [type(layer).__name__ for layer in net.layers]

    rule = functools.partial(rules.sign_symmetric, NET)
    assert changed(rule(where=(2,))) == ["Dense", "Tanh", "SignSymmetric", "Tanh", "Dense"]
    assert changed(rule(where=lambda layer: getattr(layer, "features", 0) == 2))[-1:] == [
        "SignSymmetric"
    ]
    assert changed(rule(where=jp.Dense)).count("SignSymmetric") == 3
    cast = rules.sign_symmetric(jp.cast(NET, jnp.bfloat16))
    assert changed(cast).count("SignSymmetric") == 3
    inner = rules.sign_symmetric(jp.chain(jp.skip(NET), jp.Tanh()), where=(0, 4))
    assert changed(inner.layers[0].layer)[-1] == "SignSymmetric"
    with pytest.raises(ValueError, match=r"where=.* matches no layer of"):
        rule(where=(7,))
    with pytest.raises(TypeError, match="a predicate of a layer, a class of layers or a tuple"):
        rule(where="Dense")
    with pytest.raises(ValueError, match=r"Tanh.* has no matrix for feedback"):
        init(rules.feedback_alignment(NET, where=jp.Tanh))


def test_a_layer_that_saves_its_params_is_refused():
    class Saves(jp.Layer):
        def init(self, key, x):
            return jnp.eye(x.shape[-1], dtype=x.dtype)

        def forward(self, params, x):
            return x @ params, (x, params)

        def backward(self, params, residuals, ct):
            x, w = residuals
            return jp.Outer(x, ct), ct @ w.T

    net = rules.feedback_alignment(Saves(), where=Saves)
    with pytest.raises(TypeError, match="saves its params among its residuals"):
        net.forward(init(net), X)


def test_a_function_is_refused():
    """Its params are in its own trace, as they are or rounded, and others cannot replace them."""

    def fn(w, x):
        return x.astype(jnp.bfloat16) @ w.astype(jnp.bfloat16)

    net = jp.chain(jp.function(fn), jp.Dense(2))
    assert rules.feedback_alignment(net).layers[0] == net.layers[0]
    for rule in FEEDBACK.values():
        with pytest.raises(TypeError, match="walks back through its own trace"):
            rule(net, where=lambda layer: True)


HANDED_BACK = {
    "reverse_gradient": (rules.reverse_gradient(NET, scale=0.5), lambda d: -0.5 * d),
    "scale_gradient": (rules.scale_gradient(NET, scale=3.0), lambda d: 3 * d),
    "stop_gradient": (rules.stop_gradient(NET), jnp.zeros_like),
    "by value": (rules.clip_cotangent(NET, max_value=0.01), lambda d: jnp.clip(d, -0.01, 0.01)),
    "by norm": (
        rules.clip_cotangent(NET, max_norm=0.5),
        lambda d: d * jnp.minimum(1, 0.5 / jnp.linalg.norm(d, axis=1, keepdims=True)),
    ),
    "bfloat16": (rules.quantize_cotangent(NET), lambda d: d.astype(jnp.bfloat16).astype(d.dtype)),
    "float8": (
        rules.quantize_cotangent(NET, jnp.float8_e5m2),
        lambda d: d.astype(jnp.float8_e5m2).astype(d.dtype),
    ),
}


@pytest.mark.few(2)
@pytest.mark.parametrize("name", HANDED_BACK)
def test_what_is_handed_back_is_changed_and_nothing_else(name):
    net, change = HANDED_BACK[name]
    params, ct = init(net), normal(6, 2, seed=9)

    def both_ways(net):
        y, residuals = jax.jit(net.forward)(params, X)
        return y, *jax.jit(net.backward)(params, residuals, ct)

    (y, d_params, d_x), (plain_y, *plain) = both_ways(net), both_ways(NET)
    close(d_x, jax.jit(change)(plain[1]), rtol=1e-15)
    close(d_params, plain[0])
    close(y, plain_y, rtol=0)
    jp.check_layer(net, X)
    if name == "by norm":
        sizes = np.linalg.norm(plain[1], axis=1)
        assert 0 < (sizes > 0.5).sum() < 6


def test_a_clipped_cotangent_of_huge_numbers_and_none():
    net = rules.clip_cotangent(jp.Tanh(), max_norm=1.0)
    x = np.zeros((3, 4), np.float32)
    ct = np.array([[1e30] * 4, [0.0] * 4, [0.1] * 4], np.float32)
    d_x = jax.jit(lambda x, ct: net.backward((), net.forward((), x)[1], ct)[1])(x, ct)
    np.testing.assert_allclose(np.linalg.norm(d_x, axis=1), [1, 0, 0.2], rtol=1e-6)
    ids = rules.clip_cotangent(jp.Embedding(3, 2), max_norm=1.0)
    table, numbers = init(ids, np.zeros((2,), int)), np.array([0, 2])
    _, residuals = jax.jit(ids.forward)(table, numbers)
    assert jax.jit(ids.backward)(table, residuals, np.ones((2, 2)))[1] is None


def test_a_quantized_cotangent_keeps_the_largest_number():
    net = rules.quantize_cotangent(jp.Tanh(), jnp.float8_e4m3fn)
    x, ct = np.zeros((1, 3), np.float32), np.array([[1e9, -1e9, 0.3]], np.float32)
    d_x = jax.jit(lambda ct: net.backward((), net.forward((), x)[1], ct)[1])(ct)
    np.testing.assert_allclose(d_x, [[448, -448, 0.3125]])


def test_noise_is_new_for_each_key_and_of_the_deviation():
    net = rules.noisy_cotangent(NET, deviation=0.5)
    params, x = init(net, np.ones((400, 4))), normal(400, 4)
    y = jax.jit(net)(params, x)
    d_x = jax.jit(lambda params: net.backward(params, net.forward(params, x)[1], y)[1])
    with_keys = [net.bind(params, key=jax.random.key(seed)) for seed in (0, 0, 1)]
    each = [np.asarray(d_x(p)) - np.asarray(d_x(params)) for p in with_keys]
    close(each[0], each[1], rtol=0)
    assert abs(np.std(each[0]) - 0.5) < 0.03
    assert abs(np.mean(each[0])) < 0.06
    assert abs(np.mean(each[0] * each[2])) < 0.03
    value, grads = jax.jit(jp.value_and_grad(net, LOSS))(params, x, y, key=jax.random.key(0))
    assert value == 0
    assert not any(np.any(g) for g in jax.tree.leaves(grads))  # no layer comes before the noise


def test_adversarial_training_turns_one_side_around():
    """Ganin and Lempitsky's net: features learn against a head, which itself learns as usual."""
    features, head = jp.Dense(3), jp.chain(jp.Tanh(), jp.Dense(2))
    net = jp.chain(features, rules.reverse_gradient(head, scale=2.0))
    plain = jp.chain(features, head)
    params = init(net)
    (_, got), (_, want) = (
        jax.device_get(jax.jit(jp.value_and_grad(each, LOSS))(params, X, TARGET))
        for each in (net, plain)
    )
    close(got[1], want[1])
    close(got[0], jax.tree.map(lambda g: -2 * g, want[0]))


@pytest.mark.parametrize(
    ("fn", "passing", "y"),
    [
        (jnp.round, None, [-2, 0, 0, 1]),
        (jnp.sign, 1.0, [-1, -1, 1, 1]),
        (rules.one_hot_argmax, None, [0, 0, 0, 1]),
        (functools.partial(rules.top_k, k=2), None, [0, 0, 0.3, 1.2]),
        (lambda x: jnp.clip(x, -1, 1), 1.0, [-1, -0.4, 0.3, 1]),
    ],
    ids=["round", "sign", "argmax", "top-k", "clip"],
)
def test_straight_through_passes_the_cotangent(fn, passing, y):
    layer = rules.straight_through(fn, passing=passing)
    x, ct = np.array([[-1.7, -0.4, 0.3, 1.2]]), np.array([[1.0, 2.0, 3.0, 4.0]])
    out, saved = jax.jit(layer.forward)((), x)
    np.testing.assert_allclose(out, [y])
    d_x = jax.jit(layer.backward)((), saved, ct)[1]
    passes = np.abs(x) <= passing if passing else np.ones_like(x, bool)
    np.testing.assert_array_equal(d_x, np.where(passes, ct, 0))
    jp.check_layer(layer, x)


SMOOTH = {
    "fast_sigmoid": lambda z: z / (1 + jnp.abs(z)) / 2,
    "arctan": lambda z: jnp.arctan(jnp.pi / 2 * z) / jnp.pi,
    "triangle": lambda z: jnp.where(jnp.abs(z) < 1, z - jnp.sign(z) * z**2 / 2, jnp.sign(z) / 2),
    "sigmoid": jax.nn.sigmoid,
    "boxcar": lambda z: jnp.clip(z, -1, 1) / 2,
}


@pytest.mark.few(2)
@pytest.mark.parametrize("name", SURROGATES)
def test_a_surrogate_is_the_derivative_of_its_smooth_step(name):
    """The derivatives by x and by the slope."""
    x, k = np.array([[-3.0, -0.4, -0.01, 0.02, 0.3, 2.5]]), np.array(1.7)
    ct = normal(1, 6)
    layer, fixed = rules.Spike(name, 1.7, learned=True), rules.Spike(name, 1.7)

    @jax.jit
    def both_ways(x):
        params = layer.init(jax.random.key(0), x)
        y, saved = layer.forward(params, x)
        d_k, d_x = layer.backward(params, saved, ct)
        return y, d_k.sum(), d_x, fixed.backward((), x, ct)[1]

    @jax.jit
    def pulled(k, x):
        return jax.vjp(lambda k, x: SMOOTH[name](k * x), k, x)[1](ct)

    (y, d_k, *d_xs), (want_k, want_x) = both_ways(x), pulled(k, x)
    np.testing.assert_array_equal(y, [[0, 0, 0, 1, 1, 1]])
    np.testing.assert_allclose(d_k, want_k, rtol=1e-12)
    for d_x in d_xs:
        np.testing.assert_allclose(d_x, want_x, rtol=1e-12)
    jp.check_layer(layer, x)
    jp.check_layer(rules.Lif(surrogate=name), normal(2, 5, 3))


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float32, jnp.float64])
@pytest.mark.parametrize("name", SURROGATES)
def test_a_surrogate_is_finite_at_the_ends_of_its_dtype(name, dtype):
    ends = [jnp.finfo(dtype).max, jnp.finfo(dtype).tiny, 5.0, 88.0, 0.0]
    x = jnp.array([[*ends, *(-e for e in ends)]], dtype)
    _, d_x = rules.Spike(name, 25.0).backward((), x, jnp.ones_like(x))
    assert d_x.dtype == dtype
    assert jnp.isfinite(d_x).all()
    assert (d_x >= 0).all()
    d_k, _ = rules.Spike(name, learned=True).backward(
        jnp.asarray(25.0, dtype), x, 2 * jnp.ones_like(x)
    )
    assert jnp.isfinite(d_k.sum())


@pytest.mark.few(1)
@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_narrow_rules_add_up_in_float32(dtype):
    """A thousand equal errors, a thousand positions, and squares that would underflow."""
    net = rules.direct_feedback_alignment(jp.chain(jp.Tanh(), jp.Dense(1000)))
    x = jnp.zeros((1, 2), dtype)
    params = init(net, x)
    ones = tuple(jax.tree.map(jnp.ones_like, b) for b in params.feedback)
    _, residuals = net.forward(params, x)
    _, d_x = net.backward(params._replace(feedback=ones), residuals, jnp.ones((1, 1000), dtype))
    np.testing.assert_array_equal(d_x.astype(float), [[1000, 1000]])
    spike = rules.Spike("boxcar", 1.0, learned=True)
    x = jnp.full((1, 1000), 1.0, dtype)
    d_k, _ = spike.backward(jnp.ones((), dtype), x, jnp.ones_like(x))
    np.testing.assert_array_equal(d_k.sum(), 500)
    w = jp.AffineParams(jnp.full((4, 3), 1e-4, dtype))
    layer = rules.sign_symmetric(jp.Dense(3, bias=False))
    _, d_x = layer.backward(w, jnp.ones((1, 4), dtype), jnp.ones((1, 3), dtype))
    np.testing.assert_allclose(d_x.astype(float), 3e-4, rtol=0.02)


@pytest.mark.parametrize("reset", [True, False])
def test_lif_is_its_recurrence_with_a_smooth_step(reset):
    """Against autodiff of the recurrence, with the step's derivative from ``jax.custom_jvp``."""
    layer = rules.Lif(0.8, 0.5, "sigmoid", 4.0, reset=reset)
    x, ct = normal(3, 7, 2), normal(3, 7, 2, seed=4)

    @jax.custom_jvp
    def fires(v):
        return (v > 0).astype(v.dtype)

    @fires.defjvp
    def _(primals, tangents):
        z = 4.0 * primals[0]
        return fires(*primals), tangents[0] * 4.0 * jax.nn.sigmoid(z) * jax.nn.sigmoid(-z)

    def recurrence(x):
        v = s = jnp.zeros((3, 2))
        spikes = []
        for t in range(7):
            before = s if reset else jax.lax.stop_gradient(s)
            v = 0.8 * v - 0.5 * before + x[:, t]
            s = fires(v - 0.5)
            spikes.append(s)
        return jnp.stack(spikes, axis=1)

    @jax.jit
    def by_jax(x, ct):
        y, pull = jax.vjp(recurrence, x)
        return y, *pull(ct)

    @jax.jit
    def by_hand(x, ct):
        y, saved = layer.forward((), x)
        return y, layer.backward((), saved, ct)[1]

    (y, d_x), (want, of_x) = by_hand(x, ct), by_jax(x, ct)
    np.testing.assert_array_equal(y, want)
    assert 0 < np.mean(y) < 1
    np.testing.assert_allclose(d_x, of_x, rtol=1e-12)


@pytest.mark.full
def test_angles_are_0_for_the_derivative_and_fall_as_feedback_meets_w():
    params = init(NET)
    for leaf in jax.tree.leaves(rules.angles(NET, LOSS)(params, X, TARGET)):
        assert abs(leaf) < 1e-5
    net = rules.kolen_pollack(NET)
    params = init(net)
    optimizer = optax.chain(optax.add_decayed_weights(0.3), optax.sgd(0.1))
    update = jp.make_update(net, LOSS, optimizer, donate=False)
    state, first = update.init(params), None
    for _ in range(60):
        angles = rules.angles(net, LOSS)(params, X, TARGET)
        first = first or angles
        params, state, _ = update(params, state, X, TARGET)
    assert float(angles[0].params.w) < 0.5 * float(first[0].params.w)
    assert jnp.isnan(angles[0].feedback[0])  # forward does not use it, so it has no derivative


@pytest.mark.full
def test_angles_are_of_the_examples_that_count():
    net, kept = rules.sign_symmetric(NET), jnp.array([0, 2, 5])
    params, of = init(net), rules.angles(net, LOSS)
    weights = jnp.zeros(6).at[kept].set(1.0)
    got = of(params, X, TARGET, weights=weights)
    close(got, of(params, X[kept], TARGET[kept]), rtol=1e-8)


SPIKING = jp.chain(jp.Dense(3), rules.Spike(), jp.Dense(2))
ORDINARY = {
    "feedback_alignment": rules.feedback_alignment(NET),
    "seeded": rules.feedback_alignment(NET, seed=1),
    "sign_symmetric": rules.sign_symmetric(NET),
    "kolen_pollack": rules.kolen_pollack(NET),
    "direct": rules.direct_feedback_alignment(NET),
    "reverse": rules.reverse_gradient(NET, where=jp.Tanh),
    "scale": rules.scale_gradient(NET, scale=0.5, where=jp.Tanh),
    "stop": rules.stop_gradient(NET, where=(1,)),
    "clip_value": rules.clip_cotangent(NET, max_value=0.01, where=jp.Tanh),
    "clip_norm": rules.clip_cotangent(NET, max_norm=0.01, where=jp.Tanh),
    "quantize": rules.quantize_cotangent(NET, where=jp.Tanh),
    "noisy": rules.noisy_cotangent(NET, deviation=0.1, where=jp.Tanh),
    "straight": jp.chain(jp.Dense(3), rules.straight_through(jnp.round), jp.Dense(2)),
    "spike": SPIKING,
    "lif": jp.chain(jp.Reshape((2, 2)), rules.Lif(), jp.Flatten(), jp.Dense(2)),
    "guided": rules.guided_backprop(NET, where=jp.Tanh),
    "deconvolution": rules.deconvolution(NET, where=jp.Tanh),
    "relevance": rules.lrp(NET),
}


@pytest.mark.few(2)
@pytest.mark.parametrize("name", ORDINARY)
def test_rules_in_ordinary_jax(name):
    """In ``vmap``, ``scan``, ``shard_map``, ``checkpoint`` and ``jit``, by ``jp.custom_vjp``.

    The noise's key in the params is one for all of x; vmapped or scanned examples would each draw
    other noise.
    """
    net = ORDINARY[name]
    params, f = init(net), jp.custom_vjp(net)
    batched = name != "noisy"
    given = params if batched else net.bind(params, key=jax.random.key(3))
    want = jax.jit(jp.value_and_grad(net, LOSS))(
        params, X, TARGET, key=None if batched else jax.random.key(3)
    )[1]
    want, arrays = jp.core.tree.learned(want), jp.core.tree.learned(params)

    def bound(arrays):
        return jp.core.tree.merged(given, arrays)

    def loss(arrays, x=X, target=TARGET):
        return 0.5 * jnp.sum((f(bound(arrays), x) - target) ** 2) / len(X)

    def by_scan(arrays):
        def step(total, pair):
            x, t = pair
            return total + loss(arrays, x[None], t[None]), None

        return jax.lax.scan(step, jnp.zeros(()), (X, TARGET))[0]

    def by_vmap(arrays):
        y = jax.vmap(lambda x: f(bound(arrays), x[None])[0])(X)
        return 0.5 * jnp.sum((y - TARGET) ** 2) / len(X)

    def by_shard_map(arrays):
        split, whole = jax.sharding.PartitionSpec("d"), jax.sharding.PartitionSpec()
        mesh = jax.make_mesh((2,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
        of_device = jax.shard_map(
            lambda *args: jax.lax.psum(loss(*args), "d"),
            mesh=mesh,
            in_specs=(whole, split, split),
            out_specs=whole,
        )
        return of_device(arrays, X, TARGET)

    for each in (loss, jax.checkpoint(loss), *[by_scan, by_vmap, by_shard_map] * batched):
        close(jax.jit(jax.grad(each))(arrays), want, rtol=1e-9)


@pytest.mark.few(1)
@pytest.mark.parametrize("name", [name for name in ORDINARY if name not in ("quantize", "noisy")])
def test_second_derivatives_are_those_of_the_rule(name):
    """They are the derivatives of the program that computes the rule's gradient."""
    net = ORDINARY[name]
    params, f = init(net), jp.custom_vjp(net)
    arrays = jp.core.tree.learned(params)

    def by_jax(arrays):
        def loss(arrays):
            y = f(jp.core.tree.merged(params, arrays), X)
            return 0.5 * jnp.sum((y - TARGET) ** 2) / len(X)

        return jax.grad(loss)(arrays)

    def by_rule(arrays):
        merged = jp.core.tree.merged(params, arrays)
        return jp.core.tree.learned(jp.value_and_grad(net, LOSS)(merged, X, TARGET)[1])

    def squares(of):
        return lambda arrays: sum(jnp.sum(g**2) for g in jax.tree.leaves(of(arrays)))

    close(*(jax.jit(jax.grad(squares(of)))(arrays) for of in (by_jax, by_rule)), rtol=1e-8)


def test_mistakes_are_said():
    with pytest.raises(ValueError, match="one of max_value and max_norm"):
        rules.clip_cotangent(NET)
    with pytest.raises(ValueError, match="surrogate is one of fast_sigmoid"):
        rules.Spike("relu")
    with pytest.raises(ValueError, match="magnitude is 'uniform' or 'forward'"):
        rules.sign_symmetric(NET, magnitude="none")
    with pytest.raises(TypeError, match="a floating dtype"):
        rules.quantize_cotangent(NET, jnp.int8)
    with pytest.raises(TypeError, match="takes a function of x"):
        rules.straight_through(jp.Tanh())
    with pytest.raises(ValueError, match="not its shape"):
        rules.straight_through(lambda x: x[:, :1]).forward((), X)
    with pytest.raises(TypeError, match="direct_feedback_alignment: net"):
        rules.direct_feedback_alignment(jp.Dense(3))


def test_custom_vjp_of_a_tuple_and_of_a_dict_with_integers():
    net = jp.chain(
        jp.on("a", rules.reverse_gradient(jp.Dense(3))), jp.on("ids", jp.Embedding(5, 2))
    )
    x = {"a": X, "ids": np.arange(6) % 5}
    params, f = init(net, x), jp.custom_vjp(net)

    def total(params, a):
        y = f(params, x | {"a": a})
        return jnp.sum(y["a"] ** 2) + jnp.sum(jnp.sin(y["ids"]))

    params = jax.device_get(params)
    d_params, d_a = jax.device_get(jax.jit(jax.grad(total, (0, 1)))(params, X))
    w, b = params[0].w, params[0].b
    y = X @ w + b
    close(d_a, -2 * y @ w.T)
    close(d_params[0].w, 2 * X.T @ y)
    close(d_params[1].sum(), np.cos(params[1][x["ids"]]).sum())
