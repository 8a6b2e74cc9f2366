"""Nets whose input or output has parts: a dict or a tuple."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from table import normal, relative_error

import jaxprop as jp
from jaxprop.core.cotangents import gradient
from jaxprop.core.tree import learned

HEADS = jp.chain(
    jp.branch(digit=jp.Dense(3), angle=jp.chain(jp.Dense(2), jp.BatchNorm(training=False))),
    jp.on("angle", jp.chain(jp.Tanh(), jp.repeat(jp.skip(jp.Dense(2)), 2))),
)
LOSS = jp.total_loss(digit=jp.CrossEntropy(), angle=(0.5, jp.HalfSquaredError()))
X, TARGET = jax.device_put(normal(4, 5)), {"digit": np.array([0, 2, 1, 1]), "angle": normal(4, 2)}


class Named(NamedTuple):
    left: np.ndarray
    right: np.ndarray


class Product(jp.Layer):
    """A user's layer: y = left * right."""

    def forward(self, params, x):
        return x[0] * x[1], x

    def backward(self, params, x, ct):
        d_x = ct * x[1], ct * x[0]
        return (), d_x if type(x) is tuple else type(x)(*d_x)


NETS = [
    (HEADS, normal(4, 5)),
    (jp.branch(jp.Dense(2), jp.Relu(), join="tuple"), normal(3, 2, 4)),
    (jp.branch(jp.Embedding(7, 2), jp.Embedding(7, 3), join="tuple"), np.array([[1, 2], [0, 1]])),
    (jp.branch(a=jp.branch(b=jp.Dense(1)), c=jp.Dense(2)), normal(3, 4)),
    (jp.on(1, jp.Embedding(7, 2)), (normal(3, 2), np.array([1, 2, 1]))),
    (jp.on(-1, jp.skip(jp.Dense(2))), (normal(3, 2), normal(3, 2))),
    (jp.on("right", jp.Dense(4)), Named(normal(3, 2), normal(3, 2))),
    (jp.recompute(jp.on("a", jp.shared(jp.Dense(2), 2))), {"a": normal(3, 2), "b": normal(3, 1)}),
    (jp.repeat(jp.on("a", jp.Dense(2)), 3), {"a": normal(3, 2), "b": normal(3, 1)}),
]
OF_PRODUCTS = [
    (
        jp.chain(jp.branch(jp.Dense(3), jp.Dense(3), join="tuple"), jp.on(0, jp.Tanh()), Product()),
        normal(4, 5),
    ),
    (jp.chain(jp.on("left", jp.Dense(2)), Product()), Named(normal(3, 2), normal(3, 2))),
]


@pytest.mark.few(2)
@pytest.mark.parametrize(("net", "x"), NETS + OF_PRODUCTS, ids=lambda v: str(v)[:40])
def test_check_layer(net, x):
    jp.check_layer(net, x)


@pytest.mark.parametrize(("net", "x"), NETS, ids=lambda v: str(v)[:40])
def test_what_the_layers_are(net, x):
    assert eval(repr(net), vars(jp)) == net
    assert jax.tree.leaves(net) == []
    params, y = jax.eval_shape(lambda x: (net.init(jax.random.key(0), x), x), x)

    def output(x):
        _, y = net.init_with_output(jax.random.key(0), x)
        return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), y)

    got = jax.eval_shape(output, x)
    expected = jax.eval_shape(lambda params, x: net.forward(params, x)[0], params, y)
    assert jax.tree.map(jnp.shape, got) == jax.tree.map(jnp.shape, expected)


@pytest.mark.parametrize(("net", "x"), NETS + OF_PRODUCTS, ids=lambda v: str(v)[:40])
def test_as_a_function_of_ordinary_jax(net, x):
    params = jax.jit(net.init)(jax.random.key(0), x)

    @jax.jit
    def both(params, x):
        pulled = []
        for f in (jp.custom_vjp(net), lambda params, x: net.forward(params, x)[0]):
            y, pull = jax.vjp(f, params, x)
            pulled.append(pull(jax.tree.map(jnp.cos, y)))
        return pulled

    (d_params, d_x), (of_params, of_x) = both(params, x)
    assert relative_error(d_params, of_params) <= 1e-12
    floating = [jnp.issubdtype(leaf.dtype, jnp.floating) for leaf in jax.tree.leaves(x)]
    pairs = zip(jax.tree.leaves(d_x), jax.tree.leaves(of_x), floating, strict=True)
    assert all(relative_error(got, want) <= 1e-12 for got, want, real in pairs if real)


