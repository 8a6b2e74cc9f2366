"""Losses against autodiff of their own forward, and against optax's definitions."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from table import LOSSES, Row, at, normal, relative_error

import jaxprop as jp
from jaxprop.losses import cross_entropy
from jaxprop.losses.total import TotalLoss

rows = pytest.mark.parametrize(
    ("loss", "y", "target"), LOSSES, ids=[f"{row[0]} on {row[1].shape}" for row in LOSSES]
)


def reference(loss, y, target):
    """One value for each example, by optax's functions."""
    target, weights = target if isinstance(target, tuple) else (target, None)
    axes = tuple(range(1, y.ndim))
    if isinstance(loss, jp.HalfSquaredError):
        return (optax.l2_loss(y, target) * (1 if weights is None else weights)).sum(axes)
    if isinstance(loss, jp.BinaryCrossEntropy):
        t = target.astype(y.dtype)
        factor = loss.positive_weight
        one, other = (optax.sigmoid_binary_cross_entropy(y, jnp.full_like(y, c)) for c in (1, 0))
        return averaged(factor * t * one + (1 - t) * other, weights, axes)
    real = jnp.ones(y.shape[:-1], y.dtype)
    if jnp.issubdtype(target.dtype, jnp.integer):
        real = (target >= 0).astype(y.dtype)
        target = jax.nn.one_hot(jnp.maximum(target, 0), y.shape[-1], dtype=y.dtype)
    q = optax.smooth_labels(target, loss.label_smoothing)
    if loss.class_weights:
        q = q * jnp.broadcast_to(jnp.array(loss.class_weights), q.shape)
    each = optax.softmax_cross_entropy(y, q)
    return averaged(each, real if weights is None else real * weights, axes[:-1])


def averaged(values, weights, axes):
    """The weighted mean; 0 if all weights are 0."""
    weights = jnp.ones_like(values) if weights is None else weights
    total = weights.sum(axes)
    return (weights * values).sum(axes) / jnp.where(total == 0, 1, total)


def parts(loss, y, target):
    """The values of a loss, its cotangent and a root of its Hessian."""
    values, residuals = loss.forward(y, target)
    return values, loss.backward(residuals), loss.hessian_root(residuals)


in_one_program = jax.jit(parts, static_argnums=0)


@pytest.mark.few(5)
@rows
def test_values(loss, y, target):
    y, target = jax.device_put((y, target))

    @jax.jit
    def both(y):
        return loss.forward(y, target)[0], reference(loss, y, target)

    assert relative_error(*both(y)) <= 1e-12


@pytest.mark.few(10)
@rows
def test_backward_is_each_example_s_own_gradient(loss, y, target):
    y, target = jax.device_put((y, target))

    @jax.jit
    def cotangents(y):
        _, residuals = loss.forward(y, target)
        by_jax = jax.grad(lambda y: loss.forward(y, target)[0].sum())(y)
        by_reference = jax.grad(lambda y: reference(loss, y, target).sum())(y)
        return loss.backward(residuals), by_jax, by_reference

    ct, *expected = cotangents(y)
    for each in expected:
        assert relative_error(ct, each) <= 1e-12


@pytest.mark.few(1)
@rows
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_narrow_dtypes(loss, y, target, dtype):
    y, target = jnp.asarray(y, dtype), jax.tree.map(jnp.asarray, target)
    values, residuals = loss.forward(y, target)
    ct = loss.backward(residuals)
    assert values.dtype == jnp.float32
    assert ct.dtype == jnp.float32
    wide_values, wide_residuals = loss.forward(y.astype(jnp.float64), target)
    rtol = {jnp.float32: 2e-5, jnp.bfloat16: 0.02}[dtype]
    assert relative_error(values, wide_values) <= rtol
    assert relative_error(ct, loss.backward(wide_residuals)) <= rtol


