"""How much each example counts in a mean: weights, padding, a divisor; and dropped examples."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from table import relative_error
from test_quantities import Mixed, Plain

import jaxprop as jp
from jaxprop.core.arrays import rounded

KEY = jax.random.key(0)
WEIGHTS = np.array([1, 0, 3, 2])
TIMES = np.repeat(np.arange(4), WEIGHTS)
CLOSE = 1e-10


def normal(*shape, seed=1):
    return jax.device_put(np.random.default_rng(seed).normal(size=shape))


NETS = {
    "dense": (jp.chain(jp.Dense(6), jp.Tanh(), jp.Dense(3)), normal(4, 5)),
    "attention": (
        jp.chain(jp.Dense(4), jp.repeat(jp.skip(jp.chain(jp.Dense(12), jp.Attention(2))), 2)),
        normal(4, 3, 3),
    ),
    "images": (
        jp.chain(jp.Conv(4), jp.Relu(), jp.AvgPool(), jp.Flatten(), jp.Dense(3)),
        normal(4, 4, 4, 2),
    ),
    "table": (
        jp.tied(jp.Embedding(7, 4), jp.chain(jp.Positions(5), jp.Dense(4), jp.LayerNorm())),
        jax.device_put(np.random.default_rng(3).integers(0, 7, (4, 5))),
    ),
    "plain": (jp.chain(Plain(4), Mixed(), jp.Dense(3)), normal(4, 2, 3)),
}
nets = pytest.mark.parametrize("name", NETS)


@functools.partial(jax.jit, static_argnums=0)
def init(net, x):
    return jax.tree.map(lambda p: jnp.asarray(p, float), net.init(KEY, x))


def problem(name):
    net, x = NETS[name]
    params = init(net, x)
    y = jax.eval_shape(net.forward, params, x)[0]
    target = np.random.default_rng(2).integers(0, y.shape[-1], y.shape[:-1])
    return net, jp.CrossEntropy(), params, x, jax.device_put(target)


def makers(net):
    factored = not any(isinstance(layer, Plain | Mixed) for layer in getattr(net, "layers", ()))
    asked = {
        "grads": jp.Gradient(),
        "second": jp.SecondMoment(),
        "variance": jp.Variance(),
        "noise": jp.NoiseScale(),
        "clipped": jp.Clipped(0.3),
        "by_layer": jp.Clipped(0.1, per_layer=True),
        "twice": jp.Clipped(0.3, two_pass=True),
        "diag": jp.DiagGGN(),
        **({"kfac": jp.KroneckerFactors()} if factored and not is_table(net) else {}),
    }
    return asked


def is_table(net):
    return type(net).__name__ == "Tied"


def spoilt(x):
    """x with NaN, or an id that no table has, in the example of weight 0."""
    return x.at[1].set(jnp.nan if jnp.issubdtype(x.dtype, jnp.floating) else -1)


@pytest.mark.full
@pytest.mark.few(2)
@nets
def test_a_whole_weight_is_so_many_copies_and_0_is_none(name):
    """An integer weight counts copies, and what an example of weight 0 holds is ignored."""
    net, loss, params, x, target = problem(name)
    f = jp.quantities(net, loss, **makers(net))
    weighted = jax.jit(f)(params, spoilt(x), target, weights=jnp.asarray(WEIGHTS))
    copied = jax.jit(f)(params, x[TIMES], target[TIMES])
    for asked in weighted.keys() - {"noise"}:  # it assumes independent examples
        assert relative_error(weighted[asked], copied[asked]) <= CLOSE, asked


HELD = {  # targets with what padding may hold
    "class": (jp.CrossEntropy(), jnp.array([0, 99, 1, 2])),
    "no distribution": (jp.CrossEntropy(), jax.nn.one_hot(jnp.array([0, -1, 1, 2]), 3)),
    "nan": (jp.HalfSquaredError(), jnp.ones((4, 3)).at[1].set(jnp.nan)),
    "7": (jp.BinaryCrossEntropy(), jnp.ones((4, 3)).at[1].set(7)),
}


@pytest.mark.full
@pytest.mark.few(4)
@pytest.mark.parametrize("held", HELD)
@pytest.mark.parametrize("jit", [False, True])
def test_what_padding_holds_in_the_target_is_nowhere(held, jit):
    """It is in no error message and in no derivative, by hand or by autodiff."""
    net, _, params, x, _ = problem("dense")
    loss, target = HELD[held]
    real = jnp.array([0, 2, 3])
    want = jp.value_and_grad(net, loss)(params, x[real], target[real])
    for f in (jp.value_and_grad(net, loss), jp.autodiff(net, loss)):
        f = jax.jit(f) if jit else f
        got = f(params, spoilt(x), target, weights=jnp.array([1, 0, 1, 1]))
        assert relative_error(got, want) <= CLOSE


@pytest.mark.full
def test_what_padding_holds_in_x_is_nowhere():
    """Also for ids, and for a layer that has no derivative at zeros."""
    ids = jnp.array([[0, 1], [99, 99], [2, 3]])
    for net, x in (
        (jp.chain(jp.Embedding(7, 4), jp.Dense(3)), ids),
        (jp.chain(jp.Dense(4), Unit(), jp.Dense(3)), normal(3, 2, 4)),
    ):
        params, target = net.init(KEY, x), jnp.zeros((3, 2), int)
        asked = {"grads": jp.Gradient(), "norms": jp.SqNorms(), "diag": jp.DiagGGN()}
        f = jp.quantities(net, jp.CrossEntropy(), y=jp.Output(), **asked)
        got = f(params, x, target, weights=jnp.array([True, False, True]))
        want = f(params, x[::2], target[::2])
        for name in ("y", "norms"):
            assert relative_error(got[name][::2], want[name]) <= CLOSE
            assert not got[name][1].any()
        for name in ("value", "grads", "diag"):
            assert relative_error(got[name], want[name]) <= CLOSE


def test_in_a_traced_program_what_cannot_weigh_makes_nan():
    net, loss, params, x, target = problem("dense")
    for given in (
        {"weights": jnp.array([1.0, -1, 0, 1]), "divisor": 2},
        {"weights": jnp.array([1.0, -1, 0, 3])},
        {"divisor": -2},
    ):
        for make in (jp.value_and_grad, jp.autodiff):
            result = jax.jit(make(net, loss))(params, x, target, **given)
            assert all(np.isnan(leaf).any() for leaf in jax.tree.leaves(result))


class Unit(jp.Layer):
    """y = x / |x|, which has no derivative at 0."""

    def forward(self, params, x):
        return x / jnp.linalg.norm(x, axis=-1, keepdims=True), x

    def backward(self, params, x, ct):
        return (), jax.vjp(lambda x: self.forward(params, x)[0], x)[1](ct)[0]


EMPTY = NETS | {
    "groups": (
        jp.chain(jp.Conv(4), jp.GroupNorm(2), jp.ConvTranspose(4), jp.GlobalAvgPool()),
        NETS["images"][1],
    ),
    "few keys": (jp.chain(jp.Dense(8), jp.Attention(2, kv_heads=1)), normal(4, 3, 3)),
    "through time": (jp.chain(jp.Lstm(4), jp.Gru(3, output="last")), normal(4, 3, 3)),
    "shared": (jp.chain(jp.shared(jp.Dense(3), 2), jp.LayerNorm()), normal(4, 3)),
}


@pytest.mark.full
@pytest.mark.few(2)
@pytest.mark.parametrize("name", EMPTY)
def test_of_an_empty_batch_every_mean_is_zero(name):
    net, x = EMPTY[name]
    params = net.init(KEY, x)
    y = jax.eval_shape(net.forward, params, x)[0]
    target = jnp.zeros((0, *y.shape[1:-1]), int)
    asked = makers(net) if name in NETS else {"second": jp.SecondMoment(), "kept": jp.Clipped(1)}
    asked = {"gram": jp.Gram(), **asked}
    for name_of_none in ("noise", "variance"):
        asked.pop(name_of_none, None)
    f = jax.jit(jp.quantities(net, jp.CrossEntropy(), **asked))
    result = f(params, x[:0], target, divisor=4)
    assert result.pop("gram").shape == (0, 0)
    kfac = result.pop("kfac", ())
    assert not any(leaf.any() for leaf in jax.tree.leaves(result))
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(kfac))
    by_jax = jp.autodiff(net, jp.CrossEntropy())(params, x[:0], target, divisor=4)
    assert not any(leaf.any() for leaf in jax.tree.leaves(by_jax))


@pytest.mark.full
@pytest.mark.parametrize("name", ["dense", "table"])
def test_in_micro_batches_and_on_devices_weights_are_those_of_the_whole_batch(name):
    net, loss, params, x, target = problem(name)
    given = {"weights": jnp.asarray(WEIGHTS), "divisor": 5.0}
    asked = makers(net)
    del asked["variance"]  # which a sum that is no mean does not have
    whole = jax.jit(jp.quantities(net, loss, **asked))(params, x, target, **given)
    halves = jp.quantities(net, loss, micro_batches=2, **asked)
    halves = jax.jit(halves)(params, x, target, **given)
    assert relative_error(halves, whole) <= CLOSE

    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))
    split = NamedSharding(mesh, PartitionSpec("data"))
    placed = jax.device_put((x, target, given["weights"]), split)
    f = jax.jit(jp.value_and_grad(net, loss))
    on_devices = f(params, *placed[:2], weights=placed[2])
    alone = f(params, x, target, weights=given["weights"])
    assert relative_error(on_devices, alone) <= CLOSE

    def summed(params, x, target, weights):
        total = jax.lax.psum(weights.sum(), "data")
        value, grads = jp.value_and_grad(net, loss)(
            params, x, target, weights=weights, divisor=total
        )
        return jax.lax.psum(value, "data"), grads

    spec = PartitionSpec("data")
    mapped = jax.shard_map(
        summed,
        mesh=mesh,
        in_specs=(PartitionSpec(), spec, spec, spec),
        out_specs=PartitionSpec(),
    )
    weights = given["weights"].astype(float)
    assert relative_error(jax.jit(mapped)(params, x, target, weights), alone) <= CLOSE


@pytest.mark.few(1)
@nets
def test_a_divisor_scales_every_mean(name):
    net, loss, params, x, target = problem(name)
    f = jp.quantities(net, loss, grads=jp.Gradient(), kept=jp.Clipped(0.3), diag=jp.DiagGGN())
    mean = jax.jit(f)(params, x, target)
    scaled = jax.jit(functools.partial(f, divisor=8))(params, x, target)
    twice = jax.tree.map(lambda leaf: 2 * np.asarray(leaf), scaled)
    assert relative_error(twice, mean) <= CLOSE


@pytest.mark.full
def test_curvature_and_the_noise_scale_have_a_scale_of_their_own_under_a_divisor():
    """The Kronecker product scales as the block does, and the noise scale does not change."""
    net, loss, params, x, target = problem("dense")
    f = jp.quantities(net, loss, kfac=jp.KroneckerFactors(), noise=jp.NoiseScale())
    for given in ({}, {"weights": jnp.asarray(WEIGHTS)}):
        mean = f(params, x, target, **given)
        total = 4 if not given else 6
        scaled = f(params, x, target, divisor=jnp.asarray(2 * total), **given)
        assert relative_error(scaled["noise"], mean["noise"]) <= CLOSE
        for a, b in zip(*map(jax.tree.leaves, (scaled["kfac"], mean["kfac"])), strict=True):
            is_input = relative_error(a, b) <= CLOSE
            assert is_input or relative_error(2 * a, b) <= CLOSE
        (first, _, _) = scaled["kfac"]
        assert relative_error(first.w.a, mean["kfac"][0].w.a) <= CLOSE
        assert relative_error(2 * first.w.b, mean["kfac"][0].w.b) <= CLOSE


@pytest.mark.full
def test_the_noise_scale_knows_how_many_examples_weights_leave():
    net, loss, params, x, target = problem("dense")
    f = jp.noise_scale(net, loss)
    for weights in (jnp.full(4, 2.0), jnp.full(4, 1 / 4)):
        assert relative_error(f(params, x, target, weights=weights), f(params, x, target)) <= CLOSE
    real = jnp.array([True, False, True, True])
    kept = f(params, x[real], target[real])
    assert relative_error(f(params, x, target, weights=real), kept) <= CLOSE


@pytest.mark.full
@pytest.mark.parametrize("micro_batches", [2, 4])
def test_a_micro_batch_of_padding_counts_nothing(micro_batches):
    net, loss, params, x, target = problem("dense")
    asked = {"noise": jp.NoiseScale(), "variance": jp.Variance()}
    weights = jnp.array([1.0, 2, 0, 0] if micro_batches == 4 else [1.0, 0, 2, 0])
    whole = jp.quantities(net, loss, **asked)(params, x, target, weights=weights)
    parts = jp.quantities(net, loss, micro_batches=micro_batches, **asked)
    assert relative_error(parts(params, x, target, weights=weights), whole) <= CLOSE


@pytest.mark.full
def test_the_noise_scale_of_weights_is_of_two_estimates_without_bias():
    """Their means over all 3^4 equally likely batches of 4 from 3 examples are the true values."""
    net, loss, params, x, target = problem("dense")
    weights = jnp.array([1.0, 0.5, 3, 2])
    n, share = weights.sum() ** 2 / (weights**2).sum(), weights / weights.sum()
    each = jp.per_example_grads(net, loss)(params, x[:3], target[:3])
    g = jnp.concatenate([leaf.reshape(3, -1) for leaf in jax.tree.leaves(each)], 1)
    batches = jnp.stack(jnp.meshgrid(*[jnp.arange(3)] * 4), -1).reshape(-1, 4)
    mean = jnp.einsum("bni,n->bi", g[batches], share)
    m, square = (g[batches] ** 2).sum(-1) @ share, (mean**2).sum(-1)
    traces, squares = (m - square) * n / (n - 1), (n * square - m) / (n - 1)
    center = g.mean(0, keepdims=True)
    assert relative_error(squares.mean(), (center**2).sum()) <= CLOSE
    assert relative_error(traces.mean(), ((g - center) ** 2).sum(-1).mean()) <= CLOSE
    rows = batches[5]
    got = jp.noise_scale(net, loss)(params, x[rows], target[rows], weights=weights)
    assert relative_error(got, traces[5] / squares[5]) <= CLOSE


@pytest.mark.full
def test_what_is_of_an_example_alone_is_its_own_and_0_for_padding():
    net, loss, params, x, target = problem("dense")
    weights = jnp.array([True, False, True, True])
    asked = {
        "grads": jp.PerExampleGrads(),
        "norms": jp.SqNorms(),
        "gram": jp.Gram(),
        "root": jp.GGNRoot(),
    }
    f = jp.quantities(net, loss, **asked)
    padded, own = f(params, spoilt(x), target, weights=weights), f(params, x, target)
    assert relative_error(padded["norms"], jnp.where(weights, own["norms"], 0)) <= CLOSE
    both = weights[:, None] & weights[None]
    assert relative_error(padded["gram"], jnp.where(both, own["gram"], 0)) <= CLOSE
    for name, axis in (("grads", 0), ("root", 1)):
        for got, want in zip(*map(jax.tree.leaves, (padded[name], own[name])), strict=True):
            got, want = (jnp.moveaxis(leaf, axis, 0) for leaf in (got, want))
            assert relative_error(got[weights], want[weights]) <= CLOSE
            assert not got[1].any()


def test_the_mean_over_all_real_tokens():
    """The mean over 5 real positions, where a mean of means would weigh the last one by 1/2."""
    net, x = jp.chain(jp.Dense(7)), normal(2, 4, 5)
    params, target = init(net, x), np.array([[1, 2, 3, 4], [5, -1, -1, -1]])
    tokens = (target >= 0).sum(1)

    def over_tokens(params):
        y, _ = net.forward(params, x)
        each = -jax.nn.log_softmax(y)
        each = jnp.take_along_axis(each, np.maximum(target, 0)[..., None], -1)[..., 0]
        return jnp.where(target >= 0, each, 0).sum() / 5

    want = jax.jit(jax.value_and_grad(over_tokens))(params)
    got = jax.jit(jp.value_and_grad(net, jp.CrossEntropy()))(params, x, target, weights=tokens)
    assert relative_error(got, want) <= CLOSE


@pytest.mark.full
def test_of_an_empty_poisson_sample_the_noise_is_left():
    net, loss, params, x, target = problem("dense")
    f = jp.clipped_grad(net, loss, 1.0, 2.0)
    value, noise = f(params, x[:0], target[:0], key=KEY, divisor=4)
    padded = f(params, x, target, key=KEY, weights=jnp.zeros(4), divisor=4)
    assert float(value) == 0
    assert relative_error((value, noise), padded) <= CLOSE
    without = jp.clipped_grad(net, loss, 1.0)(params, x[:0], target[:0], divisor=4)[1]
    assert not any(leaf.any() for leaf in jax.tree.leaves(without))
    assert all(leaf.any() for leaf in jax.tree.leaves(noise))
    with pytest.raises(
        ValueError,
        match="the batch is empty: the mean over 0 examples does not exist; give divisor=",
    ):
        f(params, x[:0], target[:0], key=KEY)


def test_noise_is_that_of_the_divisor():
    net, loss, params, x, target = problem("dense")
    weights = np.array([1.0, 0, 1, 1])
    noisy, still = (
        jax.jit(jp.clipped_grad(net, loss, 0.5, noise))(
            params, x, target, key=KEY, weights=weights, divisor=8
        )[1]
        for noise in (2.0, 0.0)
    )
    noisy, still = (
        np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])
        for tree in (noisy, still)
    )
    deviation = 2.0 * 0.5 / 8
    assert 0.75 * deviation < (noisy - still).std() < 1.25 * deviation


@pytest.mark.full
@pytest.mark.parametrize("how", [{"fused": True}, {"micro_batches": 2}, {}], ids=str)
def test_an_update_takes_weights(how):
    net, loss, params, x, target = problem("attention")
    given = {"weights": jnp.asarray(WEIGHTS), "divisor": 3.0}
    results = []
    for options in ({}, how | {"max_norm": 1e-1}, how):
        update = jp.make_update(net, loss, optax.sgd(0.1), donate=False, **options)
        results.append(update(params, update.init(params), spoilt(x), target, **given))
    assert relative_error(results[0], results[2]) <= CLOSE
    value, grads = jp.autodiff(net, loss)(params, spoilt(x), target, **given)
    stepped = jax.tree.map(lambda p, g: p - 0.1 * g, params, grads)
    assert relative_error(results[0][::2], (stepped, value)) <= CLOSE
    moved = jax.tree.map(jnp.subtract, results[1][0], params)
    assert abs(float(optax.tree.norm(moved)) - 0.1 * 0.1) <= 1e-8


@pytest.mark.full
def test_weights_may_be_scanned_and_mapped():
    net, loss, params, x, target = problem("dense")
    rows = jnp.stack([jnp.asarray(WEIGHTS, float), jnp.ones(4), jnp.array([0.0, 0, 1, 0])])
    f = jp.per_example_sq_norms(net, loss)
    g = jp.clipped_grad(net, loss, 0.3)
    each = [(f(params, x, target, weights=w), g(params, x, target, weights=w)) for w in rows]
    each = jax.tree.map(lambda *leaves: jnp.stack(leaves), *each)

    def both(weights):
        return f(params, x, target, weights=weights), g(params, x, target, weights=weights)

    assert relative_error(jax.vmap(both)(rows), each) <= CLOSE
    _, scanned = jax.lax.scan(lambda _, w: (None, both(w)), None, rows)
    assert relative_error(scanned, each) <= CLOSE


@pytest.mark.parametrize(
    ("given", "error", "words"),
    [
        (
            {"weights": jnp.array([1.0, -1, 0, 1])},
            ValueError,
            "weights must be finite and not negative, not -1",
        ),
        ({"weights": jnp.ones(3)}, ValueError, r"one for each of the 4 examples, not float64\[3\]"),
        ({"weights": [1, 1, 1, 1]}, TypeError, "weights are an array of numbers"),
        ({"divisor": 0}, ValueError, "divisor must be positive, not 0"),
        ({"divisor": "4"}, TypeError, "divisor is a number, not '4'"),
    ],
    ids=str,
)
def test_what_cannot_weigh_is_refused(given, error, words):
    net, loss, params, x, target = problem("dense")
    for make in (jp.value_and_grad, jp.autodiff, jp.gram, jp.loss_fn):
        with pytest.raises(error, match=words):
            make(net, loss)(params, x, target, **given)


@pytest.mark.full
def test_a_sum_over_a_divisor_has_no_variance():
    net, loss, params, x, target = problem("dense")
    for micro_batches in (1, 2):
        f = jp.variance(net, loss, micro_batches=micro_batches)
        with pytest.raises(ValueError, match="around the mean of the batch: leave out the divisor"):
            f(params, x, target, divisor=4.0)


class Centered(jp.Layer):
    """A user's layer that couples the examples of a batch and does not say so."""

    def forward(self, params, x):
        return x - x.mean(0, keepdims=True), x[:, :0]

    def backward(self, params, residuals, ct):
        return (), ct - ct.mean(0, keepdims=True)


