"""Results from micro-batches are those of the whole batch, in the memory of one micro-batch."""

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
    """A user's quantity: the largest entry of each example's gradient, at each layer."""

    def take(self, params, forms, examples):
        def largest(form):
            g = jnp.abs(form.per_example())
            return g.reshape(len(g), -1).max(axis=1)

        leaves = jax.tree.leaves(forms, is_leaf=lambda node: isinstance(node, jp.Factored))
        if not leaves:
            return ()
        return jp.PerExample(functools.reduce(jnp.maximum, map(largest, leaves)), axis=-1)


def problem(net=NET, shape=(6, 4), dtype=jnp.float64):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=shape), dtype)
    params = jax.jit(net.init)(jax.random.key(0), x)
    return params, x, jnp.asarray(rng.integers(0, 3, shape[:-1]))


CLIP, NOISE = {"max_norm": 0.3}, {"max_norm": 0.3, "noise_multiplier": 1.1}
ASKED = {
    "value_and_grad": (jp.value_and_grad, {}),
    "loss_scale": (jp.value_and_grad, {"loss_scale": 8.0}),
    "autodiff": (jp.autodiff, {}),
    "per_example_grads": (jp.per_example_grads, {}),
    "per_layer norms": (jp.per_example_sq_norms, {"per_layer": True}),
    "second_moment": (jp.second_moment, {}),
    "variance": (jp.variance, {}),
    "clipped": (jp.clipped_grad, CLIP),
    "clipped in two passes": (jp.clipped_grad, CLIP | {"two_pass": True}),
    "noise": (jp.clipped_grad, NOISE),
    "noise, per_layer": (jp.clipped_grad, NOISE | {"per_layer": True}),
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
            "clipped": jp.Clipped(0.3),
            "diag": jp.DiagGGN(),
        },
    ),
}


@pytest.mark.few(2)
@pytest.mark.parametrize("name", ASKED)
def test_is_that_of_the_whole_batch(name):
    maker, options = ASKED[name]
    given = {"key": KEY} if "noise_multiplier" in options else {}
    times = (1, 3, 6) if name in ("quantities", "variance") else (1, 3)

    @jax.jit
    def all_of(*args):
        return [maker(NET, LOSS, micro_batches=count, **options)(*args, **given) for count in times]

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
        one = temporaries(maker(net, LOSS, micro_batches=16)) - gradient
        assert one < 0.12 * (temporaries(maker(net, LOSS)) - gradient)


@pytest.mark.full
def test_each_micro_batch_has_keys_of_its_own():
    net = jp.chain(jp.repeat(jp.chain(jp.Dense(4), jp.Dropout(0.5)), 2), jp.Dropout(0.5))
    params, x, target = problem(net)
    grads = jp.value_and_grad(net, LOSS)
    got = jax.jit(jp.value_and_grad(net, LOSS, micro_batches=2))(params, x, target, key=KEY)

    def micro_batch(i):
        def of(leaf):
            if not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
                return leaf
            return jax.vmap(jax.random.fold_in, (0, None))(leaf.reshape(-1), i).reshape(leaf.shape)

        return grads(jax.tree.map(of, net.bind(params, key=KEY)), x[i::2], target[i::2])

    expected = jax.tree.map(lambda a, b: (a + b) / 2, micro_batch(0), micro_batch(1))
    assert relative_error(got, expected) <= 1e-12


@pytest.mark.full
def test_samples_anew_in_each_micro_batch():
    """Two equal examples get different samples, and many samples come near the exact result."""
    net, (params, x, target) = jp.chain(jp.Dense(3)), problem(jp.chain(jp.Dense(3)), (1, 4))
    pair = params, jnp.tile(x, (2, 1)), jnp.tile(target, 2)
    root = jax.jit(jp.ggn_root(net, LOSS, samples=8, micro_batches=2))(*pair, key=KEY)
    assert not np.allclose(root[0].w[:, 0], root[0].w[:, 1])
    sampled = jax.jit(jp.diag_ggn(net, LOSS, samples=2000, micro_batches=2))(*pair, key=KEY)
    assert relative_error(sampled, jp.diag_ggn(net, LOSS)(*pair)) <= 0.1