@pytest.mark.full
@rows
def test_check_loss(loss, y, target):
    jp.check_loss(loss, y / max(1, np.abs(y).max() / 3), target)  # so that every class gets drawn


def test_padding_weighs_nothing():
    """A target of -1 changes neither the value nor the cotangent of any other position."""
    loss = jp.CrossEntropy()
    y, target = normal(2, 3, 4), np.array([[1, 3, -1], [0, 2, -1]])
    values, expected, _ = in_one_program(loss, y[:, :2], target[:, :2])
    padded, ct, _ = jax.device_get(in_one_program(loss, y, target))
    np.testing.assert_allclose(padded, values, rtol=1e-14)
    np.testing.assert_allclose(ct[:, :2], expected, rtol=1e-14)
    np.testing.assert_array_equal(ct[:, 2], 0)


def test_cross_entropy_of_extreme_logits_is_finite():
    y = np.array([[1e4, -1e4, 0.0], [-1e300, 0.0, 1e300]])
    values, ct, _ = in_one_program(jp.CrossEntropy(), y, np.array([1, 2]))
    np.testing.assert_array_equal(values, [2e4, 0])
    np.testing.assert_array_equal(np.asarray(ct)[1], 0)


@pytest.mark.parametrize(
    ("loss", "y", "target"),
    [
        (jp.CrossEntropy(), np.zeros((2, 3)), np.array([3, 1])),
        (jp.BinaryCrossEntropy(), np.zeros((2, 1)), np.array([[2], [1]])),
        (jp.BinaryCrossEntropy(), np.zeros((2, 1)), np.array([[-1.0], [0.5]])),
        (jp.CrossEntropy(0.1), np.zeros((2, 3)), np.array([3, 1])),
        (jp.CrossEntropy(class_weights=(1.0, 2.0, 3.0)), np.zeros((2, 3)), np.array([3, 1])),
        (jp.CrossEntropy(), np.zeros((2, 2)), np.array([[3, -2.0], [0.5, 0.5]])),
    ],
)
def test_a_target_that_does_not_exist_is_refused_or_shows_in_everything(loss, y, target):
    y, target = jax.device_put((y, target))
    with pytest.raises(ValueError, match=r"takes (a target|probabilities) .*, not (3|2|-1|\[ 3)"):
        loss.forward(y, target)
    values, ct, _ = jax.device_get(in_one_program(loss, y, target))
    assert np.isnan(values).tolist() == [True, False]
    assert np.isnan(ct[0]).all()
    assert np.isfinite(ct[1]).all()


def exactly(y, target):
    """Cross-entropy and its cotangent in extended precision, from sums without cancellation."""
    y = np.asarray(y, np.longdouble)
    powers = np.exp(y - y.max())
    others = np.delete(powers, target).sum()
    ct = powers / powers.sum()
    ct[target] = -others / powers.sum()
    return np.log1p(np.delete(np.exp(y - y[target]), target).sum()), ct


@pytest.mark.parametrize("target", [0, 1, 2])
@pytest.mark.parametrize("y", [[20, 0, 1], [-20, 3, 4], [50, 0, 1], [5, -5, 3], [0, 0, 0]], ids=str)
def test_cross_entropy_is_right_however_certain(y, target):
    args = np.array([y], np.float32), np.array([target])
    values, got, root = jax.device_get(in_one_program(jp.CrossEntropy(), *args))
    value, ct = exactly(y, target)
    np.testing.assert_allclose(values[0], float(value), rtol=1e-6)
    np.testing.assert_allclose(got[0], ct.astype(float), rtol=1e-6)
    root = root[:, 0].astype(float)
    p = np.exp(np.asarray(y, float) - max(y))
    p /= p.sum()
    hessian = -np.outer(p, p)
    hessian[np.diag_indices(3)] = [p[i] * np.delete(p, i).sum() for i in range(3)]
    np.testing.assert_allclose(root.T @ root, hessian, rtol=1e-5)


