"""Other clippings: bounds for each layer, other weights, a bound that adapts to a quantile."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from table import Row, at, normal, relative_error

import jaxprop as jp

LOSS = jp.HalfSquaredError()
NET = jp.chain(jp.Dense(4), jp.Tanh(), jp.repeat(jp.skip(jp.Dense(4)), 3), jp.Dense(2))
PARAMS, X = at(Row(NET, normal(6, 3)))
TARGET = normal(6, 2)


def each_of(net, params, x, target):
    """The per-example gradients, by NumPy."""
    return jax.tree.map(np.asarray, jax.jit(jp.per_example_grads(net, LOSS))(params, x, target))


EACH = each_of(NET, PARAMS, X, TARGET)


def norms_of(tree):
    return np.sqrt(sum((g**2).sum(tuple(range(1, g.ndim))) for g in jax.tree.leaves(tree)))


def mean_of(tree, weights):
    return jax.tree.map(lambda g: np.tensordot(weights, g, 1) / len(weights), tree)


def by_hand(bounds):
    """The mean of gradients clipped by layer, with each layer of the stack on its own."""
    first, middle, last = bounds
    stack = EACH[2]
    middle = np.broadcast_to(middle, (3,))
    each = [jax.tree.map(lambda g, i=i: g[:, i], stack) for i in range(3)]
    clipped = [
        mean_of(part, np.minimum(1, bound / norms_of(part)))
        for part, bound in [(EACH[0], first), *zip(each, middle, strict=True), (EACH[3], last)]
    ]
    stacked = jax.tree.map(lambda *g: np.stack(g), *clipped[1:4])
    return (clipped[0], (), stacked, clipped[4])


@pytest.mark.few(1)
@pytest.mark.parametrize("middle", [0.3, jnp.array([0.1, 0.3, 0.9])], ids=["one", "each"])
@pytest.mark.parametrize("micro_batches", [1, 2])
def test_a_bound_for_each_layer(middle, micro_batches):
    bounds = (0.5, (), middle, 0.2)
    f = jp.clipped_grad(
        NET, LOSS, bounds, per_layer=True, aux=micro_batches == 1, micro_batches=micro_batches
    )
    value, grads = jax.jit(f)(PARAMS, X, TARGET)
    assert relative_error(grads, by_hand((0.5, middle, 0.2))) <= 1e-11
    if micro_batches == 1:
        _, aux = value
        assert aux.norms[2].shape == (3, 6)
        assert relative_error(aux.clipped[0], np.mean(norms_of(EACH[0]) > 0.5)) <= 1e-12
        assert aux.clipped[2].shape == (3,)


def test_a_frozen_layer_has_no_bound():
    net = jp.chain(jp.frozen(jp.Dense(4)), jp.Tanh(), jp.Dense(3), jp.Dense(2))
    params, x = at(Row(net, normal(6, 3)))
    each = each_of(net, params, x, TARGET)
    f = jp.clipped_grad(net, LOSS, ((), (), 0.3, 0.5), per_layer=True, aux=True)
    (_, aux), grads = jax.jit(f)(params, x, TARGET)
    for index, bound in ((2, 0.3), (3, 0.5)):
        norms = norms_of(each[index])
        want = mean_of(each[index], np.minimum(1, bound / norms))
        assert relative_error(grads[index], want) <= 1e-11
        assert relative_error(aux.clipped[index], np.mean(norms > bound)) <= 1e-12
    noisy = jp.clipped_grad(net, LOSS, ((), (), 0.3, 0.5), 1.0, per_layer=True)
    jax.jit(noisy)(params, x, TARGET, key=jax.random.key(0))


def test_equal_bounds_are_one_bound():
    alike, one = (
        jax.jit(jp.clipped_grad(NET, LOSS, bounds, per_layer=True))(PARAMS, X, TARGET)
        for bounds in ((0.3, (), 0.3, 0.3), 0.3)
    )
    assert relative_error(alike, one) <= 1e-12


@pytest.mark.full
def test_noise_is_of_the_bound_of_all():
    """It is sqrt(0.5^2 + 3 * 0.3^2 + 0.2^2) times the multiplier over the number of examples."""
    net = jp.chain(jp.Dense(200), jp.repeat(jp.Dense(200), 3), jp.Dense(200))
    x = jnp.zeros((2, 200))
    params = net.init(jax.random.key(0), x)
    f = jp.clipped_grad(net, LOSS, (0.5, 0.3, 0.2), 2.0, per_layer=True)
    noise = f(params, x, net(params, x), key=jax.random.key(1))[1]
    want = 2.0 * np.sqrt(0.25 + 3 * 0.09 + 0.04) / 2
    for leaf in jax.tree.leaves(noise)[::2]:
        assert abs(float(leaf.std()) / want - 1) < 0.05


@pytest.mark.parametrize("two_pass", [False, True])
def test_automatic_and_normalized(two_pass):
    norms = norms_of(EACH)
    for weight, factors in (
        (jp.quantity.automatic, 0.7 / (norms + 0.01)),
        (jp.quantity.normalized, 0.7 / norms),
        (lambda norms, bound: jnp.exp(-norms) * bound, np.exp(-norms) * 0.7),
    ):
        f = jp.clipped_grad(NET, LOSS, 0.7, weight=weight, two_pass=two_pass)
        want = mean_of(EACH, factors)
        assert relative_error(jax.jit(f)(PARAMS, X, TARGET)[1], want) <= 1e-11


def test_no_weight_exceeds_the_bound():
    for sign in (1.0, -1.0):
        f = jp.clipped_grad(
            NET, LOSS, 0.7, weight=lambda norms, bound, s=sign: s * 1e6 * jnp.ones_like(norms)
        )
        want = mean_of(EACH, sign * 0.7 / norms_of(EACH))
        assert relative_error(jax.jit(f)(PARAMS, X, TARGET)[1], want) <= 1e-11


def test_a_gradient_of_zero_is_left_so_by_every_weight():
    target = np.array(jax.jit(NET)(PARAMS, X))
    target[1] = 0.0
    each = each_of(NET, PARAMS, X, target)
    one = jax.tree.map(lambda g: g[1] / 6, each)
    norm = norms_of(jax.tree.map(lambda g: g[None], one))[0] * 6
    for weight in (jp.quantity.automatic, jp.quantity.normalized):
        got = jax.jit(jp.clipped_grad(NET, LOSS, 0.7, weight=weight))(PARAMS, X, target)[1]
        factor = np.asarray(weight(norm[None], 0.7))[0]
        want = jax.tree.map(lambda g, factor=factor: g * factor, one)
        assert relative_error(got, want) <= 1e-11


def test_derivatives_of_clipped_gradients_know_no_padding():
    clipped = jp.clipped_grad(jp.chain(*NET.layers[:2], jp.Dense(2)), LOSS, 0.3)
    params, weights = (*PARAMS[:2], PARAMS[3]), jnp.float64(jnp.arange(6) < 4)

    def of_clipped(params, x, target, weights=None):
        grads = clipped(params, x, target, weights=weights)[1]
        return sum((g**3).sum() for g in jax.tree.leaves(grads))

    @jax.jit
    def twice(*batch):
        grad = jax.grad(lambda params: of_clipped(params, *batch))
        return jax.jvp(grad, (params,), (jax.tree.map(jnp.cos, params),))

    padded, alone = twice(X, TARGET, weights), twice(X[:4], TARGET[:4])
    assert relative_error(padded, alone) < 1e-12


@pytest.mark.parametrize("size", [1e20, 1e-25])
def test_norms_whose_squares_float32_does_not_hold(size):
    """For one position and for several, with an example in the batch whose x is 0."""

    def loss(y, target):
        return size * jnp.sum(y * target)

    for shape in ((3, 4), (3, 2, 4), (3, 8, 4)):
        net, x = jp.Dense(2), normal(*shape).astype(np.float32)
        x[1] = 0
        target = np.cos(normal(*shape[:-1], 2)).astype(np.float32)
        params = jax.tree.map(lambda p: p.astype(jnp.float32), net.init(jax.random.key(0), x))
        f = jax.jit(jp.clipped_grad(net, jp.loss(loss), size / 100, aux=True))
        (_, aux), got = f(params, x, target)
        x, target = (np.reshape(a, (3, -1, a.shape[-1])).astype(np.float64) for a in (x, target))
        each = np.einsum("nti,nto->nio", x, target), target.sum(1)
        norms = np.sqrt(sum((g**2).reshape(3, -1).sum(1) for g in each))
        np.testing.assert_allclose(np.asarray(aux.norms, np.float64), size * norms, rtol=1e-5)
        for g, of_each in zip(jax.tree.leaves(got), each, strict=True):
            want = np.einsum("n...,n->...", of_each, 1 / norms) / 3
            np.testing.assert_allclose(
                np.asarray(g, np.float64) * (100 / size), want, rtol=1e-4, atol=1e-6
            )


def test_the_bound_goes_to_its_quantile():
    norms = np.random.default_rng(0).lognormal(size=400)
    bound = 0.01
    for _ in range(200):
        bound = jp.quantity.next_max_norm(bound, np.mean(norms > bound), quantile=0.8)
    assert abs(np.mean(norms <= bound) - 0.8) < 0.02
    step = jax.jit(lambda bound: jp.clipped_grad(NET, LOSS, bound, aux=True)(PARAMS, X, TARGET))
    (_, aux), _ = step(jnp.asarray(0.5))
    assert 0 <= float(jp.quantity.next_max_norm(0.5, aux.clipped)) < 1


def test_bounds_of_a_function_s_modules():
    def fn(params, x):
        return jnp.tanh(x @ params["a"]["w"]) @ params["b"]["w"] + params["b"]["c"][None]

    params = {"a": {"w": normal(3, 4)}, "b": {"w": normal(4, 2), "c": normal(2)}}
    net = jp.function(fn)
    each = each_of(net, params, X, TARGET)
    f = jp.clipped_grad(net, LOSS, {"a": 0.3, "b": 0.5}, per_layer=True)
    got = jax.jit(f)(params, X, TARGET)[1]
    for name, bound in (("a", 0.3), ("b", 0.5)):
        want = mean_of(each[name], np.minimum(1, bound / norms_of(each[name])))
        assert relative_error(got[name], want) <= 1e-11
    mesh = jax.make_mesh((1,), ("batch",), axis_types=(jax.sharding.AxisType.Auto,))
    for around in (jp.cast(net, jnp.float64), jp.sharding.gathered(net, mesh)):
        f = jp.clipped_grad(around, LOSS, {"a": 0.3, "b": 0.5}, per_layer=True)
        assert relative_error(jax.jit(f)(params, X, TARGET)[1], got) <= 1e-12


def test_mistakes_are_said():
    with pytest.raises(ValueError, match="give a bound where each layer's params stand"):
        jax.jit(jp.clipped_grad(NET, LOSS, (0.5, 0.2), per_layer=True))(PARAMS, X, TARGET)
    with pytest.raises(TypeError, match="max_norm is a number"):
        jp.clipped_grad(NET, LOSS, (0.5, 0.2))
    with pytest.raises(ValueError, match="max_norm must be positive"):
        jp.clipped_grad(NET, LOSS, (0.5, -0.2), per_layer=True)
    with pytest.raises(TypeError, match="weight is a function"):
        jp.clipped_grad(NET, LOSS, 0.5, weight=1.0)
    with pytest.raises(ValueError, match="quantile"):
        jp.quantity.next_max_norm(1.0, 0.5, quantile=-1)
    with pytest.raises(ValueError, match="quantile is from 0 to 1, not 5"):
        jp.quantity.next_max_norm(1.0, 0.5, quantile=5)


def test_bounds_by_layer_are_shown_and_checked():
    with pytest.raises(ValueError, match=r"as in \(1\.0, \(\), 1\.0, 1\.0\)"):
        jp.clipped_grad(NET, LOSS, (1.0, 2.0), per_layer=True)(PARAMS, X, TARGET)
    each = jnp.ones(len(X))
    with pytest.raises(ValueError, match="max_norm: a layer's bound is a number, not float64"):
        jp.clipped_grad(NET, LOSS, (each, (), 1.0, 1.0), per_layer=True)(PARAMS, X, TARGET)
