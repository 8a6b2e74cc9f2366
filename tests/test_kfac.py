"""K-FAC as an optimizer."""

import re
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from table import Row, at, normal, relative_error

import jaxprop as jp

LOSS = jp.CrossEntropy()
NET = jp.chain(jp.Dense(8), jp.Tanh(), jp.Dense(3))
CONVOLUTIONS = jp.chain(jp.Conv(4), jp.Relu(), jp.Conv(4, groups=2), jp.Flatten(), jp.Dense(3))
BLOCK = jp.skip(jp.chain(jp.LayerNorm(), jp.Dense(4), jp.Tanh()))
NETS = {
    "dense": (NET, normal(8, 4)),
    "frozen": (jp.chain(jp.frozen(jp.Dense(5)), jp.Tanh(), jp.Dense(3)), normal(8, 4)),
    "dropout": (jp.chain(jp.Dense(8), jp.Dropout(0.2), jp.Dense(3)), normal(8, 4)),
    "convolution": (CONVOLUTIONS, normal(8, 4, 4, 2)),
    "tokens": (
        jp.chain(jp.Embedding(7, 4), jp.Positions(3), jp.repeat(BLOCK, 2), jp.Dense(3)),
        np.arange(24).reshape(8, 3) % 7,
    ),
    "function": (
        jp.function(lambda w, x: jnp.tanh(jnp.einsum("nd,dhk->nhk", x, w["a"])).sum(1) @ w["b"].T),
        normal(8, 4),
    ),
}


def problem(name="dense"):
    net, x = NETS[name]
    x = jax.device_put(x)
    if name == "function":
        params = {"a": jnp.asarray(normal(4, 2, 5)), "b": jnp.asarray(normal(3, 5))}
    else:
        params = net.init(jax.random.key(0), x)
        of_floats = jp.core.tree.is_not_learned
        params = jax.tree.map(
            lambda p: p if of_floats(p) else p.astype(float), params, is_leaf=of_floats
        )
    y = jax.eval_shape(net, net.bind(params, key=jax.random.key(0)), x)
    target = np.random.default_rng(1).integers(0, 3, y.shape[:-1])
    return net, params, x, jax.device_put(target)


def trained(name, steps=12, **options):
    net, params, x, target = problem(name)
    optimizer = jp.kfac(net, LOSS, (params, x, target), **options)
    update = jp.make_update(net, LOSS, optimizer, donate=False)
    state, values = update.init(params), []
    for step in range(steps):
        params, state, value = update(params, state, x, target, key=jax.random.key(step))
        values.append(float(value))
    return params, state, values


@pytest.mark.few(1)
@pytest.mark.parametrize("name", NETS)
def test_the_loss_falls_fast(name):
    given = {"learning_rate": 0.1, "norm_constraint": 1e-2} if name == "dropout" else {}
    _, _, values = trained(name, steps=30, **given)
    assert np.mean(values[-5:]) <= (0.2 if name != "dropout" else 0.7) * values[0]


def test_one_step_finds_the_minimum_of_a_linear_problem():
    """For one matrix and the squared error, the factors are exact, and so is the model."""
    net, loss = jp.chain(jp.Dense(3, bias=False)), jp.HalfSquaredError()
    params, x = at(Row(net, normal(9, 4)))
    target = jax.device_put(normal(9, 3) + 1)
    optimizer = jp.kfac(net, loss, (params, x, target), damping=1e-12, samples=None)
    update = jp.make_update(net, loss, optimizer, donate=False)
    params, state, _ = update(params, update.init(params), x, target)
    best, *_ = np.linalg.lstsq(x, target)
    assert relative_error(params[0].w, best) <= 1e-8
    again, _, value = update(params, state, x, target)
    assert relative_error(again[0].w, best) <= 1e-8
    of_best = jax.jit(jp.loss_fn(net, loss))((params[0]._replace(w=best),), x, target)
    assert value <= 1.0001 * of_best