@pytest.mark.parametrize("target", [0.0, 1.0, 0.25])
@pytest.mark.parametrize("y", [5.0, 15.0, 60.0, -20.0])
def test_binary_cross_entropy_is_right_however_certain(y, target):
    z, t = np.longdouble(y), np.longdouble(target)
    args = np.float32([[y]]), np.float32([[target]])
    values, got, root = jax.device_get(in_one_program(jp.BinaryCrossEntropy(), *args))
    value = (1 - t) * np.logaddexp(0, z) + t * np.logaddexp(0, -z)
    ct = (1 - t) / (1 + np.exp(-z)) - t / (1 + np.exp(z))
    np.testing.assert_allclose(values[0], float(value), rtol=1e-6)
    np.testing.assert_allclose(got[0, 0], float(ct), rtol=1e-6)
    variance = 1 / (1 + np.exp(-z)) / (1 + np.exp(z))
    np.testing.assert_allclose(root[0] ** 2, float(variance), rtol=1e-6)


def test_infinite_logits_that_are_right():
    y, target = np.array([[np.inf], [-np.inf]]), np.array([[1.0], [0.0]])
    values, ct, _ = in_one_program(jp.BinaryCrossEntropy(), y, target)
    np.testing.assert_array_equal(values, [0, 0])
    np.testing.assert_array_equal(ct, [[0], [0]])
    values, ct, _ = in_one_program(jp.CrossEntropy(), np.array([[np.inf, 0, 1]]), np.array([0]))
    np.testing.assert_array_equal(values, [0])
    np.testing.assert_array_equal(ct, [[0, 0, 0]])


@pytest.mark.full
def test_a_padded_target_does_not_look_at_its_logits():
    loss = jp.CrossEntropy()
    y = jnp.array([[[jnp.inf, jnp.nan, 0], [1.0, 2, 3]]])
    values, residuals = loss.forward(y, jnp.array([[-1, 1]]))
    expected, of_expected = loss.forward(y[:, 1:], jnp.array([[1]]))
    np.testing.assert_array_equal(values, expected)
    key = jax.random.key(0)
    for got in (loss.backward(residuals), loss.sample(key, residuals)):
        np.testing.assert_array_equal(got[0, 0], [0, 0, 0])
        assert np.isfinite(got).all()
    np.testing.assert_array_equal(loss.backward(residuals)[:, 1:], loss.backward(of_expected))
    assert np.isfinite(loss.hessian_root(residuals)).all()
    np.testing.assert_array_equal(loss.real(residuals), [[False, True]])


def test_small_integers_count_to_any_number_of_classes():
    loss, y = jp.CrossEntropy(), normal(4, 300)
    small = np.array([5, 100, 120, -128], np.int8)
    got, expected = (
        jax.jit(functools.partial(parts, loss, target=jax.device_put(target)))(y)
        for target in (small, small.astype(int))
    )
    np.testing.assert_array_equal(got[0], expected[0])
    np.testing.assert_array_equal(got[1], expected[1])


@pytest.mark.full
@pytest.mark.parametrize("scale", [1, 20, 1e5])
def test_a_distribution_on_one_class_is_that_class(scale):
    y, classes = jnp.asarray(scale * normal(5, 4), jnp.float32), jnp.array([0, 3, 1, 2, 2])
    one_hot = jax.nn.one_hot(classes, 4, dtype=jnp.float32)
    key = jax.random.key(0)
    for loss in (jp.CrossEntropy(), jp.CrossEntropy(class_weights=(0.5, 1.0, 2.0, 3.0))):
        (values, hard), (got, soft) = (loss.forward(y, target) for target in (classes, one_hot))
        np.testing.assert_allclose(got, values, rtol=1e-6)
        for f in (loss.backward, loss.hessian_root, functools.partial(loss.sample, key)):
            np.testing.assert_allclose(f(soft), f(hard), rtol=1e-6)


