"""Arrays that are not learned enter no quantity and no update moves them, in any dtype."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracles
import pytest
from table import Doubled, relative_error

import jaxprop as jp
from jaxprop.core.tree import is_not_learned, learned

LOSS = jp.HalfSquaredError()
KEY = jax.random.key(3)


class Pruned(jp.Layer):
    """y = x (w m), with a fixed matrix m of zeros and ones; backward returns () for m."""

    features: int
    dtype: str = "bool"
    marked: bool = True

    def init(self, key, x):
        shape = x.shape[-1], self.features
        kept = jax.random.bernoulli(jax.random.fold_in(key, 1), 0.6, shape).astype(self.dtype)
        return jax.random.normal(key, shape), jp.Unlearned(kept) if self.marked else kept

    def forward(self, params, x):
        w, m = params
        return x @ (w * m.astype(w.dtype)), x

    def backward(self, params, x, ct):
        w, m = params
        m = m.astype(w.dtype)
        return ((x.T @ ct) * m, ()), ct @ (w * m).T


BODY = jp.chain(jp.Dense(5), jp.Tanh(), jp.Dense(4), jp.Tanh())
NETS = {
    "a fixed matrix of bools": jp.chain(Pruned(3), jp.Tanh(), jp.Dense(2)),
    "a fixed matrix of integers": jp.chain(jp.Dense(4), jp.Tanh(), Pruned(2, "int32")),
    "running statistics": jp.chain(
        jp.Dense(3), jp.BatchNorm(training=False), jp.Tanh(), jp.Dense(2)
    ),
    "a frozen body": jp.chain(jp.frozen(BODY), jp.Dense(2)),
    "frozen layers in a repeat": jp.chain(
        jp.repeat(jp.skip(jp.chain(jp.frozen(jp.Dense(4)), jp.Tanh(), jp.Dense(4))), 3),
        jp.frozen(jp.repeat(jp.Dense(4), 2)),
        jp.recompute(jp.Dense(2)),
    ),
}
QUICK = ("running statistics", "frozen layers in a repeat")
nets = pytest.mark.parametrize("net", NETS.values(), ids=NETS)
quick_nets = pytest.mark.parametrize(
    "net",
    [
        pytest.param(net, marks=() if name in QUICK else pytest.mark.full)
        for name, net in NETS.items()
    ],
    ids=NETS,
)


def problem(net, examples=4):
    rng = np.random.default_rng(0)
    x, target = (jnp.asarray(rng.normal(size=(examples, d))) for d in (4, 2))
    params = jax.jit(net.init)(jax.random.key(0), x)
    assert any(map(is_not_learned, jax.tree.leaves(params, is_leaf=is_not_learned)))
    return params, x, target


def held(params):
    """The arrays that are not learned."""
    nodes = jax.tree.leaves(params, is_leaf=is_not_learned)
    return [np.asarray(node.value) for node in nodes if is_not_learned(node)]


@pytest.mark.full
def test_a_plain_array_that_backward_gives_nothing_for_is_not_learned():
    """With as many examples as the matrix has rows, and with more."""
    net = Pruned(3, marked=False)
    for examples in (4, 6):
        rng = np.random.default_rng(0)
        x, target = jnp.asarray(rng.normal(size=(examples, 4))), jnp.ones((examples, 3))
        params = net.init(jax.random.key(0), x)
        jp.check_layer(net, x, params)
        marked = params[0], jp.Unlearned(params[1])
        expected = oracles.per_example_grads(Pruned(3), LOSS)(marked, x, target)[0]
        got = jp.per_example_grads(net, LOSS)(params, x, target)
        assert got[1] == ()
        np.testing.assert_allclose(got[0], expected, rtol=1e-12)
        norms = jp.per_example_sq_norms(net, LOSS)(params, x, target)
        np.testing.assert_allclose(norms, jnp.sum(expected**2, (1, 2)), rtol=1e-12)
        clipped = jp.clipped_grad(net, LOSS, 0.3)(params, x, target)[1]
        oracle = oracles.clipped_grad(Pruned(3), LOSS, 0.3)(marked, x, target)[1]
        np.testing.assert_allclose(clipped[0], oracle[0], rtol=1e-12)
        halves = jp.value_and_grad(net, LOSS, micro_batches=2)(params, x, target)
        assert relative_error(halves, jp.value_and_grad(net, LOSS)(params, x, target)) <= 1e-12
    for fused in (True, False):
        update = jp.make_update(net, LOSS, optax.sgd(0.1), fused=fused)
        with pytest.raises(TypeError, match=r"params\[1\] is bool\[4,3\], .* by jp.Unlearned"):
            update.init(params)
        with pytest.raises(TypeError, match=r"params\[1\] is bool\[4,3\], .* by jp.Unlearned"):
            update(params, (), x, target)


@pytest.mark.few(2)
@nets
def test_both_ways_of_differentiating_agree_on_what_is_learned(net):
    params, x, target = problem(net)
    by_hand = jax.jit(jp.value_and_grad(net, LOSS))(params, x, target)
    by_jax = jax.jit(jp.autodiff(net, LOSS))(params, x, target)
    assert relative_error(by_hand, by_jax) <= 1e-12
    for _, grads in (by_hand, by_jax):
        assert jax.tree.structure(grads) == jax.tree.structure(params)
        assert all(zero.shape == () and not zero for zero in held(grads))
    grads = jax.grad(jp.loss_fn(net, LOSS), allow_int=True)(params, x, target)
    assert relative_error(learned(grads), learned(by_jax[1])) <= 1e-12
    assert not any(np.any(zeros) for zeros in held(grads) if zeros.dtype != jax.dtypes.float0)
    updated = jax.tree.map(lambda p, g: p - g if p.dtype == g.dtype != bool else p, params, grads)
    assert jax.tree.structure(updated) == jax.tree.structure(params)


@pytest.mark.few(1)
@nets
def test_every_quantity(net):
    params, *batch = problem(net)
    asked = {
        "grads": jp.Gradient(),
        "each": jp.PerExampleGrads(),
        "norms": jp.SqNorms(),
        "gram": jp.Gram(),
        "moment": jp.SecondMoment(),
        "variance": jp.Variance(),
        "noise": jp.NoiseScale(),
        "clipped": jp.Clipped(0.3),
        "in two passes": jp.Clipped(0.3, two_pass=True),
        "diagonal": jp.DiagGGN(),
        "root": jp.quantity.GGNRoot(),
    }

    @jax.jit
    def both(*args):
        blocks = oracles.ggn_blocks(net, LOSS)(*args)
        oracle = {
            "grads": jp.autodiff(net, LOSS)(*args)[1],
            "each": oracles.per_example_grads(net, LOSS)(*args),
            "norms": oracles.per_example_sq_norms(net, LOSS)(*args),
            "gram": oracles.gram(net, LOSS)(*args),
            "moment": oracles.second_moment(net, LOSS)(*args),
            "variance": oracles.variance(net, LOSS)(*args),
            "noise": oracles.noise_scale(net, LOSS)(*args),
            "clipped": oracles.clipped_grad(net, LOSS, 0.3)(*args)[1],
            "in two passes": oracles.clipped_grad(net, LOSS, 0.3)(*args)[1],
            "diagonal": oracles.diagonal(args[0], blocks),
        }
        parts = jp.quantities(
            net, LOSS, micro_batches=2, **{k: asked[k] for k in ("norms", "clipped")}
        )
        return jp.quantities(net, LOSS, **asked)(*args), oracle, parts(*args)

    got, expected, in_parts = both(params, *batch)
    for name, want in expected.items():
        assert relative_error(got[name], want) <= 1e-10, name
    for name, part in in_parts.items():
        assert relative_error(part, got[name]) <= 1e-12, name
    for name in got.keys() - {"value", "norms", "gram", "noise"}:
        assert jax.tree.structure(got[name]) == jax.tree.structure(params), name
        assert not any(map(np.any, held(got[name]))), name
    each = jax.tree.map(lambda g: g.mean(0), got["each"])
    assert relative_error(each, got["grads"]) <= 1e-12
    squares = jax.tree.map(lambda v: (v**2).sum(0).mean(0), learned(got["root"]))
    assert relative_error(squares, learned(got["diagonal"])) <= 1e-12


@pytest.mark.few(2)
@quick_nets
@pytest.mark.parametrize("per_layer", [False, True])
def test_noise_is_for_what_is_learned(net, per_layer):
    params, *batch = problem(net)
    clean, noisy = (
        jax.jit(jp.clipped_grad(net, LOSS, 0.5, noise, per_layer=per_layer))(
            params, *batch, key=KEY
        )[1]
        for noise in (0.0, 3.0)
    )
    assert jax.tree.structure(noisy) == jax.tree.structure(params)
    assert not any(map(np.any, held(noisy)))
    noise = jax.tree.map(jnp.subtract, learned(noisy), learned(clean))
    assert all(np.all(np.abs(leaf) > 0) for leaf in jax.tree.leaves(noise))
    flat = np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(noise)])
    norms = jax.eval_shape(jp.per_example_sq_norms(net, LOSS, per_layer=True), params, *batch)
    layers = sum(leaf.size for leaf in jax.tree.leaves(norms)) / 4 if per_layer else 1
    assert abs(flat.std() / (3.0 * 0.5 * layers**0.5 / 4) - 1) < 4 / np.sqrt(2 * flat.size)


def noise(grads_key):
    return optax.add_noise(0.1, 0.5, grads_key)


OPTIMIZERS = {
    "adam": optax.adam(1e-2),
    "adamw": optax.adamw(1e-2, weight_decay=0.5),
    "decay and noise": optax.chain(optax.add_decayed_weights(0.5), noise(0), optax.sgd(0.1)),
}


UPDATES = [
    ("adamw", {}),
    ("adam", {"fused": True}),
    ("adamw", {"fused": True, "max_norm": 0.1, "micro_batches": 2}),
    pytest.param("decay and noise", {"micro_batches": 2}, marks=pytest.mark.full),
    pytest.param("adam", {"max_norm": 0.1}, marks=pytest.mark.full),
    pytest.param("adamw", {"fused": True}, marks=pytest.mark.full),
    pytest.param("adamw", {"fused": True, "max_norm": 0.1}, marks=pytest.mark.full),
]


@pytest.mark.few(3)
@pytest.mark.usefixtures("standard_promotion")
@nets
@pytest.mark.parametrize(("optimizer", "options"), UPDATES, ids=str)
def test_no_update_moves_them(net, optimizer, options):
    params, *batch = problem(net)
    optimizer = OPTIMIZERS[optimizer]
    before = held(params)
    update = jp.make_update(net, LOSS, optimizer, **options)
    state = update.init(params)
    expected = optimizer.init(learned(params))
    shapes = [jax.tree.map(jnp.shape, jax.tree.leaves(tree)) for tree in (state, expected)]
    assert shapes[0] == shapes[1]
    moved = params
    for _ in range(2):
        moved, state, value = update(jax.tree.map(jnp.copy, moved), state, *batch)
    assert jax.tree.structure(moved) == jax.tree.structure(params)
    for old, new in zip(before, held(moved), strict=True):
        np.testing.assert_array_equal(old, new)
        assert old.dtype == new.dtype
    for old, new in zip(*map(jax.tree.leaves, (learned(params), learned(moved))), strict=True):
        assert np.any(old != new)
    plain = jp.make_update(net, LOSS, optimizer, max_norm=options.get("max_norm"))
    expected, state = params, plain.init(params)
    for _ in range(2):
        expected, state, _ = plain(jax.tree.map(jnp.copy, expected), state, *batch)
    assert relative_error(moved, expected) <= 1e-10
    assert np.isfinite(value)


@pytest.mark.few(1)
@pytest.mark.usefixtures("standard_promotion")
@nets
def test_a_loop_of_ones_own_has_one_line_more(net):
    params, *batch = problem(net)
    optimizer = jp.learned_only(optax.adamw(1e-2, weight_decay=0.5))
    state, got = optimizer.init(params), params
    value_and_grad = jax.jit(jp.value_and_grad(net, LOSS))
    for _ in range(2):
        _, grads = value_and_grad(got, *batch)
        updates, state = optimizer.update(grads, state, got)
        got = optax.apply_updates(got, updates)
    update = jp.make_update(net, LOSS, optax.adamw(1e-2, weight_decay=0.5))
    expected, state = jax.tree.map(jnp.copy, params), update.init(params)
    for _ in range(2):
        expected, state, _ = update(expected, state, *batch)
    assert relative_error(got, expected) <= 1e-12
    assert jax.tree.map(jnp.result_type, got) == jax.tree.map(jnp.result_type, params)
    for old, new in zip(held(params), held(got), strict=True):
        np.testing.assert_array_equal(old, new)


@pytest.mark.usefixtures("standard_promotion")
def test_a_loss_as_a_function_takes_whole_params():
    net = jp.chain(jp.frozen(jp.Dense(5)), jp.Tanh(), jp.Dense(2))
    params, *batch = problem(net)

    def value_fn(params):
        return jp.loss_fn(net, LOSS)(params, *batch)

    optimizer = jp.learned_only(optax.lbfgs())
    value, grads = jp.value_and_grad(net, LOSS)(params, *batch)
    given = {"value": value, "grad": grads, "value_fn": value_fn}
    updates, _ = optimizer.update(grads, optimizer.init(params), params, **given)
    got = optax.apply_updates(params, updates)
    assert value_fn(got) < value
    update = jp.make_update(net, LOSS, optax.lbfgs(), donate=False)
    expected, _, _ = update(params, update.init(params), *batch)
    assert relative_error(got, expected) <= 1e-12


def test_a_net_of_which_the_head_is_trained_has_the_head_s_norms_and_noise():
    frozen, plain = jp.chain(jp.frozen(BODY), jp.Dense(2)), jp.chain(BODY, jp.Dense(2))
    params, *batch = problem(frozen)
    whole = plain.init(jax.random.key(0), batch[0])
    assert (
        relative_error(jax.tree.map(lambda leaf: leaf, held(params)), jax.tree.leaves(whole[0]))
        == 0
    )
    by_layer = jp.per_example_sq_norms(plain, LOSS, per_layer=True)(whole, *batch)
    norms = jp.per_example_sq_norms(frozen, LOSS)(params, *batch)
    np.testing.assert_allclose(norms, by_layer[1], rtol=1e-12)
    # The same, by the types of the params alone, without a frozen layer.
    by_types = jp.per_example_sq_norms(plain, LOSS)((jp.freeze(whole[0]), whole[1]), *batch)
    np.testing.assert_allclose(by_types, norms, rtol=1e-12)


def test_frozen_layers_cost_no_gradients():
    """Dots in the compiled program: three forward, one for the head's weights; below, d_x too."""
    args = problem(jp.chain(jp.frozen(BODY), jp.Dense(2)))

    def dots(f, *args):
        return jax.jit(f).lower(*args).compile().as_text().count(" dot(")

    frozen = jp.chain(jp.frozen(BODY), jp.Dense(2))
    assert dots(jp.value_and_grad(frozen, LOSS), *args) == 3 + 1
    assert dots(jp.per_example_sq_norms(frozen, LOSS), *args) == 3
    below = jp.chain(jp.Dense(4), jp.frozen(BODY), jp.Dense(2))
    params = below.init(jax.random.key(0), args[1])
    assert dots(jp.value_and_grad(below, LOSS), params, *args[1:]) == 4 + 2 + 3


