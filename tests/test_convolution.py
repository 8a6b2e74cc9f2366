"""The factored form of a convolution's weights, its errors, and PyTorch as an oracle."""

import dataclasses

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from table import Row, at, relative_error
from test_layers import by_hand, ct_for

import jaxprop as jp
from jaxprop.layers import patches
from jaxprop.layers.windows import Windows


def normal(*shape, seed=0):
    return jax.device_put(np.random.default_rng(seed).normal(size=shape))


@st.composite
def forms(draw):
    rank = draw(st.integers(1, 2))

    def axes(low, high):
        return tuple(draw(st.integers(low, high)) for _ in range(rank))

    padding = tuple(zip(axes(0, 1), axes(0, 1), strict=True))
    windows = Windows(axes(1, 3), axes(1, 2), padding, axes(1, 2), axes(1, 2))
    spatial, groups = axes(5, 6), draw(st.integers(1, 2))
    batch = draw(st.integers(1, 4))
    x = normal(batch, *spatial, groups * draw(st.integers(1, 3)))
    ct = normal(batch, *windows.outputs(spatial), groups * draw(st.integers(1, 3)), seed=1)
    return jp.Patches(x, ct, windows, groups)


def by_vjp(form):
    """g_n by ``jax.vjp`` of the convolution."""
    windows = form.windows
    axes = "HWD"[: len(windows.window)]

    def own(x, ct):
        def f(w):
            return jax.lax.conv_general_dilated(
                x[None],
                w,
                windows.strides,
                windows.padding,
                windows.spread,
                windows.dilation,
                (f"N{axes}C", f"{axes}IO", f"N{axes}C"),
                form.groups,
            )

        shape = (*windows.window, x.shape[-1] // form.groups, ct.shape[-1])
        return jax.vjp(f, jnp.zeros(shape))[1](ct[None])[0]

    return jp.Stacked(jax.vmap(own)(form.x, form.ct))


def asked(form, weights):
    return [
        form.per_example(),
        form.sum(),
        form.weighted_sum(weights),
        form.sq_norms(),
        form.norms(),
        form.inner_products(),
        form.second_moment(),
    ]


@pytest.mark.full
@given(form=forms())
def test_every_question_is_answered_as_by_the_generic_rule(form):
    weights = jnp.linspace(0.1, 1, len(form.x))
    got, expected = jax.jit(lambda form: (asked(form, weights), asked(by_vjp(form), weights)))(form)
    assert relative_error(got, expected) <= 1e-10


def test_what_is_asked_of_the_patches_of_groups():
    """Questions beyond those of the quantities; patches are the gradients for a ct of ones."""
    windows = Windows.over((4, 3), (3, 2), (1, 1), "SAME", (1, 1))
    form = jp.Patches(normal(3, 4, 3, 4), normal(3, 4, 3, 6, seed=1), windows, 2)
    other = jp.Patches(normal(2, 4, 3, 4, seed=2), normal(2, 4, 3, 6, seed=3), windows, 2)
    weights, real = jnp.array([0.5, 2.0, 1.0]), jnp.array([True, False, True])
    sides = jp.quantity.Sides(normal(12, 2), normal(6, 5))

    def asked(form, other):
        pair = form.for_products(other), other.for_products(form)
        return [form.per_example(), form.projected(sides), pair[0].products_with(pair[1])]

    @jax.jit
    def both(form, other):
        patches = by_vjp(dataclasses.replace(form, ct=jnp.ones((3, 4, 3, 2)))).per_example()
        patches, ct = patches.reshape(3, 12, 2), form.ct.sum((1, 2)).reshape(3, 2, 3)
        sums = jnp.einsum("n,nig->gi", jnp.where(real, weights, 0), patches)
        means = jnp.einsum("nig,ngo->nigo", patches / 12, ct).reshape(3, 3, 2, 2, 6)
        got = form.sum_of_x(real, weights), form.in_one_position().per_example()
        return (asked(form, other), got), (asked(by_vjp(form), by_vjp(other)), (sums, means))

    got, expected = both(form, other)
    assert relative_error(got, expected) <= 1e-12
    assert form.sizes == (12, 6)


@pytest.mark.full
@pytest.mark.parametrize("channels", [2, patches.WIDE])
def test_block_by_block_is_all_at_once(channels, monkeypatch):
    windows = Windows.over((5, 4), (3, 2), (1, 2), "SAME", (1, 1))
    x = normal(6, 5, 4, channels)
    form = jp.Patches(x, normal(6, *windows.outputs((5, 4)), 3, seed=1), windows)
    weights = jnp.linspace(0.1, 1, 6)
    a_patch = form.ct.shape[1] * form.ct.shape[2] * windows.taps * channels * 8

    @jax.jit
    def by_generic_rule(form):
        rows = patches._patches(x, windows, 1).reshape(-1, windows.taps * channels)
        generic = by_vjp(form)
        count = jnp.asarray(form.ct[..., 0].size, rows.dtype)
        return [*asked(generic, weights), rows.T @ rows, count, generic.sum()]

    expected = by_generic_rule(form)
    for examples in (1, 2, 5, 6):  # in blocks of 1, 2, 3 and 3
        monkeypatch.setattr(patches, "BLOCK_BYTES", {"cpu": examples * a_patch, "default": 1})
        got = jax.jit(
            lambda form: [*asked(form, weights), *form.gram_of_x(), form._block_by_block()]
        )(form)
        monkeypatch.undo()
        assert relative_error(got, expected) <= 1e-12


def test_both_platforms_rules_agree():
    windows = Windows.over((6, 5), (3, 2), (2, 1), "SAME", (1, 2))
    form = jp.Patches(normal(4, 6, 5, 3), normal(4, *windows.outputs((6, 5)), 2, seed=1), windows)
    convolved, blocks, in_one = jax.jit(
        lambda form: (form._convolved(), form._block_by_block(), form._in_one())
    )(form)
    assert relative_error(convolved, blocks) <= 1e-12
    assert relative_error(in_one, convolved) <= 1e-12

    @jax.jit
    def norms(form):
        squares = jnp.sum(form.per_example() ** 2, axis=(1, 2, 3, 4))
        each = [jnp.sum(tap.per_example() ** 2, axis=(1, 2)) for tap in form._by_taps()]
        return squares, each, form.sq_norms()

    for channels in (3, 32):  # one convolution for all taps, and a product for each
        squares, each, got = norms(dataclasses.replace(form, x=normal(4, 6, 5, channels)))
        assert len(each) == (1 if channels == 3 else 6)
        assert relative_error(sum(map(np.asarray, each)), squares) <= 1e-12
        assert relative_error(got, squares) <= 1e-12


@pytest.mark.parametrize("padding", ["SAME", "VALID", 1])
def test_both_ways_back_through_max_pooling_agree(padding):
    """Both take the first of equal entries, of which small integers have many."""
    pool = jp.MaxPool((3, 2), strides=2, padding=padding)
    x = np.random.default_rng(0).integers(0, 3, (2, 7, 6, 3)).astype(float)
    y, residuals = jax.jit(pool.forward)((), x)
    ct = normal(*y.shape, seed=1)
    by_taps = jax.jit(pool._tap_by_tap)(*residuals, ct)
    assert relative_error(jax.jit(pool._scattered)(*residuals, ct), by_taps) <= 1e-14
    assert relative_error(jax.jit(pool.backward)((), residuals, ct)[1], by_taps) <= 1e-14


def test_kronecker_factors_of_one_position_are_the_ggn_block():
    """A window over the whole image is a dense layer on its pixels."""
    net, loss = jp.chain(jp.Conv(3, (2, 3), padding="VALID"), jp.Flatten()), jp.CrossEntropy()
    dense = jp.chain(jp.Flatten(), jp.Dense(3))
    params, x = at(Row(net, np.asarray(normal(1, 2, 3, 2))))
    flat = ((), jp.AffineParams(np.asarray(params[0].w).reshape(12, 3), params[0].b))
    target = np.array([1])
    got = jax.jit(jp.kronecker_factors(net, loss))(params, x, target)[0]
    expected = jax.jit(jp.kronecker_factors(dense, loss))(flat, x, target)[1]
    assert relative_error(got, expected) <= 1e-12


@pytest.mark.full
def test_each_group_has_kronecker_factors():
    """With a window over the whole image, a group is a dense layer on its channels."""
    net = jp.chain(jp.Conv(4, (2, 3), padding="VALID", groups=2), jp.Flatten())
    loss = jp.HalfSquaredError()
    params, x = at(Row(net, np.asarray(normal(3, 2, 3, 6))))
    a, b = jp.kronecker_factors(net, loss)(params, x, jnp.zeros((3, 4)))[0].w
    assert a.shape == (2, 18, 18)
    for group in range(2):
        dense = jp.chain(jp.Flatten(), jp.Dense(2))
        part = x[..., 3 * group : 3 * group + 3]
        w = params[0].w[..., 2 * group : 2 * group + 2].reshape(18, 2)
        flat = ((), jp.AffineParams(w, params[0].b[2 * group : 2 * group + 2]))
        want = jp.kronecker_factors(dense, loss)(flat, part, jnp.zeros((3, 2)))[1].w
        assert relative_error((a[group], b[group]), tuple(want)) <= 1e-12


@pytest.mark.few(1)
@pytest.mark.parametrize(
    ("layer", "shape", "widths", "mode"),
    [
        (jp.Conv(3, (4, 3), (2, 1), "CIRCULAR", (1, 2)), (2, 5, 6, 2), [(1, 2), (2, 2)], "wrap"),
        (jp.Conv(3, (3,), 1, "CIRCULAR"), (2, 1, 2), [(1, 1)], "wrap"),
        (jp.Conv(2, (3, 6), 1, "REFLECT"), (3, 2, 4, 1), [(1, 1), (2, 3)], "reflect"),
        (jp.Conv(2, (3,), 2, "CAUSAL", 2), (2, 7, 2), [(4, 0)], "constant"),
        (jp.Conv(2, (5, 1), 1, 1), (2, 4, 3, 2), [(1, 1), (1, 1)], "constant"),
    ],
)
def test_padding_is_that_of_numpy(layer, shape, widths, mode):
    """y and the gradients are those of ``jnp.pad`` before the same convolution with "VALID"."""
    valid = jp.Conv(layer.features, layer.window, layer.strides, "VALID", layer.dilation)
    params, x = at(Row(layer, np.asarray(normal(*shape))))
    widths = ((0, 0), *widths, (0, 0))

    @jax.jit
    def by_numpy(params, x, ct):
        f = lambda params, x: valid.forward(params, jnp.pad(x, widths, mode))[0]  # noqa: E731
        y, pull = jax.vjp(f, params, x)
        return y, pull(ct)

    ct = ct_for(layer, params, x)
    y, cotangents = by_numpy(params, x, ct)
    assert relative_error(jax.jit(layer.forward)(params, x)[0], y) <= 1e-14
    assert relative_error(by_hand(layer, params, x, ct), cotangents) <= 1e-12


def test_causal_reads_nothing_that_comes_after():
    layer, x = jp.Conv(2, (3,), padding="CAUSAL", dilation=2), normal(1, 9, 2)
    params, changed = jax.jit(layer.init)(jax.random.key(0), x), np.array(x)
    changed[0, 5] += 1.0
    forward = jax.jit(layer.forward)
    y, other = (np.asarray(forward(params, x)[0]) for x in (x, changed))
    assert y.shape == (1, 9, 2)
    np.testing.assert_array_equal(y[0, :5], other[0, :5])
    assert (np.flatnonzero((y != other).any((0, 2))) == [5, 7]).all()


@pytest.mark.parametrize("mode", ["wrap", "reflect", "edge"])
@pytest.mark.parametrize("widths", [((2, 0), (1, 3)), ((0, 0), (4, 4)), ((1, 1), (0, 0))], ids=str)
def test_pad_is_that_of_numpy(mode, widths):
    layer, x = jp.Pad(widths, mode=mode), normal(2, 3, 5, 2)

    @jax.jit
    def by_numpy(x, ct):
        y, pull = jax.vjp(lambda x: jnp.pad(x, ((0, 0), *widths, (0, 0)), mode), x)
        return y, *pull(ct)

    ct = ct_for(layer, (), x, seed=1)
    y, d_x = by_numpy(x, ct)
    np.testing.assert_array_equal(jax.jit(layer.forward)((), x)[0], y)
    np.testing.assert_allclose(by_hand(layer, (), x, ct)[1], d_x, rtol=1e-14)


def test_a_constant_is_added_more_often_than_x_has_entries():
    layer, x = jp.Pad(((3, 1),), 0.5), np.array([[[1.0, 2.0]]])
    y, residuals = jax.jit(layer.forward)((), x)
    np.testing.assert_array_equal(y, [[*[[0.5, 0.5]] * 3, [1.0, 2.0], [0.5, 0.5]]])
    _, d_x = jax.jit(layer.backward)((), residuals, np.arange(10.0).reshape(1, 5, 2))
    np.testing.assert_array_equal(d_x, [[[6.0, 7.0]]])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_repeated_entries_add_up_in_float32(dtype):
    layer, x = jp.Pad(((300, 300),), mode="edge"), np.ones((1, 1, 1), jnp.dtype(dtype))
    _, residuals = jax.jit(layer.forward)((), x)
    _, d_x = jax.jit(layer.backward)((), residuals, np.ones((1, 601, 1), x.dtype))
    np.testing.assert_array_equal(d_x, np.full_like(d_x, 601))


@pytest.mark.parametrize("count_include_pad", [True, False])
@pytest.mark.parametrize("padding", ["SAME", "VALID", 1, ((0, 2), (1, 0))], ids=str)
def test_a_mean_counts_its_padding_or_not(padding, count_include_pad):
    layer = jp.AvgPool((3, 2), (2, 1), padding, count_include_pad)
    x = normal(2, 5, 4, 3)
    (a, b), (c, d) = {"SAME": ((1, 1), (0, 1)), "VALID": ((0, 0), (0, 0)), 1: ((1, 1), (1, 1))}.get(
        padding, padding
    )
    fill = 0 if count_include_pad else np.nan
    around = np.pad(x, ((0, 0), (a, b), (c, d), (0, 0)), constant_values=fill)
    windows = np.lib.stride_tricks.sliding_window_view(around, (3, 2), (1, 2))[:, ::2]
    got, _ = jax.jit(layer.forward)((), x)
    np.testing.assert_allclose(got, np.nanmean(windows, axis=(-2, -1)), rtol=1e-13)


@pytest.mark.parametrize("padding", ["SAME", "VALID", 2, ((1, 0), (2, 2))], ids=str)
@pytest.mark.parametrize("dilation", [1, (2, 3)])
def test_transpose_is_that_of_jax(padding, dilation):
    pairs = ((2, 2), (2, 2)) if padding == 2 else padding
    rates = (1, 1) if dilation == 1 else dilation
    for window, strides in (((3, 2), (2, 3)), ((2, 4), (3, 1)), ((1, 3), (2, 2))):
        layer = jp.ConvTranspose(2, window, strides, padding, bias=False, dilation=dilation)
        params, x = at(Row(layer, np.asarray(normal(2, 9, 8, 3))))
        expected = jax.lax.conv_transpose(x, params.w, strides, pairs, rates)
        assert relative_error(jax.jit(layer.forward)(params, x)[0], expected) <= 1e-12


def test_groups_of_a_transpose_are_transposes_side_by_side():
    layer = jp.ConvTranspose(6, (3, 2), (2, 1), groups=2, dilation=(1, 2))
    params, x = at(Row(layer, np.asarray(normal(2, 3, 4, 4))))
    alone = jp.ConvTranspose(3, (3, 2), (2, 1), dilation=(1, 2))
    halves = zip(*(np.split(leaf, 2, -1) for leaf in (x, *params)), strict=True)
    forward = jax.jit(alone.forward)
    ys = [forward(jp.AffineParams(w, b), part)[0] for part, w, b in halves]
    assert relative_error(jax.jit(layer.forward)(params, x)[0], np.concatenate(ys, -1)) <= 1e-13


def test_first_of_equals_wins():
    """All elements of a window are equal, and the first gets the whole cotangent."""
    layer, x = jp.MaxPool((2, 2)), np.ones((1, 2, 2, 1))
    _, residuals = jax.jit(layer.forward)((), x)
    _, d_x = jax.jit(layer.backward)((), residuals, np.full((1, 1, 1, 1), 3.0))
    np.testing.assert_array_equal(d_x[0, :, :, 0], [[3, 0], [0, 0]])


@pytest.mark.parametrize("padding", ["SAME", "REFLECT"])
def test_quantities_under_explicit_sharding(padding):
    mesh = jax.make_mesh((2,), ("d",), axis_types=(jax.sharding.AxisType.Explicit,))
    conv, loss = jp.Conv(4, (3, 3), 2, padding), jp.CrossEntropy()
    net = jp.chain(conv, jp.Relu(), jp.GlobalAvgPool())
    params, x = at(Row(net, np.asarray(normal(4, 5, 5, 2))))
    target = np.array([0, 1, 2, 3])
    _, expected = jax.jit(jp.value_and_grad(net, loss))(params, x, target)
    with jax.set_mesh(mesh):
        spread = jax.sharding.PartitionSpec("d")
        args = params, jax.device_put(x, spread), jax.device_put(target, spread)
        _, got = jax.jit(jp.value_and_grad(net, loss))(*args)
    assert relative_error(jax.tree.map(np.asarray, got), expected) <= 1e-12


def test_under_shard_map():
    net, loss = jp.chain(jp.Conv(3), jp.MaxPool((2, 2)), jp.GlobalAvgPool()), jp.CrossEntropy()
    params, x = at(Row(net, np.asarray(normal(8, 4, 4, 2))))
    target = np.arange(8) % 3
    mesh = jax.make_mesh((2,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    P = jax.sharding.PartitionSpec
    for f in (jp.value_and_grad(net, loss), jp.clipped_grad(net, loss, 1e6)):
        sharded = jax.shard_map(
            lambda *args, f=f: f(*args)[1],
            mesh=mesh,
            in_specs=(P(), P("d"), P("d")),
            out_specs=P(),
        )
        got = jax.tree.map(lambda g: np.asarray(g) / 2, jax.jit(sharded)(params, x, target))
        assert relative_error(got, jax.jit(f)(params, x, target)[1]) <= 1e-12


IMAGE = jax.ShapeDtypeStruct((2, 6, 5, 4), jnp.float32)


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: jp.Conv(0), ValueError, "Conv: features is at least 1, not 0"),
        (lambda: jp.Conv(2.0), TypeError, "features is a whole number, not 2.0"),
        (lambda: jp.Conv(4, 3), TypeError, "window is a tuple with a size for each axis, not 3"),
        (lambda: jp.Conv(4, (3, 0)), ValueError, "at least 1 along each axis"),
        (lambda: jp.Conv(4, (1, 1, 1, 1)), ValueError, "1 to 3 axes, not 4"),
        (lambda: jp.Conv(4, strides=(1,)), ValueError, "strides has 1 entries"),
        (lambda: jp.Conv(4, strides=0), ValueError, "strides must be at least 1"),
        (lambda: jp.Conv(4, dilation=1.5), TypeError, "dilation takes a whole number"),
        (lambda: jp.Conv(4, padding="FULL"), ValueError, '"REFLECT", a whole number or a'),
        (lambda: jp.Conv(4, padding=-1), ValueError, "must not be negative, not -1"),
        (lambda: jp.Conv(4, padding=1.0), ValueError, "each of 2 axes, not 1.0"),
        (lambda: jp.Conv(4, padding="CAUSAL"), ValueError, "along time, one axis, not 2"),
        (
            lambda: jp.Conv(4, (11, 13), padding="REFLECT"),
            ValueError,
            "up to 4 .* axis of 5, not 6",
        ),
        (
            lambda: jp.Conv(4, (3, 13), padding="CIRCULAR"),
            ValueError,
            "up to 5 .* axis of 5, not 6",
        ),
        (lambda: jp.Conv(4, padding=((1, 1),)), ValueError, "pair for each of 2 axes"),
        (lambda: jp.Conv(4, padding=((1, -1), (0, 0))), ValueError, "must not be negative"),
        (lambda: jp.Conv(4, groups=3), ValueError, "groups divides features, 4, but is 3"),
        (lambda: jp.Conv(4, bias=1), TypeError, "bias is True or False, not 1"),
        (lambda: jp.Conv(6, groups=3), ValueError, "whose channels 3 groups divide"),
        (
            lambda: jp.Conv(4, (3,)),
            ValueError,
            r"\(N, T, C\), axis 0 the example, not \(2, 6, 5, 4\)",
        ),
        (lambda: jp.Conv(4, (7, 1), padding="VALID"), ValueError, "no window fits into x"),
        (lambda: jp.ConvTranspose(0), ValueError, "ConvTranspose: features is at least 1"),
        (lambda: jp.ConvTranspose(4, padding="CAUSAL"), ValueError, 'is "SAME", "VALID", a whole'),
        (lambda: jp.ConvTranspose(4, groups=3), ValueError, "groups divides features, 4"),
        (lambda: jp.ConvTranspose(6, groups=3), ValueError, "whose channels 3 groups divide"),
        (lambda: jp.ConvTranspose(4, dilation=0), ValueError, "dilation must be at least 1"),
        (lambda: jp.MaxPool(padding="REFLECT"), ValueError, 'is "SAME", "VALID", a whole'),
        (lambda: jp.AvgPool(padding=2), ValueError, "smaller than the window"),
        (lambda: jp.AvgPool(count_include_pad=0), TypeError, "count_include_pad is True or False"),
        (lambda: jp.MaxPool((2,)), ValueError, r"takes x of shape \(N, T, C\)"),
        (lambda: jp.MaxPool((7, 7)), ValueError, "no window fits into x"),
        (lambda: jp.MaxPool(padding=((2, 0), (0, 0))), ValueError, "smaller than the window"),
        (lambda: jp.AvgPool(2), TypeError, "AvgPool: window is a tuple"),
        (lambda: jp.Reshape((3, 3)), ValueError, "an example has 9 elements, but x has"),
        (lambda: jp.Reshape([3]), TypeError, "takes a tuple of whole numbers"),
        (lambda: jp.Pad(((1, 1),)), ValueError, "takes x with 1 axes between N and C"),
        (lambda: jp.Pad(((1, -1),)), TypeError, "pairs of whole numbers"),
        (lambda: jp.Pad(((1, 1),), mode="mean"), ValueError, 'mode is "constant", "wrap"'),
        (lambda: jp.Pad(((1, 1),), 2.0, "edge"), ValueError, "has no use for a value"),
        (lambda: jp.Pad(((1, 1), (5, 0)), mode="reflect"), ValueError, "up to 4 .* of 5, not 5"),
        (lambda: jp.Pad(((7, 1), (5, 0)), mode="wrap"), ValueError, "up to 6 .* of 6, not 7"),
    ],
)
def test_errors(make, error, words):
    with pytest.raises(error, match=words):
        make().init(jax.random.key(0), IMAGE)


