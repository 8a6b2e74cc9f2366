"""Mistakes with layers, nets and their params, each with its sentence."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from mistakes import (
    CE,
    COMPLEX,
    IDS,
    IMAGE,
    KEY,
    MASK,
    NET,
    OTHER,
    PARAMS,
    SEQUENCE,
    T2,
    X,
    check,
    mistakes,
    value,
    without_x64,
)

import jaxprop as jp

DROPPING = jp.chain(jp.Dense(3), jp.Dropout(0.5))
ATTENDING = jp.chain(jp.Dense(12), jp.Attention(2), jp.Dense(2))


def forward(layer, x):
    return layer.forward(layer.init(KEY, x), x)


def backward(layer, x, ct):
    params = layer.init(KEY, x)
    return layer.backward(params, layer.forward(params, x)[1], ct)


class Around(jp.Wrapper):
    """A user's wrapper."""

    def forward(self, params, x):
        return self.layer.forward(params, x)

    def backward(self, params, residuals, ct):
        return self.layer.backward(params, residuals, ct)


class Gated(jp.Combinator):
    """A user's combinator."""

    gate: jp.Layer
    block: jp.Layer

    def forward(self, params, x):
        return x, ()

    def walk(self, place, residuals, ct, visit):
        return (), ct


CONSTRUCTORS = mistakes(
    TypeError,
    dense_of_a_string=(lambda: jp.Dense("3"), "Dense: features is a whole number, not '3'"),
    dense_of_a_float=(lambda: jp.Dense(3.0), "Dense: features is a whole number, not 3.0"),
    dense_of_none=(lambda: jp.Dense(None), "Dense: features is a whole number, not None"),
    dense_of_a_bool=(lambda: jp.Dense(True), "Dense: features is a whole number, not True"),
    dense_of_a_shape=(lambda: jp.Dense((3,)), "Dense: features is a whole number, not (int 3,)"),
    dense_of_an_array=(lambda: jp.Dense(X), "features is a whole number, not float64[4,3]"),
    dense_in_torch_s_order=(lambda: jp.Dense(784, 256), "Dense: bias is True or False, not 256"),
    embedding_of_a_float=(lambda: jp.Embedding(7, 2.5), "Embedding: features is a whole number"),
    positions_of_a_string=(lambda: jp.Positions("9"), "Positions: length is a whole number"),
    attention_of_a_string=(lambda: jp.Attention("2"), "Attention: heads is a whole number"),
    attention_causal_as_a_word=(lambda: jp.Attention(2, "no"), "causal is True or False, not 'no'"),
    group_norm_of_a_float=(lambda: jp.GroupNorm(2.0), "GroupNorm: groups is a whole number"),
    conv_of_a_list=(lambda: jp.Conv([3]), "Conv: features is a whole number, not [int 3]"),
    conv_in_torch_s_order=(lambda: jp.Conv(3, 64, 3), "window is a tuple with a size for each"),
    conv_window_of_an_int=(lambda: jp.Conv(4, 3), "Conv: window is a tuple with a size for each"),
    conv_window_of_a_list=(lambda: jp.Conv(4, [3, 3]), "a tuple with a size for each axis"),
    conv_strides_of_floats=(lambda: jp.Conv(4, (3, 3), 2.0), "strides takes a whole number or a"),
    conv_groups_of_a_string=(lambda: jp.Conv(4, groups="2"), "Conv: groups is a whole number"),
    conv_bias_of_an_int=(lambda: jp.Conv(4, bias=0), "Conv: bias is True or False, not 0"),
    pool_window_of_an_int=(lambda: jp.MaxPool(2), "MaxPool: window is a tuple with a size"),
    pool_window_of_floats=(lambda: jp.AvgPool((2.0, 2)), "AvgPool: window is a tuple with a size"),
    lstm_of_none=(lambda: jp.Lstm(None), "Lstm: features is a whole number, not None"),
    rotary_base_of_a_string=(lambda: jp.Rotary(2, "1e4"), "Rotary: base is a number, not '1e4'"),
    rotary_base_of_a_bool=(lambda: jp.Rotary(2, True), "Rotary: base is a number, not True"),
    dropout_of_a_string=(lambda: jp.Dropout("0.5"), "Dropout: rate is a number, not '0.5'"),
    dropout_of_none=(lambda: jp.Dropout(None), "Dropout: rate is a number, not None"),
    dropout_of_a_bool=(lambda: jp.Dropout(True), "Dropout: rate is a number, not True"),
    dropout_of_an_array=(
        lambda: jp.Dropout(jnp.array(0.5)).forward((), X),
        "cannot be hashed; arrays live in params",
    ),
    layer_norm_of_its_features=(lambda: jp.LayerNorm(64), "LayerNorm: eps is a float, not 64"),
    rms_norm_of_its_features=(lambda: jp.RMSNorm(64), "the number of features is that of x"),
    group_norm_in_torch_s_order=(lambda: jp.GroupNorm(8, 64), "GroupNorm: eps is a float, not 64"),
    layer_norm_eps_of_a_string=(lambda: jp.LayerNorm("1e-5"), "LayerNorm: eps is a number"),
    batch_norm_momentum_of_a_string=(lambda: jp.BatchNorm("0.9"), "momentum is a number"),
    batch_norm_training_of_an_int=(lambda: jp.BatchNorm(training=0), "training is True or False"),
    reshape_of_a_list=(lambda: jp.Reshape([2, 2]), "Reshape takes a tuple of whole numbers"),
    reshape_with_minus_one=(lambda: jp.Reshape((-1, 2)), "Reshape takes a tuple of whole numbers"),
    pad_of_an_int=(lambda: jp.Pad(1), "Pad takes a tuple of (low, high) pairs"),
    pad_of_flat_widths=(lambda: jp.Pad((1, 1)), "Pad takes a tuple of (low, high) pairs"),
    pad_value_of_a_string=(lambda: jp.Pad(((1, 1),), "0"), "Pad: value is a number, not '0'"),
    gelu_of_a_name=(lambda: jp.Gelu("tanh"), "Gelu: approximate is True or False, not 'tanh'"),
) | mistakes(
    ValueError,
    dense_of_nothing=(lambda: jp.Dense(0), "Dense: features is at least 1, not 0"),
    embedding_of_a_negative=(lambda: jp.Embedding(-1, 3), "Embedding: vocab is at least 1, not -1"),
    attention_saving_flash=(
        lambda: jp.Attention(2, save="flash"),
        "save is 'weights' or 'logsumexp', not 'flash'",
    ),
    rotary_base_of_zero=(lambda: jp.Rotary(2, 0), "Rotary: base must be positive, not 0"),
    dropout_of_everything=(lambda: jp.Dropout(1.0), "Dropout: rate is below 1, not 1.0"),
    dropout_of_a_percentage=(lambda: jp.Dropout(50), "Dropout: rate is below 1, not 50"),
    dropout_of_a_negative=(lambda: jp.Dropout(-0.1), "Dropout: rate must not be negative"),
    batch_norm_of_its_features=(lambda: jp.BatchNorm(64), "BatchNorm: momentum is below 1, not 64"),
    layer_norm_eps_of_zero=(lambda: jp.LayerNorm(0.0), "LayerNorm: eps must be positive, not 0.0"),
    conv_groups_of_another=(lambda: jp.Conv(4, groups=3), "groups divides features, 4, but is 3"),
    conv_strides_of_another_rank=(lambda: jp.Conv(4, (3, 3), (2,)), "strides has 1 entries, but"),
    conv_padding_in_lower_case=(lambda: jp.Conv(4, padding="same"), 'padding is "SAME", "VALID"'),
    pool_padding_beyond_the_window=(
        lambda: jp.MaxPool((2, 2), padding=((2, 2), (2, 2))),
        "padding is smaller than the window",
    ),
)

