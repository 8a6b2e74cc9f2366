"""Scans over layers of params, walked layer by layer; and equal cotangents that are kept once."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from functions import drawn, hold, hold_leaves, normal
from jax.sharding import AxisType, PartitionSpec

import jaxprop as jp
from jaxprop.traced.example import Example
from jaxprop.traced.stages import Layers
from jaxprop.traced.walking import TapeOfLayers

L, N, D = 3, 4, 5
STACK = {"w": jax.ShapeDtypeStruct((L, D, D), float), "b": jax.ShapeDtypeStruct((L, D), float)}
ENDS = {"in": jax.ShapeDtypeStruct((D, D), float), "out": jax.ShapeDtypeStruct((D, 2), float)}
PARAMS = drawn({"ends": ENDS, "blocks": STACK})
X = normal(N, D)


def layer(p, h):
    return h + jnp.tanh(h @ p["w"] + p["b"][None])


def through(blocks, h, **options):
    return jax.lax.scan(lambda h, p: (layer(p, h), None), h, blocks, **options)[0]


def plain(params, x):
    h = through(params["blocks"], x @ params["ends"]["in"])
    return h @ params["ends"]["out"]


def backwards(params, x):
    return through(params["blocks"], x, reverse=True)


def unrolled(params, x):
    return through(params["blocks"], x, unroll=2)


def of_remat(params, x):
    block = jax.checkpoint(layer)
    return jax.lax.scan(lambda h, p: (block(p, h), None), x, params["blocks"])[0]


def of_remat_inside(params, x):
    """A scan over checkpointed layers, each with a scan over time."""

    def block(p, h):
        def step(h, x):
            h = jnp.tanh(x @ p["w"] + h + p["b"][None])
            return h, h

        return jax.lax.scan(step, jnp.zeros((len(x), D)), h)[1]

    def step(h, p):
        return jax.checkpoint(block)(p, h), None

    return jnp.swapaxes(jax.lax.scan(step, jnp.swapaxes(x, 0, 1), params["blocks"])[0], 0, 1)


def in_another_dtype(params, x):
    params = jax.tree.map(lambda w: w.astype(jnp.float32).astype(jnp.float64), params)
    return plain(params, x)


@jax.jit
def compiled(params, x):
    return plain(params, x)


def with_a_sum(params, x):
    """A carry that starts as a constant, such as the sum of a router's losses."""

    def step(carry, p):
        h, total = carry
        h = layer(p, h)
        return (h, total + jnp.mean(h**2, axis=1)), jnp.sum(h, axis=-1)

    (h, total), sums = jax.lax.scan(step, (x, jnp.zeros(len(x), x.dtype)), params["blocks"])
    return jnp.concatenate([h, total[:, None], sums.T], axis=1)


def with_constants(params, x):
    """Constants and stacks of the scan, some computed from x and some not."""
    noise = jnp.stack([jnp.sin(x * i) for i in (1.0, 2.0, 3.0)])

    def step(h, given):
        p, noise, rate = given
        return layer(p, h) * rate + noise * gate + shift[None], h[:, 0]

    gate, shift = jax.nn.sigmoid(x), jnp.linspace(0.0, 1.0, D, dtype=x.dtype)
    rates = jnp.linspace(0.5, 1.0, L, dtype=x.dtype)
    h, firsts = jax.lax.scan(step, x, (params["blocks"], noise, rates))
    return jnp.concatenate([h, firsts.T], axis=1)


def twice(params, x):
    """An encoder, and a decoder that uses the encoder's output and x."""
    memory = through(params["blocks"], x)

    def step(h, p):
        return layer(p, h) + memory * 0.1, None

    h, _ = jax.lax.scan(step, x @ params["ends"]["in"], params["decoder"])
    return (h + memory + x) @ params["ends"]["out"]


def with_integers(params, x):
    """A carry of integers computed from x, and ids that are looked up in each layer."""
    ids = jnp.argmax(x, axis=-1)

    def step(carry, p):
        h, ids = carry
        return (layer(p, h) + p["w"][ids], (ids + 1) % D), ids

    (h, ids), seen = jax.lax.scan(step, (x, ids), params["blocks"])
    return h * (1.0 + seen.T.sum(1, keepdims=True).astype(float))


