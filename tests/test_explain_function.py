"""Explanations of a function: each weight by its path, and each named scope."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxprop as jp

LOSS = jp.HalfSquaredError()


def normal(*shape, seed=0):
    return jax.random.normal(jax.random.key(seed), shape)


def shares_of(net, params, x, target):
    """Return each example's gradient, by autodiff of the net on that example alone."""

    def alone(x, target):
        x, target = x[None], target[None]
        return jax.grad(lambda params: LOSS.forward(net.forward(params, x)[0], target)[0][0])(
            params
        )

    return jax.vmap(alone)(x, target)


def check_every_entry(net, params, x):
    """Check each entry and the product of its factors by autodiff; return the names with an x."""
    target = normal(*jax.eval_shape(lambda: net.forward(params, x)[0]).shape, seed=9)
    terms = jp.explain(net, LOSS, params, x, target, keep=10**9)
    shares = jax.device_get(shares_of(net, params, x, target))
    with_factors = set()
    for name, share in zip(terms.names, jax.tree.leaves(shares), strict=True):
        entries = [(1, index) for index in np.ndindex(*share.shape[1:])]
        for n, index in [(0, entries[-1][1]), *entries]:
            factors, product = terms.example(n)[name][index]
            assert float(product) == pytest.approx(share[n][index], rel=1e-10, abs=1e-12)
            if "x" in factors:
                with_factors.add(name)
            if factors:
                made = np.prod([np.asarray(f) for f in factors.values()], axis=0).sum()
                assert made == pytest.approx(share[n][index], rel=1e-10, abs=1e-12)
    return with_factors


def mlp(params, x):
    for layer in params:
        x = jnp.tanh(x @ layer["w"] + layer["b"][None])
    return x


def stack(params, x):
    def layer(x, params):
        return jnp.tanh(x @ params["w"] + params["b"][None]), None

    return jax.lax.scan(layer, x, params)[0]


def through_time(params, x):
    def step(h, x):
        both = jnp.concatenate([params["of_x"], params["of_h"]])
        h = jnp.tanh(jnp.concatenate([x, h], axis=-1) @ both)
        return h, h

    h = jnp.zeros((x.shape[0], params["of_h"].shape[0]), x.dtype)
    return jnp.moveaxis(jax.lax.scan(step, h, jnp.moveaxis(x, 1, 0))[1], 0, 1)


def convolution(groups):
    def fn(params, x):
        layouts = ("NHWC", "OIHW", "NHWC")
        return jax.lax.conv_general_dilated(
            x, params["w"], (2, 1), "SAME", dimension_numbers=layouts, feature_group_count=groups
        )

    return fn


def tied(params, ids):
    h = params["table"][ids]
    return h * params["scale"] @ params["table"].T


def heads(params, x):
    return jnp.einsum("ntd,dhk->nhtk", x, params["w"])


def of_heads(params, x):
    return jnp.einsum("nhk,hko->nho", x, params["w"])


CASES = {
    "products": (mlp, lambda: [{"w": normal(3, 2), "b": normal(2)}] * 2, (2, 3), {"0/w"}),
    "a transpose": (lambda p, x: x @ p["w"].T, lambda: {"w": normal(2, 3)}, (2, 3), {"w"}),
    "a slice, of which the rest meets nothing": (
        lambda p, x: x @ p["w"][1:, ::2] * 2,
        lambda: {"w": normal(4, 5)},
        (2, 3),
        {"w"},
    ),
    "a part turned around": (
        lambda p, x: x @ p["w"][::-1],
        lambda: {"w": normal(3, 2)},
        (2, 3),
        {"w"},
    ),
    "a scale": (lambda p, x: x @ (p["w"] * 0.5), lambda: {"w": normal(3, 2)}, (2, 3), {"w"}),
    "heads": (heads, lambda: {"w": normal(4, 2, 3)}, (2, 3, 4), {"w"}),
    "a matrix for each head": (of_heads, lambda: {"w": normal(2, 3, 2)}, (2, 2, 3), {"w"}),
    "layers by scan": (
        stack,
        lambda: {"w": normal(3, 2, 2), "b": normal(3, 2)},
        (2, 2),
        {"w"},
    ),
    "steps by scan, with joined weights": (
        through_time,
        lambda: {"of_x": normal(2, 3), "of_h": normal(3, 3, seed=1)},
        (2, 3, 2),
        {"of_x", "of_h"},
    ),
    "a convolution": (convolution(1), lambda: {"w": normal(2, 2, 2, 3)}, (2, 3, 3, 2), {"w"}),
    "a grouped convolution": (
        convolution(2),
        lambda: {"w": normal(4, 1, 2, 2)},
        (2, 3, 3, 2),
        {"w"},
    ),
}


