"""The Laplace approximation, against the normal distribution written out."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from table import relative_error
from test_kronecker import LOSS, NETS, of_leaves, problem

import jaxprop as jp
from jaxprop.core.tree import learned

SQUARED = jp.HalfSquaredError()


def jacobian(net, params, x):
    """The Jacobian by each learned param, (N, C, P)."""

    def of_one(arrays, x):
        return net(jp.core.tree.merged(params, arrays), x[None])[0].ravel()

    each = jax.vmap(jax.jacrev(of_one), (None, 0))(learned(params), x)
    return [leaf.reshape(*leaf.shape[:2], -1) for leaf in jax.tree.leaves(each)]


def posterior_of(name, structure="kronecker", prior=0.7):
    net, params, x, target = problem(name)
    posterior = jax.jit(jp.laplace(net, LOSS, structure=structure))(params, x, target)
    return posterior.with_prior(prior), x, target


def covariances(posterior):
    for block in of_leaves(posterior.curvature, posterior.params):
        precision = posterior.examples * block + posterior.prior * jnp.eye(len(block))
        yield jnp.linalg.inv(precision)


@pytest.mark.full
@pytest.mark.parametrize("structure", ["kronecker", "diagonal"])
@pytest.mark.parametrize("name", [name for name in NETS if name != "heads"])
def test_outputs_have_the_covariance_of_the_linear_net(name, structure):
    posterior, x, _ = posterior_of(name, structure)
    y, got = jax.jit(lambda p, x: p.outputs(x))(posterior, x)
    assert relative_error(y, posterior.net(posterior.params, x)) <= 1e-12
    pairs = zip(jacobian(posterior.net, posterior.params, x), covariances(posterior), strict=True)
    want = sum(jnp.einsum("ncp,pq,ndq->ncd", j, s, j) for j, s in pairs)
    assert relative_error(got, want) <= 1e-10


@pytest.mark.few(1)
@pytest.mark.parametrize("name", [name for name in NETS if name != "heads"])
def test_the_evidence_is_that_of_the_normal_distribution(name):
    posterior, x, target = posterior_of(name)
    square = sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(learned(posterior.params)))
    value = jp.loss_fn(posterior.net, LOSS)(posterior.params, x, target)
    want = -len(x) * value - posterior.prior * square / 2
    for covariance in covariances(posterior):
        want += (jnp.linalg.slogdet(covariance)[1] + len(covariance) * jnp.log(posterior.prior)) / 2
    assert relative_error(posterior.log_evidence(), want) <= 1e-10


def test_the_evidence_of_a_linear_net_is_exact():
    """It is that of Bayesian linear regression with noise of variance 1, weights integrated out."""
    rng = np.random.default_rng(0)
    x, target = jnp.asarray(rng.normal(size=(7, 3))), jnp.asarray(rng.normal(size=(7, 1)))
    net, prior = jp.chain(jp.Dense(1, bias=False)), 0.4
    w = jnp.linalg.solve(x.T @ x + prior * jnp.eye(3), x.T @ target)
    params = (jp.AffineParams(w, None),)
    posterior = jp.laplace(net, SQUARED)(params, x, target).with_prior(prior)
    marginal = x @ x.T / prior + jnp.eye(7)
    want = -(target[:, 0] @ jnp.linalg.solve(marginal, target[:, 0])) / 2
    want -= jnp.linalg.slogdet(marginal)[1] / 2  # both without the likelihood's constant
    assert relative_error(posterior.log_evidence(), want) <= 1e-10
    divided = jp.laplace(net, SQUARED)(params, x, target, divisor=3.0).with_prior(prior)
    assert relative_error(divided.log_evidence(), want) <= 1e-10
    tuned = posterior.tuned()
    around = [posterior.with_prior(float(tuned.prior) * f).log_evidence() for f in (0.6, 1, 1.6)]
    assert around[1] == max(around)


@pytest.mark.full
@pytest.mark.parametrize("name", ["dense", "repeat", "frozen"])
def test_samples_have_the_covariance(name):
    posterior, _, _ = posterior_of(name)
    number = 20_000
    drawn = posterior.sample(jax.random.key(0), number)
    means = jax.tree.leaves(learned(posterior.params))
    for leaf, mean, want in zip(
        jax.tree.leaves(learned(drawn)), means, covariances(posterior), strict=True
    ):
        apart = (leaf - mean[None]).reshape(number, -1)
        assert jnp.linalg.norm(apart.T @ apart / number - want) <= 0.05 * jnp.linalg.norm(want)


@pytest.mark.full
def test_the_last_layer_alone():
    net, params, x, target = problem("dense")
    frozen = *map(jp.freeze, params[:-1]), params[-1]
    posterior = jp.laplace(net, LOSS)(frozen, x, target)
    _, got = posterior.outputs(x)
    features = jnp.tanh(x @ params[0].w + params[0].b[None])
    head = jp.laplace(jp.chain(jp.Dense(3)), LOSS)((params[-1],), features, target)
    assert relative_error(got, head.outputs(features)[1]) <= 1e-10
    drawn = posterior.sample(jax.random.key(0), 2)
    assert relative_error(drawn[0].w.value[0], params[0].w) == 0


def test_probabilities_are_less_sure_than_the_point_and_stay_ordered():
    posterior, x, _ = posterior_of("dense")
    p = posterior.probabilities(x)
    point = jax.nn.softmax(posterior.net(posterior.params, x))
    assert relative_error(p.sum(axis=1), jnp.ones(len(x))) <= 1e-12
    assert (p.max(axis=1) < point.max(axis=1)).all()
    surer = posterior.with_prior(1e8).probabilities(x)
    assert relative_error(surer, point) <= 1e-6


def test_mistakes():
    net, params, x, target = problem("dense")
    with pytest.raises(ValueError, match="laplace: structure is 'kronecker' or 'diagonal'"):
        jp.laplace(net, LOSS, structure="full")
    posterior = jp.laplace(net, LOSS)(params, x, target)
    with pytest.raises(ValueError, match="with_prior: precision must be positive"):
        posterior.with_prior(0.0)
    with pytest.raises(TypeError, match="sample: key is a key"):
        posterior.sample(0)
    with pytest.raises(TypeError, match="sampling takes a key"):
        jp.laplace(net, LOSS, samples=2)(params, x, target)


@pytest.mark.full
def test_a_posterior_keeps_no_key_and_no_mask_of_its_batch():
    block = jp.skip(jp.chain(jp.Dense(6), jp.Dropout(0.5), jp.Attention(1)))
    net = jp.chain(jp.Embedding(5, 2), block, jp.Dense(3))
    ids, mask = (
        jnp.arange(12).reshape(4, 3) % 5,
        jnp.arange(3)[None] < jnp.array([[1], [2], [3], [3]]),
    )
    params = net.init(jax.random.key(0), ids)
    posterior = jp.laplace(net, LOSS)(params, ids, ids % 3, key=jax.random.key(1), mask=mask)
    assert jax.tree.structure(posterior.params) == jax.tree.structure(params)
    y, covariance = posterior.outputs(ids[:2])
    assert relative_error(y, net(params, ids[:2])) == 0
    assert covariance.shape == (2, 9, 9)
    drawn = posterior.sample(jax.random.key(0), 2)
    assert jax.vmap(net, (0, None))(drawn, ids[:1]).shape == (2, 1, 3, 3)


@pytest.mark.parametrize("precisions", [[0.1, 10.0], np.array([0.1, 10.0])])
def test_a_prior_of_given_precisions(precisions):
    posterior, _, _ = posterior_of("dense")
    assert float(posterior.tuned(precisions).prior) in precisions
    with pytest.raises(ValueError, match=r"tuned: precisions are positive, not -1\.0"):
        posterior.tuned([-1.0, 0.1])
    with pytest.raises(ValueError, match=r"tuned: precisions are one or more, \(k,\)"):
        posterior.tuned([])


@pytest.mark.full
def test_the_evidence_in_float32_beside_64_bits_and_strict_promotion():
    net, x, target = jp.chain(jp.Dense(3)), jnp.ones((4, 2), jnp.float32), jnp.array([0, 1, 2, 0])
    params = jax.tree.map(lambda p: p.astype(jnp.float32), net.init(jax.random.key(0), x))
    with jax.numpy_dtype_promotion("strict"):
        evidence = jp.laplace(net, LOSS)(params, x, target).log_evidence()
    assert evidence.dtype == jnp.float32


def test_the_probability_of_a_regression_is_refused():
    net, x, target = (
        jp.chain(jp.Dense(1)),
        jnp.ones((4, 2)),
        jnp.array([[0.0], [1.0], [1.0], [0.0]]),
    )
    posterior = jp.laplace(net, jp.HalfSquaredError())(net.init(jax.random.key(0), x), x, target)
    with pytest.raises(TypeError, match="probabilities is of a net that classifies"):
        posterior.probabilities(x)


def test_probabilities_of_a_binary_net_are_those_of_the_sigmoid():
    net, params, x, _ = problem("dense")
    target = jnp.asarray(np.random.default_rng(0).integers(0, 2, (len(x), 3)), float)
    posterior = jp.laplace(net, jp.BinaryCrossEntropy())(params, x, target)
    y, covariance = posterior.outputs(x)
    v = jnp.diagonal(covariance, axis1=1, axis2=2)
    want = jax.nn.sigmoid(y / jnp.sqrt(1 + jnp.pi / 8 * v))
    assert relative_error(posterior.probabilities(x), want) <= 1e-12
