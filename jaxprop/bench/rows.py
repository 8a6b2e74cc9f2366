"""The rows of ``jaxprop bench``: each compares two functions, mostly jaxprop's with plain JAX's."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jax import Array

from jaxprop.bench import curvatures, networks
from jaxprop.bench.case import Case, with_key, without_key
from jaxprop.bench.measure import Function
from jaxprop.bench.networks import Network, all_cnn_c, cnn, gpt, gpt2_small, lstm, three_c3d
from jaxprop.combinators.chain import chain
from jaxprop.combinators.repeat import repeat
from jaxprop.core.layer import Layer
from jaxprop.core.loss import Loss
from jaxprop.core.types import Params, PyTree
from jaxprop.core.walk import loss_fn
from jaxprop.curvature.ekfac import ekfac_factors
from jaxprop.curvature.products import OfVector, ggn_vp, hvp
from jaxprop.layers import AffineParams, Dense, LayerNorm, Relu, Sigmoid, Tanh
from jaxprop.losses import CrossEntropy, HalfSquaredError
from jaxprop.quantity.between import ntk
from jaxprop.quantity.functions import (
    clipped_grad,
    diag_ggn,
    gram,
    kronecker_factors,
    noise_scale,
    per_example_grads,
    per_example_sq_norms,
    projected_grads,
    second_moment,
    variance,
)
from jaxprop.quantity.noise import NoiseScale
from jaxprop.training.gradients import ValueAndGrad, autodiff, value_and_grad
from jaxprop.training.update import make_update


def vmap_of_grad(net: Layer, loss: Loss) -> Function:
    """Return ``f(params, x, target)``, the per-example gradients in plain JAX."""

    def own(params: Params, x: Array, target: Array) -> Array:
        return loss_fn(net, loss)(params, x[None], target[None])

    return jax.vmap(jax.grad(own), (None, 0, 0))


def vmap_clipped(net: Layer, loss: Loss, max_norm: float) -> Function:
    """Return ``f(params, x, target)``, the mean of the clipped gradients in plain JAX."""

    def clipped(params: Params, x: Array, target: Array) -> Params:
        grads = vmap_of_grad(net, loss)(params, x, target)
        norms = jax.vmap(optax.tree.norm)(grads)
        weights = jnp.minimum(1, max_norm / norms) / len(norms)
        return jax.tree.map(lambda g: jnp.tensordot(weights, g, 1), grads)

    return clipped


def mlp(
    *widths: int,
    batch: int,
    hand: Callable[[Layer, Loss], Function] = value_and_grad,
    auto: Callable[[Layer, Loss], Function] = autodiff,
    key: bool = False,
) -> Case:
    """Return a case of dense layers with ReLU between, cross-entropy, and random data.

    Args:
        widths: the number of features of x and of each layer.
        batch: the number of examples.
        hand: makes the function to measure, which takes (params, x, target).
        auto: makes the function that it is compared with.
        key: whether the function from ``hand`` also takes a key.
    """
    layers: list[Layer] = []
    for width in widths[1:-1]:
        layers += [Dense(width), Relu()]
    net, loss = chain(*layers, Dense(widths[-1])), CrossEntropy()
    keys = jax.random.split(jax.random.key(0), 4)
    x = jax.random.normal(keys[0], (batch, widths[0]), jnp.float32)
    target = jax.random.randint(keys[1], (batch,), 0, widths[-1])
    args: tuple[PyTree, ...] = net.init(keys[2], x), x, target
    if not key:
        return Case(lambda: hand(net, loss), lambda: auto(net, loss), args)

    return Case(
        lambda: with_key(hand(net, loss)), lambda: without_key(auto(net, loss)), (*args, keys[3])
    )


def trained(network: Network) -> Case:
    """Return the case of the network's value and gradient, by hand and by autodiff."""
    net, loss, args = network
    return Case(lambda: value_and_grad(net, loss), lambda: autodiff(net, loss), args)


