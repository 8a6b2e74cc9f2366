"""Every property on every row of the table."""

import functools

import chex
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from table import (
    ACTIVATIONS,
    TABLE,
    Row,
    at,
    edge,
    first_of_their_kind,
    ids,
    normal,
    relative_error,
    row_id,
)

import jaxprop as jp
from jaxprop.core.arrays import is_floating
from jaxprop.core.cotangents import gradient
from jaxprop.core.tree import learned

rows = pytest.mark.parametrize("row", TABLE, ids=row_id)
RTOL = {jnp.float32: 2e-5, jnp.bfloat16: 0.05}


@functools.partial(jax.jit, static_argnums=0)
def by_hand(layer, params, x, ct):
    _, residuals = layer.forward(params, x)
    return layer.walk(params, residuals, ct, gradient)


@functools.partial(jax.jit, static_argnums=0)
def by_vjp(layer, params, x, ct):
    _, pull = jax.vjp(lambda params, x: layer.forward(params, x)[0], params, x)
    d_params, d_x = pull(ct)
    return learned(d_params), floats(x, d_x)


def floats(x, tree):
    """The tree, with None where x has integers."""
    return jax.tree.map(
        lambda x, leaf: leaf if jnp.issubdtype(x.dtype, jnp.floating) else None, x, tree
    )


def ct_for(layer, params, x, seed=3):
    y, _ = jax.eval_shape(layer.forward, params, x)
    return jnp.asarray(np.random.default_rng(seed).normal(size=y.shape), y.dtype)


@pytest.mark.few(6)
@pytest.mark.parametrize("row", first_of_their_kind(TABLE), ids=row_id)
def test_check_layer(row):
    jp.check_layer(row.layer, row.x, at(row)[0])


@pytest.mark.full
@rows
def test_check_layer_near_the_initial_params(row):
    jp.check_layer(row.layer, row.x)


@pytest.mark.parametrize("layer", ACTIVATIONS, ids=row_id)
def test_activations_at_their_edges(layer):
    row = Row(layer, edge(5, 6))
    params, x = at(row)
    ct = ct_for(layer, params, x)
    assert relative_error(by_hand(layer, params, x, ct), by_vjp(layer, params, x, ct)) <= 1e-12


@pytest.mark.few(6)
@pytest.mark.parametrize("row", first_of_their_kind(TABLE), ids=row_id)
def test_vmap_custom_vjp_and_narrow_dtypes(row):
    """By hand under vmap, as an ordinary function in JAX, and in float32 and bfloat16.

    What ``check_layer`` checks (jit and scan included) is not repeated.
    """
    params, x = at(row)
    ct = ct_for(row.layer, params, x)
    narrow = [(*at(row, dtype), ct.astype(dtype)) for dtype in RTOL]

    def widened(leaf):
        return leaf.astype(jnp.float64) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf

    @jax.jit
    def computed(exact, narrow):
        wide = [jax.tree.map(widened, args) for args in narrow]
        stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), exact, *wide)
        mapped = jax.vmap(lambda *args: by_hand(row.layer, *args))(*stacked)
        params, x, ct = exact
        y, pull = jax.vjp(jp.custom_vjp(row.layer), params, x)
        d_params, d_x = pull(ct)
        custom = learned(d_params), floats(x, d_x)
        ys = y, row.layer.forward(params, x)[0]
        return mapped, ys, custom, [by_hand(row.layer, *args) for args in narrow]

    mapped, ys, custom, got = computed((params, x, ct), narrow)
    once, *wide = (jax.tree.map(lambda leaf, i=i: leaf[i], mapped) for i in range(1 + len(RTOL)))
    assert relative_error(custom, once) <= 1e-12
    assert relative_error(*ys) <= 1e-14  # from one program, where XLA fuses each separately
    for dtype, args, here, there in zip(RTOL, narrow, got, wide, strict=True):
        primals = learned(args[0]), floats(x, args[1])
        chex.assert_trees_all_equal_dtypes(here, primals)
        assert relative_error(here, there) <= RTOL[dtype], dtype


NARROW_AND_WIDE = [(jnp.float32, jnp.float64), (jnp.float64, jnp.float32)]


def floating(tree, dtype):
    return jax.tree.map(lambda leaf: leaf.astype(dtype) if is_floating(leaf) else leaf, tree)


@pytest.mark.few(8)
@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize(("of_params", "of_x"), NARROW_AND_WIDE, ids=["wide x", "wide params"])
@pytest.mark.parametrize("row", first_of_their_kind(TABLE), ids=row_id)
def test_params_and_x_of_different_dtypes(row, of_params, of_x):
    """Products are in the wider dtype, d_x in x's; only a repeat needs y like x, and says so."""
    layer, (params, x) = row.layer, at(row)
    params, x = floating(params, of_params), floating(x, of_x)
    try:
        y, _ = jax.eval_shape(layer.forward, params, x)
    except ValueError as error:
        assert "its y is the x of the next" in str(error)  # noqa: PT017
        return
    ct = jax.tree.map(lambda leaf: jnp.asarray(normal(*leaf.shape), leaf.dtype), y)
    d_params, d_x = by_hand(layer, params, x, ct)
    expected = by_vjp(layer, params, x, ct)
    d_x = floats(x, d_x)
    assert jax.tree.map(jnp.result_type, d_x) == jax.tree.map(jnp.result_type, expected[1])
    if isinstance(layer, jp.BatchNorm | jp.GroupNorm):  # d_x is small beside its terms
        np.testing.assert_allclose(d_x, expected[1], atol=2e-5 * np.max(np.abs(ct)))
        d_x = expected[1]
    assert relative_error((d_params, d_x), expected) <= 2e-5


