"""Mistakes in a user's own layer or loss, each with its sentence."""

import jax
import jax.numpy as jnp
import pytest
from mistakes import CE, IDS, KEY, NET, PARAMS, SE, T2, TARGET, X, check, mistakes, traced

import jaxprop as jp

DENSE = jp.Dense(3)
OF_DENSE = DENSE.init(KEY, X)


def layer(**members):
    """A user's layer y = x + params, with members replaced by mistakes."""
    right = {
        "init": lambda self, key, x: jnp.ones(3),
        "forward": lambda self, params, x: (x + params[None], x),
        "backward": lambda self, params, x, ct: (jp.Sum(ct), ct),
    }
    return type(jp.Layer)("Mine", (jp.Layer,), {"__module__": __name__, **right, **members})()


def gradient(make=jp.value_and_grad, **members):
    """The gradient, or a quantity, for a user's layer after a dense one."""
    net = jp.chain(DENSE, layer(**members))
    return traced(make(net, SE), (OF_DENSE, jnp.ones(3)), X, X)


def norms(backward):
    return gradient(jp.per_example_sq_norms, backward=backward)


def stacked(backward, **options):
    net, params = jp.repeat(layer(backward=backward), 2), jnp.ones((2, 3))
    return traced(jp.value_and_grad(net, SE), params, X, X)


def loss(**members):
    """A user's half squared error, with members replaced by mistakes."""
    right = {
        "forward": lambda self, y, t: (0.5 * jnp.sum((y - t) ** 2, 1), y - t),
        "backward": lambda self, residuals: residuals,
    }
    return type(jp.Loss)("Own", (jp.Loss,), {"__module__": __name__, **right, **members})()


def of_loss(make=jp.value_and_grad, **members):
    return traced(make(NET, loss(**members)), PARAMS, X, T2)


class Kept(jp.Layer):
    """A layer with a field."""

    sizes: object

    def forward(self, params, x):
        return x, x

    def backward(self, params, x, ct):
        return (), ct


