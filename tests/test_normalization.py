"""The definition of normalization, its numerically delicate cases, and running statistics."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracles
import pytest
from table import Around, Doubled, Row, at, relative_error
from test_layers import by_hand, ct_for

import jaxprop as jp
from jaxprop.core.tree import learned
from jaxprop.layers.normalization import rstd_of

LAYERS = [jp.LayerNorm(), jp.RMSNorm(), jp.GroupNorm(2), jp.BatchNorm()]
layers = pytest.mark.parametrize("layer", LAYERS, ids=repr)
AXES = {"LayerNorm": -1, "RMSNorm": -1, "GroupNorm": (1, 3), "BatchNorm": (0, 1)}


def normal(*shape, seed=1):
    return np.random.default_rng(seed).normal(size=shape)


def in_groups(layer, y):
    return y.reshape(*y.shape[:-1], layer.groups, -1) if isinstance(layer, jp.GroupNorm) else y


@functools.partial(jax.jit, static_argnums=0)
def forward(layer, params, x):
    return layer.forward(params, x)[0]


def y_of(layer, x):
    return np.asarray(forward(layer, layer.init(jax.random.key(0), x), x))


move = jax.jit(jp.update_batch_stats, static_argnums=0)


@layers
@pytest.mark.parametrize("eps", [1e-9, 0.5])
def test_y_is_standard_up_to_eps(layer, eps):
    layer = type(layer)(*([2] if isinstance(layer, jp.GroupNorm) else []), eps=eps)
    x = 3 + 2 * normal(3, 4, 6)
    axes = AXES[type(layer).__name__]
    x_groups, y = in_groups(layer, x), in_groups(layer, y_of(layer, x))
    if isinstance(layer, jp.RMSNorm):
        before, after = (x_groups**2).mean(axes), (y**2).mean(axes)
    else:
        np.testing.assert_allclose(y.mean(axes), 0, atol=1e-14)
        before, after = x_groups.var(axes), y.var(axes)
    np.testing.assert_allclose(after, before / (before + eps), rtol=1e-12)


@layers
def test_constant_rows(layer):
    """Without variance, y is the bias, and the slope is at most 1 / sqrt(eps)."""
    row = np.full((2, 3, 4), 0.0 if isinstance(layer, jp.RMSNorm) else 7.0)
    params, x = at(Row(layer, row))
    y = forward(layer, params, x)
    bias = np.zeros(4) if params.bias is None else params.bias
    np.testing.assert_allclose(y, np.broadcast_to(bias, y.shape))
    ct = np.asarray(ct_for(layer, params, x))
    d_params, d_x = jax.device_get(by_hand(layer, params, x, ct))
    assert not d_params.scale.any()
    assert np.isfinite(d_x).all()
    bound = np.abs(ct * np.asarray(params.scale)).max()
    assert np.abs(d_x).max() <= bound * 2 / np.sqrt(layer.eps)


@layers
def test_one_row_of_one_example(layer):
    params, x = at(Row(layer, np.array([[1.0, -2.0, 4.0, 8.0]])))
    y = np.asarray(forward(layer, params, x))
    _, d_x = by_hand(layer, params, x, np.ones(x.shape))
    assert np.isfinite(d_x).all()
    if isinstance(layer, jp.BatchNorm):
        np.testing.assert_array_equal(y[0], params.bias)
        np.testing.assert_array_equal(d_x, 0)


@pytest.mark.parametrize("layer", LAYERS[:1] + LAYERS[2:], ids=repr)
def test_large_offsets_in_float32(layer):
    """At 1e4, float32 has a step of 1e-3, and E x^2 - mean^2 an error of 10 in a variance of 1.

    A mean of 32 numbers or more may be off by a few such steps, depending on the order of the sum.
    """
    x = np.asarray(1e4 + normal(8, 16, 32), np.float32)
    params = jax.jit(layer.init)(jax.random.key(1), x)
    ct = ct_for(layer, params, x)
    wide = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), (params, x, ct))
    y, exact = forward(layer, params, x), forward(layer, *wide[:2])
    np.testing.assert_allclose(y, exact, atol=4e-3)
    assert relative_error(by_hand(layer, params, x, ct), by_hand(layer, *wide)) <= 4e-3


@pytest.mark.parametrize("layer", LAYERS[:1] + LAYERS[2:], ids=repr)
def test_the_cotangent_of_x_has_no_mean_however_large_an_offset(layer):
    """That mean is the gradient of a bias before the layer, which an optimizer may scale up."""
    x = np.asarray(100 + normal(8, 16, 32), np.float32)
    params = layer.init(jax.random.key(1), x)
    d_x = np.asarray(by_hand(layer, params, x, ct_for(layer, params, x))[1], np.float64)
    axes = AXES[type(layer).__name__]
    sums = in_groups(layer, d_x).sum(axes)
    assert np.abs(sums).max() <= 1e-7 * np.sqrt(np.sum(d_x**2))


@layers
def test_bfloat16_sums_many_rows_in_float32(layer):
    params, x = at(Row(layer, 1 + normal(512, 64, 4)), jnp.bfloat16)
    ct = 1 + ct_for(layer, params, x)
    (d_params, _), wide = by_hand(layer, params, x, ct), (params, x, ct)
    wide = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), wide)
    expected = np.asarray(by_hand(layer, *wide)[0].scale)
    assert d_params.scale.dtype == jnp.bfloat16
    error = np.abs(np.asarray(d_params.scale, np.float64) - expected)
    assert np.all(error <= 2**-8 * np.abs(expected) + 1e-4 * np.abs(expected).max())


def test_groups_between_layer_and_instance_normalization():
    x = normal(3, 5, 6)
    whole = y_of(jp.LayerNorm(), x.reshape(3, 30)).reshape(x.shape)
    np.testing.assert_allclose(y_of(jp.GroupNorm(1), x), whole, rtol=1e-12)
    each = y_of(jp.LayerNorm(), x.transpose(0, 2, 1)).transpose(0, 2, 1)
    np.testing.assert_allclose(y_of(jp.GroupNorm(6), x), each, rtol=1e-12)


NET = jp.chain(
    jp.Dense(6, bias=False),
    jp.BatchNorm(),
    jp.Tanh(),
    jp.skip(jp.chain(jp.Dense(6, bias=False), jp.BatchNorm(momentum=0.5))),
    jp.Dense(3),
)
LOSS = jp.HalfSquaredError()


def problem(examples=8):
    params, x = at(Row(NET, normal(examples, 5)))
    return params, x, normal(examples, 3, seed=2)


PER_EXAMPLE = ["per_example_grads", "per_example_sq_norms", "gram", "second_moment", "variance"]


@pytest.mark.few(2)
@pytest.mark.parametrize("name", PER_EXAMPLE)
def test_per_example_quantities_exist_in_evaluation_only(name):
    args = problem()
    words = r"BatchNorm\(momentum=0.5\) couples the examples of a batch"
    with pytest.raises(ValueError, match=words):
        jax.jit(getattr(jp, name)(NET, LOSS))(*args)
    net = jp.inference_mode(NET)
    got, expected = (jax.jit(getattr(of, name)(net, LOSS))(*args) for of in (jp, oracles))
    assert relative_error(got, expected) <= 1e-10


def test_curvature_of_running_statistics_is_zero():
    params, x, target = problem()
    net = jp.inference_mode(NET)
    norm = jax.jit(jp.diag_ggn(net, LOSS))(params, x, target)[1]
    assert norm.mean == jp.Unlearned(0)
    assert norm.scale.all()
    factors = jax.jit(jp.kronecker_factors(net, LOSS))(params, x, target)[1]
    assert factors.var == jp.Unlearned(0)


def test_batch_coupling_shows_through_combinators():
    assert NET.batch_coupled
    assert jp.skip(jp.BatchNorm()).batch_coupled
    assert not jp.inference_mode(NET).batch_coupled
    jp.check_layer(NET, normal(8, 5))


def test_evaluation_changes_what_trains_and_nothing_else():
    class Noisy(jp.Layer):
        training: bool = True

        def forward(self, params, x):
            return x, x

        def backward(self, params, x, ct):
            return (), ct

    net = jp.chain(jp.skip(jp.chain(Noisy(), jp.LayerNorm())), jp.BatchNorm(momentum=0.5))
    assert jp.inference_mode(net) == jp.chain(
        jp.skip(jp.chain(Noisy(training=False), jp.LayerNorm())),
        jp.BatchNorm(momentum=0.5, training=False),
    )
    assert jp.inference_mode(jp.inference_mode(net)) == jp.inference_mode(net)


def test_one_step_of_the_running_statistics():
    layer = jp.BatchNorm(momentum=0.75)
    params, x = at(Row(layer, 5 + normal(6, 2, 3)))
    moved = move(layer, params, x)
    mean, var, x = jax.device_get((params.mean.value, params.var.value, x))
    np.testing.assert_allclose(moved.mean.value, 0.75 * mean + 0.25 * x.mean((0, 1)))
    np.testing.assert_allclose(moved.var.value, 0.75 * var + 0.25 * x.var((0, 1)))
    np.testing.assert_array_equal(moved.scale, params.scale)
    frozen = move(jp.inference_mode(layer), params, x)
    assert relative_error(frozen, params) == 0


def test_statistics_are_found_in_layers_around_others():
    layer = jp.BatchNorm(momentum=0.75)
    params, x = at(Row(layer, 5 + normal(6, 2, 3)), jnp.float32)
    expected = move(layer, params, x)
    mesh = jax.make_mesh((1,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    gathered = jp.sharding.gathered(layer, mesh)
    for net in (
        jp.skip(layer),
        jp.recompute(layer),
        gathered,
        jp.cast(gathered, jnp.float32),
        jp.shared(jp.inference_mode(layer), 2),
    ):
        frozen = isinstance(net, type(jp.shared(layer, 2)))
        moved = move(net, params, x)
        assert relative_error(moved, params if frozen else expected) <= 1e-6
    with pytest.raises(ValueError, match=r"shared\(BatchNorm.*each use has statistics of its own"):
        jp.update_batch_stats(jp.shared(layer, 2), params, x)


def test_a_batch_that_is_not_finite_does_not_move_them():
    layer = jp.BatchNorm()
    params, x = at(Row(layer, normal(6, 3)))
    broken = np.array(x)
    broken[2, 1] = np.nan
    moved, expected = (jax.device_get(move(layer, params, x)) for x in (broken, x))
    assert moved.mean.value[1] == params.mean.value[1]
    assert moved.var.value[1] == params.var.value[1]
    np.testing.assert_array_equal(moved.mean.value[::2], expected.mean.value[::2])


def test_a_layer_around_a_batch_norm_is_as_coupled_as_it():
    x = normal(6, 3)
    for net in (Around(jp.BatchNorm()), jp.chain(Doubled(jp.BatchNorm()))):
        params = net.init(jax.random.key(0), x)
        assert net.batch_coupled
        with pytest.raises(ValueError, match="couples the examples of a batch"):
            jax.jit(jp.per_example_sq_norms(net, LOSS))(params, x, x)
        evaluated = jp.inference_mode(net)
        assert not evaluated.batch_coupled
        assert jax.jit(jp.per_example_sq_norms(evaluated, LOSS))(params, x, x).shape == (6,)
    moved = move(net, params, x)[0]
    np.testing.assert_allclose(moved.mean.value, 0.1 * x.mean(0))
    jp.check_layer(Doubled(jp.LayerNorm()), x)
    around = Around(jp.BatchNorm())
    with pytest.raises(ValueError, match=r"Around\(BatchNorm\(\)\): .* is a jp\.Wrapper"):
        jp.update_batch_stats(around, around.init(jax.random.key(0), x), x)


def test_running_statistics_of_another_dtype_than_x_are_computed_with_in_the_wider_one():
    """For example, after casting all params by hand: 1 / sqrt(var) is not rounded to bfloat16."""
    layer = jp.BatchNorm(training=False)
    params, x = at(Row(layer, normal(5, 3)), jnp.bfloat16)
    by_hand = jax.tree.map(lambda leaf: np.asarray(leaf, jnp.bfloat16), params)
    exact = jax.tree.map(lambda leaf: np.asarray(leaf, np.float32), by_hand)
    y, wide = layer(by_hand, x), layer(exact, x)
    np.testing.assert_array_equal(y, wide)
    moved = move(jp.BatchNorm(), by_hand, x)
    assert moved.mean.value.dtype == jnp.bfloat16


def test_running_statistics_converge_to_the_batch_s():
    params, x, _ = problem()
    for _ in range(300):
        params = move(NET, params, x)
    y, evaluated = (forward(net, params, x) for net in (NET, jp.inference_mode(NET)))
    np.testing.assert_allclose(evaluated, y, rtol=1e-10)


def test_an_optimizer_leaves_them_alone():
    params, x, target = problem()
    for net in (NET, jp.inference_mode(NET)):
        grads = jax.jit(jp.value_and_grad(net, LOSS))(params, x, target)[1]
        updates, _ = optax.sgd(0.1).update(grads, optax.sgd(0.1).init(params))
        after = optax.apply_updates(params, updates)
        np.testing.assert_array_equal(after[1].mean.value, params[1].mean.value)
        np.testing.assert_array_equal(after[1].var.value, params[1].var.value)
        assert np.not_equal(after[1].scale, params[1].scale).all()


def test_the_way_forward_is_shared():
    """In one jit with value_and_grad, updating the statistics adds only a few FLOPs per channel."""
    params, x, target = problem(256)

    def both(params, x, target):
        moved = jp.update_batch_stats(NET, params, x)
        return moved, jp.value_and_grad(NET, LOSS)(moved, x, target)

    def flops(f):
        return jax.jit(f).lower(params, x, target).compile().cost_analysis()["flops"]

    alone = flops(jp.value_and_grad(NET, LOSS))
    assert flops(both) <= 1.01 * alone


def test_training_inside_scan():
    params, x, target = problem(24)
    optimizer = optax.sgd(0.1)
    update = jp.make_update(NET, LOSS, optimizer)
    batches = x.reshape(3, 8, -1), target.reshape(3, 8, -1)

    def step(carry, batch):
        params, state = carry
        params, state, value = update(jp.update_batch_stats(NET, params, batch[0]), state, *batch)
        return (params, state), value

    start = jax.tree.map(jnp.copy, params), update.init(params)
    (scanned, _), _ = jax.jit(lambda carry: jax.lax.scan(step, carry, batches))(start)
    carry = start
    for batch in zip(*batches, strict=True):
        carry, _ = step(carry, batch)
    assert relative_error(scanned, carry[0]) <= 1e-12


@pytest.mark.full
def test_a_layer_inside_scan():
    """The same block three times over stacked params, its residuals stacked by scan."""
    inner = jp.BatchNorm(), jp.Dense(6), jp.GroupNorm(2), jp.Tanh(), jp.LayerNorm(), jp.RMSNorm()
    block = jp.skip(jp.chain(*inner))
    x = normal(7, 6)
    keys = jax.random.split(jax.random.key(0), 3)
    stacked = jax.vmap(lambda key: block.init(key, x))(keys)
    apply = jp.custom_vjp(block)

    def value(f, params, x):
        return jnp.sum(jax.lax.scan(lambda x, p: (f(p, x), None), x, params)[0] ** 2)

    got = jax.grad(functools.partial(value, apply), (0, 1))(stacked, x)
    forward = functools.partial(value, lambda p, x: block.forward(p, x)[0])
    expected = jax.grad(forward, (0, 1))(stacked, x)
    assert relative_error(got, expected) <= 1e-10


def against_torch(layer, module, x, channels_last=True):
    torch = pytest.importorskip("torch")
    params, x = at(Row(layer, x))
    ct = ct_for(layer, params, x)
    module = module(torch).double()
    with torch.no_grad():
        module.weight.copy_(torch.tensor(np.asarray(params.scale)))
        module.bias.copy_(torch.tensor(np.asarray(params.bias)))

    def there(a):
        a = torch.tensor(np.asarray(a))
        return a if channels_last else a.movedim(-1, 1)

    t = there(x).requires_grad_()
    y = module(t)
    y.backward(there(ct))

    def back(a):
        return (a if channels_last else a.movedim(1, -1)).detach().numpy()

    d_params, d_x = by_hand(layer, params, x, ct)
    got = (forward(layer, params, x), d_params.scale, d_params.bias, d_x)
    expected = (back(y), module.weight.grad.numpy(), module.bias.grad.numpy(), back(t.grad))
    assert relative_error(got, expected) <= 1e-11
    return module, params, x


def test_torch_layer_norm():
    against_torch(jp.LayerNorm(), lambda torch: torch.nn.LayerNorm(5), normal(4, 3, 5))


def test_torch_group_norm():
    x = normal(4, 3, 2, 6)
    against_torch(jp.GroupNorm(3), lambda torch: torch.nn.GroupNorm(3, 6), x, False)


def test_torch_batch_norm():
    """PyTorch's momentum is the new value's weight, and its running variance divides by M - 1."""
    layer = jp.BatchNorm(momentum=0.75)
    module, params, x = against_torch(
        layer, lambda torch: torch.nn.BatchNorm2d(6, momentum=0.25), normal(4, 3, 2, 6), False
    )
    start = params._replace(mean=jp.Unlearned(jnp.zeros(6)), var=jp.Unlearned(jnp.ones(6)))
    moved = move(layer, start, x)
    np.testing.assert_allclose(moved.mean.value, module.running_mean.numpy(), rtol=1e-11)
    rows = x.size // 6
    unbiased = 0.75 + (moved.var.value - 0.75) * rows / (rows - 1)
    np.testing.assert_allclose(unbiased, module.running_var.numpy(), rtol=1e-11)


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: jp.LayerNorm(eps=0.0), ValueError, "LayerNorm: eps must be positive, not 0.0"),
        (lambda: jp.RMSNorm(eps="s"), TypeError, "RMSNorm: eps is a number, not 's'"),
        (lambda: jp.GroupNorm(2.0), TypeError, "GroupNorm: groups is a whole number"),
        (lambda: jp.GroupNorm(0), ValueError, "GroupNorm: groups is at least 1, not 0"),
        (lambda: jp.BatchNorm(momentum=1.0), ValueError, "momentum is below 1, not 1.0"),
        (lambda: jp.BatchNorm(momentum=True), TypeError, "momentum is a number, not True"),
        (lambda: jp.BatchNorm(training=1), TypeError, "training is True or False, not 1"),
        (lambda: y_of(jp.LayerNorm(), jnp.ones(3)), ValueError, r"write x\[None\]"),
        (lambda: y_of(jp.BatchNorm(), jnp.ones((2, 3), int)), TypeError, "floating x, not int64"),
        (lambda: y_of(jp.RMSNorm(), jnp.ones((2, 0))), ValueError, "at least one feature"),
        (
            lambda: y_of(jp.GroupNorm(4), jnp.ones((2, 6))),
            ValueError,
            r"GroupNorm\(4\) takes x with channels that 4 groups divide, not \(2, 6\)",
        ),
        (
            lambda: jp.LayerNorm().forward(
                jp.NormParams(jnp.ones(3), jnp.ones(3)), jnp.ones((2, 4))
            ),
            ValueError,
            r"params.scale has shape \(3,\), but an input float64\[2,4\] takes \(4,\)",
        ),
    ],
)
def test_errors_say_what_is_wrong(make, error, words):
    with pytest.raises(error, match=words):
        make()


@pytest.mark.full
@pytest.mark.few(2)
@pytest.mark.parametrize("size", [1e20, pytest.param(1e30, marks=pytest.mark.full)])
@pytest.mark.parametrize(
    "layer", [jp.LayerNorm(), jp.RMSNorm(), jp.GroupNorm(2), jp.BatchNorm()], ids=str
)
def test_numbers_whose_squares_overflow(layer, size):
    """y does not depend on the size of x, and d_x is proportional to 1 / size."""
    params, x = at(Row(layer, normal(4, 3, 6)), jnp.float32)
    large = x * jnp.float32(size)
    ct = ct_for(layer, params, x)
    y, _ = layer.forward(params, large)
    wide = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), (params, large, ct))
    assert relative_error(y, layer.forward(*wide[:2])[0]) <= 1e-5
    (d_params, d_x), expected = by_hand(layer, params, large, ct), by_hand(layer, *wide)
    assert relative_error((d_params, d_x * size), (expected[0], expected[1] * size)) <= 1e-4
    (_, of_x) = jax.vjp(lambda params, x: layer.forward(params, x)[0], params, large)[1](ct)
    assert relative_error(of_x * size, expected[1] * size) <= 1e-4


@pytest.mark.parametrize("size", [1e20, 1e30, 1e36])
def test_what_divides_a_number_whose_square_overflows(size):
    x = np.full((1, 4), size, np.float32)
    rstd = jax.jit(lambda x: rstd_of(x, lambda squares: squares.mean(-1, keepdims=True), 1e-5))(x)
    np.testing.assert_allclose(rstd * x, 1, rtol=1e-6)


def in_parts(f, axes=("d",), **options):
    """F of (params, x, target), with the batch split over these axes of a 4 x 2 mesh."""
    kinds = (jax.sharding.AxisType.Auto,) * 2
    mesh = jax.make_mesh((4, 2), ("d", "m"), axis_types=kinds)
    whole, split = jax.sharding.PartitionSpec(), jax.sharding.PartitionSpec(axes)
    specs = {"in_specs": (whole, split, split), "out_specs": whole}
    return jax.jit(jax.shard_map(f, mesh=mesh, **specs, **options))


PARTS = {"one axis": ("d", ("d",)), "two axes": (("d", "m"), ("d", "m"))}


@pytest.mark.full
@pytest.mark.parametrize(("name", "axes"), PARTS.values(), ids=list(PARTS))
def test_statistics_of_a_batch_in_parts_are_those_of_the_whole(name, axes):
    """The gradients of every layer, through the cotangents of x, and the running statistics."""
    loss, devices = jp.CrossEntropy(), 4 if len(axes) == 1 else 8
    norm = jp.BatchNorm(axis_name=name)
    net = jp.chain(jp.Dense(4), norm, jp.Tanh(), jp.repeat(norm, 2), jp.Dense(3))
    x, target = normal(16, 2, 5) * jnp.arange(1, 17.0)[:, None, None], jnp.arange(32) % 3
    target = target.reshape(16, 2)
    params, x = at(Row(net, x))

    def step(params, x, target):
        value, grads = jp.value_and_grad(net, loss)(params, x, target)
        return value, learned(grads), jp.update_batch_stats(net, params, x)

    def of_part(params, x, target):
        value, grads, moved = step(params, x, target)
        return jax.lax.pmean(value, axes), jax.tree.map(lambda g: g / devices, grads), moved

    expected = jax.jit(step)(params, x, target)
    value, grads, moved = in_parts(of_part, axes)(params, x, target)
    chex.assert_trees_all_close((value, grads, moved), expected, rtol=1e-10, atol=1e-14)
    by_jax = jp.autodiff(net, loss)(params, x, target)
    chex.assert_trees_all_close((value, grads), learned(by_jax), rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("check_vma", [True, False])
def test_a_batch_in_parts_is_said_to_be(check_vma):
    loss, (params, x) = jp.HalfSquaredError(), at(Row(jp.BatchNorm(), normal(8, 3)))

    def value_of(norm):
        def f(params, x, target):
            value = jp.value_and_grad(norm, loss)(params, x, target)[0]
            return jax.lax.pmean(value, "d")

        return in_parts(f, check_vma=check_vma)(params, x, np.zeros(x.shape))

    with pytest.raises(ValueError, match=r"in jax.shard_map over .*write axis_name=\('d'"):
        value_of(jp.BatchNorm())
    with pytest.raises(ValueError, match=r"has the axes \('d', 'm'\), and no 'data'"):
        value_of(jp.BatchNorm(axis_name="data"))
    with pytest.raises(TypeError, match="axis_name is a name, or several, not 3"):
        jp.BatchNorm(axis_name=3)
    f = jax.jit(jp.loss_fn(jp.BatchNorm(), loss))
    whole = f(params, x, np.zeros(x.shape))
    np.testing.assert_allclose(value_of(jp.BatchNorm(axis_name="d")), whole, rtol=1e-12)
    own = [f(params, part, 0 * part) for part in np.split(np.asarray(x), 4)]
    np.testing.assert_allclose(value_of(jp.BatchNorm(axis_name=())), np.mean(own), rtol=1e-12)
    assert value_of(jp.inference_mode(jp.BatchNorm())) > 0


def test_an_axis_of_vmap_splits_the_batch_too():
    norm = jp.BatchNorm(axis_name="d")
    params, x = at(Row(norm, normal(8, 3)))
    ct = normal(8, 3, seed=2)

    def both(params, x, ct):
        y, residuals = norm.forward(params, x)
        return y, *norm.backward(params, residuals, ct)

    y, d_params, d_x = jax.jit(both)(params, x, ct)
    split = (a.reshape(4, 2, 3) for a in (x, ct))
    mapped = jax.jit(jax.vmap(both, (None, 0, 0), axis_name="d"))
    of_parts = jax.device_get(mapped(params, *split))
    np.testing.assert_allclose(of_parts[0].reshape(8, 3), y, rtol=1e-10)
    np.testing.assert_allclose(of_parts[2].reshape(8, 3), d_x, rtol=1e-9, atol=1e-12)
    summed = jax.tree.map(lambda leaf: leaf.sum(0), of_parts[1])
    assert relative_error(summed, d_params) <= 1e-10


def test_under_jit_x_minus_its_mean_is_of_the_rounded_x():
    """Otherwise x, just computed by the layer before, may be rounded in only one of its uses.

    With one channel per group, x is its own mean, and the rest is only rounding, times 316.
    """
    net = jp.chain(
        jp.cast(jp.Dense(2, bias=False), jnp.bfloat16), jp.cast(jp.GroupNorm(2), jnp.bfloat16)
    )
    x, target = normal(6, 4).astype(np.float32), np.ones((6, 2), np.float32)
    params = net.init(jax.random.key(0), x)
    f = jp.quantities(net, jp.BinaryCrossEntropy(), root=jp.GGNRoot())
    root = jax.jit(f)(params, x, target)["root"][0].w
    assert float(jnp.abs(root).max()) == 0
