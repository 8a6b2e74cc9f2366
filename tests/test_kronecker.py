"""Linear algebra with Kronecker factors, corrected eigenvalues, and influence."""

from typing import Any, NamedTuple

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import pytest
from functions import hold_curvature
from table import TABLE, Row, at, normal, relative_error, row_id
from test_quantities import has_params, problem as problem_of

import jaxprop as jp

LOSS = jp.CrossEntropy()
BLOCK = jp.skip(jp.chain(jp.LayerNorm(), jp.Dense(4), jp.Tanh()))


def heads(w, x):
    """A kernel with three axes, one that is transposed, and one that is used in part."""
    y = jnp.tanh(jnp.einsum("ntd,dhk->nthk", x, w["q"]))
    y = jnp.einsum("nthk,hko->nto", y, w["out"]) @ w["t"].T
    return y @ w["part"][1:4] + w["b"][None, None]


def scanned(w, x):
    y, _ = jax.lax.scan(lambda x, w: (jnp.tanh(jnp.einsum("ntd,ed->nte", x, w)), None), x, w)
    return y


def grouped(w, x):
    numbers = jax.lax.conv_dimension_numbers(x.shape, w.shape, ("NHWC", "OIHW", "NHWC"))
    y = jax.lax.conv_general_dilated(
        x, w, (1, 1), "SAME", dimension_numbers=numbers, feature_group_count=2
    )
    return y.mean(axis=(1, 2))


IDS = np.arange(12).reshape(4, 3) % 7
NETS = {
    "dense": (jp.chain(jp.Dense(6), jp.Tanh(), jp.Dense(3)), normal(5, 4)),
    "sequence": (jp.chain(jp.Dense(6), jp.Tanh(), jp.Dense(3)), normal(4, 3, 5)),
    "convolution": (
        jp.chain(
            jp.Conv(4, (3, 2), strides=2),
            jp.Relu(),
            jp.Conv(6, groups=2),
            jp.Flatten(),
            jp.Dense(2),
        ),
        normal(3, 6, 5, 2),
    ),
    "tokens": (jp.chain(jp.Embedding(7, 4), jp.Positions(5), BLOCK, jp.Dense(3)), IDS),
    "tied": (jp.chain(jp.tied(jp.Embedding(7, 4), BLOCK)), IDS),
    "repeat": (jp.chain(jp.Dense(4), jp.repeat(BLOCK, 3), jp.Dense(2)), normal(4, 3, 5)),
    "lstm": (jp.chain(jp.Lstm(3), jp.Dense(2)), normal(3, 4, 2)),
    "frozen": (jp.chain(jp.frozen(jp.Dense(3)), jp.Tanh(), jp.Dense(2)), normal(4, 3)),
    "heads": (jp.function(heads), normal(4, 3, 5)),
    "scanned": (jp.function(scanned), normal(4, 3, 5)),
    "grouped": (jp.function(grouped), normal(3, 4, 4, 4)),
}
PARAMS = {
    "heads": {
        "q": normal(5, 2, 3),
        "out": normal(2, 3, 4),
        "t": normal(3, 4),
        "part": normal(5, 3),
        "b": normal(3),
    },
    "scanned": normal(2, 5, 5),
    "grouped": normal(6, 2, 3, 3),
}


def problem(name):
    net, x = NETS[name]
    if name in PARAMS:
        params, x = jax.device_put((PARAMS[name], x))
    else:
        params, x = at(Row(net, x))
    y = jax.eval_shape(net, params, x)
    target = np.random.default_rng(1).integers(0, y.shape[-1], y.shape[:-1])
    return net, params, x, jax.device_put(target)


def learned(tree):
    return jax.tree.leaves(jp.core.tree.learned(tree))


@jax.jit
def dense(block, leaf):
    """The matrix of a block, with the param's entries in their own order."""
    unit = jnp.eye(leaf.size).reshape(leaf.size, *leaf.shape)
    return jax.vmap(lambda e: jp.curvature.times(block, e).ravel())(unit).T


