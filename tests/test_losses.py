"""Losses against autodiff of their own forward, and against optax's definitions."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from table import LOSSES, normal, relative_error

import jaxprop as jp

rows = pytest.mark.parametrize(
    ("loss", "y", "target"), LOSSES, ids=[f"{row[0]} on {row[1].shape}" for row in LOSSES]
)


def reference(loss, y, target):
    """One value an example, by optax's functions."""
    target = jnp.asarray(target)
    axes = tuple(range(1, y.ndim))
    if loss == jp.HalfSquaredError():
        return optax.l2_loss(y, target).sum(axes)
    if loss == jp.BinaryCrossEntropy():
        return optax.sigmoid_binary_cross_entropy(y, target.astype(y.dtype)).mean(axes)
    values = optax.softmax_cross_entropy_with_integer_labels(y, jnp.maximum(target, 0))
    axes = axes[:-1]
    valid = target >= 0
    count = jnp.maximum(valid.sum(axes), 1).astype(y.dtype)
    return jnp.where(valid, values, 0).sum(axes) / count


@rows
def test_values(loss, y, target):
    y, target = jnp.asarray(y), jnp.asarray(target)
    values, _ = loss.forward(y, target)
    expected = jax.jit(lambda y: reference(loss, y, target))(y)
    assert relative_error(values, expected) <= 1e-12


@rows
def test_backward_is_each_example_s_own_gradient(loss, y, target):
    y, target = jnp.asarray(y), jnp.asarray(target)

    @jax.jit
    def cotangents(y):
        _, residuals = loss.forward(y, target)
        by_jax = jax.grad(lambda y: loss.forward(y, target)[0].sum())(y)
        by_reference = jax.grad(lambda y: reference(loss, y, target).sum())(y)
        return loss.backward(residuals), by_jax, by_reference

    ct, *expected = cotangents(y)
    for each in expected:
        assert relative_error(ct, each) <= 1e-12


@rows
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_narrow_dtypes(loss, y, target, dtype):
    y, target = jnp.asarray(y, dtype), jnp.asarray(target)
    values, residuals = loss.forward(y, target)
    ct = loss.backward(residuals)
    assert values.dtype == jnp.float32
    assert ct.dtype == jnp.float32
    wide_values, wide_residuals = loss.forward(y.astype(jnp.float64), target)
    rtol = {jnp.float32: 2e-5, jnp.bfloat16: 0.02}[dtype]
    assert relative_error(values, wide_values) <= rtol
    assert relative_error(ct, loss.backward(wide_residuals)) <= rtol


def test_padding_weighs_nothing():
    """A target of -1 changes neither the value nor the cotangent of any other position."""
    loss = jp.CrossEntropy()
    y = jax.random.normal(jax.random.key(0), (2, 3, 4))
    values, residuals = loss.forward(y[:, :2], jnp.array([[1, 3], [0, 2]]))
    padded, padded_residuals = loss.forward(y, jnp.array([[1, 3, -1], [0, 2, -1]]))
    np.testing.assert_allclose(padded, values, rtol=1e-14)
    ct = loss.backward(padded_residuals)
    np.testing.assert_allclose(ct[:, :2], loss.backward(residuals), rtol=1e-14)
    np.testing.assert_array_equal(ct[:, 2], 0)


def test_cross_entropy_of_extreme_logits_is_finite():
    y = jnp.array([[1e4, -1e4, 0.0], [-1e300, 0.0, 1e300]])
    values, residuals = jp.CrossEntropy().forward(y, jnp.array([1, 2]))
    np.testing.assert_array_equal(values, [2e4, 0])
    np.testing.assert_array_equal(jp.CrossEntropy().backward(residuals)[1], 0)


@pytest.mark.parametrize(
    ("loss", "y", "target"),
    [
        (jp.CrossEntropy(), jnp.zeros((2, 3)), jnp.array([3, 1])),
        (jp.BinaryCrossEntropy(), jnp.zeros((2, 1)), jnp.array([[2], [1]])),
        (jp.BinaryCrossEntropy(), jnp.zeros((2, 1)), jnp.array([[-1.0], [0.5]])),
    ],
)
def test_a_target_that_does_not_exist_is_refused_or_shows_in_everything(loss, y, target):
    with pytest.raises(ValueError, match=r"takes a target .*, not (3|2|-1\.0)"):
        loss.forward(y, target)
    values, residuals = jax.jit(loss.forward)(y, target)
    assert np.isnan(values).tolist() == [True, False]
    ct = loss.backward(residuals)
    assert np.isnan(ct[0]).all()
    assert np.isfinite(ct[1]).all()


