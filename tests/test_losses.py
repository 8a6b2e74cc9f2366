"""Losses against autodiff of their own forward, and against optax's definitions."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from table import LOSSES, relative_error

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


def test_a_class_that_does_not_exist_is_nan_and_not_a_number():
    values, _ = jp.CrossEntropy().forward(jnp.zeros((2, 3)), jnp.array([3, 1]))
    assert np.isnan(values).tolist() == [True, False]
