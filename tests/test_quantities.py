"""Every quantity against its oracle, on every net of the table, and what they mean together."""

import itertools

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracles
import pytest
import scipy.stats
from hypothesis import given
from table import LOSSES, TABLE, Row, at, first_of_their_kind, relative_error, row_id

import jaxprop as jp
from jaxprop.core.arrays import aligned
from jaxprop.core.describe import structs
from jaxprop.core.forms.form import norms, norms_of_all
from jaxprop.core.tree import learned


class Plain(jp.Layer):
    """A user's layer whose cotangents are plain arrays: y = tanh(x w) * s, s a scalar."""

    features: int

    def init(self, key, x):
        return {
            "w": jax.random.normal(key, (x.shape[-1], self.features), x.dtype),
            "s": jnp.ones((), x.dtype),
        }

    def forward(self, params, x):
        h = jnp.tanh(x @ params["w"])
        return h * params["s"], (x, h)

    def backward(self, params, residuals, ct):
        x, h = residuals
        d_z = ct * params["s"] * (1 - h**2)
        axes = tuple(range(x.ndim - 1))
        d_params = {"w": jnp.tensordot(x, d_z, (axes, axes)), "s": jnp.sum(ct * h)}
        return d_params, d_z @ params["w"].T


class Mixed(jp.Layer):
    """A layer with one factored cotangent and one plain one."""

    def init(self, key, x):
        return (jnp.ones(x.shape[-1], x.dtype), jnp.zeros(x.shape[-1], x.dtype))

    def forward(self, params, x):
        scale, shift = (aligned(param, x) for param in params)
        return x * scale + shift, x

    def backward(self, params, x, ct):
        axes = tuple(range(x.ndim - 1))
        return (jnp.sum(x * ct, axes), jp.Sum(ct)), ct * aligned(params[0], ct)


def normal(*shape):
    return np.random.default_rng(1).normal(size=shape)


def has_params(row):
    return jax.tree.leaves(jax.eval_shape(row.layer.init, jax.random.key(0), structs(row.x)))


ROWS = [
    *(row for row in TABLE if has_params(row) and not row.layer.batch_coupled),
    Row(Plain(3), normal(4, 5)),
    Row(jp.chain(jp.Dense(4), jp.skip(Plain(4)), Mixed(), jp.Dense(2)), normal(4, 2, 3)),
    Row(jp.chain(jp.Dense(2), jp.Relu()), normal(3, 7, 2)),  # T (I + O) > I O: by g itself
    Row(jp.Dense(9), normal(2, 2, 8)),  # by the Gram matrices
]
rows = pytest.mark.parametrize("row", ROWS, ids=row_id)


def run(f, *args, **options):
    return jax.jit(f)(*args, **options)


def problem(row, loss=None):
    params, x = at(row)
    y, _ = jax.eval_shape(row.layer.forward, params, x)
    loss = loss or jp.HalfSquaredError()
    if loss == jp.CrossEntropy():
        target = np.random.default_rng(2).integers(
            -1 if y.ndim > 2 else 0, y.shape[-1], y.shape[:-1]
        )
    else:
        target = np.random.default_rng(2).uniform(size=y.shape)
    return row.layer, loss, params, x, jax.device_put(target)


QUANTITIES = [
    "per_example_grads",
    "per_example_sq_norms",
    "gram",
    "second_moment",
    "variance",
    "noise_scale",
]


EACH_LOSS = (jp.HalfSquaredError(), jp.CrossEntropy(), jp.BinaryCrossEntropy())
OFTEN = {id(row) for row in first_of_their_kind(ROWS)}
CURVATURE = [row for row in first_of_their_kind(ROWS) if isinstance(row, Row)]
rows_and_losses = pytest.mark.parametrize(  # the losses take turns, to compile less
    ("row", "loss"),
    [
        pytest.param(
            row, loss, marks=() if loss == in_turn and id(row) in OFTEN else pytest.mark.full
        )
        for row, in_turn in zip(ROWS, itertools.cycle(EACH_LOSS), strict=False)
        for loss in EACH_LOSS
    ],
    ids=lambda value: str(value) if isinstance(value, jp.Loss) else row_id(value),
)
SMALL, MIDDLE, LARGE = 0.01, 0.3, 1e6


def asked(examples, curvature=True):
    """Every quantity, at bounds that clip all examples, some of them, and none."""
    all_of = {
        "grads": jp.Gradient(),
        "each": jp.PerExampleGrads(),
        "norms": jp.SqNorms(),
        "gram": jp.Gram(),
        "moment": jp.SecondMoment(),
        "variance": jp.Variance(),
        "noise": jp.NoiseScale(),
        "by layer": jp.SqNorms(per_layer=True),
        "gram by layer": jp.Gram(per_layer=True),
        "clipped": jp.Clipped(MIDDLE),
        "all clipped": jp.Clipped(SMALL),
        "none clipped": jp.Clipped(LARGE),
        "clipped by layer": jp.Clipped(MIDDLE, per_layer=True),
        "in two passes": jp.Clipped(MIDDLE, two_pass=True),
    }
    if curvature:
        all_of |= {"diagonal": jp.DiagGGN(), "diagonals": jp.DiagGGN(per_example=True)}
        all_of |= {"root": jp.quantity.GGNRoot()}
    return all_of if examples > 1 else {k: v for k, v in all_of.items() if k != "noise"}


def expected_of(net, loss, args, curvature):
    """Their oracles, from each example's gradient and Gauss-Newton blocks."""
    each = oracles.per_example_grads(net, loss)(*args)
    mean = jax.tree.map(lambda g: g.mean(0), each)
    oracle = {
        "grads": mean,
        "each": each,
        "norms": oracles.per_example_sq_norms.of(each),
        "gram": oracles.gram.of(each),
        "moment": oracles.second_moment.of(each),
        "variance": oracles.variance.of(each),
        "clipped": oracles.clipped.of(each, MIDDLE),
        "all clipped": oracles.clipped.of(each, SMALL),
        "none clipped": mean,
    }
    if curvature:
        blocks = oracles.ggn_blocks(net, loss)(*args)
        oracle |= {"diagonal": oracles.diagonal(args[0], blocks), "root": blocks}
        oracle |= {"diagonals": oracles.diagonals(args[0], blocks)}
    if len(jax.tree.leaves(args[1])[0]) > 1:
        oracle["noise"] = oracles.noise_scale.of(each)
    oracle["in two passes"] = oracle["clipped"]
    return oracle


def gram_by_layer(by_layer, grads):
    """The inner products of each layer's part; (layers, N, N) for the layers of a repeat."""

    def of_layer(sq, grads):
        def products(g):
            layers = jnp.moveaxis(g.reshape(len(g), *sq.shape[:-1], -1), 0, -2)
            return layers @ layers.swapaxes(-1, -2)

        each = list(map(products, jax.tree.leaves(grads)))
        return sum(each[1:], start=each[0])

    return jax.tree.map(of_layer, by_layer, learned(grads))


