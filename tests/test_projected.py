"""Projected per-example gradients, inner products between batches, and the tangent kernel."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from table import Row, at, normal, relative_error

import jaxprop as jp

LOSS = jp.HalfSquaredError()
BLOCK = jp.skip(jp.chain(jp.LayerNorm(), jp.Dense(4), jp.Tanh()))
NETS = {
    "dense": (jp.chain(jp.Dense(6), jp.Tanh(), jp.Dense(3)), normal(5, 4)),
    "sequence": (jp.chain(jp.Dense(6), jp.Tanh(), jp.Dense(3)), normal(4, 3, 5)),
    "short": (
        jp.chain(jp.Dense(24), jp.Tanh(), jp.Dense(20), jp.GlobalAvgPool(), jp.Dense(2)),
        normal(4, 3, 16),
    ),
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
    "tokens": (
        jp.chain(jp.Embedding(7, 4), jp.Positions(5), BLOCK, jp.Dense(3)),
        np.arange(12).reshape(4, 3) % 7,
    ),
    "tied": (jp.chain(jp.tied(jp.Embedding(7, 4), BLOCK)), np.arange(12).reshape(4, 3) % 7),
    "repeat": (jp.chain(jp.Dense(4), jp.repeat(BLOCK, 3), jp.Dense(2)), normal(4, 3, 5)),
    "lstm": (jp.chain(jp.Lstm(3), jp.Dense(2)), normal(3, 4, 2)),
    "function": (
        jp.function(lambda w, x: jnp.tanh(x @ w["a"] + w["b"][None]) @ w["c"].T),
        normal(5, 4),
    ),
}


def problem(name):
    net, x = NETS[name]
    if name == "function":
        params = {"a": normal(4, 6), "b": normal(6), "c": normal(3, 6)}
        params, x = jax.device_put((params, x))
    else:
        params, x = at(Row(net, x))
    y = jax.eval_shape(net, params, x)
    target = jax.device_put(np.random.default_rng(1).normal(size=y.shape))
    return net, params, x, target


def flat(tree):
    leaves = [np.asarray(leaf).reshape(len(leaf), -1) for leaf in jax.tree.leaves(tree)]
    return np.concatenate(leaves, axis=1)


@pytest.mark.few(1)
@pytest.mark.parametrize("name", NETS)
def test_inner_products_are_those_of_per_example_gradients(name):
    net, params, x, target = problem(name)
    x2, target2 = x[:2] if name in ("tokens", "tied") else x[:2] + 0.3, target[:2] - 0.5
    of = jax.jit(jp.inner_products(net, LOSS))
    got = of(params, (x, target), (x2, target2))
    each = jax.jit(jp.per_example_grads(net, LOSS))
    want = flat(each(params, x, target)) @ flat(each(params, x2, target2)).T
    assert relative_error(got, want) <= 1e-10


@functools.partial(jax.jit, static_argnums=0)
def kernel_of_jacobians(net, params, x, x2):
    def jacobian(x):
        of_one = jax.jacrev(lambda p, x: net(p, x[None])[0].ravel())
        each = jax.vmap(of_one, (None, 0))(params, x)
        return jnp.concatenate(
            [leaf.reshape(*leaf.shape[:2], -1) for leaf in jax.tree.leaves(each)], axis=2
        )

    want = jnp.einsum("ncp,mdp->nmcd", jacobian(x), jacobian(x2))
    return want, jnp.trace(want, axis1=2, axis2=3) / want.shape[-1]


@pytest.mark.few(1)
@pytest.mark.parametrize("name", NETS)
def test_the_tangent_kernel_is_that_of_jacobians(name):
    net, params, x, _ = problem(name)
    full, mean = jax.jit(jp.ntk(net, full=True)), jax.jit(jp.ntk(net))
    for batches in ((x,), (x, x[:2])):
        want, trace = kernel_of_jacobians(net, params, x, batches[-1])
        assert relative_error(full(params, *batches), want) <= 1e-10
        assert relative_error(mean(params, *batches), trace) <= 1e-10


@pytest.mark.full
def test_the_tangent_kernel_of_more_outputs_than_are_walked_from_at_a_time():
    net, x = jp.chain(jp.Dense(4), jp.Tanh(), jp.Dense(19)), jnp.asarray(normal(3, 2))
    params = net.init(jax.random.key(0), x)
    _, trace = kernel_of_jacobians(net, params, x, x)
    assert relative_error(jp.ntk(net)(params, x), trace) <= 1e-10


def test_the_tangent_kernel_of_the_mean_over_positions():
    """It is x_n . x_m + 1 with the means of x, for more outputs than one walk takes at a time."""
    net, x = jp.chain(jp.Dense(20), jp.GlobalAvgPool()), normal(2, 1, 3, 8)
    params, mean = jax.jit(net.init)(jax.random.key(0), x), x.mean(axis=(1, 2))
    np.testing.assert_allclose(jax.jit(jp.ntk(net))(params, x), mean @ mean.T + 1, rtol=1e-12)


def test_the_tangent_kernel_of_a_param_that_no_output_depends_on():
    net, x = jp.function(lambda w, x: x @ w["used"]), normal(4, 2)
    params = {"used": np.ones((2, 3)), "unused": np.ones(5)}
    expected = np.einsum("ni,mi,cd->nmcd", x, x[:2], np.eye(3))
    got = jax.jit(jp.ntk(net, full=True))(params, x, x[:2])
    np.testing.assert_allclose(got, expected, rtol=1e-12)


@pytest.mark.full
def test_the_tangent_kernel_between_sequences_of_other_lengths():
    net = jp.chain(jp.Dense(4), BLOCK, jp.GlobalAvgPool())
    x, x2 = jnp.asarray(normal(3, 2, 8)), jnp.asarray(normal(2, 40, 8))
    params = net.init(jax.random.key(0), x)
    want, trace = kernel_of_jacobians(net, params, x, x2)
    assert relative_error(jp.ntk(net, full=True)(params, x, x2), want) <= 1e-10
    assert relative_error(jp.ntk(net)(params, x, x2), trace) <= 1e-10


def test_each_batch_has_its_own_mask():
    net = jp.chain(jp.Dense(12), jp.Attention(2), jp.Take(-1), jp.Dense(3))
    loss, rng = jp.HalfSquaredError(), np.random.default_rng(0)
    params, _ = at(Row(net, normal(3, 4, 5)))
    batches, masks, grads, kernels = [], [], [], []
    for examples, length in ((3, 4), (2, 6)):
        x, target = rng.normal(size=(examples, length, 5)), rng.normal(size=(examples, 3))
        mask = np.arange(length)[None] < rng.integers(1, length, (examples, 1))
        x, target, mask = jax.device_put((x, target, mask))
        batches.append((x, target))
        masks.append(mask)
        grads.append(flat(jp.per_example_grads(net, loss)(params, x, target, mask=mask)))
        jacobian = jax.jacrev(lambda p, x=x, mask=mask: net(net.bind(p, mask=mask), x))(params)
        kernels.append([leaf.reshape(examples, 3, -1) for leaf in jax.tree.leaves(jacobian)])
    given = {"mask": masks[0], "other_mask": masks[1]}
    got = jax.jit(jp.inner_products(net, loss))(params, *batches, **given)
    assert relative_error(got, grads[0] @ grads[1].T) <= 1e-10
    got = jax.jit(jp.ntk(net))(params, batches[0][0], batches[1][0], **given)
    expected = sum(jnp.einsum("ncp,mcp->nm", a, b) for a, b in zip(*kernels, strict=True)) / 3
    assert relative_error(got, expected) <= 1e-10
    with pytest.raises(ValueError, match="ntk: other_mask is that of x2, and there is none"):
        jp.ntk(net)(params, batches[0][0], **given)


@pytest.mark.full
def test_the_tangent_kernel_under_vmap_and_its_derivative():
    net, params, x, _ = problem("repeat")
    several = jax.tree.map(lambda leaf: jnp.stack([leaf, 0.5 * leaf]), params)
    each = jax.vmap(jp.ntk(net), (0, None))(several, x)
    assert relative_error(each[0], jp.ntk(net)(params, x)) <= 1e-12

    def of(kernel):
        return jax.grad(lambda params: jnp.sum(jnp.sin(kernel(params))))(params)

    got, want = of(lambda p: jp.ntk(net)(p, x)), of(lambda p: kernel_of_jacobians(net, p, x, x)[1])
    assert relative_error(got, want) <= 1e-10


def sides_of(params, rank, name):
    """Random matrices on both sides of each param, as a matrix with its last axis for columns."""
    rng = np.random.default_rng(5)

    def of(path, leaf):
        layers = (3,) if name == "repeat" and "[1]" in jax.tree_util.keystr(path) else ()
        shape = leaf.shape[len(layers) :]
        size = (int(np.prod(shape[:-1])), shape[-1])
        left = rng.normal(size=(*layers, size[0], rank)) if size[0] > 1 else None
        right = rng.normal(size=(*layers, size[1], rank))
        return jp.quantity.Sides(*jax.device_put((left, right)))

    return jax.tree.map_with_path(of, params)


@pytest.mark.few(1)
@pytest.mark.parametrize("name", [name for name in NETS if name != "function"])
def test_projected_gradients_are_those_of_per_example_gradients(name):
    net, params, x, target = problem(name)
    sides = sides_of(params, 2, name)
    got = jax.jit(jp.projected_grads(net, LOSS, sides=sides))(params, x, target)
    each = jax.jit(jp.per_example_grads(net, LOSS))(params, x, target)

    def project(g, side):
        layers = side.right.ndim - 2
        g = np.asarray(g).reshape(*g.shape[: 1 + layers], -1, g.shape[-1])
        right = np.einsum("nlio,lok->nlik" if layers else "nio,ok->nik", g, side.right)
        if side.left is not None:
            spec = "nlio,lik->nlko" if layers else "nio,ik->nko"
            right = np.einsum(spec, right, side.left)
        return right.reshape(*right.shape[:-2], -1)

    want = jax.tree.map(project, each, sides)
    assert jax.tree.structure(got) == jax.tree.structure(params)
    assert relative_error(got, want) <= 1e-10
    parts = 1 if len(x) % 2 else 2
    again = jax.jit(jp.projected_grads(net, LOSS, sides=sides, micro_batches=parts))
    assert relative_error(again(params, x, target), want) <= 1e-10


@pytest.mark.full
def test_random_sides_preserve_inner_products_at_the_rate():
    """The mean over keys is exact, and the error falls as 1 / rank."""
    net = jp.chain(jp.Dense(40), jp.Tanh(), jp.Dense(30))
    params, x = at(Row(net, normal(4, 50)))
    target = jnp.asarray(np.random.default_rng(1).normal(size=(4, 30)))
    exact = jp.gram(net, LOSS)(params, x, target)
    scale = np.sqrt(np.outer(np.diag(exact), np.diag(exact)))

    def errors(rank, keys=24):
        @jax.jit
        def of(key):
            return jp.projected_grads(net, LOSS, rank, key=key)(params, x, target)

        rows = [flat(of(key)) for key in jax.random.split(jax.random.key(0), keys)]
        return np.stack([(each @ each.T - exact) / scale for each in rows])

    few, many = errors(4), errors(16)
    root = [np.sqrt(np.mean(each**2)) for each in (few, many)]
    assert np.abs(many.mean(0)).max() < 5 * root[1] / np.sqrt(24)
    assert 2 < root[0] / root[1] < 8  # sqrt(2 / rank) by each side, and their product


def test_no_side_is_wider_than_it_is_long():
    net = jp.chain(jp.Dense(3), jp.Dense(2))
    params, x = at(Row(net, normal(4, 5)))
    batch = params, x, x[:, :2]
    rows = jax.jit(jp.projected_grads(net, LOSS, 100, key=jax.random.key(0)))(*batch)
    each = jax.jit(jp.per_example_grads(net, LOSS))(*batch)
    assert relative_error(flat(rows), flat(each)) <= 1e-12


def test_random_sides_keep_norms():
    """Each side scales them by sqrt(chi^2 / 50) with 50 degrees of freedom: 1 within a tenth."""
    net, target = jp.Dense(60, bias=False), 1 - normal(3, 60)
    params, x = at(Row(net, normal(3, 60)))
    rows = jax.jit(jp.projected_grads(net, LOSS, 50, key=jax.random.key(0)))(params, x, target)
    each = jax.jit(jp.per_example_grads(net, LOSS))(params, x, target)
    norms, expected = (np.linalg.norm(flat(tree), axis=1) for tree in (rows, each))
    np.testing.assert_allclose(norms, expected, rtol=0.4)


def test_functions_and_their_scans():
    def scanned(w, x):
        h, _ = jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, w["stack"])
        return h @ w["out"]

    params = jax.device_put({"stack": normal(3, 4, 4), "out": normal(4, 2)})
    net, x = jp.function(scanned), jax.device_put(normal(5, 4))
    key = jax.random.key(0)
    rows = jax.jit(jp.projected_grads(net, LOSS, 2, key=key))(params, x, x[:, :2])
    assert jax.tree.map(jnp.shape, rows) == {"out": (5, 4), "stack": (5, 3, 4)}
    exact = jax.jit(jp.projected_grads(net, LOSS, 4, key=key))(params, x, x[:, :2])
    each = jax.jit(jp.per_example_grads(net, LOSS))(params, x, x[:, :2])
    assert relative_error(flat(exact), flat(each)) <= 1e-11


@pytest.mark.full
def test_principal_sides_keep_what_gradients_vary_in():
    """Two columns on each side keep gradients of rank two."""
    rng = np.random.default_rng(0)
    net = jp.chain(jp.Dense(6, bias=False))
    x = jnp.asarray(rng.normal(size=(8, 2)) @ rng.normal(size=(2, 5)))
    params = (jp.AffineParams(jnp.zeros((5, 6))),)
    target = jnp.asarray(rng.normal(size=(8, 2)) @ rng.normal(size=(2, 6)))
    empirical = jp.quantities(net, LOSS, k=jp.KroneckerFactors(empirical=True))
    sides = jp.quantity.principal(empirical(params, x, target)["k"], 2)
    rows = jp.projected_grads(net, LOSS, sides=sides)(params, x, target)[0].w
    assert rows.shape == (8, 4)
    assert relative_error(rows @ rows.T, jp.gram(net, LOSS)(params, x, target)) <= 1e-10


@pytest.mark.full
def test_principal_rows_of_a_table_are_those_that_are_looked_up_most():
    net, ids = jp.chain(jp.Embedding(7, 4)), jnp.array([[2, 2, 5], [5, 2, 0]])
    batch = net.init(jax.random.key(0), ids), ids, jnp.zeros((2, 3, 4))
    (sides,) = jp.quantity.principal(jp.kronecker_factors(net, LOSS)(*batch), 2)
    np.testing.assert_array_equal(sides.left, np.eye(7)[:, [2, 5]])
    (rows,) = jp.projected_grads(net, LOSS, sides=(sides._replace(right=None),))(*batch)
    (each,) = jp.per_example_grads(net, LOSS)(*batch)
    assert relative_error(rows, each[:, [2, 5]].reshape(2, 8)) <= 1e-12


def test_sides_of_a_net_with_what_is_not_learned():
    net = jp.chain(jp.frozen(jp.Dense(4)), jp.Dense(3))
    params, x = at(Row(net, normal(5, 4)))
    sides = jax.tree.map(lambda _: jp.quantity.Sides(None, None), params)
    rows = jax.jit(jp.projected_grads(net, LOSS, sides=sides))(params, x, x[:, :3])
    each = jax.jit(jp.per_example_grads(net, LOSS))(params, x, x[:, :3])
    assert relative_error(rows[1].w, each[1].w.reshape(5, -1)) <= 1e-12


def test_as_a_quantity_beside_others():
    net, params, x, target = problem("dense")
    key = jax.random.key(3)
    f = jp.quantities(net, LOSS, seen=jp.quantity.Projected(2, key), norms=jp.SqNorms())
    got = jax.jit(f)(params, x, target)
    want = jax.jit(jp.projected_grads(net, LOSS, 2, key=key))(params, x, target)
    assert relative_error(got["seen"], want) <= 1e-12


def test_mistakes_are_said():
    net, params, x, target = problem("dense")
    with pytest.raises(TypeError, match="Projected: give a rank and a key, or sides"):
        jp.projected_grads(net, LOSS)
    with pytest.raises(TypeError, match="key"):
        jp.projected_grads(net, LOSS, 2)
    with pytest.raises(ValueError, match="given, or drawn"):
        jp.projected_grads(net, LOSS, 2, sides=())
    with pytest.raises(ValueError, match="sides are like params"):
        jp.projected_grads(net, LOSS, sides=(jnp.eye(2),))(params, x, target)
    wrong = jax.tree.map(lambda _: jp.quantity.Sides(jnp.eye(3), None), params)
    with pytest.raises(ValueError, match="are sides of a param of"):
        jp.projected_grads(net, LOSS, sides=wrong)(params, x, target)
    with pytest.raises(TypeError, match="a Kronecker for each param"):
        jp.quantity.principal(params, 2)
    with pytest.raises(TypeError, match="takes two batches"):
        jp.inner_products(net, LOSS)(params, x, target)
    coupled = jp.chain(jp.Dense(4), jp.BatchNorm())
    params, batch = jax.jit(coupled.init)(jax.random.key(0), x), (x, x)
    with pytest.raises(ValueError, match="couples"):
        jp.inner_products(coupled, LOSS)(params, batch, batch)


@pytest.mark.full
@pytest.mark.parametrize("micro_batches", [1, 2])
@pytest.mark.parametrize("name", NETS)
def test_factors_that_are_kept_answer_later(name, micro_batches):
    net, params, x, target = problem(name)
    x, target = x[:2], target[:2]
    f = jp.quantities(net, LOSS, kept=jp.quantity.Factors(), micro_batches=micro_batches)
    kept = jax.jit(f)(params, x, target)["kept"]
    forms = jax.tree.leaves(kept, is_leaf=lambda node: isinstance(node, jp.forms.Factored))
    want = jp.per_example_grads(net, LOSS)(params, x, target)
    for form, g in zip(forms, jax.tree.leaves(want), strict=True):
        assert relative_error(form.per_example(), g) <= 1e-12
    products = sum(form.products_with(form) for form in forms)
    assert relative_error(products, flat(want) @ flat(want).T) <= 1e-10


def test_factors_are_smaller_than_gradients():
    net, x = jp.chain(jp.Dense(64), jp.Tanh(), jp.Dense(64)), normal(3, 2, 64)
    params = jax.eval_shape(net.init, jax.random.key(0), x)
    f = jp.quantities(net, LOSS, kept=jp.quantity.Factors())
    kept = jax.eval_shape(f, params, x, x)["kept"]
    size = sum(leaf.size for leaf in jax.tree.leaves(kept))
    assert size < 0.08 * 3 * sum(leaf.size for leaf in jax.tree.leaves(params))


@pytest.mark.full
@pytest.mark.parametrize("full", [False, True])
def test_the_tangent_kernel_of_no_examples_is_empty(full):
    net, params, x, _ = problem("dense")
    some = (3, 3) if full else ()
    assert jp.ntk(net, full=full)(params, x[:0]).shape == (0, 0, *some)
    assert jp.ntk(net, full=full)(params, x, x[:0]).shape == (len(x), 0, *some)