@pytest.mark.parametrize("y", [[20, 0, 1], [-20, 3, 4], [50, 0, 1], [0, 0, 0]], ids=str)
@pytest.mark.parametrize("q", [[0.9, 0.1, 0], [1 - 2.0**-20, 2.0**-20, 0], [0, 0.5, 0.5]], ids=str)
def test_a_soft_target_is_right_however_certain(y, q):
    q = np.float32(q)
    args = np.array([y], np.float32), q[None]
    values, got, _ = jax.device_get(in_one_program(jp.CrossEntropy(), *args))
    value, mass = np.longdouble(0), q.astype(np.longdouble)
    for c in range(3):
        value += mass[c] * exactly(y, c)[0]
    # sum_c q_c (p - e_c), where the largest entry of p - e_c is minus the sum of the others.
    ct = sum(mass[c] * exactly(y, c)[1] for c in range(3))
    np.testing.assert_allclose(values[0], float(value), rtol=1e-6)
    scale = max(abs(ct).max(), 1e-30)
    np.testing.assert_allclose(got[0], ct.astype(float), atol=1e-6 * scale)


@pytest.mark.full
def test_infinite_logits_that_a_soft_target_says_nothing_of():
    loss = jp.CrossEntropy()
    y = jnp.array([[1.0, 0, -jnp.inf], [jnp.inf, 0, 1]])
    values, residuals = loss.forward(y, jnp.array([[0.5, 0.5, 0], [1, 0, 0]]))
    expected, of_expected = loss.forward(y[:1, :2], jnp.array([[0.5, 0.5]]))
    np.testing.assert_allclose(values, [expected[0], 0])
    np.testing.assert_allclose(loss.backward(residuals)[0, :2], loss.backward(of_expected)[0])
    np.testing.assert_array_equal(loss.backward(residuals)[:, 2], [0, 0])


PAIRS = [
    (jp.CrossEntropy(), normal(2, 3, 4), np.array([[1, 2, 0], [3, 0, 1]])),
    (jp.CrossEntropy(0, (1.0, 2.0, 0.5, 3.0)), normal(2, 3, 4), np.array([[1, 2, 0], [3, 0, 1]])),
    (jp.CrossEntropy(0.1), normal(2, 3, 4), np.full((2, 3, 4), 0.25)),
    (jp.HalfSquaredError(), normal(2, 3), 1 - normal(2, 3)),
    (jp.BinaryCrossEntropy(), normal(2, 3), np.full((2, 3), 0.25)),
]


@pytest.mark.few(1)
@pytest.mark.parametrize(("loss", "y", "target"), PAIRS, ids=lambda v: str(v)[:24])
def test_what_has_weight_0_is_not_looked_at(loss, y, target):
    weights = np.array([[1.0, 0.5, 0], [2, 1, 0]])
    kept = target[:, :2], weights[:, :2]
    expected, of_expected, _ = jax.jit(lambda y: parts(loss, y, kept))(y[:, :2])
    y, target = y.copy(), target.copy()
    y[:, 2] = np.nan
    target[:, 2] = np.nan if np.issubdtype(target.dtype, np.floating) else 99

    @jax.jit
    def all_of(y):
        _, residuals = loss.forward(y, (target, weights))
        drawn = loss.sample(jax.random.key(0), residuals)
        return *parts(loss, y, (target, weights)), drawn, loss.real(residuals)

    got, ct, root, drawn, real = jax.device_get(all_of(y))
    np.testing.assert_allclose(got, expected, rtol=1e-14)
    np.testing.assert_allclose(ct[:, :2], of_expected, rtol=1e-13)
    for tree in (ct, drawn):
        np.testing.assert_array_equal(tree[:, 2], np.zeros_like(tree[:, 2]))
    assert np.isfinite(root).all()
    assert not root[:, :, 2].any()
    if y.ndim == 3:
        np.testing.assert_array_equal(real, weights > 0)
    else:
        np.testing.assert_array_equal(real, [True, True])