def clipped_by_layer(by_layer, grads):
    """The mean with each layer's part clipped separately; a repeat's norms are (layers, N)."""
    weights = jax.tree.map(
        lambda sq: jnp.minimum(1, MIDDLE / jnp.sqrt(sq)) / sq.shape[-1], by_layer
    )

    def of_layer(weights, grads):
        def sum_of(g):
            layers = weights.reshape(-1, len(g))
            shares = jnp.moveaxis(g.reshape(len(g), len(layers), -1), 0, 1)
            return jnp.einsum("ln,lni->li", layers, shares).reshape(g.shape[1:])

        return jax.tree.map(sum_of, grads)

    return jax.tree.map(of_layer, weights, learned(grads))


@pytest.mark.few(8)
@rows_and_losses
def test_every_quantity_against_its_oracle(row, loss, request):
    """All quantities together, from one program; each is also compared alone, on one net, below.

    Curvature, whose oracle takes long to compile, is tested on the first layer of each kind only.
    """
    net, loss, *args = problem(row, loss)
    curvature = any(row is each for each in CURVATURE) or request.config.getoption("--full")
    hold_to_oracles(net, loss, args, curvature)


def hold_to_oracles(net, loss, args, curvature=True):
    def block(v):
        v = v.reshape(*v.shape[:2], -1)
        return jnp.einsum("cni,cnj->nij", v, v)

    @jax.jit
    def both(*args):
        got = jp.quantities(net, loss, **asked(len(args[1]), curvature))(*args)
        expected = expected_of(net, loss, args, curvature)
        if curvature:
            got["root"] = jax.tree.map(block, learned(got["root"]))
        expected["clipped by layer"] = clipped_by_layer(got["by layer"], expected["each"])
        expected["gram by layer"] = gram_by_layer(got["by layer"], expected["each"])
        return got, expected

    got, expected = jax.device_get(both(*args))
    for side in (got, expected):  # a difference of moments: hold the error against those
        variance = learned(side["variance"])
        side["variance"] = jax.tree.map(np.add, variance, expected["moment"])
    if "noise" in expected and not expected["norms"].any():  # logits of one class: 0 / 0
        assert np.isnan(got.pop("noise"))
        assert np.isnan(expected.pop("noise"))
    for name, want in expected.items():
        assert relative_error(got[name], want) <= 1e-10, name
    parts = [
        leaf.reshape(-1, len(got["norms"])).sum(0) for leaf in jax.tree.leaves(got["by layer"])
    ]
    assert relative_error(sum(parts), got["norms"]) <= 1e-12
    each = jax.tree.map(lambda g: g.mean(0), got["each"])
    assert relative_error(each, got["grads"]) <= 1e-10


def latent_cost(latent):
    mean, logvar = latent
    return 0.5 * jnp.sum(mean**2 + jnp.exp(logvar) - logvar - 1)


HEADS = jp.chain(
    jp.Dense(4),
    jp.Tanh(),
    jp.branch(
        digit=jp.Dense(3),
        angle=jp.chain(jp.Dense(2), jp.Tanh()),
        latent=jp.branch(jp.Dense(2), jp.Dense(1), join="tuple"),
    ),
    jp.on("angle", jp.repeat(jp.chain(jp.Dense(2), jp.Sigmoid()), 2)),
)
OF_HEADS = jp.total_loss(
    digit=jp.CrossEntropy(label_smoothing=0.1),
    angle=(0.5, jp.HalfSquaredError()),
    latent=(2, jp.loss(latent_cost)),
)


def several_heads():
    x = jnp.asarray(normal(5, 4))
    target = {"digit": jnp.array([0, 2, 1, 1, 0]), "angle": jnp.asarray(normal(5, 2))}
    return HEADS, OF_HEADS, HEADS.init(jax.random.key(0), x), x, target


@pytest.mark.full
def test_an_output_that_is_a_dict_of_several_heads():
    net, loss, *args = several_heads()
    hold_to_oracles(net, loss, args)
    together = jp.quantities(net, loss, **asked(4) | {"kfac": jp.KroneckerFactors(samples=2)})
    key = jax.random.key(0)
    whole = jax.jit(together)(*args, key=key)
    assert relative_error(whole["value"], jp.loss_fn(net, loss)(*args)) <= 1e-12
    assert jax.tree.structure(learned(whole["kfac"])) == jax.tree.structure(
        learned(jp.kronecker_factors(net, loss)(*args))
    )
    asked_in_parts = {k: v for k, v in asked(4).items() if not v.of_pairs}
    parts = jax.jit(jp.quantities(net, loss, **asked_in_parts, micro_batches=5))(*args)
    for name, got in parts.items():
        if name != "variance":
            assert relative_error(got, whole[name]) <= 1e-9, name


@pytest.mark.full
@rows
def test_together_is_the_same_as_alone(row):
    net, loss, *args = problem(row)
    together = run(jp.quantities(net, loss, **asked(len(args[1]))), *args)
    moment = learned(together["moment"])
    for name, quantity in asked(len(args[1])).items():
        got, alone = together[name], run(jp.quantities(net, loss, it=quantity), *args)["it"]
        if name == "variance":  # a difference of moments: hold the error against those
            got, alone = (jax.tree.map(jnp.add, learned(it), moment) for it in (got, alone))
        assert relative_error(got, alone) <= 1e-12, name


@pytest.mark.full
def test_each_function_is_its_quantity():
    net, loss, *args = problem(Row(KFAC_NET, normal(4, 2, 5)), jp.CrossEntropy())
    together = run(jp.quantities(net, loss, **asked(4)), *args)
    functions = {
        "each": jp.per_example_grads(net, loss),
        "norms": jp.per_example_sq_norms(net, loss),
        "by layer": jp.per_example_sq_norms(net, loss, per_layer=True),
        "gram": jp.gram(net, loss),
        "gram by layer": jp.gram(net, loss, per_layer=True),
        "moment": jp.second_moment(net, loss),
        "variance": jp.variance(net, loss),
        "noise": jp.noise_scale(net, loss),
        "diagonal": jp.diag_ggn(net, loss),
        "diagonals": jp.diag_ggn(net, loss, per_example=True),
        "root": jp.ggn_root(net, loss),
    }
    for name, f in functions.items():
        assert relative_error(run(f, *args), together[name]) <= 1e-12, name
    value_and_gradient = run(jp.value_and_grad(net, loss), *args)
    assert relative_error(value_and_gradient, (together["value"], together["grads"])) <= 1e-12
    for name, options in (
        ("clipped", {}),
        ("in two passes", {"two_pass": True}),
        ("clipped by layer", {"per_layer": True}),
    ):
        value, clipped = run(jp.clipped_grad(net, loss, MIDDLE, **options), *args)
        assert relative_error((value, clipped), (together["value"], together[name])) <= 1e-12, name
    with pytest.raises(ValueError, match="from at least 2 examples, not 1"):
        jp.noise_scale(net, loss)(args[0], args[1][:1], args[2][:1])


