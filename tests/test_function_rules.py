"""Other backward rules for parts of any function, without changing it."""

import functools
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from functions import drawn, hold, integers, normal

import jaxprop as jp
from jaxprop import rules

eqx = pytest.importorskip("equinox")
pytestmark = pytest.mark.usefixtures("standard_promotion")
LOSS = jp.CrossEntropy()
FIXED = functools.partial(rules.feedback_alignment, seed=3)


class Mlp(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Dense(6)(x))
        x = jnp.tanh(nn.Dense(5)(x))
        return nn.Dense(3)(x)


OURS = jp.chain(jp.Dense(6), jp.Relu(), jp.Dense(5), jp.Tanh(), jp.Dense(3))
X, TARGET = normal(5, 4), integers(3, 5)
with jax.numpy_dtype_promotion("standard"):
    PARAMS = drawn(jax.eval_shape(Mlp().init, jax.random.key(0), X))


def by_jax(fn):
    """The loss of fn as a function of params, in plain JAX."""
    return lambda p: -jnp.mean(jax.nn.log_softmax(fn(p, X))[jnp.arange(len(X)), TARGET])


def of_ours(params):
    each = [params["params"][f"Dense_{i}"] for i in range(3)]
    (a, b, c) = [jp.AffineParams(p["kernel"], p["bias"]) for p in each]
    return (a, (), b, (), c)


def close(got, want, rtol=1e-10):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=1e-12), got, want)


SAME = {
    "sign": ({"dot_general": rules.sign_symmetric}, rules.sign_symmetric),
    "one": (
        {"Dense_1/dot_general": rules.sign_symmetric},
        functools.partial(rules.sign_symmetric, where=(2,)),
    ),
    "scope": (
        {"Dense_1": rules.sign_symmetric},
        functools.partial(rules.sign_symmetric, where=(2,)),
    ),
    "guided": ({"relu": rules.guided_backprop}, rules.guided_backprop),
    "reverse": (
        {"tanh": functools.partial(rules.reverse_gradient, scale=2.0)},
        functools.partial(rules.reverse_gradient, scale=2.0, where=jp.Tanh),
    ),
    "clip": (
        {"tanh": functools.partial(rules.clip_cotangent, max_norm=0.01)},
        functools.partial(rules.clip_cotangent, max_norm=0.01, where=jp.Tanh),
    ),
    "stop": ({"tanh": rules.stop_gradient}, functools.partial(rules.stop_gradient, where=jp.Tanh)),
    "relevance": (
        {"dot_general": functools.partial(rules.lrp_epsilon, epsilon=0.5)},
        None,
    ),
}


@pytest.mark.full
@pytest.mark.parametrize("name", SAME)
def test_a_flax_model_by_a_rule_is_our_net_by_it(name):
    of_parts, of_layers = SAME[name]
    net = jp.function(Mlp().apply, rules=of_parts)
    jp.check_layer(net, X, PARAMS)
    if of_layers is None:
        return
    ours = of_layers(OURS)
    for of in (jp.per_example_grads, jp.value_and_grad):
        got, want = of(net, LOSS)(PARAMS, X, TARGET), of(ours, LOSS)(of_ours(PARAMS), X, TARGET)
        got, want = (g[1] if of is jp.value_and_grad else g for g in (got, want))
        for index, (w, b) in enumerate(want[::2]):
            dense = got["params"][f"Dense_{index}"]
            close((dense["kernel"], dense["bias"]), (w, b))
    close(rules.saliency(net)(PARAMS, X, TARGET), rules.saliency(ours)(of_ours(PARAMS), X, TARGET))


