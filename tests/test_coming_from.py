"""The claims of examples/coming_from.md on other libraries: each row against their definition.

Their packages are not needed. Each function here computes, in plain JAX, what theirs returns by its
documentation; the page's expressions are run, and have to give the same.
"""

import math
import operator
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

import jaxprop as jp
from jaxprop.core.forms import Kronecker

PAGE = (Path(__file__).parent.parent / "examples" / "coming_from.md").read_text()
ROWS = {
    theirs: (ours, claim)
    for theirs, ours, claim in re.findall(r"^\| (.*?) \| `(jp.*|\(jax.*)` \| (.*?) \|$", PAGE, re.M)
}
N, D, T, B, C, NOISE, SAMPLES = 6, 3, 4, 5, 1.35, 1.5, 2000
THEIRS = {}

NET, BARE = (
    jp.chain(jp.Dense(40, bias=bias), jp.Tanh(), jp.Dense(D, bias=bias)) for bias in (True, False)
)
LOSS, KEY = jp.CrossEntropy(), jax.random.key(0)
KEYS = jax.random.split(jax.random.key(1), 7)
X, Y = jax.random.normal(KEYS[0], (N, 30)), jax.random.normal(KEYS[1], (N, D))
X = X * jnp.array([0.05, 1, 0.1, 2, 0.05, 1])[:, None]  # some gradients are clipped, some are not
SEQ, SEQ_Y = jax.random.normal(KEYS[2], (N, T, 30)), jax.random.normal(KEYS[3], (N, T, D))
TARGET = jax.random.randint(KEYS[4], (N,), 0, D)
PARAMS, BARE_PARAMS = NET.init(KEYS[5], X), BARE.init(KEYS[6], X)
PADDING = jnp.array([False, False, True, False, True, False])
X_NAN = X.at[1, 2].set(jnp.nan)


def fun_with_aux(params, batch):
    """A mean loss with an aux, in the signature of jax-privacy."""
    x, target = batch
    logits = forward(params, x)[0]
    values = optax.softmax_cross_entropy_with_integer_labels(logits, target)
    return values.mean(), {"right": (logits.argmax(-1) == target).mean()}


NAMES = {
    "fun_with_aux": fun_with_aux,
    "first": jp.loss(operator.itemgetter(0)),
    "jp": jp,
    "jax": jax,
    "jnp": jnp,
    "net": NET,
    "loss": LOSS,
    "params": PARAMS,
    "x": X,
    "y": Y,
    "target": TARGET,
    "batch": (PARAMS, X, TARGET),
    "key": KEY,
    "padding": PADDING,
    "real": ~PADDING,
    "x_nan": X_NAN,
    "seq": SEQ,
    "seq_y": SEQ_Y,
    "mc_samples": SAMPLES,
    "noise": NOISE,
    "N": N,
    "D": D,
    "T": T,
    "B": B,
    "C": C,
}


def row(theirs, net=NET, params=PARAMS):
    """Register a row's oracle: a function without arguments, or a check of what is claimed."""

    def named(function):
        assert theirs not in THEIRS
        THEIRS[theirs] = function, NAMES | {"net": net, "batch": (params, X, TARGET)}
        return function

    return named


def forward(params, x):
    """The network in plain JAX, and the input of its last layer."""

    def dense(layer, x):
        return x @ layer.w if layer.b is None else x @ layer.w + layer.b

    first, _, last = params
    with jax.numpy_rank_promotion("allow"):
        hidden = jnp.tanh(dense(first, x))
        return dense(last, hidden), hidden


def example_loss(params, x, target):
    return optax.softmax_cross_entropy_with_integer_labels(forward(params, x)[0], target)


def each(params=PARAMS, x=X):
    """Each example's own gradient, in plain JAX."""
    return jax.vmap(jax.grad(example_loss), (None, 0, 0))(params, x, TARGET)


def norms(grads):
    return jax.vmap(optax.tree.norm)(grads)


def summed(grads, factors):
    return jax.tree.map(lambda g: jnp.tensordot(factors, g, 1), grads)


def clipped_sum(grads, real=True):
    """The sum of the gradients of real examples, each scaled down to a norm of C."""
    return summed(grads, jnp.where(real, jnp.minimum(1, C / norms(grads)), 0))


def roots(params, x):
    """S_n^T J_n of each example, (C, N, ...), with the cross-entropy's Hessian H_n = S_n S_n^T."""

    def one(x):
        p = jax.nn.softmax(forward(params, x)[0])
        root = jnp.sqrt(p)[:, None] * (jnp.eye(D) - p[None])  # a row for each class
        jacobian = jax.jacrev(lambda params: forward(params, x)[0])(params)
        return jax.tree.map(lambda j: jnp.tensordot(root, j, 1), jacobian)

    return jax.tree.map(lambda v: jnp.moveaxis(v, 1, 0), jax.vmap(one)(x))