def of_leaves(curvature, params):
    params = jp.core.tree.learned(params)
    structure = jax.tree.structure(params)
    blocks = structure.flatten_up_to(jp.core.tree.learned(curvature))
    pairs = zip(blocks, jax.tree.leaves(params), strict=True)
    return [np.asarray(dense(*pair)) for pair in pairs]


def blocks_of_root(net, params, x, target):
    """The exact blocks of the Gauss-Newton matrix, one for each learned param."""
    root = jp.ggn_root(net, LOSS)(params, x, target)
    for leaf in learned(root):
        rows = leaf.reshape(-1, int(np.prod(leaf.shape[2:])))
        yield rows.T @ rows / leaf.shape[1]


@pytest.mark.few(1)
@pytest.mark.parametrize("name", NETS)
def test_solve_times_whiten_and_logdet_are_those_of_the_blocks(name):
    net, params, x, target = problem(name)
    factors = jax.jit(jp.kronecker_factors(net, LOSS, others="diagonal"))(params, x, target)
    tree = jax.tree.map(lambda p: normal(*p.shape), params)
    solve, whiten = jax.jit(jp.curvature.solve), jax.jit(jp.curvature.whiten)
    solved, white = (jax.device_get(f(factors, tree, 0.1)) for f in (solve, whiten))
    logdets = 0.0
    each = zip(of_leaves(factors, params), *map(learned, (tree, solved, white)), strict=True)
    for matrix, v, got, half in each:
        assert relative_error(matrix, matrix.T) <= 1e-12
        damped = matrix + 0.1 * np.eye(len(matrix))
        assert relative_error(damped @ got.ravel(), v.ravel()) <= 1e-10
        assert relative_error(half.ravel() @ half.ravel(), v.ravel() @ got.ravel()) <= 1e-10
        logdets += np.linalg.slogdet(damped)[1]
    if name != "heads":  # if only a part of a param is used, the block is for that part
        assert relative_error(jax.jit(jp.curvature.logdet)(factors, 0.1), logdets) <= 1e-10
    again = solve(jax.jit(jp.curvature.eigh)(factors), tree, 0.1)
    assert relative_error(again, solved) <= 1e-12


@pytest.mark.full
@pytest.mark.parametrize("name", NETS)
def test_no_diagonal_in_the_basis_of_the_factors_is_nearer_to_the_block(name):
    net, params, x, target = problem(name)
    factors = jp.kronecker_factors(net, LOSS, others="diagonal")(params, x, target)
    corrected = jax.jit(jp.curvature.ekfac_factors(net, LOSS, others="diagonal"))(params, x, target)
    exact = blocks_of_root(net, params, x, target)
    for block, was, now in zip(
        exact, of_leaves(factors, params), of_leaves(corrected, params), strict=True
    ):
        assert relative_error(jnp.trace(now), jnp.trace(block)) <= 1e-10
        # it is the projection onto matrices with those eigenvectors, orthogonal to the rest
        assert abs(jnp.vdot(block - now, now)) <= 1e-10 * jnp.vdot(block, block)
        apart, before = (jnp.linalg.norm(block - m) for m in (now, was))
        assert apart <= before + 1e-10