def test_frozen_layers_take_side_inputs_and_dtypes():
    block = jp.chain(jp.Dense(6), jp.Attention(1), jp.Dense(4), jp.Dropout(0.5))
    net, plain = (
        jp.chain(jp.frozen(jp.skip(block)), jp.Dense(2)),
        jp.chain(jp.skip(block), jp.Dense(2)),
    )
    x = jnp.asarray(np.random.default_rng(0).normal(size=(3, 5, 4)))
    mask = jnp.arange(5)[None] < jnp.array([[5], [3], [2]])
    params, target = net.init(jax.random.key(0), x), jnp.ones((3, 5, 2))
    whole = plain.init(jax.random.key(0), x)
    got = jax.jit(jp.value_and_grad(net, LOSS))(params, x, target, key=KEY, mask=mask)
    expected = jax.jit(jp.value_and_grad(plain, LOSS))(whole, x, target, key=KEY, mask=mask)
    assert relative_error((got[0], got[1][1]), (expected[0], expected[1][1])) <= 1e-12
    narrow = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params)
    value, grads = jax.jit(jp.value_and_grad(jp.cast(net, jnp.bfloat16), LOSS))(
        narrow, x.astype(jnp.bfloat16), target.astype(jnp.float32)
    )
    assert jax.tree.structure(grads) == jax.tree.structure(params)
    assert value.dtype == jnp.float32