@pytest.mark.full
def test_clipped_with_a_key_and_a_mask_in_the_seats():
    attention = jp.skip(jp.chain(jp.Dense(6), jp.Attention(1), jp.Dense(2), jp.Dropout(0.5)))
    net, loss = jp.chain(jp.repeat(attention, 2), jp.Dropout(0.5), jp.Dense(3)), jp.CrossEntropy()
    x = jnp.asarray(normal(4, 3, 2))
    seats = net.bind(
        net.init(jax.random.key(0), x),
        key=jax.random.key(1),
        mask=jnp.arange(3)[None] < jnp.array([3, 1, 2, 3])[:, None],
    )
    args = seats, x, jnp.ones((4, 3), int)
    clipped, in_two_passes, unclipped = (
        jax.jit(jp.clipped_grad(net, loss, max_norm, two_pass=two_pass))(*args)
        for max_norm, two_pass in ((0.1, False), (0.1, True), (1e6, False))
    )
    assert relative_error(clipped, in_two_passes) <= 1e-12
    assert relative_error(unclipped, jax.jit(jp.value_and_grad(net, loss))(*args)) <= 1e-12
    assert relative_error(clipped, unclipped) > 0.1


@pytest.mark.full
@pytest.mark.few(1)
@pytest.mark.parametrize("two_pass", [False, True])
def test_the_bound_holds_in_narrow_dtypes(two_pass):
    """A cotangent that is weighted before it is rounded would exceed the bound, or vanish."""
    net = jp.chain(jp.Dense(8), jp.Tanh(), jp.Dense(3))
    for dtype, examples, max_norm in ((jnp.bfloat16, 1, 1e-3), (jnp.float16, 1200, 1e-4)):
        narrow, loss = jp.cast(net, dtype), jp.CrossEntropy()
        x = jnp.asarray(normal(1, 5), jnp.float32)
        params = narrow.init(jax.random.key(0), x)
        x = jnp.tile(x, (examples, 1))
        args = params, x, jnp.zeros(examples, int)
        f = jp.clipped_grad(narrow, loss, max_norm, two_pass=two_pass)
        # In one program XLA may round an array for one of its uses, and not for another.
        for clipped, rtol in ((f, 1e-6), (jax.jit(f), 1e-3)):
            _, grads = clipped(*args)
            norm = np.sqrt(sum(np.sum(np.asarray(leaf) ** 2) for leaf in jax.tree.leaves(grads)))
            np.testing.assert_allclose(norm, max_norm, rtol=rtol)


def test_a_loss_without_parentheses_is_named_where_it_is_written():
    net = jp.chain(jp.Dense(3))
    for two_pass in (False, True):
        with pytest.raises(TypeError, match=r"loss is the class CrossEntropy; write"):
            jp.clipped_grad(net, jp.CrossEntropy, 1.0, two_pass=two_pass)


LOSSES_OF_Y = [jax.tree.map(jax.device_put, row) for row in LOSSES]
losses = pytest.mark.parametrize(("loss", "y", "target"), LOSSES_OF_Y, ids=lambda v: str(v)[:24])


@pytest.mark.few(4)
@losses
def test_hessian_root_is_a_root_of_the_hessian(loss, y, target):
    def own(y, target):
        return loss.forward(*oracles.one((y, target)))[0][0]

    @jax.jit
    def error(y, target):
        _, residuals = loss.forward(y, target)
        root = loss.hessian_root(residuals).reshape(-1, len(y), y[0].size)
        hessian = jax.vmap(jax.hessian(own))(y, target).reshape(len(y), y[0].size, y[0].size)
        return jnp.max(jnp.abs(jnp.einsum("cni,cnj->nij", root, root) - hessian))

    assert float(error(y, target)) <= 1e-12


@pytest.mark.few(10)
@losses
def test_samples_have_the_hessian_for_covariance(loss, y, target):
    """The error of a mean of M samples is about 1 / sqrt(M): with 16 M, a fourth."""

    @jax.jit
    def error_and_size(key, count=4000):
        _, residuals = loss.forward(y / 50, target)  # no class so rare that it is never drawn
        root = loss.hessian_root(residuals).reshape(-1, len(y), y[0].size)
        hessian = jnp.einsum("cni,cnj->nij", root, root)
        drawn = jax.vmap(loss.sample, (0, None))(jax.random.split(key, count), residuals)
        flat = drawn.reshape(count, len(y), y[0].size)
        error = jnp.linalg.norm(jnp.einsum("cni,cnj->nij", flat, flat) / count - hessian)
        return error, jnp.linalg.norm(hessian)

    error, size = map(float, error_and_size(jax.random.key(0)))
    assert error <= 6 * size / 4000**0.5 + 1e-12


KFAC_NET = jp.chain(jp.Dense(4), jp.Tanh(), jp.Dense(3))


@pytest.mark.full
def test_kflr_of_one_example_is_the_ggn_block():
    net, loss, *args = problem(Row(KFAC_NET, normal(1, 5)), jp.CrossEntropy())
    blocks = run(oracles.ggn_blocks(net, loss), *args)
    for factors in (
        jp.kronecker_factors(net, loss)(*args),
        jax.jit(jp.quantities(net, loss, it=jp.KroneckerFactors()))(*args)["it"],
    ):
        for layer in (0, 2):
            w, b = factors[layer]
            assert relative_error(jnp.kron(w.a, w.b), blocks[layer].w[0]) <= 1e-10
            assert relative_error(jnp.kron(b.a, b.b), blocks[layer].b[0]) <= 1e-10


def test_kronecker_factors_are_means_of_gram_matrices():
    net, loss, *args = problem(Row(KFAC_NET, normal(6, 2, 5)), jp.HalfSquaredError())
    factors = run(jp.kronecker_factors(net, loss), *args)
    params, x, _ = jax.device_get(args)
    h = np.tanh(x @ params[0].w + params[0].b)
    assert relative_error(factors[0].w.a, np.einsum("nti,ntj->ij", x, x) / 12) <= 1e-12
    assert relative_error(factors[2].w.a, np.einsum("nti,ntj->ij", h, h) / 12) <= 1e-12
    assert relative_error(factors[2].w.b, 2 * np.eye(3)) <= 1e-12  # H = 1 at two positions
    back = np.einsum("ij,nti->ntij", params[2].w, 1 - h**2)
    assert relative_error(factors[0].w.b, np.einsum("ntic,ntjc->ij", back, back) / 6) <= 1e-12
    reduced = run(jp.kronecker_factors(net, loss, positions="reduce"), *args)
    mean = x.mean(1)
    assert relative_error(reduced[0].w.a, mean.T @ mean / 6) <= 1e-12
    assert relative_error(reduced[0].w.b, factors[0].w.b) <= 1e-12  # a column has one position


@pytest.mark.parametrize("length", [1, 4, 16, 64])
def test_kronecker_factors_are_as_large_as_the_block_at_any_length(length):
    """By their trace, with independent positions: not larger by the number of positions."""
    net, loss = jp.chain(jp.Dense(6), jp.Tanh(), jp.Dense(3)), jp.HalfSquaredError()
    params, x = at(Row(net, normal(16, length, 5)))

    @jax.jit
    def both(*args):
        return jp.kronecker_factors(net, loss)(*args), jp.diag_ggn(net, loss)(*args)

    factors, diagonal = jax.device_get(both(params, x, x[..., :3]))
    for index in (0, 2):
        a, b = factors[index].w
        assert 0.7 <= np.trace(a) * np.trace(b) / diagonal[index].w.sum() <= 1.4