@pytest.mark.parametrize("make", [jp.value_and_grad, jp.autodiff, jp.loss_fn, jp.gram])
def test_a_layer_that_couples_examples_unsaid_is_found_where_one_is_padding(make):
    net, x = jp.chain(jp.Dense(3), Centered()), normal(4, 5)
    params, target = net.init(KEY, x), jnp.zeros(4, int)
    with pytest.raises(ValueError, match=r"Centered\(\): an example's y depends on the other"):
        make(net, jp.CrossEntropy())(params, x, target, weights=jnp.ones(4))
    update = jp.make_update(net, jp.CrossEntropy(), optax.sgd(0.1), fused=True, donate=False)
    with pytest.raises(ValueError, match=r"Centered\(\): an example's y depends on the other"):
        update(params, update.init(params), x, target, weights=jnp.ones(4))
    with pytest.raises(TypeError, match="divisor is a number, not '3'"):
        update(params, update.init(params), x, target, divisor="3")


def test_a_net_that_couples_examples_takes_no_weights():
    net, x = jp.chain(jp.Dense(3), jp.BatchNorm()), normal(4, 5)
    params = net.init(KEY, x)
    with pytest.raises(ValueError, match="couples the examples of a batch: one that counts"):
        jp.value_and_grad(net, jp.CrossEntropy())(params, x, jnp.zeros(4, int), weights=jnp.ones(4))


