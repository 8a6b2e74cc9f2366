"""What is measured: a row is two programs for the same numbers, by hand and by autodiff."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxprop.backprop import loss_fn
from jaxprop.combinators import chain
from jaxprop.layer import Layer
from jaxprop.layers import Affine, Dense, Relu, Sigmoid
from jaxprop.losses import CrossEntropy, HalfSquaredError, Loss
from jaxprop.training import ValueAndGrad, make_update, value_and_grad


class Case(NamedTuple):
    """Makers of the two functions (new ones at each call, so that nothing is cached), and args."""

    hand: Callable[[], Callable[..., Any]]
    auto: Callable[[], Callable[..., Any]]
    args: tuple[Any, ...]


def autodiff(net: Layer, loss: Loss) -> ValueAndGrad:
    return jax.value_and_grad(loss_fn(net, loss))


def mlp(*widths: int, batch: int) -> Case:
    """Dense layers with relu between, cross-entropy on top, and random data."""
    layers: list[Layer] = []
    for width in widths[1:-1]:
        layers += [Dense(width), Relu()]
    net, loss = chain(*layers, Dense(widths[-1])), CrossEntropy()
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (batch, widths[0]), jnp.float32)
    target = jax.random.randint(keys[1], (batch,), 0, widths[-1])
    args = net.init(keys[2], x), x, target
    return Case(lambda: value_and_grad(net, loss), lambda: autodiff(net, loss), args)


def worked_example(steps: int) -> Case:
    """The classic 2-2-2 network, trained in one scan."""
    net, loss = (
        chain(Dense(2, bias=False), Sigmoid(), Dense(2, bias=False), Sigmoid()),
        HalfSquaredError(),
    )
    optimizer = optax.sgd(0.5)
    params = (
        Affine(jnp.array([[0.3, 0.4], [0.25, 0.35]], jnp.float32)),
        (),
        Affine(jnp.array([[0.45, 0.7], [0.4, 0.6]], jnp.float32)),
        (),
    )

    def train(differentiate: Callable[[Layer, Loss], ValueAndGrad]) -> Callable[..., Any]:
        update = make_update(net, loss, optimizer, value_and_grad=differentiate)

        def trained(params: Any, x: Any, target: Any) -> Any:
            def step(carry: Any, _: None) -> Any:
                params, state, value = update(carry[0], carry[1], x, target)
                return (params, state), value

            return jax.lax.scan(step, (params, optimizer.init(params)), length=steps)

        return trained

    args = params, jnp.array([[0.1, 0.2]], jnp.float32), jnp.array([[0.4, 0.6]], jnp.float32)
    return Case(lambda: train(value_and_grad), lambda: train(autodiff), args)


ROWS: dict[str, Callable[[], Case]] = {
    "mlp-2x256": lambda: mlp(784, 256, 256, 10, batch=64),
    "mlp-2x1024": lambda: mlp(784, 1024, 1024, 10, batch=128),
    "mlp-8x512": lambda: mlp(*[512] * 9, batch=128),
    "mlp-32x128": lambda: mlp(*[128] * 33, batch=128),
    "worked-example": lambda: worked_example(steps=10_000),
}