@pytest.mark.full
def test_reduced_factors_are_the_block_of_a_linear_net_with_a_mean():
    """For dense layers and a mean over positions, and one example, kron(a, b) is exact."""
    net, loss = jp.chain(jp.Dense(3), jp.GlobalAvgPool(), jp.Dense(2)), jp.HalfSquaredError()
    params, x = at(Row(net, normal(1, 5, 4)))
    factors = jp.kronecker_factors(net, loss, positions="reduce")(params, x, jnp.zeros((1, 2)))
    root = jp.ggn_root(net, loss)(params, x, jnp.zeros((1, 2)))
    columns = root[0].w.reshape(2, 12)
    assert relative_error(jnp.kron(*factors[0].w), columns.T @ columns) <= 1e-12


@pytest.mark.full
def test_reduced_factors_of_a_convolution_are_of_its_mean_patch():
    loss, x = jp.HalfSquaredError(), normal(3, 5, 5, 4)
    for groups in (1, 2):
        net = jp.chain(jp.Conv(6, (3, 2), strides=2, groups=groups), jp.GlobalAvgPool())
        params, x = at(Row(net, x))
        target = jnp.zeros((3, 6))
        got = jp.kronecker_factors(net, loss, positions="reduce")(params, x, target)[0].w
        root = jp.ggn_root(net, loss)(params, x[:1], target[:1])[0].w
        alone = jp.kronecker_factors(net, loss, positions="reduce")(params, x[:1], target[:1])[0].w
        for group in range(groups):
            a, b = (f if groups == 1 else f[group] for f in alone)
            o = slice(group * 6 // groups, (group + 1) * 6 // groups)
            columns = root[:, 0, ..., o].reshape(6, -1)
            assert relative_error(jnp.kron(a, b), columns.T @ columns) <= 1e-12
        assert got.a.shape[-1] == 3 * 2 * 4 // groups


@pytest.mark.full
def test_what_has_no_factors_is_skipped_or_has_a_diagonal():
    table = jp.Embedding(7, 4)
    net = jp.chain(jp.tied(table, jp.chain(jp.LayerNorm(), jp.Dense(4))))
    ids, loss = jnp.arange(6).reshape(2, 3) % 7, jp.CrossEntropy()
    params = net.init(jax.random.key(0), ids)
    with pytest.raises(TypeError, match="used more than once"):
        jp.kronecker_factors(net, loss)(params, ids, ids)
    diagonal = jp.kronecker_factors(net, loss, others="diagonal")(params, ids, ids)
    exact = jp.diag_ggn(net, loss)(params, ids, ids)
    skipped = jp.kronecker_factors(net, loss, others="skip")(params, ids, ids)

    inner = diagonal[0][1]
    assert relative_error(diagonal[0][0], exact[0][0]) <= 1e-12
    assert skipped[0][0] == ()
    assert relative_error(skipped[0][1], inner) <= 1e-12


def test_padding_counts_in_neither_factor():
    net, loss = jp.chain(jp.Dense(4), jp.Tanh(), jp.Dense(3)), jp.CrossEntropy()
    params, x = at(Row(net, normal(4, 3, 5)))
    target = np.array([[0, 1, -1], [2, -1, -1], [0, 2, 1], [-1, -1, -1]])
    rows = np.asarray(x)[target >= 0]
    got = run(jp.kronecker_factors(net, loss), params, x, target)
    assert relative_error(got[0].w.a, rows.T @ rows / len(rows)) <= 1e-12
    for parts in (1, 2):
        again = run(jp.kronecker_factors(net, loss, micro_batches=parts), params, x, target)
        assert relative_error(again[0].w.a, got[0].w.a) <= 1e-12
        assert relative_error(again[2].w.b, got[2].w.b) <= 1e-12


@pytest.mark.few(1)
@pytest.mark.parametrize(
    ("f", "loss"),
    [
        pytest.param(f, loss, marks=() if i == j else pytest.mark.full)
        for i, f in enumerate((jp.diag_ggn, jp.kronecker_factors, jp.ggn_root))
        for j, loss in enumerate(EACH_LOSS)
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_sampled_converges_at_the_monte_carlo_rate(f, loss):
    """With 64 times the samples, the error is an eighth, within a factor of two."""
    net, loss, *args = problem(Row(KFAC_NET, normal(8, 5)), loss)

    def second(v):
        return jnp.einsum("cn...,cn...->n...", v, v) if f is jp.ggn_root else v

    def flat(tree):
        return jnp.concatenate([second(leaf).ravel() for leaf in jax.tree.leaves(tree)])

    exact = run(lambda *args: flat(f(net, loss)(*args)), *args)

    def error(samples):
        def of(key):
            return jnp.sum((flat(f(net, loss, samples=samples)(*args, key=key)) - exact) ** 2)

        squares = [run(of, key) for key in jax.random.split(jax.random.key(0), 8)]
        return np.sqrt(np.mean(squares))

    ratio = error(4) / error(256)
    assert 4 <= ratio <= 16


def test_several_share_one_walk():
    """Dots in the compiled program: two more for the second moments, none for the norms."""
    net, loss, *args = problem(Row(jp.chain(jp.Dense(7), jp.Tanh(), jp.Dense(6)), normal(4, 5)))

    def dots(**asked):
        f = jax.jit(jp.quantities(net, loss, **asked))
        return f.lower(*args).compile().as_text().count(" dot(")

    alone = dots(grads=jp.Gradient())
    assert alone == 5  # two forward, one d_x (the net's own is unused), two for the weights
    assert dots(norms=jp.SqNorms()) == 3
    assert dots(grads=jp.Gradient(), norms=jp.SqNorms()) == alone
    assert dots(grads=jp.Gradient(), norms=jp.SqNorms(), moment=jp.SecondMoment()) == alone + 2
    assert dots(variance=jp.Variance(), grads=jp.Gradient()) == alone + 2
    clip = jax.jit(jp.clipped_grad(net, loss, 1.0)).lower(*args).compile().as_text()
    assert clip.count(" dot(") == alone


def test_each_source_is_walked_once():
    """Dots in the compiled program: a source costs its d_x once, for any number of quantities."""
    net, loss, *args = problem(Row(jp.chain(jp.Dense(7), jp.Tanh(), jp.Dense(6)), normal(4, 5)))

    def dots(**asked):
        f = jax.jit(lambda *args: jp.quantities(net, loss, **asked)(*args, key=jax.random.key(0)))
        return f.lower(*args).compile().as_text().count(" dot(")

    grads, clipped, kfac = jp.Gradient(), jp.Clipped(1.0), jp.KroneckerFactors(samples=1)
    assert dots(grads=grads) == dots(clipped=clipped) == 5
    assert dots(grads=grads, clipped=clipped) == 7  # the two weights once more
    assert dots(kfac=kfac) == 7  # two forward, one d_x, two Gram matrices for each weight
    assert dots(kfac=kfac, diagonal=jp.DiagGGN(samples=1)) == 9  # (x^2)^T (ct^2), twice
    assert dots(grads=grads, clipped=clipped, kfac=kfac) == 7 + 1 + 4


SHAPES = {
    "batch": st.integers(1, 5),
    "positions": st.lists(st.integers(1, 3), max_size=2),
    "i": st.integers(1, 9),
    "o": st.integers(1, 9),
}


@jax.jit
def both_ways(form, weights):
    """The answers to every question, by a form and by its per-example gradients."""
    return [
        (
            form.sum(),
            form.weighted_sum(weights),
            form.sq_norms(),
            form.norms(),
            form.inner_products(),
            form.second_moment(),
            form.each_of_squares(form.squares_of_each()),
        )
        for form in (form, jp.Stacked(form.per_example()))
    ]


@pytest.mark.parametrize("shape", [(3, 1), (3, 1, 1), (3, 4), (3, 0)])
def test_the_norm_of_zeros_is_0(shape):
    """The unit by which a norm is scaled is never 0, also if XLA takes a maximum over nothing."""
    zeros, one = np.zeros(shape), np.ones(shape)
    one[1:] = 0
    of_zeros, of_one, infinite = (run(norms, x) for x in (zeros, one, np.full(shape, np.inf)))
    np.testing.assert_array_equal(of_zeros, np.zeros(3))
    np.testing.assert_allclose(run(norms_of_all, [of_zeros, of_one]), of_one)
    assert np.all(np.isinf(infinite)) or 0 in shape


@given(**SHAPES)
def test_every_form_is_its_generic_rule(batch, positions, i, o):
    """Each fast path of a form, against the answer from its per-example gradients."""
    rng = np.random.default_rng(batch + i)
    x, ct = (rng.normal(size=(batch, *positions, d)) for d in (i, o))
    weights = rng.uniform(size=batch)
    for form in (jp.Outer(x, ct), jp.Sum(ct)):
        assert relative_error(*both_ways(form, weights)) <= 1e-10


def test_padding_weighs_nothing_in_any_quantity():
    """No quantity changes by a bit, whatever padded positions hold."""
    net, loss = jp.chain(jp.Dense(4), jp.Gelu(), jp.Dense(3)), jp.CrossEntropy()
    params, x = at(Row(net, normal(3, 5, 2)))
    target = np.array([[0, 1, 2, -1, -1], [2, -1, 0, 1, -1], [1, 1, 1, 1, 1]])
    other = np.where((target < 0)[..., None], 7.0, x)
    every = asked(3) | {"kflr": jp.KroneckerFactors()}
    every |= {"kfac": jp.KroneckerFactors(samples=1), "sampled": jp.DiagGGN(samples=1)}
    f = jax.jit(jp.quantities(net, loss, **every))
    got, expected = (f(params, x, target, key=jax.random.key(0)) for x in (x, other))
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.full
def test_an_example_that_is_all_padding_has_no_gradient():
    net, loss = KFAC_NET, jp.CrossEntropy()
    params, x = at(Row(net, normal(3, 5)))
    norms = jp.per_example_sq_norms(net, loss)(params, x, jnp.array([1, -1, 0]))
    assert norms[1] == 0
    assert norms[0] > 0
    _, grads = jp.clipped_grad(net, loss, 1.0)(params, x, jnp.array([-1, -1, -1]))
    assert all(np.all(leaf == 0) for leaf in jax.tree.leaves(grads))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(
    "name", ["per_example_grads", "per_example_sq_norms", "second_moment", "diag_ggn"]
)
def test_narrow_dtypes(name, dtype):
    net, loss, params, x, target = problem(Row(KFAC_NET, normal(4, 3, 5)))
    f = jax.jit(getattr(jp, name)(net, loss))
    narrow = jax.tree.map(lambda leaf: np.asarray(leaf).astype(dtype), (params, x))
    wide = jax.tree.map(lambda leaf: leaf.astype(np.float64), narrow)
    error = relative_error(f(*narrow, target), f(*wide, target))
    assert error <= {jnp.float32: 1e-4, jnp.bfloat16: 0.1}[dtype]


@pytest.mark.full
def test_noise_has_the_variance_that_accountants_assume():
    net, loss, *args = problem(Row(jp.chain(jp.Dense(40)), normal(5, 30)))
    _, clean = run(jp.clipped_grad(net, loss, 0.5), *args)
    for per_layer, layers in ((False, 1), (True, 1)):
        f = jax.jit(jp.clipped_grad(net, loss, 0.5, noise_multiplier=3.0, per_layer=per_layer))
        _, noisy = f(*args, key=jax.random.key(0))
        _, again = f(*args, key=jax.random.key(1))
        noise = np.ravel(noisy[0].w - clean[0].w)
        expected = 3.0 * 0.5 * layers**0.5 / 5
        assert abs(noise.std() / expected - 1) < 4 / np.sqrt(2 * noise.size)
        assert abs(noise.mean()) < 4 * expected / np.sqrt(noise.size)
        assert relative_error(noisy, again) > 0.1
    deep = jp.chain(jp.Dense(40), jp.Tanh(), jp.Dense(40))
    net, loss, *args = problem(Row(deep, normal(5, 30)))
    clean, noisy = (
        jp.clipped_grad(net, loss, 0.5, multiplier, per_layer=True)(*args, key=jax.random.key(0))[1]
        for multiplier in (0.0, 3.0)
    )
    noise = np.ravel(noisy[2].w - clean[2].w)
    assert abs(noise.std() / (3.0 * 0.5 * 2**0.5 / 5) - 1) < 4 / np.sqrt(2 * noise.size)


def test_clipped_grad_is_optax_s():
    """The same clipped mean as optax's DP aggregation, which would draw its noise differently."""
    from optax.contrib import differentially_private_aggregate

    net, loss, *args = problem(Row(KFAC_NET, normal(6, 5)))
    each = run(jp.per_example_grads(net, loss), *args)
    aggregate = differentially_private_aggregate(0.3, 0.0, 0)
    expected, _ = run(aggregate.update, each, aggregate.init(args[0]))
    _, got = run(jp.clipped_grad(net, loss, 0.3), *args)
    assert relative_error(got, expected) <= 1e-10


class Coupled(jp.Layer):
    """A layer that centres x over the batch."""

    batch_coupled = True

    def forward(self, params, x):
        return x - x.mean(0, keepdims=True), x

    def backward(self, params, x, ct):
        return (), ct - ct.mean(0, keepdims=True)


def test_a_batch_coupled_layer_raises_naming_itself():
    net, loss, *args = problem(Row(jp.chain(jp.Dense(3), Coupled(), jp.Dense(2)), normal(4, 5)))
    functions = [getattr(jp, name)(net, loss) for name in QUANTITIES]
    functions += [
        jp.clipped_grad(net, loss, 1.0),
        jp.diag_ggn(net, loss),
        jp.kronecker_factors(net, loss),
    ]
    functions += [jp.clipped_grad(net, loss, 1.0, two_pass=True), jp.ggn_root(net, loss)]
    for f in functions:
        with pytest.raises(ValueError, match=r"Coupled\(\) couples the examples of a batch"):
            run(f, *args)
    hand, auto = (
        run(jp.value_and_grad(net, loss), *args),
        run(jax.value_and_grad(jp.loss_fn(net, loss)), *args),
    )
    assert relative_error(hand, auto) <= 1e-12


def test_errors():
    net, loss, params, x, target = problem(Row(KFAC_NET, normal(4, 5)))
    for name in [*QUANTITIES, "diag_ggn", "kronecker_factors", "ggn_root"]:
        with pytest.raises(ValueError, match="the batch is empty"):
            run(getattr(jp, name)(net, loss), params, x[:0], target[:0])
    with pytest.raises(ValueError, match="the batch is empty"):
        run(jp.clipped_grad(net, loss, 1.0), params, x[:0], target[:0])
    for max_norm in (0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="max_norm must be positive"):
            jp.clipped_grad(net, loss, max_norm)
    with pytest.raises(ValueError, match="noise_multiplier must not be negative"):
        jp.clipped_grad(net, loss, 1.0, -1.0)
    with pytest.raises(ValueError, match="a noise_multiplier needs a key"):
        run(jp.clipped_grad(net, loss, 1.0, 1.0), params, x, target)
    with pytest.raises(ValueError, match="per_layer needs one pass"):
        jp.clipped_grad(net, loss, 1.0, per_layer=True, two_pass=True)
    with pytest.raises(ValueError, match="'value' is the name of the loss"):
        jp.quantities(net, loss, value=jp.Gradient())
    with pytest.raises(TypeError, match=r"norms is the class SqNorms; write SqNorms\(...\)"):
        jp.quantities(net, loss, norms=jp.SqNorms)
    plain, _, *args = problem(Row(Plain(3), normal(4, 5)))
    with pytest.raises(TypeError, match="Stacked has no Kronecker factors"):
        run(jp.kronecker_factors(plain, loss), *args)
    with pytest.raises(ValueError, match="samples is at least 1, not 0"):
        jp.diag_ggn(net, loss, samples=0)


def test_clipping_bounds_where_gram_matrices_cancel():
    """Two positions that cancel: in float32 <X X^T, C C^T> could be anything, even below 0."""
    big = 1e4 * np.random.default_rng(0).normal(size=(8, 64))
    x = np.stack([big, -big + 1], axis=1)
    form = jp.Outer(x.astype(np.float32), np.ones((8, 2, 64), np.float32))
    exact = jp.Outer(form.x.astype(np.float64), form.ct.astype(np.float64))
    assert relative_error(run(jp.Outer.norms, form), run(jp.Outer.norms, exact)) <= 1e-2
    assert np.all(run(jp.Outer.sq_norms, form) >= 0)


def test_norms_of_what_is_next_to_overflowing():
    """The reciprocal of a number above 8.5e37 is subnormal, and 0 in XLA."""
    x = np.array([[3e38, 0], [2e38, 2e38], [0, 0], [np.inf, 1], [np.nan, 1]], np.float32)
    want = [3e38, 2e38 * 2**0.5, 0, np.inf, np.nan]
    parts = {"a": np.abs(x[:, 0]), "b": np.abs(x[:, 1])}
    for got in (run(norms, x), run(norms_of_all, parts)):
        np.testing.assert_allclose(got, want, 1e-6)


@pytest.mark.parametrize("under", ["jit", "vmap", "repeat"])
def test_norms_and_inner_products_where_positions_cancel(under):
    """Rows of x that are equal to 1e-4, and cotangents of alternating signs: in float32 the terms
    of <X X^T, C C^T> are 1e7 times their sum."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(3, 1, 64)) + 1e-4 * rng.normal(size=(3, 4, 64))
    ct = rng.normal(size=(3, 1, 64)) * np.array([1, -1, 1, -1])[:, None]
    exact = jp.Outer(x, ct)
    form = jp.Outer(x.astype(np.float32), ct.astype(np.float32))

    def both(form):
        return form.sq_norms(), form.inner_products()

    def close(got, want):
        scale = np.sqrt(np.outer(want[0], want[0]))
        got = [np.asarray(each, float) for each in got]
        assert np.all(np.abs(got[0] - want[0]) <= 1e-2 * want[0])
        assert np.all(np.abs(got[1] - want[1]) <= 1e-2 * scale)

    want = jax.device_get(run(lambda exact: both(jp.Stacked(exact.per_example())), exact))
    stack = jax.tree.map(lambda leaf: np.stack([leaf, leaf]), form)
    if under == "jit":
        close(run(both, form), want)
    elif under == "vmap":
        close([leaf[1] for leaf in jax.device_get(run(jax.vmap(both), stack))], want)
    else:
        close(run(both, jp.Repeated(stack)), [2 * leaf for leaf in want])
    gradient = run(jax.grad(lambda ct: jp.Outer(form.x, ct).sq_norms().sum()), form.ct)
    assert np.isfinite(gradient).all()


def test_noise_is_refused_where_it_would_be_rounded_away():
    net, loss, params, x, target = problem(Row(KFAC_NET, normal(4, 5)))
    narrow = jax.tree.map(lambda leaf: np.asarray(leaf).astype(jnp.bfloat16), (params, x))
    with pytest.raises(TypeError, match="params of float32 or float64"):
        run(jp.clipped_grad(net, loss, 1.0, 1.0), *narrow, target, key=jax.random.key(0))
    f = jax.jit(jp.clipped_grad(net, loss, 0.1))
    wide = jax.tree.map(lambda leaf: leaf.astype(np.float64), narrow)
    assert relative_error(f(*narrow, target), f(*wide, target)) <= 0.1


def test_noise_differs_from_param_to_param():
    net, loss, *args = problem(Row(jp.chain(jp.Dense(6), jp.Dense(6)), normal(4, 6)))
    _, clean = run(jp.clipped_grad(net, loss, 1.0), *args)
    _, noisy = run(jp.clipped_grad(net, loss, 1.0, 1.0), *args, key=jax.random.key(0))
    noise = jax.tree.map(np.subtract, noisy, clean)
    assert abs(np.corrcoef(np.ravel(noise[0].w), np.ravel(noise[1].w))[0, 1]) < 0.6
    assert scipy.stats.kstest(np.ravel(noise[0].w) * 4, "norm").pvalue > 1e-3


def test_shard_map_agrees_with_value_and_grad():
    net, loss, *args = problem(Row(KFAC_NET, normal(8, 5)))
    mesh = jax.make_mesh((4,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    P = jax.sharding.PartitionSpec
    _, expected = run(jp.value_and_grad(net, loss), *args)
    for f in (
        lambda *args: jp.value_and_grad(net, loss)(*args)[1],
        lambda *args: jp.quantities(net, loss, it=jp.Gradient())(*args)["it"],
        lambda *args: jp.clipped_grad(net, loss, 1e6)(*args)[1],
        lambda *args: jp.clipped_grad(net, loss, 1e6, two_pass=True)(*args)[1],
        lambda *args: jp.clipped_grad(net, loss, 1e6, per_layer=True)(*args)[1],
    ):
        sharded = jax.shard_map(f, mesh=mesh, in_specs=(P(), P("d"), P("d")), out_specs=P())
        got = jax.tree.map(lambda g: np.asarray(g) / 4, jax.jit(sharded)(*args))
        assert relative_error(got, expected) <= 1e-12


class Short(jp.Layer):
    """A layer whose cotangent has another shape than its param."""

    def init(self, key, x):
        return jnp.ones(x.shape[-1], x.dtype)

    def forward(self, params, x):
        return x * params[None], x

    def backward(self, params, x, ct):
        return jp.Sum((ct * x)[:, :2]), ct * params[None]


def test_what_has_no_answer_raises():
    loss, x = jp.HalfSquaredError(), np.ones((2, 4))
    for f in (jp.per_example_sq_norms, jp.gram, jp.noise_scale):
        with pytest.raises(ValueError, match="the net has no params that are learned"):
            run(f(jp.chain(jp.Relu()), loss), ((),), x, x)
    for two_pass in (False, True):
        with pytest.raises(ValueError, match="the net has no params that are learned"):
            run(jp.clipped_grad(jp.chain(jp.Relu()), loss, 1.0, two_pass=two_pass), ((),), x, x)
    with pytest.raises(ValueError, match=r"d_params has shape \(2,\), but params has \(4,\)"):
        run(jp.per_example_sq_norms(Short(), loss), np.ones(4), x, x)
    net = jp.chain(jp.Dense(4))
    params, x = at(Row(net, x))
    with pytest.raises(TypeError, match="takes a key"):
        run(jp.diag_ggn(net, loss, samples=4), params, x, x)
    with pytest.raises(TypeError, match="takes a key"):
        run(jp.quantities(net, loss, it=jp.KroneckerFactors(samples=1)), params, x, x)


class Told(jp.Quantity):
    """The mean over examples of the result of the quantity before it."""

    quantity: jp.Quantity

    @property
    def before(self):
        return self.quantity

    def take(self, params, forms, examples, before=None):
        return jp.Total(jnp.mean(jax.tree.leaves(before)[0]))

    def finish(self, settled, examples):
        return jax.tree.leaves(settled)[0]


class OneColumn(jp.Quantity):
    """A quantity that neither stacks columns nor adds them up."""

    source = jp.quantity.HessianRoot()

    def take(self, params, forms, examples):
        return jp.Total(jnp.zeros(()))


def test_what_is_known_before_is_of_the_same_source_and_of_each_example():
    net, loss, *args = problem(Row(jp.chain(jp.Dense(3)), normal(4, 5)))
    with pytest.raises(ValueError, match=r"is told DiagGGN\(\) before, which has another source"):
        jp.quantities(net, loss, it=Told(jp.DiagGGN()))
    f = jp.quantities(net, loss, it=Told(jp.Gradient()), micro_batches=2)
    with pytest.raises(ValueError, match="is of the whole batch: a micro-batch does not know it"):
        run(f, *args)
    g = run(jp.quantities(net, loss, it=Told(jp.Gradient())), *args)["it"]
    _, expected = run(jp.value_and_grad(net, loss), *args)
    assert relative_error(g, np.mean(np.asarray(expected[0].w))) <= 1e-12
    with pytest.raises(TypeError, match="is of a source of 3 columns: it stacks what it takes"):
        run(jp.quantities(net, loss, it=OneColumn()), *args)


@pytest.mark.parametrize("bound", [-1.0, 0, float("nan"), jnp.float32(-1)])
def test_a_bound_is_positive_whatever_it_is_made_of(bound):
    net, loss = KFAC_NET, jp.CrossEntropy()
    for make in (
        lambda: jp.clipped_grad(net, loss, bound),
        lambda: jp.make_update(net, loss, optax.sgd(0.1), max_norm=bound),
    ):
        with pytest.raises(ValueError, match="max_norm must be positive, not"):
            make()


@pytest.mark.parametrize("bound", ["1", None, [1.0], jnp.ones(3), True])
def test_a_bound_is_a_number(bound):
    with pytest.raises(TypeError, match=r"max_norm is a number, not"):
        jp.clipped_grad(KFAC_NET, jp.CrossEntropy(), bound)
    with pytest.raises(TypeError, match="noise_multiplier is a number, not"):
        jp.clipped_grad(KFAC_NET, jp.CrossEntropy(), 1.0, bound)


def test_bounds_and_noise_may_be_traced():
    net, loss, *args = problem(Row(KFAC_NET, normal(4, 5)))
    key = jax.random.key(0)

    @jax.jit
    def f(bound, noise):
        return jp.clipped_grad(net, loss, bound, noise)(*args, key=key)

    expected = run(jp.clipped_grad(net, loss, 0.1, 0.5), *args, key=key)
    assert relative_error(f(0.1, 0.5), expected) <= 1e-12


@pytest.mark.full
@pytest.mark.few(1)
@pytest.mark.parametrize("size", [1e12, 1e-25])
def test_clipping_where_the_square_of_a_norm_is_no_number(size):
    """Finite gradients of 1e24, whose squares overflow, are clipped to the bound like any other."""
    net, loss = jp.chain(jp.Dense(3)), jp.HalfSquaredError()
    params = (jp.AffineParams(jnp.ones((5, 3), jnp.float32), jnp.zeros(3, jnp.float32)),)
    x, target = jnp.ones((1, 5), jnp.float32).at[0, 0].set(size), jnp.full((1, 3), 5.5, jnp.float32)
    for two_pass in (False, True):
        _, grads = jp.clipped_grad(net, loss, 1e-3, two_pass=two_pass)(params, x, target)
        assert abs(optax.tree.norm(grads) - 1e-3) <= 1e-8
    for fused, micro_batches in ((False, 1), (True, 1), (False, 2), (True, 2)):
        options = {"max_norm": 1e-3, "skip_nonfinite": True, "micro_batches": micro_batches}
        update = jp.make_update(net, loss, optax.sgd(1.0), fused=fused, **options)
        batch = (jnp.repeat(each, micro_batches, axis=0) for each in (x, target))
        start = jax.tree.map(jnp.copy, params)
        new, state, _ = update(start, update.init(start), *batch)
        assert state.skipped == 0
        step = optax.tree.norm(jax.tree.map(jnp.subtract, new, params))
        assert abs(step - 1e-3) <= 1e-6


def test_positions_have_the_factors_of_a_table_that_is_looked_up_in_order():
    x, target = normal(4, 3, 2), normal(4, 3, 2)
    ids = np.broadcast_to(np.arange(3), (4, 3))
    loss = jp.HalfSquaredError()
    table, _ = at(Row(jp.Positions(5), x))
    got = run(jp.kronecker_factors(jp.Positions(5), loss), table, x, target)
    looked_up = run(jp.kronecker_factors(jp.Embedding(5, 2), loss), table, ids, target)
    jax.tree.map(np.testing.assert_allclose, got, looked_up)
    added = jp.function(lambda table, x: x + table[None])
    of_function = run(jp.kronecker_factors(added, loss), table[:3], x, target)
    np.testing.assert_allclose(got.a, [1 / 3, 1 / 3, 1 / 3, 0, 0])
    np.testing.assert_allclose(of_function.a, got.a[:3])
    np.testing.assert_allclose(of_function.b, got.b)


@pytest.mark.full
def test_dead_units_and_confident_examples_count_in_kronecker_factors():
    """Only the target marks padding; a cotangent of 0 counts like any other."""
    net, loss = jp.chain(jp.Dense(4), jp.Relu(), jp.Dense(3)), jp.CrossEntropy()
    params, x = at(Row(net, normal(6, 5)))
    params = (params[0]._replace(b=jnp.array([-99.0, 0, 0, 0])), *params[1:])
    params = (*params[:2], params[2]._replace(w=params[2].w * 1e4))
    target = jnp.array([0, 1, 2, -1, 0, 1])
    real = x[target >= 0]
    for samples in (None, 1):
        f = jp.quantities(net, loss, it=jp.KroneckerFactors(samples))
        factors = f(params, x, target, key=jax.random.key(0))["it"]
        assert relative_error(factors[0].w.a, real.T @ real / 5) <= 1e-12


@pytest.mark.full
def test_curvature_under_shard_map():
    """Each device gets the result for its own examples, as for every quantity."""
    net, loss, params, x, target = problem(Row(KFAC_NET, normal(4, 2, 5)), jp.CrossEntropy())
    asked = {"kfac": jp.KroneckerFactors(), "diagonal": jp.DiagGGN(), "root": jp.GGNRoot()}
    asked |= {"moment": jp.SecondMoment(), "variance": jp.Variance(), "norms": jp.SqNorms()}
    f = jp.quantities(net, loss, **asked)
    mesh = jax.make_mesh((2,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    over, whole = jax.sharding.PartitionSpec("d"), jax.sharding.PartitionSpec()

    def own(params, x, target):
        return jax.tree.map(lambda leaf: leaf[None], f(params, x, target))

    sharded = jax.shard_map(own, mesh=mesh, in_specs=(whole, over, over), out_specs=over)
    got = jax.jit(sharded)(params, x, target)
    for device in range(2):
        part = slice(2 * device, 2 * device + 2)
        expected = f(params, x[part], target[part])
        mine = jax.tree.map(lambda leaf, device=device: leaf[device], got)
        assert relative_error(mine, expected) <= 1e-12


def test_the_bound_from_products_is_the_norm_or_is_not_taken():
    """|X^T C| of 3 examples with few positions: by Gram products, unless one is unsound."""
    rng = np.random.default_rng(0)
    plain = [rng.normal(size=(3, 4, features)) for features in (64, 32)]
    alternating = (
        np.ones((3, 4, 64)),
        np.tile([[[1.0], [-1.0]]], (3, 2, 32)) * (1 + 1e-4 * plain[1]),
    )
    of_padding = plain[0], plain[1] * np.array([1.0, 0, 1])[:, None, None]
    cases = {
        "products": plain,
        "they cancel": alternating,
        "they overflow": (plain[0] * 1e15, plain[1] * 1e15),
        "they underflow": (plain[0] * 1e-15, plain[1] * 1e-15),
        "an example of zeros": of_padding,
    }
    norms_of_form = jax.jit(jp.Outer.norms)
    for name, (x, ct) in cases.items():
        form = jp.Outer(x.astype(np.float32), ct.astype(np.float32))
        wide = [np.asarray(a, np.float64) for a in (form.x, form.ct)]
        want = np.linalg.norm(np.einsum("nti,nto->nio", *wide), axis=(1, 2))
        rtol = 1e-4 if name == "they cancel" else 1e-5  # what float32 leaves of X^T C itself
        assert np.all(np.abs(np.asarray(norms_of_form(form)) - want) <= rtol * want), name


STEADY = {
    "dense": (jp.chain(jp.Dense(2)), (64, 3)),
    "sequence": (jp.chain(jp.Dense(2)), (64, 2, 3)),
    "convolution": (jp.chain(jp.Conv(2, (2, 2)), jp.Flatten(), jp.Dense(2)), (64, 3, 3, 1)),
    "repeat": (jp.chain(jp.repeat(jp.Dense(3), 2), jp.Dense(2)), (64, 3)),
    "function": (jp.function(lambda w, x: x @ w["w"] + jnp.sum(w["v"] ** 2)), (64, 3)),
}


@pytest.mark.full
@pytest.mark.parametrize("name", STEADY)
@pytest.mark.parametrize("parts", [1, 4])
def test_small_deviations_from_a_large_mean_are_not_lost(name, parts):
    """Deviations of 1e-4 of the mean, whose squares are below the rounding of the mean's square."""
    net, shape = STEADY[name]
    rng = np.random.default_rng(0)
    x = 1 + 1e-4 * rng.normal(size=shape)
    loss = jp.HalfSquaredError()
    if name == "function":
        params = {"w": rng.normal(size=(3, 2)), "v": rng.normal(size=3)}
    else:
        params = net.init(jax.random.key(0), jnp.asarray(x))
    y = jax.eval_shape(net, params, jnp.asarray(x))
    target = np.full(y.shape, -5.0)
    wide = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), (params, x, target))
    exact = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), wide)
    variance, noise = jp.variance(net, loss), jp.noise_scale(net, loss)
    each = jp.per_example_grads(net, loss)(*exact)
    want = jax.tree.map(lambda g: jnp.var(g, axis=0), each)
    trace = sum(leaf.sum() for leaf in jax.tree.leaves(want)) * 64 / 63
    square = sum((leaf.mean(0) ** 2).sum() for leaf in jax.tree.leaves(each)) - trace / 64
    rounding = 2e-6 if parts > 1 else 0.0  # of the mean's square, between micro-batches
    got = jax.jit(jp.variance(net, loss, micro_batches=parts))(*wide)
    for a, b, g in zip(*map(jax.tree.leaves, (got, want, each)), strict=True):
        largest = float(jnp.max(b) * 0.02 + rounding * jnp.max(g.mean(0) ** 2))
        np.testing.assert_allclose(a, b, rtol=0.02, atol=largest)
    got = jax.jit(jp.noise_scale(net, loss, micro_batches=parts))(*wide)
    np.testing.assert_allclose(got, trace / square, rtol=0.02, atol=rounding)
    for f, each in ((variance, want), (noise, trace / square)):
        relative_error(f(*exact), each)
        assert relative_error(f(*exact), each) <= 1e-6


