"""A layer that couples the examples of a batch says so or is detected; others are left alone."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from table import TABLE, Around, Doubled

import jaxprop as jp
from jaxprop.core import coupling

SE = jp.HalfSquaredError()
X = jnp.asarray(np.random.default_rng(0).normal(size=(6, 3)))
FOUND = r"Centered\(\): an example's y depends on the other examples of the batch; a layer that co"


class Centered(jp.Layer):
    """y = x - mean over the batch, which is linear and symmetric: d_x is the same map of ct."""

    def forward(self, params, x):
        return x - x.mean(0, keepdims=True), x[:, :0]

    def backward(self, params, residuals, ct):
        return (), ct - ct.mean(0, keepdims=True)


class Mine(jp.Layer):
    """A user's layer for any function of x, with autodiff as its backward."""

    f: object

    def forward(self, params, x):
        return self.f(x), x

    def backward(self, params, x, ct):
        return (), jax.vjp(self.f, x)[1](ct)[0]


def members(cls):
    """The members of a class, to define another class like it."""
    names = ("__annotations__", "__module__", "forward", "walk", "centered")
    return {name: vars(cls)[name] for name in names}


class Gated(jp.Combinator):
    """A user's combinator, y = f(x), less its mean over the batch if it is centered."""

    layer: jp.Layer
    centered: bool = True

    def forward(self, params, x):
        y, residuals = self.layer.forward(params, x)
        return y - y.mean(0, keepdims=True) if self.centered else y, residuals

    def walk(self, place, residuals, ct, visit):
        ct = ct - ct.mean(0, keepdims=True) if self.centered else ct
        return self.layer.walk(place, residuals, ct, visit)


def norms(layer, x=X, **options):
    """The shapes of the norms for a layer after a dense one."""
    net = jp.chain(jp.Dense(3), layer)
    params = net.init(jax.random.key(0), x)
    y = jax.eval_shape(lambda: net.forward(params, x)[0])
    f = jp.per_example_sq_norms(net, SE, **options)
    return jax.eval_shape(f, params, x, jnp.zeros(y.shape, y.dtype))


@pytest.mark.parametrize(
    "layer",
    [
        Centered(),
        jp.skip(Centered()),
        jp.repeat(jp.skip(jp.chain(Centered(), jp.Tanh())), 2),
        jp.recompute(Centered()),
        jp.shared(Centered(), 2),
        jp.branch(jp.Dense(3), Centered()),
        jp.frozen(Centered()),
        Around(Centered()),
        Doubled(Centered()),
    ],
    ids=str,
)
def test_it_is_found_wherever_it_stands(layer):
    with pytest.raises(ValueError, match="an example's y depends on the other examples"):
        norms(layer)


def test_it_is_found_in_a_cast_net():
    net = jp.cast(jp.chain(jp.Dense(3), Centered()), jnp.bfloat16)
    params = net.init(jax.random.key(0), X)
    with pytest.raises(ValueError, match=FOUND):
        jp.gram(net, SE)(params, X, X.astype(jnp.bfloat16))


def test_it_is_found_in_what_a_combinator_does_itself():
    with pytest.raises(ValueError, match=r"Gated\(Tanh\(\)\): an example's y depends on the other"):
        norms(Gated(jp.Tanh()))
    norms(Gated(jp.Tanh(), centered=False))


MAKERS = {
    "clipped_grad": lambda net: jp.clipped_grad(net, SE, 1.0),
    "two_pass": lambda net: jp.clipped_grad(net, SE, 1.0, two_pass=True),
    "per_example_grads": lambda net: jp.per_example_grads(net, SE),
    "gram": lambda net: jp.gram(net, SE),
    "variance": lambda net: jp.variance(net, SE),
    "noise_scale": lambda net: jp.noise_scale(net, SE),
    "diag_ggn": lambda net: jp.diag_ggn(net, SE),
    "kronecker_factors": lambda net: jp.kronecker_factors(net, SE),
    "quantities": lambda net: jp.quantities(net, SE, norms=jp.SqNorms()),
    "micro_batches": lambda net: jp.value_and_grad(net, SE, micro_batches=2),
    "autodiff": lambda net: jp.autodiff(net, SE, micro_batches=2),
}


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_every_maker_finds_it(make):
    net = jp.chain(jp.Dense(3), Centered())
    params = net.init(jax.random.key(0), X)
    with pytest.raises(ValueError, match=FOUND) as caught:
        jax.eval_shape(make(net), params, X, X)
    assert "in layer 1: Centered()" in caught.value.__notes__


def test_a_combinator_that_says_so_is_refused():
    said = type(Gated)("Said", (jp.Combinator,), {**members(Gated), "batch_coupled": True})
    with pytest.raises(ValueError, match=r"Said\(Tanh\(\)\) couples the examples of a batch"):
        norms(jp.skip(said(jp.Tanh())))


def test_a_fused_update_in_micro_batches_finds_it():
    net = jp.chain(jp.Dense(3), Centered())
    params = net.init(jax.random.key(0), X)
    update = jp.make_update(net, SE, optax.sgd(0.1), fused=True, micro_batches=2)
    with pytest.raises(ValueError, match=FOUND):
        update(params, update.init(params), X, X)