@pytest.mark.few(1)
@pytest.mark.parametrize("case", CASES)
def test_every_entry_is_the_product_of_its_factors(case):
    fn, params, shape, factored = CASES[case]
    params = params()
    if case == "products":
        params[1] = {"w": normal(2, 2), "b": normal(2)}
        factored = {"0/w", "1/w"}
    with_factors = check_every_entry(jp.function(fn), params, normal(*shape, seed=3))
    assert with_factors == factored


@pytest.mark.full
def test_a_tied_table_has_the_factors_of_both_uses():
    params = {"table": normal(4, 3), "scale": jnp.array(1.5)}
    net, ids = jp.function(tied), jnp.array([[0, 2], [2, 2]])
    assert check_every_entry(net, params, ids) == {"table"}
    terms = jp.explain(net, LOSS, params, ids, jnp.zeros((2, 2, 4)))
    factors, _ = terms.example(1)["table"][2, 0]
    assert factors["x"].shape == factors["ct"].shape == (4,)
    assert np.count_nonzero(np.asarray(factors["x"]) == 1) == 2  # where the id is
    assert terms.names == ["scale", "table"]


def test_an_entry_that_meets_no_data_has_no_position_and_the_derivative_0():
    net, params = jp.function(lambda p, x: x @ p["w"][1:]), {"w": normal(4, 2)}
    terms = jp.explain(net, LOSS, params, normal(2, 3), jnp.zeros((2, 2)))
    factors, product = terms["w"][0, 1]
    assert factors["x"].shape == (0,)
    assert product == 0


@pytest.mark.few(1)
@pytest.mark.parametrize("seat", ["", "1."])
def test_a_function_among_layers_and_in_a_stack(seat):
    function = jp.function(
        lambda params, x: jnp.tanh(x @ params["a"]["w"].T), lambda key, x: params
    )
    params = {"a": {"w": normal(3, 3)}}
    net = jp.repeat(function, 2) if not seat else jp.chain(jp.Dense(3), function)
    x = normal(2, 3)
    with_factors = check_every_entry(net, net.init(jax.random.key(0), x), x)
    assert f"{seat}a/w" in with_factors


@pytest.mark.full
def test_the_layers_of_a_scan_within_a_stack_of_functions():
    params = {"w": normal(3, 2, 2), "b": normal(3, 2)}
    net, x = jp.repeat(jp.function(stack, lambda key, x: params), 2), normal(2, 2)
    given = net.init(jax.random.key(0), x)
    assert check_every_entry(net, given, x) == {"w"}
    target = jnp.zeros((2, 2))
    terms = jp.explain(net, LOSS, given, x, target)
    first = dict(terms.runs())["[1]"]
    assert first.forms["w"].per_example().shape == (2, 3, 2, 2)


def test_a_path_may_be_written_with_dots_and_a_wrong_one_names_those_there_are():
    net, params = jp.function(mlp), [{"w": normal(3, 2), "b": normal(2)}]
    terms = jp.explain(net, LOSS, params, normal(2, 3), jnp.zeros((2, 2)))
    assert terms["0/w"].name == terms["0.w"].name == "0/w"
    with pytest.raises(KeyError, match="there are 0/b, 0/w"):
        terms["w"]
    with pytest.raises(IndexError, match="its shape is"):
        terms["0/w"][3, 0]
    assert terms["0/w"][-1, -1] == terms["0/w"][2, 1]


@pytest.mark.full
def test_a_flax_model_is_indexed_by_its_paths(standard_promotion):
    nn = pytest.importorskip("flax.linen")

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.relu(nn.Conv(2, (2, 2))(x))
            return nn.Dense(3)(x.reshape(x.shape[0], -1))

    model, x = Model(), normal(2, 3, 3, 1)
    params = model.init(jax.random.key(0), x)
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), params)
    net = jp.function(model.apply)
    kernels = {"params/Conv_0/kernel", "params/Dense_0/kernel"}
    assert check_every_entry(net, params, x) == kernels
    terms = jp.explain(net, LOSS, params, x, jnp.zeros((2, 3)))
    factors, _ = terms["params/Dense_0/kernel"][4, 2]
    assert float(factors["ct"]) == pytest.approx(float(terms.layers[""].ct[0, 2]))


def scoped(params, x, zeros=(0.0, 0.0, 0.0)):
    """Three scopes, each with a zero added to its result."""
    with jax.named_scope("first"):
        h = x @ params["w"]
        h = h + params["b"][None] + zeros[0]
    with jax.named_scope("relu"):
        h = jnp.maximum(h, 0) + zeros[1]
    with jax.named_scope("last"):
        return jnp.sin(h) @ params["v"] + zeros[2]


