"""Whole programs, each as short as a user would write it, and their results."""

import functools

import dp_accounting
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from dp_accounting.pld import PLDAccountant
from sklearn.datasets import load_digits

import jaxprop as jp

pytestmark = pytest.mark.usefixtures("standard_promotion")


@pytest.fixture(scope="module")
def digits():
    x, target = load_digits(return_X_y=True)
    return jnp.float32(x / 16), jnp.int32(target)


@pytest.mark.full
def test_private_digits_with_their_epsilon(digits):
    x, target = digits
    train, test = 1500, slice(1500, None)
    net = jp.chain(jp.Dense(32), jp.Tanh(), jp.Dense(10))
    noise, expected, room, steps = 1.2, 150, 220, 40
    private = functools.partial(jp.clipped_grad, max_norm=1.0, noise_multiplier=noise)
    update = jp.make_update(
        net, jp.CrossEntropy(), optax.sgd(2.0), value_and_grad=private, aux=True
    )
    params = net.init(jax.random.key(0), x[:1])
    state = update.init(params)

    def step(carry, key):
        draw, key = jax.random.split(key)
        drawn = jax.random.bernoulli(draw, expected / train, (train,))
        (rows,) = jnp.nonzero(drawn, size=room, fill_value=-1)
        *carry, (_, aux) = update(
            *carry, x[rows], target[rows], key, weights=rows >= 0, divisor=expected
        )
        return tuple(carry), (drawn.sum(), aux.clipped)

    (params, _), (drawn, clipped) = jax.lax.scan(
        step, (params, state), jax.random.split(jax.random.key(1), steps)
    )
    event = dp_accounting.PoissonSampledDpEvent(
        expected / train, dp_accounting.GaussianDpEvent(noise)
    )
    epsilon = PLDAccountant().compose(event, steps).get_epsilon(1e-5)
    accuracy = jnp.mean(net(params, x[test]).argmax(-1) == target[test])
    assert drawn.max() <= room
    assert 0 < clipped.min() < clipped.max() <= 1
    assert 2 < epsilon < 4
    assert accuracy > 0.8


@pytest.mark.full
def test_a_convolution_net_with_batch_norm_and_dropout(digits):
    x, target = digits
    x = x.reshape(-1, 8, 8, 1)
    stage = jp.chain(jp.Conv(8), jp.BatchNorm(), jp.Relu(), jp.MaxPool())
    net = jp.chain(stage, stage, jp.Flatten(), jp.Dropout(0.1), jp.Dense(10))
    update = jp.make_update(
        net, jp.CrossEntropy(label_smoothing=0.05), optax.adam(1e-2), max_norm=5.0, aux=True
    )
    params = net.init(jax.random.key(0), x[:1])
    state, accuracies = update.init(params), []
    for epoch in range(4):
        order, *keys = jax.random.split(jax.random.key(epoch), 16)
        for rows, key in zip(
            jax.random.permutation(order, 1500).reshape(15, 100), keys, strict=True
        ):
            params, state, (_, aux) = update(params, state, x[rows], target[rows], key)
            accuracies.append(jnp.mean(aux.y.argmax(-1) == target[rows]))
    predict = jax.jit(jp.inference_mode(net))
    held_out = jnp.mean(predict(params, x[1500:]).argmax(-1) == target[1500:])
    assert jnp.mean(jnp.stack(accuracies[-15:])) > 0.9
    assert held_out > 0.75  # without updated running statistics, about a half at most
    assert aux.norm > 0


@pytest.mark.full
def test_a_gpt_with_its_norms_logged():
    text = np.frombuffer(b"the quick brown fox jumps over the lazy dog. " * 60, np.uint8)
    net = jp.models.gpt2(jp.models.Gpt2Config(128, 16, 32, 2, 2))
    windows = np.lib.stride_tricks.sliding_window_view(text, 17)
    update = jp.make_update(
        net, jp.CrossEntropy(), optax.adamw(1e-2), fused=True, max_norm=1.0, aux=True
    )
    measure = jax.jit(
        jp.quantities(net, jp.CrossEntropy(), norms=jp.SqNorms(), layers=jp.SqNorms(per_layer=True))
    )
    ids = jnp.int32(windows[:1])
    params = net.init(jax.random.key(0), ids[:, :-1])
    state, log = update.init(params), []
    for step in range(60):
        rows = jax.random.randint(jax.random.key(step), (16,), 0, len(windows))
        ids = jnp.int32(windows[rows])
        if step % 20 == 0:
            seen = measure(params, ids[:, :-1], ids[:, 1:])
            log.append((seen["value"], jnp.sqrt(seen["norms"]).mean()))
        params, state, (value, aux) = update(params, state, ids[:, :-1], ids[:, 1:])
    total = sum(jnp.sum(leaf.reshape(-1, 16), 0) for leaf in jax.tree.leaves(seen["layers"]))
    assert jnp.allclose(total, seen["norms"], rtol=1e-4)
    assert log[0][0] > 4
    assert value < 1
    assert aux.norm > 0


class Bilinear(jp.Layer):
    """y = (x u) * (x v), so d_u = x^T (ct * x v), d_v = x^T (ct * x u)."""

    def init(self, key, x):
        shape = (2, x.shape[-1], x.shape[-1])
        return tuple(jax.random.normal(key, shape, x.dtype) / x.shape[-1] ** 0.5)

    def forward(self, params, x):
        a, b = x @ params[0], x @ params[1]
        return a * b, (x, a, b)

    def backward(self, params, residuals, ct):
        x, a, b = residuals
        to_u, to_v = ct * b, ct * a
        d_params = jp.Outer(x, to_u), jp.Outer(x, to_v)
        return d_params, to_u @ params[0].T + to_v @ params[1].T


class LogCosh(jp.Loss):
    """E = sum_j log cosh(y_j - t_j), so dE/dy = tanh(y - t), and its Hessian is 1 - tanh^2."""

    def forward(self, y, target):
        error = y - target.astype(y.dtype)
        each = jnp.logaddexp(error, -error) - jnp.log(2.0).astype(y.dtype)
        return each.sum(-1), error

    def backward(self, error):
        return jnp.tanh(error)

    def hessian_root(self, error):
        return jnp.moveaxis(jax.vmap(jnp.diag)(1 / jnp.cosh(error)), 1, 0)

    def sample(self, key, error):
        signs = jax.random.rademacher(key, error.shape, error.dtype)
        return signs / jnp.cosh(error)


@pytest.mark.full
def test_a_layer_and_a_loss_of_ones_own_under_repeat_and_clipping():
    x = jax.random.normal(jax.random.key(0), (12, 4))
    target = jnp.sin(3 * x)
    jp.check_layer(Bilinear(), x)
    jp.check_loss(LogCosh(), x, target)
    block = jp.skip(jp.chain(jp.LayerNorm(), Bilinear()))
    net = jp.chain(jp.repeat(block, 3), jp.Dense(4))
    clip = functools.partial(jp.clipped_grad, max_norm=1.0, per_layer=True)
    update = jp.make_update(net, LogCosh(), optax.adam(3e-2), value_and_grad=clip, aux=True)
    params = net.init(jax.random.key(1), x)
    state, values = update.init(params), []
    for _ in range(60):
        params, state, (value, aux) = update(params, state, x, target)
        values.append(float(value))
    assert values[-1] < 0.3 * values[0]
    assert aux.norms[0][1].shape == (3, 12)  # for each layer of the stack and each example
    curvature = jp.diag_ggn(net, LogCosh())(params, x, target)
    assert all((leaf >= 0).all() for leaf in jax.tree.leaves(curvature))
