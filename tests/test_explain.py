"""An explanation holds what jax.vjp, jax.vmap(jax.grad) and NumPy compute for the same walk."""

import io

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console
from table import MLP, TABLE, Row, at, first_of_their_kind, normal, relative_error, row_id

import jaxprop as jp
from jaxprop.core.tree import learned
from jaxprop.explanation.summary import summary

LOSS = jp.HalfSquaredError()
CLOSE = 1e-11


class Coupled(jp.Layer):
    """y = x - mean over the batch, times a param; single examples have no gradient."""

    batch_coupled = True

    def init(self, key, x):
        return jnp.ones(x.shape[-1], x.dtype)

    def forward(self, params, x):
        centred = x - x.mean(axis=0, keepdims=True)
        return centred * params[None], centred

    def backward(self, params, centred, ct):
        d = ct * params[None]
        return jnp.sum(ct * centred, axis=0), d - d.mean(axis=0, keepdims=True)


class Plain(jp.Layer):
    """y = x w, with a cotangent of w that is summed over examples."""

    def init(self, key, x):
        return jnp.ones(x.shape[-1], x.dtype)

    def forward(self, params, x):
        return x * jnp.expand_dims(params, tuple(range(x.ndim - 1))), x

    def backward(self, params, x, ct):
        axes = tuple(range(x.ndim - 1))
        return jnp.sum(ct * x, axes), ct * jnp.expand_dims(params, axes)


def own_grads(net, loss, params, x, target):
    def alone(x, target):
        return jax.grad(jp.loss_fn(net, loss))(params, x[None], target[None])

    return jax.vmap(alone)(x, target)


QUICK = (jp.Dense, jp.BatchNorm, jp.Conv, jp.Lstm, jp.Embedding, jp.Attention, jp.Positions)
FIRST = [
    pytest.param(row, marks=pytest.mark.full)
    if isinstance(row, Row) and not isinstance(row.layer, (*QUICK, jp.Combinator))
    else row
    for row in first_of_their_kind(TABLE)
]


@pytest.mark.few(2)
@pytest.mark.parametrize("row", FIRST, ids=row_id)
def test_a_layer_s_terms_are_those_of_autodiff(row):
    """x, y, ct and d_x of a layer, its gradients, and two weights of every param in every layer."""
    params, x = at(row)
    coupled = row.layer.batch_coupled

    @jax.jit
    def computed(params, x):
        y, _ = row.layer.forward(params, x)
        target = jnp.zeros_like(y)
        terms = jp.explain(row.layer, LOSS, params, x, target, keep=10**9)
        _, grads = jp.value_and_grad(row.layer, LOSS)(params, x, target)
        shares = None if coupled else jp.per_example_grads(row.layer, LOSS)(params, x, target)
        d_x = row.layer.backward(params, row.layer.forward(params, x)[1], y)[1]
        return terms, y, grads, shares, d_x

    terms, y, grads, shares, d_x = jax.device_get(computed(params, x))
    assert relative_error((terms.loss.x, terms.loss.d_x), (y, y)) <= CLOSE
    if not isinstance(row.layer, jp.Combinator):
        (alone,) = terms.layers.values()
        got = (alone.x, alone.y, alone.ct, alone.d_x)
        assert relative_error(got, (jax.device_get(x), y, y, d_x)) <= CLOSE
    leaves = jax.tree.leaves(learned(grads))
    assert relative_error([terms[name].grad for name in terms.names], leaves) <= CLOSE
    last = terms.example(len(y) - 1)
    for name, share in zip(last.names, jax.tree.leaves(learned(shares)), strict=not coupled):
        for index in {(0,) * (share.ndim - 1), tuple(size - 1 for size in share.shape[1:])}:
            factors, product = last[name][index]
            assert float(product) == pytest.approx(share[-1][index], rel=1e-9, abs=1e-13)
            if factors:
                made = np.prod([np.asarray(f) for f in factors.values()], axis=0).sum()
                assert made == pytest.approx(float(product), rel=1e-9, abs=1e-13)
    assert max(map(len, str(last).splitlines())) <= 80


