"""Hessian, Gauss-Newton and Fisher products, against the matrices by autodiff."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from table import Row, at, normal, relative_error

import jaxprop as jp

BLOCK = jp.skip(jp.chain(jp.LayerNorm(), jp.Dense(12), jp.Attention(2), jp.Dense(4), jp.Gelu()))
NETS = {
    "dense": (jp.chain(jp.Dense(5), jp.Tanh(), jp.Dense(3)), normal(5, 4)),
    "relu": (jp.chain(jp.Dense(5), jp.Relu(), jp.Dense(3)), normal(5, 4)),
    "convolution": (
        jp.chain(jp.Conv(4, (2, 2)), jp.Silu(), jp.GlobalAvgPool(), jp.Dense(3)),
        normal(3, 4, 4, 2),
    ),
    "repeat": (
        jp.chain(jp.Dense(4), jp.repeat(jp.recompute(BLOCK), 2), jp.GlobalAvgPool(), jp.Dense(3)),
        normal(3, 5, 2),
    ),
    "lstm": (jp.chain(jp.Lstm(3), jp.GlobalAvgPool(), jp.Dense(3)), normal(3, 4, 2)),
    "function": (
        jp.function(lambda w, x: jnp.tanh(x @ w[0]) @ w[1]),
        normal(5, 4),
    ),
}
LOSS = jp.CrossEntropy()


def problem(name):
    net, x = NETS[name]
    if name == "function":
        params, x = jax.device_put(((normal(4, 6), normal(6, 3)), x))
    else:
        params, x = at(Row(net, x))
    target = jax.device_put(np.arange(len(x)) % 3)
    rng = np.random.default_rng(1)
    v = jax.tree.map(lambda leaf: jax.device_put(rng.normal(size=leaf.shape)), params)
    return net, params, x, target, v


@pytest.mark.few(1)
@pytest.mark.parametrize("name", NETS)
def test_the_hessian_is_the_derivative_of_autodiff_s_gradient(name):
    net, params, x, target, v = problem(name)
    of = jax.grad(jp.loss_fn(net, LOSS))
    want = jax.jit(lambda p, v: jax.jvp(lambda p: of(p, x, target), (p,), (v,))[1])(params, v)
    assert relative_error(jax.jit(jp.hvp(net, LOSS))(params, x, target, v), want) <= 1e-10


@pytest.mark.few(1)
@pytest.mark.parametrize("name", NETS)
def test_the_gauss_newton_product_is_that_of_its_root(name):
    net, params, x, target, v = problem(name)
    root = jax.jit(jp.ggn_root(net, LOSS))(params, x, target)
    dots = sum(
        np.tensordot(r, w, axes=w.ndim)
        for r, w in zip(*map(jax.tree.leaves, (root, v)), strict=True)
    )
    want = jax.tree.map(lambda r: np.tensordot(dots, r, axes=2) / len(x), root)
    for of in (jp.ggn_vp, jp.fisher_vp):
        assert relative_error(jax.jit(of(net, LOSS))(params, x, target, v), want) <= 1e-10


def test_the_empirical_and_the_sampled_fisher_matrix():
    net, params, x, target, v = problem("dense")
    each = jax.jit(jp.per_example_grads(net, LOSS))(params, x, target)
    dots = sum(
        np.tensordot(g, w, axes=w.ndim)
        for g, w in zip(*map(jax.tree.leaves, (each, v)), strict=True)
    )
    want = jax.tree.map(lambda g: np.tensordot(dots, g, axes=1) / len(x), each)
    got = jax.jit(jp.fisher_vp(net, LOSS, empirical=True))(params, x, target, v)
    assert relative_error(got, want) <= 1e-11
    exact = jax.jit(jp.ggn_vp(net, LOSS))(params, x, target, v)
    sampled = jax.jit(jp.fisher_vp(net, LOSS, samples=4000))
    got = sampled(params, x, target, v, key=jax.random.key(0))
    assert relative_error(got, exact) < 0.1


@pytest.mark.full
def test_many_vectors_share_what_does_not_depend_on_them():
    net, params, x, target, v = problem("dense")
    for of in (jp.hvp, jp.ggn_vp, jp.fisher_vp):
        product = of(net, LOSS)(params, x, target)
        vs = jax.tree.map(lambda leaf: jnp.stack([leaf, 2 * leaf, leaf**2]), v)
        got = jax.vmap(product)(vs)
        for i in range(3):
            one = jax.tree.map(lambda leaf, i=i: leaf[i], vs)
            here = jax.tree.map(lambda leaf, i=i: leaf[i], got)
            assert relative_error(here, of(net, LOSS)(params, x, target, one)) <= 1e-11


@pytest.mark.full
def test_weights_padding_and_what_is_not_learned():
    net = jp.chain(jp.frozen(jp.Dense(4)), jp.Tanh(), jp.Dense(3))
    params, x = at(Row(net, normal(6, 4)))
    target, weights = jnp.array([0, 1, 2, 0, 1, 2]), jnp.array([1.0, 0, 2, 1, 0, 1])
    kept = jnp.array([0, 2, 2, 3, 5])
    v = jax.tree.map(jnp.ones_like, params)
    for of in (jp.hvp, jp.ggn_vp, jp.fisher_vp):
        got = of(net, LOSS)(params, x, target, v, weights=weights)
        want = of(net, LOSS)(params, x[kept], target[kept], v)
        assert relative_error(got, want) <= 1e-11
        assert jax.tree.structure(got) == jax.tree.structure(params)
        tenth = of(net, LOSS)(params, x, target, v, weights=weights, divisor=10)
        assert relative_error(jax.tree.map(lambda leaf: 2 * leaf, tenth), got) <= 1e-11


@pytest.mark.full
def test_conjugate_gradients_and_power_iterations():
    """Uses of the products: a Newton step, and the largest eigenvalue."""
    net, params, x, target, _ = problem("dense")
    product = jp.ggn_vp(net, LOSS)(params, x, target)
    grads = jp.value_and_grad(net, LOSS)(params, x, target)[1]

    def damped(v):
        return jax.tree.map(lambda a, b: a + 0.1 * b, product(v), v)

    step, _ = jax.scipy.sparse.linalg.cg(damped, grads, maxiter=200, tol=1e-12)
    assert relative_error(damped(step), grads) <= 1e-8
    flat, back = jax.flatten_util.ravel_pytree(params)
    matrix = jax.vmap(lambda row: jax.flatten_util.ravel_pytree(product(back(row)))[0])(
        jnp.eye(flat.size)
    )
    assert relative_error(matrix, matrix.T) <= 1e-10
    assert float(jnp.linalg.eigvalsh(matrix)[0]) > -1e-10


def test_a_linear_operator_of_lineax():
    lineax = pytest.importorskip("lineax")
    net, *args, _ = problem("dense")

    @jax.jit
    def solved(params, x, target):
        grads = jp.value_and_grad(net, LOSS)(params, x, target)[1]
        like = jax.eval_shape(lambda: params)
        product = jp.ggn_vp(net, LOSS)(params, x, target)
        tag = lineax.positive_semidefinite_tag
        operator = lineax.FunctionLinearOperator(product, like, tag)
        damped = lineax.TaggedLinearOperator(
            operator + 0.1 * lineax.IdentityLinearOperator(like), tag
        )
        step = lineax.linear_solve(damped, grads, lineax.CG(rtol=1e-10, atol=1e-12)).value
        return grads, jax.tree.map(lambda a, b: a + 0.1 * b, product(step), step)

    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        grads, back = solved(*args)
    assert relative_error(back, grads) <= 1e-8


def test_mistakes_are_said():
    net, params, x, target, v = problem("dense")
    with pytest.raises(ValueError, match="hvp: v is"):
        jax.jit(jp.hvp(net, LOSS))(params, x, target, v[:1])
    with pytest.raises(ValueError, match="there is nothing to sample"):
        jp.fisher_vp(net, LOSS, samples=2, empirical=True)
    with pytest.raises(TypeError, match="key"):
        jax.jit(jp.fisher_vp(net, LOSS, samples=2))(params, x, target, v)