def exactly(y, target):
    """Cross-entropy and its cotangent in extended precision, from sums without cancellation."""
    y = np.asarray(y, np.longdouble)
    powers = np.exp(y - y.max())
    others = np.delete(powers, target).sum()
    ct = powers / powers.sum()
    ct[target] = -others / powers.sum()
    return np.log1p(np.delete(np.exp(y - y[target]), target).sum()), ct


@pytest.mark.parametrize("target", [0, 1, 2])
@pytest.mark.parametrize("y", [[20, 0, 1], [-20, 3, 4], [50, 0, 1], [5, -5, 3], [0, 0, 0]], ids=str)
def test_cross_entropy_is_right_however_certain(y, target):
    loss, y = jp.CrossEntropy(), jnp.asarray([y], jnp.float32)
    values, residuals = loss.forward(y, jnp.array([target]))
    value, ct = exactly(y[0], target)
    np.testing.assert_allclose(values[0], float(value), rtol=1e-6)
    np.testing.assert_allclose(loss.backward(residuals)[0], ct.astype(float), rtol=1e-6)
    root = np.asarray(loss.hessian_root(residuals)[:, 0], float)
    p = np.exp(np.asarray(y[0], float) - float(y.max()))
    p /= p.sum()
    hessian = -np.outer(p, p)
    hessian[np.diag_indices(3)] = [p[i] * np.delete(p, i).sum() for i in range(3)]
    np.testing.assert_allclose(root.T @ root, hessian, rtol=1e-5)


@pytest.mark.parametrize("target", [0.0, 1.0, 0.25])
@pytest.mark.parametrize("y", [5.0, 15.0, 60.0, -20.0])
def test_binary_cross_entropy_is_right_however_certain(y, target):
    loss, z, t = jp.BinaryCrossEntropy(), np.longdouble(y), np.longdouble(target)
    values, residuals = loss.forward(jnp.float32([[y]]), jnp.float32([[target]]))
    value = (1 - t) * np.logaddexp(0, z) + t * np.logaddexp(0, -z)
    ct = (1 - t) / (1 + np.exp(-z)) - t / (1 + np.exp(z))
    np.testing.assert_allclose(values[0], float(value), rtol=1e-6)
    np.testing.assert_allclose(loss.backward(residuals)[0, 0], float(ct), rtol=1e-6)
    variance = 1 / (1 + np.exp(-z)) / (1 + np.exp(z))
    np.testing.assert_allclose(loss.hessian_root(residuals)[0] ** 2, float(variance), rtol=1e-6)


def test_infinite_logits_that_are_right():
    y = jnp.array([[jnp.inf], [-jnp.inf]])
    values, residuals = jp.BinaryCrossEntropy().forward(y, jnp.array([[1.0], [0.0]]))
    np.testing.assert_array_equal(values, [0, 0])
    np.testing.assert_array_equal(jp.BinaryCrossEntropy().backward(residuals), [[0], [0]])
    values, residuals = jp.CrossEntropy().forward(jnp.array([[jnp.inf, 0, 1]]), jnp.array([0]))
    np.testing.assert_array_equal(values, [0])
    np.testing.assert_array_equal(jp.CrossEntropy().backward(residuals), [[0, 0, 0]])


def test_a_padded_target_does_not_look_at_its_logits():
    loss = jp.CrossEntropy()
    y = jnp.array([[[jnp.inf, jnp.nan, 0], [1.0, 2, 3]]])
    values, residuals = loss.forward(y, jnp.array([[-1, 1]]))
    expected, of_expected = loss.forward(y[:, 1:], jnp.array([[1]]))
    np.testing.assert_array_equal(values, expected)
    key = jax.random.key(0)
    for got in (loss.backward(residuals), loss.sample(key, residuals)):
        np.testing.assert_array_equal(got[0, 0], [0, 0, 0])
        assert np.isfinite(got).all()
    np.testing.assert_array_equal(loss.backward(residuals)[:, 1:], loss.backward(of_expected))
    assert np.isfinite(loss.hessian_root(residuals)).all()
    np.testing.assert_array_equal(loss.real(residuals), [[False, True]])


def test_small_integers_count_to_any_number_of_classes():
    loss, y = jp.CrossEntropy(), jnp.asarray(normal(4, 300))
    target = jnp.array([5, 100, 120, -128], jnp.int8)
    got, expected = (loss.forward(y, t) for t in (target, target.astype(int)))
    np.testing.assert_array_equal(got[0], expected[0])
    np.testing.assert_array_equal(loss.backward(got[1]), loss.backward(expected[1]))
