"""Errors name what is wrong in the user's words: the layer, the leaf, both shapes."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxprop as jp
from jaxprop.core.arrays import check_fit
from jaxprop.layers import AffineParams

NET = jp.chain(jp.Dense(4), jp.Relu(), jp.Dense(3))
X = jnp.ones((5, 2))
TARGET = jnp.zeros(5, jnp.int32)


def params():
    return NET.init(jax.random.key(0), X)


FUNCTIONS = {
    "forward": lambda params, x: NET.forward(params, x),
    "jit": lambda params, x: jax.jit(NET.forward)(params, x),
    "value_and_grad": lambda params, x: jp.value_and_grad(NET, jp.CrossEntropy())(
        params, x, TARGET
    ),
    "loss_fn": lambda params, x: jp.loss_fn(NET, jp.CrossEntropy())(params, x, TARGET),
    "grad": lambda params, x: jax.grad(jp.loss_fn(NET, jp.CrossEntropy()))(params, x, TARGET),
}
everywhere = pytest.mark.parametrize("f", FUNCTIONS.values(), ids=FUNCTIONS)


@everywhere
def test_input_that_does_not_fit(f):
    with pytest.raises(ValueError, match=r"Dense\(4\): params.w has shape \(2, 4\)") as caught:
        f(params(), jnp.ones((5, 7)))
    assert "float64[5,7]" in str(caught.value)
    assert "takes (7, 4)" in str(caught.value)
    assert "in layer 0: Dense(4)" in caught.value.__notes__


@everywhere
def test_params_of_the_wrong_length(f):
    with pytest.raises(ValueError, match=r"chain of 3 layers takes a tuple of 3 params.* not 2"):
        f(params()[:2], X)


@everywhere
def test_params_of_the_wrong_structure(f):
    first, _, last = params()
    with pytest.raises(
        ValueError, match=r"Dense\(3\): params are \{'b': .*takes AffineParams\(w="
    ) as caught:
        f((first, (), {"w": last.w, "b": last.b}), X)
    assert "in layer 2: Dense(3)" in caught.value.__notes__
    with pytest.raises(
        ValueError, match=r"Dense\(4\): params are AffineParams\(w=float64\[2,4\], b=None\)"
    ):
        f((first._replace(b=None), (), last), X)
    with pytest.raises(ValueError, match=r"Relu\(\): params are float64\[\], but .* takes \(\)"):
        f((first, jnp.ones(()), last), X)


@everywhere
def test_params_of_the_wrong_shape(f):
    first, _, last = params()
    with pytest.raises(ValueError, match=r"Dense\(3\): params.b has shape \(4,\), .* takes \(3,\)"):
        f((first, (), last._replace(b=jnp.zeros(4))), X)
    with pytest.raises(ValueError, match=r"Dense\(3\): params.b has shape \(\), .* takes \(3,\)"):
        f((first, (), last._replace(b=0.0)), X)


@everywhere
def test_input_that_is_no_batch(f):
    with pytest.raises(
        ValueError, match=r"axis 0 the example, not \(2,\); for one .* write x\[None\]"
    ):
        f(params(), X[0])


@everywhere
def test_input_that_is_not_floating(f):
    with pytest.raises(TypeError, match=r"Dense\(4\) takes floating x, not int32"):
        f(params(), jnp.ones((5, 2), jnp.int32))


def test_input_that_is_not_an_array():
    with pytest.raises(TypeError, match=r"Dense\(4\): x must be an array, not \[int 1, int 2\]"):
        NET.forward(params(), [1, 2])


def test_one_layer_alone_says_so_too():
    with pytest.raises(ValueError, match=r"Dense\(4\): params.w has shape \(3, 4\)"):
        jp.Dense(4).forward(AffineParams(jnp.ones((3, 4)), jnp.ones(4)), X)


def test_backward_with_params_of_the_wrong_length():
    _, residuals = NET.forward(params(), X)
    with pytest.raises(ValueError, match=r"takes a tuple of 3 params.* not 4"):
        NET.backward((*params(), ()), residuals, jnp.ones((5, 3)))


def test_empty_chain():
    with pytest.raises(ValueError, match="chain\\(\\) needs at least one layer"):
        jp.chain()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: jp.chain(jp.Dense(3), jnp.tanh), "chain: layer 1 is not a Layer but"),
        (lambda: jp.chain([jp.Dense(3), jp.Relu()]), "chain: layer 0 is not a Layer but"),
        (lambda: jp.chain(jp.Relu), r"chain: layer 0 is the class Relu; write Relu\(...\)"),
        (lambda: jp.skip(jp.Tanh), r"skip: the layer is the class Tanh; write Tanh\(...\)"),
        (lambda: jp.skip(3), "skip: the layer is not a Layer but 3"),
        (lambda: jp.Dense("wide"), "Dense: features is a whole number, not 'wide'"),
        (lambda: jp.Dense(True), "Dense: features is a whole number, not True"),
        (lambda: jp.Dense(2.0), "Dense: features is a whole number, not 2.0"),
        (lambda: jp.Dense(784, 256), "Dense: bias is True or False, not 256"),
        (lambda: jp.Gelu("none"), "Gelu: approximate is True or False, not 'none'"),
        (lambda: jp.loss_fn(NET, jp.CrossEntropy), r"loss is the class CrossEntropy; write"),
        (lambda: jp.value_and_grad(jp.CrossEntropy(), NET), "net is not a Layer but CrossEntropy"),
        (lambda: jp.diag_ggn(NET, optax.sgd), "loss is not a Loss but"),
        (lambda: jp.make_update(NET, jp.CrossEntropy(), optax.sgd), "optimizer is not an optax"),
        (lambda: NET.init(jax.random.key(0), [[1.0, 2.0]]), r"x must be an array, not \[\[float"),
        (lambda: NET.init(jax.random.key(0), None), r"Dense\(4\) takes an array x, not None"),
    ],
)
def test_not_a_layer(make, message):
    with pytest.raises(TypeError, match=message):
        make()


def test_dense_of_no_features():
    with pytest.raises(ValueError, match="Dense: features is at least 1, not 0"):
        jp.Dense(0)


def test_skip_that_changes_the_shape():
    net = jp.skip(jp.Dense(3))
    with pytest.raises(ValueError, match=r"turns float64\[5,2\] into float64\[5,3\]"):
        net.forward(net.init(jax.random.key(0), X), X)


LOGITS = jnp.zeros((5, 3))


@pytest.mark.parametrize(
    ("loss", "target", "error", "message"),
    [
        (
            jp.CrossEntropy(),
            jnp.zeros(5),
            TypeError,
            r"integer, or the .* \(5, 3\), not float64 \(5,\)",
        ),
        (
            jp.CrossEntropy(),
            jnp.zeros((5, 3), int),
            ValueError,
            r"target of shape \(5,\), not \(5, 3\)",
        ),
        (jp.CrossEntropy(), jnp.zeros(4, int), ValueError, r"\(5, 3\), .* \(5,\), not \(4,\)"),
        (jp.CrossEntropy(), [0] * 5, TypeError, "takes the target as an array"),
        (
            jp.HalfSquaredError(),
            jnp.zeros((5, 3), int),
            TypeError,
            "a target of dtype floating, not int64",
        ),
        (jp.HalfSquaredError(), jnp.zeros(5), ValueError, r"of shape \(5, 3\), not \(5,\)"),
        (
            jp.BinaryCrossEntropy(),
            jnp.zeros((5, 1)),
            ValueError,
            r"of shape \(5, 3\), not \(5, 1\)",
        ),
        (
            jp.BinaryCrossEntropy(),
            jnp.zeros((5, 3), complex),
            TypeError,
            "floating or integer or bool, not complex128",
        ),
    ],
)
def test_target_that_does_not_fit(loss, target, error, message):
    with pytest.raises(error, match=message):
        loss.forward(LOGITS, target)
    net = jp.chain(jp.Tanh())
    for f in (jp.loss_fn(net, loss), jax.jit(jp.value_and_grad(net, loss))):
        if not isinstance(target, list):
            with pytest.raises(error, match=message):
                f(((),), LOGITS, target)


def test_empty_batch():
    net, loss = jp.chain(jp.Tanh()), jp.HalfSquaredError()
    for f in (jp.loss_fn(net, loss), jp.value_and_grad(net, loss)):
        with pytest.raises(ValueError, match="the batch is empty"):
            f(((),), jnp.zeros((0, 2)), jnp.zeros((0, 2)))


def test_a_layer_is_wrapped_and_not_subclassed():
    with pytest.raises(
        TypeError, match="MyDense subclasses Dense; to change what it does, hold it in a field"
    ):

        class MyDense(jp.Dense):
            pass


def test_a_field_that_cannot_be_hashed():
    class Fixed(jp.Layer):
        matrix: object

        def forward(self, params, x):
            return x, x

        def backward(self, params, x, ct):
            return (), ct

    with pytest.raises(TypeError, match=r"Fixed.matrix .* cannot be hashed; arrays live in params"):
        Fixed(jnp.ones(3)).forward((), X)


def test_an_error_inside_a_user_s_layer_says_where():
    class Broken(jp.Layer):
        def forward(self, params, x):
            raise ZeroDivisionError("mine")

        def backward(self, params, x, ct):
            return (), ct

    net = jp.chain(jp.Relu(), jp.chain(Broken()))
    with pytest.raises(ZeroDivisionError) as caught:
        net.forward(((), ((),)), X)
    assert caught.value.__notes__ == ["in layer 0: Broken()", "in layer 1: chain(Broken())"]


class Returns(jp.Layer):
    """A layer made of given functions, whose params are (), floats or integers."""

    forward_as: Callable
    backward_as: Callable
    params: str = "()"

    def init(self, key, x):
        return {"()": (), "float": jnp.ones(3), "int": jnp.ones(3, int)}[self.params]

    def forward(self, params, x):
        return self.forward_as(x)

    def backward(self, params, x, ct):
        return self.backward_as(x, ct)


def of(net, params, loss=None, target=None):
    loss = loss or jp.HalfSquaredError()
    x = jnp.ones((5, 3))
    return jp.value_and_grad(net, loss)(params, x, x if target is None else target)


def kept(x):
    return x, x


@pytest.mark.parametrize(
    ("net", "params", "error", "message"),
    [
        (Returns(lambda x: x, kept), (), TypeError, r"forward returns .*, not \(y, residuals\)"),
        (
            Returns(kept, lambda x, ct: (x * ct, ct), "float"),
            jnp.ones(3),
            ValueError,
            r"d_params has shape \(5, 3\), but params has \(3,\)",
        ),
        (
            Returns(kept, lambda x, ct: ({"w": ct.sum(0)}, ct), "float"),
            jnp.ones(3),
            ValueError,
            "d_params.* does not have",
        ),
        (
            Returns(kept, lambda x, ct: (ct.sum(0), ct), "int"),
            jnp.ones(3, int),
            TypeError,
            "params is int64, which has no gradient",
        ),
        (jp.chain(jp.Tanh()), [()], ValueError, r"takes a tuple of 1 params, .* not \[\(\)\]"),
        (Returns(kept, kept), jnp.ones(3), ValueError, r"does it define init\?"),
    ],
)
def test_a_user_s_layer_is_held_to_its_contract(net, params, error, message):
    with pytest.raises(error, match=message):
        of(net, params)


def test_a_user_s_loss_gives_one_value_for_each_example():
    class PerOutput(jp.Loss):
        def forward(self, y, target):
            return (y - target) ** 2, y - target

        def backward(self, residuals):
            return 2 * residuals

    for f in (jp.value_and_grad, jp.loss_fn):
        with pytest.raises(
            ValueError, match=r"PerOutput\(\): forward gives values of shape \(5, 3\)"
        ):
            f(jp.Tanh(), PerOutput())((), jnp.ones((5, 3)), jnp.ones((5, 3)))


def test_a_cotangent_of_the_wrong_shape():
    layer = jp.Dense(3)
    params = layer.init(jax.random.key(0), X)
    with pytest.raises(ValueError, match=r"Dense\(3\): ct has shape \(1, 3\), but x has \(5, 2\)"):
        layer.backward(params, X, jnp.ones((1, 3)))


def test_donated_params_are_named():
    optimizer = optax.sgd(0.1)
    update = jp.make_update(NET, jp.CrossEntropy(), optimizer)
    old = params()
    update(old, optimizer.init(old), X, TARGET)
    with pytest.raises(RuntimeError, match="donated to an earlier update"):
        update(old, optimizer.init(params()), X, TARGET)


def test_numbers_that_numpy_has_in_64_bits_fit_where_x64_is_off():
    with jax.enable_x64(False):
        check_fit({"x": np.array([1e300]), "small": np.array([3]), "none": np.zeros(0, int)})
        with pytest.raises(ValueError, match=f"ids of int64 holds {2**31}, which does not fit"):
            check_fit({"ids": np.array([2**31])})


@pytest.mark.full
def test_numpy_float64_without_x64_is_no_warning():
    with jax.enable_x64(False):
        x = np.ones((5, 2))
        params = NET.init(jax.random.key(0), x)
        assert params[0].w.dtype == jnp.float32
        jp.value_and_grad(NET, jp.CrossEntropy())(params, x, np.zeros(5, np.int64))


def test_an_abstract_base_with_a_forward_is_held_to_init_as_well():
    class Base(jp.Layer):
        def forward(self, params, x):
            return x, x

    class Child(Base):
        def backward(self, params, x, ct):
            return (), ct

    with pytest.raises(ValueError, match=r"Child\(\): params are"):
        Child().forward(jnp.ones(3), X)


@pytest.mark.usefixtures("standard_promotion")
def test_numbers_may_be_arrays_in_a_traced_program():
    """They are known there, and still checked."""
    half, negative = jnp.float32(0.5), jnp.float32(-0.5)
    net, loss = NET, jp.CrossEntropy()
    given = params(), X, TARGET

    def numbers(half):
        """Every result by options that are a number, or a known array of it."""
        noisy = jp.clipped_grad(net, loss, half, noise_multiplier=half)
        bounds = jax.tree.map(lambda _: half, (0, (), 0))
        update = jp.make_update(net, loss, optax.sgd(half), max_norm=half, loss_scale=half)
        return (
            noisy(*given, key=jax.random.key(0)),
            jp.clipped_grad(net, loss, bounds, per_layer=True)(*given),
            jp.value_and_grad(net, loss)(*given, divisor=half),
            jp.loss_fn(net, loss)(*given, divisor=half),
            jp.quantity.next_max_norm(half, half, quantile=half),
            update(given[0], update.init(given[0]), *given[1:]),
        )

    got, expected = jax.jit(lambda _: numbers(half))(0), jax.jit(lambda _: numbers(0.5))(0)
    for a, b in zip(*map(jax.tree.leaves, (got, expected)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)
    with pytest.raises(ValueError, match=r"max_norm must be positive, not -0\.5"):
        jax.jit(lambda _: numbers(negative))(0)


@pytest.mark.parametrize("name", ["explain", "find_nonfinite"])
def test_an_empty_batch_is_named(name):
    with pytest.raises(ValueError, match=f"{name}: the batch is empty"):
        getattr(jp, name)(NET, jp.CrossEntropy(), params(), X[:0], TARGET[:0])


def test_help_has_the_arguments_of_the_function():
    text = jp.per_example_sq_norms(NET, jp.CrossEntropy()).__doc__
    assert text.startswith("Return") or text.startswith("The squared norm")
    for name in ("params", "x", "target", "key", "mask", "weights", "divisor"):
        assert f"        {name}: " in text


def test_a_part_of_the_target_that_is_missing():
    net = jp.branch(a=jp.Dense(3), b=jp.Dense(2))
    loss = jp.total_loss(a=jp.CrossEntropy(), b=jp.HalfSquaredError())
    with pytest.raises(TypeError, match="takes the target as an array") as error:
        jp.value_and_grad(net, loss)(net.init(jax.random.key(0), X), X, {"a": TARGET})
    assert error.value.__notes__ == ["the target has no part 'b'"]
