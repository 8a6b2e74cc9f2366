"""The particulars of each layer made of layers, beyond what the table checks for all."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from table import BLOCK, Around, Doubled, Row, at, ids, normal, relative_error

import jaxprop as jp
from jaxprop.bench.networks import gpt
from jaxprop.core.tree import learned


def test_a_repeat_is_the_chain_of_its_layers():
    net = jp.repeat(BLOCK, 3)
    params, x = jax.device_get(at(Row(net, normal(4, 4))))
    unrolled = jp.chain(BLOCK, BLOCK, BLOCK)
    each = tuple(jax.tree.map(lambda leaf, i=i: leaf[i], params) for i in range(3))
    target = normal(4, 4)
    loss = jp.HalfSquaredError()
    value, grads = jax.device_get(jax.jit(jp.value_and_grad(net, loss))(params, x, target))
    expected = jax.jit(jp.value_and_grad(unrolled, loss))(each, x, target)
    got = value, tuple(jax.tree.map(lambda leaf, i=i: leaf[i], grads) for i in range(3))
    assert relative_error(got, expected) <= 1e-12
    norms = jax.jit(jp.per_example_sq_norms(net, loss))(params, x, target)
    expected = jax.jit(jp.per_example_sq_norms(unrolled, loss))(each, x, target)
    assert relative_error(norms, expected) <= 1e-12
    by_layer = jax.jit(jp.per_example_sq_norms(net, loss, per_layer=True))(params, x, target)
    assert jax.tree.leaves(jax.tree.map(jnp.shape, by_layer)) == [3, 4, 3, 4]


def test_per_layer_noise_counts_the_layers_of_a_repeat():
    net = jp.repeat(jp.skip(jp.Dense(30)), 4)
    params, x = at(Row(net, normal(5, 30)))
    args, loss, key = (params, x, normal(5, 30)), jp.HalfSquaredError(), jax.random.key(0)
    (_, clean), (_, noisy) = (
        jax.jit(jp.clipped_grad(net, loss, 0.5, multiplier, per_layer=True))(*args, key=key)
        for multiplier in (0.0, 3.0)
    )
    noise = np.ravel(noisy.w - clean.w)
    assert abs(noise.std() / (3.0 * 0.5 * 4**0.5 / 5) - 1) < 4 / np.sqrt(2 * noise.size)


@pytest.mark.full
def test_two_passes_through_a_repeat_keep_no_cotangents():
    net, loss, args = gpt(scan=True, recomputing=True, batch=2)
    one, two = (
        jax.jit(jp.clipped_grad(net, loss, 1.0, two_pass=two_pass)).lower(*args).compile()
        for two_pass in (False, True)
    )
    one, two = (f.memory_analysis().temp_size_in_bytes for f in (one, two))
    assert two < 0.7 * one


def test_recompute_keeps_its_input_alone():
    params, x = at(Row(jp.recompute(BLOCK), normal(3, 4)))
    _, residuals = jax.eval_shape(jp.recompute(BLOCK).forward, params, x)
    assert [leaf.shape for leaf in jax.tree.leaves(residuals)] == [(3, 4)]


def test_a_repeat_keeps_a_tensor_once():
    for layers, shapes in (
        ((jp.Tanh(), jp.Dense(4)), [(5, 3, 4)]),
        ((jp.Dense(4), jp.Tanh()), [(5, 3, 4), (3, 4)]),
    ):
        net = jp.repeat(jp.chain(*layers), 5)
        _, residuals = jax.eval_shape(net.forward, *at(Row(net, normal(3, 4))))
        assert [leaf.shape for leaf in jax.tree.leaves(residuals)] == shapes


def test_a_repeated_layer_may_return_a_param():
    class Table(jp.Layer):
        """y is the param itself, a number for each example of a batch of known size."""

        def init(self, key, x):
            return jnp.asarray(normal(*x.shape))

        def forward(self, params, x):
            return params, (x, params)

        def backward(self, params, residuals, ct):
            return ct, jnp.zeros_like(ct)

    net, loss = jp.repeat(Table(), 2), jp.HalfSquaredError()
    x, target = jnp.asarray(normal(3, 4)), jnp.asarray(normal(4, 3).T)
    params = net.init(jax.random.key(0), x)
    _, grads = jp.value_and_grad(net, loss)(params, x, target)
    _, expected = jax.value_and_grad(jp.loss_fn(net, loss))(params, x, target)
    assert relative_error(grads, expected) < 1e-12


def test_uses_of_a_shared_param_are_joined_before_they_are_squared():
    net, loss = jp.shared(jp.Dense(3, bias=False), 2), jp.HalfSquaredError()
    params, x = at(Row(net, normal(2, 3)))
    target = normal(2, 3)
    norms = np.asarray(jax.jit(jp.per_example_sq_norms(net, loss))(params, x, target))
    grads = jax.jit(jp.per_example_grads(net, loss))(params, x, target)
    np.testing.assert_allclose(norms, np.sum(np.asarray(grads.w) ** 2, (1, 2)), rtol=1e-12)
    apart = jp.chain(jp.Dense(3, bias=False), jp.Dense(3, bias=False))
    as_two = jax.jit(jp.per_example_sq_norms(apart, loss))((params, params), x, target)
    assert np.all(np.abs(norms - as_two) > 1e-3 * norms)


def test_no_vocabulary_sized_buffer_for_an_embedding_s_norms():
    vocab = 50_000
    net, loss = jp.chain(jp.Embedding(vocab, 8), jp.Dense(3)), jp.CrossEntropy()
    x = ids(4, 16)
    params = jax.eval_shape(net.init, jax.random.key(0), x)
    f = jax.jit(jp.per_example_sq_norms(net, loss)).lower(params, x, x % 3)
    assert f.compile().memory_analysis().temp_size_in_bytes < 4 * vocab


def test_an_id_outside_the_vocabulary_has_no_gradient():
    layer = jp.Embedding(5, 2)
    table, _ = at(Row(layer, np.array([0])))

    @jax.jit
    def both(x):
        y, residuals = layer.forward(table, x)
        d_table, d_x = layer.backward(table, residuals, np.ones((2, 2)))
        assert d_x is None
        return y, d_table.sum().sum(1)

    for bad in (-1, 5):
        y, d_rows = jax.device_get(both(np.array([1, bad])))
        assert np.all(y[1] == 0) if bad < 0 else np.isnan(y[1]).all()
        assert not np.isnan(y[0]).any()
        np.testing.assert_array_equal(d_rows, [0, 2, 0, 0, 0])


def dropping():
    block = jp.skip(jp.chain(jp.Dense(6), jp.Dropout(0.5)))
    net = jp.chain(jp.Dropout(0.25), jp.repeat(block, 3), jp.Dense(2))
    return net, *at(Row(net, normal(8, 6)))


def test_each_dropout_is_bound_to_a_key_of_its_own():
    net, params, x = dropping()
    forward = jax.jit(lambda params: net.forward(params, x)[0])
    given, of_other = (net.bind(params, key=jax.random.key(seed)) for seed in (0, 1))
    plain, first, again, other = map(np.asarray, map(forward, (params, given, given, of_other)))
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - plain).min() > 0
    assert np.abs(first - other).max() > 0
    inside = given[1][1].value
    assert inside.shape == (3,)
    assert len({str(jax.random.key_data(key)) for key in [*inside, given[0].value]}) == 4


@pytest.mark.full
def test_dropout_by_hand_is_dropout_by_autodiff():
    net, params, x = dropping()
    key, target, loss = jax.random.key(3), normal(8, 2), jp.HalfSquaredError()
    got = jax.jit(jp.value_and_grad(net, loss))(net.bind(params, key=key), x, target)
    expected = jax.value_and_grad(
        lambda params: jp.loss_fn(net, loss)(net.bind(params, key=key), x, target)
    )(params)
    assert relative_error(got, expected) <= 1e-12
    grads = jp.per_example_grads(net, loss)(net.bind(params, key=key), x, target)
    assert relative_error(jax.tree.map(lambda g: g.mean(0), grads), got[1]) <= 1e-12
    f = jp.custom_vjp(net)
    by_custom = jax.grad(
        lambda params: (f(net.bind(params, key=key), x) ** 2).sum(), allow_int=True
    )(params)
    by_auto = jax.grad(lambda p: (net.forward(net.bind(p, key=key), x)[0] ** 2).sum())(params)
    assert relative_error(by_custom, by_auto) <= 1e-12


def test_dropout_in_a_shared_layer_drops_the_same_each_time():
    net, loss = jp.shared(jp.chain(jp.Dense(3), jp.Dropout(0.5)), 2), jp.HalfSquaredError()
    params, x = at(Row(net, normal(4, 3)))
    key, target = jax.random.key(0), normal(4, 3)
    bound = net.bind(params, key=key)
    got = jax.jit(jp.value_and_grad(net, loss))(bound, x, target)
    by_jax = jax.value_and_grad(
        lambda params: jp.loss_fn(net, loss)(net.bind(params, key=key), x, target)
    )
    assert relative_error(got, jax.jit(by_jax)(params)) <= 1e-12
    norms = jax.jit(jp.per_example_sq_norms(net, loss))(bound, x, target)
    assert norms.shape == (4,)


@pytest.mark.usefixtures("standard_promotion")
def test_a_mask_inside_a_shared_layer_without_forms():
    """If backward returns a plain array, it is rerun for each example, with the example's mask."""

    class Scale(jp.Layer):
        def init(self, key, x):
            return jnp.ones(x.shape[-1], x.dtype)

        def forward(self, params, x):
            return x * params[None, None], x

        def backward(self, params, x, ct):
            return jnp.sum(ct * x, axis=(0, 1)), ct * params[None, None]

    attend = jp.Attention(2, save="logsumexp")
    net = jp.shared(jp.chain(Scale(), jp.Dense(12), attend, jp.Dense(4)), 2)
    x, target = np.random.default_rng(1).normal(size=(2, 3, 5, 4))
    mask = np.arange(5) < np.array([[5], [3], [2]])
    params = net.bind(at(Row(net, x))[0], mask=mask)
    together = jp.quantities(net, jp.HalfSquaredError(), each=jp.PerExampleGrads())
    each = jax.device_get(jax.jit(together)(params, x, target)["each"])
    _, grads = jax.jit(jp.value_and_grad(net, jp.HalfSquaredError()))(params, x, target)
    assert relative_error(jax.tree.map(lambda g: g.mean(0), each), grads) <= 1e-12


