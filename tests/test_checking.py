"""``check_layer`` finds each kind of mistake, names it, and accepts what is right."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxprop as jp

X = np.random.default_rng(0).normal(size=(5, 4))


class Scale(jp.Layer):
    """y = x w, with a mistake to choose."""

    mistake: str = ""

    def init(self, key, x):
        return {"w": jnp.ones(x.shape[-1], x.dtype)}

    def forward(self, params, x):
        saved = {
            "integer in residuals": (x, 3),
            "no example axis": (x, x.mean(0)),
            "examples last": (x.T,),
        }
        return x * params["w"][None], saved.get(self.mistake, (x,))

    def backward(self, params, residuals, ct):
        x, w = residuals[0], params["w"][None]
        if self.mistake == "examples last":
            x = x.T
        d_params, d_x = {"w": jp.Sum(x * ct)}, ct * w
        match self.mistake:
            case "one element of d_x":
                d_x = d_x.at[1, 2].add(1e-9)
            case "one element of d_params":
                d_params = {"w": (x * ct).sum(0).at[3].multiply(1 + 1e-9)}
            case "nan":
                d_x = jnp.full_like(d_x, jnp.nan)
            case "zero":
                d_x = jnp.zeros_like(d_x)
            case "shape":
                d_params = {"w": x * ct}
            case "dtype":
                d_x = d_x.astype(jnp.float32)
            case "structure":
                d_params = (jp.Sum(x * ct),)
            case "missing leaf":
                d_params = {"w": None}
            case "d_x only":
                return d_x
        return d_params, d_x


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        ("integer in residuals", r"residuals\[1\] is the int 3, .* is a field of the layer"),
        (
            "no example axis",
            r"residuals\[1\] has shape \(4,\), but axis 0 is the example and x has 5",
        ),
        ("examples last", r"residuals\[0\] has shape \(4, 5\)"),
        ("one element of d_x", r"d_x disagrees with jax.vjp of forward: at \[1, 2\]"),
        ("one element of d_params", r"d_params\['w'\] disagrees with jax.vjp of forward: at \[3\]"),
        ("nan", r"d_x disagrees with jax.vjp .* backward gives nan"),
        ("zero", r"d_x disagrees with jax.vjp .* backward gives 0.0"),
        ("shape", r"d_params\['w'\] is float64\[5,4\], but params\['w'\] is float64\[4\]"),
        ("dtype", r"d_x is float32\[5,4\], but x is float64\[5,4\]"),
        ("structure", r"d_params is \(float64\[4\],\), but params is \{'w': float64\[4\]\}"),
        ("missing leaf", r"d_params\['w'\] is None, but params\['w'\] is float64\[4\]"),
    ],
)
def test_names_the_mistake(mistake, message):
    with pytest.raises(AssertionError, match=message) as caught:
        jp.check_layer(Scale(mistake), X)
    assert str(caught.value).startswith(f"Scale(mistake='{mistake}'): ")


def test_says_both_values_and_the_relative_error():
    with pytest.raises(AssertionError) as caught:
        jp.check_layer(Scale("one element of d_x"), X)
    found = re.search(
        r"backward gives (\S+), the oracle (\S+) \(relative error (\S+), allowed 1e-12\)",
        str(caught.value),
    )
    assert found
    got, expected, error = map(float, found.groups())
    assert got - expected == pytest.approx(1e-9, rel=1e-3)
    assert 1e-10 < error < 1e-8


def test_passes_what_is_right():
    jp.check_layer(Scale(), X)
    jp.check_layer(Scale(), X, {"w": np.arange(4.0)})
    jp.check_layer(Scale("one element of d_x"), X, rtol=1e-8)


class Lie(jp.Layer):
    """Half of the derivative is hidden from autodiff, and backward leaves it out as well."""

    def forward(self, params, x):
        return x * jax.lax.stop_gradient(x), x

    def backward(self, params, x, ct):
        return (), ct * x


def test_central_differences_are_an_oracle_of_their_own():
    with pytest.raises(AssertionError, match="d_x disagrees with central differences of forward"):
        jp.check_layer(Lie(), X)


class Coupled(jp.Layer):
    """Centred over the batch: right for the batch, but not the sum over its examples."""

    def forward(self, params, x):
        return x - x.mean(0, keepdims=True), x

    def backward(self, params, x, ct):
        return (), ct - ct.mean(0, keepdims=True)


def test_examples_one_by_one():
    with pytest.raises(AssertionError, match="d_x disagrees with its examples one by one"):
        jp.check_layer(Coupled(), X)


def test_a_layer_that_says_it_is_coupled_is_spared_its_examples_one_by_one():
    class Declared(jp.Layer):
        batch_coupled = True
        wrong: bool = False

        def forward(self, params, x):
            return x - x.mean(0, keepdims=True), x

        def backward(self, params, x, ct):
            return (), ct if self.wrong else ct - ct.mean(0, keepdims=True)

    jp.check_layer(Declared(), X)
    jp.check_layer(jp.chain(jp.Tanh(), jp.skip(Declared())), X)
    with pytest.raises(AssertionError, match=r"d_x disagrees with jax\.vjp of forward"):
        jp.check_layer(Declared(wrong=True), X)


def test_a_param_held_constant_has_no_cotangent():
    class Fixed(jp.Layer):
        wrong: bool = False

        def init(self, key, x):
            return jnp.ones(x.shape[-1], x.dtype)

        def forward(self, params, x):
            return x * jax.lax.stop_gradient(params)[None], x

        def backward(self, params, x, ct):
            return jp.Sum(ct * x if self.wrong else jnp.zeros_like(x)), ct * params[None]

    jp.check_layer(Fixed(), X)
    with pytest.raises(AssertionError, match=r"d_params disagrees with jax\.vjp of forward"):
        jp.check_layer(Fixed(wrong=True), X)


class Moody(jp.Layer):
    """A layer whose backward is wrong under tracing, or for cotangents that are not small."""

    when: str = ""

    def forward(self, params, x):
        return 2 * x, x

    def backward(self, params, x, ct):
        bad = {
            "": False,
            "traced": isinstance(ct, jax.core.Tracer),
            "large": jnp.abs(ct).max() > 4,
        }[self.when]
        return (), jnp.where(bad, 3 * ct, 2 * ct)


def test_what_vjp_at_one_point_cannot_see():
    jp.check_layer(Moody(), X)
    with pytest.raises(AssertionError, match="d_x disagrees with"):
        jp.check_layer(Moody("traced"), X)
    with pytest.raises(AssertionError, match="d_x disagrees with linearity in ct"):
        jp.check_layer(Moody("large"), X)


def test_batch_of_one_and_integers_pass():
    class Lookup(jp.Layer):
        """A layer whose input is integers, with no cotangent for them."""

        def init(self, key, x):
            return jax.random.normal(key, (7, 3))

        def forward(self, params, ids):
            return params[ids], ids

        def backward(self, params, ids, ct):
            return jnp.zeros_like(params).at[ids].add(ct), None

    jp.check_layer(Lookup(), np.array([[1, 1, 4], [0, 6, 1]]))
    jp.check_layer(Scale(), X[:1])


def test_the_default_precision_is_left_as_it_was():
    jax.config.update("jax_enable_x64", False)
    try:
        jp.check_layer(jp.Dense(3), jnp.ones((2, 2), jnp.float32))
        assert jnp.ones(3).dtype == jnp.float32
    finally:
        jax.config.update("jax_enable_x64", True)


@pytest.mark.parametrize(
    ("layer", "x"),
    [
        (jp.Tanh(), np.array([[12.0, -15.0]])),
        (jp.Sigmoid(), np.array([[30.0, 33.0]])),
        (jp.Gelu(), np.array([[-6.0, -7.5]])),
        (jp.Dense(3), 1e5 * X),
        (jp.Dense(3), 1e-5 * X),
        (jp.Relu(), np.zeros((3, 4))),
    ],
    ids=str,
)
def test_right_layers_pass_at_awkward_points(layer, x):
    jp.check_layer(layer, x)


class Log(jp.Layer):
    def forward(self, params, x):
        return jnp.log(x), x

    def backward(self, params, x, ct):
        return (), ct / x


class Shift(jp.Layer):
    """softmax(x + w): the gradient by w is zero except for rounding."""

    def init(self, key, x):
        return jnp.ones((), x.dtype)

    def forward(self, params, x):
        y = jax.nn.softmax(x + params)
        return y, y

    def backward(self, params, y, ct):
        d_x = y * (ct - (y * ct).sum(-1, keepdims=True))
        return d_x.sum(), d_x


def test_a_narrow_domain_and_a_gradient_of_zero_pass():
    for seed in range(3):
        jp.check_layer(Log(), np.random.default_rng(0).uniform(size=(5, 4)) + 1e-3, seed=seed)
        jp.check_layer(Shift(), X, seed=seed)


class Exp(jp.Layer):
    """exp(x), with a wrong derivative wherever it is small compared with the largest."""

    def forward(self, params, x):
        return jnp.exp(x), x

    def backward(self, params, x, ct):
        return (), ct * jnp.where(x < 3, -7, jnp.exp(x))


class Share(jp.Layer):
    """A scale whose examples' shares are wrong, though their sum is right."""

    def init(self, key, x):
        return jnp.ones(x.shape[-1], x.dtype)

    def forward(self, params, x):
        return x * params[None], x

    def backward(self, params, x, ct):
        return jp.Sum(jnp.broadcast_to((x * ct).mean(0), x.shape)), ct * params[None]


