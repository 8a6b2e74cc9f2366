"""The first non-finite number is found in the equation that made it, on the user's own line.

Ten classical cases, in the styles of plain JAX, Flax and Equinox. ``jax.debug_nans`` stops at the
first primitive with a NaN in its result and names it: in the backward pass, an equation that nobody
wrote; after an overflow, the equation of the first NaN downstream; in a scan, the scan itself.
"""

import re
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from table import normal

import jaxprop as jp

pytestmark = pytest.mark.usefixtures("standard_promotion")
SOURCE = Path(__file__).read_text().splitlines()
LOSS, MEAN = jp.HalfSquaredError(), jp.Mean()
X = jnp.asarray(normal(4, 3))


class Case(NamedTuple):
    """A function that fails at an example, and the expected report."""

    fn: Any
    params: Any
    x: Any
    example: int
    back: bool
    primitive: str
    source: str
    given: tuple[float, ...]
    cause: str
    debug_nans: str
    loss: jp.Loss = MEAN


def masked_root():
    def fn(params, x):
        h = jnp.tanh(x @ params)
        kept = jnp.sqrt(h)
        return jnp.where(h > 0, kept, 0).sum(-1)

    x = jnp.abs(X).at[2].set(0)
    cause = r"slope of sqrt at 0 is infinite. The `where` at test_births.py:\d+ takes its other"
    return Case(fn, jnp.eye(3), x, 2, True, "sqrt", "kept = jnp.sqrt(h)", (0,), cause, "mul")


def norm_of_zeros():
    nn = pytest.importorskip("flax.linen")

    class Distance(nn.Module):
        @nn.compact
        def __call__(self, x):
            h = nn.Dense(4, use_bias=False, name="first")(x)
            return jnp.linalg.norm(h, axis=-1)

    x = X.at[1].set(0)
    model = Distance()
    params = model.init(jax.random.key(0), x)
    source, cause = "return jnp.linalg.norm(h, axis=-1)", "a norm of zeros"
    return Case(model.apply, params, x, 1, True, "sqrt", source, (0,), cause, "mul")


def log_of_zero():
    def fn(params, batch):
        x, target = batch
        likely = jax.nn.sigmoid(x @ params)
        return -jnp.mean(target * jnp.log(likely))

    x = -jnp.abs(X).at[:3].mul(1e-3), jnp.ones(4)
    params = jnp.full(3, 1e4)
    source, cause = "return -jnp.mean(target * jnp.log(likely))", "The logarithm of 0 is -inf"
    return Case(fn, params, x, 3, False, "log", source, (0,), cause, "mul")


def division_by_zero():
    eqx = pytest.importorskip("equinox")

    class Unit(eqx.Module):
        linear: eqx.nn.Linear

        def __call__(self, x):
            h = self.linear(x)
            return h / jnp.sqrt(h @ h)

    model = Unit(eqx.nn.Linear(3, 2, use_bias=False, key=jax.random.key(0)))
    params, static = eqx.partition(model, eqx.is_array)

    def fn(params, x):
        return jax.vmap(eqx.combine(params, static))(x)

    x = X.at[3].set(0)
    source, cause = "return h / jnp.sqrt(h @ h)", "0 / 0 is nan"
    return Case(fn, params, x, 3, False, "div", source, (0, 0), cause, "div", LOSS)


def masked_overflow():
    def fn(params, x):
        h = x * params
        grown = jnp.exp(h)
        return jnp.where(h < 100, grown, h)

    x = X.at[1, 2].set(1e3)
    cause = "exp gives inf there on the way forward. The `where` at .* but 0 · inf is nan"
    params = jnp.ones(3)
    return Case(fn, params, x, 1, True, "exp", "grown = jnp.exp(h)", (1e3,), cause, "mul", LOSS)