@pytest.mark.full
@pytest.mark.parametrize("name", ["dense", "convolution"])
@pytest.mark.parametrize("positions", ["expand", "reduce"])
def test_corrections_of_micro_batches_and_of_weights(name, positions):
    net, params, x, target = problem(name)
    x, target = (jnp.concatenate([a, a[:1]]) if len(a) % 2 else a for a in (x, target))
    factors = jp.kronecker_factors(net, LOSS, positions=positions)(params, x, target)
    asked = jp.curvature.EigenvalueCorrection(jp.curvature.eigh(factors))

    def corrected(x, target, micro_batches=1, weights=None):
        f = jp.quantities(net, LOSS, it=asked, micro_batches=micro_batches)
        return of_leaves(f(params, x, target, weights=weights)["it"], params)

    assert relative_error(corrected(x, target, 2), corrected(x, target)) <= 1e-10
    weights = jnp.array([2.0, 0.0] + [1.0] * (len(x) - 2))
    rows = jnp.array([0, 0, *range(2, len(x))])
    weighed = corrected(x, target, weights=weights)
    assert relative_error(weighed, corrected(x[rows], target[rows])) <= 1e-10


@pytest.mark.full
def test_sampled_corrections_have_the_mean_of_the_exact_ones():
    net, params, x, target = problem("dense")
    basis = jp.curvature.eigh(jp.kronecker_factors(net, LOSS)(params, x, target))

    def values(samples, key=None):
        asked = jp.curvature.EigenvalueCorrection(basis, samples)
        tree = jp.quantities(net, LOSS, it=asked)(params, x, target, key=key)["it"]
        leaves = jax.tree.leaves(tree, is_leaf=jp.curvature.is_block)
        return jnp.concatenate([block.values.ravel() for block in leaves])

    exact, sampled = values(None), values(4000, jax.random.key(0))
    assert jnp.linalg.norm(sampled - exact) <= 0.05 * jnp.linalg.norm(exact)


def inverse(curvature, params, damping):
    matrices = of_leaves(curvature, params)
    return [jnp.linalg.inv(m + damping * jnp.eye(len(m))) for m in matrices]


@pytest.mark.full
@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("kind", ["kronecker", "ekfac", "diagonal", "none"])
def test_influence_is_an_inner_product_in_the_inverse_curvature(name, kind):
    net, params, x, target = problem(name)
    curvature = {
        "kronecker": jp.kronecker_factors(net, LOSS, others="skip"),
        "ekfac": jp.curvature.ekfac_factors(net, LOSS, others="diagonal"),
        "diagonal": jp.diag_ggn(net, LOSS),
        "none": lambda *args: jax.tree.map(lambda _: (), jp.core.tree.learned(params)),
    }[kind](params, x, target)
    other = x[:2], (target[:2] + 1) % 2
    of = jax.jit(jp.curvature.influence(net, LOSS))
    got = of(params, (x, target), other, curvature, 0.3)
    alone = jax.jit(jp.curvature.self_influence(net, LOSS))(params, x, target, curvature, 0.3)
    g, h, same = (
        learned(jp.per_example_grads(net, LOSS)(params, *batch))
        for batch in ((x, target), other, (x, target))
    )
    want = wanted = 0.0
    matrices = inverse(curvature, params, 0.3)
    for left, right, own, m in zip(g, h, same, matrices, strict=True):
        left, right, own = (a.reshape(len(a), -1) for a in (left, right, own))
        want += left @ m @ right.T
        wanted += jnp.einsum("np,pq,nq->n", own, m, own)
    assert relative_error(got, want) <= 1e-10
    assert relative_error(alone, wanted) <= 1e-10


@pytest.mark.full
def test_influence_predicts_what_a_step_on_one_example_does():
    net, params, x, target = problem("dense")
    curvature = jp.curvature.ekfac_factors(net, LOSS)(params, x, target)
    got = jp.curvature.influence(net, LOSS)(params, (x, target), (x, target), curvature, 0.1)
    value = jp.loss_fn(net, LOSS)
    for n in range(len(x)):
        grad = jax.grad(value)(params, x[n : n + 1], target[n : n + 1])
        step = jp.curvature.solve(curvature, grad, 0.1)
        moved = jax.tree.map(lambda p, s: p - 1e-5 * s, params, step)
        for m in range(len(x)):
            before, after = (value(p, x[m : m + 1], target[m : m + 1]) for p in (params, moved))
            assert abs((before - after) / 1e-5 - got[n, m]) <= 1e-3 * abs(got).max()