def close(got, expected, rtol=1e-10):
    got, expected = (jax.tree.leaves(tree) for tree in (got, expected))
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol * float(jnp.max(jnp.abs(b))))


def deviates(noisy, clean, deviation):
    """Assert that the noise has this standard deviation, over some 1300 entries."""
    difference = jax.tree.map(lambda a, b: np.ravel(a - b), noisy, clean)
    noise = np.concatenate(jax.tree.leaves(difference))
    assert len(noise) > 1200
    assert np.std(noise) == pytest.approx(deviation, rel=0.06)
    assert abs(np.mean(noise)) < 4 * deviation / math.sqrt(len(noise))


@row("`p.grad_sample`")
def grad_sample():
    return each()


@row("`p.summed_grad`")
def summed_grad(claimed):
    grads = each()
    theirs = summed(grads, jnp.minimum(1, C / (norms(grads) + 1e-6)))
    close(claimed, theirs, rtol=3e-6)
    with pytest.raises(AssertionError):
        close(claimed, theirs, rtol=1e-8)


@row("`p.grad`")
def grad_with_noise(claimed):
    deviates(claimed, jax.tree.map(lambda g: g / N, clipped_sum(each())), NOISE * C / N)


@row("`poisson_sampling=True`")
def poisson():
    return jax.tree.map(lambda g: g / B, clipped_sum(each(), ~PADDING))


def bounded_one_by_one():
    """Each param's gradients bounded by C, and summed."""
    of_param = [clipped_sum([g])[0] for g in jax.tree.leaves(each(BARE_PARAMS))]
    return jax.tree.unflatten(jax.tree.structure(BARE_PARAMS), of_param)


@row('`clipping="per_layer", max_grad_norm=[C, …]`', BARE, BARE_PARAMS)
def per_layer():
    return bounded_one_by_one()


@row('`clipping="per_layer"`, its noise', BARE, BARE_PARAMS)
def per_layer_noise(claimed):
    whole = math.sqrt(C**2 + C**2)  # the norm of max_grad_norm
    clean = jax.tree.map(lambda g: g / N, bounded_one_by_one())
    deviates(claimed, clean, NOISE * whole / N)


@row("`max_physical_batch_size=2`")
def physical():
    return jax.tree.map(lambda g: g / N, clipped_sum(each()))


def over_n():
    """[g_1 / N, …, g_N / N]: the per-example gradients of a mean loss, as BackPACK has them."""
    return jax.tree.map(lambda g: g / N, each())


@row("`BatchGrad()`, `p.grad_batch`")
def grad_batch():
    return over_n()


@row("`BatchL2Grad()`, `p.batch_l2`")
def batch_l2(claimed):
    of_params = [jnp.sum(g**2, range(1, g.ndim)) for g in jax.tree.leaves(over_n())]
    close(claimed, sum(of_params))
    of_layers = jp.per_example_sq_norms(NET, LOSS, per_layer=True)(PARAMS, X, TARGET)
    close(of_layers[0] / N**2, of_params[0] + of_params[1])


@row("`SumGradSquared()`, `p.sum_grad_squared`")
def sum_grad_squared():
    return jax.tree.map(lambda g: jnp.sum(g**2, 0), over_n())


@row("`Variance()`, `p.variance`")
def variance():
    return jax.tree.map(lambda g: jnp.var(g, 0), over_n())


def diag_ggn():
    """The diagonal of the GGN of the mean loss."""
    return jax.tree.map(lambda v: jnp.sum(v**2, (0, 1)) / N, roots(PARAMS, X))


@row("`DiagGGNExact()`, `p.diag_ggn_exact`")
def diag_ggn_exact():
    return diag_ggn()


@row("`DiagGGNMC(mc_samples)`, `p.diag_ggn_mc`")
def diag_ggn_mc(claimed):
    for a, b in zip(*map(jax.tree.leaves, (claimed, diag_ggn())), strict=True):
        assert jnp.linalg.norm(a - b) < 0.1 * jnp.linalg.norm(b)
    with pytest.raises(AssertionError):
        close(claimed, diag_ggn())


@row("`BatchDiagGGNExact()`, `p.diag_ggn_exact_batch`")
def diag_ggn_batch():
    return jax.tree.map(lambda v: jnp.sum(v**2, 0) / N, roots(PARAMS, X))


def diag_hessian():
    """The diagonal of each example's own Hessian by ``jax.hessian``."""

    def own(params, x, target):
        flat, back = ravel_pytree(params)
        hessian = jax.hessian(lambda flat: example_loss(back(flat), x, target))(flat)
        return back(jnp.diagonal(hessian))

    return jax.vmap(own, (None, 0, 0))(PARAMS, X, TARGET)