def saving_logsumexp(*, batch: int, length: int) -> Case:
    """Return the case of GPT-2 that saves attention's logsumexp, against one saving its weights."""
    net, loss, args = gpt2_small(batch=batch, length=length, save="logsumexp")
    other, _, _ = gpt2_small(batch=batch, length=length)
    return Case(lambda: value_and_grad(net, loss), lambda: value_and_grad(other, loss), args)


def norms(network: Network) -> Case:
    """Return the case of the network's per-example squared norms, against its gradient by hand."""
    net, loss, args = network
    return Case(lambda: per_example_sq_norms(net, loss), lambda: value_and_grad(net, loss), args)


def clipped(network: Network, auto: Callable[[Layer, Loss], Function]) -> Case:
    """Return the case of the network's clipped gradient, against another function."""
    net, loss, args = network
    return Case(lambda: clipped_grad(net, loss, max_norm=1.0), lambda: auto(net, loss), args)


def projected(network: Network) -> Case:
    """Return the case of per-example gradients projected to rank 8, against the plain gradient."""
    net, loss, args = network
    of = functools.partial(projected_grads, rank=8, key=jax.random.key(0))
    return Case(lambda: of(net, loss), lambda: value_and_grad(net, loss), args)


def noise_of_normalizations(network: Network) -> Case:
    """Return the case of a gradient with the LayerNorms' noise scale, against one without it."""
    net, loss, args = network
    also = {"noise": NoiseScale(where=LayerNorm)}
    return Case(
        lambda: value_and_grad(net, loss, aux=True, also=also),
        lambda: value_and_grad(net, loss),
        args,
    )


def tangent_kernel(net: Layer, loss: Loss) -> Function:
    """Return ``f(params, x, target)``, the tangent kernel of x; the target is ignored."""
    kernel = ntk(net)
    return lambda params, x, target: kernel(params, x)


def along_params(of: Callable[[Layer, Loss], OfVector]) -> Callable[[Layer, Loss], Function]:
    """Return a maker of a curvature product with the params themselves as the vector."""

    def make(net: Layer, loss: Loss) -> Function:
        product = of(net, loss)
        return lambda params, x, target: product(params, x, target, params)

    return make


def hvp_in_jax(net: Layer, loss: Loss) -> Function:
    """Return ``f(params, x, target)``, the Hessian times the params by ``jax.jvp(jax.grad)``."""

    def product(params: Params, x: Array, target: Array) -> Params:
        grads = jax.grad(lambda params: loss_fn(net, loss)(params, x, target))
        return jax.jvp(grads, (params,), (params,))[1]

    return product


def worked_example(steps: int) -> Case:
    """Return the case of the classic 2-2-2 network, trained for ``steps`` steps in one scan."""
    net, loss = (
        chain(Dense(2, bias=False), Sigmoid(), Dense(2, bias=False), Sigmoid()),
        HalfSquaredError(),
    )
    optimizer = optax.sgd(0.5)
    params = (
        AffineParams(jnp.array([[0.3, 0.4], [0.25, 0.35]], jnp.float32)),
        (),
        AffineParams(jnp.array([[0.45, 0.7], [0.4, 0.6]], jnp.float32)),
        (),
    )

    def train(differentiate: Callable[[Layer, Loss], ValueAndGrad]) -> Function:
        update = make_update(net, loss, optimizer, value_and_grad=differentiate)

        def trained(params: Params, x: Array, target: Array) -> tuple[PyTree, Array]:
            def step(carry: tuple[Params, PyTree], _: None) -> tuple[tuple[Params, PyTree], Array]:
                params, state, value = update(carry[0], carry[1], x, target)
                return (params, state), value

            return jax.lax.scan(step, (params, optimizer.init(params)), length=steps)

        return trained

    args = params, jnp.array([[0.1, 0.2]], jnp.float32), jnp.array([[0.4, 0.6]], jnp.float32)
    return Case(lambda: train(value_and_grad), lambda: train(autodiff), args)


