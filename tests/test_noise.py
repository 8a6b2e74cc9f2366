"""The noise scale: of chosen layers, over devices, over steps, and along with an update."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracles
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from table import Row, at, normal, relative_error

import jaxprop as jp
from jaxprop.core.where import of_layers
from jaxprop.quantity import NoiseAverage, NoiseParts

BLOCK = jp.chain(
    jp.skip(jp.chain(jp.LayerNorm(), jp.Dense(5), jp.Tanh(), jp.Dense(4))),
    jp.skip(jp.chain(jp.RMSNorm(), jp.Dense(4))),
)
NET = jp.chain(jp.Dense(4), jp.repeat(BLOCK, 2), jp.cast(jp.LayerNorm(), float), jp.Dense(3))
NORMS = (jp.LayerNorm, jp.RMSNorm)
LOSS = jp.CrossEntropy()
WEIGHTS = np.array([1.0, 0, 3, 2, 0.5, 1, 0, 0])


def problem(net=NET, examples=8):
    params, x = at(Row(net, normal(examples, 3, 2)))
    target = np.random.default_rng(2).integers(0, 3, (examples, 3))
    return net, LOSS, params, x, jax.device_put(target)


def parts_of(grads, weights=None):
    """Both parts over all leaves by their definition, from each example's gradient (N, ...)."""
    flat = jnp.concatenate([leaf.reshape(len(leaf), -1) for leaf in jax.tree.leaves(grads)], 1)
    share = jnp.ones(len(flat)) if weights is None else jnp.asarray(weights)
    share = share[:, None] / share.sum()
    mean, of_mean = (share * flat).sum(0), (share**2).sum()
    trace = (share * (flat - mean[None]) ** 2).sum() / (1 - of_mean)
    return NoiseParts(trace, (mean**2).sum() - trace * of_mean)


def of_norms(grads):
    _, (first, second), last, _ = grads
    return first[0], second[0], last


def is_parts(node):
    return isinstance(node, NoiseParts)


def test_the_params_of_chosen_layers_keep_their_places():
    net = jp.chain(jp.Dense(4), jp.skip(jp.chain(jp.LayerNorm(), jp.Dense(4))))
    params, _ = at(Row(net, normal(2, 3)))
    first, (norm, last) = of_layers(jp.Dense, net, params)
    assert (first, norm, last) == (params[0], jp.NormParams((), ()), params[1][1])


def test_the_scale_does_not_depend_on_what_sums_are_divided_by():
    args = problem(jp.Dense(3))
    f = jax.jit(jp.noise_scale(*args[:2]))
    got, want = (f(*args[2:], divisor=given) for given in (20.0, 8.0))
    np.testing.assert_allclose(got, want, rtol=1e-12)


@pytest.mark.full
@pytest.mark.parametrize(
    ("where", "chosen"),
    [
        (NORMS, of_norms),
        (jp.Dense, lambda g: (g[0], g[1][0][1], g[1][0][3], g[1][1][1], g[3])),
        (lambda layer: isinstance(layer, NORMS), of_norms),
        ((1, 1), lambda g: g[1][1]),
        ("(scale|bias)$", of_norms),
        ((0, "w"), lambda g: g[0].w),
    ],
    ids=["classes", "a class", "a predicate", "a path", "an expression", "the path of a param"],
)
def test_of_chosen_layers_it_is_that_of_their_params_alone(where, chosen):
    net, loss, *args = problem()
    each = jax.jit(oracles.per_example_grads(net, loss))(*args)
    for micro_batches, given in ((1, {}), (4, {"weights": jnp.asarray(WEIGHTS)})):
        f = jp.quantities(
            net,
            loss,
            whole=jp.NoiseScale(parts=True, where=where),
            each=jp.NoiseScale(per_param=True, where=where),
            micro_batches=micro_batches,
        )
        got = jax.jit(f)(*args, **given)
        want = parts_of(chosen(each), given.get("weights"))
        assert relative_error(got["whole"], want) <= 1e-10
        of_params = jax.tree.leaves(got["each"], is_leaf=is_parts)
        assert len(of_params) == len(jax.tree.leaves(chosen(each)))
        assert relative_error(sum(one.trace.sum() for one in of_params), want.trace) <= 1e-10
    ratio = jax.jit(jp.noise_scale(net, loss, where=where))(*args)
    want = parts_of(chosen(each))
    assert relative_error(ratio, want.trace / want.square) <= 1e-10