def with_unlearned(params, x):
    """A module with an array that is not learned, also one for each layer."""

    def step(h, p):
        return jnp.tanh(h @ p["w"] + p["mask"][None] * h), None

    h, _ = jax.lax.scan(step, x, params["blocks"])
    return h @ params["fixed"]


def own(params, x):
    """Params in the layers that meet no data in a product, and so have own shares."""

    def step(h, p):
        return jnp.tanh(h @ (p["w"] / jnp.linalg.norm(p["w"]))) * p["b"][None], None

    return jax.lax.scan(step, x, params["blocks"])[0]


def joined(params, x):
    """Two stacks that are concatenated in each layer, as in an LSTM."""

    def step(h, p):
        y = h @ jnp.concatenate([p["a"], p["w"]], axis=1)
        return jnp.tanh(y[:, :D]) + y[:, D:], None

    return jax.lax.scan(step, x, params["blocks"])[0]


TWICE = PARAMS | {"decoder": drawn(STACK, 1)}
UNLEARNED = {
    "blocks": {"w": PARAMS["blocks"]["w"], "mask": jp.Unlearned(normal(L, D, seed=1))},
    "fixed": jp.Unlearned(normal(D, 3, seed=2)),
}
JOINED = {"blocks": {"w": PARAMS["blocks"]["w"], "a": normal(L, D, D, seed=3)}}
BLOCKS = {"blocks": PARAMS["blocks"]}
STAGED = {
    "plain": (plain, PARAMS, X, 1),
    "backwards": (backwards, BLOCKS, X, 1),
    "unrolled by two": (unrolled, BLOCKS, X, 1),
    "of remat": (of_remat, BLOCKS, X, 1),
    "remat of a scan over time": (of_remat_inside, BLOCKS, normal(N, 6, D), 1),
    "in another dtype": (in_another_dtype, jax.tree.map(lambda w: w.astype(float), PARAMS), X, 1),
    "compiled": (compiled, PARAMS, X, 1),
    "with a sum": (with_a_sum, BLOCKS, X, 1),
    "with constants": (with_constants, BLOCKS, X, 1),
    "twice": (twice, TWICE, X, 2),
    "with integers": (with_integers, BLOCKS, X, 1),
    "with what is not learned": (with_unlearned, UNLEARNED, X, 1),
    "own shares": (own, BLOCKS, X, 1),
    "joined": (joined, JOINED, X, 1),
}


def with_a_counter(params, x):
    """A carry that does not depend on the example."""

    def step(carry, p):
        h, i = carry
        return (layer(p, h) * jnp.cos(i), i + 1.0), None

    (h, _), _ = jax.lax.scan(step, (x, 0.0), params["blocks"])
    return h


def half_a_module(params, x):
    """A module with a part that is used outside the scan."""
    h, _ = jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, params["blocks"]["w"])
    return h + params["blocks"]["b"].sum(0)[None]


def also_elsewhere(params, x):
    return through(params["blocks"], x) @ params["blocks"]["w"][0]


def with_a_param_in_each(params, x):
    def step(h, p):
        return layer(p, h) @ params["ends"]["in"], None

    return jax.lax.scan(step, x, params["blocks"])[0]


def made_of_params(params, x):
    """Stacks that are computed from params by more than a cast."""
    return through(jax.tree.map(jnp.sin, params["blocks"]), x)


WHOLE = {
    "with a counter": (with_a_counter, BLOCKS, X),
    "half a module": (half_a_module, BLOCKS, X),
    "also elsewhere": (also_elsewhere, BLOCKS, X),
    "with a param in each": (with_a_param_in_each, BLOCKS | {"ends": {"in": normal(D, D)}}, X),
    "made of params": (made_of_params, BLOCKS, X),
}


def stages(fn, params, x):
    return Example.of(fn, "fn", params, x).stages


def scans(fn, params, x):
    return sum(isinstance(stage, Layers) for stage in stages(fn, params, x))


@pytest.mark.few(1)
@pytest.mark.parametrize("name", STAGED)
def test_a_scan_through_layers_is_walked_layer_by_layer(name):
    fn, params, x, number = STAGED[name]
    assert scans(fn, params, x) == number
    y = jax.eval_shape(fn, jp.core.tree.arrays(params), x)
    target = normal(*y.shape, seed=5)
    owned = "/[bw]$" if name == "own shares" else "/b$"
    tolerance = 1e-6 if name == "in another dtype" else 1e-10
    hold(fn, params, x, target, owned=owned, moments=True, diagonal=True, tolerance=tolerance)