@pytest.mark.full
def test_feedback_alignment_of_a_flax_model_trains():
    """Params stay the model's; quantities and jax.grad of ``net.fn`` use the rule's backward."""
    net = jp.function(Mlp().apply, rules={"dot_general": FIXED})
    hold(net.fn, PARAMS, X, TARGET, LOSS)
    angles = rules.angles(net, LOSS)(PARAMS, X, TARGET)["params"]
    assert float(angles["Dense_2"]["kernel"]) < 1e-5
    assert 1 < float(angles["Dense_0"]["kernel"]) < 180
    by_rule = jp.value_and_grad(net, LOSS)(PARAMS, X, TARGET)[1]
    close(jax.grad(by_jax(net.fn))(PARAMS), by_rule)
    derivative = jax.grad(by_jax(Mlp().apply))(PARAMS)
    close(jax.grad(jp.loss_fn(net, LOSS))(PARAMS, X, TARGET), derivative)
    f = jp.custom_vjp(net)
    close(jax.grad(by_jax(f))(PARAMS), by_rule)
    update = jp.make_update(net, LOSS, optax.adam(0.05), donate=False)
    params = drawn(PARAMS, 1)
    state = update.init(params)
    values = []
    for _ in range(200):
        params, state, value = update(params, state, X, TARGET)
        values.append(float(value))
    assert values[-1] < 0.1 * values[0]


@pytest.mark.full
def test_fixed_feedback_is_its_equation():
    """Each product has its own matrix, the same at each step."""
    net = jp.function(Mlp().apply, rules={"dot_general": FIXED})
    key = [jax.random.fold_in(jax.random.key(3), number) for number in range(3)]
    first, second, third = (p for p in of_ours(PARAMS) if p)

    def b(number, w):
        one = jax.random.split(key[number], 1)[0]
        return jax.random.normal(one, w.shape, w.dtype) * np.sqrt(2 / sum(w.shape))

    a1 = X @ first.w + first.b
    a2 = jnp.tanh(jax.nn.relu(a1) @ second.w + second.b)
    ct = jax.nn.softmax(a2 @ third.w + third.b) - jax.nn.one_hot(TARGET, 3)
    ct = ct @ b(2, third.w).T * (1 - a2**2)
    d_second = jax.nn.relu(a1).T @ ct / len(X)
    ct = ct @ b(1, second.w).T * (a1 > 0)
    got = jp.value_and_grad(net, LOSS)(PARAMS, X, TARGET)[1]["params"]
    close(got["Dense_1"]["kernel"], d_second)
    close(got["Dense_0"]["kernel"], X.T @ ct / len(X))
    ours = rules.feedback_alignment(OURS, seed=3)
    want = jp.value_and_grad(ours, LOSS)(of_ours(PARAMS), X, TARGET)[1]
    close(got["Dense_0"]["kernel"], want[0].w)


class Quantized(nn.Module):
    """Weights and activations on a grid, and signs."""

    @nn.compact
    def __call__(self, x):
        w = self.param("w", nn.initializers.normal(), (4, 6))
        x = x @ (jnp.round(w * 4) / 4)
        x = jnp.round(x * 8) / 8
        x = nn.Dense(6, name="dense")(x)
        return jnp.sign(x) @ w.T[:, :3]


@pytest.mark.full
def test_straight_through_the_rounding_of_a_flax_model():
    """The cotangent of rounded weights stays factored, and is that of the weights."""

    def through(x):
        return x + jax.lax.stop_gradient(jnp.round(x) - x)

    def sign(x):
        y = jnp.where(jnp.abs(x) <= 1, x, jax.lax.stop_gradient(x))
        return y + jax.lax.stop_gradient(jnp.sign(x) - y)

    def by_hand(params, x):
        p = params["params"]
        y = through(x @ (through(p["w"] * 4) / 4) * 8) / 8
        return sign(y @ p["dense"]["kernel"] + p["dense"]["bias"]) @ p["w"].T[:, :3]

    model = Quantized()
    params = drawn(jax.eval_shape(model.init, jax.random.key(0), X))
    net = jp.function(
        model.apply,
        rules={
            "round": rules.straight_through,
            "sign": functools.partial(rules.straight_through, passing=1.0),
        },
    )
    hold(net.fn, params, X, TARGET, LOSS)
    want = jax.grad(lambda p: jp.loss_fn(jp.function(by_hand), LOSS)(p, X, TARGET))(params)
    close(jp.value_and_grad(net, LOSS)(params, X, TARGET)[1], want)
    table = str(net.coverage(params, X))
    assert "Outer" in next(line for line in table.splitlines() if line.startswith("params/w "))


