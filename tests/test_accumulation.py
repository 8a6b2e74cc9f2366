"""Whatever is asked of micro-batches is what is asked of the batch, in the memory of one."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from table import relative_error

import jaxprop as jp

NET = jp.chain(jp.repeat(jp.skip(jp.chain(jp.Dense(4), jp.Tanh())), 2), jp.Dense(3))
LOSS = jp.CrossEntropy()
KEY = jax.random.key(5)


class Largest(jp.Quantity):
    """A user's: the largest entry of each example's own gradient, at each layer."""

    def take(self, params, forms, examples):
        def largest(form):
            g = jnp.abs(form.per_example())
            return g.reshape(len(g), -1).max(axis=1)

        leaves = jax.tree.leaves(forms, is_leaf=lambda node: isinstance(node, jp.Factored))
        if not leaves:
            return ()
        return jp.PerExample(functools.reduce(jnp.maximum, map(largest, leaves)), axis=-1)


def autodiff(net, loss):
    return jax.value_and_grad(jp.loss_fn(net, loss))


def problem(net=NET, shape=(6, 4), dtype=jnp.float64):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=shape), dtype)
    params = jax.jit(net.init)(jax.random.key(0), x)
    return params, x, jnp.asarray(rng.integers(0, 3, shape[:-1]))


def jitted_clip(net, loss, max_norm, noise_multiplier):
    return jax.jit(jp.clipped_grad(net, loss, max_norm, noise_multiplier))


CLIP, NOISE = {"max_norm": 0.3}, {"max_norm": 0.3, "noise_multiplier": 1.1}
ASKED = {
    "value_and_grad": (jp.value_and_grad, {}),
    "loss_scale": (jp.value_and_grad, {"loss_scale": 8.0}),
    "autodiff": (autodiff, {}),
    "per_example_grads": (jp.per_example_grads, {}),
    "per_layer norms": (jp.per_example_sq_norms, {"per_layer": True}),
    "second_moment": (jp.second_moment, {}),
    "variance": (jp.variance, {}),
    "clipped": (jp.clipped_grad, CLIP),
    "clipped in two passes": (jp.clipped_grad, CLIP | {"two_pass": True}),
    "noise": (jp.clipped_grad, NOISE),
    "noise, per_layer": (jp.clipped_grad, NOISE | {"per_layer": True}),
    "noise, jitted": (jitted_clip, NOISE),
    "noise, in micro-batches of micro-batches": (jp.accumulate(jp.clipped_grad, 2), NOISE),
    "diag_ggn": (jp.diag_ggn, {}),
    "kronecker_factors": (jp.kronecker_factors, {}),
    "ggn_root": (jp.ggn_root, {}),
    "quantities": (
        jp.quantities,
        {
            "grads": jp.Gradient(),
            "norms": jp.SqNorms(),
            "noise": jp.NoiseScale(),
            "largest": Largest(),
        },
    ),
}


@pytest.mark.parametrize("name", ASKED)
def test_is_that_of_the_whole_batch(name):
    maker, options = ASKED[name]
    given = {"key": KEY} if "noise_multiplier" in options else {}
    times = (3, 6) if name in ("quantities", "variance") else (1, 3)
    makers = [maker, *(jp.accumulate(maker, m) for m in times)]

    @jax.jit
    def all_of(*args):
        return [maker(NET, LOSS, **options)(*args, **given) for maker in makers]

    whole, *accumulated = all_of(*problem())
    for got in accumulated:
        assert jax.tree.map(jnp.result_type, got) == jax.tree.map(jnp.result_type, whole)
        assert relative_error(got, whole) <= 1e-12


def test_in_the_memory_of_one_micro_batch():
    layers = [layer for _ in range(6) for layer in (jp.Dense(16), jp.Tanh())]
    net = jp.chain(*layers, jp.Dense(3))
    args = problem(net, (4096, 16))
    gradient = sum(leaf.nbytes for leaf in jax.tree.leaves(args[0]))

    def temporaries(f):
        return jax.jit(f).lower(*args).compile().memory_analysis().temp_size_in_bytes

    for maker in (jp.value_and_grad, jp.variance):
        one = temporaries(jp.accumulate(maker, 16)(net, LOSS)) - gradient
        assert one < 0.12 * (temporaries(maker(net, LOSS)) - gradient)


def test_each_micro_batch_has_keys_of_its_own():
    net = jp.chain(jp.repeat(jp.chain(jp.Dense(4), jp.Dropout(0.5)), 2), jp.Dropout(0.5))
    params, x, target = problem(net)
    grads = jp.value_and_grad(net, LOSS)
    given = net.given(params, key=KEY)
    got = jax.jit(jp.accumulate(jp.value_and_grad, 2)(net, LOSS))(given, x, target)

    def own(key, i):
        return jax.vmap(jax.random.fold_in, (0, None))(key.reshape(-1), i).reshape(key.shape)

    def micro_batch(i):
        def of(leaf):
            return own(leaf, i) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf

        return grads(jax.tree.map(of, given), x[i::2], target[i::2])

    expected = jax.tree.map(lambda a, b: (a + b) / 2, micro_batch(0), micro_batch(1))
    assert relative_error(got, expected) <= 1e-12


def test_samples_anew_in_each_micro_batch():
    """Of two equal examples the samples differ, and many of them come near what is exact."""
    net, (params, x, target) = jp.chain(jp.Dense(3)), problem(jp.chain(jp.Dense(3)), (1, 4))
    pair = params, jnp.tile(x, (2, 1)), jnp.tile(target, 2)
    root = jax.jit(jp.accumulate(jp.ggn_root, 2)(net, LOSS, samples=8))(*pair, key=KEY)
    assert not np.allclose(root[0].w[:, 0], root[0].w[:, 1])
    sampled = jax.jit(jp.accumulate(jp.diag_ggn, 2)(net, LOSS, samples=2000))(*pair, key=KEY)
    assert relative_error(sampled, jp.diag_ggn(net, LOSS)(*pair)) <= 0.1


def test_a_mask_in_its_seat_is_split_with_the_batch():
    block = jp.skip(jp.chain(jp.Dense(6), jp.Attention(1, causal=False), jp.Dense(2)))
    net = jp.chain(jp.repeat(block, 2), jp.Dense(3))
    params, x, target = problem(net, (4, 3, 2))
    mask = jnp.asarray(np.random.default_rng(1).uniform(size=(4, 3)) < 0.5).at[:, 0].set(True)
    args = net.given(params, mask=mask), x, target
    got, whole = (
        jax.jit(maker(net, LOSS))(*args)
        for maker in (jp.accumulate(jp.value_and_grad, 2), jp.value_and_grad)
    )
    assert relative_error(got, whole) <= 1e-12


def test_narrow_params_accumulate_in_float32():
    """In bfloat16 a sum of 512 of a kind would stop growing at 256 of them."""
    net = jp.chain(jp.Dense(3))
    params, x, target = problem(net, (1, 4), jnp.bfloat16)
    many = params, jnp.tile(x, (512, 1)), jnp.tile(target, 512)
    got = jax.jit(jp.accumulate(jp.value_and_grad, 512)(net, LOSS))(*many)
    whole = jax.jit(jp.value_and_grad(net, LOSS))(params, x, target)
    assert jax.tree.map(jnp.result_type, got) == jax.tree.map(jnp.result_type, whole)
    assert relative_error(got[1], whole[1]) <= 2**-8


@pytest.mark.usefixtures("standard_promotion")
def test_in_a_training_loop_under_scan():
    params, *batch = problem()
    optimizer = optax.adam(0.1)

    def trained(value_and_grad):
        update = jp.make_update(NET, LOSS, optimizer, value_and_grad=value_and_grad)

        def step(carry, _):
            *carry, value = update(*carry, *batch)
            return tuple(carry), value

        return jax.lax.scan(step, (params, optimizer.init(params)), length=3)

    got, whole = trained(jp.accumulate(jp.value_and_grad, 3)), trained(jp.value_and_grad)
    assert relative_error(got, whole) <= 1e-10


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=str)
def test_a_sharded_batch_stays_where_it_is(kind):
    params, *batch = problem(shape=(12, 4))
    whole = jax.jit(jp.value_and_grad(NET, LOSS))(params, *batch)
    mesh = jax.make_mesh((4,), ("d",), axis_types=(kind,))
    with jax.set_mesh(mesh):
        batch = jax.device_put(batch, NamedSharding(mesh, PartitionSpec("d")))
        params = jax.device_put(params, NamedSharding(mesh, PartitionSpec()))
        f = jax.jit(jp.accumulate(jp.value_and_grad, 3)(NET, LOSS))
        program = f.lower(params, *batch).compile()
    assert relative_error(jax.device_get(program(params, *batch)), whole) <= 1e-12
    for moving in ("all-gather", "all-to-all", "collective-permute"):
        assert moving not in program.as_text()


def test_under_shard_map():
    args = problem(shape=(12, 4))
    mesh = jax.make_mesh((4,), ("d",), axis_types=(AxisType.Auto,))
    all_of, shared = PartitionSpec("d"), PartitionSpec()
    f = jp.accumulate(jp.quantities, 3)(NET, LOSS, grads=jp.Gradient(), norms=jp.SqNorms())

    def own(*args):
        of = f(*args)
        return of["grads"], of["norms"]

    specs = {"in_specs": (shared, all_of, all_of), "out_specs": (shared, all_of)}
    sharded = jax.shard_map(own, mesh=mesh, **specs)
    grads, norms = jax.jit(sharded)(*args)
    whole = jp.value_and_grad(NET, LOSS)(*args)[1], jp.per_example_sq_norms(NET, LOSS)(*args)
    assert relative_error((jax.tree.map(lambda g: g / 4, grads), norms), whole) <= 1e-12


def test_errors():
    params, x, target = args = problem()
    with pytest.raises(ValueError, match="6 examples do not divide into 4 equal micro-batches"):
        jp.accumulate(jp.value_and_grad, 4)(NET, LOSS)(*args)
    with pytest.raises(ValueError, match=r"float64\[6,4\], int64\[4\]"):
        jp.accumulate(jp.value_and_grad, 2)(NET, LOSS)(params, x, target[:4])
    with pytest.raises(ValueError, match="the batch is empty"):
        jp.accumulate(jp.value_and_grad, 2)(NET, LOSS)(params, x[:0], target[:0])
    for wrong in (2.0, True, "2"):
        with pytest.raises(TypeError, match="micro_batches is a whole number, not"):
            jp.accumulate(jp.value_and_grad, wrong)
    with pytest.raises(ValueError, match="micro_batches is at least 1, not 0"):
        jp.accumulate(jp.value_and_grad, 0)
    with pytest.raises(TypeError, match=r"takes a maker, .* for the net it got .*float64\[4,3\]"):
        jp.accumulate(jp.value_and_grad(NET, LOSS), 2)(*args)
    with pytest.raises(TypeError, match="what a walk leaves need not be a mean"):
        jp.accumulate(jp.walk, 2)
    with pytest.raises(ValueError, match="a noise_multiplier needs a key"):
        jp.accumulate(jp.clipped_grad, 2)(NET, LOSS, **NOISE)(*args)
    with pytest.raises(ValueError, match=r"is \(6, 6\) for the batch .* those of two never meet"):
        jp.accumulate(jp.gram, 2)(NET, LOSS)(*args)
    with pytest.raises(TypeError, match=r"result\['right'\] is int64, which has no mean"):
        jp.accumulate(lambda net, loss: lambda *args: {"right": jnp.int64(1)}, 2)(NET, LOSS)(*args)


def test_a_batch_coupled_layer_raises():
    net = jp.chain(jp.Dense(3), jp.BatchNorm())
    with pytest.raises(ValueError, match=r"BatchNorm\(\)\) couples the examples of a batch"):
        jp.accumulate(jp.value_and_grad, 2)(net, LOSS)
    args = problem(net)
    one = jp.accumulate(jp.value_and_grad, 1)(net, LOSS)(*args)
    assert relative_error(one, jp.value_and_grad(net, LOSS)(*args)) == 0
    got = jp.accumulate(jp.value_and_grad, 2)(jp.evaluation(net), LOSS)(*args)
    assert relative_error(got, jp.value_and_grad(jp.evaluation(net), LOSS)(*args)) <= 1e-12
