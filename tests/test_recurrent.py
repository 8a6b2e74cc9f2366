"""Recurrent layers against loops over the steps, autodiff over long sequences, and PyTorch."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from table import Row, at, normal, relative_error
from test_layers import by_hand, by_vjp, ct_for

import jaxprop as jp
from jaxprop.core.cotangents import gradient
from jaxprop.core.tree import bare, learned

LAYERS, LOSS = (jp.Rnn, jp.Lstm, jp.Gru), jp.CrossEntropy()
kinds = pytest.mark.parametrize("kind", LAYERS, ids=lambda kind: kind.__name__)


def rnn_step(params, x, state):
    (h,) = state
    return (jnp.tanh(x @ params.w + h @ params.u + params.b),)


def lstm_step(params, x, state):
    h, c = state
    i, f, g, o = jnp.split(x @ params.w + h @ params.u + params.b, 4, axis=-1)
    i, f, g, o = jax.nn.sigmoid(i), jax.nn.sigmoid(f), jnp.tanh(g), jax.nn.sigmoid(o)
    c = f * c + i * g
    return o * jnp.tanh(c), c


def gru_step(params, x, state):
    (h,) = state
    a_r, a_z, a_n = jnp.split(x @ params.w + params.b, 3, axis=-1)
    s_r, s_z, s_n = jnp.split(h @ params.u, 3, axis=-1)
    z, r = jax.nn.sigmoid(a_z + s_z), jax.nn.sigmoid(a_r + s_r)
    return ((1 - z) * jnp.tanh(a_n + r * (s_n + params.b_u)) + z * h,)


STEPS = dict(zip(LAYERS, (rnn_step, lstm_step, gru_step), strict=True))


def by_loop(layer, mask, params, x, state):
    """y and the last state, example by example, by a loop over the real steps alone."""
    step = jax.jit(STEPS[type(layer)])
    ys, lasts = [], []
    for n, real in enumerate(mask):
        y = jnp.zeros((x.shape[1], layer.features))
        last = tuple(leaf[n] for leaf in state)
        steps = np.flatnonzero(real)
        for t in steps[::-1] if layer.reverse else steps:
            last = step(params, x[n, t], last)
            y = y.at[t].set(last[0])
        ys.append(y)
        lasts.append(last)
    return jnp.stack(ys), jax.tree.map(lambda *leaves: jnp.stack(leaves), *lasts)


def public(state):
    """A state as the layers take and return it."""
    return state[0] if len(state) == 1 else state


MASKS = np.array(
    [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [0, 0, 1, 1, 0], [1, 0, 1, 0, 1], [0, 0, 0, 0, 0]], bool
)


@pytest.mark.few(1)
@kinds
@pytest.mark.parametrize("reverse", [False, True])
def test_masks_and_states_are_those_of_a_loop_over_the_real_steps(kind, reverse):
    """Every output and every gradient: by params, by x and by the initial state."""
    layer = kind(3, reverse, "both")
    params, x = at(Row(kind(3), normal(5, 5, 2)))
    state = tuple(normal(5 + i, 5, 3)[0] for i in range(layer.states))
    loop = functools.partial(by_loop, layer, MASKS)
    y, last = jax.jit(loop)(params, x, state)
    pull = jax.jit(lambda cts: jax.vjp(loop, params, x, state)[1](cts))
    masked = layer.bind(params, mask=jax.device_put(MASKS))
    dirty = np.where(MASKS[..., None], x, np.nan)

    for output, expected in (("both", (y, public(last))), ("sequence", y), ("last", last[0])):
        here = kind(3, reverse, output)
        got, residuals = jax.jit(here.forward)(masked, (dirty, public(state)))
        assert relative_error(got, expected) <= 1e-13
        ct = jax.tree.map(lambda leaf: normal(3, *leaf.shape)[0], expected)
        zeros = np.zeros_like(y), tuple(map(np.zeros_like, last))
        ct_y = {"both": ct[0], "sequence": ct}.get(output, zeros[0])
        ct_last = {"both": ct[1], "last": (ct, *zeros[1][1:])}.get(output, zeros[1])
        d_params, d_x, d_state = pull((ct_y, ct_last if isinstance(ct_last, tuple) else (ct_last,)))
        if output == "sequence":
            ct = np.where(MASKS[..., None], ct, np.nan)
        got = jax.jit(lambda *args, here=here: here.walk(*args, gradient))(masked, residuals, ct)
        assert relative_error(got, (d_params, (d_x, public(d_state)))) <= 1e-12


@pytest.mark.full
@kinds
@pytest.mark.parametrize("output", ["sequence", "last", "both"])
def test_check_layer_from_a_state(kind, output):
    layer = kind(3, output == "last", output)
    x, state = normal(2, 4, 2), tuple(normal(1 + i, 2, 3)[0] for i in range(layer.states))
    jp.check_layer(layer, (x, public(state)))
    jp.check_layer(layer, x)


@kinds
def test_a_sequence_in_parts_is_the_whole(kind):
    whole, layer = kind(3), kind(3, output="both")
    params, x = at(Row(whole, normal(2, 7, 2)))
    forward = jax.jit(layer.forward)
    (first, state), _ = forward(params, x[:, :3])
    (second, _), _ = forward(params, (x[:, 3:], state))
    y, _ = jax.jit(whole.forward)(params, x)
    np.testing.assert_allclose(np.concatenate([first, second], 1), y, rtol=1e-13)


def lengths(*each):
    return jnp.arange(max(each))[None] < jnp.array(each)[:, None]


@pytest.mark.full
def test_quantities_of_a_masked_batch_are_those_of_each_example_alone():
    net = jp.chain(jp.bidirectional(jp.Rnn(2)), jp.Gru(2, True), jp.Lstm(3, output="last"))
    params, x = at(Row(net, normal(2, 4, 2)))
    target = jnp.array([0, 2])

    @jax.jit
    def asked(x, target, mask):
        args, own = (params, x, target), (jp.per_example_grads, jp.per_example_sq_norms)
        means = jp.value_and_grad, jp.second_moment
        factors = jp.kronecker_factors(net, LOSS)(*args, mask=mask)
        each = [[f(net, LOSS)(*args, mask=mask) for f in each] for each in (own, means)]
        return (*each, factors)

    dirty = jnp.where(lengths(4, 2)[..., None], x, np.nan)
    own, means, factors = asked(dirty, target, lengths(4, 2))
    a, mean_a, factors_a = asked(x[:1], target[:1], None)
    b, mean_b, factors_b = asked(x[1:, :2], target[1:], None)
    assert relative_error(own, jax.tree.map(lambda a, b: jnp.concatenate([a, b]), a, b)) <= 1e-12
    assert relative_error(means, jax.tree.map(lambda a, b: (a + b) / 2, mean_a, mean_b)) <= 1e-12
    whole = jax.tree.map(  # a is the mean over four positions and two
        lambda one, two: jp.Kronecker((4 * one.a + 2 * two.a) / 6, (one.b + two.b) / 2),
        factors_a,
        factors_b,
        is_leaf=lambda node: isinstance(node, jp.Kronecker),
    )
    assert relative_error(factors, whole) <= 1e-12


@pytest.mark.full
def test_a_mask_goes_wherever_a_layer_stands():
    block = jp.skip(jp.recompute(jp.Lstm(4)))
    net = jp.chain(jp.repeat(block, 2), jp.frozen(jp.Gru(4)), jp.cast(jp.Rnn(2), jnp.float64))
    params, x = at(Row(net, normal(4, 5, 4)))
    (stack, gru, rnn), loss, mask = params, jp.HalfSquaredError(), lengths(5, 2, 3, 1)
    target = jnp.where(mask[..., None], normal(4, 5, 2), 0)
    one, two = (jax.tree.map(lambda leaf, i=i: leaf[i], stack) for i in range(2))
    plain = jp.chain(block, block, jp.Gru(4), jp.Rnn(2))
    of_plain = one, two, jax.tree.map(lambda node: node, gru), rnn
    f = jp.value_and_grad(net, loss)
    value, grads = jax.jit(f)(params, x, target, mask=mask)
    other, expected = jp.value_and_grad(plain, loss)(
        jax.tree.map(jnp.asarray, bare(of_plain)), x, target, mask=mask
    )
    assert relative_error(value, other) <= 1e-12
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *expected[:2])
    assert relative_error((grads[0], grads[2]), (stacked, expected[3])) <= 1e-12
    parts = jp.value_and_grad(net, loss, micro_batches=2)
    assert relative_error(parts(params, x, target, mask=mask), (value, grads)) <= 1e-12
    update = jp.make_update(net, loss, optax.sgd(0.1), fused=True, donate=False)
    moved, _, _ = update(params, update.init(params), x, target, mask=mask)
    assert jax.tree.structure(moved) == jax.tree.structure(params)
    by_sgd = jax.tree.map(lambda p, g: p - 0.1 * g, learned(params), learned(grads))
    assert relative_error(moved, by_sgd) <= 1e-12


@kinds
def test_params_without_a_mask_are_as_they_were(kind):
    """Params from an old pickle, which have no field for a mask, work too."""
    params, _ = at(Row(kind(2), normal(1, 3, 4)))
    assert len(jax.tree.leaves(params)) == (4 if kind is jp.Gru else 3)
    assert jp.RecurrentParams(*params[:4]) == params
    assert kind(2).bind(params) is params


def test_both_directions_are_two_layers_side_by_side():
    layer = jp.bidirectional(jp.Gru(3))
    params, x = at(Row(layer, normal(2, 5, 2)))
    y, _ = jax.jit(layer.forward)(params, x)
    there, back = (
        np.asarray(jax.jit(jp.Gru(3).forward)(own, np.asarray(x)[:, ::step])[0])
        for own, step in zip(params, (1, -1), strict=True)
    )
    np.testing.assert_allclose(y, np.concatenate([there, back[:, ::-1]], -1), rtol=1e-13)
    last, _ = jax.jit(jp.bidirectional(jp.Gru(3, output="last")).forward)(params, x)
    np.testing.assert_allclose(last, np.concatenate([there[:, -1], back[:, -1]], -1), rtol=1e-13)
    with pytest.raises(TypeError, match="takes a layer with a field reverse, not Tanh"):
        jp.bidirectional(jp.Tanh())
    with pytest.raises(ValueError, match='output of "sequence" or "last"'):
        jp.bidirectional(jp.Gru(3, output="both"))


@pytest.mark.few(4)
@kinds
@pytest.mark.parametrize("shape", [(3, 1, 2), (1, 1, 1), (2, 9, 5)], ids=str)
def test_forward_is_the_step_repeated(kind, shape):
    params, x = at(Row(kind(4), normal(*shape)))
    state = (np.zeros((shape[0], 4)),) * kind.states
    loop = functools.partial(by_loop, kind(4), np.ones(shape[:2], bool))
    expected, _ = jax.jit(loop)(params, x, state)
    y, _ = jax.jit(kind(4).forward)(params, x)
    np.testing.assert_allclose(y, expected, rtol=1e-13, atol=1e-14)


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
    init = jax.jit(layer.init)
    params = init(jax.random.key(0), np.ones((1, 2, 3), jnp.bfloat16))
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(jnp.bfloat16)}
    params = init(jax.random.key(0), np.ones((1, 2, 3)))
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
    with pytest.raises(TypeError, match=f"{name}: reverse is True or False, not 1"):
        kind(2, 1)
    with pytest.raises(ValueError, match=f'{name}: output is "sequence", "last" or "both"'):
        kind(2, output="state")
    with pytest.raises(ValueError, match=r"takes x, or a pair \(x, .*\), not"):
        kind(2).init(key, (jnp.ones((1, 3, 4)),))
    state = public((jnp.ones((1, 2), jnp.int32),) * kind.states)
    with pytest.raises(TypeError, match=r"starts from a floating state, not .*int32"):
        kind(2).init(key, (jnp.ones((1, 3, 4)), state))
    state = public((jnp.ones((2, 2)),) * kind.states)
    with pytest.raises(ValueError, match=r"starts from \(+1, 2\).*, not .*\[2,2\]"):
        kind(2).init(key, (jnp.ones((1, 3, 4)), state))
    with pytest.raises(ValueError, match=rf"{name}\(2\) takes x of shape \(N, T, I\).*\(3, 4\)"):
        kind(2).init(key, jnp.ones((3, 4)))
    with pytest.raises(ValueError, match=r"at least one step and one feature, not \(3, 0, 4\)"):
        kind(2).init(key, jnp.ones((3, 0, 4)))
    with pytest.raises(TypeError, match=rf"{name}\(2\) takes floating x, not int32"):
        kind(2).init(key, jnp.ones((1, 3, 4), jnp.int32))
    params, x = at(Row(kind(2), normal(1, 3, 4)))
    _, residuals = jax.jit(kind(2).forward)(params, x)
    with pytest.raises(ValueError, match=r"ct has shape \(1, 3, 3\), but y has \(1, 3, 2\)"):
        kind(2).backward(params, residuals, np.ones((1, 3, 3)))


@pytest.mark.few(6)
@kinds
@pytest.mark.parametrize("how", ["auto", "explicit", "shard_map"])
@pytest.mark.parametrize("masked", [False, True])
def test_sharded_over_the_batch(kind, masked, how):
    net, loss, P = jp.chain(kind(3)), jp.HalfSquaredError(), PartitionSpec
    (params, x), target = at(Row(net, normal(8, 5, 2))), normal(8, 5, 3)
    mask = jax.device_put(normal(8, 5) < 0.5) if masked else None

    def f(params, x, target, mask):
        return jp.value_and_grad(net, loss)(params, x, target, mask=mask)

    expected = jax.jit(f)(params, x, target, mask)
    kinds = jax.sharding.AxisType
    mesh = jax.make_mesh((4,), ("d",), axis_types=(getattr(kinds, how.title(), kinds.Auto),))
    specs = P(), P("d"), P("d"), P("d")
    if how == "shard_map":

        def mean(*args):
            value, grads = f(*args)
            return jax.lax.pmean(value, "d"), jax.tree.map(lambda g: g / 4, grads)

        sharded = jax.shard_map(mean, mesh=mesh, in_specs=specs, out_specs=P())
        assert relative_error(jax.jit(sharded)(params, x, target, mask), expected) <= 1e-12
        return
    args = [
        jax.device_put(tree, NamedSharding(mesh, spec))
        for tree, spec in zip((params, x, target, mask), specs, strict=True)
    ]
    with jax.set_mesh(mesh):
        assert relative_error(jax.jit(f)(*args), expected) <= 1e-12


@kinds
def test_agrees_with_torch(kind):
    """Values and all gradients in float64, with copied params and the sum of torch's two biases."""
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
    y, _ = jax.jit(kind(4).forward)(params, x)
    assert relative_error(y, y_there.detach().numpy()) <= 1e-10
    assert relative_error(by_hand(kind(4), params, x, ct), expected) <= 1e-10