LAYERS = mistakes(
    TypeError,
    backward_left_out=(
        lambda: type(jp.Layer)("Half", (jp.Layer,), {"forward": Kept.forward})(),
        "Can't instantiate abstract class Half",
    ),
    forward_of_y_alone=(
        lambda: gradient(forward=lambda self, params, x: x + params[None]),
        "Mine(): forward returns float64[4,3], not (y, residuals)",
    ),
    forward_of_nothing=(
        lambda: gradient(forward=lambda self, params, x: None),
        "Mine(): forward returns None, not (y, residuals)",
    ),
    forward_of_no_y=(
        lambda: gradient(forward=lambda self, params, x: (None, x)),
        "Mine(): forward returns (None, float64[4,3]), not (y, residuals)",
    ),
    forward_of_a_number=(
        lambda: gradient(forward=lambda self, params, x: (1.0, x)),
        "Mine(): forward returns (float 1.0, float64[4,3]), not (y, residuals)",
    ),
    backward_of_d_x_alone=(
        lambda: gradient(backward=lambda self, params, x, ct: ct),
        "Mine(): backward returns float64[4,3], not (d_params, d_x)",
    ),
    backward_of_nothing=(
        lambda: gradient(backward=lambda self, params, x, ct: None),
        "Mine(): backward returns None, not (d_params, d_x)",
    ),
    backward_of_three=(
        lambda: gradient(backward=lambda self, params, x, ct: (ct, ct, ct)),
        "Mine(): backward returns (float64[4,3], float64[4,3], float64[4,3]), not (d_params",
    ),
    backward_of_a_list=(
        lambda: gradient(backward=lambda self, params, x, ct: [jp.Sum(ct), ct]),
        "Mine(): backward returns [Sum(ct=float64[4,3]), float64[4,3]], not (d_params, d_x)",
    ),
    d_x_that_is_a_number=(
        lambda: gradient(backward=lambda self, params, x, ct: (jp.Sum(ct), 1.0)),
        "Dense(3): backward takes ct as an array, not float 1.0",
    ),
    a_field_that_is_a_list=(
        lambda: Kept([1, 2]).forward((), X),
        "Kept.sizes = [1, 2] cannot be hashed; arrays live in params, and a list is written as",
    ),
    norms_by_a_field_that_is_a_list=(
        lambda: traced(jp.per_example_sq_norms(jp.chain(Kept([1])), SE), ((),), X, X),
        "Kept.sizes = [1] cannot be hashed; arrays live in params",
    ),
    a_field_that_is_an_array=(lambda: Kept(T2).forward((), X), "cannot be hashed; arrays live in"),
    a_subclass_of_dense=(
        lambda: type(jp.Layer)("Wider", (jp.Dense,), {}),
        "Wider subclasses Dense; to change what it does, hold it in a field and call it",
    ),
) | mistakes(
    ValueError,
    init_left_out=(
        lambda: gradient(init=jp.Layer.init),
        "Mine(): params are float64[3], but an input float64[4,3] takes () (does it define init",
    ),
    d_params_and_d_x_swapped=(
        lambda: gradient(backward=lambda self, params, x, ct: (ct, ct.sum(0))),
        "Mine(): d_params has shape (4, 3), but params has (3,)",
    ),
    d_params_of_each_example=(
        lambda: gradient(backward=lambda self, params, x, ct: (ct, ct)),
        "Mine(): d_params has shape (4, 3), but params has (3,)",
    ),
    d_params_of_none=(
        lambda: gradient(backward=lambda self, params, x, ct: (None, ct)),
        "Mine(): d_params does not have the structure of params: None, for float64[3]",
    ),
    d_params_in_a_tuple=(
        lambda: gradient(backward=lambda self, params, x, ct: ((ct.sum(0),), ct)),
        "Mine(): d_params does not have the structure of params: (float64[3],), for float64[3]",
    ),
    d_params_of_another_form=(
        lambda: gradient(backward=lambda self, params, x, ct: (jp.Outer(x, ct), ct)),
        "Mine(): d_params has shape (3, 3), but params has (3,)",
    ),
    a_form_of_what_is_summed=(
        lambda: norms(lambda self, params, x, ct: (jp.Sum(ct.sum(0)), ct)),
        "Mine(): d_params is Sum(ct=float64[3]), but axis 0 of each factor is the example",
    ),
    a_form_of_some_examples=(
        lambda: norms(lambda self, params, x, ct: (jp.Stacked(ct[:2]), ct)),
        "axis 0 of each factor is the example, of which there are 4",
    ),
    a_d_x_of_none_before_a_layer=(
        lambda: gradient(backward=lambda self, params, x, ct: (jp.Sum(ct), ct.sum(0))),
        "Dense(3): ct has shape (3,), but x has (4, 3)",
    ),
    a_d_x_of_none_in_a_repeat=(
        lambda: stacked(lambda self, params, x, ct: (jp.Sum(ct), None)),
        "backward of the layer returns None for its d_x, but its x is float64[4,3]",
    ),
    a_d_x_of_another_shape_in_a_repeat=(
        lambda: stacked(lambda self, params, x, ct: (jp.Sum(ct), ct.sum(0))),
        "backward of the layer returns float64[3] for its d_x, but its x is float64[4,3]",
    ),
    a_d_x_of_another_dtype_in_a_repeat=(
        lambda: stacked(lambda self, params, x, ct: (jp.Sum(ct), ct.astype(jnp.float32))),
        "backward of the layer returns float32[4,3] for its d_x, but its x is float64[4,3]",
    ),
)

OWN_LOSSES = (
    mistakes(
        TypeError,
        values_alone=(
            lambda: of_loss(forward=lambda self, y, t: jnp.sum(y, 1)),
            "Own(): forward returns float64[4], not (values, residuals) with a floating value",
        ),
        values_of_none=(
            lambda: of_loss(forward=lambda self, y, t: None),
            "forward returns None",
        ),
        values_that_are_a_number=(
            lambda: of_loss(forward=lambda self, y, t: (1.0, y)),
            "Own(): forward returns (float 1.0, float64[4,2]), not (values, residuals)",
        ),
        values_that_are_integers=(
            lambda: of_loss(forward=lambda self, y, t: (jnp.ones(4, int), y)),
            "Own(): forward returns (int64[4], float64[4,2]), not (values, residuals) with",
        ),
        values_that_are_right_or_wrong=(
            lambda: of_loss(jp.loss_fn, forward=lambda self, y, t: (y[:, 0] > t[:, 0], y)),
            "Own(): forward returns (bool[4], float64[4,2]), not (values, residuals)",
        ),
    )
    | mistakes(
        ValueError,
        one_value_for_all=(
            lambda: of_loss(forward=lambda self, y, t: (jnp.mean((y - t) ** 2), y)),
            "Own(): forward gives values of shape (), not one for each of the 4 examples",
        ),
        a_value_for_each_output=(
            lambda: of_loss(jp.loss_fn, forward=lambda self, y, t: ((y - t) ** 2, y)),
            "Own(): forward gives values of shape (4, 2), not one for each of the 4 examples",
        ),
        a_cotangent_of_none=(
            lambda: of_loss(backward=lambda self, residuals: None),
            "Own() gives None for the cotangent of the net's output, which is float64[4,2]",
        ),
        a_cotangent_that_is_a_number=(
            lambda: of_loss(backward=lambda self, residuals: 1.0),
            "for the cotangent of the net's output, which is float64[4,2]",
        ),
        a_cotangent_that_is_summed=(
            lambda: of_loss(backward=lambda self, residuals: residuals.sum(-1)),
            "Own() gives float64[4] for the cotangent of the net's output, which is float64[4,2]",
        ),
        a_cotangent_that_would_be_broadcast=(
            lambda: of_loss(
                jp.per_example_sq_norms, backward=lambda self, r: r.sum(-1, keepdims=True)
            ),
            "Own() gives float64[4,1] for the cotangent of the net's output, which is float64[4,2]",
        ),
        two_cotangents=(
            lambda: of_loss(backward=lambda self, residuals: (residuals, residuals)),
            "Own() gives (float64[4,2], float64[4,2]) for the cotangent",
        ),
        a_hessian_for_its_root=(
            lambda: of_loss(jp.diag_ggn, hessian_root=lambda self, r: jnp.ones((4, 2, 2))),
            "Own() gives float64[2,2] for the cotangent of the net's output, which is float64[4,2]",
        ),
    )
    | mistakes(
        NotImplementedError,
        curvature_of_a_loss_without=(lambda: of_loss(jp.diag_ggn), "Own() has no hessian_root"),
        sampling_of_a_loss_without=(
            lambda: traced(jp.diag_ggn(NET, loss()), PARAMS, X, T2, key=KEY),
            "Own() has no sample",
        ),
    )
)

