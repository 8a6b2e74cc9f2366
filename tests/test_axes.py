"""Layers that pick from an axis, or move axes, against NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from table import Row, at, normal, relative_error

import jaxprop as jp

MASK = np.array(
    [[1, 1, 1, 0, 0], [0, 1, 0, 1, 1], [1, 1, 1, 1, 1], [0, 0, 1, 0, 0], [0, 0, 0, 0, 0]], bool
)


@pytest.mark.parametrize("index", [-1, 0, 1, -2])
def test_with_a_mask_the_index_counts_real_positions(index):
    x, ct = jnp.asarray(normal(5, 5, 3)), jnp.asarray(normal(5, 3))
    expected, d_x = np.zeros((5, 3)), np.zeros((5, 5, 3))
    for n, real in enumerate(MASK):
        steps = np.flatnonzero(real)
        if -len(steps) <= index < len(steps):
            expected[n] = x[n, steps[index]]
            d_x[n, steps[index]] = ct[n]
    layer, dirty = jp.Take(index), jnp.where(MASK[..., None], x, jnp.nan)
    params = layer.bind((), mask=jnp.asarray(MASK))
    y, residuals = layer.forward(params, dirty)
    np.testing.assert_array_equal(y, expected)
    np.testing.assert_array_equal(layer.backward(params, residuals, ct)[1], d_x)


@pytest.mark.full
def test_the_last_token_of_padded_sequences_is_that_of_each_alone():
    net, loss = jp.chain(jp.Dense(12), jp.Attention(2), jp.Take(-1), jp.Dense(3)), jp.CrossEntropy()
    params, x = at(Row(net, normal(2, 5, 4)))
    target, mask = jnp.array([1, 2]), jnp.array([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]], bool)
    got = jp.per_example_grads(net, loss)(params, x, target, mask=mask)
    alone = [
        jp.per_example_grads(net, loss)(params, x[n : n + 1, :t], target[n : n + 1])
        for n, t in enumerate((3, 5))
    ]
    assert relative_error(got, jax.tree.map(lambda a, b: jnp.concatenate([a, b]), *alone)) <= 1e-12


@pytest.mark.parametrize(("index", "axis"), [(0, 1), (-1, 1), (2, 3), (-2, 2)])
def test_take_is_that_of_numpy(index, axis):
    x = jnp.asarray(normal(2, 3, 4, 5))
    y, pull = jax.vjp(lambda x: jnp.take(x, index, axis), x)
    got, residuals = jp.Take(index, axis).forward((), x)
    np.testing.assert_array_equal(got, y)
    ct = jnp.asarray(normal(*y.shape))
    np.testing.assert_array_equal(jp.Take(index, axis).backward((), residuals, ct)[1], pull(ct)[0])


@pytest.mark.parametrize(("source", "destination"), [(1, -1), ((1, 3), (2, 1)), (2, 2)])
def test_moveaxis_is_that_of_numpy(source, destination):
    layer, x = jp.Moveaxis(source, destination), jnp.asarray(normal(2, 3, 4, 5))
    y, residuals = layer.forward(layer.init(jax.random.key(0), x), x)
    np.testing.assert_array_equal(y, np.moveaxis(x, source, destination))
    np.testing.assert_array_equal(layer.backward((), residuals, y)[1], x)


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: jp.Take(1.0), TypeError, "Take: index is a whole number, not 1.0"),
        (lambda: jp.Take(0, 0), ValueError, "Take: axis is at least 1, not 0"),
        (lambda: jp.Take(3), ValueError, r"Take\(3\) takes an entry that x of shape \(2, 3, 4\)"),
        (lambda: jp.Take(-4), ValueError, "does not have"),
        (lambda: jp.Take(0, 3), ValueError, "does not have"),
        (lambda: jp.Moveaxis(1.0, 2), TypeError, "a whole number or a tuple of them"),
        (lambda: jp.Moveaxis(0, 1), ValueError, "each once and not the example's"),
        (lambda: jp.Moveaxis(1, -3), ValueError, "each once and not the example's"),
        (lambda: jp.Moveaxis((1, -2), (1, 2)), ValueError, "each once and not the example's"),
        (lambda: jp.Moveaxis(1, 3), ValueError, "axes that x of shape .* has"),
        (lambda: jp.Moveaxis((1, 2), 1), ValueError, "as many axes for destination"),
    ],
)
def test_what_does_not_fit_is_said(make, error, words):
    with pytest.raises(error, match=words):
        make().init(jax.random.key(0), jnp.ones((2, 3, 4)))


def test_a_mask_of_positions_that_have_moved_is_refused():
    net = jp.chain(jp.Moveaxis(1, 2), jp.Take(-1))
    with pytest.raises(ValueError, match="mixes positions and takes no mask"):
        net.bind(((), ()), mask=jnp.ones((1, 4), bool))
    with pytest.raises(ValueError, match="takes a padding mask"):
        jp.Take(-1).forward(jp.Mask(jnp.ones((1, 4), bool)), jnp.ones((1, 3, 2)))


def test_a_mask_is_of_positions_alone():
    net = jp.chain(jp.Dense(3), jp.Take(0, axis=2), jp.Dense(2))
    params, x = at(Row(net, normal(2, 5, 4)))
    with pytest.raises(ValueError, match="no layer takes a mask"):
        net.bind(params, mask=jnp.ones((2, 5), bool))
    net = jp.chain(jp.Dense(3), jp.Take(0), jp.Dense(2))
    params, x = at(Row(net, normal(2, 5, 4)))
    y = net(net.bind(params, mask=jnp.arange(5)[None] >= jnp.array([[1], [2]])), x)
    expected = net(params, jnp.stack([x[0, 1:3], x[1, 2:4]]))
    assert relative_error(y, expected) <= 1e-12