@pytest.mark.few(1)
@pytest.mark.parametrize("bound", [False, True])
def test_a_mask_is_split_with_the_batch(bound):
    block = jp.skip(jp.chain(jp.Dense(6), jp.Attention(1, causal=False), jp.Dense(2)))
    net = jp.chain(jp.repeat(block, 2), jp.Dense(3))
    params, x, target = problem(net, (4, 3, 2))
    mask = jnp.asarray(np.random.default_rng(1).uniform(size=(4, 3)) < 0.5).at[:, 0].set(True)
    given = {} if bound else {"mask": mask}
    args = net.bind(params, mask=mask) if bound else params, x, target
    got, whole = (
        jax.jit(jp.value_and_grad(net, LOSS, micro_batches=count))(*args, **given)
        for count in (2, 1)
    )
    assert relative_error(got, whole) <= 1e-12


def test_narrow_params_accumulate_in_float32():
    """In bfloat16, a sum of 512 equal terms would stop growing after 256."""
    net = jp.chain(jp.Dense(3))
    params, x, target = problem(net, (1, 4), jnp.bfloat16)
    many = params, jnp.tile(x, (512, 1)), jnp.tile(target, 512)
    got = jax.jit(jp.value_and_grad(net, LOSS, micro_batches=512))(*many)
    whole = jax.jit(jp.value_and_grad(net, LOSS))(params, x, target)
    assert jax.tree.map(jnp.result_type, got) == jax.tree.map(jnp.result_type, whole)
    assert relative_error(got[1], whole[1]) <= 2**-8


@pytest.mark.few(1)
@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize(
    "options",
    [{}, {"fused": True}, {"value_and_grad": jp.autodiff}],
    ids=["by hand", "fused", "autodiff"],
)
@pytest.mark.parametrize("max_norm", [None, 0.05])
def test_updates_are_those_of_the_whole_batch(options, max_norm):
    params, *batch = problem()

    def trained(micro_batches):
        update = jp.make_update(
            NET,
            LOSS,
            optax.adam(0.1),
            micro_batches=micro_batches,
            max_norm=max_norm,
            skip_nonfinite=max_norm is not None,
            **options,
        )

        def step(carry, _):
            *carry, value = update(*carry, *batch)
            return tuple(carry), value

        return jax.lax.scan(step, (params, update.init(params)), length=3)

    assert relative_error(trained(3), trained(1)) <= 1e-10


@pytest.mark.full
def test_a_fused_update_has_keys_and_masks_in_micro_batches():
    block = jp.chain(jp.Dense(6), jp.Attention(1, causal=False), jp.Dense(2), jp.Dropout(0.5))
    net = jp.chain(jp.repeat(jp.skip(block), 2), jp.Dense(3))
    params, x, target = problem(net, (4, 3, 2))
    mask = jnp.asarray(np.random.default_rng(1).uniform(size=(4, 3)) < 0.5).at[:, 0].set(True)
    ends = []
    for fused in (True, False):
        update = jp.make_update(net, LOSS, optax.sgd(0.1), fused=fused, micro_batches=2)
        start = jax.tree.map(jnp.copy, params)
        ends.append(update(start, update.init(start), x, target, KEY, mask))
    assert relative_error(*ends) <= 1e-12


@pytest.mark.few(1)
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=str)
def test_a_sharded_batch_stays_where_it_is(kind):
    params, *batch = problem(shape=(12, 4))
    whole = jax.jit(jp.value_and_grad(NET, LOSS))(params, *batch)
    mesh = jax.make_mesh((4,), ("d",), axis_types=(kind,))
    with jax.set_mesh(mesh):
        batch = jax.device_put(batch, NamedSharding(mesh, PartitionSpec("d")))
        params = jax.device_put(params, NamedSharding(mesh, PartitionSpec()))
        f = jax.jit(jp.value_and_grad(NET, LOSS, micro_batches=3))
        program = f.lower(params, *batch).compile()
    assert relative_error(jax.device_get(program(params, *batch)), whole) <= 1e-12
    for moving in ("all-gather", "all-to-all", "collective-permute"):
        assert moving not in program.as_text()