def test_a_curvature_of_other_params_is_refused():
    net, params, x, target = problem("dense")
    factors = jax.jit(jp.kronecker_factors(net, LOSS))(params, x, target)
    with pytest.raises(ValueError, match="the curvature is like params"):
        jp.curvature.solve(factors, params[:2], 0.1)
    wide = jax.tree.map(lambda p: np.zeros((*p.shape[:-1], p.shape[-1] + 1)), params)
    with pytest.raises(ValueError, match="is no block of"):
        jp.curvature.solve(factors, wide, 0.1)
    with pytest.raises(ValueError, match="solve: damping must not be negative"):
        jp.curvature.solve(factors, params, -0.1)
    with pytest.raises(TypeError, match="influence takes two batches"):
        jp.curvature.influence(net, LOSS)(params, (x, target), x, factors, 0.1)


@pytest.mark.full
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_small_dtypes(dtype):
    net, params, x, target = problem("sequence")
    wide = jp.curvature.solve(jp.curvature.ekfac_factors(net, LOSS)(params, x, target), params, 0.1)
    params, x = jax.tree.map(lambda a: a.astype(dtype), (params, x))
    factors = jax.jit(jp.curvature.ekfac_factors(net, LOSS))(params, x, target)
    solved = jax.jit(jp.curvature.solve)(factors, params, 0.1)
    assert jax.tree.map(jnp.result_type, solved) == jax.tree.map(jnp.result_type, params)
    tolerance = 1e-4 if dtype == jnp.float32 else 0.1
    assert relative_error(jax.tree.map(lambda a: a.astype(float), solved), wide) <= tolerance


def flat(tree):
    return jax.flatten_util.ravel_pytree(jp.core.tree.learned(tree))[0]


def whole(curvature, params):
    """The matrix of a curvature, on all learned entries."""
    zeros, back = jax.flatten_util.ravel_pytree(jp.core.tree.learned(params))
    unit = jnp.eye(zeros.size)
    return jax.vmap(lambda e: flat(jp.curvature.times(curvature, back(e))))(unit).T


@pytest.mark.full
@pytest.mark.parametrize("positions", ["expand", "reduce"])
@pytest.mark.parametrize("name", ["dense", "sequence", "convolution", "repeat", "tokens", "lstm"])
def test_a_joint_bias_is_a_row_of_its_matrix(name, positions):
    """The block then contains the bias's products with the matrix's entries."""
    net, params, x, target = problem(name)
    given = {"positions": positions, "others": "diagonal", "joint_bias": True}
    factors = jp.kronecker_factors(net, LOSS, **given)(params, x, target)
    corrected = jp.curvature.ekfac_factors(net, LOSS, **given)(params, x, target)
    tree = jax.tree.map(lambda p: jnp.asarray(normal(*p.shape)), params)
    exact = jp.ggn_root(net, LOSS)(params, x, target)
    leaves = [leaf.reshape(-1, leaf[0, 0].size) for leaf in learned(exact)]
    rows = jnp.concatenate(leaves, axis=1)
    block = rows.T @ rows / len(x)
    for curvature in (factors, corrected):
        matrix = whole(curvature, params)
        damped = matrix + 0.2 * jnp.eye(len(matrix))
        solved = jp.curvature.solve(curvature, tree, 0.2)
        assert relative_error(damped @ flat(solved), flat(tree)) <= 1e-10
        logdet = jp.curvature.logdet(curvature, 0.2)
        assert relative_error(logdet, jnp.linalg.slogdet(damped)[1]) <= 1e-10
    if name in ("dense", "sequence", "convolution", "repeat"):
        matrix = whole(corrected, params)
        assert relative_error(jnp.trace(matrix), jnp.trace(block)) <= 1e-10
        assert abs(jnp.vdot(block - matrix, matrix)) <= 1e-10 * jnp.vdot(block, block)