def test_the_cotangent_of_a_part_that_is_not_taken_is_zero():
    layer, x = jp.Item(1), (jnp.ones((2, 3)), jnp.ones((2, 4)), jnp.ones((2, 5), int))
    y, residuals = layer.forward((), x)
    zeros, ct, of_ids = layer.backward((), residuals, 2 * y)[1]
    np.testing.assert_array_equal(zeros, np.zeros((2, 3)))
    np.testing.assert_array_equal(ct, 2 * x[1])
    assert of_ids is None


def test_gradients_and_updates():
    params = jax.jit(HEADS.init)(jax.random.key(0), X)
    args = params, X, TARGET
    got, expected = (jax.jit(f(HEADS, LOSS))(*args) for f in (jp.value_and_grad, jp.autodiff))
    assert relative_error(got, expected) <= 1e-12
    parts = jax.jit(jp.value_and_grad(HEADS, LOSS, micro_batches=2))(*args)
    assert relative_error(parts, expected) <= 1e-12
    steps = []
    for fused in (False, True):
        given = {"fused": fused, "max_norm": 0.1, "skip_nonfinite": True, "donate": False}
        update = jp.make_update(HEADS, LOSS, optax.sgd(0.1, momentum=0.9), **given)
        steps.append(update(params, update.init(params), X, TARGET))
    assert relative_error(*steps) <= 1e-12
    before, after = (map(np.ravel, jax.tree.leaves(learned(z))) for z in (params, steps[0][0]))
    moved = np.concatenate([*before]) - np.concatenate([*after])
    assert np.linalg.norm(moved) == pytest.approx(0.01)


def test_a_walk_and_what_it_collects():
    params = jax.jit(HEADS.init)(jax.random.key(0), X)
    value, grads, d_x = jax.jit(jp.walk(HEADS, LOSS, gradient))(params, X, TARGET)
    expected = jax.jit(jp.autodiff(HEADS, LOSS))(params, X, TARGET)
    assert relative_error((value, grads), (expected[0], learned(expected[1]))) <= 1e-12
    assert d_x.shape == X.shape


@pytest.mark.full
def test_computing_in_bfloat16():
    x = X.astype(jnp.float32)
    target = TARGET | {"angle": jnp.asarray(TARGET["angle"], jnp.float32)}
    net = jp.cast(HEADS, jnp.bfloat16)
    params = net.init(jax.random.key(0), x)
    got, expected = (
        jax.jit(jp.value_and_grad(each, LOSS))(params, x, target) for each in (net, HEADS)
    )
    assert relative_error(got[0], expected[0]) <= 0.02
    assert jax.tree.map(jnp.shape, got) == jax.tree.map(jnp.shape, expected)
    y, _ = net.forward(params, x)
    assert {leaf.dtype for leaf in jax.tree.leaves(y)} == {jnp.dtype(jnp.bfloat16)}


def test_statistics_move_in_one_of_the_heads():
    net = jp.branch(a=jp.Dense(2), b=jp.chain(jp.BatchNorm(), jp.Dense(1)))
    params = jax.jit(net.init)(jax.random.key(0), X)
    moved = jax.jit(jp.update_batch_stats, static_argnums=0)(net, params, X)
    means = [np.asarray(each[1][0].mean.value) for each in (params, moved)]
    np.testing.assert_allclose(means[1] - means[0], 0.1 * np.mean(X, 0) * (1 - means[0]))