@row("`DiagHessian()`, `p.diag_h`")
def diag_h():
    return jax.tree.map(lambda d: jnp.mean(d, 0), diag_hessian())


@row("`BatchDiagHessian()`, `p.diag_h_batch`")
def diag_h_batch():
    return jax.tree.map(lambda d: d / N, diag_hessian())


@row("`SqrtGGNExact()`, `p.sqrt_ggn_exact`")
def sqrt_ggn(claimed):
    def ggn(root):
        flat = jnp.reshape(root, (D * N, -1))
        return flat.T @ flat

    right = jax.tree.map(lambda v: v / math.sqrt(N), roots(PARAMS, X))
    for a, b in zip(*map(jax.tree.leaves, (claimed[2], right[2])), strict=True):
        assert a.shape == b.shape
        close(ggn(a), ggn(b))


def of_outputs(params, x, rows):
    """Σ ct ct^T / N at each layer's output, from cotangents (…, N, C) at the last."""
    (_, _), _, (w2, _) = params
    slope = 1 - forward(params, x)[1] ** 2
    before = jnp.einsum("cno,ho,nh->cnh", rows, w2, slope)
    return [jnp.einsum("cni,cnj->ij", ct, ct) / N for ct in (before, rows)]


def softmax_rows():
    p = jax.nn.softmax(forward(PARAMS, X)[0])
    return jnp.moveaxis(jnp.sqrt(p)[:, :, None] * (jnp.eye(D)[None] - p[:, None]), 1, 0)


def factors(rows):
    """kfac-jax's (A, B) for each dense layer; A includes the ones that the bias multiplies."""
    ones = jnp.ones((N, 1))
    inputs = [jnp.concatenate([a, ones], 1) for a in (X, forward(PARAMS, X)[1])]
    return list(zip([a.T @ a / N for a in inputs], of_outputs(PARAMS, X, rows), strict=True))


@row("`KFLR()`, `p.kflr`")
def kflr(claimed):
    for layer, (a, b) in zip(claimed[::2], factors(softmax_rows()), strict=True):
        close(layer.w, [b, a[:-1, :-1]])
        close(layer.b[0], b)


def sampled(claimed, order):
    """Compare sampled Kronecker factors with the exact ones."""
    for layer, (a, b) in zip(claimed[::2], factors(softmax_rows()), strict=True):
        got = dict(zip(order, layer.w, strict=True))
        close(got["a"], a[:-1, :-1])
        assert jnp.linalg.norm(got["b"] - b) < 0.1 * jnp.linalg.norm(b)
        assert not jnp.allclose(got["b"], b)


@row("`KFAC(mc_samples)`, `p.kfac`")
def kfac(claimed):
    sampled(claimed, "ba")


@row("`MSELoss()`, a gradient")
def mse():
    return jax.value_and_grad(lambda params: jnp.mean((forward(params, X)[0] - Y) ** 2))(PARAMS)


@row("`clipped_grad(fun, l2_clip_norm=C)`")
def privacy_sum():
    return clipped_sum(each())


@row("`normalize_by=B`")
def normalized():
    return jax.tree.map(lambda g: g / B, clipped_sum(each()))


@row("`rescale_to_unit_norm=True`")
def rescaled():
    return jax.tree.map(lambda g: g / C, clipped_sum(each()))


@row("`return_grad_norms=True`, `aux.grad_norms`")
def grad_norms():
    return norms(each())


@row("`return_values=True`, `aux.values`")
def values():
    return jnp.mean(jax.vmap(example_loss, (None, 0, 0))(PARAMS, X, TARGET))


def zeroed(grads):
    """The gradients after what ``nan_safe`` does before clipping."""
    return jax.tree.map(lambda g: jnp.nan_to_num(g, nan=0.0, posinf=0.0, neginf=0.0), grads)


@row("`has_aux=True`, `aux.aux`")
def with_aux():
    return {"right": (forward(PARAMS, X)[0].argmax(-1) == TARGET).astype(X.dtype)}


@row("`nan_safe=True` (the default)")
def nan_safe():
    return clipped_sum(zeroed(each(x=X_NAN)))


@row("`is_padding_example=padding`")
def padding():
    return clipped_sum(each(), ~PADDING)


@row("`gaussian_privatizer(stddev=noise * grad_fn.sensitivity())`")
def privatizer(claimed):
    deviates(claimed, clipped_sum(each()), NOISE * C)


@row("`microbatch_size=2`")
def microbatch():
    return clipped_sum(each())