@pytest.mark.full
def test_in_shared_and_recomputed_layers_too():
    inner = jp.chain(jp.LayerNorm(), jp.Dense(2), jp.Tanh())
    net, loss, *args = problem(jp.chain(jp.shared(inner, 2), jp.recompute(inner), jp.Dense(3)))
    each = oracles.per_example_grads(net, loss)(*args)
    got = jax.jit(jp.noise_scale(net, loss, where=jp.LayerNorm, parts=True))(*args)
    assert relative_error(got, parts_of((each[0][0], each[1][0]))) <= 1e-10


@pytest.mark.full
def test_of_a_function_by_the_paths_of_its_params():
    def fn(params, x):
        for layer in params["layers"]:
            x = (x - x.mean(-1, keepdims=True)) * layer["norm"]["scale"][None, None]
            x = jnp.tanh(x @ layer["w"])
        return x

    rng, x = np.random.default_rng(0), jnp.asarray(normal(4, 3, 5))
    layer = {"norm": {"scale": jnp.asarray(rng.normal(size=5))}, "w": jnp.asarray(normal(5, 5))}
    params = {"layers": [layer, jax.tree.map(lambda leaf: leaf / 2, layer)]}
    args = params, x, jnp.asarray(rng.integers(0, 5, (4, 3)))
    net = jp.function(fn)
    grads = jp.per_example_grads(net, LOSS)(*args)["layers"]
    for where, chosen in (
        ("norm", [layer["norm"] for layer in grads]),
        ("layers/1/norm/scale", grads[1]["norm"]),
        (("layers", 0), grads[0]),
        (("layers", 1, "w"), grads[1]["w"]),
    ):
        got = jp.noise_scale(net, LOSS, where=where, parts=True)(*args)
        assert relative_error(got, parts_of(chosen)) <= 1e-10, where

    def scanned(params, x):
        return jax.lax.scan(lambda x, layer: (fn({"layers": [layer]}, x), None), x, params)[0]

    stack = jax.tree.map(lambda *each: jnp.stack(each), *params["layers"])
    got = jp.noise_scale(jp.function(scanned), LOSS, where="norm", parts=True)(stack, *args[1:])
    assert relative_error(got, parts_of([layer["norm"] for layer in grads])) <= 1e-10
    with pytest.raises(ValueError, match="select params by path"):
        jp.noise_scale(net, LOSS, where=jp.LayerNorm)(*args)


def dots(f, *args):
    return jax.jit(f).lower(*args).compile().as_text().count(" dot(")


def test_that_of_normalizations_costs_no_product_more_than_the_gradient():
    net, loss, *args = problem()
    grads = jp.Gradient()
    alone = dots(jp.quantities(net, loss, grads=grads), *args)
    of_norms = jp.quantities(net, loss, grads=grads, noise=jp.NoiseScale(where=NORMS))
    assert dots(of_norms, *args) == alone
    assert dots(jp.quantities(net, loss, noise=jp.NoiseScale(where=NORMS)), *args) < alone


def mesh_of(kind, devices=8):
    return jax.make_mesh((devices,), ("data",), axis_types=(kind,))


