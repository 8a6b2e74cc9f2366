"""``check_vjp`` accepts rules that are right, and names what is wrong with the others."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

import jaxprop as jp


def normal(*shape, seed=0):
    return jax.random.normal(jax.random.key(seed), shape)


def ruled(fn, forward, backward, **options):
    """Return fn with its own ``custom_vjp`` rule."""
    decorated = jax.custom_vjp(fn, **options)
    decorated.defvjp(forward, backward)
    return decorated


def affine(params, x):
    return x @ params["w"] + params["b"][None]


def affine_forward(params, x):
    return affine(params, x), (params, x)


def right(residuals, ct):
    params, x = residuals
    return {"w": x.T @ ct, "b": ct.sum(0)}, ct @ params["w"].T


ARGS = {"w": normal(3, 3), "b": normal(3, seed=1)}, normal(3, 3, seed=2)


def changed(change):
    """Return the affine map with its backward changed by change(residuals, ct, d_params, d_x)."""

    def backward(residuals, ct):
        return change(residuals, ct, *right(residuals, ct))

    return ruled(affine, affine_forward, backward)


def coupling(x):
    """x less the mean over all points seen at once, or x itself for one point at a time."""

    def seen(x):
        x = np.asarray(x)
        rows = x.reshape(-1, 3, 3)
        return (x - rows.mean(axis=0) + rows[0] * (len(rows) == 1)).reshape(x.shape)

    of_one = jax.ShapeDtypeStruct(x.shape, x.dtype)
    return jax.pure_callback(seen, of_one, x, vmap_method="expand_dims")


WRONG = {
    "a wrong factor": (lambda res, ct, d, dx: (d, 2 * dx), "d_x disagrees with"),
    "a wrong factor in one leaf": (
        lambda res, ct, d, dx: ({**d, "b": d["b"] * (1 + 1e-7)}, dx),
        r"d_params\['b'\] disagrees with jax.vjp of the undecorated function: at \[\d\] the rule "
        r"gives \S+, the oracle \S+ \(relative error 1.0e-07, allowed 1e-10\)",
    ),
    "a missing term": (lambda res, ct, d, dx: (d, dx.at[1].set(0.0)), r"d_x .* at \[1, \d\]"),
    "swapped arguments": (lambda res, ct, d, dx: ({**d, "w": d["w"].T}, dx), r"d_params\['w'\]"),
    "a cotangent of the wrong shape": (
        lambda res, ct, d, dx: ({**d, "b": ct}, dx),
        r"d_params\['b'\] is float64\[3,3\], but params\['b'\] is float64\[3\]",
    ),
    "a cotangent of the wrong dtype": (
        lambda res, ct, d, dx: (d, dx.astype(jnp.float32)),
        r"d_x is float32\[3,3\], but x is float64\[3,3\]",
    ),
    "a cotangent of the wrong structure": (lambda res, ct, d, dx: (d["w"], dx), "d_params is"),
    "a cotangent too few": (lambda res, ct, d, dx: (d,), "each of params, x"),
    "a cotangent left out": (lambda res, ct, d, dx: (d, None), "d_x disagrees with"),
    "not linear in ct": (lambda res, ct, d, dx: (d, jnp.abs(dx)), "d_x .* linearity in ct"),
    "clipped, for large ct alone": (
        lambda res, ct, d, dx: (d, jnp.clip(dx, -500, 500)),
        "d_x .* linearity in ct",
    ),
    "not of ct alone": (lambda res, ct, d, dx: (d, dx + 1e-3), "d_x .* linearity in ct"),
    "coupled under vmap": (lambda res, ct, d, dx: (d, coupling(dx)), "d_x .* itself under vmap"),
    "wrong in one direction": (
        lambda res, ct, d, dx: (d, dx - 1e-3 * jnp.outer(*2 * [jnp.ones(3)]) * jnp.trace(dx)),
        "d_x disagrees with jax.vjp of the undecorated function",
    ),
    "not finite": (
        lambda res, ct, d, dx: (d, dx / jnp.where(res[1] == res[1][0, 0], 0.0, 1.0)),
        r"d_x is -?inf at \[0, 0\], while y is finite",
    ),
}


@pytest.mark.few(5)
@pytest.mark.parametrize("mistake", WRONG)
def test_names_the_mistake(mistake):
    change, message = WRONG[mistake]
    with pytest.raises(AssertionError, match=f"affine: .*{message}"):
        jp.check_vjp(changed(change), *ARGS)


def test_a_rule_that_jit_breaks_is_found():
    def backward(residuals, ct):
        traced = isinstance(ct, jax.core.Tracer)
        d_params, d_x = right(residuals, ct)
        return d_params, d_x * (1.5 if traced else 1.0)

    with pytest.raises(AssertionError, match="d_x disagrees with itself under jit"):
        jp.check_vjp(ruled(affine, affine_forward, backward), *ARGS)


def test_a_rule_that_couples_the_cotangents_of_one_point_is_found():
    """Under vmap of ct alone the residuals are not batched, and the batching rule here errs."""

    @jax.custom_batching.custom_vmap
    def times(x, ct):
        return x * ct

    @times.def_vmap
    def of_batch(size, batched, x, ct):
        if batched[0]:
            return jax.vmap(lambda x, ct: x * ct)(x, ct), True
        return x[None] * ct[:1] + jnp.zeros_like(ct), True

    f = ruled(lambda x: x**2 / 2, lambda x: (x**2 / 2, x), lambda x, ct: (times(x, ct),))
    with pytest.raises(
        AssertionError, match=r"d_x .* itself under vmap of ct, the second of three"
    ):
        jp.check_vjp(f, normal(3))


def test_a_y_that_is_another_one_when_it_is_differentiated_is_found():
    f = ruled(affine, lambda params, x: (affine(params, x) + 1e-3, (params, x)), right)
    with pytest.raises(AssertionError, match="affine: y changes when it is differentiated"):
        jp.check_vjp(f, *ARGS)


def test_a_dtype_that_is_wrong_only_at_the_dtypes_that_were_given_is_found():
    def backward(x, ct):
        wide = jnp.float64 if ct.dtype == jnp.float64 else jnp.float32
        return (ct.astype(wide) * 2,)

    f = ruled(lambda x: x * 2, lambda x: (x * 2, x), backward)
    jp.check_vjp(f, normal(3))
    with pytest.raises(AssertionError, match=r"d_x is float32\[3\], but x is bfloat16\[3\]"):
        jp.check_vjp(f, normal(3).astype(jnp.bfloat16))


def logsumexp(x):
    high = jnp.max(x)
    return high + jnp.log(jnp.sum(jnp.exp(x - high)))


def gathered(table, ids, scale):
    return table[ids] * scale


@jax.custom_jvp
def softplus(x):
    return jnp.logaddexp(x, jnp.zeros_like(x))


@softplus.defjvp
def softplus_jvp(primals, tangents):
    return softplus(*primals), jax.nn.sigmoid(primals[0]) * tangents[0]


def relu_of_zero():
    return ruled(
        lambda x: jnp.maximum(x, 0),
        lambda x: (jnp.maximum(x, 0), x),
        lambda x, ct: (jnp.where(x > 0, ct, 0),),
    )


RIGHT = {
    "two arguments, one a dict": lambda: (ruled(affine, affine_forward, right), *ARGS),
    "in float32": lambda: (
        ruled(affine, affine_forward, right),
        *jax.tree.map(lambda leaf: leaf.astype(jnp.float32), ARGS),
    ),
    "integers are held": lambda: (
        ruled(
            gathered,
            lambda table, ids, scale: (table[ids] * scale, (table, ids, scale)),
            lambda res, ct: (
                jnp.zeros_like(res[0]).at[res[1]].add(ct * res[2]),
                None,
                jnp.sum(ct * res[0][res[1]]),
            ),
        ),
        normal(4, 2),
        jnp.array([0, 2, 2]),
        2.5,
    ),
    "a function is held": lambda: (
        ruled(
            lambda f, x: f(x),
            lambda f, x: (f(x), x),
            lambda f, x, ct: (jax.vjp(f, x)[1](ct)[0],),
            nondiff_argnums=(0,),
        ),
        jnp.tanh,
        normal(3),
    ),
    "a custom_jvp": lambda: (softplus, normal(2, 3)),
    "a plain function of several outputs, one of integers": lambda: (
        lambda x, y: {"a": x * y, "at": jnp.argmax(x), "b": jnp.sin(y).sum()},
        normal(3),
        normal(3, seed=1),
    ),
    "a reduction": lambda: (
        ruled(logsumexp, lambda x: (logsumexp(x), x), lambda x, ct: (ct * jax.nn.softmax(x),)),
        normal(5),
    ),
    "under jit": lambda: (jax.jit(ruled(affine, affine_forward, right)), *ARGS),
    "at a kink, where the rule picks one side": lambda: (relu_of_zero(), jnp.array([0.0, 1, -1])),
    "a while loop, which autodiff cannot walk back": lambda: (
        ruled(
            fourth_power,
            lambda x: (x**4, x),
            lambda x, ct: (4 * x**3 * ct,),
        ),
        jnp.array(1.3),
    ),
    "no float64": lambda: (only_float32(), normal(3).astype(jnp.float32)),
    "in bfloat16 within": lambda: (
        lambda x: jnp.tanh(x.astype(jnp.bfloat16)).astype(x.dtype),
        normal(4).astype(jnp.float32),
    ),
    "keys": lambda: (
        lambda key, x: x * jax.random.normal(key, x.shape, x.dtype),
        jax.random.key(0),
        normal(3),
    ),
    "what vmap does not take": lambda: (
        ruled(without_vmap, lambda x: (without_vmap(x), x), lambda x, ct: (ct * jnp.cos(x),)),
        normal(3),
    ),
}


def fourth_power(x):
    return jax.lax.while_loop(lambda c: c[0] < 3, lambda c: (c[0] + 1, c[1] * x), (0, x))[1]


def without_vmap(x):
    return jax.pure_callback(np.sin, jax.ShapeDtypeStruct(x.shape, x.dtype), x)


def only_float32():
    def f(x):
        if x.dtype != jnp.float32:
            raise TypeError("float32 only")
        return x**2

    return ruled(f, lambda x: (f(x), x), lambda x, ct: (2 * x * ct,))


@pytest.mark.few(2)
@pytest.mark.parametrize("case", RIGHT)
def test_passes_what_is_right(case):
    jp.check_vjp(*RIGHT[case]())


def test_in_float32_a_wrong_factor_is_found_too():
    f = only_float32()
    f.defvjp(lambda x: (f.fun(x), x), lambda x, ct: (2.01 * x * ct,))
    with pytest.raises(AssertionError, match=r"d_x .* \(relative error 5.0e-03, allowed 1e-04"):
        jp.check_vjp(f, normal(3).astype(jnp.float32))


def test_central_differences_are_an_oracle_of_their_own():
    """Neither autodiff of the undecorated function nor the rule sees a part of the derivative."""

    def half(x):
        return x * jax.lax.stop_gradient(x)

    f = ruled(half, lambda x: (half(x), x), lambda x, ct: (x * ct,))
    with pytest.raises(AssertionError, match="d_x disagrees with central differences"):
        jp.check_vjp(f, normal(3))


def test_a_wrong_value_at_a_point_where_autodiff_gives_none_is_found():
    """sin(x) / x: its derivative at 0 is 0, and autodiff's of the code is not finite."""

    def sinc(x):
        return jnp.where(x == 0, 1.0, jnp.sin(x) / x)

    def rule(at_zero):
        def backward(x, ct):
            away = jnp.where(x == 0, 1.0, x)
            slope = jnp.where(x == 0, at_zero, (jnp.cos(away) - jnp.sin(away) / away) / away)
            return (ct * slope,)

        return ruled(sinc, lambda x: (sinc(x), x), backward)

    jp.check_vjp(rule(0.0), jnp.array([0.0, 1.0]))
    with pytest.raises(AssertionError, match="d_x disagrees with central differences"):
        jp.check_vjp(rule(1.0), jnp.array([0.0, 1.0]))