def naive_softmax():
    nn = pytest.importorskip("flax.linen")

    class Classes(nn.Module):
        @nn.compact
        def __call__(self, x):
            grown = jnp.exp(nn.Dense(3, name="head")(x))
            return grown / grown.sum(-1, keepdims=True)

    x = X.at[0].set(jnp.array([900, 0, 0]))
    params = {"params": {"head": {"kernel": jnp.eye(3), "bias": jnp.zeros(3)}}}
    source, cause = 'grown = jnp.exp(nn.Dense(3, name="head")(x))', "exp overflows above 710"
    return Case(Classes().apply, params, x, 0, False, "exp", source, (900,), cause, "div", LOSS)


def nothing_to_attend_to():
    eqx = pytest.importorskip("equinox")

    class Attend(eqx.Module):
        scores: eqx.nn.Linear

        def __call__(self, x):
            scores = jnp.where(x > 0, self.scores(x), -jnp.inf)
            return jax.nn.softmax(scores) @ x

    model = Attend(eqx.nn.Linear(3, 3, key=jax.random.key(0)))
    params, static = eqx.partition(model, eqx.is_array)

    def fn(params, x):
        return jax.vmap(eqx.combine(params, static))(x)

    x = jnp.abs(X).at[2].mul(-1)
    source, cause = "return jax.nn.softmax(scores) @ x", "a row that is masked as a whole"
    given = (-np.inf, -np.inf)
    return Case(fn, params, x, 2, False, "sub", source, given, cause, "sub")


def power_of_a_negative_number():
    def fn(params, x):
        return x ** params["power"]

    x = jnp.abs(X).at[1, 1].mul(-1)
    params = {"power": jnp.asarray(1.5)}
    cause = "A negative number to a power that is no whole number is nan"
    given = (float(x[1, 1]), 1.5)
    source = 'return x ** params["power"]'
    return Case(fn, params, x, 1, False, "pow", source, given, cause, "pow", LOSS)


def deviation_of_equal_numbers():
    nn = pytest.importorskip("flax.linen")

    class Scaled(nn.Module):
        @nn.compact
        def __call__(self, x):
            h = nn.Dense(3, use_bias=False, name="first")(x)
            return h / (1e-5 + h.std(-1, keepdims=True))

    model, x = Scaled(), X.at[2].set(0)
    params = model.init(jax.random.key(0), x)
    source, cause = "return h / (1e-5 + h.std(-1, keepdims=True))", "deviation of equal numbers"
    return Case(model.apply, params, x, 2, True, "sqrt", source, (0,), cause, "mul", LOSS)


def overflow_in_a_scan():
    def fn(params, x):
        def step(h, x_t):
            h = h * jnp.exp(x_t @ params)
            return h, h

        return jax.lax.scan(step, jnp.ones((len(x), 3)), jnp.moveaxis(x, 1, 0))[0]

    x = jnp.zeros((4, 6, 3)).at[3, 4].set(jnp.array([1, 2, 800]))
    source, cause = "h = h * jnp.exp(x_t @ params)", "exp overflows above 710"
    return Case(fn, jnp.eye(3), x, 3, False, "exp", source, (800,), cause, "scan", LOSS)


CASES = [
    masked_root,
    norm_of_zeros,
    log_of_zero,
    division_by_zero,
    masked_overflow,
    naive_softmax,
    nothing_to_attend_to,
    power_of_a_negative_number,
    deviation_of_equal_numbers,
    overflow_in_a_scan,
]


def line_of(source):
    (number,) = [n for n, line in enumerate(SOURCE, 1) if line.strip() == source]
    return f"test_births.py:{number}"


def find(case):
    target = None
    if case.loss is LOSS:
        target = jax.tree.map(jnp.zeros_like, case.fn(case.params, case.x))
    return jp.find_nonfinite(jp.function(case.fn), case.loss, case.params, case.x, target)