def test_a_large_example_does_not_hide_the_others():
    with pytest.raises(AssertionError, match="d_x disagrees with"):
        jp.check_layer(Exp(), np.where(np.arange(20).reshape(5, 4) == 0, 40.0, X))


def test_shares_of_the_sum_are_checked():
    with pytest.raises(AssertionError, match="d_params disagrees with each example alone"):
        jp.check_layer(Share(), X)


class Odd(jp.Layer):
    what: str

    def forward(self, params, x):
        return {
            "scalar": x.sum(),
            "mask": (x, x > 0),
            "nan": jnp.where(x > 0, x, jnp.nan),
        }[self.what], x

    def backward(self, params, x, ct):
        return (), ct


@pytest.mark.parametrize(
    ("check", "error", "message"),
    [
        (lambda: jp.check_layer(Odd("scalar"), X), AssertionError, "y has shape"),
        (lambda: jp.check_layer(Odd("mask"), X), AssertionError, r"y\[1\] is bool, which has no"),
        (lambda: jp.check_layer(jp.Relu, X), TypeError, "is the class Relu"),
        (lambda: jp.check_layer(jnp.tanh, X), TypeError, "is not a Layer"),
        (lambda: jp.check_layer(jp.Relu(), [1.0]), TypeError, "must be an array, not float 1.0"),
        (
            lambda: jp.check_layer(Scale("d_x only"), X),
            TypeError,
            r"returns float64\[5,4\], not \(d_",
        ),
        (lambda: jp.check_layer(Odd("nan"), np.arange(4)), ValueError, "nothing to check"),
        (lambda: jp.check_layer(jp.Relu(), np.ones((0, 3))), ValueError, "nothing to check"),
        (lambda: jp.check_layer(jp.Tanh(), 1j * X), TypeError, "complex128; check_layer takes"),
        (lambda: jp.check_layer(Scale(), X, {"w": np.arange(4)}), TypeError, "int64; check_layer"),
    ],
)
def test_what_cannot_be_checked_is_said(check, error, message):
    with pytest.raises(error, match=message):
        check()