def test_every_weight_of_every_example_is_the_product_of_its_factors():
    x, target = normal(3, 2, 4), normal(3, 2, 3)
    net = jp.chain(jp.Dense(2), jp.Tanh(), jp.skip(jp.chain(jp.Dense(2), Plain())), jp.Dense(3))
    params = net.init(jax.random.key(0), x)
    terms = jax.jit(lambda params: jp.explain(net, LOSS, params, x, target))(params)
    assert terms.names == ["0.w", "0.b", "2.0.w", "2.0.b", "2.1", "3.w", "3.b"]
    grads = jax.device_get(jax.tree.leaves(own_grads(net, LOSS, params, x, target)))
    for name, param, expected in zip(terms.names, jax.tree.leaves(params), grads, strict=True):
        for n in range(len(x)):
            there = terms.example(n)[name]
            np.testing.assert_array_equal(there.value, param)
            for index in np.ndindex(*param.shape):
                factors, product = there[index]
                assert float(product) == pytest.approx(expected[n][index], rel=1e-11)
                if factors:
                    made = np.prod([np.asarray(f) for f in factors.values()], axis=0).sum()
                    assert made == pytest.approx(expected[n][index], rel=1e-11)
        assert np.allclose(terms[name].grad, expected.mean(axis=0), rtol=1e-11)
    assert terms["0.w"][0, -1].product == terms["0.w"][0, 1].product
    assert set(terms["0.w"][0, 0].factors) == {"x", "ct"}


def test_the_share_of_a_scale_is_no_cotangent():
    net, x = jp.chain(jp.LayerNorm()), normal(3, 4)
    terms = jp.explain(net, LOSS, net.init(jax.random.key(0), x), x, np.cos(x))
    assert set(terms["0.scale"][1].factors) == {"share"}
    assert set(terms["0.bias"][1].factors) == {"ct"}
    assert "share" in str(terms)


def test_slopes_are_derivatives():
    x = normal(2, 3)
    net = jp.chain(jp.Sigmoid(), jp.Gelu())
    terms = jp.explain(net, LOSS, ((), ()), x, x)
    expected = jax.vmap(jax.vmap(jax.grad(jax.nn.sigmoid)))(x)
    assert relative_error(terms.layers["0"].slope, expected) <= CLOSE
    assert terms.loss.slope is None


@pytest.mark.full
def test_a_large_net_leaves_summaries():
    x, target = normal(5, 4), np.arange(5) % 3
    net, loss = jp.chain(jp.Dense(6), jp.Relu(), jp.Dense(3)), jp.CrossEntropy()
    params = net.init(jax.random.key(0), x)
    whole = jp.explain(net, loss, params, x, target)
    few = jax.jit(lambda params: jp.explain(net, loss, params, x, target, keep=0))(params)
    assert relative_error(few.value, jp.loss_fn(net, loss)(params, x, target)) <= CLOSE
    relu, there = few.layers["1"].summaries, whole.layers["1"]
    for got, array in ((relu.x, there.x), (relu.y, there.y), (relu.ct, there.ct)):
        array = np.asarray(array)
        assert got.shape == array.shape
        expected = array.mean(), np.sqrt((array**2).mean()), np.abs(array).max()
        np.testing.assert_allclose((got.mean, got.rms, got.max), expected, rtol=1e-12)
        np.testing.assert_allclose(got.zeros, np.mean(array == 0))
        assert (int(got.nonfinite), int(got.first)) == (0, array.size)
    np.testing.assert_allclose(relu.saturated, np.mean(np.asarray(there.y) == 0))
    np.testing.assert_allclose(relu.dead, np.mean(np.all(np.asarray(there.y) == 0, axis=0)))
    assert few.layers["0"].summaries.grads.w.shape == (4, 6)
    with pytest.raises(ValueError, match=r"Dense\(6\): only summaries were kept; .*keep=N"):
        few["0.w"][0, 0]
    with pytest.raises(ValueError, match=r"Relu\(\): only summaries were kept"):
        _ = few.layers["1"].slope


@pytest.mark.full
def test_a_summary_is_of_the_finite_elements_and_survives_their_squares():
    got = summary(jnp.array([1e30, jnp.nan, -1e30, 0, jnp.inf], jnp.float32))
    assert (int(got.nonfinite), int(got.first)) == (2, 1)
    assert np.isnan(got.value)
    np.testing.assert_allclose((got.mean, got.max, got.zeros), (0, 1e30, 0.2))
    np.testing.assert_allclose(got.rms, np.sqrt(2 / 3) * 1e30, rtol=1e-6)
    assert summary(jnp.full(9, 300, jnp.float16)).rms.dtype == jnp.float32
    assert summary((jnp.arange(3), jnp.ones((2, 2)))).shape == (7,)
    assert summary(()) is None
    assert summary(jnp.zeros((0, 3))).max == 0