@pytest.mark.full
@pytest.mark.parametrize("name", ["dense", "convolution"])
def test_influence_and_laplace_with_a_joint_bias(name):
    net, params, x, target = problem(name)
    curvature = jp.curvature.ekfac_factors(net, LOSS, joint_bias=True)(params, x, target)
    matrix = whole(curvature, params)
    inverse = jnp.linalg.inv(matrix + 0.3 * jnp.eye(len(matrix)))
    each = learned(jp.per_example_grads(net, LOSS)(params, x, target))
    g = jnp.concatenate([leaf.reshape(len(x), -1) for leaf in each], axis=1)
    got = jp.curvature.influence(net, LOSS)(params, (x, target), (x, target), curvature, 0.3)
    assert relative_error(got, g @ inverse @ g.T) <= 1e-10
    alone = jp.curvature.self_influence(net, LOSS)(params, x, target, curvature, 0.3)
    assert relative_error(alone, jnp.diagonal(g @ inverse @ g.T)) <= 1e-10
    posterior = jp.laplace(net, LOSS)(params, x, target)._replace(curvature=curvature)
    _, covariance = posterior.with_prior(0.3 * len(x)).outputs(x)
    of_one = jax.jacrev(lambda p, x: net(p, x[None])[0])
    rows = jax.tree.leaves(jax.vmap(of_one, (None, 0))(params, x))
    j = jnp.concatenate([leaf.reshape(*leaf.shape[:2], -1) for leaf in rows], axis=2)
    want = jnp.einsum("ncp,pq,ndq->ncd", j, inverse, j) / len(x)
    assert relative_error(covariance, want) <= 1e-10


@pytest.mark.full
def test_one_example_s_block_is_the_product_with_its_bias():
    net, params, x, target = problem("dense")
    net, params = jp.chain(net.children()[0].layer), params[:1]
    loss, x, target = jp.HalfSquaredError(), x[:1], jnp.asarray(normal(1, 6))
    factors = jp.kronecker_factors(net, loss, joint_bias=True)(params, x, target)
    jacobian = jax.jacrev(lambda p: net(p, x)[0])(params)
    rows = jnp.concatenate([leaf.reshape(6, -1) for leaf in jax.tree.leaves(jacobian)], axis=1)
    assert relative_error(whole(factors, params), rows.T @ rows) <= 1e-12
    assert factors[0].w.a.shape == (5, 5)


@pytest.mark.parametrize("features", [3, 4])
def test_padded_positions_are_no_features(features):
    """A layer without positions has as many features as the layers after it have positions."""
    target = jnp.array([[0, 1, -1], [2, -1, -1], [1, 0, 2], [2, 1, -1]])
    net, x = jp.chain(jp.Dense(9), jp.Reshape((3, 3))), jnp.asarray(normal(4, features))
    params = net.init(jax.random.key(0), x)
    for positions in ("expand", "reduce"):
        asked = jp.KroneckerFactors(positions=positions, joint_bias=True)
        found = jp.quantities(net, LOSS, it=asked)(params, x, target)["it"]
        ones = jnp.concatenate([x, jnp.ones((4, 1))], 1)
        assert relative_error(found[0].w.a, ones.T @ ones / 4) <= 1e-12