def test_class_weights_are_those_of_torch_but_for_the_mean():
    """torch.nn.CrossEntropyLoss(weight, label_smoothing=0.1, reduction="sum") documents the sum."""
    y, target, c = normal(4, 3), np.array([2, 0, 1, 1]), np.array([0.5, 2.0, 1.0])
    log_p = y - np.log(np.exp(y).sum(-1, keepdims=True))
    own = -0.9 * c[target] * log_p[np.arange(4), target] - 0.1 / 3 * (c * log_p).sum(-1)
    values, _, _ = in_one_program(jp.CrossEntropy(0.1, tuple(c)), y, target)
    np.testing.assert_allclose(values, own, rtol=1e-14)


@pytest.mark.full
def test_numbers_and_weights_of_any_kind():
    """Strict promotion rejects NumPy's float64 with float32, and a bool with a number."""
    y, one = jnp.asarray(normal(2, 3), jnp.float32), np.float64(0.5)
    weights = jnp.array([[True, False, True], [True, True, False]])
    for loss, target in (
        (jp.CrossEntropy(one, (one, one, one)), jnp.array([1, 2])),
        (jp.BinaryCrossEntropy(one), (y > 0, weights)),
        (jp.HalfSquaredError(), (y + 1, weights.astype(int))),
        (jp.total_loss((one, jp.HalfSquaredError())), (y + 1,)),
    ):
        given = (y,) if isinstance(loss, TotalLoss) else y
        values, residuals = loss.forward(given, target)
        assert values.dtype == jnp.float32
        assert {leaf.dtype for leaf in jax.tree.leaves(loss.backward(residuals))} == {values.dtype}


def test_a_negative_weight_shows_in_everything():
    for loss, y, target in PAIRS:
        weights = np.array([[1.0, -1, 1], [1, 1, 1]])
        args = jax.device_put((y, (target, weights)))
        with pytest.raises(ValueError, match=r"weights that are finite and not negative, not -1"):
            loss.forward(*args)
        values, ct, _ = jax.device_get(in_one_program(loss, *args))
        assert np.isnan(values).tolist() == [True, False]
        assert np.isnan(ct[0]).any()
        assert np.isfinite(ct[1]).all()