@row("`register_squared_error_loss(prediction, y)`")
def squared_error():
    def loss(params):
        return jnp.sum((forward(params, X)[0] - Y) ** 2) / N

    return jax.value_and_grad(loss)(PARAMS)


@row("`register_softmax_cross_entropy_loss(logits, target)`")
def softmax_cross_entropy():
    def loss(params):
        logits = forward(params, X)[0]
        return optax.softmax_cross_entropy_with_integer_labels(logits, TARGET).sum() / N

    return jax.value_and_grad(loss)(PARAMS)


def exact(claimed, rows):
    for layer, (a, b) in zip(claimed[::2], factors(rows), strict=True):
        close(layer.w, [a[:-1, :-1], b])
        close(layer.b, [a[-1:, -1:], b])


@row('`estimation_mode="fisher_exact"`, of a weight')
def fisher_exact(claimed):
    exact(claimed, softmax_rows())


@row('`estimation_mode="fisher_gradients"`')
def fisher_gradients(claimed):
    sampled(claimed, "ab")


@row('`estimation_mode="fisher_empirical"`')
def fisher_empirical(claimed):
    logits = forward(PARAMS, X)[0]
    exact(claimed, (jax.nn.softmax(logits) - jax.nn.one_hot(TARGET, D, dtype=X.dtype))[None])


@row("a weight's block, along T positions")
def along_positions(claimed):
    x, hidden = SEQ, forward(PARAMS, SEQ)[1]
    rows = jnp.broadcast_to(jnp.eye(D)[:, None, None], (D, N, T, D))  # the Hessian is the identity
    w2 = PARAMS[2].w
    before = jnp.einsum("cnto,ho,nth->cnth", rows, w2, 1 - hidden**2)
    for layer, inputs, ct in ((claimed[0], x, before), (claimed[2], hidden, rows)):
        a = jnp.einsum("nti,ntj->ij", inputs, inputs) / N
        b = jnp.einsum("cnti,cntj->ij", ct, ct) / N
        close(layer.w, jnp.kron(a / T, b))


@pytest.mark.few(2)
@pytest.mark.parametrize("theirs", ROWS)
def test_theirs_is_what_the_page_says(theirs):
    function, names = THEIRS[theirs]
    code, claim = ROWS[theirs]
    claim = claim.removeprefix("their mean is ")
    said = re.match(r"`(.*?)`", claim).group(1)
    ours = eval(code, names)
    claimed = jax.tree.map(
        lambda ours: eval(said, names | {"ours": ours}),
        ours,
        is_leaf=lambda node: isinstance(node, Kronecker),
    )
    if function.__code__.co_argcount:
        function(claimed)
    else:
        close(claimed, function())


def test_every_row_of_the_page_is_tested():
    lines = [line for line in PAGE.splitlines() if re.match(r"\| [^t-]|\| t(?!heirs)", line)]
    assert len(lines) == len(ROWS)
    assert list(ROWS) == list(THEIRS)


def test_gradients_that_are_clipped_and_that_are_not():
    """Otherwise the rows on clipping would also pass without it, or with any bound."""
    for grads in (each(), *([g] for g in jax.tree.leaves(each(BARE_PARAMS)))):
        assert 0 < (norms(grads) > C).sum() < N


@pytest.mark.full
def test_a_gradient_that_is_nan_in_part_is_dropped_whole():
    """In contrast, jax-privacy's ``nan_safe`` keeps its finite entries."""

    def model(params, x):
        return params["a"] * x[:, 0] + jnp.sqrt(params["b"] * x[:, 1])

    params, x = {"a": jnp.ones(()), "b": jnp.ones(())}, jnp.array([[1.0, 1.0], [1.0, 0.0]])

    def loss(params, x):
        return model(params, x[None]).sum()

    grads = jax.vmap(jax.grad(loss), (None, 0))(params, x)
    assert jnp.isnan(grads["b"][1]).all()
    assert jnp.isfinite(grads["a"]).all()
    _, ours = jp.clipped_grad(jp.function(model), jp.Mean(), C, drop_nonfinite=True)(params, x)
    first = jax.tree.map(lambda g: g[:1], grads)
    close(jax.tree.map(lambda g: 2 * g, ours), clipped_sum(first))
    theirs = clipped_sum(zeroed(grads))
    assert theirs["a"] > 1.5 * 2 * ours["a"]


@pytest.mark.full
def test_a_loss_of_jax_privacy_s_signature_is_taken_as_it_is():
    def fun(params, batch):
        x, target = batch
        return jax.vmap(example_loss, (None, 0, 0))(params, x, target).mean()

    got = jp.clipped_grad(jp.function(fun), jp.Mean(), C)(PARAMS, (X, TARGET))[1]
    close(jax.tree.map(lambda g: N * g, got), clipped_sum(each()))