@pytest.mark.full
def test_parts_of_the_noise_scale_add_up():
    net = jp.chain(jp.repeat(jp.skip(jp.chain(jp.Dense(4), jp.Tanh())), 3), jp.Dense(2))
    params, x = at(Row(net, normal(6, 4)))
    loss, target = jp.HalfSquaredError(), normal(6, 2)
    f = jp.quantities(
        net,
        loss,
        ratio=jp.NoiseScale(),
        whole=jp.NoiseScale(parts=True),
        each=jp.NoiseScale(per_param=True),
    )
    got = f(params, x, target)
    trace, square = got["whole"]
    assert relative_error(got["ratio"], trace / square) <= 1e-12
    each = jax.tree.leaves(
        got["each"], is_leaf=lambda node: isinstance(node, jp.quantity.NoiseParts)
    )
    assert relative_error(sum(one.trace.sum() for one in each), trace) <= 1e-12
    assert relative_error(sum(one.square.sum() for one in each), square) <= 1e-12
    assert got["each"][0][0].w.trace.shape == (3,)
    grads = jp.per_example_grads(net, loss)(params, x, target)
    of_first = jnp.var(grads[0][0].w[:, 0], axis=0, ddof=1).sum()
    assert relative_error(got["each"][0][0].w.trace[0], of_first) <= 1e-12
    micro = jp.quantities(net, loss, micro_batches=3, each=jp.NoiseScale(per_param=True))
    assert relative_error(micro(params, x, target)["each"], got["each"]) <= 1e-10
