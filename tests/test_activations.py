"""Activations at the extremes of their dtypes, where a formula may overflow or cancel."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxprop as jp

SLOPES = {  # the layer: f and f', in numpy's longest floats
    jp.LeakyRelu(): (lambda x: np.where(x < 0, x / 100, x), lambda x: np.where(x < 0, 0.01, 1)),
    jp.LeakyRelu(3.0): (lambda x: np.where(x < 0, 3 * x, x), lambda x: np.where(x < 0, 3, 1)),
    jp.Elu(): (
        lambda x: np.where(x > 0, x, np.expm1(np.minimum(x, 0))),
        lambda x: np.exp(np.minimum(x, 0)),
    ),
    jp.Elu(0.5): (
        lambda x: np.where(x > 0, x, np.expm1(np.minimum(x, 0)) / 2),
        lambda x: np.where(x > 0, 1, np.exp(np.minimum(x, 0)) / 2),
    ),
    jp.LogSigmoid(): (
        lambda x: np.minimum(x, 0) - np.log1p(np.exp(-abs(x))),
        lambda x: np.exp(-np.maximum(x, 0)) / (1 + np.exp(-abs(x))),
    ),
}


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16", "float16"])
@pytest.mark.parametrize("layer", SLOPES, ids=str)
def test_from_minus_infinity_to_infinity(layer, dtype):
    """Each value and slope is right to a few units in its own last place, not in the largest's."""
    limits = jnp.finfo(dtype)
    large = np.array([jnp.inf, limits.max, 1e4, 70, 9, 1, 0.1, 1e-3, 0], np.longdouble)
    x = jnp.asarray(np.concatenate([-large, large[::-1]]).astype(float), dtype)
    y, residuals = layer.forward((), x)
    _, slope = layer.backward((), residuals, jnp.ones_like(x))
    with np.errstate(under="ignore", over="ignore"):
        expected = [f(np.asarray(x).astype(np.longdouble)) for f in SLOPES[layer]]
        expected = [each.astype(float).astype(np.asarray(y).dtype) for each in expected]
    for got, want in zip((y, slope), expected, strict=True):
        assert got.dtype == dtype
        np.testing.assert_allclose(
            np.asarray(got, float),
            np.asarray(want, float),
            rtol=4 * float(limits.eps),
            atol=float(limits.smallest_normal),  # below it XLA may flush to zero
        )


@pytest.mark.parametrize("layer", [jp.LeakyRelu, jp.Elu, jp.Dropout])
def test_a_number_of_numpy_s_does_not_widen_x(layer):
    layer, x = layer(np.float64(0.5)), -jnp.ones((2, 3), jnp.float32)
    params = layer.bind((), key=jax.random.key(0)) if layer.takes else ()
    y, residuals = layer.forward(params, x)
    _, d_x = layer.backward(params, residuals, x)
    assert y.dtype == d_x.dtype == jnp.float32


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: jp.LeakyRelu("0.1"), TypeError, "LeakyRelu: negative_slope is a number"),
        (lambda: jp.LeakyRelu(0), ValueError, "LeakyRelu: negative_slope must be positive, not 0"),
        (lambda: jp.Elu(True), TypeError, "Elu: alpha is a number, not True"),
        (lambda: jp.Elu(-1.0), ValueError, "Elu: alpha must be positive, not -1.0"),
    ],
)
def test_what_does_not_fit_is_said(make, error, words):
    with pytest.raises(error, match=words):
        make()


def test_an_underflow_keeps_its_slope():
    """-1e-7 times the slope is 0 in float16, but the derivative there is still the slope."""
    layer, x = jp.LeakyRelu(), jnp.array([[-1e-7]], jnp.float16)
    y, residuals = layer.forward((), x)
    assert x[0, 0] != 0 == y[0, 0]
    np.testing.assert_array_equal(
        layer.backward((), residuals, jnp.ones_like(x))[1], jnp.full_like(x, 0.01)
    )