def fused(optimizer: optax.GradientTransformation) -> Case:
    """Return the case of a fused update, against autodiff with the same optimizer."""
    net, loss = repeat(chain(Dense(1024), Tanh()), 16), HalfSquaredError()
    keys = jax.random.split(jax.random.key(0), 3)
    x, target = (jax.random.normal(key, (64, 1024), jnp.float32) for key in keys[:2])
    params = net.init(keys[2], x)
    return Case(
        lambda: make_update(net, loss, optimizer, fused=True),
        lambda: make_update(net, loss, optimizer, value_and_grad=autodiff),
        (params, optimizer.init(params), x, target),
        carried=2,
    )


def linen(network: str, quantity: str) -> Case:
    """Return the case of a quantity of a Flax network, against ``jax.value_and_grad`` alone."""
    from jaxprop.bench.linen import row  # imports Flax, which not everyone has

    return row(network, quantity)


def linen_beside_own(network: str, own: Network) -> Case:
    """Return the case of a Flax network's norms, against those of the same net in our layers."""
    from jaxprop.bench.linen import beside_own

    return beside_own(network, own)


def linen_beside_vmap(network: str) -> Case:
    """Return the case of a Flax network's norms, against those by ``jax.vmap(jax.grad)``."""
    from jaxprop.bench.linen import beside_vmap

    return beside_vmap(network)


MNIST = functools.partial(mlp, 784, 1024, 1024, 10, batch=128)
SMALL = functools.partial(mlp, 784, 256, 256, 10, batch=64)
LSTM = functools.partial(lstm, batch=32, length=64, features=256)
WIDE = functools.partial(mlp, 5120, 2560, 1280, batch=32)

