"""What a step returns besides the loss and the gradient: outputs, norms, what was clipped."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from table import Row, at, relative_error
from test_weights import CLOSE, KEY, nets, problem

import jaxprop as jp


@pytest.mark.few(1)
@pytest.mark.parametrize("make", [jp.value_and_grad, jp.autodiff])
@pytest.mark.parametrize("micro_batches", [1, 2])
@nets
def test_the_output_comes_along_with_the_gradient(name, micro_batches, make):
    net, loss, params, x, target = problem(name)
    f = jax.jit(make(net, loss, micro_batches=micro_batches, aux=True))
    (value, aux), grads = f(params, x, target)
    assert relative_error(aux.y, jax.jit(net)(params, x)) <= CLOSE
    assert aux[1:] == (None,) * 4
    assert relative_error((value, grads), jax.jit(make(net, loss))(params, x, target)) <= CLOSE


@pytest.mark.full
@pytest.mark.parametrize(
    "how", [{}, {"two_pass": True}, {"per_layer": True}, {"micro_batches": 2}], ids=str
)
def test_norms_and_the_clipped_share_come_along_with_clipped_gradients(how):
    for name in ("dense", "attention"):
        net, loss, params, x, target = problem(name)
        per_layer = how.get("per_layer", False)
        squares = jax.jit(jp.per_example_sq_norms(net, loss, per_layer=per_layer))
        norms = jax.tree.map(np.sqrt, jax.device_get(squares(params, x, target)))
        bound = float(np.median(jax.tree.leaves(norms)[0]))
        f = jax.jit(jp.clipped_grad(net, loss, bound, aux=True, **how))
        (value, aux), grads = f(params, x, target)
        assert relative_error(aux.norms, norms) <= CLOSE
        over = jax.tree.map(lambda norms, bound=bound: (norms > bound).mean(-1), norms)
        assert relative_error(aux.clipped, over) <= CLOSE
        assert relative_error(aux.y, jax.jit(net)(params, x)) <= CLOSE
        alone = jax.jit(jp.clipped_grad(net, loss, bound, **how))(params, x, target)
        assert relative_error((value, grads), alone) <= CLOSE


def test_outputs_and_clipped_means_are_quantities():
    net, loss, params, x, target = problem("dense")
    f = jp.quantities(net, loss, y=jp.Output(), kept=jp.Clipped(0.3, norms=True))
    result = jax.jit(f)(params, x, target)
    assert relative_error(result["y"], jax.jit(net)(params, x)) <= CLOSE
    squares = jax.jit(jp.per_example_sq_norms(net, loss))(params, x, target)
    assert relative_error(result["kept"].norms, np.sqrt(squares)) <= CLOSE
    value, grads = jax.jit(jp.clipped_grad(net, loss, 0.3))(params, x, target)
    assert relative_error((result["value"], result["kept"].grads), (value, grads)) <= CLOSE


@pytest.mark.few(1)
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("micro_batches", [1, 2])
def test_an_update_returns_them_too(fused, micro_batches):
    net, loss, params, x, target = problem("attention")
    options = {"fused": fused, "micro_batches": micro_batches, "donate": False}
    update = jp.make_update(net, loss, optax.sgd(0.1), max_norm=0.1, aux=True, **options)
    new, _, (value, aux) = update(params, update.init(params), x, target)
    assert relative_error(aux.y, jax.jit(net)(params, x)) <= CLOSE
    want, grads = jax.jit(jp.value_and_grad(net, loss))(params, x, target)
    norm = jax.jit(optax.tree.norm)(grads)
    assert relative_error((value, aux.norm), (want, norm)) <= CLOSE
    plain = jp.make_update(net, loss, optax.sgd(0.1), max_norm=0.1, **options)
    assert relative_error(new, plain(params, plain.init(params), x, target)[0]) <= CLOSE


def test_a_private_update_returns_norms_and_takes_its_key_through_any_maker():
    net, loss, params, x, target = problem("dense")
    private = functools.partial(jp.clipped_grad, max_norm=0.3, noise_multiplier=1.0)
    update = jp.make_update(
        net, loss, optax.sgd(0.1), value_and_grad=private, aux=True, donate=False
    )
    new, _, (_, aux) = update(params, update.init(params), x, target, KEY)
    assert aux.norms.shape == (4,)
    assert 0 <= float(aux.clipped) <= 1
    by_lambda = jp.make_update(
        net,
        loss,
        optax.sgd(0.1),
        value_and_grad=lambda net, loss: jp.clipped_grad(net, loss, 0.3, 1.0),
        donate=False,
    )
    assert relative_error(by_lambda(params, update.init(params), x, target, KEY)[0], new) <= CLOSE
    with pytest.raises(TypeError, match="called with aux= where that is asked for"):
        jp.make_update(
            net, loss, optax.sgd(0.1), aux=True, value_and_grad=lambda net, loss: private(net, loss)
        )


ALSO = {
    "noise": jp.NoiseScale(parts=True),
    "norms": jp.SqNorms(),
    "value": jp.Variance(),
    "diagonal": jp.DiagGGN(samples=1),
}


@pytest.mark.few(1)
@pytest.mark.parametrize("micro_batches", [1, 2])
@pytest.mark.parametrize("scale", [1.0, 2.0**12])
@nets
def test_any_quantity_comes_along_with_the_gradient(name, scale, micro_batches):
    net, loss, params, x, target = problem(name)
    given = {"weights": np.array([1.0, 2, 0.5, 0])}
    options = {"micro_batches": micro_batches, "aux": True, "loss_scale": scale}
    f = jax.jit(jp.value_and_grad(net, loss, also=ALSO, **options))
    (value, aux), grads = f(params, x, target, key=KEY, **given)
    asked = jp.quantities(net, loss, **{f"{name} too": asked for name, asked in ALSO.items()})
    want = jax.jit(asked)(params, x, target, key=KEY, **given)
    for name, got in aux.also.items():
        if micro_batches == 1 or name in ("noise", "norms"):  # each part draws its own samples
            assert relative_error(got, want[f"{name} too"]) <= CLOSE, name
    plain = jax.jit(jp.value_and_grad(net, loss))(params, x, target, **given)
    assert relative_error((value, grads), plain) <= CLOSE
    assert jax.tree.structure(grads) == jax.tree.structure(plain[1])
    (_, alone), _ = jax.jit(jp.value_and_grad(net, loss, aux=True))(params, x, target, **given)
    assert relative_error(aux.y, alone.y) <= CLOSE


def test_an_update_has_the_noise_scale_of_its_own_walk():
    net, loss, params, x, target = problem("dense")
    also = {"noise": jp.NoiseScale(parts=True)}
    makers = {
        "plain": functools.partial(jp.value_and_grad, also=also),
        "private": functools.partial(jp.clipped_grad, max_norm=0.3, also=also),
    }
    noise = jax.jit(jp.noise_scale(net, loss, parts=True))(params, x, target)
    for name, make in makers.items():
        update = jp.make_update(
            net, loss, optax.sgd(0.1), value_and_grad=make, aux=True, max_norm=0.1, donate=False
        )
        new, _, (value, aux) = update(params, update.init(params), x, target)
        assert relative_error(aux.also["noise"], noise) <= CLOSE
        assert aux.norm is not None
        if name == "plain":
            plain = jp.make_update(net, loss, optax.sgd(0.1), max_norm=0.1, donate=False)
            want, _, loss_before = plain(params, plain.init(params), x, target)
            assert relative_error((new, value), (want, loss_before)) <= CLOSE

    def dots(f):
        return jax.jit(f).lower(params, x, target).compile().as_text().count(" dot(")

    together = dots(jp.quantities(net, loss, grads=jp.Gradient(), **also))
    assert dots(jp.value_and_grad(net, loss, also=also, aux=True)) == together
    of_update = jp.make_update(
        net, loss, optax.sgd(0.1), value_and_grad=makers["plain"], aux=True, donate=False
    )
    program = of_update.lower(params, of_update.init(params), x, target).compile()
    assert program.as_text().count(" dot(") == together


@pytest.mark.full
def test_what_comes_along_in_float16_is_scaled_back():
    """Cotangents of 1e-8 are 0 in float16 without a loss scale."""
    wide = jp.chain(jp.Dense(4), jp.Tanh(), jp.Dense(3))
    net, x = jp.cast(wide, jnp.float16), jax.random.normal(KEY, (4, 5), jnp.float32)
    params, zeros = net.init(KEY, x), jnp.zeros((4, 3), jnp.float32)
    loss, target = jp.HalfSquaredError(), (zeros, zeros + 1e-8)
    exact = jp.per_example_sq_norms(wide, loss)(params, x, target)
    f = jp.value_and_grad(net, loss, aux=True, also={"norms": jp.SqNorms()}, loss_scale=2.0**16)
    (_, aux), grads = f(params, x, target)
    assert relative_error(aux.also["norms"], exact) <= 1e-2
    assert relative_error(grads, jp.value_and_grad(wide, loss)(params, x, target)[1]) <= 1e-2
    unscaled = jp.per_example_sq_norms(net, loss)(params, x, target)
    assert relative_error(unscaled, exact) > 0.1
    update = jp.make_update(
        net,
        loss,
        optax.sgd(0.1),
        loss_scale=jp.DynamicLossScale(initial=2.0**16),
        value_and_grad=functools.partial(jp.value_and_grad, also={"norms": jp.SqNorms()}),
        aux=True,
        donate=False,
    )
    _, _, (_, aux) = update(params, update.init(params), x, target)
    assert relative_error(aux.also["norms"], exact) <= 1e-2


def test_what_cannot_come_along_is_said():
    net, loss, _, x, target = problem("dense")
    for make in (jp.value_and_grad, functools.partial(jp.clipped_grad, max_norm=1.0)):
        with pytest.raises(ValueError, match="the quantities come back in aux; ask for aux=True"):
            make(net, loss, also={"noise": jp.NoiseScale()})
        with pytest.raises(TypeError, match="also is a dict of quantities by name"):
            make(net, loss, also=jp.NoiseScale(), aux=True)
        with pytest.raises(TypeError, match=r"also\['noise'\] is the class NoiseScale; write"):
            make(net, loss, also={"noise": jp.NoiseScale}, aux=True)
    coupled = jp.chain(jp.Dense(3), jp.BatchNorm())
    f = jp.value_and_grad(coupled, loss, also={"noise": jp.NoiseScale()}, aux=True)
    with pytest.raises(ValueError, match="couples the examples of a batch"):
        jax.jit(f)(coupled.init(KEY, x), x, target)


def test_a_users_own_aux_is_handed_on():
    net, loss, params, x, target = problem("dense")

    def make(net, loss, aux=False):
        def f(params, x, target, **given):
            value, grads = jp.value_and_grad(net, loss)(params, x, target, **given)
            return (value, "mine" and value * 2), grads

        return f

    update = jp.make_update(net, loss, optax.sgd(0.1), aux=True, value_and_grad=make, donate=False)
    _, _, (value, twice) = update(params, update.init(params), x, target)
    assert float(twice) == 2 * float(value)


def test_a_net_is_called_for_a_prediction():
    net = jp.chain(jp.Dense(8), jp.Dropout(0.5), jp.BatchNorm())
    params, x = at(Row(net, np.ones((4, 3))))
    called, forward, bound = jax.jit(net), jax.jit(net.forward), net.bind(params, key=KEY)
    assert relative_error(called(params, x), forward(params, x)[0]) == 0
    assert relative_error(called(params, x, key=KEY), forward(bound, x)[0]) == 0
    infer = jax.jit(jp.inference_mode(net))
    assert relative_error(infer(params, x, key=KEY), infer(params, x)) == 0


def test_an_update_without_a_key_where_a_layer_draws_is_refused():
    net, loss, x, target = (
        jp.chain(jp.Dense(4), jp.repeat(jp.chain(jp.Dense(4), jp.Dropout(0.5)), 2)),
        jp.CrossEntropy(),
        jnp.ones((4, 3)),
        jnp.zeros(4, int),
    )
    params = net.init(KEY, x)
    for options in ({}, {"fused": True}):
        update = jp.make_update(net, loss, optax.sgd(0.1), donate=False, **options)
        with pytest.raises(ValueError, match="update takes key=, a new one each step"):
            update(params, update.init(params), x, target)
        asked = jp.make_update(
            jp.inference_mode(net), loss, optax.sgd(0.1), donate=False, **options
        )
        value = asked(params, asked.init(params), x, target)[2]
        assert float(value) == float(jax.jit(jp.loss_fn(net, loss))(params, x, target))


@pytest.mark.parametrize("fused", [False, True])
def test_an_update_moves_the_running_statistics_by_itself(fused):
    net = jp.chain(jp.Dense(4), jp.Dropout(0.3), jp.BatchNorm(), jp.Relu(), jp.Dense(3))
    params, x = at(Row(net, np.random.default_rng(0).normal(size=(6, 5))))
    update = jp.make_update(net, jp.CrossEntropy(), optax.sgd(0.1), fused=fused, donate=False)
    new, _, _ = update(params, update.init(params), x, np.zeros(6, int), KEY)
    moved = jax.jit(jp.update_batch_stats, static_argnums=0)(net, params, x, key=KEY)
    assert jax.tree.structure(moved) == jax.tree.structure(params)
    for name in ("mean", "var"):
        got, want = (getattr(tree[2], name).value for tree in (new, moved))
        assert relative_error(got, want) <= CLOSE
        assert relative_error(got, getattr(params[2], name).value) > 1e-3

    skipping = jp.make_update(
        net, jp.CrossEntropy(), optax.sgd(0.1), fused=fused, skip_nonfinite=True, donate=False
    )
    ill = x.at[0, 0].set(jnp.inf)
    state = skipping.init(params)
    kept, state, _ = skipping(params, state, ill, np.zeros(6, int), KEY)
    assert int(state.skipped) == 1
    assert relative_error(kept, params) == 0


@pytest.mark.full
@pytest.mark.parametrize("options", [{}, {"fused": True}, {"micro_batches": 2}], ids=str)
def test_a_dynamic_loss_scale_finds_its_size(options):
    net = jp.cast(jp.chain(jp.Dense(4), jp.Tanh(), jp.Dense(3)), jnp.float16)
    x = jax.random.normal(KEY, (4, 5), jnp.float32)
    params, target = net.init(KEY, x), jnp.arange(4) % 3
    scale = jp.DynamicLossScale(initial=2.0**30, factor=4.0, interval=3)
    update = jp.make_update(
        net, jp.CrossEntropy(), optax.sgd(0.1), loss_scale=scale, donate=False, **options
    )
    state = update.init(params)
    assert float(state.scale) == 2.0**30
    for _ in range(20):
        before = params
        params, state, value = update(params, state, x, target)
        if int(state.skipped) == 1 and float(state.scale) == 2.0**28:
            assert relative_error(params, before) == 0
    assert 0 < int(state.skipped) < 12
    assert 2.0**8 <= float(state.scale) <= 2.0**20
    assert float(value) < float(jp.loss_fn(net, jp.CrossEntropy())(update_start(net, x), x, target))
    plain = jp.make_update(
        net, jp.CrossEntropy(), optax.sgd(0.1), loss_scale=2.0**8, donate=False, **options
    )
    by_plain = plain(params, plain.init(params), x, target)[0]
    by_dynamic = update(params, state, x, target)[0]
    assert relative_error(by_dynamic, by_plain) <= 2e-3


def test_a_dynamic_loss_scale_stays_finite():
    net, x = jp.chain(jp.Dense(3)), jnp.ones((2, 4))
    params, target = net.init(KEY, x), jnp.zeros(2, int)
    scale = jp.DynamicLossScale(initial=2.0**126, interval=1)
    update = jp.make_update(net, jp.CrossEntropy(), optax.sgd(0.1), loss_scale=scale, donate=False)
    state = update.init(params)
    for _ in range(4):  # steps on padding alone, with a gradient of 0
        params, state, _ = update(params, state, x, target, weights=jnp.zeros(2))
    assert jnp.isfinite(state.scale)
    assert int(state.skipped) == 0


def update_start(net, x):
    return net.init(KEY, x)


def test_a_dynamic_loss_scale_is_checked():
    for given, error, words in (
        ({"initial": 0.5}, ValueError, "initial is at least 1, not 0.5"),
        ({"factor": 1}, ValueError, "factor is more than 1, not 1"),
        ({"factor": float("inf")}, ValueError, "factor is finite in float32, not inf"),
        ({"interval": 0}, ValueError, "interval is at least 1"),
        ({"initial": "big"}, TypeError, "initial is a number"),
    ):
        with pytest.raises(error, match=words):
            jp.DynamicLossScale(**given)
    net, x = jp.chain(jp.Dense(2)), jnp.ones((2, 2))
    params = net.init(KEY, x)
    update = jp.make_update(
        net, jp.CrossEntropy(), optax.sgd(0.1), loss_scale=jp.DynamicLossScale(), donate=False
    )
    with pytest.raises(TypeError, match="start from state = update"):
        update(params, optax.sgd(0.1).init(params), x, jnp.zeros(2, int))