COMBINATORS = mistakes(
    TypeError,
    chain_of_a_class=(lambda: jp.chain(jp.Relu), "chain: layer 0 is the class Relu; write Relu(."),
    chain_of_a_list=(lambda: jp.chain([jp.Relu()]), "chain: layer 0 is not a Layer but [Relu()]"),
    chain_of_a_function=(lambda: jp.chain(jnp.tanh), "chain: layer 0 is not a Layer but <"),
    chain_of_params=(lambda: jp.chain(PARAMS), "not a Layer but (AffineParams(w=float64[3,5], b="),
    chain_of_a_loss=(lambda: jp.chain(NET, CE), "layer 1 is not a Layer but CrossEntropy()"),
    skip_of_none=(lambda: jp.skip(None), "skip: the layer is not a Layer but None"),
    branch_of_a_string=(lambda: jp.branch("relu"), "branch: layer 0 is not a Layer but 'relu'"),
    repeat_of_a_class=(
        lambda: jp.repeat(jp.Tanh, 2),
        "repeat: the layer is the class Tanh; write Tanh(...)",
    ),
    repeat_swapped=(lambda: jp.repeat(3, jp.Tanh()), "repeat: the layer is not a Layer but 3"),
    repeat_of_a_float=(lambda: jp.repeat(jp.Tanh(), 2.0), "repeat: times is a whole number"),
    shared_of_a_string=(lambda: jp.shared(jp.Tanh(), "2"), "shared: times is a whole number"),
    recompute_of_a_class=(
        lambda: jp.recompute(jp.Tanh),
        "recompute: the layer is the class Tanh; write Tanh(",
    ),
    frozen_of_params=(
        lambda: jp.frozen(PARAMS),
        "frozen: the layer is not a Layer but (AffineParams(",
    ),
    tied_of_a_function=(lambda: jp.tied(jp.Embedding(9, 3), jnp.tanh), "tied: the body is not a"),
    cast_of_params=(
        lambda: jp.cast(PARAMS, jnp.bfloat16),
        "cast: net is not a Layer but (AffineParams(",
    ),
    cast_to_none=(lambda: jp.cast(NET, None), "cast takes a floating dtype, not None"),
    cast_to_a_short_name=(lambda: jp.cast(NET, "bf16"), "cast takes a floating dtype, not 'bf16'"),
    cast_to_integers=(lambda: jp.cast(NET, jnp.int8), "cast takes a floating dtype, not int8"),
    inference_mode_of_params=(
        lambda: jp.inference_mode(PARAMS),
        "net is not a Layer but (AffineParams(",
    ),
    inference_mode_of_a_class=(lambda: jp.inference_mode(jp.Relu), "net is the class Relu; write"),
    freeze_of_a_net=(lambda: jp.freeze(NET), "Write jp.freeze(params), or jp.frozen(net)"),
    freeze_of_a_class=(lambda: jp.freeze(jp.Dense), "freeze takes params, whose leaves are arrays"),
    wrapper_of_a_class=(
        lambda: Around(jp.Dense),
        "around: the layer is the class Dense; write Dense(...)",
    ),
    wrapper_of_a_function=(lambda: Around(jnp.tanh), "around: the layer is not a Layer but <"),
    combinator_of_a_class=(
        lambda: Gated(jp.Relu, jp.Relu()).forward(((), ()), X),
        "Gated: gate is the class Relu; write Relu(...)",
    ),
) | mistakes(
    ValueError,
    chain_of_nothing=(lambda: jp.chain(), "chain() needs at least one layer"),
    branch_by_the_mean=(lambda: jp.branch(jp.Relu(), join="mean"), "branch: join is 'sum'"),
    repeat_no_times=(lambda: jp.repeat(jp.Tanh(), 0), "repeat: times is at least 1, not 0"),
    repeat_that_changes_the_shape=(
        lambda: jp.repeat(jp.Dense(4), 2).init(KEY, X),
        "the layer turns float64[4,3] into float64[4,4], but its y is the x of the next",
    ),
    skip_that_changes_the_shape=(
        lambda: jp.skip(jp.Dense(4)).init(KEY, X),
        "the layer turns float64[4,3] into float64[4,4], but x + f(x) needs one shape for both",
    ),
    branch_of_two_shapes=(
        lambda: jp.branch(jp.Dense(4), jp.Dense(3)).init(KEY, X),
        "into float64[4,4], float64[4,3], which cannot be joined by sum",
    ),
    repeat_of_params_unstacked=(
        lambda: jp.repeat(jp.Dense(3), 2).forward(jp.Dense(3).init(KEY, X), X),
        "params.w has shape (3, 3), but axis 0 is the layer, and there are 2",
    ),
    combinator_s_params=(
        lambda: Gated(jp.Relu(), jp.Dense(3)).forward(((),), X),
        "params are ((),), where Dense(3) has no place 1",
    ),
)