@pytest.mark.full
def test_explain_names_the_parts():
    params = HEADS.init(jax.random.key(0), X)
    terms = jp.explain(HEADS, LOSS, params, X, TARGET)
    assert list(terms.layers) == ["0.0", "0.1.0", "0.1.1", "1.0", "1.1"]
    assert jax.tree.map(jnp.shape, terms.loss.x) == {"digit": (4, 3), "angle": (4, 2)}
    by_itself = jp.explain(Heads(), LOSS, (), X, TARGET)
    names = [line.split()[0] for line in str(by_itself).splitlines() if line.startswith("  ")]
    assert names == ["x", "y.angle", "y.digit", "ct.angle", "ct.digit", "d_x"]


class Heads(jp.Layer):
    """A user's layer: the first three entries, and the log of the square of the others."""

    def forward(self, params, x):
        return {"digit": x[:, :3], "angle": jnp.log(x[:, 3:] ** 2)}, x[:, 3:]

    def backward(self, params, x, ct):
        return (), jnp.concatenate([ct["digit"], ct["angle"] * 2 / x], axis=-1)


def test_the_first_number_that_is_not_finite_in_a_part():
    x = X.at[2, 4].set(0)
    found = jp.find_nonfinite(jp.chain(Heads()), LOSS, ((),), x, TARGET)
    assert (found.phase, found.layer, found.array) == ("forward", "0", "y['angle']")
    assert (found.index, found.example, found.value) == ((2, 1), 2, -np.inf)
    np.testing.assert_array_equal(found.x, x[2])
    assert "layer 0 Heads() gave -inf: y['angle'][2, 1], of example 2." in found.sentence
    assert found.sentence.endswith("Not finite in y: 1 of 20.")
    wrong = TARGET | {"angle": jnp.asarray(TARGET["angle"]).at[1, 0].set(jnp.nan)}
    found = jp.find_nonfinite(jp.chain(Heads()), LOSS, ((),), X, wrong)
    assert (found.phase, found.array, found.index) == ("input", "target['angle']", (1, 0))


KEY = jax.random.key(0)


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        (lambda: jp.branch(jp.Relu(), a=jp.Relu()), ValueError, "give all a name, and no join"),
        (lambda: jp.branch(a=jp.Relu(), join="tuple"), ValueError, "give all a name, and no join"),
        (lambda: jp.branch(a=3), TypeError, "branch: layer 0 is not a Layer but 3"),
        (lambda: jp.on("a", jp.Relu), TypeError, "on: the layer is the class Relu; write"),
        (
            lambda: jp.on("b", jp.Relu()).init(KEY, {"a": X}),
            ValueError,
            r"on\('b', Relu\(\)\): x is {'a': float64\[4,5\]}, which has no part 'b'",
        ),
        (lambda: jp.on(0, jp.Relu()).forward((), X), ValueError, r"x is .*, which has no part 0"),
        (lambda: jp.on(2, jp.Relu()).forward((), (X, X)), ValueError, "which has no part 2"),
        (
            lambda: jp.branch(jp.branch(a=jp.Relu()), jp.Relu()).forward((((),), ()), X),
            TypeError,
            r"to join by sum takes arrays, and the layers give {'a': float64\[4,5\]}, float64",
        ),
        (lambda: jp.skip(jp.branch(a=jp.Relu())).forward(((),), X), ValueError, "one shape for"),
        (
            lambda: jp.Relu().forward((), {"a": X}),
            TypeError,
            r"Relu\(\) takes an array x, not {'a'",
        ),
        (lambda: jp.Dense(2).init(KEY, {"a": X}), TypeError, "takes an array x, not {'a'"),
        (
            lambda: jp.value_and_grad(HEADS, jp.CrossEntropy())(HEADS.init(KEY, X), X, TARGET),
            TypeError,
            r"CrossEntropy\(\) takes an array y, .* {'angle': .* jp.total_loss",
        ),
        (
            lambda: jp.tied(jp.chain(jp.Embedding(7, 4), jp.Dense(4)), jp.Relu()).init(
                KEY, jnp.zeros((2, 3), int)
            ),
            ValueError,
            r"the first layer of tied is one whose params are the table \(vocab, features\) alone",
        ),
    ],
)
def test_what_does_not_fit_is_said(wrong, error, message):
    with pytest.raises(error, match=message):
        wrong()
