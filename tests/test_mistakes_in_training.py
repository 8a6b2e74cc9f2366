"""Mistakes with losses, gradients, quantities and updates, each with its sentence."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from mistakes import (
    BCE,
    CE,
    KEY,
    MASK,
    NET,
    OTHER,
    PARAMS,
    SE,
    T2,
    TARGET,
    X,
    check,
    mistakes,
    traced,
    value,
    without_x64,
)

import jaxprop as jp

SGD, ADAM = optax.sgd(0.1), optax.adam(0.1)
CLIPPING = optax.chain(optax.clip_by_global_norm(1.0), SGD)
ONE = jp.chain(jp.Dense(1))
NORMED = jp.chain(jp.BatchNorm())


@functools.cache
def update(optimizer="adam", **options):
    return jp.make_update(NET, CE, {"sgd": SGD, "adam": ADAM}[optimizer], donate=False, **options)


@functools.cache
def state(optimizer="adam", **options):
    return update(optimizer, **options).init(PARAMS)


def step(params=PARAMS, given=None, x=X, target=TARGET, optimizer="adam", key=None, **options):
    given = state(optimizer) if given is None else given
    return update(optimizer, **options)(params, given, x, target, key)


def by(make, **options):
    """A step with ``make`` for its value and gradient."""
    return step(value_and_grad=make, **options)


def norms(net=NET, loss=CE, params=PARAMS, x=X, target=TARGET, **options):
    return traced(jp.per_example_sq_norms(net, loss), params, x, target, **options)


LOSSES = mistakes(
    TypeError,
    no_target=(lambda: value(target=None), "takes the target as an array, not None"),
    classes_as_floats=(
        lambda: value(target=TARGET.astype(float)),
        "CrossEntropy() takes a target of dtype integer, or the probability of each class",
    ),
    classes_as_bools=(
        lambda: value(target=TARGET > 0),
        "a target of dtype integer or floating, not bool",
    ),
    classes_in_a_list=(lambda: value(target=[0, 1, 1, 0]), "takes the target as an array, not [0"),
    classes_as_strings=(lambda: value(target=np.array(list("abcd"))), "a target of dtype integer"),
    one_class=(lambda: value(target=1), "CrossEntropy() takes the target as an array, not 1"),
    labels_for_an_error=(lambda: value(loss=SE), "a target of dtype floating, not int64"),
    complex_for_bits=(
        lambda: value(loss=BCE, target=T2.astype(complex)),
        "BinaryCrossEntropy() takes a target of dtype floating or integer or bool",
    ),
    y_of_integers=(lambda: CE.forward(T2.astype(int), TARGET), "takes floating y, not int64"),
) | mistakes(
    ValueError,
    classes_that_are_too_many=(lambda: value(target=TARGET + 1), "takes a target below 2, not 2"),
    classes_in_a_column=(
        lambda: value(target=TARGET[:, None]),
        "the net's output has shape (4, 2), which takes a target of shape (4,), not (4, 1)",
    ),
    one_hot_integers=(
        lambda: value(target=T2.astype(int)),
        "not (4, 2); probabilities of classes are floating",
    ),
    classes_of_another_batch=(lambda: value(target=TARGET[:3]), "of shape (4,), not (3,)"),
    a_row_for_a_column=(
        lambda: value(ONE, SE, ONE.init(KEY, X), target=jnp.ones(4)),
        "the net's output has shape (4, 1), which takes a target of shape (4, 1), not (4,)",
    ),
    a_target_that_would_be_broadcast=(
        lambda: value(loss=SE, target=T2[:1]),
        "which takes a target of shape (4, 2), not (1, 2)",
    ),
    bits_that_are_two=(lambda: value(loss=BCE, target=2 * T2), "a target in [0, 1], not 2.0"),
    bits_that_are_minus_one=(lambda: value(loss=BCE, target=-T2), "a target in [0, 1], not -1.0"),
    bits_that_are_nan=(lambda: value(loss=BCE, target=T2 * jnp.nan), "in [0, 1], not nan"),
    a_batch_of_nothing=(lambda: value(x=X[:0], target=TARGET[:0]), "the batch is empty"),
)

OPTIONS = mistakes(
    TypeError,
    rule_of_a_number=(
        lambda: jp.rules.lrp(NET, {jp.Dense: 3}),
        "a rule is a function of a layer, not 3",
    ),
    params_for_all_of_like=(
        lambda: jp.kfac(NET, CE, PARAMS),
        "kfac: like is (params, x, target), not",
    ),
    max_norm_of_a_string=(lambda: jp.clipped_grad(NET, CE, "1"), "max_norm is a number, not '1'"),
    max_norm_of_none=(lambda: jp.clipped_grad(NET, CE, None), "max_norm is a number, not None"),
    max_norm_of_a_bool=(lambda: jp.Clipped(True), "max_norm is a number, not True"),
    max_norm_of_each_layer=(
        lambda: jp.Clipped(jnp.ones(2)),
        "max_norm is a number, not float64[2]",
    ),
    noise_of_a_string=(lambda: jp.Clipped(1.0, "1"), "noise_multiplier is a number, not '1'"),
    update_s_max_norm_of_a_list=(lambda: update(max_norm=(1.0,)), "max_norm is a number"),
    micro_batches_of_a_float=(
        lambda: jp.value_and_grad(NET, CE, micro_batches=2.0),
        "micro_batches is a whole number, not 2.0",
    ),
    micro_batches_of_a_string=(
        lambda: update(micro_batches="2"),
        "micro_batches is a whole number",
    ),
    samples_of_a_string=(lambda: jp.DiagGGN("2"), "samples is a whole number, not '2'"),
    samples_of_a_float=(lambda: jp.GGNRoot(2.0), "samples is a whole number, not 2.0"),
    samples_of_a_bool=(lambda: jp.KroneckerFactors(True), "samples is a whole number, not True"),
    scale_of_a_string=(
        lambda: jp.value_and_grad(NET, CE, loss_scale="big"),
        "loss_scale is a number, not 'big'",
    ),
    scale_of_none=(lambda: jp.value_and_grad(NET, CE, loss_scale=None), "loss_scale is a number"),
    two_passes_of_an_int=(
        lambda: jp.clipped_grad(NET, CE, 1.0, two_pass=1),
        "Clipped: two_pass is True or False, not 1",
    ),
    fused_as_a_word=(lambda: update(fused="yes"), "fused is True or False, not 'yes'"),
    skipping_of_none=(
        lambda: update(skip_nonfinite=None),
        "skip_nonfinite is True or False",
    ),
    donating_of_an_int=(
        lambda: jp.make_update(NET, CE, SGD, donate=0),
        "donate is True or False, not 0",
    ),
    per_layer_as_a_word=(
        lambda: jp.per_example_sq_norms(NET, CE, per_layer="yes"),
        "per_layer is True or False, not 'yes'",
    ),
    empirical_of_an_int=(
        lambda: jp.KroneckerFactors(empirical=1),
        "KroneckerFactors: empirical is True or False, not 1",
    ),
    a_quantity_s_class=(
        lambda: jp.quantities(NET, CE, grads=jp.Gradient),
        "grads is the class Gradient; write Gradient(...)",
    ),
    a_quantity_s_function=(lambda: jp.quantities(NET, CE, gram=jp.gram), "gram is not a Quantity"),
    a_quantity_s_name=(
        lambda: jp.quantities(NET, CE, n="norms"),
        "n is not a Quantity but 'norms'",
    ),
    samples_without_a_key=(
        lambda: traced(jp.quantities(NET, CE, d=jp.DiagGGN(2)), PARAMS, X, TARGET),
        "sampling takes a key",
    ),
    walk_of_none=(lambda: jp.walk(NET, CE, None), "visit is a function of a jp.Step, not None"),
    walk_of_a_quantity=(lambda: jp.walk(NET, CE, jp.Gradient()), "of a jp.Step, not Gradient()"),
) | mistakes(
    ValueError,
    max_norm_of_zero=(lambda: jp.clipped_grad(NET, CE, 0), "max_norm must be positive, not 0"),
    max_norm_of_a_negative=(lambda: update(max_norm=-1.0), "max_norm must be positive, not -1.0"),
    max_norm_of_infinity=(lambda: jp.Clipped(float("inf")), "max_norm must be finite, not inf"),
    max_norm_of_nan=(lambda: jp.Clipped(float("nan")), "max_norm must be positive, not nan"),
    max_norm_of_a_negative_array=(
        lambda: jp.Clipped(jnp.array(-1.0)),
        "must be positive, not -1.0",
    ),
    noise_of_a_negative=(lambda: jp.Clipped(1.0, -1.0), "noise_multiplier must not be negative"),
    scale_of_zero=(lambda: jp.value_and_grad(NET, CE, loss_scale=0), "loss_scale must be positive"),
    micro_batches_of_zero=(lambda: update(micro_batches=0), "micro_batches is at least 1, not 0"),
    micro_batches_that_do_not_divide=(
        lambda: traced(jp.value_and_grad(NET, CE, micro_batches=3), PARAMS, X, TARGET),
        "4 examples do not divide into 3 equal micro-batches",
    ),
    micro_batches_of_two_sizes=(
        lambda: jp.value_and_grad(NET, CE, micro_batches=2)(PARAMS, X, TARGET[:2]),
        "is the example, but they are (float64[4,3], int64[2])",
    ),
    micro_batches_of_a_batch_norm=(
        lambda: jp.value_and_grad(NORMED, SE, micro_batches=2),
        "chain(BatchNorm()) couples the examples of a batch",
    ),
    micro_batches_of_pairs=(
        lambda: jp.gram(NET, CE, micro_batches=2),
        "Gram() is of pairs of examples, and those of two micro-batches never meet",
    ),
    samples_of_zero=(lambda: jp.diag_ggn(NET, CE, samples=0), "samples is at least 1, not 0"),
    samples_of_the_empirical=(
        lambda: jp.KroneckerFactors(2, empirical=True),
        "empirical factors are of the loss gradient: there is nothing to sample",
    ),
    per_layer_in_two_passes=(
        lambda: jp.clipped_grad(NET, CE, 1.0, per_layer=True, two_pass=True),
        "per_layer needs one pass",
    ),
    noise_without_a_key=(
        lambda: traced(jp.clipped_grad(NET, CE, 1.0, 1.0), PARAMS, X, TARGET),
        "a noise_multiplier needs a key, a new one each step",
    ),
    a_quantity_called_value=(
        lambda: jp.quantities(NET, CE, value=jp.Gradient()),
        "'value' is the name of the loss; call the quantity something else",
    ),
    noise_scale_of_one=(
        lambda: traced(jp.noise_scale(NET, CE), PARAMS, X[:1], TARGET[:1]),
        "estimated from at least 2 examples, not 1",
    ),
    norms_of_a_batch_norm=(
        lambda: norms(NORMED, SE, NORMED.init(KEY, X), target=X),
        "BatchNorm() couples the examples of a batch",
    ),
    norms_of_nothing=(lambda: norms(jp.Tanh(), SE, (), target=X), "the net has no params that are"),
)

UPDATES = mistakes(
    TypeError,
    optimizer_not_called=(
        lambda: jp.make_update(NET, CE, optax.sgd),
        "optimizer is not an optax transformation such as",
    ),
    optimizer_of_a_rate=(lambda: jp.make_update(NET, CE, 0.1), "such as optax.sgd(0.1) but 0.1"),
    optimizer_of_a_name=(lambda: jp.learned_only("adam"), "such as optax.sgd(0.1) but 'adam'"),
    maker_that_is_made=(
        lambda: update(value_and_grad=jp.value_and_grad(NET, CE)),
        "value_and_grad= is a maker, such as jp.value_and_grad itself",
    ),
    maker_s_name=(
        lambda: update(value_and_grad="autodiff"),
        "is a maker, such as jp.value_and_grad",
    ),
    maker_of_none=(lambda: by(lambda net, loss: None), "makes a function of a batch, not None"),
    maker_that_wants_a_bound=(lambda: by(jp.clipped_grad), "bind what else it takes by functools."),
    maker_of_jax=(lambda: by(jax.value_and_grad), "for jax.value_and_grad write jp.autodiff"),
    maker_of_norms=(lambda: by(jp.per_example_sq_norms), "returns (value, grads), not float64[4]"),
    maker_of_grads_alone=(
        lambda: by(lambda net, loss: lambda params, x, target: params),
        "value_and_grad= returns (value, grads), not (AffineParams(",
    ),
    maker_without_micro_batches=(
        lambda: by(lambda net, loss: jp.autodiff(net, loss), micro_batches=2),
        "and this one does not take it, as jp.value_and_grad does",
    ),
    state_of_none=(lambda: update()(PARAMS, None, X, TARGET), "state = update.init(params)"),
    state_of_another_optimizer=(
        lambda: step(given=state("sgd")),
        "state[0].count is missing, but for this optimizer and these params it is of shape ()",
    ),
    state_of_one_that_keeps_more=(
        lambda: step(given=state("adam"), optimizer="sgd"),
        "state[0].count is of shape (), but for this optimizer and these params it is missing",
    ),
    state_of_another_net=(
        lambda: step(given=ADAM.init(OTHER)),
        "state[0].mu[0].w is of shape (3, 6), but for this optimizer and these params it is",
    ),
    state_that_is_empty=(
        lambda: step(given=()),
        "state[0].count is missing, but for this",
    ),
    state_that_is_params=(lambda: step(given=PARAMS), "start from state = update.init(params)"),
    state_that_is_left_out=(
        lambda: update()(PARAMS, X, TARGET),
        "start from state = update.init(params)",
    ),
    state_without_skipping=(
        lambda: step(given=state(), skip_nonfinite=True),
        "state.state[0].count is missing, but for this optimizer",
    ),
    state_with_skipping=(
        lambda: step(given=state(skip_nonfinite=True)),
        "start from state = update.init(params)",
    ),
    fused_state_of_another_net=(
        lambda: step(given=ADAM.init(OTHER), fused=True),
        "state[0].mu[0].w is of shape (3, 6), but for this optimizer and these params it is",
    ),
    update_by_zero=(lambda: step(key=0), "key is a key of jax.random.key, not int64[]"),
    update_by_an_old_key=(lambda: step(key=jax.random.PRNGKey(0)), "jax.random.key, not uint32[2]"),
    update_of_a_list=(
        lambda: step(x=[[1.0, 2.0, 3.0]] * 4),
        "Dense(5) takes an array x",
    ),
    update_of_integers=(lambda: step(x=X.astype(int)), "Dense(5) takes floating x, not int64"),
    update_of_strings=(
        lambda: step(target=np.array(list("abcd"))),
        "target is of <U1, where JAX takes numbers and bools",
    ),
    update_of_objects=(
        lambda: step(x=np.array([[None] * 3] * 4)),
        "x is of object, where JAX takes numbers and bools",
    ),
    update_s_init_of_integers=(
        lambda: update().init(jax.tree.map(lambda leaf: leaf.astype(int), PARAMS)),
        "params[0].w is int64[3,5], which no gradient moves: mark it in init",
    ),
) | mistakes(
    ValueError,
    maker_that_is_fused=(
        lambda: update(fused=True, value_and_grad=jp.autodiff),
        "give fused or value_and_grad, not both",
    ),
    maker_of_no_grads=(
        lambda: by(lambda net, loss: lambda params, x, target: (1.0, 2.0)),
        "the gradients are float 2.0, but the learned params (AffineParams(",
    ),
    maker_of_other_grads=(
        lambda: by(lambda net, loss: lambda params, x, target: (1.0, per_example(params))),
        "the gradients are (AffineParams(w=float64[1,3,5]",
    ),
    update_s_init_of_the_net=(
        lambda: update().init(NET),
        "3 params, one a layer, not chain(Dense(",
    ),
    update_s_init_of_none=(lambda: update().init(None), "3 params, one a layer, not None"),
    params_of_none=(lambda: step(None, state()), "3 params, one a layer, not None"),
    params_of_none_fused=(lambda: step(None, state(), fused=True), "params, one a layer, not None"),
    params_and_state_swapped=(
        lambda: step(state(), PARAMS, fused=True),
        "3 params, one a layer, not 2",
    ),
    params_of_another_net=(
        lambda: step(OTHER, ADAM.init(OTHER)),
        "Dense(5): params.w has shape (3,",
    ),
    update_of_no_examples=(lambda: step(x=X[:0], target=TARGET[:0]), "the batch is empty"),
    update_with_a_mask=(
        lambda: update()(PARAMS, state(), X, TARGET, mask=MASK),
        "no layer takes a mask: chain(Dense(5), Relu(), Dense(2))",
    ),
    an_array_of_keys=(
        lambda: norms(key=jax.random.split(KEY)),
        "key is one key, not an array of them, key<fry>[2]",
    ),
    update_of_an_int_that_does_not_fit=(
        lambda: without_x64(lambda: step(target=np.array([0, 1, 2**32, 0]))),
        "target of int64 holds 4294967296, which does not fit into int32",
    ),
    clipping_by_the_norm_fused=(
        lambda: jp.make_update(NET, CE, CLIPPING, donate=False, fused=True)(
            PARAMS, CLIPPING.init(PARAMS), X, TARGET
        ),
        "or for clipping by the global norm max_norm in place of optax.clip_by_global_norm",
    ),
)


def per_example(params):
    return jax.tree.map(lambda leaf: leaf[None], params)


ROWS = LOSSES | OPTIONS | UPDATES


@pytest.mark.parametrize("mistake", ROWS.values(), ids=ROWS)
def test_a_mistake_in_training_has_its_sentence(mistake):
    check(mistake)


MAKERS = {
    "value_and_grad": jp.value_and_grad,
    "autodiff": jp.autodiff,
    "loss_fn": jp.loss_fn,
    "walk": lambda net, loss: jp.walk(net, loss, lambda step: ()),
    "clipped_grad": lambda net, loss: jp.clipped_grad(net, loss, 1.0),
    "quantities": lambda net, loss: jp.quantities(net, loss, grads=jp.Gradient()),
    "per_example_sq_norms": jp.per_example_sq_norms,
    "per_example_grads": jp.per_example_grads,
    "gram": jp.gram,
    "second_moment": jp.second_moment,
    "variance": jp.variance,
    "noise_scale": jp.noise_scale,
    "diag_ggn": jp.diag_ggn,
    "kronecker_factors": jp.kronecker_factors,
    "ggn_root": jp.ggn_root,
    "make_update": lambda net, loss: jp.make_update(net, loss, SGD),
    "explain": lambda net, loss: jp.explain(net, loss, PARAMS, X, TARGET),
    "find_nonfinite": lambda net, loss: jp.find_nonfinite(net, loss, PARAMS, X, TARGET),
}


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
@pytest.mark.parametrize(
    ("net", "loss", "sentence"),
    [
        (CE, NET, "net is not a Layer but CrossEntropy()"),
        (PARAMS, CE, "net is not a Layer but (AffineParams(w=float64[3,5], b=float64[5])"),
        ([jp.Dense(3)], CE, "net is not a Layer but [Dense(3)]"),
        (jp.Dense, CE, "net is the class Dense; write Dense(...)"),
        (NET, jp.CrossEntropy, "loss is the class CrossEntropy; write CrossEntropy(...)"),
        (NET, NET, "loss is not a Loss but chain(Dense(5), Relu(), Dense(2))"),
        (NET, optax.softmax_cross_entropy, "loss is not a Loss but <function softmax_cross_entro"),
        (NET, "mse", "loss is not a Loss but 'mse'"),
        (NET, None, "loss is not a Loss but None"),
    ],
    ids=["swapped", "params", "list", "class", "loss_class", "net", "function", "name", "none"],
)
def test_every_maker_says_what_is_no_net_and_no_loss(make, net, loss, sentence):
    with pytest.raises(TypeError) as caught:
        make(net, loss)
    assert sentence in str(caught.value)


@pytest.mark.parametrize("make", list(MAKERS.values())[:15], ids=list(MAKERS)[:15])
def test_every_function_of_a_batch_says_what_does_not_fit(make):
    f = make(NET, CE)
    for args, options, sentence in [
        ((PARAMS, X), {}, "CrossEntropy() takes the target as an array, not None"),
        ((X, PARAMS, TARGET), {}, "3 params, one a layer, not float64[4,3]"),
        ((OTHER, X, TARGET), {}, "Dense(5): params.w has shape (3, 6), but an input float64[4,3]"),
        ((PARAMS, X, TARGET[:2]), {}, "takes a target of shape (4,), not (2,)"),
        ((PARAMS, X, TARGET), {"key": 0}, "key is a key of jax.random.key, not int 0"),
        ((PARAMS, X, TARGET), {"mask": MASK}, "no layer takes a mask"),
    ]:
        with pytest.raises((TypeError, ValueError)) as caught:
            traced(f, *args, **options)
        assert sentence in str(caught.value)
