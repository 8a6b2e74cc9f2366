"""Mistakes with explanations, models, pictures and shardings, each with its sentence."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from mistakes import CE, IDS, KEY, NET, OTHER, PARAMS, SE, TARGET, X, check, mistakes, without_x64

import jaxprop as jp

GPT = jp.models.Gpt2Config(vocab=9, length=4, features=8, heads=2, layers=1)


@functools.cache
def explanation(**options):
    return jp.explain(NET, CE, PARAMS, X, TARGET, **options)


def explain(params=PARAMS, x=X, target=TARGET, **options):
    return jp.explain(NET, CE, params, x, target, **options)


def find(params=PARAMS, x=X, target=TARGET, **options):
    return jp.find_nonfinite(NET, CE, params, x, target, **options)


def gpt2(**changed):
    return jp.models.gpt2(GPT._replace(**changed))


@functools.cache
def tensors():
    shapes = jax.eval_shape(jp.models.gpt2(GPT).init, KEY, IDS)
    params = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), shapes)
    return jp.models.gpt2_tensors(params)


def gpt2_params(**changed):
    """The params from tensors, some of them changed or left out."""
    named = {name.replace("_in_", "."): tensor for name, tensor in changed.items()}
    kept = {name: leaf for name, leaf in (tensors() | named).items() if leaf is not None}
    return jp.models.gpt2_params(kept)


def mesh(kind=AxisType.Auto):
    return jax.make_mesh((1,), ("data",), axis_types=(kind,))


EXPLANATIONS = (
    mistakes(
        TypeError,
        keep_of_a_string=(lambda: explain(keep="5"), "explain: keep is a whole number, not '5'"),
        keep_of_none=(lambda: explain(keep=None), "explain: keep is a whole number, not None"),
        keep_of_a_float=(lambda: explain(keep=1e4), "explain: keep is a whole number, not 10000.0"),
        explained_by_zero=(lambda: explain(key=0), "key is a key of jax.random.key, not int 0"),
        explained_without_a_target=(
            lambda: explain(target=None),
            "takes the target as an array",
        ),
        explained_strings=(
            lambda: explain(target=np.array(list("abcd"))),
            "target is of <U1, where JAX",
        ),
        explained_objects=(
            lambda: find(x=np.array([[None]])),
            "x is of object, where JAX takes numbers",
        ),
        found_under_jit=(
            lambda: jax.jit(find)(PARAMS),
            "looks at values: call it outside of jax.jit",
        ),
        an_example_s_name=(
            lambda: explanation().example("1"),
            "an example is a whole number, not '1'",
        ),
        a_float_for_an_example=(lambda: explanation().example(1.0), "is a whole number, not 1.0"),
        a_weight_s_name=(
            lambda: explanation()["0.w"]["a"],
            "an index along an axis is a whole number, not 'a'",
        ),
        a_slice_of_weights=(
            lambda: explanation()["0.w"][:],
            "0.w: an index along an axis is a whole",
        ),
    )
    | mistakes(
        ValueError,
        keep_of_a_negative=(lambda: explain(keep=-1), "explain: keep is at least 0, not -1"),
        explained_params_of_another_net=(
            lambda: explain(OTHER),
            "Dense(5): params.w has shape (3, 6), but an input float64[4,3] takes (3, 5)",
        ),
        explained_params_swapped=(
            lambda: explain(X, PARAMS),
            "3 params, one a layer, not float64[4,3]",
        ),
        found_params_of_none=(lambda: find(None), "chain(Dense(5), Relu(), Dense(2))"),
        explained_int_that_does_not_fit=(
            lambda: without_x64(lambda: explain(target=np.array([0, 1, 2**32, 0]))),
            "target of int64 holds 4294967296, which does not fit into int32",
        ),
        an_array_that_was_not_kept=(
            lambda: explanation(keep=0).layers["0"].x,
            "Dense(5): only summaries were kept; explain(..., keep=N) keeps all",
        ),
    )
    | mistakes(
        IndexError,
        an_example_too_many=(lambda: explanation().example(4), "example 4: there are 4"),
        a_weight_out_of_reach=(
            lambda: explanation()["0.w"][3, 0],
            "0.w[3, 0]: its shape is (3, 5)",
        ),
        a_weight_by_one_index=(lambda: explanation()["0.w"][0], "0.w[0]: its shape is (3, 5)"),
    )
    | mistakes(
        KeyError,
        a_param_without_its_layer=(
            lambda: explanation()["w"],
            "no param that is learned is called 'w'",
        ),
        a_param_by_number=(lambda: explanation()[0], "is called 0; there are 0.w, 0.b, 2.w, 2.b"),
    )
)

MODELS = (
    mistakes(
        TypeError,
        gpt2_of_none=(lambda: jp.models.gpt2(None), "gpt2: config is not a Gpt2Config but None"),
        gpt2_of_a_dict=(
            lambda: jp.models.gpt2({"vocab": 5}),
            "gpt2: config is not a Gpt2Config but {'",
        ),
        gpt2_of_a_class=(
            lambda: jp.models.gpt2(jp.models.Gpt2Config),
            "gpt2: config is the class Gpt2Config; write Gpt2Config(...)",
        ),
        gpt2_of_float_features=(
            lambda: gpt2(features=8.0),
            "gpt2: features is a whole number, not 8.0",
        ),
        gpt2_of_string_layers=(lambda: gpt2(layers="2"), "gpt2: layers is a whole number, not '2'"),
        gpt2_of_no_dropout=(lambda: gpt2(dropout=None), "gpt2: dropout is a number, not None"),
        gpt2_scanned_by_a_word=(
            lambda: jp.models.gpt2(GPT, scan="no"),
            "scan is True or False, not 'no'",
        ),
        gpt2_of_float_ids=(
            lambda: gpt2().init(KEY, X),
            "Embedding(9, 8) takes integer ids, not float64[4,3]",
        ),
        tensors_of_a_net=(
            lambda: jp.models.gpt2_params(gpt2()),
            "gpt2_params: tensors is not a Mapping but tied(",
        ),
        classes_as_a_string=(
            lambda: jp.models.three_c3d("10"),
            "Dense: features is a whole number",
        ),
    )
    | mistakes(
        ValueError,
        gpt2_of_heads_that_do_not_divide=(
            lambda: gpt2(heads=3),
            "heads divides the 8 features, but is 3",
        ),
        gpt2_of_no_layers=(lambda: gpt2(layers=0), "gpt2: layers is at least 1, not 0"),
        gpt2_of_a_negative_vocab=(lambda: gpt2(vocab=-1), "gpt2: vocab is at least 1, not -1"),
        gpt2_of_all_dropped=(lambda: gpt2(dropout=1.0), "gpt2: dropout is below 1, not 1.0"),
        gpt2_of_more_than_its_length=(
            lambda: gpt2().init(KEY, jnp.zeros((2, 5), int)),
            "Positions(4) has 4 positions, x float64[2,5,8] has 5",
        ),
        a_tensor_transposed=(
            lambda: gpt2_params(h_in_0_in_attn_in_c_attn_in_weight=np.zeros((24, 8))),
            "h.0.attn.c_attn.weight has shape (24, 8), but in a GPT-2 of 8 features it is (8, 24)",
        ),
        a_bias_of_another_width=(
            lambda: gpt2_params(h_in_0_in_mlp_in_c_fc_in_bias=np.zeros(8)),
            "h.0.mlp.c_fc.bias has shape (8,), but in a GPT-2 of 8 features it is (32)",
        ),
        a_tensor_too_many=(lambda: gpt2_params(score=np.zeros(3)), "a GPT-2 has no tensor 'score'"),
        a_head_of_its_own=(
            lambda: gpt2_params(lm_head_in_weight=np.ones((9, 8))),
            "lm_head.weight is not the table wte.weight, which this GPT-2 scores by",
        ),
        tensors_of_other_params=(
            lambda: jp.models.gpt2_tensors(PARAMS),
            "gpt2_tensors takes the params of a gpt2 with scan and without dropout",
        ),
        tensors_of_params_unstacked=(
            lambda: jp.models.gpt2_tensors(
                jax.eval_shape(jp.models.gpt2(GPT, scan=False).init, KEY, IDS)
            ),
            "gpt2_tensors takes the params of a gpt2 with scan",
        ),
        a_directory_for_a_file=(lambda: jp.models.load_gpt2("."), "file, and . is a directory"),
        images_that_are_too_small=(
            lambda: jax.eval_shape(jp.models.three_c3d().init, KEY, jnp.zeros((2, 8, 8, 3))),
            "no window fits into x of shape (2, 2, 2, 64)",
        ),
    )
    | mistakes(
        KeyError,
        tensors_of_nothing=(lambda: jp.models.gpt2_params({}), "a GPT-2 of 0 blocks has a tensor"),
        a_tensor_too_few=(
            lambda: gpt2_params(h_in_0_in_ln_1_in_bias=None),
            "a GPT-2 of 1 blocks has a tensor 'h.0.ln_1.bias', which is missing",
        ),
    )
)

PICTURES = mistakes(
    TypeError,
    scales_of_one=(
        lambda: jp.plot.scales(explanation()),
        "scales takes a list of explanations, not Explanation",
    ),
    scales_of_none=(
        lambda: jp.plot.scales(None),
        "scales takes a list of explanations",
    ),
    scales_of_numbers=(lambda: jp.plot.scales([1.0]), "explanation 0 is not a Explanation but 1.0"),
    scales_at_strings=(
        lambda: jp.plot.scales([explanation()], ["a"]),
        "steps are an array",
    ),
    norms_of_gradients=(
        lambda: jp.plot.norms(PARAMS),
        "squared norms are an array of numbers",
    ),
    norms_of_strings=(lambda: jp.plot.norms(["a"]), "norms: squared norms are an array of numbers"),
    norms_under_a_string=(
        lambda: jp.plot.norms([1.0], "1"),
        "norms: max_norm is a number, not '1'",
    ),
    gram_of_the_net=(
        lambda: jp.plot.gram(NET),
        "gram: inner products are an array of numbers, not",
    ),
) | mistakes(
    ValueError,
    scales_of_nothing=(lambda: jp.plot.scales([]), "scales: there is no explanation to draw"),
    scales_of_two_nets=(
        lambda: jp.plot.scales([explanation(), jp.explain(jp.Tanh(), SE, (), X, X)]),
        "scales: the explanations are of different nets",
    ),
    scales_at_other_steps=(
        lambda: jp.plot.scales([explanation()], [1, 2]),
        "2 steps for 1",
    ),
    norms_of_a_matrix=(
        lambda: jp.plot.norms(X),
        "norms takes squared norms of shape (N,), not (4,",
    ),
    norms_of_a_negative=(
        lambda: jp.plot.norms([-1.0]),
        "a squared norm is not negative, as -1.0",
    ),
    norms_under_zero=(lambda: jp.plot.norms([1.0], 0), "norms: max_norm must be positive, not 0"),
    gram_of_a_row=(
        lambda: jp.plot.gram(X[0]),
        "gram takes inner products of shape (N, N), not (3,)",
    ),
    gram_with_other_labels=(lambda: jp.plot.gram(jnp.eye(3), [1, 2]), "labels of shape (2,) for 3"),
)

SHARDINGS = mistakes(
    TypeError,
    sharding_of_a_net=(
        lambda: jp.sharding.fully_sharded(NET, mesh()),
        "params have a place, a net",
    ),
    sharding_swapped=(
        lambda: jp.sharding.fully_sharded(mesh(), PARAMS),
        "the mesh is not a Mesh",
    ),
    sharding_over_none=(
        lambda: jp.sharding.fully_sharded(PARAMS, None),
        "the mesh is not a Mesh",
    ),
    sharding_below_a_string=(
        lambda: jp.sharding.fully_sharded(PARAMS, mesh(), smallest="1"),
        "smallest is a whole number, not '1'",
    ),
    vocab_of_a_string=(
        lambda: jp.sharding.tensor_parallel(PARAMS, mesh(), "data", vocab="9"),
        "vocab is a whole number, not '9'",
    ),
    gathered_swapped=(
        lambda: jp.sharding.gathered(mesh(), NET),
        "gathered is not a Layer but Mesh",
    ),
) | mistakes(
    ValueError,
    sharding_over_no_axis=(
        lambda: jp.sharding.tensor_parallel(PARAMS, mesh(), "model"),
        "the mesh has the axes ('data',), and no 'model'",
    ),
    sharding_over_a_list=(
        lambda: jp.sharding.fully_sharded(PARAMS, mesh(), ["data"]),
        "the mesh has the axes ('data',), and no ['data']",
    ),
    sharding_over_explicit_axes=(
        lambda: jp.sharding.fully_sharded(PARAMS, mesh(AxisType.Explicit)),
        "the mesh must be one of Auto axes",
    ),
)

ROWS = EXPLANATIONS | MODELS | PICTURES | SHARDINGS


@pytest.mark.parametrize("mistake", ROWS.values(), ids=ROWS)
def test_a_mistake_elsewhere_has_its_sentence(mistake):
    check(mistake)