@pytest.mark.usefixtures("standard_promotion")
def test_update_takes_a_key():
    net, params, x = dropping()
    update = jp.make_update(net, jp.HalfSquaredError(), optax.adam(0.01))
    state, target = optax.adam(0.01).init(params), normal(8, 2)
    values = []
    for step in range(3):
        params, state, value = update(params, state, x, target, jax.random.key(step))
        values.append(float(value))
    assert jax.tree.structure(params) == jax.tree.structure(dropping()[1])
    assert len(set(values)) == 3


def test_dropout_keeps_the_mean():
    layer, x = jp.Dropout(0.3), np.ones((400, 50))
    y, kept = map(np.asarray, jax.jit(layer.forward)(jp.Key(jax.random.key(0)), x))
    assert abs(float(y.mean()) - 1) < 0.02
    assert abs(float(kept.mean()) - 0.7) < 0.02


@pytest.mark.few(1)
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_cast_computes_narrow_and_accumulates_wide(dtype):
    net = jp.chain(jp.Embedding(7, 6), jp.repeat(jp.skip(jp.Dense(6)), 2), jp.Dense(3))
    params, x = at(Row(net, ids(4, 5)), jnp.float32)
    args, loss = (params, x, x % 3), jp.CrossEntropy()
    narrow = jp.cast(net, dtype)
    of_init = jax.eval_shape(narrow.init, jax.random.key(0), x)
    assert all(leaf.dtype.itemsize >= 4 for leaf in jax.tree.leaves(of_init))
    y, residuals = jax.eval_shape(narrow.forward, params, x)
    assert y.dtype == dtype
    kept = [leaf.dtype for leaf in jax.tree.leaves(residuals) if leaf.size]
    assert jnp.float32 not in kept
    value, grads = jax.jit(jp.value_and_grad(narrow, loss, loss_scale=2.0**8))(*args)
    assert value.dtype == jnp.float32
    assert {leaf.dtype for leaf in jax.tree.leaves(grads)} == {jnp.dtype(jnp.float32)}
    expected = jax.jit(jp.value_and_grad(net, loss))(*args)
    by_autodiff = jax.jit(jax.value_and_grad(jp.loss_fn(narrow, loss)))(*args)
    assert relative_error((value, grads), expected) <= relative_error(by_autodiff, expected)
    rounded = jax.tree.map(lambda g: np.asarray(g).astype(dtype).astype(np.float32), grads)
    assert relative_error(grads, rounded) > 1e-4  # more than a narrow sum would have held
    norms, wide = (jax.jit(jp.per_example_sq_norms(n, loss))(*args) for n in (narrow, net))
    assert relative_error(norms, wide) <= 0.05