@pytest.mark.parametrize("positions", ["expand", "reduce"])
def test_padding_of_a_convolution_is_that_of_a_dense_layer(positions):
    """A convolution is a dense layer on its windows, whose rows hold several positions."""
    target = jnp.array([[0, 1, -1, -1], [2, -1, -1, -1], [1, 0, 2, 1], [2, 1, 0, -1]])
    x, weights = jnp.asarray(normal(4, 4, 2)), jnp.array([1.0, 2, 0, 1])
    params = jp.Dense(3).init(jax.random.key(0), jnp.ones((1, 4)))

    def wide(x):
        return jnp.concatenate([jnp.pad(x, ((0, 0), (1, 0), (0, 0)))[:, :-1], x], -1)

    asked = jp.KroneckerFactors(positions=positions, joint_bias=True)
    f = jp.quantities(jp.Dense(3), LOSS, it=asked)
    want = f(params, wide(x), target, weights=weights)["it"].w
    conv = jp.Conv(3, window=(2,), padding="CAUSAL")
    f = jp.quantities(conv, LOSS, it=asked)
    got = f(params._replace(w=params.w.reshape(2, 2, 3)), x, target, weights=weights)["it"].w
    assert relative_error((got.a, got.b), (want.a, want.b)) <= 1e-12


@pytest.mark.parametrize("positions", ["expand", "reduce"])
def test_a_padded_example_of_a_convolution_may_hold_anything(positions):
    x, target = jnp.asarray(normal(4, 4, 2)), jnp.array([[0, 1, 2, 0]] * 3 + [[-1] * 4])
    asked = jp.KroneckerFactors(positions=positions, joint_bias=True)
    net = jp.Conv(3, window=(2,))
    f, params = jp.quantities(net, LOSS, it=asked), net.init(jax.random.key(0), x)
    want = f(params, x, target)["it"].w
    found = f(params, x.at[3].set(jnp.nan), target)["it"].w
    assert relative_error(found.a, want.a) <= 1e-12


class OwnParams(NamedTuple):
    w: Any
    b: Any


class Product(jp.Layer):
    """y = (x w) b, where b is not a bias."""

    features: int

    def init(self, key, x):
        return OwnParams(jax.random.normal(key, (x.shape[-1], self.features)), jnp.ones(3))

    def forward(self, params, x):
        return (x @ params.w) * params.b[None], x

    def backward(self, params, x, ct):
        d_b = jp.Sum(ct * (x @ params.w))
        return OwnParams(jp.Outer(x, ct * params.b[None]), d_b), (ct * params.b[None]) @ params.w.T


def test_params_of_one_s_own_that_are_called_w_and_b_have_no_joint_block():
    x = jnp.asarray(normal(4, 5))
    jp.check_layer(Product(3), x)
    params = Product(3).init(jax.random.key(0), x)
    factors = jp.kronecker_factors(Product(3), LOSS, joint_bias=True, others="diagonal")
    found = factors(params, x, jnp.array([0, 1, 2, 0]))
    assert (found.w.a.shape, found.w.b.shape) == ((5, 5), (3, 3))
    assert jax.tree.leaves(found.b)


def test_empirical_factors_are_those_of_the_gradient():
    net, target = jp.Dense(3), 1 - normal(4, 3)
    params, x = at(Row(net, normal(4, 5)))
    empirical = jp.KroneckerFactors(empirical=True)
    f = jax.jit(jp.quantities(net, jp.HalfSquaredError(), it=empirical))
    found, x = f(params, x, target)["it"].w, np.asarray(x)
    ct = np.asarray(net(params, x)) - target
    np.testing.assert_allclose(found.a, x.T @ x / 4, rtol=1e-12)
    np.testing.assert_allclose(found.b, ct.T @ ct / 4, rtol=1e-12)


def test_a_param_without_factors_is_left_out_where_it_is_asked_for():
    net = jp.tied(jp.Embedding(7, 4), jp.Tanh())  # the table is looked up and multiplied
    params, ids = at(Row(net, IDS))
    skipped = jp.kronecker_factors(net, LOSS, others="skip")
    assert jax.tree.leaves(jax.eval_shape(skipped, params, ids, IDS)) == []