Y, T = np.zeros((2, 3)), np.zeros(2, int)


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        (lambda: jp.CrossEntropy(1.5), ValueError, "label_smoothing is .* at most 1, not 1.5"),
        (lambda: jp.CrossEntropy(jnp.ones(())), TypeError, "label_smoothing is a number"),
        (lambda: jp.CrossEntropy(0, [1, 2]), TypeError, "class_weights is a tuple of numbers"),
        (lambda: jp.CrossEntropy(0, (1, -2)), ValueError, r"class_weights\[1\] is .*, not -2"),
        (
            lambda: jp.CrossEntropy(0, (1.0, 2.0)).forward(Y, T),
            ValueError,
            r"2 class weights, .* has 3 classes",
        ),
        (lambda: jp.BinaryCrossEntropy("no"), TypeError, "positive_weight is a number"),
        (
            lambda: jp.CrossEntropy().forward(Y, np.full((2, 3), 0.25)),
            ValueError,
            r"sum to 1, not \[0.25 0.25 0.25\]",
        ),
        (lambda: jp.CrossEntropy().forward(Y, (T, T, T)), TypeError, "a tuple of 3"),
        (lambda: jp.CrossEntropy().forward(Y, (T, T)), ValueError, r"y \(2, 3\) has none"),
        (
            lambda: jp.HalfSquaredError().forward(Y, (Y, np.ones(2))),
            ValueError,
            r"weights of shape \(2, 3\) here, not \(2,\)",
        ),
        (lambda: jp.HalfSquaredError().forward(Y, (Y, 1.0)), TypeError, "an array of real numbers"),
        (lambda: jp.HalfSquaredError().forward({"a": Y}, Y), TypeError, "jp.total_loss"),
        (lambda: jp.Mean().forward(Y, T), TypeError, "takes no target, and was given int64"),
        (lambda: jp.Mean().forward({"a": Y}, None), TypeError, "takes floating y"),
        (lambda: jp.loss(3), TypeError, "takes a function of one example's y and target, not 3"),
        (lambda: jp.loss(jp.CrossEntropy()), TypeError, r"not CrossEntropy\(\)"),
        (
            lambda: jp.loss(lambda y, t: y).forward(Y, Y),
            TypeError,
            r"gives float64\[3\], not a floating scalar",
        ),
        (lambda: jp.total_loss(), ValueError, "a loss for each part"),
        (lambda: jp.total_loss(jp.Mean(), a=jp.Mean()), ValueError, "all by name, or none"),
        (lambda: jp.total_loss(a=jp.Mean), TypeError, r"total_loss: a is the class Mean; write"),
        (lambda: jp.total_loss(a=(-1, jp.Mean())), ValueError, "a: the weight is .*, not -1"),
        (
            lambda: jp.total_loss(a=jp.Mean()).forward({"b": Y}, None),
            ValueError,
            r"the output is {'b': float64\[2,3\]}, not a dict of a",
        ),
        (
            lambda: jp.total_loss(jp.Mean(), jp.Mean()).forward((Y, Y), (None,)),
            ValueError,
            r"the target is \(None,\), not a tuple of 2",
        ),
    ],
)
def test_what_a_loss_does_not_take_is_said(wrong, error, message):
    with pytest.raises(error, match=message):
        wrong()


def softmax_loss(y, target):
    return jax.nn.logsumexp(y) - y[target]


def spread(latent):
    mean, logvar = latent["mean"], latent["logvar"]
    return 0.5 * jnp.sum(mean**2 + jnp.exp(logvar) - logvar - 1)


@pytest.mark.full
def test_a_loss_of_any_function():
    y, target = jnp.asarray(normal(4, 3)), jnp.array([2, 0, 1, 1])
    mine, ours = jp.loss(softmax_loss), jp.CrossEntropy()
    assert mine == jp.loss(softmax_loss)
    assert repr(mine) == "loss(softmax_loss)"
    values, residuals = mine.forward(y, target)
    expected, of_expected = ours.forward(y, target)
    assert relative_error(values, expected) <= 1e-12
    assert relative_error(mine.backward(residuals), ours.backward(of_expected)) <= 1e-12
    net = jp.chain(jp.Dense(4), jp.Tanh(), jp.Dense(3))
    args = net.init(jax.random.key(0), y), y, target
    for f in (jp.diag_ggn, jp.kronecker_factors):
        got, expected = (jax.jit(f(net, loss))(*args) for loss in (mine, ours))
        assert relative_error(got, expected) <= 1e-10
    narrow, _ = mine.forward(y.astype(jnp.bfloat16), target)
    assert narrow.dtype == jnp.float32


@pytest.mark.full
def test_a_loss_that_is_not_convex_has_no_root():
    loss = jp.loss(lambda y, sign: sign * jnp.sum(y**4) + jnp.sum(y[:1]))
    _, residuals = loss.forward(jnp.asarray(normal(3, 2)), jnp.array([1.0, -1, 1]))
    for tree in (loss.hessian_root(residuals), loss.sample(jax.random.key(0), residuals)[None]):
        assert np.isnan(tree).all((0, 2)).tolist() == [False, True, False]
        assert np.isfinite(tree[:, [0, 2]]).all()


