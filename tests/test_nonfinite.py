"""The first non-finite number is found where it was made, and the cause is named."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from table import normal

import jaxprop as jp

LOSS = jp.HalfSquaredError()


class Sqrt(jp.Layer):
    """y = sqrt(x), whose slope at 0 is infinite, so that 0 times it is NaN."""

    def forward(self, params, x):
        y = jnp.sqrt(x)
        return y, y

    def backward(self, params, y, ct):
        return (), ct / (2 * y)


class Times(jp.Layer):
    """y = x times a static factor."""

    factor: float

    def forward(self, params, x):
        return x * self.factor, jnp.zeros((len(x), 0))

    def backward(self, params, residuals, ct):
        return (), ct * self.factor


def mlp(dtype=jnp.float64):
    x = jnp.asarray(normal(5, 4), dtype)
    net = jp.chain(jp.Dense(3), jp.Tanh(), jp.Dense(2))
    return net, net.init(jax.random.key(0), x), x, jnp.zeros((5, 2), dtype)


def test_all_finite():
    net, params, x, target = mlp()
    found = jp.find_nonfinite(net, LOSS, params, x, target)
    assert not found
    assert found.suspects == ()
    assert str(found) == "All is finite: x, params, the way forward, the loss and the way back."


def test_what_was_not_finite_before():
    net, params, x, target = mlp()
    found = jp.find_nonfinite(net, LOSS, params, x.at[3, 1].set(jnp.nan), target)
    assert (found.phase, found.array, found.index, found.example) == ("input", "x", (3, 1), 3)
    assert "Before the walk began x was not finite: x[3, 1], of example 3, is nan" in str(found)
    found = jp.find_nonfinite(net, LOSS, params, x, target.at[2, 0].set(jnp.inf))
    assert (found.phase, found.array, found.value) == ("input", "target", np.inf)
    w = params[2].w.at[1, 1].set(-jnp.inf)
    found = jp.find_nonfinite(net, LOSS, (*params[:2], params[2]._replace(w=w)), x, target)
    assert (found.phase, found.layer, found.array) == ("input", "2", "params w")
    assert (found.index, found.value, found.example) == ((1, 1), -np.inf, None)
    assert "the param w of layer 2 was not finite: w[1, 1] is -inf" in found.sentence


def test_the_way_forward():
    x = normal(6, 3)
    x[4, 2] = -1
    net = jp.chain(Times(1.0), Sqrt(), jp.Dense(2))
    x = jnp.asarray(np.where(np.arange(18).reshape(6, 3) == 14, -1.0, np.abs(x)))
    found = jp.find_nonfinite(net, LOSS, net.init(jax.random.key(0), x), x, jnp.zeros((6, 2)))
    assert (found.phase, found.layer, found.array) == ("forward", "1", "y")
    assert (found.index, found.example) == ((4, 2), 4)
    assert np.isnan(found.value)
    np.testing.assert_array_equal(found.x, x[4])
    assert "layer 1 Sqrt() gave nan: y[4, 2], of example 4. All before it was finite" in (
        found.sentence
    )
    assert found.sentence.endswith("Not finite in y: 1 of 18.")


def test_the_turn_of_a_loop():
    x = jnp.full((2, 3), 1e100)
    net = jp.chain(Times(1.0), jp.repeat(jp.chain(jp.Dense(3), Times(1e80)), 4))
    eyes = jnp.broadcast_to(jnp.eye(3), (4, 3, 3))
    params = ((), (jp.AffineParams(eyes, jnp.zeros((4, 3))), ()))
    found = jp.find_nonfinite(net, LOSS, params, x, x)
    assert (found.phase, found.layer, found.value) == ("forward", "1.1[2]", np.inf)
    assert found.x.max() == pytest.approx(1e260)


def test_a_sum_between_layers():
    x = jnp.full((2, 3), 4e4, jnp.float16)
    net = jp.chain(jp.skip(Times(1.0)), jp.Tanh())
    found = jp.find_nonfinite(net, LOSS, ((), ()), x, jnp.zeros_like(x))
    assert (found.phase, found.layer, found.array) == ("forward", "1", "x")
    assert "as it comes to layer 1 Tanh(), while what the layers before it gave" in found.sentence


def test_the_loss():
    net, params, x, _ = mlp()
    found = jp.find_nonfinite(net, jp.CrossEntropy(), params, x, jnp.array([0, 1, 0, 7, 1]))
    assert (found.phase, found.layer, found.array) == ("loss", None, "y")
    assert (found.index, found.example) == ((3,), 3)
    assert "the loss, CrossEntropy(), gave nan: y[3], of example 3" in found.sentence


def test_the_way_back():
    x = jnp.asarray(np.where(np.arange(12).reshape(4, 3) == 7, 0.0, np.abs(normal(4, 3))))
    net = jp.chain(Times(1.0), Sqrt(), Times(1.0))
    found = jp.find_nonfinite(net, LOSS, ((), (), ()), x, jnp.ones_like(x))
    assert (found.phase, found.layer, found.array) == ("backward", "1", "d_x")
    assert (found.index, found.value, found.example) == ((2, 1), -np.inf, 2)
    np.testing.assert_allclose(found.ct, np.sqrt(x[2]) - 1)
    assert "On the way back layer 1 Sqrt() gave -inf: d_x[2, 1]" in found.sentence


def test_a_gradient_that_overflows():
    x = jnp.full((2, 1), 1e30, jnp.float32)
    params = jp.AffineParams(jnp.full((1, 1), 1e-20, jnp.float32), jnp.zeros(1, jnp.float32))
    found = jp.find_nonfinite(jp.Dense(1), LOSS, params, x, jnp.zeros((2, 1)))
    assert (found.phase, found.array, found.index) == ("backward", "the gradient by w", (0, 0))
    assert found.example is None


def test_suspects():
    x = jnp.asarray(normal(20, 6))
    target = jnp.asarray(normal(20, 4))
    net = jp.chain(jp.Dense(8), jp.Relu(), Times(50.0), jp.Dense(4), jp.Sigmoid(), Times(1e-9))
    params = list(net.init(jax.random.key(0), x))
    params[0] = params[0]._replace(b=jnp.where(jnp.arange(8) < 2, -99.0, 0.0))
    found = jp.find_nonfinite(net, LOSS, tuple(params), x, target)
    assert not found
    dead, saturated, vanish = found.suspects
    assert dead == "Layer 1 Relu(): 25.0% of its units are dead, flat for every example."
    assert saturated.startswith("Layer 4 Sigmoid() is saturated: ")
    assert "cotangents vanish, to" in vanish
    net = jp.chain(jp.Dense(3), Times(1e4))
    found = jp.find_nonfinite(net, LOSS, net.init(jax.random.key(0), x), x, normal(20, 3))
    assert found.suspects == (
        "Layer 0 Dense(3): cotangents explode, to 1.0e+04 times the loss's own.",
    )
