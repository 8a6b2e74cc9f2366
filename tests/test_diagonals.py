"""Diagonals of the Gauss-Newton matrix and of the Hessian, of the mean loss and of each example."""

import jax
import jax.numpy as jnp
import oracles
import pytest
from jax.flatten_util import ravel_pytree
from table import MLP, TABLE, Row, first_of_their_kind, ids, normal, relative_error, row_id
from test_quantities import Mixed, Plain, has_params, problem

import jaxprop as jp
from jaxprop.core.tree import learned, merged

BLOCK = jp.skip(jp.chain(jp.LayerNorm(), jp.Dense(6), jp.Attention(1), jp.Dense(2), jp.Gelu()))
FUNCTION = jp.function(lambda w, x: jnp.tanh(x @ w["w"]) * w["s"] + w["b"])


OWN = [
    Row(jp.chain(jp.Dense(2), jp.repeat(BLOCK, 2), jp.Dense(3)), normal(4, 3, 2)),
    Row(jp.chain(jp.Dense(2), jp.Tanh(), Plain(2), Mixed()), normal(4, 3)),
    Row(jp.chain(jp.Conv(2, (2, 2)), jp.Silu(), jp.Flatten(), jp.Dense(3)), normal(4, 2, 3, 1)),
    Row(jp.tied(jp.Embedding(7, 2), jp.chain(jp.Positions(3), jp.Dense(2))), ids(4, 3)),
]
OF_TABLE = [
    row
    for row in first_of_their_kind(TABLE)
    if isinstance(row, Row)
    and has_params(row)
    and not row.layer.batch_coupled
    and sum(leaf.size for leaf in has_params(row)) < 150
]


def hessian_diagonals(net, loss):
    """The diagonal of each example's own Hessian by ``jax.hessian``, like params after (N,)."""

    def own(params, x, target):
        flat, back = ravel_pytree(learned(params))

        def value(flat):
            return jp.loss_fn(net, loss)(merged(params, back(flat)), *oracles.one((x, target)))

        return back(jnp.diagonal(jax.hessian(value)(flat)))

    return jax.vmap(own, (None, 0, 0))


def mean(tree):
    return jax.tree.map(lambda leaf: leaf.mean(0), tree)


@pytest.mark.full
@pytest.mark.parametrize("row", [*OWN, *OF_TABLE], ids=row_id)
def test_diagonals_of_each_example_and_their_means(row):
    net, loss, *args = problem(row)

    @jax.jit
    def both(*args):
        got = {
            "ggn": jp.diag_ggn(net, loss, per_example=True)(*args),
            "hessian": jp.curvature.diag_hessian(net, loss, per_example=True)(*args),
            "mean hessian": jp.curvature.diag_hessian(net, loss)(*args),
        }
        blocks = oracles.ggn_blocks(net, loss)(*args)
        want = {
            "ggn": oracles.diagonals(args[0], blocks),
            "hessian": hessian_diagonals(net, loss)(*args),
        }
        return got, want | {"mean hessian": mean(want["hessian"])}

    got, want = both(*args)
    for name in want:
        scale = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(want[name])) or 1.0
        for a, b in zip(*(jax.tree.leaves(learned(it[name])) for it in (got, want)), strict=True):
            assert a.shape == b.shape
            assert float(jnp.abs(a - b).max()) <= 1e-10 * scale, name


def of_function():
    x = jnp.asarray(normal(4, 5))
    shapes = {"w": (5, 3), "s": (), "b": (1, 3)}
    params = {name: jnp.asarray(normal(*shape)) for name, shape in shapes.items()}
    return FUNCTION, jp.CrossEntropy(), params, x, jnp.arange(4) % 3


@pytest.mark.full
def test_diagonals_of_a_function():
    net, loss, *args = of_function()
    want = hessian_diagonals(net, loss)(*args)
    assert relative_error(jax.jit(jp.curvature.diag_hessian(net, loss))(*args), mean(want)) <= 1e-10
    of_each = jp.curvature.diag_hessian(net, loss, per_example=True)
    assert relative_error(jax.jit(of_each)(*args), want) <= 1e-10
    ggn = jax.jit(jp.diag_ggn(net, loss, per_example=True))(*args)
    assert relative_error(mean(ggn), jp.diag_ggn(net, loss)(*args)) <= 1e-10