@pytest.mark.parametrize("layer", [jp.Conv(2), jp.MaxPool(), jp.Flatten(), jp.GlobalAvgPool()])
def test_integers_are_refused(layer):
    with pytest.raises(TypeError, match="takes floating x, not int32"):
        layer.init(jax.random.key(0), jax.ShapeDtypeStruct((2, 4, 4, 1), jnp.int32))


@pytest.mark.parametrize("layer", [jp.Conv(3), jp.ConvTranspose(3)], ids=str)
def test_a_wrong_cotangent_is_named(layer):
    x = np.ones((2, 4, 4, 1))
    params = jax.jit(layer.init)(jax.random.key(0), x)
    with pytest.raises(ValueError, match=r"ct has shape \(2, 3, 3, 3\), but x has \(2, 4, 4, 1\)"):
        layer.backward(params, x, np.ones((2, 3, 3, 3)))


def test_pytorch_agrees():
    """Convolution with stride, dilation and groups, pooling with ties, and their gradients."""
    torch = pytest.importorskip("torch")
    from torch import nn

    net = jp.chain(
        jp.Conv(6, (3, 2), (2, 1), ((1, 1), (2, 2)), (1, 2), groups=2),
        jp.Relu(),
        jp.MaxPool((3, 3), 2, ((1, 1), (1, 1))),
        jp.ConvTranspose(3, (3, 2), (2, 1), "VALID"),
        jp.AvgPool((2, 2), 1, ((1, 1), (1, 1))),
    )
    params, x = at(Row(net, np.asarray(normal(3, 8, 7, 4))))
    y, residuals = net.forward(params, x)
    ct = normal(*y.shape, seed=1)
    d_params, d_x = net.backward(params, residuals, ct)

    torch.set_default_dtype(torch.float64)
    peer = nn.Sequential(
        nn.Conv2d(4, 6, (3, 2), (2, 1), (1, 2), (1, 2), groups=2),
        nn.ReLU(),
        nn.MaxPool2d(3, 2, 1),
        nn.ConvTranspose2d(6, 3, (3, 2), (2, 1)),
        nn.AvgPool2d(2, 1, 1),
    )
    w, b = params[0]
    transposed = np.flip(np.asarray(params[3].w), (0, 1))  # torch's window is flipped
    with torch.no_grad():
        peer[0].weight.copy_(torch.tensor(np.transpose(w, (3, 2, 0, 1))))
        peer[0].bias.copy_(torch.tensor(np.asarray(b)))
        peer[3].weight.copy_(torch.tensor(np.transpose(transposed, (2, 3, 0, 1)).copy()))
        peer[3].bias.copy_(torch.tensor(np.asarray(params[3].b)))
    its_x = torch.tensor(np.transpose(x, (0, 3, 1, 2)), requires_grad=True)
    its_y = peer(its_x)
    its_y.backward(torch.tensor(np.transpose(ct, (0, 3, 1, 2))))

    def last(image):
        return np.transpose(image.detach().numpy(), (0, 2, 3, 1))

    got = y, d_x, d_params[0].w.sum(), d_params[0].b.sum(), d_params[3].w.sum()
    its_w = np.transpose(peer[3].weight.grad.numpy(), (2, 3, 0, 1))
    expected = (
        last(its_y),
        last(its_x.grad),
        np.transpose(peer[0].weight.grad.numpy(), (2, 3, 1, 0)),
        peer[0].bias.grad.numpy(),
        np.flip(its_w, (0, 1)),
    )
    assert relative_error(got, expected) <= 1e-12


