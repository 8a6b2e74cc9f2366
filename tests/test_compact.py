"""Forms that have to answer more than one question, from g_n itself if there is room for it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxprop as jp
from jaxprop.core.forms import (
    Factored,
    Rearranged,
    Repeated,
    Sides,
    Stacked,
    Sum,
    Transposed,
    joint,
)
from jaxprop.core.forms.biased import with_bias
from jaxprop.layers.embedding import Rows
from jaxprop.layers.patches import Patches
from jaxprop.layers.positions import Leading
from jaxprop.layers.windows import Windows

N = 6


def normal(*shape, dtype=np.float64):
    return jnp.asarray(np.random.default_rng(sum(shape)).normal(size=shape), dtype)


def outer(positions, i, o, dtype=np.float64):
    return jp.Outer(normal(N, *positions, i, dtype=dtype), normal(N, *positions, o, dtype=dtype))


def patches(side, channels, features):
    windows = Windows((3, 3), (1, 1), ((1, 1), (1, 1)), (1, 1), (1, 1))
    return Patches(normal(N, side, side, channels), normal(N, side, side, features), windows)


FORMS = {
    "no positions": (outer((), 5, 4), False),
    "a few positions": (outer((3,), 8, 8), False),
    "many positions": (outer((9,), 5, 4), True),
    "as many": (outer((4,), 8, 8), True),
    "small images": (patches(3, 4, 8), False),
    "large images": (patches(9, 4, 8), True),
    "a large table": (Rows(jnp.zeros((N, 3), int), normal(N, 3, 4), 50), False),
    "a small table": (Rows(jnp.zeros((N, 9), int), normal(N, 9, 4), 2), True),
    "rearranged": (Rearranged(outer((9,), 5, 4), (Transposed((1, 0)),)), True),
    "layers": (Repeated(jp.Outer(normal(2, N, 9, 5), normal(2, N, 9, 4))), True),
    "used twice": (jp.Joint((outer((9,), 5, 4), outer((3,), 5, 4))), True),
}


@pytest.mark.few(3)
@pytest.mark.parametrize("name", FORMS)
def test_it_answers_the_same(name):
    form, formed = FORMS[name]
    compact = form.compact()
    inner = compact.form if isinstance(compact, Rearranged | Repeated) else compact
    assert isinstance(inner, Stacked) == formed
    weights = jnp.linspace(0.2, 1.0, N)
    kept = weights > 0.5
    for ask in (
        lambda form: form.norms(),
        lambda form: form.sq_norms(),
        lambda form: form.weighted_sum(weights),
        lambda form: form.only(kept).weighted_sum(weights),
        lambda form: form.sum(),
        lambda form: form.per_example(),
    ):
        np.testing.assert_allclose(ask(compact), ask(form), rtol=1e-10, atol=1e-12)


def test_a_narrow_form_is_formed_in_float32():
    form = outer((9,), 5, 4, jnp.bfloat16)
    compact = form.compact()
    assert compact.g.dtype == jnp.float32
    np.testing.assert_array_equal(compact.weighted_sum(jnp.ones(N)).dtype, jnp.float32)
    exact = jnp.einsum("nti,nto->nio", *(a.astype(jnp.float32) for a in (form.x, form.ct)))
    np.testing.assert_allclose(compact.g, exact, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    "form",
    [
        outer((3,), 5, 4),
        Leading(normal(N, 3, 4), 5),
        Rows(jnp.arange(3 * N).reshape(N, 3) % 5, normal(N, 3, 4), 5),
    ],
    ids=["a matrix", "positions", "a table"],
)
def test_the_product_with_another_form_of_the_same_param(form):
    """As for a param that is used in two ways; also projected from both sides."""
    other, sides = Stacked(normal(2, 5, 4)), Sides(normal(5, 2), normal(4, 3))
    got = form.for_products(other).products_with(other.for_products(form))
    g = form.per_example()
    np.testing.assert_allclose(got, jnp.einsum("nio,mio->nm", g, other.g), rtol=1e-12)
    seen = jnp.einsum("nio,ik,ol->nkl", g, *sides)
    np.testing.assert_allclose(form.projected(sides), seen, rtol=1e-12)
    np.testing.assert_allclose(Factored.projected(form, sides), seen, rtol=1e-12)
    assert form.sizes == (5, 4)


def test_the_product_of_a_rearranged_form_with_another():
    form, other = Rearranged(outer((3,), 4, 5), (Transposed((1, 0)),)), Stacked(normal(2, 5, 4))
    got = form.for_products(other).products_with(other.for_products(form))
    expected = jnp.einsum("nio,mio->nm", form.per_example(), other.g)
    np.testing.assert_allclose(got, expected, rtol=1e-12)


def test_a_bias_joins_its_matrix_alone():
    x, ct = normal(2, N, 5), normal(2, N, 4)
    both = with_bias(Repeated(jp.Outer(x, ct)), Repeated(Sum(ct)))
    np.testing.assert_array_equal(both.form.x, np.concatenate([x, np.ones((2, N, 1))], axis=-1))
    assert with_bias(Leading(ct, 7), Sum(ct)) is None  # a form without an x


def test_two_uses_of_a_table_are_no_product_over_more_positions():
    rows = Rows(jnp.arange(3 * N).reshape(N, 3) % 5, normal(N, 3, 4), 5)
    more = Rows(jnp.ones((N, 2), int), normal(N, 2, 4), 5)
    expected = rows.per_example() + more.per_example()
    np.testing.assert_allclose(joint((rows, more)).per_example(), expected, rtol=1e-15)


def test_a_form_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Sum(normal(N, 4)).ct = None


def test_a_bias_is_added_up_over_positions():
    form = Sum(normal(N, 7, 4))
    assert form.compact().ct.shape == (N, 4)
    np.testing.assert_allclose(form.compact().norms(), form.norms())


def test_clipping_forms_the_gradient_of_an_example_once():
    """For a square matrix: one product of x and ct instead of two, and no <X X^T, C C^T>."""
    net, loss = jp.Dense(8), jp.HalfSquaredError()
    x = normal(N, 8, 8)
    params = net.init(jax.random.key(0), x)

    def products(f):
        return jax.jit(f).lower(params, x, x).compile().as_text().count(" dot(")

    clipped = jp.clipped_grad(net, loss, 1.0)
    assert products(clipped) <= products(jp.value_and_grad(net, loss)) + 1  # the weighted sum