@pytest.mark.few(1)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_the_classical_cases(case):
    case = case()
    found = find(case)
    birth = found.birth
    assert birth is not None, found
    assert (birth.source, birth.line) == (case.source, line_of(case.source))
    assert (birth.primitive, birth.back, birth.example) == (case.primitive, case.back, case.example)
    assert found.phase == ("backward" if case.back else "forward")
    assert not np.isfinite(birth.value)
    np.testing.assert_allclose([g.one for g in birth.given[: len(case.given)]], case.given)
    assert re.search(case.cause, birth.cause)
    assert max(map(len, str(found).splitlines())) <= 80


def test_the_step_of_a_scan():
    found = find(overflow_in_a_scan())
    (step,) = found.birth.steps
    assert (step.at, step.loop) == (4, "scan")
    assert step.line == line_of(
        "return jax.lax.scan(step, jnp.ones((len(x), 3)), jnp.moveaxis(x, 1, 0))[0]"
    )
    assert ", in step 4 of the scan at test_births.py:" in str(found).replace("\n", " ")


def test_the_scope_of_a_module():
    assert find(norm_of_zeros()).birth.scope == "Distance"


def each(one):
    """A function of a batch, from a function of one example."""

    def fn(params, x):
        return jax.vmap(lambda x: one(params, x))(x)

    return fn


def find_in(fn, params, x, loss=MEAN, target=None):
    found = jp.find_nonfinite(jp.function(fn), loss, params, x, target)
    assert found.birth is not None, found
    return found.birth


def test_the_step_of_a_scan_on_the_way_back():
    def one(params, x):
        def step(h, x_t):
            root = jnp.sqrt(x_t * params)
            return h + jnp.where(x_t > 0, root, 0), None

        return jax.lax.scan(step, jnp.zeros(()), x)[0]

    birth = find_in(each(one), jnp.ones(()), jnp.ones((3, 7)).at[1, 5].set(0).at[1, 2].set(0))
    assert (birth.source, birth.back) == ("root = jnp.sqrt(x_t * params)", True)
    assert ([step.at for step in birth.steps], birth.example) == ([5], 1)  # backward from the end
    assert "takes its other value" in birth.cause


def test_a_scan_from_its_end_and_what_it_stacks():
    def one(params, x):
        def step(h, x_t):
            return h, h / (x_t * params)

        return jax.lax.scan(step, jnp.ones(()), x, reverse=True)[1].sum()

    birth = find_in(each(one), jnp.ones(()), jnp.ones((3, 7)).at[1, 5].set(0).at[1, 2].set(0))
    assert [step.at for step in birth.steps] == [5]
    assert birth.cause == "This is a division by 0."


def test_a_carried_infinity_that_is_meant():
    def one(params, x):
        def step(largest, x_t):
            return jnp.maximum(largest, x_t), jnp.exp(x_t * params)

        largest, grown = jax.lax.scan(step, -jnp.inf, x)
        return largest + grown.sum()

    birth = find_in(each(one), jnp.ones(()), jnp.ones((2, 5)).at[1, 3].set(1e3))
    assert (birth.primitive, birth.example, birth.steps[0].at) == ("exp", 1, 3)


def test_a_loop_without_a_length():
    def fn(params, x):
        def body(state):
            n, h = state
            return n + 1, jnp.exp(h)

        found = jax.lax.while_loop(lambda state: state[0] < 5, body, (0, x))[1]
        return params * jax.lax.stop_gradient(found)

    birth = find_in(fn, jnp.ones(()), jnp.zeros(2))
    assert (birth.source, birth.steps[0].at) == ("return n + 1, jnp.exp(h)", 4)


@pytest.mark.full
def test_inside_of_jit_checkpoint_and_cond():
    @jax.jit
    def inner(x):
        return jnp.log(x)

    def fn(params, x):
        part = jax.checkpoint(lambda x: jax.lax.cond(params > 0, inner, jnp.sin, x))
        return jnp.where(x > 0, part(x * params), 0)

    birth = find_in(fn, jnp.ones(()), jnp.asarray([[1.0], [0.0]]), LOSS, jnp.ones((2, 1)))
    assert (birth.source, birth.back, birth.example) == ("return jnp.log(x)", True, 1)


