"""What is wrong is said in the user's words: the layer, the leaf, both shapes."""

import jax
import jax.numpy as jnp
import pytest

import jaxprop as jp
from jaxprop.layers import Affine

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
        ValueError, match=r"Dense\(3\): params are \{'b': .*takes Affine\(w="
    ) as caught:
        f((first, (), {"w": last.w, "b": last.b}), X)
    assert "in layer 2: Dense(3)" in caught.value.__notes__
    with pytest.raises(
        ValueError, match=r"Dense\(4\): params are Affine\(w=float64\[2,4\], b=None\)"
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
        jp.Dense(4).forward(Affine(jnp.ones((3, 4)), jnp.ones(4)), X)


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
        (lambda: jp.skip(jp.Tanh), r"skip is the class Tanh; write Tanh\(...\)"),
        (lambda: jp.skip(3), "skip is not a Layer but 3"),
        (lambda: jp.Dense("wide"), "Dense takes a whole number of features, not 'wide'"),
        (lambda: jp.Dense(True), "Dense takes a whole number of features, not True"),
        (lambda: jp.Dense(2.0), "Dense takes a whole number of features, not 2.0"),
    ],
)
def test_not_a_layer(make, message):
    with pytest.raises(TypeError, match=message):
        make()


def test_dense_of_no_features():
    with pytest.raises(ValueError, match="Dense takes at least 1 feature, not 0"):
        jp.Dense(0)


def test_skip_that_changes_the_shape():
    net = jp.skip(jp.Dense(3))
    with pytest.raises(ValueError, match=r"turns float64\[5,2\] into float64\[5,3\]"):
        net.forward(net.init(jax.random.key(0), X), X)


LOGITS = jnp.zeros((5, 3))


@pytest.mark.parametrize(
    ("loss", "target", "error", "message"),
    [
        (jp.CrossEntropy(), jnp.zeros(5), TypeError, "a target of dtype integer, not float64"),
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
        TypeError, match="MyDense subclasses Dense; to change a rule, wrap the layer"
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