@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize(("of_params", "of_x"), NARROW_AND_WIDE, ids=["wide x", "wide params"])
def test_dtypes_that_differ_in_a_walk(of_params, of_x):
    """The form of a matrix with fewer columns than rows is summed in either order."""
    params, x = at(Row(jp.Dense(2), normal(60, 8)))
    params, x = floating(params, of_params), floating(x, of_x)
    loss, target = jp.HalfSquaredError(), jnp.ones((60, 2))
    for make in (jp.value_and_grad, functools.partial(jp.clipped_grad, max_norm=1e6)):
        got = jax.jit(make(jp.Dense(2), loss))(params, x, target)
        expected = jax.jit(jp.autodiff(jp.Dense(2), loss))(params, x, target)
        assert relative_error(got[1], expected[1]) <= 1e-5
    net = jp.LinearCrossEntropy(5)
    params, x = at(Row(net, (normal(2, 5, 4), ids(2, 5) % 5)))
    params, x = floating(params, of_params), floating(x, of_x)
    got = jax.jit(jp.value_and_grad(net, jp.Mean()))(params, x)
    expected = jax.jit(jp.autodiff(net, jp.Mean()))(params, x)
    assert relative_error(got[1], expected[1]) <= 1e-5


@rows
def test_static_and_hashable(row):
    assert jax.tree.leaves(row.layer) == []
    assert hash(row.layer) == hash(jax.tree.map(lambda leaf: leaf, row.layer))
    names = vars(jp)
    assert eval(repr(row.layer), names) == row.layer


@pytest.mark.few(4)
@rows
def test_residuals_have_the_example_first(row):
    if isinstance(row.layer, jp.Combinator):
        return  # a repeat stacks its layers' residuals
    params, x = at(row)
    for leaf in jax.tree.leaves(row.layer.forward(params, x)[1]):
        assert isinstance(leaf, jax.Array)
        assert leaf.shape[0] == len(jax.tree.leaves(x)[0])


@given(
    batch=st.integers(1, 5),
    positions=st.lists(st.integers(1, 3), max_size=2),
    widths=st.lists(st.integers(1, 9), min_size=2, max_size=4),
    bias=st.booleans(),
    activation=st.sampled_from(ACTIVATIONS),
)
def test_chains_of_any_shape(batch, positions, widths, bias, activation):
    layers = []
    for width in widths[1:]:
        layers += [jp.Dense(width, bias=bias), activation]
    net = jp.chain(*layers)
    x = np.random.default_rng(batch).normal(size=(batch, *positions, widths[0]))
    params, x = at(Row(net, x))
    ct = ct_for(net, params, x)
    assert relative_error(by_hand(net, params, x, ct), by_vjp(net, params, x, ct)) <= 1e-12


@pytest.mark.parametrize("layer", [jp.Dense, jp.Conv, jp.ConvTranspose])
def test_without_a_bias_there_is_no_param_for_it(layer):
    x = jax.ShapeDtypeStruct((2, 4, 4, 1), jnp.float64)
    assert jax.eval_shape(layer(3, bias=False).init, jax.random.key(0), x).b is None


def test_other_params_are_feedback_alignment():
    """backward takes params as an argument; given others, the error comes back through those."""
    layer = jp.Dense(3)
    x = jnp.ones((2, 4))
    params, other = layer.init(jax.random.key(0), x), layer.init(jax.random.key(1), x)
    _, residuals = layer.forward(params, x)
    ct = jnp.ones((2, 3))
    _, d_x = layer.backward(other, residuals, ct)
    np.testing.assert_allclose(d_x, ct @ other.w.T)


def test_walk_collects_what_is_asked():
    net = jp.chain(jp.Dense(3), jp.skip(jp.chain(jp.Dense(3), jp.Tanh())), jp.Dense(2))
    x = jnp.ones((4, 5))
    params = net.init(jax.random.key(0), x)
    _, residuals = net.forward(params, x)
    ct = jnp.ones((4, 2))
    met = []

    def visit(step):
        met.append(step.layer)
        return jax.tree.map(jnp.shape, step.d_x)

    visited, d_x = net.walk(params, residuals, ct, visit)
    assert met == [jp.Dense(2), jp.Tanh(), jp.Dense(3), jp.Dense(3)]
    assert visited == ((4, 5), ((4, 3), (4, 3)), (4, 3))
    assert d_x.shape == x.shape
