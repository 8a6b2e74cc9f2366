"""Both ways of differentiating, and the update."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from table import LOSSES, MLP, Row, at, relative_error

import jaxprop as jp

LOSS = jp.CrossEntropy()
TARGET = jax.device_put(np.array([0, 2, 1, 2]))


def problem(dtype=jnp.float64):
    params, x = at(Row(MLP, np.random.default_rng(0).normal(size=(4, 6))), dtype)
    return params, x, TARGET


@pytest.mark.few(10)
@pytest.mark.parametrize(("loss", "y", "target"), LOSSES)
def test_value_and_grad_is_that_of_autodiff(loss, y, target):
    net = jp.chain(jp.skip(jp.Tanh()))
    if y.ndim > 1:
        net = jp.chain(
            jp.Dense(5), jp.skip(jp.chain(jp.Dense(5), jp.Silu())), jp.Dense(y.shape[-1])
        )
    params, x = at(Row(net, y))
    hand = jax.jit(jp.value_and_grad(net, loss))(params, x, target)
    auto = jax.jit(jax.value_and_grad(jp.loss_fn(net, loss)))(params, x, target)
    assert relative_error(hand, auto) <= 1e-12
    chex.assert_trees_all_equal_shapes_and_dtypes(hand[1], params)


@pytest.mark.few(1)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_grads_have_the_dtypes_of_params(dtype):
    params, x, target = problem(dtype)
    value, grads = jax.jit(jp.value_and_grad(MLP, LOSS))(params, x, target)
    chex.assert_trees_all_equal_shapes_and_dtypes(grads, params)
    assert value.dtype == jnp.float32


@pytest.mark.usefixtures("standard_promotion")
def test_mixed_dtypes_differentiate_as_autodiff_does():
    """With bfloat16 inputs and float32 params."""
    params, _, target = problem(jnp.float32)
    x = problem(jnp.bfloat16)[1]
    hand = jax.jit(jp.value_and_grad(MLP, LOSS))(params, x, target)
    auto = jax.jit(jax.value_and_grad(jp.loss_fn(MLP, LOSS)))(params, x, target)
    _, residuals = jax.jit(MLP.forward)(params, x)
    _, d_x = jax.jit(MLP.backward)(params, residuals, np.ones((4, 3), np.float32))
    chex.assert_trees_all_equal_dtypes(hand, auto)
    assert d_x.dtype == x.dtype
    assert relative_error(hand, auto) <= 1e-5


def autodiff(net, loss):
    return jax.value_and_grad(jp.loss_fn(net, loss))


def test_loss_fn_is_plain_jax():
    """grad, hessian, vmap and jit work on it as on any function."""
    params, x, target = problem()
    f = jp.loss_fn(MLP, LOSS)
    stacked = jax.tree.map(lambda leaf: np.stack([leaf, 2 * np.asarray(leaf)]), params)
    values = jax.jit(jax.vmap(f, (0, None, None)))(stacked, x, target)
    np.testing.assert_allclose(values[0], jax.jit(f)(params, x, target), rtol=1e-12)

    def of_w(w):
        return f(((params[0]._replace(w=w)), *params[1:]), x, target)

    assert jax.jit(jax.hessian(of_w))(params[0].w).shape == (6, 7, 6, 7)
    d_x = jax.jit(jax.grad(f, 1))(params, x, target)
    assert d_x.shape == x.shape


AXES = {"auto": jax.sharding.AxisType.Auto, "explicit": jax.sharding.AxisType.Explicit}


@pytest.mark.parametrize(
    ("spec", "axes"), [("batch", "auto"), ("features", "auto"), ("batch", "explicit")]
)
def test_sharded_equals_one_device(spec, axes):
    """Data parallel and tensor parallel under plain jit, on eight devices."""
    net = jp.chain(jp.Dense(16), jp.Gelu(), jp.skip(jp.Dense(16)), jp.Dense(8))
    params, x = at(Row(net, np.random.default_rng(0).normal(size=(16, 8))))
    target = np.arange(16) % 8
    f = jax.jit(jp.value_and_grad(net, LOSS))
    expected = f(params, x, target)
    mesh = jax.make_mesh((8,), ("d",), axis_types=(AXES[axes],))

    def place(tree, *axes):
        return jax.device_put(tree, NamedSharding(mesh, PartitionSpec(*axes)))

    if spec == "batch":
        args = place(params), place(x, "d"), place(target, "d")
    else:
        placed = jax.tree.map(lambda leaf: place(leaf, *[None] * (leaf.ndim - 1), "d"), params)
        args = placed, place(x), place(target)
    with jax.set_mesh(mesh):
        assert relative_error(f(*args), expected) <= 1e-12


def test_shard_map_sums_over_devices_as_autodiff_does():
    """Params are the same on all devices, and their gradient is the sum over devices."""
    params, x, target = problem()
    mesh = jax.make_mesh((4,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    P = PartitionSpec
    custom = jp.custom_vjp(MLP)

    def by_custom_vjp(params, x, target):
        return LOSS.forward(custom(params, x), target)[0].mean()

    expected = jax.jit(jp.value_and_grad(MLP, LOSS))(params, x, target)
    for f in (
        jp.value_and_grad(MLP, LOSS),
        autodiff(MLP, LOSS),
        jax.value_and_grad(by_custom_vjp),
    ):

        def mean(params, x, target, f=f):
            value, grads = f(params, x, target)
            return jax.lax.pmean(value, "d"), jax.tree.map(lambda g: g / 4, grads)

        sharded = jax.shard_map(mean, mesh=mesh, in_specs=(P(), P("d"), P("d")), out_specs=P())
        assert relative_error(jax.jit(sharded)(params, x, target), expected) <= 1e-12


def test_hand_and_auto_do_the_same_matmuls():
    """The first layer's d_x is unused, and neither program computes it."""

    def dots(f):
        text = jax.jit(f).lower(*problem()).compile().as_text()
        return text.count(" dot(") + text.count("custom-call(")

    assert dots(jp.value_and_grad(MLP, LOSS)) == dots(autodiff(MLP, LOSS)) == 8