def test_a_gradient_needs_nobody_to_say_so():
    net = jp.chain(jp.Dense(3), Centered())
    params = net.init(jax.random.key(0), X)
    by_hand, by_jax = (f(net, SE)(params, X, X)[1] for f in (jp.value_and_grad, jp.autodiff))
    np.testing.assert_allclose(by_hand[0].w, by_jax[0].w, rtol=1e-10)


@pytest.mark.parametrize(
    "transformed",
    [
        lambda f, params: jax.jit(f)(params, X, X),
        lambda f, params: jax.vmap(f, (None, 0, 0))(params, X[None], X[None]),
        lambda f, params: jax.lax.scan(lambda c, x: (c, f(params, x, x)), 0, X[None]),
        lambda f, params: jax.grad(lambda params: f(params, X, X).sum())(params),
    ],
    ids=["jit", "vmap", "scan", "grad"],
)
def test_it_is_found_while_tracing(transformed):
    net = jp.chain(jp.Dense(3), Centered())
    with pytest.raises(ValueError, match=FOUND):
        transformed(jp.per_example_sq_norms(net, SE), net.init(jax.random.key(0), X))


def noisy(x):
    """Noise by a fixed key: different at each place in the batch, whatever x is."""
    return x + jax.random.normal(jax.random.key(3), x.shape, x.dtype)


def printing(x):
    jax.debug.print("{}", x)
    return x - x.mean(0)


RIGHT = {
    "softmax": jax.nn.softmax,
    "log": lambda x: jnp.log(x**2),
    "root": lambda x: jnp.sqrt(jnp.sum(x**2, axis=-1, keepdims=True)),
    "noise": noisy,
    "one_by_one": lambda x: jax.lax.map(jnp.cumsum, x),
    "while": jax.vmap(lambda x: jax.lax.while_loop(lambda x: x.max() < 9, lambda x: 2 * x + 1, x)),
    "rounded": lambda x: jnp.round(x * 8) / 8,
    "nan": lambda x: jnp.where(x > 1, x, jnp.nan),
    "constant": lambda x: jnp.zeros_like(x),
    "conv": lambda x: jax.vmap(lambda x: jnp.convolve(x, jnp.ones(2, x.dtype), "same"))(x),
}


@pytest.mark.parametrize("f", RIGHT.values(), ids=RIGHT)
def test_a_right_layer_is_not_refused(f):
    layer = Mine(f)
    assert not coupling.couples(layer, (), X)
    assert not coupling.couples(layer, (), X.astype(jnp.bfloat16))
    assert not coupling.couples(Around(layer), (), jax.ShapeDtypeStruct((1, 2), jnp.float32))


COUPLED = {
    "mean": lambda x: x - x.mean(0, keepdims=True),
    "maximum": lambda x: x / x.max(0, keepdims=True),
    "softmax": lambda x: jax.nn.softmax(x, axis=0),
    "cumsum": lambda x: jnp.cumsum(x, axis=0),
    "shifted": lambda x: jnp.roll(x, 1, axis=0),
    "attention": lambda x: jax.nn.softmax(x @ x.T) @ x,
    "sorted": lambda x: jnp.sort(x, axis=0),
    "a_little": lambda x: x + 0.01 * x.mean(0, keepdims=True),
}


@pytest.mark.parametrize("f", COUPLED.values(), ids=COUPLED)
def test_a_layer_that_couples_is_seen(f):
    assert coupling.couples(Mine(f), (), X)
    assert coupling.couples(Mine(f), (), jax.ShapeDtypeStruct((1, 2), jnp.float32))


@pytest.mark.parametrize("row", TABLE[::3], ids=str)
def test_the_layers_of_the_library_say_what_they_are(row):
    params = jax.eval_shape(row.layer.init, jax.random.key(0), row.x)
    assert coupling.couples(row.layer, params, row.x) == row.layer.batch_coupled


def test_what_is_not_tried(capfd):
    assert not coupling.couples(Mine(printing), (), X)
    assert not coupling.couples(Centered(), (), jax.ShapeDtypeStruct((4, 10**6), jnp.float32))
    assert not coupling.couples(jp.Dense(3), (), X)  # () are no params of it
    assert capfd.readouterr().out == ""


def test_a_layer_is_tried_once_for_its_shapes():
    calls = []

    def f(x):
        calls.append(isinstance(x, jax.core.Tracer) and x.shape)
        return jnp.sin(x)

    layer = Mine(f)
    norms(layer)
    tried = calls.count((2, 3))
    norms(layer)
    norms(layer, jnp.concatenate([X, X]))
    assert calls.count((2, 3)) == tried == 1


def test_the_program_is_the_same(monkeypatch):
    net = jp.chain(jp.Dense(3), Mine(jnp.tanh), jp.repeat(Around(jp.Dense(3)), 2))
    params = net.init(jax.random.key(0), X)
    traced = functools.partial(jax.make_jaxpr(jp.clipped_grad(net, SE, 1.0)), params, X, X)
    tried = str(traced())
    monkeypatch.setattr("jaxprop.quantity.together.check_uncoupled", lambda *args: None)
    assert str(traced()) == tried


def test_check_layer_says_it():
    with pytest.raises(AssertionError, match=r"Centered.* says so, by batch_coupled = True in its"):
        jp.check_layer(Centered(), X)