ROWS: dict[str, Callable[[], Case]] = {
    "mlp-2x256": lambda: mlp(784, 256, 256, 10, batch=64),
    "mlp-2x1024": lambda: MNIST(),
    "mlp-8x512": lambda: mlp(*[512] * 9, batch=128),
    "mlp-32x128": lambda: mlp(*[128] * 33, batch=128),
    "worked-example": lambda: worked_example(steps=10_000),
    "sq-norms": lambda: MNIST(hand=per_example_sq_norms),
    "clipped": lambda: WIDE(hand=functools.partial(clipped_grad, max_norm=1.0)),
    "clipped/vmap": lambda: WIDE(
        hand=functools.partial(clipped_grad, max_norm=1.0),
        auto=functools.partial(vmap_clipped, max_norm=1.0),
    ),
    "gram": lambda: MNIST(hand=gram),
    "ntk": lambda: SMALL(hand=tangent_kernel),
    "second-moment": lambda: MNIST(hand=second_moment),
    "variance": lambda: MNIST(hand=variance),
    "noise-scale": lambda: MNIST(hand=noise_scale),
    "diag-ggn-mc": lambda: MNIST(hand=diag_ggn, key=True),
    "diag-ggn": lambda: MNIST(hand=diag_ggn),
    "diag-ggn-each": lambda: MNIST(hand=functools.partial(diag_ggn, per_example=True)),
    "kfac": lambda: MNIST(hand=kronecker_factors, key=True),
    "kflr": lambda: MNIST(hand=kronecker_factors),
    "ekfac": lambda: SMALL(hand=ekfac_factors, key=True),
    "influence": lambda: curvatures.influenced(networks.small_mlp(batch=136), others=8),
    "self-influence": lambda: curvatures.self_influenced(networks.small_mlp(batch=128)),
    "laplace": lambda: curvatures.outputs(networks.small_mlp(batch=128)),
    "kfac-step": lambda: curvatures.steps(networks.small_mlp(batch=128), number=10),
    "projected": lambda: projected(networks.mlp(batch=128)),
    "hvp": lambda: MNIST(hand=along_params(hvp), auto=hvp_in_jax),
    "ggn-vp": lambda: MNIST(hand=along_params(ggn_vp)),
    "gpt": lambda: trained(gpt(scan=False)),
    "gpt-repeat": lambda: trained(gpt(scan=True)),
    "gpt-recompute": lambda: trained(gpt(scan=True, recomputing=True)),
    "gpt-norms": lambda: norms(gpt(scan=False)),
    "noise-norms": lambda: noise_of_normalizations(gpt(scan=False)),
    "gpt-projected": lambda: projected(gpt(scan=False)),
    "lstm": lambda: trained(LSTM()),
    "lstm-norms": lambda: norms(LSTM()),
    "3c3d": lambda: trained(three_c3d(batch=64)),
    "3c3d-norms": lambda: norms(three_c3d(batch=64)),
    "all-cnn-c": lambda: trained(all_cnn_c(batch=32)),
    "all-cnn-c-norms": lambda: norms(all_cnn_c(batch=32)),
    "fused-sgd": lambda: fused(optax.sgd(1e-2)),
    "fused-adam": lambda: fused(optax.adam(1e-4)),
    "grads/vmap": lambda: MNIST(hand=per_example_grads, auto=vmap_of_grad),
    "linen-mlp-norms": lambda: linen("mlp", "norms"),
    "linen-mlp-clipped": lambda: linen("mlp", "clipped"),
    "linen-mlp-kfac": lambda: linen("mlp", "kfac"),
    "linen-cnn-norms": lambda: linen("cnn", "norms"),
    "linen-cnn-clipped": lambda: linen("cnn", "clipped"),
    "linen-gpt-norms": lambda: linen("gpt", "norms"),
    "linen-gpt-clipped": lambda: linen("gpt", "clipped"),
    "linen-gpt-scan-norms": lambda: linen("gpt-scan", "norms"),
    "linen-gpt-scan-clipped": lambda: linen("gpt-scan", "clipped"),
    "linen-gpt-kfac": lambda: linen("gpt", "kfac"),
    "linen-gpt-remat-norms": lambda: linen("gpt-remat", "norms"),
    "linen-gpt-remat-clipped": lambda: linen("gpt-remat", "clipped"),
    "linen-lstm-norms": lambda: linen("lstm", "norms"),
    "linen-lstm-clipped": lambda: linen("lstm", "clipped"),
    "linen-resnet-kfac": lambda: linen("resnet", "kfac"),
    "linen-mlp-norms/own": lambda: linen_beside_own("mlp", networks.mlp(batch=128)),
    "linen-cnn-norms/own": lambda: linen_beside_own("cnn", cnn(batch=64)),
    "linen-gpt-norms/own": lambda: linen_beside_own("gpt", gpt(scan=False, vocab=256)),
    "linen-lstm-norms/own": lambda: linen_beside_own("lstm", LSTM()),
    "linen-mlp-norms/vmap": lambda: linen_beside_vmap("mlp"),
    "linen-cnn-norms/vmap": lambda: linen_beside_vmap("cnn"),
    "linen-gpt-norms/vmap": lambda: linen_beside_vmap("gpt"),
    "linen-lstm-norms/vmap": lambda: linen_beside_vmap("lstm"),
}


LARGE: dict[str, Callable[[], Case]] = {
    "gpt2-small": lambda: trained(gpt2_small(batch=8)),
    "gpt2-small-norms": lambda: norms(gpt2_small(batch=8)),
    "gpt2-small-clipped": lambda: clipped(gpt2_small(batch=8), value_and_grad),
    "gpt2-small-clipped/vmap": lambda: clipped(
        gpt2_small(batch=8), functools.partial(vmap_clipped, max_norm=1.0)
    ),
    "gpt2-small-lse/weights": lambda: saving_logsumexp(batch=8, length=512),
    "gpt2-small-2048-lse/weights": lambda: saving_logsumexp(batch=2, length=2048),
}
"""Rows for an accelerator."""


def needs_flax(name: str) -> bool:
    """Return whether a row is measured only where Flax is installed."""
    return name.startswith("linen-")