@pytest.mark.full
def test_in_half_precision_weights_keep_the_gradients_dtypes():
    for dtype in (jnp.bfloat16, jnp.float16):
        net, loss, params, x, target = problem("dense")
        params, x = rounded((params, x), dtype)
        f = jp.quantities(net, loss, grads=jp.Gradient(), kept=jp.Clipped(0.3))
        got = f(params, x, target, weights=jnp.asarray(WEIGHTS))
        want = f(params, x[TIMES], target[TIMES])
        assert [a.dtype for a in jax.tree.leaves(got)] == [a.dtype for a in jax.tree.leaves(want)]
        assert relative_error(got, want) <= 4e-3


@pytest.mark.full
@pytest.mark.few(1)
@pytest.mark.parametrize("how", [{}, {"two_pass": True}, {"micro_batches": 2}], ids=str)
def test_an_example_that_is_not_finite_is_dropped_where_that_is_asked(how):
    for name in ("dense", "attention", "plain"):
        net, loss, params, x, target = problem(name)
        ill = x.at[1].set(jnp.nan)
        spread = jp.clipped_grad(net, loss, 0.3, **how)(params, ill, target)
        assert all(jnp.isnan(leaf).any() for leaf in jax.tree.leaves(spread))
        f = jp.clipped_grad(net, loss, 0.3, drop_nonfinite=True, **how)
        weights = jnp.array([1.0, 0, 1, 1])
        want = jp.clipped_grad(net, loss, 0.3)(params, x, target, weights=weights, divisor=4)
        assert relative_error(jax.jit(f)(params, ill, target), want) <= CLOSE
        healthy = jp.clipped_grad(net, loss, 0.3, **how)(params, x, target)
        assert relative_error(f(params, x, target), healthy) <= CLOSE


def test_of_a_layer_whose_part_is_not_finite_that_part_is_dropped():
    net, loss, params, x, target = problem("dense")
    f = jp.clipped_grad(net, loss, 0.3, per_layer=True, drop_nonfinite=True)
    value, grads = jax.jit(f)(params, x.at[1].set(jnp.nan), target)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((value, grads)))