@pytest.mark.full
def test_losses_of_parts_and_of_functions_against_autodiff():
    y, classes, rng = normal(4, 3), np.array([2, 0, -1, 1]), np.random.default_rng(0)
    latent = {"mean": rng.normal(size=(4, 2)), "logvar": rng.normal(size=(4, 1))}
    jp.check_loss(jp.Mean(), normal(3, 2, 2))
    jp.check_loss(jp.loss(spread), latent)
    loss = jp.total_loss(
        digit=jp.CrossEntropy(), latent=(0.1, jp.loss(spread)), image=(3, jp.HalfSquaredError())
    )
    assert eval(repr(loss), vars(jp) | {"spread": spread}) == loss
    jp.check_loss(
        loss, {"digit": y, "latent": latent, "image": y}, {"digit": classes, "image": y**2}
    )
    of_tuple = jp.total_loss((0.0, jp.HalfSquaredError()), jp.BinaryCrossEntropy())
    jp.check_loss(of_tuple, (y, y), (1 - y, (y > 0, y**2)))


def test_what_is_padding_in_the_parts():
    y, classes = normal(2, 3, 4), np.array([[1, -1, -1], [0, 2, -1]])
    other = np.where(np.arange(3) == 2, 1, classes)

    def real(loss, *targets):
        return jax.jit(lambda y: loss.real(loss.forward((y, y), targets)[1]))(y)

    both = jp.total_loss(jp.CrossEntropy(), jp.CrossEntropy())
    np.testing.assert_array_equal(real(both, classes, other), (classes >= 0) | (other >= 0))
    assert real(jp.total_loss(jp.CrossEntropy(), jp.HalfSquaredError()), classes, y) is None


@pytest.mark.parametrize("f", ["diag_ggn", "ggn_root", "kronecker_factors"])
def test_a_mean_has_no_curvature(f):
    net = jp.Dense(2)
    with pytest.raises(NotImplementedError, match=r"Mean\(\) is linear in y"):
        jax.jit(getattr(jp, f)(net, jp.Mean()))(*at(Row(net, np.ones((3, 2)))))


def test_cross_entropy_saves_the_logits_as_they_are():
    """With a large vocabulary, saved probabilities would be the largest array of a step."""

    @jax.jit
    def large_are_y(y):
        _, residuals = jp.CrossEntropy(0.1).forward(y, np.zeros((2, 3), int))
        return [leaf is y for leaf in jax.tree.leaves(residuals) if leaf.size > 2 * 3]

    assert large_are_y(jnp.zeros((2, 3, 50), jnp.bfloat16)) == [True]


def test_both_ways_to_read_the_class_agree():
    """On TPUs the class is picked by a sum, elsewhere gathered; padding is not read."""
    logits = np.array([[1.0, -2.0, 3.0], [-1e3, -2e3, -np.inf], [0.0, np.inf, 1.0]])
    both = [jax.jit(way) for way in (cross_entropy._picked, cross_entropy._gathered)]
    for chosen in ([2, 0, 1], [0, 1, 2], [3, 0, 7]):
        ways = (way(logits, np.array(chosen)[:, None]) for way in both)
        np.testing.assert_array_equal(*ways)


@pytest.mark.parametrize("way", ["_picked", "_gathered"])
def test_padding_of_very_negative_logits_has_no_derivative(way, monkeypatch):
    """Nothing overflows in padding, by hand or by autodiff, on either platform."""
    monkeypatch.setattr(cross_entropy, "_gathered", getattr(cross_entropy, way))
    loss, target = jp.CrossEntropy(), np.array([-1, 1])

    @jax.jit
    def both(y):
        by_autodiff = jax.grad(lambda y: loss.forward(y, target)[0].sum())(y)
        return *parts(loss, y, target), by_autodiff

    values, by_hand, _, by_autodiff = both(np.full((2, 3), -1e4))
    by_hand = np.asarray(by_hand)
    assert values[0] == 0
    assert not np.any(by_hand[0])
    np.testing.assert_allclose(by_autodiff, by_hand, rtol=1e-12)