CHECKS = mistakes(
    TypeError,
    check_of_a_class=(lambda: jp.check_layer(jp.Dense, X), "check_layer: layer is the class Dense"),
    check_of_params=(
        lambda: jp.check_layer(PARAMS, X),
        "check_layer: layer is not a Layer",
    ),
    check_of_a_loss=(lambda: jp.check_layer(CE, T2), "layer is not a Layer but CrossEntropy()"),
    check_of_none=(lambda: jp.check_layer(None, X), "check_layer: layer is not a Layer but None"),
    check_of_a_list=(lambda: jp.check_layer(DENSE, [[1.0]]), "x[0][0] must be an array, not float"),
    check_of_complex=(
        lambda: jp.check_layer(DENSE, X.astype(complex)),
        "is complex128; check_layer takes real floats",
    ),
    check_at_a_string=(
        lambda: jp.check_layer(DENSE, X, "a"),
        "params must be an array, not str 'a'",
    ),
    check_with_a_string=(lambda: jp.check_layer(DENSE, X, rtol="a"), "rtol is a number, not 'a'"),
    check_loss_of_a_layer=(lambda: jp.check_loss(DENSE, T2, T2), "loss is not a Loss but Dense(3)"),
    check_loss_of_a_class=(
        lambda: jp.check_loss(jp.CrossEntropy, T2, TARGET),
        "loss is the class CrossEntropy; write CrossEntropy(...)",
    ),
    check_loss_swapped=(lambda: jp.check_loss(CE, TARGET, T2), "CrossEntropy() takes floating y"),
    custom_vjp_of_a_class=(lambda: jp.custom_vjp(jp.Dense), "custom_vjp: layer is the class Dense"),
    custom_vjp_of_a_loss=(
        lambda: jp.custom_vjp(CE),
        "custom_vjp: layer is not a Layer",
    ),
    custom_vjp_of_ids=(
        lambda: jp.custom_vjp(DENSE)(OF_DENSE, IDS[:, :3]),
        "Dense(3) takes floating x, not int64",
    ),
) | mistakes(
    ValueError,
    check_of_no_example=(
        lambda: jp.check_layer(DENSE, X[:0]),
        "x of at least one example",
    ),
    check_of_a_scalar=(
        lambda: jp.check_layer(Kept(1), X[0, 0]),
        "x of at least one example",
    ),
    check_at_other_params=(
        lambda: jp.check_layer(DENSE, X, jp.Dense(4).init(KEY, X)),
        "Dense(3): params.w has shape (3, 4), but an input float64[4,3] takes (3, 3)",
    ),
    custom_vjp_of_other_params=(
        lambda: jax.grad(lambda p: jp.custom_vjp(NET)(p, X).sum())(OF_DENSE),
        "3 params, one a layer, not AffineParams(w=float64[3,3]",
    ),
)

ROWS = LAYERS | OWN_LOSSES | CHECKS


@pytest.mark.parametrize("mistake", ROWS.values(), ids=ROWS)
def test_a_mistake_in_one_s_own_has_its_sentence(mistake):
    check(mistake)