def test_a_rule_of_one_s_own():
    @jax.custom_vjp
    def root(x):
        return jnp.sqrt(x)

    def backward(y, ct):
        return (ct / (2 * y),)

    root.defvjp(lambda x: (root(x), root(x)), backward)

    def fn(params, x):
        return root(x * params)

    birth = find_in(fn, jnp.ones(()), jnp.asarray([1.0, 0.0]))
    assert (birth.source, birth.rule, birth.back) == ("return (ct / (2 * y),)", "root", True)
    assert (birth.primitive, birth.cause) == ("div", "This is a division by 0.")


def test_what_jax_does_not_multiply():
    """Values that are cut off, rounded or unused have no cotangent that could be 0 · inf."""

    def fn(params, x):
        zero = jnp.sqrt(jax.lax.stop_gradient(x * 0))
        floor = jnp.sqrt(jnp.floor(x * 0 * params))
        both = jax.jit(lambda x: (jnp.log(x), jnp.sqrt(x * 0)))(x * params)
        return zero + floor + both[0]

    birth = find_in(fn, jnp.ones(()), jnp.asarray([[1.0], [0.0]]))
    assert (birth.primitive, birth.back) == ("log", False)
    x = jnp.asarray([[1.0], [2.0]])
    assert not jp.find_nonfinite(jp.function(fn), MEAN, jnp.ones(()), x)


def test_a_sum_over_examples_that_overflows():
    x, target = jnp.full((4, 1), 1e19, jnp.float32), jnp.zeros((4, 1), jnp.float32)
    params = jnp.full((1, 1), 1.0, jnp.float32)

    def fn(params, x):
        return x @ params

    birth = find_in(fn, params, x, LOSS, target)
    assert (birth.primitive, birth.back, birth.example) == ("dot_general", True, None)
    assert "float32 goes to 3.4e+38" in birth.cause


def test_a_cast():
    x = jnp.full((2, 1), 7e4, jnp.float32)
    birth = find_in(lambda params, x: (x * params).astype(jnp.float16), jnp.ones(()), x, LOSS, x)
    assert (birth.primitive, birth.cause) == (
        "convert_element_type",
        "The number is too large for a cast: float16 goes to 6.6e+04.",
    )


@pytest.mark.full
def test_layers_of_the_library():
    net = jp.chain(jp.Dense(2), jp.Dense(1))
    x = jnp.full((3, 1), 1e200).at[0].set(1)
    params = jax.tree.map(lambda leaf: jnp.full_like(leaf, 1e120), net.init(jax.random.key(0), x))
    birth = jp.find_nonfinite(net, LOSS, params, x, x).birth
    assert (birth.primitive, birth.example, birth.index) == ("dot_general", 1, (1, 0))
    assert birth.line.startswith("jaxprop/layers/dense.py:")
    assert birth.cause == "The sum overflows: float64 goes to 1.8e+308."


def test_a_layer_that_is_cast():
    x, net = jnp.ones((2, 1), jnp.float32), jp.cast(jp.chain(jp.Dense(1), jp.Dense(1)), jnp.float16)
    params = (jp.AffineParams(jnp.full((1, 1), 300.0), jnp.zeros(1)),) * 2
    birth = jp.find_nonfinite(net, LOSS, params, x, x).birth
    assert (birth.primitive, birth.cause) == (
        "dot_general",
        "The sum overflows: float16 goes to 6.6e+04.",
    )


FIRST = [jp.Dense(1), jp.Relu(), jp.function(lambda w, x: x * w, lambda key, x: jnp.ones(()))]