NETS = mistakes(
    TypeError,
    init_by_zero=(lambda: NET.init(0, X), "key is a key such as jax.random.key(0), not 0"),
    init_by_a_seed=(lambda: jp.Dense(3).init(42, X), "Dense.init: key is a key such as jax.random"),
    init_by_none=(lambda: NET.init(None, X), "such as jax.random.key(0), not None"),
    init_by_a_string=(lambda: NET.init("key", X), "such as jax.random.key(0), not 'key'"),
    init_by_numbers=(lambda: NET.init(jnp.zeros(2), X), "key(0), not float64[2]"),
    init_swapped=(lambda: NET.init(X, KEY), "Chain.init: key is a key such as jax.random.key(0)"),
    init_of_a_shape=(lambda: NET.init(KEY, (4, 3)), "x must be an array, not (int 4, int 3)"),
    init_of_a_list=(lambda: NET.init(KEY, [[1.0]]), "x must be an array, not [[float 1.0]]"),
    init_of_a_dtype=(lambda: NET.init(KEY, jnp.float32), "x must be an array"),
    init_of_two_arrays=(lambda: NET.init(KEY, (X, X)), "Dense(5) takes an array x, not (float64"),
    init_of_integers=(lambda: NET.init(KEY, IDS), "Dense(5) takes floating x, not int64"),
    init_of_complex=(lambda: NET.init(KEY, COMPLEX), "Dense(5) takes floating x, not complex128"),
    ids_that_are_floats=(lambda: jp.Embedding(7, 3).init(KEY, X), "takes integer ids, not float64"),
    ids_that_are_bools=(lambda: jp.Embedding(7, 3).init(KEY, X > 0), "takes integer ids, not bool"),
    an_image_of_bytes=(
        lambda: forward(jp.Conv(4), IMAGE.astype(jnp.uint8)),
        "Conv(4) takes floating x, not uint8",
    ),
    relu_of_integers=(lambda: jp.Relu().forward((), IDS), "Relu() takes floating x, not int64"),
    sigmoid_of_bools=(lambda: jp.Sigmoid().forward((), X > 0), "Sigmoid() takes floating x"),
    tanh_of_complex=(
        lambda: jp.Tanh().forward((), COMPLEX),
        "Tanh() takes floating x",
    ),
    gelu_of_a_dict=(lambda: jp.Gelu().forward((), {"x": X}), "Gelu() takes an array x, not {'x':"),
    dropout_of_a_list=(
        lambda: jp.Dropout(0.5).forward((), [1.0]),
        "x must be an array, not [float",
    ),
    dropout_of_integers=(lambda: jp.Dropout(0.5).forward((), IDS), "takes floating x, not int64"),
    pooling_of_a_shape=(
        lambda: jp.GlobalAvgPool().init(KEY, (2, 8, 8, 3)),
        "GlobalAvgPool() takes an array x, not (int 2, int 8, int 8, int 3)",
    ),
    backward_of_a_number=(
        lambda: backward(NET, X, 1.0),
        "backward takes ct as an array, not float 1.0",
    ),
    backward_of_a_list=(lambda: backward(jp.Tanh(), X, [[1.0]]), "backward takes ct as an array"),
    key_of_zero=(lambda: value(key=0), "key is a key of jax.random.key, not int 0"),
    key_that_is_old=(
        lambda: DROPPING.bind(DROPPING.init(KEY, X), key=jax.random.PRNGKey(0)),
        "key is a key of jax.random.key, not uint32[2]",
    ),
    mask_of_integers=(
        lambda: ATTENDING.bind((), mask=MASK.astype(int)),
        "True where a query sees a key, not int64[2,4]",
    ),
    mask_that_is_a_list=(
        lambda: ATTENDING.bind((), mask=[[True]]),
        "True where a query sees a key, not [[bool True]]",
    ),
) | mistakes(
    ValueError,
    init_by_several_keys=(
        lambda: NET.init(jax.random.split(KEY), X),
        "Chain.init: key is one key, not an array of them, key<fry>[2]",
    ),
    init_by_several_old_keys=(
        lambda: NET.init(jax.random.split(jax.random.PRNGKey(0)), X),
        "Chain.init: key is one key, not an array of them, uint32[2,2]",
    ),
    init_of_one_example=(lambda: NET.init(KEY, X[0]), "for one example write x[None]"),
    init_of_a_scalar=(lambda: NET.init(KEY, X[0, 0]), "axis 0 the example, not ()"),
    an_image_without_a_batch=(lambda: jp.Conv(4).init(KEY, IMAGE[0]), "shape (N, H, W, C), axis 0"),
    an_image_that_is_too_small=(
        lambda: jp.Conv(4, padding="VALID").init(KEY, IMAGE[:, :2]),
        "Conv(4, padding='VALID'): no window fits into x of shape (2, 2, 8, 3)",
    ),
    attention_without_q_k_and_v=(
        lambda: jp.Attention(2).init(KEY, SEQUENCE[..., :8]),
        "q, k and v packed, with 2 heads dividing D, not float64[2,4,8]",
    ),
    attention_of_a_matrix=(lambda: jp.Attention(1).init(KEY, X), "takes x of shape (N, T, 3D)"),
    rotary_of_odd_heads=(lambda: jp.Rotary(4).init(KEY, SEQUENCE), "an even number of features"),
    positions_that_are_too_few=(
        lambda: jp.Positions(3).init(KEY, SEQUENCE),
        "Positions(3) has 3 positions, x float64[2,4,12] has 4",
    ),
    recurrence_of_a_matrix=(lambda: jp.Gru(3).init(KEY, X), "Gru(3) takes x of shape (N, T, I)"),
    groups_that_do_not_divide=(lambda: jp.GroupNorm(2).init(KEY, X), "channels that 2 groups"),
    reshape_of_other_entries=(lambda: jp.Reshape((2, 2)).init(KEY, X), "an example has 4 elements"),
    pooling_of_a_matrix=(lambda: jp.GlobalAvgPool().init(KEY, X), "with positions, not (4, 3)"),
    relu_of_a_scalar=(lambda: jp.Relu().forward((), X[0, 0]), "axis 0 the example, not ()"),
    params_of_another_width=(
        lambda: NET.forward(OTHER, X),
        "Dense(5): params.w has shape (3, 6), but an input float64[4,3] takes (3, 5)",
    ),
    params_of_none=(
        lambda: NET.forward(None, X),
        "takes a tuple of 3 params, one a layer",
    ),
    params_in_a_list=(lambda: NET.forward(list(PARAMS), X), "of 3 params, one a layer"),
    params_that_are_x=(lambda: NET.forward(X, PARAMS), "one a layer, not float64[4,3]"),
    params_that_are_the_net=(lambda: value(params=NET), "3 params, one a layer, not chain(Dense("),
    params_without_a_bias=(
        lambda: NET.forward((PARAMS[0]._replace(b=None), *PARAMS[1:]), X),
        "Dense(5): params are AffineParams(w=float64[3,5], b=None), but an input",
    ),
    x_of_another_width=(
        lambda: value(x=jnp.ones((4, 7))),
        "Dense(5): params.w has shape (3, 5), but an input float64[4,7] takes (7, 5)",
    ),
    backward_of_another_shape=(
        lambda: backward(NET, X, jnp.ones((4, 3))),
        "Dense(2): ct has shape (4, 3), but x has (4, 5)",
    ),
    backward_of_part_of_the_residuals=(
        lambda: NET.backward(PARAMS, NET.forward(PARAMS, X)[1][:2], T2),
        "takes the residuals that its forward returned, not (float64[4,3], float64[4,5])",
    ),
    backward_of_no_residuals=(
        lambda: NET.backward(PARAMS, None, T2),
        "takes the residuals that its forward returned, not None",
    ),
    backward_of_one_image=(
        lambda: backward(jp.Conv(4), IMAGE, jnp.ones((1, 8, 8, 4))),
        "Conv(4): ct has shape (1, 8, 8, 4), but x has (2, 8, 8, 3)",
    ),
    attention_s_backward_of_one=(
        lambda: backward(jp.Attention(2), SEQUENCE, jnp.ones((1, 4, 4))),
        "Attention(2): ct has shape (1, 4, 4), but y has (2, 4, 4)",
    ),
    mask_that_nobody_takes=(lambda: value(mask=MASK), "no layer takes a mask: chain(Dense(5)"),
    mask_of_other_positions=(
        lambda: ATTENDING.forward(
            ATTENDING.bind(ATTENDING.init(KEY, SEQUENCE), mask=MASK[:, 1:]), SEQUENCE
        ),
        "Attention(2): the mask is bool[2,3], but an input float64[2,4,12] takes",
    ),
    bind_of_other_params=(
        lambda: DROPPING.bind(PARAMS, key=KEY),
        "a chain of 2 layers takes a tuple of 2 params, one a layer, not 3",
    ),
    bind_of_none=(lambda: DROPPING.bind(None, key=KEY), "2 params, one a layer, not None"),
    an_int_that_does_not_fit=(
        lambda: without_x64(lambda: forward(jp.Embedding(7, 3), np.array([[2**32 + 3]]))),
        "an array of int64 holds 4294967299, which does not fit into int32",
    ),
)

ROWS = CONSTRUCTORS | COMBINATORS | NETS


@pytest.mark.parametrize("mistake", ROWS.values(), ids=ROWS)
def test_a_mistake_with_a_net_has_its_sentence(mistake):
    check(mistake)