@pytest.mark.full
def test_a_repeated_layer_has_an_axis_of_repetitions_and_turns():
    x, target = normal(3, 4), normal(3, 4)
    block = jp.skip(jp.chain(jp.Dense(4), jp.Tanh()))
    net = jp.chain(jp.Dense(4), jp.repeat(block, 3), jp.repeat(block, 2))
    params = net.init(jax.random.key(0), x)
    terms = jax.jit(lambda params: jp.explain(net, LOSS, params, x, target))(params)
    assert terms.names == ["0.w", "0.b", "1.0.w", "1.0.b", "2.0.w", "2.0.b"]
    assert (terms.layers["1.0"].repeats, terms.layers["0"].repeats) == ((3,), ())
    assert relative_error(
        terms.layers["1.1"].y, jnp.tanh(jnp.asarray(terms.layers["1.0"].y))
    ) <= CLOSE  # fmt: skip
    expected = jax.device_get(own_grads(net, LOSS, params, x, target)[1][0].w)
    for n, r, i, j in [*np.ndindex(3, 3, 1, 2), (2, 2, 3, 3)]:
        product = terms.example(n)["1.0.w"][r, i, j].product
        assert float(product) == pytest.approx(expected[n, r, i, j], rel=1e-11)
    turns = [name for name, _ in terms.runs()]
    first = [f"1.{layer}[{r}]" for r in range(3) for layer in range(2)]
    assert turns == ["0", *first, *(f"2.{layer}[{r}]" for r in range(2) for layer in range(2))]
    runs = dict(terms.runs())
    assert relative_error(runs["1.0[0]"].x, runs["0"].y) <= CLOSE
    assert relative_error(runs["1.0[2]"].x, runs["1.0[1]"].x + runs["1.1[1]"].y) <= CLOSE


def test_loops_in_loops_take_turns():
    x = normal(2, 3)
    net = jp.repeat(jp.chain(jp.Tanh(), jp.repeat(jp.chain(jp.Dense(3), jp.Tanh()), 2)), 2)
    terms = jp.explain(net, LOSS, net.init(jax.random.key(0), x), x, x)
    inner = [["0", i, name, j] for i in range(2) for j in range(2) for name in ("1.0", "1.1")]
    expected = []
    for i in range(2):
        expected.append(f"0[{i}]")
        expected += [f"{name}[{i}, {j}]" for _, k, name, j in inner if k == i]
    assert [name for name, _ in terms.runs()] == expected
    last = terms.runs()[-1][1]
    assert relative_error(last.y, net.forward(net.init(jax.random.key(0), x), x)[0]) <= CLOSE


def test_a_coupled_layer_has_grads_and_no_chain_of_one_example():
    x = normal(4, 3)
    net = jp.chain(jp.Dense(3), Coupled())
    params = net.init(jax.random.key(0), x)
    terms = jp.explain(net, LOSS, params, x, x)
    expected = jax.grad(jp.loss_fn(net, LOSS))(params, x, x)
    assert relative_error(terms["1"].grad, expected[1]) <= CLOSE
    assert "grad" in str(terms)
    with pytest.raises(ValueError, match=r"Coupled\(\) couples the examples"):
        terms["1"][0]


@pytest.mark.full
def test_integer_inputs_and_narrow_dtypes():
    class Rows(jp.Layer):
        """y = the rows of params at x."""

        def init(self, key, x):
            return jax.random.normal(key, (5, 2), jnp.float32)

        def forward(self, params, x):
            return params[x], (x, jnp.zeros((len(x), 5)))

        def backward(self, params, residuals, ct):
            x, _ = residuals
            return jnp.zeros_like(params).at[x].add(ct), None

    x = jnp.array([[0, 4], [4, 4]])
    net = jp.chain(Rows(), jp.Dense(2))
    params = net.init(jax.random.key(0), x)
    terms = jp.explain(net, LOSS, params, x, jnp.zeros((2, 2, 2)))
    assert terms.layers["0"].d_x is None
    assert terms.layers["0"].summaries.d_x is None
    assert terms.layers["0"].summaries.x.max == 4
    assert terms["0"][4, 0].factors == {}
    x = jnp.asarray(normal(3, 4), jnp.bfloat16)
    terms = jp.explain(MLP, LOSS, MLP.init(jax.random.key(0), x), x, jnp.zeros((3, 3)))
    assert terms["0.w"][0, 0].product.dtype == jnp.bfloat16
    assert terms.layers["0"].summaries.y.rms.dtype == jnp.float32