@pytest.mark.full
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=str)
@pytest.mark.parametrize("weights", [None, WEIGHTS], ids=["no weights", "weights"])
def test_of_a_sharded_batch_it_is_that_of_the_whole(kind, weights):
    net, loss, params, x, target = problem()
    given = {} if weights is None else {"weights": jnp.asarray(weights)}
    f = jax.jit(
        jp.quantities(
            net,
            loss,
            whole=jp.NoiseScale(parts=True),
            each=jp.NoiseScale(per_param=True, where=NORMS),
        )
    )
    want = f(params, x, target, **given)
    mesh = mesh_of(kind)
    split = NamedSharding(mesh, PartitionSpec("data"))
    whole = NamedSharding(mesh, PartitionSpec())
    with jax.set_mesh(mesh):
        placed = jax.device_put((x, target, given), split)
        got = f(jax.device_put(params, whole), *placed[:2], **placed[2])
    assert relative_error(got, want) <= 1e-10


@pytest.mark.full
@pytest.mark.parametrize("micro_batches", [1, 2])
@pytest.mark.parametrize(
    "given",
    [{}, {"weights": WEIGHTS}, {"weights": WEIGHTS, "divisor": 3.0}, {"divisor": 3.0}],
    ids=lambda given: " and ".join(given) or "plain",
)
def test_in_shard_map_the_devices_means_are_added_up(given, micro_batches):
    """Some devices have only examples of weight 0, and so has one micro-batch of another device."""
    devices = 8 // micro_batches
    net, loss, params, x, target = problem()
    asked = {
        "ratio": jp.NoiseScale,
        "whole": functools.partial(jp.NoiseScale, parts=True),
        "norms": functools.partial(jp.NoiseScale, parts=True, where=NORMS),
        "each": functools.partial(jp.NoiseScale, per_param=True),
    }
    want = jp.quantities(net, loss, **{name: of() for name, of in asked.items()})
    divisor = {name: value for name, value in given.items() if name == "divisor"}
    weights = jnp.asarray(given.get("weights", np.ones(8)))
    f = jp.quantities(
        net,
        loss,
        micro_batches=micro_batches,
        **{name: of(axis_name="data") for name, of in asked.items()},
    )

    def of_device(params, x, target, weights):
        own = {"weights": weights} if "weights" in given else {}
        result = f(params, x, target, **own, **divisor)
        del result["value"]
        return result

    batch = PartitionSpec("data")
    mapped = jax.shard_map(
        of_device,
        mesh=mesh_of(AxisType.Auto, devices),
        in_specs=(PartitionSpec(), batch, batch, batch),
        out_specs=PartitionSpec(),
    )
    got = jax.jit(mapped)(params, x, target, weights)
    expected = want(params, x, target, **({"weights": weights} if "weights" in given else {}))
    del expected["value"]
    assert relative_error(got, expected) <= 1e-10


@pytest.mark.full
@pytest.mark.usefixtures("standard_promotion")
def test_in_shard_map_it_comes_along_with_an_update():
    net, loss, params, x, target = problem()
    batch = PartitionSpec("data")

    def update(axis_name):
        also = {"noise": jp.NoiseScale(parts=True, axis_name=axis_name)}
        make = functools.partial(jp.value_and_grad, also=also)
        return jp.make_update(
            net, loss, optax.sgd(0.1), value_and_grad=make, aux=True, donate=False
        )

    def of_device(*args):
        divisor = len(target)
        params, _, (value, aux) = update("data")(*args, divisor=divisor)
        return params, jax.lax.psum(value, "data"), aux.also["noise"]

    mapped = jax.shard_map(
        of_device,
        mesh=mesh_of(AxisType.Auto, 4),
        in_specs=(PartitionSpec(), PartitionSpec(), batch, batch),
        out_specs=PartitionSpec(),
    )
    state = update(None).init(params)
    got = jax.jit(mapped)(params, state, x, target)
    new, _, (value, aux) = update(None)(params, state, x, target)
    assert relative_error(got, (new, value, aux.also["noise"])) <= 1e-10