def test_params_that_were_made_elsewhere_are_frozen_by_hand():
    net, plain = jp.frozen(BODY), BODY
    x = jnp.ones((2, 4))
    params = plain.init(jax.random.key(0), x)
    with pytest.raises(ValueError, match=r"frozen\(chain.*mark them by jp\.freeze\(params\)"):
        net.forward(params, x)
    y, _ = net.forward(jp.freeze(params), x)
    np.testing.assert_array_equal(y, plain.forward(params, x)[0])
    assert jax.tree.structure(jp.freeze(jp.freeze(params))) == jax.tree.structure(
        net.init(jax.random.key(0), x)
    )
    with pytest.raises(
        TypeError, match=r"frozen: the layer is the class Dense; write Dense\(...\)"
    ):
        jp.frozen(jp.Dense)


@pytest.mark.full
@quick_nets
def test_checked_explained_and_in_ordinary_jax(net):
    params, x, target = problem(net)
    jp.check_layer(net, x, params)
    assert not jp.find_nonfinite(net, LOSS, params, x, target)
    terms = jp.explain(net, LOSS, params, x, target)
    grads = jax.tree.leaves(learned(jp.value_and_grad(net, LOSS)(params, x, target)[1]))
    assert relative_error([terms[name].grad for name in terms.names], grads) <= 1e-12
    f = jp.custom_vjp(net)
    half_square = lambda params: (f(params, x) ** 2).sum() / 8  # noqa: E731
    got = jax.jit(jax.grad(half_square, allow_int=True))(params)
    expected = jax.jit(jp.autodiff(net, LOSS))(params, x, jnp.zeros_like(target))[1]
    assert relative_error(learned(got), learned(expected)) <= 1e-12
    stacked = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), params)
    mapped = jax.jit(jax.vmap(jp.value_and_grad(net, LOSS), (0, None, None)))(stacked, x, target)
    assert mapped[0].shape == (2,)

    def step(params, _):
        value, grads = jp.value_and_grad(net, LOSS)(params, x, target)
        moved = optax.apply_updates(
            params, jax.tree.map(lambda g: -g if g.dtype != bool else g, grads)
        )
        return moved, value

    _, values = jax.lax.scan(step, params, length=2)
    assert values[1] != values[0]