@pytest.mark.full
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize(
    ("layer", "size"),
    [
        pytest.param(jp.AvgPool((32, 32)), 32, marks=pytest.mark.full),
        (jp.AvgPool((8, 8)), 8),
        (jp.AvgPool((8, 8), padding=4, count_include_pad=False), 8),
        (jp.GlobalAvgPool(), 40),
    ],
    ids=str,
)
def test_the_mean_of_equal_numbers_is_that_number(layer, size, dtype):
    for value in (1.0, 2000.0):
        x = jnp.full((1, size, size, 1), value, dtype)
        y, residuals = layer.forward((), x)
        np.testing.assert_array_equal(y, jnp.full_like(y, value))
        _, d_x = layer.backward((), residuals, jnp.full_like(y, 512))
        np.testing.assert_array_equal(d_x, jnp.full_like(x, 512 * y.size / x.size))


@pytest.mark.full
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_windows_that_overlap_add_up_in_float32(dtype):
    """An entry is in 81 windows, whose cotangents of 1 sum up to 81, not to 64 or less."""
    layer = jp.AvgPool((9, 9), strides=1)
    _, residuals = layer.forward((), jnp.ones((1, 17, 17, 1), dtype))
    _, d_x = layer.backward((), residuals, jnp.full((1, 9, 9, 1), 81, dtype))
    np.testing.assert_array_equal(d_x[0, 8, 8], [81])
    layer = jp.MaxPool((9, 9), strides=1)
    x = jnp.zeros((1, 17, 17, 1), dtype).at[0, 8, 8].set(1)
    _, d_x = layer.backward((), layer.forward((), x)[1], jnp.full((1, 9, 9, 1), 3.5, dtype))
    np.testing.assert_array_equal(d_x[0, 8, 8], jnp.full(1, 81 * 3.5, dtype))
