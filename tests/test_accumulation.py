"""Whatever is asked of micro-batches is what is asked of the batch: to the last bits, in less."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from table import BLOCK, relative_error

import jaxprop as jp

NET = jp.chain(jp.Dense(4), jp.repeat(BLOCK, 2), jp.LayerNorm(), jp.Dense(3))
LOSS = jp.CrossEntropy()
KEY = jax.random.key(5)


def problem(net=NET, shape=(6, 5), outputs=3):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=shape))
    params = jax.jit(net.init)(jax.random.key(0), x)
    return params, x, jnp.asarray(rng.integers(0, outputs, shape[:-1]))


ASKED = {
    "value_and_grad": (jp.value_and_grad, {}),
    "loss_scale": (jp.value_and_grad, {"loss_scale": 8.0}),
    "autodiff": (lambda net, loss: jax.value_and_grad(jp.loss_fn(net, loss)), {}),
    "loss_fn": (jp.loss_fn, {}),
    "per_example_grads": (jp.per_example_grads, {}),
    "per_example_sq_norms": (jp.per_example_sq_norms, {}),
    "per_layer": (jp.per_example_sq_norms, {"per_layer": True}),
    "second_moment": (jp.second_moment, {}),
    "variance": (jp.variance, {}),
    "noise_scale": (jp.noise_scale, {}),
    "clipped": (jp.clipped_grad, {"max_norm": 0.3}),
    "clipped, per_layer": (jp.clipped_grad, {"max_norm": 0.3, "per_layer": True}),
    "clipped, two_pass": (jp.clipped_grad, {"max_norm": 0.3, "two_pass": True}),
    "diag_ggn": (jp.diag_ggn, {}),
    "ggn_root": (jp.ggn_root, {}),
    "quantities": (
        jp.quantities,
        {"grads": jp.Gradient(), "norms": jp.SqNorms(), "noise": jp.NoiseScale()},
    ),
}
NOISE = {"max_norm": 0.3, "noise_multiplier": 1.1}
KEYED = {
    "noise": (jp.clipped_grad, NOISE),
    "noise, per_layer": (jp.clipped_grad, NOISE | {"per_layer": True}),
}


@pytest.mark.parametrize("name", [*ASKED, *KEYED])
def test_is_that_of_the_whole_batch(name):
    """Every other example in each, and micro-batches of one."""
    maker, options = (ASKED | KEYED)[name]
    given = {"key": KEY} if name in KEYED else {}
    args = problem()

    @jax.jit
    def all_of(*args):
        return [
            f(NET, LOSS, **options)(*args, **given)
            for f in (maker, jp.accumulate(maker, 2), jp.accumulate(maker, 6))
        ]

    whole, *accumulated = all_of(*args)
    for got in accumulated:
        assert jax.tree.map(jnp.result_type, got) == jax.tree.map(jnp.result_type, whole)
        assert relative_error(got, whole) <= 1e-12