def test_a_nan_in_an_array_that_is_not_learned_is_found():
    net = NETS["running statistics"]
    params, x, target = problem(net)
    norm = params[1]._replace(var=jp.Unlearned(params[1].var.value.at[1].set(jnp.nan)))
    found = jp.find_nonfinite(net, LOSS, (params[0], norm, *params[2:]), x, target)
    assert (found.phase, found.layer, found.array) == ("input", "1", "params var")


@pytest.mark.few(2)
@pytest.mark.parametrize(
    "layer",
    [
        jp.shared(jp.frozen(jp.Dense(4)), 2),
        jp.shared(jp.chain(jp.frozen(jp.Dense(4)), jp.Dense(4)), 2),
        Doubled(jp.frozen(jp.Dense(4))),
        jp.cast(Doubled(jp.frozen(jp.Dense(4))), jnp.float32),
    ],
    ids=str,
)
def test_frozen_within(layer):
    net = jp.chain(layer, jp.Dense(2))
    params, *batch = problem(net)
    by_hand, by_jax = (
        jax.jit(f(net, LOSS))(params, *batch) for f in (jp.value_and_grad, jp.autodiff)
    )
    assert relative_error(by_hand, by_jax) <= 1e-6
    norms = jp.per_example_sq_norms(net, LOSS)(params, *batch)
    own = jax.vmap(lambda x, t: jp.autodiff(net, LOSS)(params, x[None], t[None])[1])(*batch)
    expected = sum(jnp.sum(g**2, range(1, g.ndim)) for g in jax.tree.leaves(learned(own)))
    np.testing.assert_allclose(norms, expected, rtol=1e-5)