@pytest.mark.full
def test_cast_takes_ids_without_positions():
    net = jp.cast(jp.chain(jp.Embedding(7, 4), jp.Dense(3)), jnp.bfloat16)
    x = jnp.array([1, 2, 3])
    params = net.init(jax.random.key(0), x)
    _, grads = jp.value_and_grad(net, jp.CrossEntropy())(params, x, x % 3)
    assert grads[0].shape == (7, 4)


def test_cast_mixes_dtypes_where_x_is_wide_yet():
    """A skip's x and a branch's outputs before the first layer that rounds; a table's two uses."""
    first = jp.chain(jp.skip(jp.Dense(3)), jp.branch(jp.skip(jp.Dense(3)), jp.Tanh()))
    beside = jp.branch(jp.skip(jp.Dense(3)), jp.Tanh(), join="concatenate")
    tied = jp.tied(jp.Embedding(7, 4), jp.Tanh())
    for net, x in ((first, normal(4, 3)), (beside, normal(4, 3)), (tied, ids(4, 3))):
        params, x = at(Row(net, x), jnp.float32)
        target = np.zeros(jax.eval_shape(net, params, x).shape, np.float32)
        args = params, x, target
        asked = {"grads": jp.Gradient(), "each": jp.PerExampleGrads(), "gram": jp.Gram()}
        narrow, wide = (
            jax.jit(jp.quantities(n, jp.HalfSquaredError(), **asked))(*args)
            for n in (jp.cast(net, jnp.bfloat16), net)
        )
        assert relative_error(narrow, wide) <= 0.05