def test_mistakes_in_what_is_sampled():
    with pytest.raises(ValueError, match="samples is at least 1"):
        jp.quantity.HessianRoot(samples=0)
    net, params, x, target = problem("dense")
    with pytest.raises(TypeError, match="sampling takes a key"):
        jax.jit(jp.curvature.ekfac_factors(net, LOSS, samples=3))(params, x, target)
    factors = jax.jit(jp.kronecker_factors(net, LOSS))(params, x, target)
    basis = jax.jit(jp.curvature.eigh)(factors)
    with pytest.raises(ValueError, match="samples is at least 1"):
        jp.curvature.EigenvalueCorrection(basis, samples=0)
    with pytest.raises(ValueError, match="there is nothing to sample"):
        jp.curvature.EigenvalueCorrection(basis, samples=1, empirical=True)


STEP = jp.chain(jp.Dense(3), jp.Tanh())
PADDED = {
    "once": STEP,
    "shared": jp.shared(STEP, 2),
    "repeated": jp.repeat(jp.shared(STEP, 2), 2),
    "convolved": jp.chain(jp.Conv(3, window=(2,), padding="CAUSAL"), jp.Tanh()),
}


@pytest.mark.few(2)
@pytest.mark.parametrize("positions", ["expand", "reduce"])
@pytest.mark.parametrize("name", PADDED)
def test_what_padding_holds_does_not_matter(name, positions):
    """Positions that the target leaves out, with no cotangent, are in neither factor."""
    net, x = PADDED[name], jnp.asarray(normal(2, 4, 3))
    target = jnp.array([[0, 1, -1, -1], [1, -1, -1, -1]])
    params = net.init(jax.random.key(0), x)
    for joint in (False, True):
        factors = jp.KroneckerFactors(positions=positions, joint_bias=joint)
        f = jax.jit(jp.quantities(net, LOSS, f=factors))
        other = x.at[0, 2:].set(100.0).at[1, 1:].set(100.0)
        assert relative_error(f(params, x, target)["f"], f(params, other, target)["f"]) <= 1e-12


@pytest.mark.parametrize("length", [4, 5])
def test_an_encoder_as_long_as_the_padded_target(length):
    """The memory has no padding, whatever the target has."""
    memory = jp.chain(jp.Item(1), jp.Dense(4))
    net = jp.chain(
        jp.branch(jp.chain(jp.Item(0), jp.Dense(2)), memory, join="tuple"),
        jp.Attention(1, causal=False),
        jp.Dense(3),
    )
    x, m = jnp.asarray(normal(2, 4, 3)), jnp.asarray(normal(length, 2, 3)).swapaxes(0, 1)
    target = jnp.array([[0, 1, -1, -1], [1, -1, -1, -1]])
    params = net.init(jax.random.key(0), (x, m))
    factors = jax.jit(jp.kronecker_factors(net, LOSS))(params, (x, m), target)
    expected = jnp.einsum("nsi,nsj->ij", m, m) / (2 * length)
    assert relative_error(factors[0][1][1].w.a, expected) <= 1e-12


def test_a_prompt_that_is_attended_to_counts_in_both_factors():
    rest = jp.chain(jp.Attention(1), jp.Dense(3))
    net, x = jp.chain(jp.Dense(3), rest), jnp.asarray(normal(2, 4, 3))
    target = jnp.array([[-1, -1, 0, 1], [-1, 2, 1, -1]])  # the last position is padding
    params = net.init(jax.random.key(0), x)
    found = jax.jit(jp.kronecker_factors(net, LOSS))(params, x, target)[0].w
    y, pull = jax.vjp(lambda h: rest(params[1], h), jp.Dense(3)(params[0], x))
    residuals = LOSS.forward(y, target)[1]
    columns = range(LOSS.hessian_columns(residuals))
    cts = jnp.stack([pull(LOSS.hessian_column(residuals, c))[0] for c in columns])
    counted = jnp.array([[1, 1, 1, 1], [1, 1, 1, 0]])
    np.testing.assert_array_equal(jnp.any(cts != 0, (0, 3)), counted)
    a = jnp.einsum("nti,ntj,nt->ij", x, x, counted.astype(x.dtype)) / 7
    assert relative_error(found.a, a) <= 1e-12
    assert relative_error(found.b, jnp.einsum("cnti,cntj->ij", cts, cts) / 2) <= 1e-12