def test_the_step_is_that_of_the_formulas():
    net, params, x, target = problem()
    options = {"samples": None, "damping": 0.3, "adapt_damping": False, "decay": 0.9}
    rate, momentum, bound = 0.2, 0.5, 0.01
    optimizer = jp.kfac(
        net,
        LOSS,
        (params, x, target),
        learning_rate=rate,
        momentum=momentum,
        norm_constraint=bound,
        inverse_every=1,
        **options,
    )
    update = jp.make_update(net, LOSS, optimizer, donate=False)
    f = jax.jit(jp.kronecker_factors(net, LOSS, joint_bias=True))
    grad, solve = jax.jit(jax.grad(jp.loss_fn(net, LOSS))), jax.jit(jp.curvature.solve)
    got, state = params, update.init(params)
    mean, before = None, jax.tree.map(np.zeros_like, params)
    at = params
    for n in range(3):
        got, state, _ = update(got, state, x, target)
        new = jax.device_get(f(at, x, target))
        weight = [1, 0.9, 0.81][: n + 1][::-1]
        mean = [new] if n == 0 else [*mean, new]
        total = sum(weight)
        average = jax.tree.map(
            lambda *f: sum(w * f for w, f in zip(weight, f, strict=True)) / total,  # noqa: B023
            *mean,
        )
        grads = jax.device_get(grad(at, x, target))
        d = jax.device_get(solve(average, grads, 0.3))
        length = sum(np.vdot(a, b) for a, b in zip(*map(jax.tree.leaves, (d, grads)), strict=True))
        alpha = rate * np.sqrt(np.minimum(1, bound / (rate**2 * length)))
        before = jax.tree.map(lambda d, s: -alpha * d + momentum * s, d, before)  # noqa: B023
        at = jax.tree.map(np.add, at, before)
        assert relative_error(got, at) <= 1e-10
    assert relative_error(state.step, before) <= 1e-10


@pytest.mark.full
def test_the_model_is_minimised_and_the_damping_follows():
    net, params, x, target = problem()
    optimizer = jp.kfac(net, LOSS, (params, x, target), damping=0.3, samples=None, damping_every=1)
    state = optimizer.init(params)
    value, grad = jp.value_and_grad(net, LOSS)(params, x, target)
    step, after = optimizer.update(grad, state, params, batch=(x, target))
    product = jp.ggn_vp(net, LOSS)(params, x, target)

    def model(s, damping):
        terms = zip(*map(jax.tree.leaves, (grad, s, product(s))), strict=True)
        return sum(
            jnp.vdot(g, s) + (jnp.vdot(s, f) + damping * jnp.vdot(s, s)) / 2 for g, s, f in terms
        )

    sizes = [model(jax.tree.map(lambda s: scale * s, step), 0.3) for scale in (0.99, 1, 1.01)]  # noqa: B023
    assert sizes[1] == min(sizes)
    now = jp.loss_fn(net, LOSS)(optax.apply_updates(params, step), x, target)
    ratio = (now - value) / model(step, 0.0)
    factor = 0.95 if ratio > 0.75 else 1 / 0.95 if ratio < 0.25 else 1
    assert relative_error(after.damping, jnp.asarray(0.3 * factor)) <= 1e-12


@pytest.mark.full
@pytest.mark.parametrize("name", ["dense", "tokens"])
def test_each_device_decomposes_its_share(name):
    mesh = jax.make_mesh((4, 2), ("d", "m"))
    alone = trained(name, steps=3, samples=None)
    shared = trained(name, steps=3, samples=None, mesh=mesh)
    assert relative_error(shared[0], alone[0]) <= 1e-8
    net, params, x, target = problem(name)
    update = jp.make_update(net, LOSS, jp.kfac(net, LOSS, (params, x, target), mesh=mesh))
    text = update.lower(params, update.init(params), x, target).compile().as_text()
    choices = [names.count("%") for names in re.findall(r"branch_computations={([^}]*)}", text)]
    assert choices.count(mesh.size) == 1  # each device has its own branch


def test_shares_are_even():
    from jaxprop.training.shares import _owners

    costs = [8, 1, 1, 1, 5, 4, 4]
    assert np.bincount(_owners(costs, 3), costs).tolist() == [8, 8, 8]


@pytest.mark.full
def test_in_a_scan_with_data_on_a_mesh():
    net, params, x, target = problem()
    optimizer = jp.kfac(net, LOSS, (params, x, target))
    update = jp.make_update(net, LOSS, optimizer, donate=False)

    def run(x, target):
        def step(carry, _):
            params, state = carry
            params, state, value = update(params, state, x, target)
            return (params, state), value

        return jax.lax.scan(step, (params, update.init(params)), length=4)

    mesh = jax.make_mesh((8,), ("d",))
    spread = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("d"))
    there = jax.jit(run)(*(jax.device_put(a, spread) for a in (x, target)))
    assert relative_error(there[1], jax.jit(run)(x, target)[1]) <= 1e-8


@pytest.mark.few(1)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_small_dtypes(dtype):
    net, params, x, target = problem()
    params, x = jax.tree.map(lambda a: jax.device_put(np.asarray(a, dtype)), (params, x))
    update = jp.make_update(net, LOSS, jp.kfac(net, LOSS, (params, x, target)), donate=False)
    state, first = update.init(params), None
    for _ in range(20):
        params, state, value = update(params, state, x, target)
        first = value if first is None else first
    assert params[0].w.dtype == dtype
    assert value <= 0.3 * first