def test_a_first_factor_that_depends_on_ct_is_caught():
    """Right in every sum, and wrong in the diagonal of the Gauss-Newton matrix."""

    class Transposed(jp.Layer):
        def init(self, key, x):
            return jax.random.normal(key, (3, x.shape[-1]), x.dtype)

        def forward(self, params, x):
            return x @ params.T, x

        def backward(self, params, x, ct):
            return jp.Outer(ct, x), ct @ params

    with pytest.raises(AssertionError, match="looks at the form's own ct"):
        jp.check_layer(Transposed(), np.arange(8.0).reshape(2, 4))


class Scaled(jp.Loss):
    """Half the squared error times 3, with a mistake to choose."""

    wrong: str = ""

    def forward(self, y, target):
        error = y - target
        values = 1.5 * jnp.sum(error**2, axis=-1)
        coupled = values - values.mean() if self.wrong == "forward" else values
        return coupled, error

    def backward(self, error):
        return error if self.wrong == "backward" else 3 * error

    def hessian_root(self, error):
        size = 1.0 if self.wrong == "hessian_root" else np.sqrt(3)
        return size * jnp.eye(error.shape[-1])[:, None] * jnp.ones_like(error)[None]

    def sample(self, key, error):
        size = 1.1 if self.wrong == "covariance" else 1.0
        offset = 0.2 if self.wrong == "mean" else 0.0
        return offset + size * np.sqrt(3) * jax.random.normal(key, error.shape, error.dtype)


def test_check_loss_passes_what_is_right():
    rng = np.random.default_rng(0)
    y, target = rng.normal(size=(4, 3)), rng.normal(size=(4, 3))
    jp.check_loss(Scaled(), y, target)
    jp.check_loss(jp.HalfSquaredError(), y, target)
    jp.check_loss(jp.BinaryCrossEntropy(), y, np.array([[0, 1, 1]] * 4))
    jp.check_loss(jp.CrossEntropy(), 3 * y, np.array([0, 2, -1, 1]))
    jp.check_loss(jp.CrossEntropy(), rng.normal(size=(2, 2, 3)), np.array([[0, -1], [2, 1]]))


@pytest.mark.parametrize("wrong", ["forward", "backward", "hessian_root", "mean", "covariance"])
def test_check_loss_names_what_is_wrong(wrong):
    rng = np.random.default_rng(0)
    with pytest.raises(AssertionError, match=f"(the )?{wrong} (disagrees with|of sample is off)"):
        jp.check_loss(Scaled(wrong), rng.normal(size=(4, 3)), rng.normal(size=(4, 3)))


def test_a_residual_that_has_n_entries_by_chance_is_found():
    class Remembers(jp.Layer):
        def forward(self, params, x):
            return x[..., :1], jnp.zeros(3)

        def backward(self, params, residuals, ct):
            return (), ct * jnp.array([1.0, 0, 0])

    with pytest.raises(AssertionError, match=r"residuals has shape \(3,\), but axis 0 is the exa"):
        jp.check_layer(Remembers(), np.ones((3, 3)))