@pytest.mark.full
def test_influence_of_batches_with_masks():
    net = jp.chain(
        jp.Embedding(7, 4), jp.skip(jp.chain(jp.Dense(12), jp.Attention(2))), jp.Dense(3)
    )
    ids, mask = jnp.asarray(IDS), jnp.arange(3)[None] < jnp.array([[1], [2], [3], [3]])
    params = net.init(jax.random.key(0), ids)
    target = jnp.where(mask, ids % 3, -1)
    factors = jp.kronecker_factors(net, LOSS, others="diagonal")(params, ids, target, mask=mask)
    grads = jp.per_example_grads(net, LOSS)(params, ids, target, mask=mask)
    solved = jax.vmap(lambda tree: jp.curvature.solve(factors, tree, 0.1))(grads)
    g, d = (jnp.concatenate([p.reshape(4, -1) for p in learned(t)], 1) for t in (grads, solved))
    of, batch = jp.curvature.influence(net, LOSS), (ids, target)
    got = of(params, batch, batch, factors, 0.1, mask=mask)
    assert relative_error(got, g @ d.T) <= 1e-10
    some = of(params, batch, (ids[1:3], target[1:3]), factors, 0.1, mask=mask, other_mask=mask[1:3])
    assert relative_error(some, (g @ d.T)[:, 1:3]) <= 1e-10


@pytest.mark.full
def test_influence_of_a_net_that_draws_is_of_the_batch_s_own_draws():
    net = jp.chain(jp.Dense(6), jp.Dropout(0.4), jp.Dense(3))
    x, key = jnp.asarray(normal(4, 5)), jax.random.key(3)
    params, target = net.init(jax.random.key(0), x), jnp.arange(4) % 3
    params = jax.tree.map(lambda p: p.astype(float), params)
    factors = jp.kronecker_factors(net, LOSS, samples=2)(params, x, target, key=key)
    each = jp.per_example_grads(net, LOSS)(params, x, target, key=key)
    g = jnp.concatenate([leaf.reshape(4, -1) for leaf in learned(each)], axis=1)
    solved = jax.vmap(lambda tree: jp.curvature.solve(factors, tree, 0.1))(each)
    d = jnp.concatenate([leaf.reshape(4, -1) for leaf in learned(solved)], axis=1)
    of, batch = jp.curvature.influence(net, LOSS), (x, target)
    got = of(params, batch, batch, factors, 0.1, key=key)
    assert relative_error(got, g @ d.T) <= 1e-10
    alone = jp.curvature.self_influence(net, LOSS)(params, *batch, factors, 0.1, key=key)
    assert relative_error(jnp.diagonal(got), alone) <= 1e-10


def test_what_is_no_curvature_and_no_tree_is_said():
    net, params, x, target = problem("dense")
    factors = jax.jit(jp.kronecker_factors(net, LOSS))(params, x, target)
    with pytest.raises(TypeError, match="eigh: 'a' is not a block of a curvature"):
        jp.curvature.logdet("a")
    with pytest.raises(TypeError, match="times: the tree is of floating arrays"):
        jp.curvature.times(factors, jax.tree.map(lambda p: np.asarray(p, int), params))
    with pytest.raises((TypeError, ValueError), match="times: the"):
        jp.curvature.times(factors[0].w, 3.0)


@pytest.mark.full
@pytest.mark.parametrize(
    "row",
    [row for row in TABLE if has_params(row) and not row.layer.batch_coupled],
    ids=row_id,
)
def test_curvature_of_every_layer(row):
    net, loss, params, x, target = problem_of(row)
    hold_curvature(net, loss, params, x, target)
