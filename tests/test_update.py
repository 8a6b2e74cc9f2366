"""The update, plain and fused: its effect on params, and its memory."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from table import MLP, Row, at, relative_error

import jaxprop as jp

LOSS = jp.CrossEntropy()
TARGET = jax.device_put(np.array([0, 2, 1, 2]))


def problem(dtype=jnp.float64):
    params, x = at(Row(MLP, np.random.default_rng(0).normal(size=(4, 6))), dtype)
    return params, x, TARGET


OPTIMIZERS = {
    "sgd": optax.sgd(0.5),
    "momentum": optax.sgd(0.1, momentum=0.9, nesterov=True),
    "adam": optax.adam(1e-2),
    "adamw": optax.adamw(optax.cosine_decay_schedule(1e-2, 10)),
    "clipped": optax.chain(optax.clip_by_global_norm(0.1), optax.lion(1e-3)),
    "polyak": optax.polyak_sgd(),
    "lbfgs": optax.lbfgs(),
    "multi-steps": optax.MultiSteps(optax.adam(1e-2), every_k_schedule=2).gradient_transformation(),
    "multi-steps-polyak": optax.MultiSteps(optax.polyak_sgd(), every_k_schedule=2),
    "plateau": optax.chain(optax.adam(1e-2), optax.contrib.reduce_on_plateau()),
    "schedule-free": optax.contrib.schedule_free_sgd(0.1),
}


QUICK = ("adamw", "lbfgs", "multi-steps-polyak")


@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=() if n in QUICK else pytest.mark.full) for n in OPTIMIZERS],
)
def test_update_with_any_optimizer(name):
    """Five updates by hand and five by autodiff end at the same params, with a lower loss."""
    optimizer, value_of = OPTIMIZERS[name], jax.jit(jp.loss_fn(MLP, LOSS))
    ends = []
    for differentiate in (jp.value_and_grad, autodiff):
        update = jp.make_update(MLP, LOSS, optimizer, value_and_grad=differentiate)
        params, x, target = problem()
        state = jax.jit(optimizer.init)(params)
        first = value_of(params, x, target)
        for _ in range(5):
            params, state, value = update(params, state, x, target)
        assert value_of(params, x, target) < first
        ends.append((params, value))
    assert relative_error(*ends) <= 1e-8


def autodiff(net, loss):
    return jax.value_and_grad(jp.loss_fn(net, loss))


def stepped(params, grads):
    """The params after a step of SGD with a rate of 0.5, by NumPy."""
    return jax.tree.map(lambda p, g: np.asarray(p) - 0.5 * np.asarray(g), params, grads)


def test_update_is_sgd():
    params, x, target = problem()
    value, grads = jax.jit(jp.value_and_grad(MLP, LOSS))(params, x, target)
    expected = stepped(params, grads)
    update = jp.make_update(MLP, LOSS, optax.sgd(0.5))
    params, _, got = update(params, optax.sgd(0.5).init(params), x, target)
    assert relative_error((params, got), (expected, value)) <= 1e-14


@pytest.mark.usefixtures("standard_promotion")
def test_update_donates():
    params, x, target = problem()
    optimizer = optax.adam(1e-3)
    state = optimizer.init(params)
    update = jp.make_update(MLP, LOSS, optimizer)
    new, _, _ = update(params, state, x, target)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves((params, state)))
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(new))


def test_update_compiles_once_for_equal_nets():
    """Layers compare by their fields, so an equal net that is built again is not traced again."""
    traced = []

    @functools.partial(jax.jit, static_argnums=0)
    def value(net, params, x, target):
        traced.append(net)
        return jp.loss_fn(net, LOSS)(params, x, target)

    params, x, target = problem()
    for _ in range(2):
        value(jp.chain(*MLP.layers), params, x, target)
    assert len(traced) == 1


def test_update_inside_scan():
    params, x, target = problem()
    optimizer = optax.sgd(0.1, momentum=0.9)
    update = jp.make_update(MLP, LOSS, optimizer)

    def step(carry, _):
        params, state, value = update(*carry, x, target)
        return (params, state), value

    carry = params, optimizer.init(params)
    (scanned, _), values = jax.lax.scan(step, carry, length=7)
    state = optimizer.init(params)
    for value in values:
        params, state, alone = update(params, state, x, target)
        np.testing.assert_allclose(alone, value, rtol=1e-12)
    assert relative_error(scanned, params) <= 1e-12


D = 4
DENSE = jp.chain(jp.Dense(D), jp.Tanh())
NETS = {
    "unrolled": jp.chain(jp.Dense(D), jp.Tanh(), jp.skip(jp.Dense(D)), jp.Dense(3)),
    "repeat": jp.chain(jp.Dense(D), jp.repeat(DENSE, 3), jp.Dense(3)),
    "nested": jp.chain(
        jp.repeat(jp.chain(jp.skip(jp.repeat(DENSE, 2)), jp.LayerNorm()), 3), jp.Dense(3)
    ),
    "recompute": jp.chain(
        jp.repeat(jp.recompute(jp.branch(DENSE, jp.shared(DENSE, 2))), 3), jp.Dense(3)
    ),
    "one-layer": jp.chain(jp.repeat(jp.Dense(D, bias=False), 1), jp.Dense(3)),
}


def no_decay_of_biases(params):
    return jax.tree.map_with_path(lambda path, _: "b" not in jax.tree_util.keystr(path), params)


def by_rank(params):
    return jax.tree.map(lambda leaf: "wide" if leaf.ndim > 1 else "thin", params)


def in_float64(schedule):
    """A schedule in float64; in float32, as for an int32 count, two programs may round apart."""
    return lambda count: schedule(jnp.asarray(count, jnp.float64))


FUSED = {
    "sgd": optax.sgd(0.1),
    "momentum": optax.sgd(
        in_float64(optax.linear_schedule(0.1, 0.01, 40)), momentum=0.9, nesterov=True
    ),
    "adam": optax.adam(1e-2),
    "adamw": optax.adamw(
        in_float64(optax.warmup_cosine_decay_schedule(0, 1e-2, 5, 50)), mask=no_decay_of_biases
    ),
    "lion": optax.lion(1e-3),
    "rmsprop": optax.rmsprop(1e-3, centered=True, momentum=0.9),
    "partition": optax.partition({"wide": optax.adam(1e-2), "thin": optax.sgd(0.1)}, by_rank),
    "clip-by-value": optax.chain(optax.clip(0.01), optax.adabelief(1e-2)),
    "plateau": optax.chain(optax.adam(1e-2), optax.contrib.reduce_on_plateau(patience=3)),
}


@functools.partial(jax.jit, static_argnums=0)
def init(net, x):
    return net.init(jax.random.key(0), x)


def data(net):
    generator = np.random.default_rng(1)
    x = jax.device_put(generator.normal(size=(4, D)))
    return init(net, x), x, TARGET


def trained(update, params, x, target, steps=50, key=None):
    """((params, state), values) after some steps in one scan."""

    def step(carry, index):
        of_step = None if key is None else jax.random.fold_in(key, index)
        params, state, value = update(*carry, x, target, of_step)
        return (params, state), value

    start = params, update.init(params)
    return jax.jit(lambda start: jax.lax.scan(step, start, jnp.arange(steps)))(start)


@pytest.mark.few(2)
@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("optimizer", ["momentum", "adam"])
def test_fused_is_the_update_for_any_net(net, optimizer):
    net, optimizer = NETS[net], FUSED[optimizer]
    ends = [
        trained(jp.make_update(net, LOSS, optimizer, fused=fused), *data(net))
        for fused in (True, False)
    ]
    assert relative_error(*ends) <= 1e-10
    assert ends[0][1][-1] < ends[0][1][0]


@pytest.mark.few(2)
@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize("optimizer", FUSED)
def test_fused_is_the_update_for_any_optimizer(optimizer):
    net, optimizer = NETS["repeat"], FUSED[optimizer]
    ends = [
        trained(jp.make_update(net, LOSS, optimizer, fused=fused), *data(net))
        for fused in (True, False)
    ]
    assert relative_error(*ends) <= 1e-10
    assert jax.tree.structure(ends[0]) == jax.tree.structure(ends[1])
    for got, expected in zip(*map(jax.tree.leaves, ends), strict=True):
        assert got.dtype == expected.dtype


@pytest.mark.full
@pytest.mark.usefixtures("standard_promotion")
def test_fused_with_keys_ids_and_forms():
    """A tied table, positions, attention, dropout in a repeat; float64 and bfloat16."""
    block = jp.skip(
        jp.chain(jp.LayerNorm(), jp.Dense(3 * D), jp.Attention(2), jp.Dense(D), jp.Dropout(0.2))
    )
    net = jp.tied(jp.Embedding(5, D), jp.chain(jp.Positions(6), jp.repeat(block, 2)))
    ids = jnp.asarray(np.random.default_rng(2).integers(0, 5, (3, 7)))
    x, target, key = ids[:, :-1], ids[:, 1:], jax.random.key(3)
    params = net.init(jax.random.key(0), x)
    ends = [
        trained(
            jp.make_update(net, LOSS, optax.adam(1e-2), fused=fused), params, x, target, 20, key
        )
        for fused in (True, False)
    ]
    assert relative_error(*ends) <= 1e-10
    narrow = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    ends = [
        trained(jp.make_update(net, LOSS, optax.sgd(0.1), fused=fused), narrow, x, target, 3, key)
        for fused in (True, False)
    ]
    assert relative_error(*ends) <= 2**-6
    assert ends[0][0][0][0].dtype == jnp.bfloat16


@pytest.mark.full
@pytest.mark.usefixtures("standard_promotion")
def test_fused_in_float32_is_close_in_norm():
    net = NETS["repeat"]
    params, x, target = jax.tree.map(
        lambda leaf: leaf.astype(jnp.float32) if leaf.dtype == jnp.float64 else leaf, data(net)
    )
    ends = [
        trained(jp.make_update(net, LOSS, optax.adam(1e-2), fused=fused), params, x, target)[0][0]
        for fused in (True, False)
    ]
    apart = optax.tree.norm(jax.tree.map(jnp.subtract, *ends))
    assert apart <= 1e-4 * optax.tree.norm(ends[1])


def keeps_float32_only():
    def update(grads, state, params=None):
        return grads, jax.tree.map(lambda g, s: (g + s).astype(jnp.float32), grads, state)

    return optax.GradientTransformation(optax.tree.zeros_like, update)


def tells(tell, looks_at):
    """An optimizer that reports what it sees."""

    def update(grads, state, params=None):
        for seen in looks_at(grads):
            jax.debug.callback(tell, seen)
        return jax.tree.map(lambda g: -g, grads), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize(
    ("optimizer", "says"),
    [
        (optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.1)), r"others too.*max_norm"),
        (optax.polyak_sgd(), r"params\[0\].w looks at others too \(add\)"),
        (optax.apply_if_finite(optax.sgd(0.1), 3), "looks at others too"),
        (optax.lbfgs(), "loss as a function"),
        (optax.lamb(1e-3), r"params\[1\]\[0\].\w, which repeat stacks, .* more than one entry"),
        (optax.adafactor(1e-3), "more than one entry"),
        (optax.sm3(1e-3), r"one state \(4,\) for the whole stack params\[1\]\[0\]\.w, not"),
        (optax.chain(optax.add_noise(0.1, 0.5, 0), optax.sgd(0.1)), "more than one entry"),
        (keeps_float32_only(), r"params\[1\]\[0\].\w, which repeat .* makes float32.* of float64"),
        (tells(print, jax.tree.leaves), r"\(debug_callback\)"),
        (tells(print, lambda grads: [optax.tree.sum(grads)]), "debug_callback .* looks at several"),
    ],
)
def test_fused_refuses_what_looks_further(optimizer, says):
    net = NETS["repeat"]
    params, x, target = data(net)
    update = jp.make_update(net, LOSS, optimizer, fused=True)
    with pytest.raises(ValueError, match=says):
        update.lower(params, jax.eval_shape(update.init, params), x, target)


@pytest.mark.parametrize("fused", [True, False])
def test_what_an_optimizer_tells_is_told(fused):
    told = []
    optimizer = tells(lambda seen: told.append(seen.shape), jax.tree.leaves)
    net = NETS["unrolled"]
    params, x, target = data(net)
    expected = sorted(leaf.shape for leaf in jax.tree.leaves(params))
    update = jp.make_update(net, LOSS, optimizer, fused=fused)
    jax.block_until_ready(update(params, update.init(params), x, target))
    jax.effects_barrier()
    assert sorted(told) == expected


@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize("fused", [True, False])
def test_a_rate_of_the_caller_s_stays_the_caller_s(fused):
    rate = jnp.full((), 0.1, jnp.float32)
    optimizer = optax.inject_hyperparams(optax.sgd)(learning_rate=rate)
    update = jp.make_update(MLP, LOSS, optimizer, fused=fused)
    params, x, target = problem()
    assert optimizer.init(params).hyperparams["learning_rate"] is rate
    update(params, update.init(params), x, target)
    assert not rate.is_deleted()


@pytest.mark.few(1)
@pytest.mark.parametrize("fused", [True, False])
def test_a_mask_goes_into_the_seats(fused):
    net = jp.chain(jp.repeat(jp.skip(jp.chain(jp.Dense(3 * D), jp.Attention(2))), 2), jp.Dense(3))
    x = jax.device_put(np.random.default_rng(0).normal(size=(4, 5, D)))
    params = init(net, x)
    mask = jax.device_put(np.arange(5) < np.array([5, 2, 3, 1])[:, None])
    target = np.where(mask, 1, -1)
    _, grads = jax.jit(jp.value_and_grad(net, LOSS))(net.bind(params, mask=mask), x, target)
    expected = stepped(params, grads)
    update = jp.make_update(net, LOSS, optax.sgd(0.5), fused=fused)
    got, _, _ = update(params, update.init(params), x, target, mask=mask)
    assert relative_error(got, expected) <= 1e-12


@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize("optimizer", [optax.lamb(1e-2), optax.adafactor(1e-2)])
def test_fused_outside_repeat_only_needs_a_param_of_its_own(optimizer):
    net = NETS["unrolled"]
    ends = [
        trained(jp.make_update(net, LOSS, optimizer, fused=fused), *data(net), steps=5)
        for fused in (True, False)
    ]
    assert relative_error(*ends) <= 1e-10


@pytest.mark.few(1)
@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize(
    "net", [pytest.param("unrolled", marks=pytest.mark.full), "nested", "recompute"]
)
def test_max_norm_is_clip_by_global_norm(net, fused):
    net, adam = NETS[net], optax.adam(1e-2)
    clip = optax.chain(optax.clip_by_global_norm(0.05), adam)
    got = trained(jp.make_update(net, LOSS, adam, fused=fused, max_norm=0.05), *data(net))
    expected = trained(jp.make_update(net, LOSS, clip), *data(net))
    assert relative_error((got[0][0], got[1]), (expected[0][0], expected[1])) <= 1e-10


def test_the_norm_of_a_gradient_that_nearly_cancels():
    """Two rows whose products nearly cancel, up to the last digits of float32."""
    generator = np.random.default_rng(0)
    x, ct, rest = (generator.normal(size=(1, 64)).astype(np.float32) for _ in range(3))
    form = jp.Outer(np.concatenate((x, x)), np.concatenate((ct, -ct + np.float32(1e-4) * rest)))
    exact = jp.Outer(form.x.astype(np.float64), form.ct.astype(np.float64))
    expected = np.linalg.norm(jax.jit(jp.Outer.sum)(exact))
    norm_of_sum = jax.jit(jp.Outer.norm_of_sum)
    np.testing.assert_allclose(norm_of_sum(form), expected, rtol=1e-2)
    np.testing.assert_allclose(norm_of_sum(exact), expected, rtol=1e-9)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize(("size", "skipped"), [(500.0, 0), (1e5, 1)])
def test_the_norm_of_float16_gradients(fused, size, skipped):
    """Squares may sum to more than 65504; only a gradient above that is infinite."""
    net, loss = jp.chain(jp.Dense(2, bias=False)), jp.HalfSquaredError()
    x, target = np.full((1, 2), 10, np.float16), np.full((1, 2), -size / 10, np.float16)
    params = (jp.AffineParams(jax.device_put(np.zeros((2, 2), np.float16)), None),)
    update = jp.make_update(
        net, loss, optax.sgd(1.0), fused=fused, max_norm=1.0, skip_nonfinite=True
    )
    params, state, _ = update(params, update.init(params), x, target)
    assert int(state.skipped) == skipped
    expected = -0.5 * (1 - skipped)
    np.testing.assert_allclose(params[0].w, np.full((2, 2), expected), rtol=1e-3)


@pytest.mark.few(1)
@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize("net", ["unrolled", "nested"])
@pytest.mark.parametrize("bad", [0.0, jnp.inf])
def test_under_shard_map(net, bad):
    """The norm is that of the sum over devices; a batch that is bad on one is skipped on all."""
    net = NETS[net]
    mesh = jax.make_mesh((2,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    everywhere, split = PartitionSpec(), PartitionSpec("d")
    ends = []
    for fused in (True, False):
        update = jp.make_update(
            net, LOSS, optax.adam(1e-2), fused=fused, max_norm=0.05, skip_nonfinite=True
        )
        params, x, target = data(net)

        def step(*args, update=update):
            params, state, value = update(*args)
            return params, state, jax.lax.pmean(value, "d")

        sharded = jax.shard_map(
            step,
            mesh=mesh,
            in_specs=(everywhere, everywhere, split, split),
            out_specs=everywhere,
        )
        x = np.array(x)
        x[0] += bad
        params, state, _ = jax.jit(sharded)(params, update.init(params), x, target)
        assert int(state.skipped) == (bad > 0)
        ends.append((params, state))
    assert relative_error(*ends) <= 1e-10


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize(("of_x", "of_ct"), [(1e18, 1e-20), (3e19, 1e-22)])
def test_the_norm_of_factors_far_apart_in_size(fused, of_x, of_ct):
    """Squared, one would overflow in float32 and the other vanish; their product is ordinary."""
    net, loss = jp.chain(jp.Dense(8, bias=False)), jp.HalfSquaredError()
    x, target = np.full((2, 8), of_x, np.float32), np.full((2, 8), of_ct, np.float32)
    params = (jp.AffineParams(jax.device_put(np.zeros((8, 8), np.float32)), None),)
    update = jp.make_update(net, loss, optax.sgd(1.0), fused=fused, max_norm=1e-3)
    got, _, _ = update(params, update.init(params), x, target)
    np.testing.assert_allclose(np.linalg.norm(got[0].w), 1e-3, rtol=1e-5)


def test_what_is_lowered_is_called_as_it_was_lowered():
    params, x, target = problem()
    update = jp.make_update(MLP, LOSS, optax.sgd(0.1))
    state = update.init(params)
    compiled = update.lower(params, state, x, target).compile()
    expected = update(jax.tree.map(jnp.copy, params), state, x, target)
    assert relative_error(compiled(params, state, x, target), expected) <= 1e-14
    params = problem()[0]
    keyed = update.lower(params, state, x, target, key=jax.random.key(0)).compile()
    got = keyed(params, state, x, target, key=jax.random.key(1))
    assert relative_error(got, expected) <= 1e-14


@pytest.mark.parametrize("rows", [2, 40])
def test_the_norm_of_the_gradient_comes_from_its_factors(rows):
    """With few rows by Gram matrices, with many by the product itself."""
    generator = np.random.default_rng(0)
    form = jp.Outer(*(generator.normal(size=(rows, 3, d)) for d in (8, 9)))
    norm, total = jax.jit(lambda form: (form.norm_of_sum(), form.sum()))(form)
    np.testing.assert_allclose(norm, np.linalg.norm(total), rtol=1e-12)


@pytest.mark.few(2)
@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
def test_skip_nonfinite_leaves_everything_as_it_was(fused, bad):
    net, optimizer = NETS["repeat"], optax.adam(1e-2)
    update = jp.make_update(net, LOSS, optimizer, fused=fused, skip_nonfinite=True)
    params, x, target = data(net)
    plain = jp.make_update(net, LOSS, optimizer)
    expected, state, _ = plain(jax.tree.map(jnp.copy, params), optimizer.init(params), x, target)
    params, skipping, _ = update(params, update.init(params), x, target)
    assert relative_error((params, skipping.state), (expected, state)) <= 1e-12
    before = jax.tree.map(np.asarray, (params, skipping.state))
    params, skipping, value = update(params, skipping, x.at[1, 2].set(bad), target)
    assert not np.isfinite(value)
    jax.tree.map(np.testing.assert_array_equal, (params, skipping.state), before)
    assert int(skipping.skipped) == 1
    params, skipping, value = update(params, skipping, x, target)
    assert int(skipping.skipped) == 1
    assert np.isfinite(value)
    with pytest.raises(TypeError, match=r"update\.init"):
        update(params, optimizer.init(params), x, target)


@pytest.mark.parametrize("fused", [True, False])
def test_a_finite_loss_with_a_gradient_that_is_not_is_skipped(fused):
    """sqrt at 0 has a value, but no finite slope."""

    class Root(jp.Layer):
        def forward(self, params, x):
            return jnp.sqrt(x), x

        def backward(self, params, x, ct):
            return (), ct / (2 * jnp.sqrt(x))

    net, loss = jp.chain(jp.Dense(2, bias=False), Root()), jp.HalfSquaredError()
    x, target = jnp.ones((1, 2)), jnp.ones((1, 2))
    params = (jp.AffineParams(jnp.array([[1.0, 0.0], [1.0, 0.0]])), ())
    update = jp.make_update(net, loss, optax.sgd(0.1), fused=fused, skip_nonfinite=True)
    before = jax.tree.map(np.asarray, params)
    params, state, value = update(params, update.init(params), x, target)
    assert np.isfinite(value)
    assert int(state.skipped) == 1
    jax.tree.map(np.testing.assert_array_equal, params, before)


@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_fused_keeps_no_gradients_and_copies_no_stack(optimizer):
    """In a repeat, temporary memory is that of one layer, whatever the number of params."""
    net, optimizer = jp.repeat(jp.chain(jp.Dense(64), jp.Tanh()), 32), FUSED[optimizer]
    x = np.ones((2, 64))
    params = init(net, x)

    def temporary(fused):
        update = jp.make_update(net, jp.HalfSquaredError(), optimizer, fused=fused)
        state = jax.eval_shape(update.init, params)
        compiled = update.lower(params, state, x, x).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    stack = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    assert temporary(False) > stack
    assert temporary(True) < stack / 4


@pytest.mark.few(1)
@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize("axes", ["Auto", "Explicit"])
def test_fused_on_many_devices(axes):
    """The batch is split over four devices, and so are params and state on an Auto mesh."""
    net, optimizer = NETS["repeat"], optax.adam(1e-2)
    update = jp.make_update(net, LOSS, optimizer, fused=True)
    params, x, target = data(net)
    expected = trained(update, params, x, target, 3)
    kind = getattr(jax.sharding.AxisType, axes)
    mesh = jax.make_mesh((4,), ("d",), axis_types=(kind,))

    def place(tree, *spec):
        return jax.device_put(tree, NamedSharding(mesh, PartitionSpec(*spec)))

    params = jax.tree.map(
        lambda leaf: place(
            leaf, *[None] * (leaf.ndim - 1), "d" if axes == "Auto" and leaf.shape[-1] == D else None
        ),
        params,
    )
    with jax.set_mesh(mesh):
        got = trained(update, params, place(x, "d"), place(target, "d"), 3)
    assert relative_error(got, expected) <= 1e-12


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"fused": True, "value_and_grad": jp.value_and_grad}, ValueError, "not both"),
        ({"max_norm": 0.0}, ValueError, "positive"),
        ({"loss": jp.CrossEntropy, "fused": True}, TypeError, r"write CrossEntropy\(...\)"),
        ({"net": jp.Dense}, TypeError, r"write Dense\(...\)"),
        ({"optimizer": optax.sgd}, TypeError, "not an optax transformation"),
        ({"loss_scale": jp.DynamicLossScale}, TypeError, r"write DynamicLossScale\(\)"),
        (
            {"loss_scale": 8.0, "value_and_grad": jp.autodiff},
            TypeError,
            "as jp.value_and_grad does",
        ),
    ],
)
def test_options_that_do_not_fit(options, error, says):
    with pytest.raises(error, match=says):
        jp.make_update(**{"net": MLP, "loss": LOSS, "optimizer": optax.sgd(0.1)} | options)


def test_an_update_that_does_not_donate_leaves_what_it_was_given():
    params, x, target = problem()
    update = jp.make_update(MLP, LOSS, optax.sgd(0.1), donate=False)
    state = update.init(params)
    first = update(params, state, x, target)
    again = update(params, state, x, target)
    assert relative_error(first, again) == 0
    donated = jp.make_update(MLP, LOSS, optax.sgd(0.1))(params, state, x, target)
    assert relative_error(first, donated) == 0
    assert jax.tree.leaves(params)[0].is_deleted()


@pytest.mark.full
@pytest.mark.usefixtures("standard_promotion")
def test_an_optimizer_with_arguments_of_its_own():
    """``optax.contrib.sam`` takes arguments, but none that an update could pass."""
    params, x, target = problem()
    optimizer = optax.contrib.sam(optax.sgd(0.1), optax.sgd(0.05), sync_period=2)
    update = jp.make_update(MLP, LOSS, optimizer)
    expected, state = params, optimizer.init(params)
    for _ in range(2):
        grads = jax.grad(jp.loss_fn(MLP, LOSS))(expected, x, target)
        updates, state = optimizer.update(grads, state, expected)
        expected = optax.apply_updates(expected, updates)
    got, state = jax.tree.map(jnp.copy, params), update.init(params)
    for _ in range(2):
        got, state, _ = update(got, state, x, target)
    assert relative_error(got, expected) <= 1e-12


def test_memory_that_two_arrays_share_is_donated_once():
    """``jax.device_put`` of one array twice gives two, over the same memory on one device."""
    params, x, target = problem()
    mesh = jax.make_mesh((2,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    everywhere = NamedSharding(mesh, PartitionSpec())
    update = jp.make_update(MLP, LOSS, optax.sgd(0.5), loss_scale=jp.DynamicLossScale())
    state = update.init(params)
    state = state._replace(steps=state.skipped)
    expected = update(*jax.tree.map(jnp.copy, (params, state)), x, target)
    got = update(*jax.device_put((params, state), everywhere), x, target)
    assert relative_error(got, expected) <= 1e-12


@pytest.mark.parametrize("make", [jp.value_and_grad(MLP, LOSS), jp.loss_fn(MLP, LOSS)])
def test_a_function_in_the_place_of_its_maker_is_refused(make):
    with pytest.raises(TypeError, match=r"is a maker, such as jp\.value_and_grad itself"):
        jp.make_update(MLP, LOSS, optax.sgd(0.1), value_and_grad=make)


def test_a_maker_of_something_else_is_refused():
    params, x, target = problem()
    update = jp.make_update(MLP, LOSS, optax.sgd(0.1), value_and_grad=jp.per_example_grads)
    with pytest.raises(TypeError, match=r"value_and_grad= returns \(value, grads\), not"):
        update(params, update.init(params), x, target)
    with pytest.raises(TypeError, match=r"state is None: start from state = update\.init"):
        update(params, None, x, target)


@pytest.mark.parametrize("fused", [False, True])
def test_the_state_of_another_net_or_optimizer_is_named(fused):
    net, x, target = jp.chain(jp.Dense(3), jp.Dense(2)), np.ones((4, 5)), np.ones((4, 2))
    loss, adam = jp.HalfSquaredError(), optax.adam(1e-2)
    params = init(net, x)
    update = jp.make_update(net, loss, adam, fused=fused, donate=False)
    wider = init(jp.chain(jp.Dense(7), jp.Dense(2)), x)
    momentum = optax.sgd(1, 0.9)
    of_wider = r"state\[0\]\.mu\[0\]\.w is of shape \(5, 7\), but for this .* of shape \(5, 3\)"
    wrong = {
        of_wider: adam.init(wider),
        r"state\[0\]\.count is missing, but .*; start from state": momentum.init(params),
        r"state\[0\]\.mu\[1\]\.w is missing": adam.init(params[:1]),
        r"state\[0\]\.count is missing, .* it is of shape \(\)": (),
        "state has the structure of another optimizer's": (*adam.init(params), optax.EmptyState()),
    }
    for match, state in wrong.items():
        with pytest.raises(TypeError, match=match):
            update(params, state, x, target)
    with pytest.raises(ValueError, match=r"Dense\(3\): params\.w has shape"):
        update(wider, update.init(wider), x, target)