@pytest.mark.full
def test_a_frozen_table_still_scores():
    nets = (
        jp.tied(jp.frozen(jp.Embedding(7, 4)), jp.Dense(4)),
        jp.tied(jp.Embedding(7, 4), jp.Dense(4)),
    )
    ids = jnp.array([[1, 2, 3], [3, 3, 0]])
    params = nets[0].init(KEY, ids)
    assert is_not_learned(params[0])
    loss = jp.CrossEntropy()
    got, expected = (jax.jit(jp.value_and_grad(net, loss))(params, ids, ids) for net in nets)
    assert relative_error(got, expected) == 0
    assert relative_error(got, jp.autodiff(nets[1], loss)(params, ids, ids)) <= 1e-12


def masked():
    return lambda mask: optax.adamw(0.1, mask=mask)


def labelled():
    transforms = {True: optax.adam(0.1), False: optax.sgd(0.1)}
    return lambda mask: optax.partition(transforms, mask)


@pytest.mark.few(2)
@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize("make", [masked(), labelled()])
@pytest.mark.parametrize("fused", [False, True])
def test_a_mask_that_is_a_tree_like_params(make, fused):
    """Users make such masks by ``jax.tree.map``; a function of params has the same effect."""
    net = NETS["running statistics"]
    params, *batch = problem(net)
    matrices = lambda params: jax.tree.map(lambda leaf: leaf.ndim > 1, params)  # noqa: E731
    ends = []
    for mask in (matrices(params), matrices):
        update = jp.make_update(net, LOSS, make(mask), fused=fused)
        start = jax.tree.map(jnp.copy, params)
        ends.append(update(start, update.init(start), *batch)[0])
        optimizer = jp.learned_only(make(mask))
        _, grads = jp.value_and_grad(net, LOSS)(params, *batch)
        updates, _ = optimizer.update(grads, optimizer.init(params), params)
        assert relative_error(ends[-1], optax.apply_updates(params, updates)) <= 1e-12
    assert relative_error(*ends) == 0


def test_freeze_takes_params_and_not_a_net():
    with pytest.raises(TypeError, match=r"is a net\. Write jp\.freeze"):
        jp.freeze(BODY)


def test_an_unmarked_integer_is_told_how_to_be_marked():
    """backward returns () for it, so it is not counted as a layer's param."""
    net = jp.chain(Pruned(3, "int32", marked=False), jp.Dense(2))
    params, x, target = net.init(KEY, jnp.ones((2, 4))), jnp.ones((2, 4)), jnp.ones((2, 2))
    for f in (jp.autodiff(net, LOSS), jp.make_update(net, LOSS, optax.sgd(0.1)).init):
        with pytest.raises(TypeError, match=r"mark it in init, by jp.Unlearned"):
            f(params) if f.__name__ == "init" else f(params, x, target)
    with pytest.raises(TypeError, match=r"what is not learned is marked by jp.Unlearned"):
        jp.check_layer(net, x)