@pytest.mark.parametrize("layer", FIRST, ids=str)
def test_an_overflow_of_the_cast_itself(layer):
    x, net = jnp.full((2, 1), 7e4), jp.cast(jp.chain(layer, jp.Dense(1)), jnp.float16)
    birth = jp.find_nonfinite(net, LOSS, net.init(jax.random.key(0), x), x, x).birth
    assert (birth.primitive, birth.cause, birth.back) == (
        "convert_element_type",
        "The number is too large for a cast: float16 goes to 6.6e+04.",
        False,
    )


class Root(jp.Layer):
    """y = sqrt(x), whose slope is infinite at 0."""

    def forward(self, params, x):
        y = jnp.sqrt(x)
        return y, y

    def backward(self, params, y, ct):
        slope = 1 / (2 * y)
        return (), ct * slope


def test_a_backward_written_by_hand():
    x = jnp.ones((3, 2)).at[1, 1].set(0)
    net = jp.chain(jp.Dense(2), Root())
    params = (jp.AffineParams(jnp.eye(2), jnp.zeros(2)), ())
    found = jp.find_nonfinite(net, LOSS, params, x, x)
    birth = found.birth
    assert (found.layer, found.array, birth.source) == ("1", "d_x", "slope = 1 / (2 * y)")
    assert (birth.example, birth.index, birth.back) == (1, (1, 1), True)
    assert birth.cause == "This is a division by 0."


def distance(y, target):
    return jnp.sqrt(jnp.sum((y - target) ** 2))


@pytest.mark.full
def test_the_loss():
    loss, params = jp.loss(distance), jp.AffineParams(jnp.eye(2), jnp.zeros(2))
    x = jnp.asarray(normal(3, 2))
    found = jp.find_nonfinite(jp.Dense(2), loss, params, x, x.at[:2].add(1))
    birth = found.birth
    assert (found.phase, found.array, birth.example) == ("loss", "d_x", 2)
    assert birth.source == "return jnp.sqrt(jnp.sum((y - target) ** 2))"
    assert "a norm of zeros" in birth.cause
    target = jnp.array([0, 5, 1])
    birth = jp.find_nonfinite(jp.Dense(2), jp.CrossEntropy(), params, x, target).birth
    assert (birth.primitive, birth.example) == ("gather", 1)
    assert birth.cause.startswith("An index is outside of the array")


@pytest.mark.full
def test_the_turn_of_a_loop_of_layers():
    net = jp.chain(jp.repeat(jp.function(lambda params, x: jnp.exp(x)), 4))
    found = jp.find_nonfinite(net, LOSS, ((),), jnp.ones((2, 1)), jnp.ones((2, 1)))
    assert (found.layer, found.birth.primitive) == ("0[3]", "exp")


def test_it_says_so_where_no_equation_is_found():
    def fn(params, x):
        struct = jax.ShapeDtypeStruct((), x.dtype)
        return x * params + jax.pure_callback(lambda: np.float64(np.nan), struct)

    found = jp.find_nonfinite(jp.function(fn), MEAN, jnp.ones(()), jnp.ones((2, 1)))
    assert found.birth.primitive == "pure_callback"
    assert found.birth.cause == ""


def test_debug_nans_may_be_on():
    with jax.debug_nans(True):
        birth = find_in(lambda params, x: jnp.log(x * params), jnp.ones(()), -jnp.ones(2))
    assert birth.cause == "The logarithm of a negative number is nan."


@pytest.mark.few(2)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_what_debug_nans_says(case):
    case = case()

    def mean_loss(params):
        y = case.fn(params, case.x)
        return jnp.mean(y) if case.loss is not LOSS else 0.5 * jnp.mean(y**2)

    with jax.debug_nans(True), pytest.raises(FloatingPointError) as raised:
        jax.block_until_ready(jax.grad(mean_loss)(case.params))
    said = re.search(r"invalid value \(nan\) encountered in (\S+)", str(raised.value)).group(1)
    assert said == case.debug_nans


