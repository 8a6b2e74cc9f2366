"""The head and its cross-entropy in chunks, against the two layers one after the other."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from table import normal, relative_error

import jaxprop as jp

IDS = np.array([[0, 6, -1, 3], [-1, -1, -1, -1], [5, 4, 2, 1]])
BODY = jp.chain(jp.Embedding(7, 4), jp.repeat(jp.skip(jp.chain(jp.Dense(4), jp.Tanh())), 2))


@pytest.mark.full
@pytest.mark.parametrize("chunk", [1, 3, 4, 7, 100])
@pytest.mark.parametrize(
    ("shape", "target"),
    [((3, 4, 5), IDS), ((3, 5), np.array([6, -1, 0])), ((3, 2, 2, 5), IDS.reshape(3, 2, 2))],
    ids=str,
)
def test_check_layer(shape, target, chunk):
    if chunk in (3, 7) or len(shape) == 3:
        layer = jp.LinearCrossEntropy(7, bias=chunk != 4, chunk=chunk)
        jp.check_layer(layer, (normal(*shape), target))
        assert eval(repr(layer), vars(jp)) == layer


@pytest.mark.full
def test_check_layer_of_one_class():
    jp.check_layer(jp.LinearCrossEntropy(1), (normal(3, 5), np.array([0, -1, 0])))


def problem(scale=1.0, dtype=jnp.float32, classes=50):
    rng = np.random.default_rng(1)
    h = jnp.asarray(scale * normal(4, 6, 5), dtype)
    target = jnp.asarray(rng.integers(0, classes, (4, 6))).at[1:3, 2:4].set(-1)
    params = jp.Dense(classes).init(jax.random.key(0), h.astype(jnp.float32))
    return params, h, target


@pytest.mark.few(2)
@pytest.mark.parametrize("scale", [1, 30, 1e4])
def test_is_the_head_and_its_loss(scale):
    params, h, target = problem(scale)
    chunked, whole = jp.LinearCrossEntropy(50, chunk=16), jp.Dense(50)

    @jax.jit
    def both(params, h):
        got = jp.walk(chunked, jp.Mean(), lambda step: step.d_params)(params, (h, target))
        by_jax = jax.value_and_grad(jp.loss_fn(chunked, jp.Mean()), (0, 1), allow_int=True)
        walked = jp.walk(whole, jp.CrossEntropy(), lambda step: step.d_params)(params, h, target)
        return got, by_jax(params, (h, target)), walked

    (value, grads, (d_h, _)), (by_jax, (of_params, (of_h, _))), (whole, forms, d_x) = both(
        params, h
    )
    np.testing.assert_allclose(value, whole, rtol=1e-6)
    np.testing.assert_allclose(by_jax, whole, rtol=1e-6)
    for w, b, d in ((*grads, d_h), (*of_params, of_h)):
        assert relative_error((w, b, d), (forms.w.sum(), forms.b.sum(), d_x)) <= 1e-6


def test_is_right_however_certain():
    """1 - p for a target that is almost certain, and a loss that vanishes in 1 + exp(-z)."""
    layer, w = jp.LinearCrossEntropy(3, chunk=2), jnp.float32([[20, 0, 1], [60, 0, 1], [-30, 3, 4]])
    params = jp.AffineParams(w, jnp.zeros(3, jnp.float32))
    target = jnp.array([0, 0, 0])
    values, residuals = layer.forward(params, (jnp.eye(3, dtype=jnp.float32), target))
    expected, of_expected = jp.CrossEntropy().forward(w, target)
    np.testing.assert_allclose(values, expected, rtol=1e-6)
    d_params, _ = layer.backward(params, residuals, jnp.ones(3, jnp.float32))
    np.testing.assert_allclose(d_params.w, jp.CrossEntropy().backward(of_expected), rtol=1e-5)


def test_padding_is_not_looked_at():
    params, h, target = problem()
    layer = jp.LinearCrossEntropy(50, chunk=16)
    spoiled = jnp.where((target < 0)[..., None], jnp.nan, h)
    f = jax.jit(jp.walk(layer, jp.Mean(), lambda step: step.d_params))
    got, expected = f(params, (spoiled, target)), f(params, (h, target))
    jax.tree.map(np.testing.assert_array_equal, got[:2], expected[:2])
    np.testing.assert_array_equal(got[2][0], expected[2][0])


def test_a_target_that_does_not_exist_shows_in_everything():
    params, h, target = problem()
    layer = jp.LinearCrossEntropy(50, chunk=16)
    wrong = target.at[1, 0].set(50)
    with pytest.raises(ValueError, match="takes a target below 50, not 50"):
        layer.forward(params, (h, wrong))
    values, residuals = jax.jit(layer.forward)(params, (h, wrong))
    assert np.isnan(values).tolist() == [False, True, False, False]
    d_params, (d_h, _) = layer.backward(params, residuals, jnp.ones(4, jnp.float32))
    assert np.isnan(d_params.w).all()
    assert np.isnan(d_h[1, 0]).all()
    assert np.isfinite(d_h[0]).all()
    assert np.isfinite(d_h[1, 1]).all()


def test_in_bfloat16_sums_are_of_the_params_dtype():
    params, h, target = problem(dtype=jnp.bfloat16)
    chunked = jp.LinearCrossEntropy(50, chunk=16)
    whole = jp.cast(jp.Dense(50), jnp.bfloat16)
    value, grads = jax.jit(jp.value_and_grad(chunked, jp.Mean()))(params, (h, target))
    expected, of_expected = jax.jit(jp.value_and_grad(whole, jp.CrossEntropy()))(params, h, target)
    assert value.dtype == grads.w.dtype == jnp.float32
    np.testing.assert_allclose(value, expected, rtol=1e-3)
    assert relative_error(grads, of_expected) <= 0.01


@pytest.mark.full
def test_every_quantity_of_a_net_that_ends_in_it():
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 7, (4, 3)))
    target = jnp.asarray(np.random.default_rng(1).integers(-1, 7, (4, 3)))
    ours = jp.chain(jp.on(0, BODY), jp.LinearCrossEntropy(7, chunk=3))
    parts = jp.chain(BODY, jp.Dense(7))
    params = ours.init(jax.random.key(0), (tokens, target))
    asked = {
        "grads": jp.Gradient(),
        "norms": jp.SqNorms(),
        "moment": jp.SecondMoment(),
        "clipped": jp.Clipped(0.1),
    }
    got = jax.jit(jp.quantities(ours, jp.Mean(), **asked))(params, (tokens, target))
    expected = jax.jit(jp.quantities(parts, jp.CrossEntropy(), **asked))(params, tokens, target)
    assert relative_error(got, expected) <= 1e-10
    halves = jax.jit(jp.quantities(ours, jp.Mean(), **asked, micro_batches=2))
    assert relative_error(halves(params, (tokens, target)), expected) <= 1e-10


def test_the_logits_of_a_large_vocabulary_are_never_there():
    n, t, features, classes = 4, 256, 64, 8192
    h = jax.ShapeDtypeStruct((n, t, features), jnp.float32)
    target = jax.ShapeDtypeStruct((n, t), jnp.int32)
    params = jax.eval_shape(jp.Dense(classes).init, jax.random.key(0), h)

    def temporaries(net, loss, *batch):
        program = jax.jit(jp.value_and_grad(net, loss)).lower(params, *batch).compile()
        return program.memory_analysis().temp_size_in_bytes

    logits = n * t * classes * 4
    whole = temporaries(jp.Dense(classes), jp.CrossEntropy(), h, target)
    chunked = temporaries(jp.LinearCrossEntropy(classes), jp.Mean(), (h, target))
    assert chunked < 0.45 * logits < logits < whole


H = jnp.ones((2, 3, 4))


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (H, TypeError, r"takes a pair \(h, target\), not float64\[2,3,4\]"),
        ((H, jnp.ones((2, 3))), TypeError, r"takes integer targets, not float64\[2,3\]"),
        ((H, jnp.ones(2, int)), ValueError, r"a target of shape \(2, 3\), not \(2,\)"),
        ((jnp.ones((2, 3), int), jnp.ones(2, int)), TypeError, "takes floating x, not int64"),
    ],
)
def test_what_it_does_not_take_is_said(x, error, message):
    with pytest.raises(error, match=message):
        jp.LinearCrossEntropy(5).init(jax.random.key(0), x)
    with pytest.raises(ValueError, match="chunk is at least 1, not 0"):
        jp.LinearCrossEntropy(5, chunk=0)