def hidden_beside_a_large_leaf():
    def f(x, small):
        return 1e8 * jnp.sum(x) + jnp.sum(small)

    def backward(res, ct):
        return jnp.full(res[0].shape, 1e8 * ct), jnp.full(res[1].shape, 2 * ct)

    return ruled(f, lambda x, small: (f(x, small), (x, small)), backward), normal(3), normal(2)


def clipped_ct():
    return changed(lambda res, ct, d, dx: (d, jnp.clip(dx, -500, 500))), *ARGS


def coupled_under_vmap():
    return changed(lambda res, ct, d, dx: (d, coupling(dx))), *ARGS


def of_another_dtype():
    f = ruled(lambda x: x + x, lambda x: (x + x, x), lambda x, ct: (2 * ct.astype(jnp.float32),))
    return f, jnp.array([1.0, 2.0])


@pytest.mark.few(1)
@pytest.mark.parametrize(
    "case", [hidden_beside_a_large_leaf, clipped_ct, coupled_under_vmap, of_another_dtype]
)
def test_what_check_grads_passes(case, standard_promotion):
    f, *args = case()
    check_grads(f, tuple(args), order=1, modes=["rev"])
    with pytest.raises(AssertionError):
        jp.check_vjp(f, *args)


@pytest.mark.parametrize(
    ("args", "error", "message"),
    [
        ((jnp.tanh, jnp.array([1, 2])), ValueError, "no argument of tanh holds floats"),
        ((jnp.argmax, jnp.ones(3)), ValueError, "y of argmax holds no floats"),
        ((jnp.tanh, 1j), TypeError, "takes real floats"),
        ((lambda x: x * 1j, jnp.ones(2)), TypeError, "y is .* takes real floats"),
        ((jnp.tanh, jnp.array([1.0, jnp.nan])), ValueError, "is not finite"),
        ((3, jnp.ones(2)), TypeError, "check_vjp takes a function, not 3"),
        ((lambda x: x,), TypeError, "missing a required argument: 'x'"),
        ((lambda x: jnp.log(x - 2), jnp.ones(2)), AssertionError, "y is not finite"),
    ],
)
def test_what_cannot_be_checked_is_said(args, error, message, standard_promotion):
    with pytest.raises(error, match=message):
        jp.check_vjp(*args)


def test_names_of_several_arguments_and_the_callers_precision_is_left():
    def f(*factors):
        return factors[0] * factors[1]

    rule = ruled(f, lambda *a: (f(*a), a), lambda a, ct: (ct * a[1], 3 * ct * a[0]))
    with jax.enable_x64(False):
        with pytest.raises(AssertionError, match=r"d_factors\[1\] disagrees"):
            jp.check_vjp(rule, jnp.ones(2), jnp.ones(2))
        assert jnp.ones(2).dtype == jnp.float32