def test_loss_scale_keeps_what_float16_loses():
    net, loss = (
        jp.cast(jp.chain(jp.Dense(4), jp.Tanh(), jp.Dense(2)), jnp.float16),
        jp.CrossEntropy(),
    )
    params, x = at(Row(net, 1e-6 * normal(64, 3)), jnp.float32)
    args = params, x, jnp.zeros(64, jnp.int32)
    plain = jp.chain(jp.Dense(4), jp.Tanh(), jp.Dense(2))
    wide = jax.jit(jp.value_and_grad(plain, loss))(*args)[1]
    lost, kept = (
        jax.jit(jp.value_and_grad(net, loss, loss_scale=scale))(*args)[1][0].b
        for scale in (1e-4, 2.0**10)
    )
    assert relative_error(kept, wide[0].b) < 0.01 < relative_error(lost, wide[0].b)


def test_loss_scale_is_taken_off_before_narrow_params_round():
    net, loss = jp.chain(jp.Dense(4)), jp.HalfSquaredError()
    params, x = at(Row(net, 10 * normal(8, 3)), jnp.float16)
    args = params, x, np.full((8, 4), 100, np.float16)
    _, plain = jp.value_and_grad(net, loss)(*args)
    _, scaled = jp.value_and_grad(net, loss, loss_scale=2.0**10)(*args)
    assert np.abs(np.asarray(plain[0].w, float)).max() * 2.0**10 > np.finfo(np.float16).max
    assert relative_error(scaled, plain) <= 2**-9