class Layer(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        h = jnp.tanh(nn.Dense(4)(x))
        return x + nn.Dense(4)(h), None


class Deep(nn.Module):
    scan: bool = False
    remat: bool = False

    @nn.compact
    def __call__(self, x):
        layer = nn.remat(Layer) if self.remat else Layer
        if self.scan:
            layers = nn.scan(
                layer, variable_axes={"params": 0}, split_rngs={"params": True}, length=3
            )
            x, _ = layers()(x, None)
        else:
            for _ in range(3):
                x, _ = layer()(x, None)
        return nn.Dense(3)(x)


@pytest.mark.full
@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize("remat", [False, True])
def test_rules_in_scans_and_in_what_is_computed_again(scan, remat):
    model = Deep(scan=scan, remat=remat)
    params = drawn(jax.eval_shape(model.init, jax.random.key(0), X))
    net = jp.function(model.apply, rules={"dot_general": rules.sign_symmetric})
    hold(net.fn, params, X, TARGET, LOSS, owned="bias")
    got = jp.value_and_grad(net, LOSS)(params, X, TARGET)[1]["params"]
    if scan:
        (stack,) = (v for k, v in params["params"].items() if "Dense" not in k)
        each = [jax.tree.map(lambda leaf, i=i: leaf[i], stack) for i in range(3)]
    else:
        each = [v for k, v in params["params"].items() if "Dense" not in k]
    block = jp.skip(jp.chain(jp.Dense(4), jp.Tanh(), jp.Dense(4)))
    ours = rules.sign_symmetric(jp.chain(block, block, block, jp.Dense(3)))

    def dense(p):
        return jp.AffineParams(p["kernel"], p["bias"])

    tree = tuple((dense(p["Dense_0"]), (), dense(p["Dense_1"])) for p in each)
    tree = (*tree, dense(params["params"]["Dense_0"]))
    want = jp.value_and_grad(ours, LOSS)(tree, X, TARGET)[1]
    if scan:
        (stack,) = (v for k, v in got.items() if "Dense" not in k)
        close(stack["Dense_0"]["kernel"], jnp.stack([want[i][0].w for i in range(3)]))
    else:
        first = next(v for k, v in got.items() if "Dense" not in k)
        close(first["Dense_0"]["kernel"], want[0][0].w)


def test_a_choice_of_branches():
    def fn(params, x):
        y = jax.lax.cond(params["flag"].sum() > 0, jnp.tanh, jnp.sin, x @ params["w"])
        return y @ params["v"]

    params = {"w": normal(4, 5), "v": normal(5, 3), "flag": jp.Unlearned(jnp.ones(1))}
    net = jp.function(fn, rules={"tanh": functools.partial(rules.scale_gradient, scale=3.0)})
    plain = jp.function(fn)
    got, want = (jax.jit(jp.value_and_grad(f, LOSS))(params, X, TARGET)[1] for f in (net, plain))
    close((got["v"], got["w"]), (want["v"], 3 * want["w"]))


@pytest.mark.full
def test_an_equinox_model():
    model = eqx.nn.MLP(4, 3, 6, 2, activation=jax.nn.relu, key=jax.random.key(0))
    arrays, static = eqx.partition(model, eqx.is_inexact_array)
    params = drawn(arrays)

    def fn(params, x):
        return jax.vmap(eqx.combine(params, static))(x)

    for of_parts in ({"dot_general": rules.sign_symmetric}, {"relu": rules.deconvolution}):
        net = jp.function(fn, rules=of_parts)
        hold(net.fn, params, X, TARGET, LOSS)


@pytest.mark.full
def test_relevance_of_a_flax_model():
    """With LRP in its dense modules, it is that of our net with the same rules."""
    zero = functools.partial(rules.lrp_epsilon, epsilon=0.0)
    scopes = {f"Dense_{i}": zero for i in range(3)}
    net = jp.function(Mlp().apply, rules=scopes)
    composite = {jp.Dense: zero, (jp.Tanh, jp.Relu): lambda layer: layer}
    got = rules.relevance(net)(PARAMS, X, TARGET)
    close(got, rules.relevance(rules.lrp(OURS, composite))(of_ours(PARAMS), X, TARGET))


@pytest.mark.full
def test_in_jit_vmap_scan_and_shard_map():
    net = jp.function(Mlp().apply, rules={"dot_general": FIXED, "relu": rules.guided_backprop})
    of = jp.value_and_grad(net, LOSS)
    want = of(PARAMS, X, TARGET)
    close(jax.jit(of)(PARAMS, X, TARGET), want)
    alone = jax.vmap(lambda x, t: of(PARAMS, x[None], t[None]))(X, TARGET)
    close(jax.tree.map(lambda leaf: leaf.mean(0), alone), want)
    _, scanned = jax.lax.scan(lambda c, _: (c, of(PARAMS, X, TARGET)), 0, None, length=2)
    close(jax.tree.map(lambda leaf: leaf[1], scanned), want)
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec("data")
    x, target = normal(6, 4), integers(3, 6)

    each = jp.per_example_grads(net, LOSS)
    over = jax.shard_map(
        each, mesh=mesh, in_specs=(jax.sharding.PartitionSpec(), spec, spec), out_specs=spec
    )
    close(jax.jit(over)(PARAMS, x, target), each(PARAMS, x, target))


def test_mistakes_are_said():
    def value(rule, key="dot_general"):
        net = jp.function(Mlp().apply, rules={key: rule})
        return jp.value_and_grad(net, LOSS)(PARAMS, X, TARGET)

    with pytest.raises(TypeError, match="of their own: use"):
        value(rules.feedback_alignment)
    with pytest.raises(TypeError, match="of their own: use"):
        value(rules.kolen_pollack)
    with pytest.raises(ValueError, match=r"is for no part of Module\.apply that"):
        value(rules.sign_symmetric, "conv")
    with pytest.raises(TypeError, match="takes a key"):
        value(functools.partial(rules.noisy_cotangent, deviation=1.0))
    with pytest.raises(TypeError, match="is a function of a layer"):
        value(jp.Tanh())
    with pytest.raises(TypeError, match="returns a layer"):
        value(lambda layer: None)
    with pytest.raises(TypeError, match="by the name of"):
        value(rules.sign_symmetric, jax.lax.dot_general_p)
    with pytest.raises(TypeError, match="SignSymmetric is for products, and tanh does more"):
        value(rules.sign_symmetric, "tanh")
    with pytest.raises(TypeError, match="name its products alone, such as 'Mlp/dot_general'"):
        value(rules.sign_symmetric, "Mlp")
    assert jp.function(jnp.dot, rules={}) == jp.function(jnp.dot)
    with pytest.raises(TypeError, match="a dict of a rule for each key"):
        jp.function(Mlp().apply, rules=rules.sign_symmetric)
    with pytest.raises(ValueError, match="that the rules before it leave"):
        jp.value_and_grad(
            jp.function(
                Mlp().apply, rules={"Mlp": rules.stop_gradient, "tanh": rules.stop_gradient}
            ),
            LOSS,
        )(PARAMS, X, TARGET)

    def classes(params, x):
        return jax.nn.one_hot(jnp.argmax(x @ params, -1), 3)

    net = jp.function(classes, rules={"argmax": rules.straight_through})
    with pytest.raises((TypeError, ValueError), match=r"integers|shape"):
        jp.value_and_grad(net, LOSS)(normal(4, 3), X, TARGET)


KEEPS = functools.partial(rules.scale_gradient, scale=1.0)
DOUBLES = functools.partial(rules.scale_gradient, scale=2.0)


@jax.custom_vjp
def clipped_sign(w):
    return jnp.sign(w)


clipped_sign.defvjp(lambda w: (jnp.sign(w), w), lambda w, ct: (jnp.where(abs(w) <= 1, ct, 0),))


@pytest.mark.full
def test_a_rule_on_params_alone_is_of_each_example():
    """Binary weights whose cotangent passes within a range, for each example on its own."""

    def fn(params, x, sign=jnp.sign):
        return jnp.tanh(x @ sign(params["w"])) @ params["v"]

    params = {"w": normal(4, 6), "v": normal(6, 3)}
    passing = functools.partial(rules.straight_through, passing=1.0)
    net = jp.function(fn, rules={"sign": passing})
    by_hand = functools.partial(fn, sign=clipped_sign)
    each = jax.vmap(
        jax.grad(lambda p, x, t: -jax.nn.log_softmax(by_hand(p, x[None])[0])[t]), (None, 0, 0)
    )(params, X, TARGET)
    close(jp.per_example_grads(net, LOSS)(params, X, TARGET), each)
    mean = jax.tree.map(lambda g: g.mean(0), each)
    close(jp.value_and_grad(net, LOSS)(params, X, TARGET)[1], mean)
    close(jax.grad(by_jax(net.fn))(params), mean)
    hold(net.fn, params, X, TARGET, LOSS, owned="w")


def transposed(params, x):
    return jnp.tanh(x @ params["w"].T) @ params["v"]


def scoped(params, x):
    with jax.named_scope("unit"):
        w = params["w"] / jnp.sqrt((params["w"] ** 2).sum())
    return jnp.tanh(x @ w.T) @ params["v"]


@pytest.mark.few(1)
@pytest.mark.parametrize(("fn", "key"), [(transposed, "transpose"), (scoped, "unit")])
def test_a_rule_that_changes_nothing_on_params_alone(fn, key):
    params = {"w": normal(6, 4), "v": normal(6, 3)}
    hold(jp.function(fn, rules={key: KEEPS}).fn, params, X, TARGET, LOSS, owned="w")
    got, want = (
        jax.jit(jp.per_example_grads(jp.function(fn, rules=r), LOSS))(params, X, TARGET)
        for r in ({key: KEEPS}, None)
    )
    close(got, want)


class Inner(nn.Module):
    @nn.compact
    def __call__(self, x):
        return jnp.tanh(nn.Dense(4)(x))


class Row(nn.Module):
    @nn.compact
    def __call__(self, x):
        for _ in range(3):
            x = Inner()(x)
        return nn.Dense(3)(x)


@pytest.mark.full
def test_scopes_of_one_name_in_a_row_are_one_part_each():
    model = Row()
    params = drawn(jax.eval_shape(model.init, jax.random.key(0), X))
    plain, twice = (
        jp.value_and_grad(jp.function(model.apply, rules=r), LOSS)(params, X, TARGET)[1]["params"]
        for r in (None, {"Inner_0/Dense_0": DOUBLES, "Dense_0": DOUBLES})
    )
    for index, factor in enumerate((8, 4, 2)):
        one, other = (g[f"Inner_{index}"]["Dense_0"]["kernel"] for g in (plain, twice))
        close(other, factor * one)


@pytest.mark.full
@pytest.mark.parametrize("cell", [nn.SimpleCell, nn.GRUCell, nn.LSTMCell, nn.OptimizedLSTMCell])
def test_a_scope_with_what_nobody_reads(cell):
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(3)(nn.RNN(cell(4, param_dtype=jnp.float64))(x)[:, -1])

    model, x = Model(), normal(5, 3, 4)
    params = drawn(jax.eval_shape(model.init, jax.random.key(0), x))
    got, want = (
        jp.per_example_grads(jp.function(model.apply, rules=r), LOSS)(params, x, TARGET)
        for r in ({f"{cell.__name__}_0": KEEPS}, None)
    )
    close(got, want)


TWICE = [
    ({"dot_general": rules.sign_symmetric}, rules.sign_symmetric(OURS)),
    ({"dot_general": KEEPS}, OURS),
    ({"tanh": DOUBLES}, rules.scale_gradient(OURS, scale=2.0, where=jp.Tanh)),
]


@pytest.mark.few(1)
@pytest.mark.parametrize(("parts", "ours"), TWICE, ids=["sign", "same", "double"])
def test_second_derivatives_are_those_of_the_rule(parts, ours):
    net = jp.function(Mlp().apply, rules=parts)

    def of_layers(params):
        return jp.value_and_grad(ours, LOSS)(of_ours(params), X, TARGET)[1][0].w

    def of_walk(params):
        return jp.value_and_grad(net, LOSS)(params, X, TARGET)[1]["params"]["Dense_0"]["kernel"]

    def of_jax(params):
        return jax.grad(by_jax(net.fn))(params)["params"]["Dense_0"]["kernel"]

    def squares(of):
        return jax.jit(jax.grad(lambda params: jnp.sum(of(params) ** 2)))(PARAMS)

    want = squares(of_layers)
    close(squares(of_walk), want, rtol=1e-8)
    close(squares(of_jax), want, rtol=1e-8)


def test_a_gauss_newton_product_goes_forward_by_the_function_and_back_by_its_rules():
    def fn(params, x):
        return jnp.tanh(x @ params["w"]) @ params["v"]

    params = {"w": normal(4, 6), "v": normal(6, 3)}
    twice = functools.partial(jp.rules.scale_gradient, scale=2.0)
    got, want = (
        jax.jit(jp.ggn_vp(jp.function(fn, rules=rules), LOSS))(params, X, TARGET, params)
        for rules in ({"tanh": twice}, None)
    )
    close(got, {"w": 2 * want["w"], "v": want["v"]})


def test_the_derivative_of_a_function_is_by_its_own_rules():
    """A ``jax.custom_vjp`` in it is used, also in ``jax.grad`` of the loss."""

    def fn(params, x):
        return jnp.tanh(x @ clipped_sign(params["w"])) @ params["v"]

    params, net = {"w": normal(4, 6), "v": normal(6, 3)}, jp.function(fn)
    want = jax.jit(jax.grad(by_jax(fn)))(params)
    for of in (jax.grad(jp.loss_fn(net, LOSS)), lambda *a: jp.autodiff(net, LOSS)(*a)[1]):
        close(jax.jit(of)(params, X, TARGET), want)
    close(jax.jit(jp.value_and_grad(net, LOSS))(params, X, TARGET)[1], want)

    def smooth(params, x):
        return jnp.tanh(x @ params["w"]) @ params["v"]

    loss = functools.partial(jp.loss_fn(jp.function(smooth), LOSS), x=X, target=TARGET)
    _, forward_mode = jax.jit(lambda params: jax.jvp(loss, (params,), (params,)))(params)
    each = jax.tree.map(np.vdot, jax.jit(jax.grad(loss))(params), params)
    close(forward_mode, sum(jax.tree.leaves(each)))


@pytest.mark.full
def test_attention_by_feedback():
    """Products of data with data have no matrix, so the rule applies to the projections only."""

    class Attending(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.MultiHeadDotProductAttention(2, name="attention")(x)
            return nn.Dense(3)(x.mean(1))

    model, x = Attending(), normal(5, 3, 4)
    params = drawn(jax.eval_shape(model.init, jax.random.key(0), x))
    names = [f"attention/{name}/dot_general" for name in ("query", "key", "value", "out")]
    net = jp.function(model.apply, rules=dict.fromkeys(names, rules.sign_symmetric))
    hold(net.fn, params, x, TARGET, LOSS, owned="bias", zero="key/bias")
    whole = jp.function(model.apply, rules={"attention/dot_general": rules.sign_symmetric})
    got, want = (jp.value_and_grad(f, LOSS)(params, x, TARGET)[1] for f in (whole, net))
    close(got, want)


@pytest.mark.full
def test_what_is_explained_has_the_scopes_of_the_function():
    def rows(rule):
        net = jp.function(Mlp().apply, rules=rule)
        text = str(jp.explain(net, LOSS, PARAMS, X, TARGET))
        return [line for line in text.splitlines() if re.match(r"  (Mlp|\w+\.py)", line)]

    assert rows({"dot_general": rules.sign_symmetric}) == rows(None) != []
    assert rows({"relu": rules.guided_backprop}) == rows(None)


@jax.custom_jvp
def cut(w):
    return jnp.clip(w, -0.5, 0.5)


cut.defjvp(lambda primals, tangents: (cut(*primals), *tangents))


@jax.custom_vjp
def passed_on(mask, w):
    return jnp.where(mask > 0, w, 0)


passed_on.defvjp(lambda mask, w: (passed_on(mask, w), mask), lambda mask, ct: (0 * mask, 0.1 * ct))


@pytest.mark.parametrize("name", ["cut", "passed_on"])
def test_a_function_of_the_user_s_may_have_any_name(name):
    """The trace finds jaxprop's own functions by their names, which no user's function has."""
    rng = np.random.default_rng(0)
    params, x, target, mask = map(
        jnp.asarray, (rng.normal(size=s) for s in ((3, 2), (4, 3), (4, 2), (3, 2)))
    )

    def fn(params, x):
        return x @ (cut(params) if name == "cut" else passed_on(mask, params))

    loss = jp.HalfSquaredError()
    got = jp.value_and_grad(jp.function(fn), loss)(params, x, target)
    expected = jax.value_and_grad(lambda p: loss.forward(fn(p, x), target)[0].mean())(params)
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12)