PARAMS = {"w": normal(3, 4), "b": normal(4, seed=1), "v": normal(4, 2, seed=2)}


@pytest.mark.full
def test_a_scope_has_its_result_and_its_cotangent():
    x, target = normal(5, 3, seed=3), normal(5, 2, seed=4)
    terms = jp.explain(jp.function(scoped), LOSS, PARAMS, x, target, keep=10**6)
    scopes = {scope.name: scope for scope in terms.layers[""].scopes}
    assert list(scopes) == ["first", "relu", "last"]
    assert [set(scope.params) for scope in scopes.values()] == [{"w", "b"}, set(), {"v"}]

    def own(zeros, x, target):
        return LOSS.forward(scoped(PARAMS, x[None], zeros), target[None])[0][0]

    zeros = [jnp.zeros((5, 1, size)) for size in (4, 4, 2)]
    cts = jax.vmap(jax.grad(own))(zeros, x, target)
    first = x @ PARAMS["w"] + PARAMS["b"][None]
    ys = [first, jnp.maximum(first, 0), jnp.sin(jnp.maximum(first, 0)) @ PARAMS["v"]]
    grads = jax.grad(jp.loss_fn(jp.function(scoped), LOSS))(PARAMS, x, target)
    for scope, y, ct in zip(scopes.values(), ys, cts, strict=True):
        assert np.allclose(scope.kept[0], y, rtol=1e-12)
        assert np.allclose(scope.kept[1], ct[:, 0], rtol=1e-12)
        for summary, array in ((scope.y, y), (scope.ct, ct)):
            assert float(summary.rms) == pytest.approx(np.sqrt(np.mean(np.square(array))))
        assert float(scope.y.zeros) == pytest.approx(np.mean(np.asarray(y) == 0))
        if scope.params:
            each = np.concatenate([np.ravel(grads[name]) for name in scope.params])
            assert float(scope.grads.rms) == pytest.approx(np.sqrt(np.mean(each**2)))
        else:
            assert scope.grads is None
    assert 0 < float(scopes["relu"].y.zeros) < 1


def wrapped(transform):
    def fn(params, x):
        return transform(scoped)(params, x)

    return fn


def branched(params, x):
    """Two scoped branches, of which the one without the negation is taken."""
    return jax.lax.cond(params["w"][0, 0] > -9, scoped, lambda p, x: scoped(p, -x), params, x)


@pytest.mark.few(1)
@pytest.mark.parametrize("fn", [wrapped(jax.jit), wrapped(jax.checkpoint), branched])
def test_scopes_are_found_within(fn):
    x, target = normal(5, 3, seed=3), normal(5, 2, seed=4)
    inner = jp.explain(jp.function(fn), LOSS, PARAMS, x, target)
    outer = jp.explain(jp.function(scoped), LOSS, PARAMS, x, target)
    found = inner.layers[""].scopes
    for scope in outer.layers[""].scopes:
        same, *others = (each for each in found if each.name.endswith(scope.name))
        if fn is branched:
            (not_taken,) = (each for each in (same, *others) if not np.any(each.kept[0]))
            assert not np.any(not_taken.kept[1])
            (same,) = (each for each in (same, *others) if each is not not_taken)
        else:
            assert others == []
        assert np.allclose(same.kept[0], scope.kept[0], rtol=1e-12)
        assert np.allclose(same.kept[1], scope.kept[1], rtol=1e-12)


def test_a_layer_of_a_scan_has_a_line_of_its_own():
    def fn(params, x):
        def layer(x, params):
            with jax.named_scope("layer"):
                x = x @ params["w"]
            return jnp.tanh(x), None

        with jax.named_scope("stack"):
            return jax.lax.scan(layer, x, params)[0]

    params, x, target = {"w": normal(3, 2, 2)}, normal(4, 2), normal(4, 2, seed=1)
    terms = jp.explain(jp.function(fn), LOSS, params, x, target)
    scopes = terms.layers[""].scopes
    lines = [scope.name for scope in scopes]
    assert [name for name in lines if "layer" in name] == [f"stack/layer[{i}]" for i in range(3)]
    grads = terms["w"].grad
    products = [scope for scope in scopes if "layer" in scope.name]
    for i, scope in enumerate(products):
        assert float(scope.grads.rms) == pytest.approx(np.sqrt(np.mean(np.square(grads[i]))))
        assert np.allclose(scope.kept[0], x @ params["w"][i], rtol=1e-12)
        x = jnp.tanh(x @ params["w"][i])