@pytest.mark.full
def test_under_shard_map():
    args = problem(shape=(12, 4))
    mesh = jax.make_mesh((4,), ("d",), axis_types=(AxisType.Auto,))
    all_of, shared = PartitionSpec("d"), PartitionSpec()
    f = jp.quantities(NET, LOSS, micro_batches=3, grads=jp.Gradient(), norms=jp.SqNorms())

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
        jp.value_and_grad(NET, LOSS, micro_batches=4)(*args)
    with pytest.raises(ValueError, match=r"float64\[6,4\], int64\[4\]"):
        jp.value_and_grad(NET, LOSS, micro_batches=2)(params, x, target[:4])
    with pytest.raises(ValueError, match="the batch is empty"):
        jp.value_and_grad(NET, LOSS, micro_batches=2)(params, x[:0], target[:0])
    for wrong in (2.0, True, "2"):
        with pytest.raises(TypeError, match="micro_batches is a whole number, not"):
            jp.variance(NET, LOSS, micro_batches=wrong)
        with pytest.raises(TypeError, match="micro_batches is a whole number, not"):
            jp.make_update(NET, LOSS, optax.sgd(0.1), micro_batches=wrong)
    with pytest.raises(ValueError, match="micro_batches is at least 1, not 0"):
        jp.value_and_grad(NET, LOSS, micro_batches=0)
    with pytest.raises(ValueError, match="a noise_multiplier needs a key"):
        jp.clipped_grad(NET, LOSS, **NOISE, micro_batches=2)(*args)
    with pytest.raises(ValueError, match=r"Gram\(\) is of pairs .* micro-batches never meet"):
        jp.gram(NET, LOSS, micro_batches=2)
    with pytest.raises(TypeError, match="value_and_grad is called with micro_batches="):
        jp.make_update(
            NET,
            LOSS,
            optax.sgd(0.1),
            micro_batches=2,
            value_and_grad=lambda net, loss: jp.clipped_grad(net, loss, 1.0),
        )


class Counts(jp.Quantity):
    """A user's quantity that has no mean."""

    def take(self, params, forms, examples):
        return jp.Total(jnp.int64(1))


class Pairs(jp.Quantity):
    """A user's quantity on pairs of examples that does not say so."""

    def take(self, params, forms, examples):
        return jp.Total(jnp.zeros((examples.number, examples.number)))


@pytest.mark.parametrize(
    ("quantity", "error", "words"),
    [
        (Counts(), TypeError, r"result.* is int64, which has no mean"),
        (Pairs(), ValueError, r"is \(6, 6\) for the batch and \(3, 3\) for one of its 2"),
    ],
)
def test_a_quantity_that_is_no_mean_is_found_out(quantity, error, words):
    with pytest.raises(error, match=words):
        jp.quantities(NET, LOSS, micro_batches=2, it=quantity)(*problem())


def test_a_batch_coupled_layer_raises():
    net = jp.chain(jp.Dense(3), jp.BatchNorm())
    for make in (
        lambda: jp.value_and_grad(net, LOSS, micro_batches=2),
        lambda: jp.make_update(net, LOSS, optax.sgd(0.1), micro_batches=2),
        lambda: jp.make_update(net, LOSS, optax.sgd(0.1), micro_batches=2, fused=True),
    ):
        with pytest.raises(ValueError, match=r"BatchNorm\(\)\) couples the examples of a batch"):
            make()
    args = problem(net)
    evaluated = jp.inference_mode(net)
    got = jp.value_and_grad(evaluated, LOSS, micro_batches=2)(*args)
    assert relative_error(got, jp.value_and_grad(evaluated, LOSS)(*args)) <= 1e-12