@pytest.mark.few(1)
@pytest.mark.parametrize("keep", [0, 10**6])
def test_prints_in_80_columns_without_colour(keep):
    x, target = normal(3, 7, 6), normal(3, 7, 3)
    net = jp.chain(jp.Dense(20), jp.Sigmoid(), jp.repeat(jp.skip(jp.Dense(20)), 2), jp.Dense(3))
    terms = jp.explain(net, LOSS, net.init(jax.random.key(0), x), x, target, keep=keep)
    text = str(terms)
    assert max(map(len, text.splitlines())) <= 80
    assert "\x1b" not in text
    for name in ("0 Dense(20)", "1 Sigmoid()", "2[0] Dense(20)", "2[1] Dense(20)"):
        assert name in text
    assert ("w[0, 0]" in text) == bool(keep)
    assert f"example 1 of {len(x)} examples" in str(terms.example(1)) or not keep
    out = io.StringIO()
    Console(file=out, force_terminal=True, width=80).print(terms)
    assert "Sigmoid()" in out.getvalue()


@pytest.mark.full
def test_a_gpt_is_a_line_a_layer():
    net = jp.models.gpt2(jp.models.Gpt2Config(vocab=40, length=8, features=16, heads=2, layers=2))
    x = jnp.arange(16).reshape(2, 8)
    params = jax.tree.map(lambda p: p.astype(jnp.float32), net.init(jax.random.key(0), x))
    terms = jp.explain(jp.cast(net, jnp.bfloat16), jp.CrossEntropy(), params, x, x, keep=0)
    lines = str(terms).splitlines()
    assert len(lines) == 3 + 2 + 2 * 8 + 1
    assert max(map(len, lines)) <= 80
    assert sum(line.startswith("1.1.0.2[1] Attention(2)") for line in lines) == 1
    assert terms.layers["1.1.1.2"].summaries.saturated.shape == (2,)  # Gelu, seen through the cast
    assert terms.layers["0"].summaries.d_x is None


def test_the_worked_example_prints_its_numbers():
    from jaxprop.walkthrough.config import WORKED_EXAMPLE, example, network, params

    text = str(jp.explain(network(WORKED_EXAMPLE), LOSS, params(WORKED_EXAMPLE),
                          *example(WORKED_EXAMPLE)))  # fmt: skip
    assert "0.02397190 for example 0 of 1 example" in text
    row = "w[0, 1]         0.70000000   x 0.51998934 · ct 0.01424730 = 0.00740844"
    assert row in text


def test_wrong_names_indices_and_arguments():
    x = normal(2, 3)
    net = jp.chain(jp.Dense(2))
    params = net.init(jax.random.key(0), x)
    terms = jp.explain(net, LOSS, params, x, normal(2, 2))
    with pytest.raises(KeyError, match=r"is learned is called '0\.v'; there are 0\.w, 0\.b"):
        terms["0.v"]
    for index in ((0,), (3, 0), (0, 2), (0, 0, 0)):
        with pytest.raises(IndexError, match=r"0\.w\[.*its shape is \(3, 2\)"):
            terms["0.w"][index]
    with pytest.raises(IndexError, match="example 2: there are 2"):
        terms.example(2)
    with pytest.raises(TypeError, match=r"loss is the class HalfSquaredError; write"):
        jp.explain(net, jp.HalfSquaredError, params, x, normal(2, 2))
    with pytest.raises(TypeError, match="net is not a Layer"):
        jp.explain([net], LOSS, params, x, normal(2, 2))


def test_traced_it_says_so():
    x = normal(2, 3)
    seen = []

    def f(x):
        seen.append(repr(jp.explain(jp.Tanh(), LOSS, (), x, x)))
        return x

    jax.jit(f)(x)
    assert seen == ["<explanation of Tanh(), being traced>"]


def test_text_in_a_notebook_is_the_text_anywhere(monkeypatch):
    params, x = at(Row(MLP, normal(4, 6)))
    terms = jp.explain(MLP, LOSS, params, x, jnp.zeros((4, 3)))
    text = str(terms)
    monkeypatch.setattr("rich.console._is_jupyter", lambda: True)
    assert str(terms) == text