def test_outside_of_scopes_each_line_is_one():
    terms = jp.explain(jp.function(mlp), LOSS, [{"w": normal(3, 2), "b": normal(2)}], *two())
    (scope,) = terms.layers[""].scopes
    assert scope.name == scope.line
    assert scope.name.startswith("test_explain_function.py:")
    assert set(scope.params) == {"0/w", "0/b"}


def two():
    return normal(2, 3), normal(2, 2)


def test_the_scope_whose_result_is_not_finite_says_so():
    def fn(params, x):
        with jax.named_scope("scale"):
            x = x @ params["w"]
        with jax.named_scope("root"):
            return jnp.sqrt(x)

    params, x = {"w": jnp.eye(2)}, jnp.array([[1.0, 2.0], [-1.0, 0.0], [0.5, 0.2]])
    for keep in (0, 10**6):
        terms = jp.explain(jp.function(fn), LOSS, params, x, x, keep=keep)
        scale, root = terms.layers[""].scopes
        assert int(scale.y.nonfinite) == 0
        assert int(root.y.nonfinite) == 1
        assert int(scale.ct.nonfinite) > 0
        assert "root" in str(terms)


@pytest.mark.parametrize("stacked", [False, True])
def test_scopes_of_a_function_among_layers(stacked):
    params = {**PARAMS, "v": normal(4, 3)}
    function = jp.function(scoped, lambda key, x: params)
    net = jp.repeat(function, 2) if stacked else jp.chain(jp.Tanh(), function)
    x = normal(2, 3, seed=5)
    given = net.init(jax.random.key(0), x)
    terms = jax.jit(lambda params: jp.explain(net, LOSS, params, x, x))(given)
    each = [at for _, at in terms.runs() if at.scopes]
    assert [[scope.name for scope in at.scopes] for at in each] == [
        ["first", "relu", "last"] for _ in range(1 + stacked)
    ]
    for at in each:
        assert np.allclose(at.scopes[-1].kept[0], at.y, rtol=1e-12)
        assert np.allclose(at.scopes[-1].kept[1], at.ct, rtol=1e-12)


@pytest.mark.few(1)
@pytest.mark.parametrize("keep", [0, 10**6])
def test_prints_in_80_columns(keep, standard_promotion):
    nn = pytest.importorskip("flax.linen")

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = x + nn.MultiHeadDotProductAttention(2)(x, x)
            return nn.Dense(2)(nn.relu(x))

    model, x = Model(), normal(2, 3, 4)
    net, params = jp.function(model.apply), model.init(jax.random.key(0), x)
    text = str(jp.explain(net, LOSS, params, x, jnp.zeros((2, 3, 2)), keep=keep))
    assert max(map(len, text.splitlines())) <= 80
    assert "Model/Dense_0" in text
    assert "Attention_0/query" in text
    if not keep:
        (line,) = (line for line in text.splitlines() if "Model/Dense_0" in line)
        assert len(line.split()) == 8  # all columns except saturated slopes


def test_what_stands_beside_a_program_with_scopes_has_its_own_line():
    """A relu before a checkpointed part, in the same scope."""

    def fn(params, x):
        with jax.named_scope("net"):
            x = jnp.maximum(x, 0)
            x = jax.checkpoint(lambda w, x: scoped_product(w, x))(params["w"], x)
            return jnp.sin(x)

    def scoped_product(w, x):
        with jax.named_scope("inner"):
            return x @ w

    x, params = normal(2, 3), {"w": normal(3, 2)}
    terms = jp.explain(jp.function(fn), LOSS, params, x, jnp.zeros((2, 2)))
    before, inner, after = terms.layers[""].scopes
    assert [before.name, after.name] == ["net", "net"]
    assert inner.name.endswith("inner")
    assert inner.params == ("w",)
    assert before.params == after.params == ()
    assert np.allclose(before.kept[0], np.maximum(x, 0))
    assert np.allclose(after.kept[0], terms.layers[""].y)


@pytest.mark.parametrize("around", [jp.recompute, lambda net: net], ids=["recompute", "alone"])
def test_in_a_cast_it_has_its_scopes_too(around):
    def fn(w, x):
        with jax.named_scope("product"):
            return jnp.tanh(x @ w)

    net = jp.chain(around(jp.cast(jp.function(fn, lambda key, x: jnp.eye(3)), jnp.bfloat16)))
    x = jnp.ones((2, 3), jnp.float32)
    params = net.init(jax.random.key(0), x)
    explained = jp.explain(net, jp.HalfSquaredError(), params, x, x)
    assert "\n  product\n" in str(explained)
    assert "is finite" in str(jp.find_nonfinite(net, jp.HalfSquaredError(), params, x, x))