@pytest.mark.full
def test_without_an_axis_each_device_has_its_own_whose_parts_have_a_mean():
    net, loss, params, x, target = problem()
    f = jp.noise_scale(net, loss, parts=True)
    batch = PartitionSpec("data")

    def of_device(params, x, target):
        own = f(params, x, target)
        return jax.tree.map(lambda part: part[None], own), jax.lax.pmean(own, "data")

    mapped = jax.shard_map(
        of_device,
        mesh=mesh_of(AxisType.Auto, 4),
        in_specs=(PartitionSpec(), batch, batch),
        out_specs=(batch, PartitionSpec()),
    )
    own, mean = jax.jit(mapped)(params, x, target)
    want = [f(params, x[i : i + 2], target[i : i + 2]) for i in range(0, 8, 2)]
    assert relative_error(own, jax.tree.map(lambda *each: jnp.stack(each), *want)) <= 1e-10
    assert relative_error(mean, jax.tree.map(lambda *each: sum(each) / 4, *want)) <= 1e-10


@pytest.mark.usefixtures("standard_promotion")
def test_averages_are_those_of_adam_s_moments_and_their_ratio_is_of_both():
    rng = np.random.default_rng(0)
    steps = [NoiseParts(*jnp.asarray(rng.normal(3, 1, 2))) for _ in range(5)]
    average = NoiseAverage(0.8)
    state, ema = average.init(), optax.ema(0.8, debias=True)
    of_optax = ema.init(steps[0])
    for parts in steps:
        state = average.update(state, parts)
        want, of_optax = ema.update(parts, of_optax)
        assert relative_error(average.parts(state), want) <= 1e-12
        assert relative_error(average.value(state), want.trace / want.square) <= 1e-12
    skipped = average.update(state, NoiseParts(jnp.inf, jnp.nan))
    assert relative_error(skipped, state) == 0
    assert jnp.isnan(average.value(average.init()))
    with pytest.raises(ValueError, match="NoiseAverage: decay is below 1"):
        NoiseAverage(1.0)


def test_averages_of_each_param_in_a_scan():
    net, loss, params, x, target = problem()
    noise = jp.quantities(net, loss, each=jp.NoiseScale(per_param=True, where=NORMS))
    average = NoiseAverage(0.5)
    like = jax.eval_shape(noise, params, x, target)["each"]

    @jax.jit
    def steps(params, batches):
        def step(state, batch):
            parts = noise(params, *batch)["each"]
            return average.update(state, parts), parts

        return jax.lax.scan(step, average.init(like), batches)

    batches = jax.tree.map(lambda leaf: leaf.reshape(2, 4, *leaf.shape[1:]), (x, target))
    state, each = steps(params, batches)
    want = jax.tree.map(lambda part: (part[0] + 2 * part[1]) / 3, each)
    assert relative_error(average.parts(state), want) <= 1e-12
    ratio = jax.tree.map(lambda part: part.trace / part.square, want, is_leaf=is_parts)
    assert relative_error(average.value(state), ratio) <= 1e-12
    assert ratio[1][0][0].scale.shape == (2,)


def test_mistakes_are_said():
    net, loss, *args = problem()
    with pytest.raises(ValueError, match="is no regular expression"):
        jp.NoiseScale(where="(")
    for where in (3, ["w"]):
        with pytest.raises(TypeError, match="where is a predicate of a layer"):
            jp.NoiseScale(where=where)
    for where in (jp.Conv, (7, 7), "kernel", jp.Gelu):
        with pytest.raises(
            ValueError, match="matches no layer of the net with params that are learned"
        ):
            jax.jit(jp.noise_scale(net, loss, where=where))(*args)
    with pytest.raises(TypeError, match="axis_name is a name, or several, not 3"):
        jp.noise_scale(net, loss, axis_name=3)
    with pytest.raises(NameError, match="data"):
        jax.jit(jp.noise_scale(net, loss, axis_name="data"))(*args)


def test_an_average_says_what_it_takes():
    average = jp.NoiseAverage()
    with pytest.raises(TypeError, match=r"NoiseAverage: parts are of NoiseScale\(parts=True\)"):
        average.update(average.init(), 3.0)