@pytest.mark.few(1)
@pytest.mark.parametrize("name", WHOLE)
def test_what_is_no_scan_through_whole_modules_alone_is_one_stage(name):
    fn, params, x = WHOLE[name]
    assert len(stages(fn, params, x)) == 1
    y = jax.eval_shape(fn, params, x)
    owned = "/[bw]$" if name == "made of params" else "/b$"
    hold(fn, params, x, normal(*y.shape, seed=5), owned=owned, moments=True)


@pytest.mark.full
@pytest.mark.parametrize("fn", [plain, of_remat, with_constants])
def test_its_results_are_those_of_the_scan_as_one(fn):
    """Results for a module as a whole: norms by layer, a fused update, a user's visit."""
    params = PARAMS if fn is plain else BLOCKS
    net, loss = jp.function(fn), jp.HalfSquaredError()
    target = normal(*jax.eval_shape(fn, params, X).shape, seed=5)
    norms = jp.per_example_sq_norms(net, loss, per_layer=True)(params, X, target)
    assert norms["blocks"].shape == (N,)
    each = jp.per_example_grads(net, loss)(params, X, target)
    parts = jax.tree.map(lambda g: (g.reshape(N, -1) ** 2).sum(1), each["blocks"])
    np.testing.assert_allclose(norms["blocks"], parts["w"] + parts["b"], rtol=1e-12)

    def visit(step):
        return jax.tree.map(jnp.shape, step.params)

    seen = jp.walk(net, loss, visit)(params, X, target)[1]
    assert seen["blocks"] == {"w": (L, D, D), "b": (L, D)}

    states = []
    for fused in (False, True):
        update = jp.make_update(
            net, loss, optax.sgd(0.1, momentum=0.9), fused=fused, max_norm=0.1, donate=False
        )
        states.append(update(params, update.init(params), X, target)[:2])
    hold_leaves(*states, zero="count|NOTHING")


DEEP, WIDTH, LENGTH = 8, 64, 32


@functools.cache
def memory(block, quantity):
    """The temporary memory of a quantity for a scan over many blocks, in float32."""
    params = {"w": jnp.zeros((DEEP, WIDTH, 4 * WIDTH)), "v": jnp.zeros((DEEP, 4 * WIDTH, WIDTH))}
    params = jax.tree.map(lambda w: w.astype(jnp.float32), params)
    x = jnp.zeros((8, LENGTH, WIDTH), jnp.float32)

    def fn(params, x):
        return jax.lax.scan(lambda h, p: (block(p, h), None), x, params)[0]

    def loss(params, x):
        return jnp.mean(fn(params, x) ** 2)

    net, mean_square = jp.function(fn), jp.HalfSquaredError()
    if quantity is None:
        f = jax.value_and_grad(loss)
    else:
        f = lambda params, x: quantity(net, mean_square)(params, x, x)  # noqa: E731
    return jax.jit(f).lower(params, x).compile().memory_analysis().temp_size_in_bytes


def block(p, h):
    return h + jax.nn.gelu(h @ p["w"]) @ p["v"]


of_checkpoint = jax.checkpoint(block)


def updated(net, loss):
    update = jp.make_update(net, loss, optax.sgd(0.1), fused=True, donate=False)
    return lambda params, x, target: update(params, update.init(params), x, target)


@pytest.mark.few(2)
@pytest.mark.parametrize(
    ("quantity", "most"),
    [
        (jp.per_example_sq_norms, 1.1),
        (jp.value_and_grad, 1.1),
        (jp.second_moment, 1.3),
        (functools.partial(jp.clipped_grad, max_norm=1.0, two_pass=True), 1.2),
        (updated, 1.3),
    ],
    ids=["norms", "gradient", "second moment", "clipped in two walks", "fused update"],
)
def test_the_memory_of_a_scan_is_that_of_the_gradient(quantity, most):
    """Also for checkpointed layers, which need less than half of it."""
    assert memory(of_checkpoint, None) < memory(block, None) / 2
    for each in (block, of_checkpoint):
        assert memory(each, quantity) <= most * memory(each, None), each