def test_mistakes():
    net, params, x, target = problem()
    like = params, x, target
    with pytest.raises(ValueError, match="kfac: damping must be positive"):
        jp.kfac(net, LOSS, like, damping=0)
    with pytest.raises(ValueError, match="kfac: decay is below 1"):
        jp.kfac(net, LOSS, like, decay=1.0)
    with pytest.raises(TypeError, match="kfac: mesh is not a Mesh"):
        jp.kfac(net, LOSS, like, mesh="d")
    with pytest.raises(ValueError, match="kfac: every is at least 1"):
        jp.kfac(net, LOSS, like, every=0)
    with pytest.raises(TypeError, match="kfac: like is"):
        jp.kfac(net, LOSS, [params, x, target])
    optimizer = jp.kfac(net, LOSS, like)
    with pytest.raises(ValueError, match=r"kfac: update takes params and batch=\(x, target\)"):
        optimizer.update(params, optimizer.init(params), params)
    update = jp.make_update(net, LOSS, optimizer, fused=True)
    with pytest.raises(ValueError, match="fused=False"):
        update(params, update.init(params), x, target)
    update, spec = jp.make_update(net, LOSS, optimizer), jax.sharding.PartitionSpec
    mesh = jax.make_mesh((2,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    on_each = jax.shard_map(
        lambda *args: update(*args)[0],
        mesh=mesh,
        in_specs=(spec(), spec(), spec("d"), spec("d")),
        out_specs=spec(),
    )
    with pytest.raises(ValueError, match=r"kfac: inside jax\.shard_map its factors would be"):
        jax.jit(on_each)(params, update.init(params), x, target)


def test_whole_params_are_asked_for():
    net, _, x, target = problem()
    net = jp.chain(jp.frozen(net), jp.Dense(3))
    params = net.init(jax.random.key(0), x)
    optimizer = jp.learned_only(jp.kfac(net, LOSS, (params, x, target)))
    with pytest.raises(ValueError, match=r"it takes whole params, without jp\.learned_only"):
        optimizer.update(params, optimizer.init(params), params, batch=(x, target))


def test_only_the_shapes_of_the_arguments_are_kept():
    net, params, x, target = problem()
    x = jnp.array(x)
    kept = weakref.ref(x)
    optimizer = jp.kfac(net, LOSS, (params, x, target))
    del x
    assert kept() is None
    assert optimizer.init(params)


@pytest.mark.full
@pytest.mark.parametrize("momentum", [0.0, 0.7])
def test_a_momentum_that_is_given_is_kept_without_a_learning_rate(momentum):
    net, params, x, target = problem()
    options = {"samples": None, "damping": 0.3, "adapt_damping": False}
    optimizer = jp.kfac(net, LOSS, (params, x, target), momentum=momentum, **options)
    state, before = optimizer.init(params), jax.tree.map(jnp.zeros_like, params)
    for _ in range(2):
        grads = jax.grad(jp.loss_fn(net, LOSS))(params, x, target)
        _, new = optimizer.update(grads, state, params, batch=(x, target))
        direction = jp.curvature.solve(new.basis, grads, 0.3)
        times = jp.ggn_vp(net, LOSS)(params, x, target)

        def dot(a, b):
            return sum(jnp.vdot(*pair) for pair in zip(*map(jax.tree.leaves, (a, b)), strict=True))

        def slope(alpha):
            step = jax.tree.map(lambda d, s: -alpha * d + momentum * s, direction, before)  # noqa: B023
            along = jax.tree.map(lambda f, s: f + 0.3 * s, times(step), step)  # noqa: B023
            return dot(grads, direction) + dot(along, direction), step  # noqa: B023

        (at_0, _), (at_1, _) = slope(0.0), slope(1.0)
        _, before = slope(at_0 / (at_0 - at_1))
        assert relative_error(new.step, before) <= 1e-10
        params, state = jax.tree.map(jnp.add, params, new.step), new


def test_a_norm_constraint_takes_a_learning_rate():
    net, params, x, target = problem()
    with pytest.raises(ValueError, match="norm_constraint bounds a learning_rate"):
        jp.kfac(net, LOSS, (params, x, target), norm_constraint=1e-3)


def test_mistakes_in_arguments_are_named():
    net, params, x, target = problem()
    like = params, x, target
    optimizer = jp.kfac(net, LOSS, like)
    with pytest.raises(TypeError, match=r"kfac: batch is \(x, target\)"):
        optimizer.update(params, optimizer.init(params), params, batch=x)
    with pytest.raises(TypeError, match="kfac: seed is a whole number"):
        jp.kfac(net, LOSS, like, seed=jax.random.key(0))
    with pytest.raises(TypeError, match="kfac: mesh is not a Mesh"):
        jp.kfac(net, LOSS, like, mesh=8)
    frozen = jp.freeze(params)
    with pytest.raises(ValueError, match="kfac: the net has no params that are learned"):
        jp.kfac(net, LOSS, (frozen, x, target)).init(frozen)