def ahead(h):
    return h + jnp.log(h - h)


def back(h):
    root = jnp.sqrt(h - h)
    return h + root.mean()


def in_a_scan(f):
    return lambda h: jax.lax.scan(lambda h, t: (f(h) * t, None), h, jnp.ones(2))[0]


def in_what_it_stacks(f):
    return lambda h: jax.lax.scan(lambda s, h: (s + h, f(h)), jnp.zeros(h.shape[1:]), h)[1]


def in_a_branch(f):
    return lambda h: jax.lax.cond(h.sum() < 9, f, jnp.sin, h)


def with_a_rule(f):
    @jax.custom_jvp
    def ruled(h):
        return f(h)

    ruled.defjvp(lambda primals, tangents: jax.jvp(f, primals, tangents))
    return lambda h: ruled(h)


def without_a_name(f):
    def named(h):
        with jax.named_scope("scope"):
            return f(h)

    return named


AROUND = [
    *(jax.jit, jax.checkpoint, in_a_scan, in_what_it_stacks, in_a_branch, with_a_rule),
    *(without_a_name, jax.vmap),
]


@pytest.mark.full
@pytest.mark.parametrize("seed", range(24))
def test_whatever_is_around(seed):
    chosen = np.random.default_rng(seed).permutation(AROUND)[:3]
    core = (ahead, back)[seed % 2]
    inner = core
    for around in chosen:
        inner = around(inner)
    fn = each(lambda params, x: jnp.sum(inner(jnp.sin(x * params))))
    birth = find_in(fn, jnp.ones(()), jnp.asarray(normal(3, 2, 2, 2)))
    source = {ahead: "return h + jnp.log(h - h)", back: "root = jnp.sqrt(h - h)"}[core]
    names = [around.__name__ for around in chosen]
    if birth.rule:  # JAX gives a custom_jvp rule's equations the line of the call
        assert with_a_rule in chosen
        assert (birth.rule, source) == ("ruled", "root = jnp.sqrt(h - h)")
        source = "return lambda h: ruled(h)"
    assert (birth.source, birth.back) == (source, core is back), names
    assert birth.example == 0
    assert ("scope" in birth.scope) == (without_a_name in chosen), (names, birth.scope)
    loops = [around for around in chosen if around in (in_a_scan, in_what_it_stacks)]
    assert len(birth.steps) == len(loops)


@pytest.mark.full
def test_another_example_that_overflows_later():
    """Example 1 overflows only in the sum, example 0 already in the square before it."""
    x = jnp.full((2, 20), 1.0).at[0].set(1e155).at[1].set(1.2e154)
    params = jp.AffineParams(jnp.eye(20), jnp.zeros(20))
    birth = jp.find_nonfinite(jp.Dense(20), LOSS, params, x, x * 0).birth
    assert (birth.primitive, birth.example, birth.index) == ("integer_pow", 0, (0, 0))
    birth = jp.find_nonfinite(jp.Dense(20), LOSS, params, x[1:], x[1:] * 0).birth
    assert (birth.primitive, birth.example, birth.index) == ("reduce_sum", 0, (0,))
    assert birth.cause == "The sum overflows: float64 goes to 1.8e+308."


@pytest.mark.parametrize(("name", "value"), [("maximum", "-inf"), ("minimum", "inf")])
def test_a_reduction_over_nothing(name, value):
    reduced, initial = {"maximum": (jnp.max, -jnp.inf), "minimum": (jnp.min, jnp.inf)}[name]

    def fn(params, x):
        return params * reduced(jax.lax.stop_gradient(x)[:, :0], axis=-1, initial=initial)

    said = str(jp.find_nonfinite(jp.function(fn), MEAN, jnp.ones(()), X))
    said = " ".join(said.split())
    assert f"the {name} over an axis without elements is {value}" in said.lower()