@pytest.mark.full
@pytest.mark.parametrize("per_example", [False, True])
@pytest.mark.parametrize("of", [jp.diag_ggn, jp.curvature.diag_hessian])
def test_weights_padding_and_micro_batches(of, per_example):
    net = jp.chain(jp.frozen(jp.Dense(3)), jp.Tanh(), jp.repeat(jp.Dense(3), 2), jp.Dense(3))
    _, loss, params, x, target = problem(Row(net, normal(6, 4)), jp.CrossEntropy())
    weights, kept = jnp.array([1.0, 0, 2, 1, 0, 1]), jnp.array([0, 2, 2, 3, 5])
    alone = of(net, loss, per_example=per_example)
    got = alone(params, x.at[1].set(jnp.nan), target, weights=weights)
    assert jax.tree.structure(got) == jax.tree.structure(params)
    if per_example:
        whole, got = (learned(it) for it in (alone(params, x, target), got))
        want = jax.tree.map(lambda leaf: jnp.delete(leaf, jnp.array([1, 4]), 0), (whole, got))
        assert relative_error(want[1], want[0]) <= 1e-10
        assert not any(leaf[1].any() for leaf in jax.tree.leaves(got))
    else:
        assert relative_error(got, alone(params, x[kept], target[kept])) <= 1e-10
    given = {} if per_example else {"weights": weights}
    in_parts = jax.jit(of(net, loss, per_example=per_example, micro_batches=3))
    want = alone(params, x, target, **given)
    assert relative_error(in_parts(params, x, target, **given), want) <= 1e-10


@pytest.mark.full
def test_sampled_diagonals_of_each_example_have_the_mean_of_the_same_samples():
    net, loss, *args = problem(Row(MLP, normal(4, 6)), jp.CrossEntropy())
    key = jax.random.key(0)
    for of in (jp.diag_ggn, jp.curvature.diag_hessian):
        each = jax.jit(of(net, loss, samples=3, per_example=True))(*args, key=key)
        assert relative_error(mean(each), of(net, loss, samples=3)(*args, key=key)) <= 1e-10


@pytest.mark.full
def test_random_signs_converge_to_the_diagonal_at_the_monte_carlo_rate():
    """The variance at i is sum_{j != i} H_ij^2 for each vector."""
    net, loss, *args = problem(Row(jp.chain(jp.Dense(3), jp.Tanh(), jp.Dense(2)), normal(5, 2)))
    flat, back = ravel_pytree(args[0])
    hessian = jax.hessian(lambda flat: jp.loss_fn(net, loss)(back(flat), *args[1:]))(flat)
    exact = jnp.diagonal(hessian)
    deviation = jnp.sqrt((hessian**2).sum(0) - exact**2)
    sampled = jax.jit(jp.curvature.diag_hessian(net, loss, samples=400))
    got, _ = ravel_pytree(sampled(*args, key=jax.random.key(1)))
    assert float((jnp.abs(got - exact) / (deviation / 20)).max()) < 4
    assert 0.7 < float(jnp.sqrt(jnp.mean(((got - exact) / (deviation / 20)) ** 2))) < 1.4


@pytest.mark.full
def test_a_coupled_net_has_a_hessian_and_no_example_s_own():
    net, loss = jp.chain(jp.Dense(3), jp.BatchNorm(), jp.Tanh(), jp.Dense(2)), jp.CrossEntropy()
    _, _, params, x, target = problem(Row(net, normal(5, 2)), loss)
    flat, back = ravel_pytree(learned(params))

    def value(flat):
        return jp.loss_fn(net, loss)(merged(params, back(flat)), x, target)

    got, _ = ravel_pytree(learned(jax.jit(jp.curvature.diag_hessian(net, loss))(params, x, target)))
    want = jnp.diagonal(jax.hessian(value)(flat))
    assert float(jnp.abs(got - want).max() / jnp.abs(want).max()) <= 1e-10
    with pytest.raises(ValueError, match="couples the examples of a batch"):
        jp.curvature.diag_hessian(net, loss, per_example=True)(params, x, target)


def test_mistakes_are_said():
    net, loss, *args = problem(Row(MLP, normal(4, 6)))
    with pytest.raises(TypeError, match="sampling takes a key"):
        jp.curvature.diag_hessian(net, loss, samples=2)(*args)
    with pytest.raises(TypeError, match="per_example is True or False"):
        jp.DiagGGN(per_example=1)
    with pytest.raises(ValueError, match="samples is at least 1"):
        jp.curvature.diag_hessian(net, loss, samples=0)