@pytest.mark.full
def test_in_shard_map():
    params = jax.tree.map(lambda w: w.astype(jnp.float32), BLOCKS)
    x = X.astype(jnp.float32)
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))
    for fn in (of_remat, with_constants, backwards):
        target = jnp.zeros(jax.eval_shape(fn, params, x).shape, jnp.float32)
        norms = jp.per_example_sq_norms(jp.function(fn), jp.HalfSquaredError())
        data = PartitionSpec("data")
        split = jax.shard_map(
            norms, mesh=mesh, in_specs=(PartitionSpec(), data, data), out_specs=data
        )
        got, want = jax.jit(split)(params, x, target), norms(params, x, target)
        np.testing.assert_allclose(got, want, rtol=1e-5)


def lstm(w, x):
    """Two products, one with a bias, whose parts are added gate by gate."""

    def step(carry, x):
        h, c = carry
        a, b = jnp.split(x @ w["x"], 2, axis=1), jnp.split(h @ w["h"] + w["b"][None], 2, axis=1)
        gate, new = jax.nn.sigmoid(a[0] + b[0]), jnp.tanh(a[1] + b[1])
        c = c * gate + new
        return (jnp.tanh(c), c), c

    start = jnp.zeros((len(x), D)), jnp.zeros((len(x), D))
    return jnp.swapaxes(jax.lax.scan(step, start, jnp.swapaxes(x, 0, 1))[1], 0, 1)


def sums(w, x):
    """Products with equal cotangents, and others whose cotangents differ by a second use."""
    a, b, c, d, e = (x @ w[name] for name in "abcde")
    y = jnp.tanh(a + b + c)
    return y + jnp.sin(d) * a[:, :1] + (d + e) - jnp.cos(e)


def slices(w, x):
    """The same parts of two products, and another part of a third."""
    a, b, c = (x @ w[name] for name in "abc")
    return jnp.tanh(a[:, 1:3] + b[:, 1:3] + c[:, 2:4]) * jnp.cos(a[:, :2] + b[:, :2])


@jax.jit
def unread(w, x):
    """Products of two shapes whose results are unused."""
    _ = x @ w["x"], x @ w["h"], x @ w["y"]
    return jnp.sin(x @ w["z"])


def with_unread(w, x):
    return unread(w, x) * 2.0


Z = {"z": normal(D, D)}
FIVE = {name: normal(D, D, seed=i) for i, name in enumerate("abcde")}
EQUAL = {
    "lstm": (lstm, {"x": normal(D, 2 * D), "h": normal(D, 2 * D), "b": normal(2 * D)}, 1),
    "sums": (sums, FIVE, 4),  # b and c share one
    "unread": (with_unread, {"x": normal(D, 2), "h": normal(D, 3), "y": normal(D, 3), **Z}, 3),
    "slices": (slices, {name: FIVE[name] for name in "abc"}, 2),
}


@pytest.mark.few(2)
@pytest.mark.parametrize("name", EQUAL)
def test_what_has_the_same_cotangent_keeps_it_once(name):
    fn, params, number = EQUAL[name]
    x = normal(N, 6, D) if fn is lstm else X
    one = Example.of(fn, "fn", params, x)
    assert sum(zero is not None for zero in one.whole.taps) == number
    zero = "/[xhy]$" if name == "unread" else r"(?!)"
    hold(fn, params, x, normal(*jax.eval_shape(fn, params, x).shape, seed=5), zero=zero)


def test_a_checkpoint_keeps_no_data():
    """What the backward pass recomputes is not kept, and neither are its zeros."""
    params, x = {"w": normal(D, D)}, X

    def fn(params, x):
        return jax.checkpoint(lambda h: jnp.sin(jnp.sin(h @ params["w"]) @ params["w"]))(x)

    _, walked = jp.function(fn).forward(params, x)
    kept = {leaf.shape for leaf in jax.tree.leaves(walked)}
    assert kept == {(N, 1, D), (D, D)}
    assert sum(leaf.shape == (N, 1, D) for leaf in jax.tree.leaves(walked)) == 1


def test_a_layer_saves_what_it_is_given_again_by_nobody():
    """Params and constants are not stacked with what each layer saves."""
    _, walked = jp.function(of_remat).forward(BLOCKS, X)
    (tape,) = (tape for tape in walked.tapes if isinstance(tape, TapeOfLayers))
    shapes = [leaf.shape for leaf in tape.kept.leaves]
    assert shapes.count((L, N, 1, D)) == 1  # h; and, for its own share, b of each example
    assert set(shapes) <= {(L, N, 1, D), (L, N, D)}
