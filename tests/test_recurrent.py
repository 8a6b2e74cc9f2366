"""Recurrent layers against loops in numpy, autodiff over long sequences, and PyTorch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from table import Row, at, normal, relative_error
from test_layers import by_hand, by_vjp, ct_for

import jaxprop as jp

LAYERS = (jp.Rnn, jp.Lstm, jp.Gru)
kinds = pytest.mark.parametrize("kind", LAYERS, ids=lambda kind: kind.__name__)


def sigmoid(z):
    return 1 / (1 + np.exp(-z))


def rnn_step(params, x, h, c):
    return np.tanh(x @ params.w + h @ params.u + params.b), c


def lstm_step(params, x, h, c):
    i, f, g, o = np.split(x @ params.w + h @ params.u + params.b, 4, axis=-1)
    c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
    return sigmoid(o) * np.tanh(c), c


def gru_step(params, x, h, c):
    a_r, a_z, a_n = np.split(x @ params.w + params.b, 3, axis=-1)
    s_r, s_z, s_n = np.split(h @ params.u, 3, axis=-1)
    z = sigmoid(a_z + s_z)
    return (1 - z) * np.tanh(a_n + sigmoid(a_r + s_r) * (s_n + params.b_u)) + z * h, c


STEPS = dict(zip(LAYERS, (rnn_step, lstm_step, gru_step), strict=True))


@kinds
@pytest.mark.parametrize("shape", [(3, 1, 2), (1, 1, 1), (2, 9, 5)], ids=str)
def test_forward_is_the_step_repeated(kind, shape):
    params, x = at(Row(kind(4), normal(*shape)))
    h = c = np.zeros((shape[0], 4))
    states = []
    for t in range(shape[1]):
        h, c = STEPS[kind](jax.tree.map(np.asarray, params), np.asarray(x[:, t]), h, c)
        states.append(h)
    y, _ = kind(4).forward(params, x)
    np.testing.assert_allclose(y, np.stack(states, axis=1), rtol=1e-13, atol=1e-14)


@kinds
def test_long_sequences(kind):
    params, x = at(Row(kind(5), normal(2, 200, 3)))
    ct = ct_for(kind(5), params, x)
    args = kind(5), params, x, ct
    assert relative_error(by_hand(*args), by_vjp(*args)) <= 1e-12


@kinds
def test_saturated_gates_give_zero_not_nan(kind):
    params, x = at(Row(kind(3), 1e4 * normal(2, 6, 3)))
    args = kind(3), params, x, ct_for(kind(3), params, x)
    for leaf in jax.tree.leaves(by_hand(*args)):
        assert np.isfinite(leaf).all()


@kinds
def test_initial_params(kind):
    layer = kind(6)
    params = layer.init(jax.random.key(0), jnp.ones((1, 2, 3), jnp.bfloat16))
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(jnp.bfloat16)}
    params = layer.init(jax.random.key(0), jnp.ones((1, 2, 3)))
    for block in np.split(np.asarray(params.u), layer.gates, axis=1):
        np.testing.assert_allclose(block @ block.T, np.eye(6), atol=1e-12)
    forget = np.repeat([0.0, 1.0, 0.0, 0.0], 6)
    np.testing.assert_array_equal(params.b, forget if kind is jp.Lstm else np.zeros_like(params.b))
    assert (params.b_u is not None) == (kind is jp.Gru)


@kinds
def test_what_does_not_fit_is_said(kind):
    name, key = kind.__name__, jax.random.key(0)
    with pytest.raises(TypeError, match=f"{name}: features is a whole number, not 2.5"):
        kind(2.5)
    with pytest.raises(ValueError, match=f"{name}: features is at least 1, not 0"):
        kind(0)
    with pytest.raises(ValueError, match=rf"{name}\(2\) takes x of shape \(N, T, I\).*\(3, 4\)"):
        kind(2).init(key, jnp.ones((3, 4)))
    with pytest.raises(ValueError, match=r"at least one step and one feature, not \(3, 0, 4\)"):
        kind(2).init(key, jnp.ones((3, 0, 4)))
    with pytest.raises(TypeError, match=rf"{name}\(2\) takes floating x, not int32"):
        kind(2).init(key, jnp.ones((1, 3, 4), jnp.int32))
    x = jnp.ones((1, 3, 4))
    params = kind(2).init(key, x)
    _, residuals = kind(2).forward(params, x)
    with pytest.raises(ValueError, match=r"ct has shape \(1, 3, 3\), but y has \(1, 3, 2\)"):
        kind(2).backward(params, residuals, jnp.ones((1, 3, 3)))


@kinds
@pytest.mark.parametrize("how", ["auto", "explicit", "shard_map"])
def test_sharded_over_the_batch(kind, how):
    net, loss, P = jp.chain(kind(3)), jp.HalfSquaredError(), PartitionSpec
    x, target = jnp.asarray(normal(8, 5, 2)), jnp.asarray(normal(8, 5, 3))
    params = net.init(jax.random.key(0), x)
    f = jp.value_and_grad(net, loss)
    expected = jax.jit(f)(params, x, target)
    kinds = jax.sharding.AxisType
    mesh = jax.make_mesh((4,), ("d",), axis_types=(getattr(kinds, how.title(), kinds.Auto),))
    if how == "shard_map":

        def mean(params, x, target):
            value, grads = f(params, x, target)
            return jax.lax.pmean(value, "d"), jax.tree.map(lambda g: g / 4, grads)

        sharded = jax.shard_map(mean, mesh=mesh, in_specs=(P(), P("d"), P("d")), out_specs=P())
        assert relative_error(jax.jit(sharded)(params, x, target), expected) <= 1e-12
        return
    specs = P(), P("d"), P("d")
    args = [
        jax.device_put(tree, NamedSharding(mesh, spec))
        for tree, spec in zip((params, x, target), specs, strict=True)
    ]
    with jax.set_mesh(mesh):
        assert relative_error(jax.jit(f)(*args), expected) <= 1e-12


@kinds
def test_agrees_with_torch(kind):
    """Values and all gradients in float64, with the params copied; torch's two biases added up."""
    torch = pytest.importorskip("torch")
    params, x = at(Row(kind(4), normal(3, 7, 5)))
    peer = {jp.Rnn: torch.nn.RNN, jp.Lstm: torch.nn.LSTM, jp.Gru: torch.nn.GRU}[kind]
    peer = peer(5, 4, batch_first=True, dtype=torch.float64)
    second = np.zeros_like(params.b)
    if kind is jp.Gru:
        second[8:] = params.b_u
    ours = params.w.T, params.u.T, params.b, second
    with torch.no_grad():
        for theirs, leaf in zip(peer.parameters(), ours, strict=True):
            theirs.copy_(torch.tensor(np.asarray(leaf)))
    x_there = torch.tensor(np.asarray(x), requires_grad=True)
    y_there, _ = peer(x_there)
    ct = ct_for(kind(4), params, x)
    y_there.backward(torch.tensor(np.asarray(ct)))
    w, u, b, b_second = (leaf.grad.numpy() for leaf in peer.parameters())
    d_b_u = b_second[8:] if kind is jp.Gru else None
    expected = params._replace(w=w.T, u=u.T, b=b, b_u=d_b_u), x_there.grad.numpy()
    y, _ = kind(4).forward(params, x)
    assert relative_error(y, y_there.detach().numpy()) <= 1e-10
    assert relative_error(by_hand(kind(4), params, x, ct), expected) <= 1e-10