def test_cast_leaves_running_statistics_as_they_are():
    """With a mean of 30 and a deviation of 1, bfloat16 would move y by a twentieth."""
    layer = jp.BatchNorm(training=False)
    params = jp.BatchNormParams(np.ones(3), np.zeros(3), np.full(3, 30.3), np.ones(3))
    params, x = jax.tree.map(lambda leaf: leaf.astype(np.float32), (params, np.full((2, 3), 30)))
    mesh = jax.make_mesh((1,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    for net in (layer, jp.sharding.gathered(layer, mesh), jp.shared(layer, 1)):
        y, _ = jp.cast(net, jnp.bfloat16).forward(params, x)
        np.testing.assert_allclose(np.asarray(y, np.float32), -0.3, rtol=1e-2)


class Lookup(jp.Layer):
    """An embedding of 4 features whose table's cotangent is summed over examples."""

    vocab: int

    def init(self, key, x):
        return jax.random.normal(key, (self.vocab, 4))

    def forward(self, params, x):
        return params[x], x

    def backward(self, params, x, ct):
        return jnp.zeros_like(params).at[x].add(ct), None


def raises(error, words, f, *args):
    with pytest.raises(error, match=words):
        f(*args)


def test_errors():
    x = np.ones((2, 4))
    key = jax.random.key(0)
    wider = jp.repeat(jp.Dense(5), 2)
    params = jp.AffineParams(np.ones((2, 4, 5)), np.ones((2, 5)))
    raises(ValueError, "its y is the x of the next", wider.forward, params, x)
    raises(ValueError, "times is at least 1, not 0", jp.repeat, jp.Dense(4), 0)
    raises(TypeError, "times is a whole number, not 2.0", jp.repeat, jp.Dense(4), 2.0)
    net = jp.repeat(jp.Dense(4), 3)
    raises(ValueError, "axis 0 is the layer, and there are 3", net.forward, (x, x[0]), x)
    raises(ValueError, "at least one layer", jp.branch)
    raises(
        ValueError, "'concatenate' or 'tuple', not 'stack'", lambda: jp.branch(net, join="stack")
    )
    two = jp.branch(jp.Dense(3), jp.Dense(2))
    raises(ValueError, "cannot be joined by sum", jax.jit(two.init), key, x)
    apart = tuple(at(Row(layer, x))[0] for layer in two.layers)
    raises(ValueError, "cannot be joined by sum", jax.jit(two.forward), apart, x)
    raises(ValueError, "takes a tuple of 2 params, one a layer, not 0", two.forward, (), x)
    raises(ValueError, "of 2 params, one a layer, not 1", lambda: two.bind(apart[:1], key=key))
    twice = jp.repeat(jp.Dense(4), np.int64(2))
    assert jax.eval_shape(twice.init, key, x).w.shape == (2, 4, 4)
    raises(ValueError, "repeat inside is not supported", jp.shared, net, 2)
    tied = jp.tied(jp.Embedding(7, 4), jp.Dense(3))
    tokens = np.zeros((2, 3), int)
    raises(ValueError, "scores 4 features", jax.jit(tied.init), key, tokens)
    apart = at(Row(tied.embedding, tokens))[0], at(Row(tied.body, np.ones((2, 3, 4))))[0]
    raises(ValueError, "scores 4 features", jax.jit(tied.forward), apart, tokens)
    raises(ValueError, "takes the params", tied.forward, (), tokens)
    plain = jp.tied(Lookup(7), jp.Dense(4))
    raises(
        TypeError,
        "must be a form, such as jp.forms.Rows",
        jax.jit(jp.value_and_grad(plain, jp.CrossEntropy())),
        *at(Row(plain, tokens)),
        tokens,
    )
    raises(TypeError, "integer ids, not", jp.Embedding(3, 4).init, key, x)
    raises(TypeError, "integer ids, not", jp.Embedding(3, 4).forward, np.ones((3, 4)), x)
    raises(ValueError, r"rate is below 1, not 1", jp.Dropout, 1)
    raises(ValueError, r"but an input .* takes \(\)", jp.Dropout(0.1).forward, x, x)
    raises(TypeError, "floating dtype, not int32", jp.cast, net, jnp.int32)


def test_ids_masks_and_targets_have_one_padding():
    """A sequence that ends in ids and targets of -1, masked, is the sequence without its end."""
    net = jp.chain(jp.Embedding(7, 4), jp.Dense(12), jp.Attention(2, causal=False), jp.Dense(7))
    ids, targets = np.array([[1, 2, 1, -1, -1]]), np.array([[2, 3, 4, -1, -1]])
    params, _ = at(Row(net, ids))
    asked = {
        "grads": jp.Gradient(),
        "norms": jp.SqNorms(),
        "gram": jp.Gram(),
        "moment": jp.SecondMoment(),
        "clipped": jp.Clipped(0.1),
        "kfac": jp.KroneckerFactors(),
    }
    f = jax.jit(jp.quantities(net, jp.CrossEntropy(), **asked))
    got = f(params, ids, targets, mask=ids >= 0)
    short = ids[:, :3]
    expected = f(params, short, targets[:, :3], mask=short >= 0)
    for name in asked:
        assert relative_error(got[name], expected[name]) <= 1e-12, name


@pytest.mark.full
def test_small_and_large_integers_as_ids():
    layer = jp.Embedding(300, 2)
    table = jnp.asarray(normal(300, 2))
    ids = np.array([5, 100, 127])
    expected = layer.forward(table, ids)[0]
    for dtype in (np.int8, np.uint8, np.int16, np.int64):
        got, residuals = layer.forward(table, ids.astype(dtype))
        np.testing.assert_array_equal(got, expected)
        form = layer.backward(table, residuals, jnp.ones((3, 2)))[0]
        np.testing.assert_array_equal(jnp.flatnonzero(form.sum()[:, 0]), ids)
    with jax.enable_x64(False), pytest.raises(ValueError, match="holds 4294967299, which does not"):
        layer.forward(table.astype(jnp.float32), np.array([2**32 + 3]))


def between(net, loss):
    products = jp.inner_products(net, loss)
    return lambda params, x, target: products(params, (x, target), (x, target))


@pytest.mark.parametrize("vocab", [500, 10_000])
@pytest.mark.parametrize(
    "of", [jp.per_example_sq_norms, jp.second_moment, jp.gram, between, jp.clipped_grad]
)
def test_what_is_asked_of_an_embedding_takes_memory_linear_in_t(of, vocab):
    net = jp.chain(jp.Embedding(vocab, 16), jp.GlobalAvgPool(), jp.Dense(2))
    loss, bound = jp.CrossEntropy(), {"max_norm": 1.0} if of is jp.clipped_grad else {}

    def temp(length):
        ids, target = (jax.ShapeDtypeStruct(s, jnp.int32) for s in ((2, length), (2,)))
        params = jax.eval_shape(net.init, jax.random.key(0), ids)
        compiled = jax.jit(of(net, loss, **bound)).lower(params, ids, target).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temp(4096) <= 4.5 * temp(1024)
    assert temp(4096) <= 3 * 2 * 4096 * 16 * 8 + 2 * 10_000 * 16 * 8


@pytest.mark.few(2)
@pytest.mark.parametrize("vocab", [7, 40, 400])
@pytest.mark.parametrize("length", [1, 6])
def test_rows_of_a_table_of_any_size_against_the_table(vocab, length):
    """With ids that have no row, repeated ids, and an example whose ids are all the same."""
    table_of = jp.forms.Stacked
    ids = np.random.default_rng(0).integers(-2, vocab + 2, (4, length))
    ids[1], ids[2, :2], ids[3, -2:] = 5, 3, 3
    form = jp.forms.Rows(ids, normal(4, length, 3), vocab)
    other = jp.forms.Rows(ids[::-1], normal(4, length, 3) ** 2, vocab)
    names = ("sq_norms", "norms", "inner_products", "second_moment")

    def answers(form, other):
        of_form = {name: getattr(form, name)() for name in names}
        return of_form | {"other": other.norms(), "products": form.products_with(other)}

    @jax.jit
    def of_tables(*rows):
        return answers(*(table_of(each.per_example()) for each in rows))

    got, expected = jax.jit(answers)(form, other), of_tables(form, other)
    for name, want in expected.items():
        assert relative_error(got[name], want) <= 1e-10, name
    shares = (ids[..., None] == np.arange(vocab)).mean(axis=1)
    assert relative_error(jax.jit(jp.forms.Rows.in_one_position)(form).x, shares) <= 1e-10
    stacked = jax.tree.map(lambda a, b: np.stack([a, b]), form, other)
    norms, want = type(form).norms, np.stack([expected["norms"], expected["other"]])
    for each in (jax.vmap(norms), lambda rows: jax.lax.map(norms, rows)):
        assert relative_error(jax.jit(each)(stacked), want) <= 1e-10
    half = jp.forms.Rows(form.ids, form.ct.astype(np.float16) * np.float16(1e4), vocab)
    got, expected = jax.jit(norms)(half), of_tables(half, half)["norms"]
    assert got.dtype == jnp.float32
    assert relative_error(got, expected) <= 1e-5


class Plain(jp.Layer):
    """y = tanh(x w), with a cotangent of w that is summed over examples."""

    def init(self, key, x):
        return jax.random.normal(key, (x.shape[-1], x.shape[-1]), x.dtype)

    def forward(self, w, x):
        y = jnp.tanh(x @ w)
        return y, (x, y)

    def backward(self, w, residuals, ct):
        x, y = residuals
        d_z = ct * (1 - y**2)
        axes = tuple(range(x.ndim - 1))
        return jnp.tensordot(x, d_z, (axes, axes)), d_z @ w.T


ATTENDING = jp.chain(Plain(), jp.Dense(12), jp.Attention(2), jp.Dense(4))
AROUND_STACKS = [
    Doubled(jp.repeat(Plain(), 2)),
    Around(jp.repeat(jp.chain(jp.Dense(4), Plain()), 2)),
    jp.repeat(Doubled(jp.repeat(Plain(), 2)), 3),
    jp.chain(jp.recompute(Doubled(jp.chain(jp.repeat(Plain(), 2), jp.Tanh()))), jp.Dense(4)),
    Doubled(jp.repeat(Doubled(jp.repeat(ATTENDING, 2)), 3)),
]


@pytest.mark.full
@pytest.mark.few(2)
@pytest.mark.parametrize("examples", [2, 5])
@pytest.mark.parametrize("net", AROUND_STACKS, ids=repr)
def test_examples_one_by_one_of_a_layer_around_a_stack(net, examples):
    """A stack's residuals have the example after the layer, also if both axes are equally long."""
    x, target = jax.random.normal(jax.random.key(1), (2, examples, 3, 4))
    loss, params = jp.HalfSquaredError(), net.init(jax.random.key(0), x)
    mask = None
    if net is AROUND_STACKS[-1]:
        mask = jnp.arange(3)[None] < jnp.arange(1, 6)[:examples, None]
    each = jax.jit(jp.per_example_grads(net, loss))(params, x, target, mask=mask)
    bound = net.bind(params, mask=mask)
    for n in range(examples):
        one = None if mask is None else mask[n : n + 1]
        _, own = jp.autodiff(net, loss)(params, x[n : n + 1], target[n : n + 1], mask=one)
        of_n = jax.tree.map(lambda g, n=n: g[n], each)
        assert relative_error(of_n, own) <= 1e-10
    assert jax.tree.structure(learned(bound)) == jax.tree.structure(each)


def test_residuals_without_an_example_axis_are_named():
    class Lost(jp.Layer):
        def init(self, key, x):
            return jnp.ones(x.shape[-1], x.dtype)

        def forward(self, params, x):
            return x * params[None], (x, x.mean(0))

        def backward(self, params, residuals, ct):
            return (residuals[0] * ct).sum(0), ct * params[None]

    f, x = jp.per_example_grads(Lost(), jp.HalfSquaredError()), np.ones((2, 3))
    with pytest.raises(ValueError, match=r"Lost\(\): residuals\[1\] is float64\[3\], where axis 0"):
        jax.jit(f)(np.ones(3), x, x)
