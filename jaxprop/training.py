"""Gradients for training loops, and what BatchNorm needs beside them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jaxprop.backprop import mean_gradient, walk
from jaxprop.combinators.wrapper import Wrapper
from jaxprop.factored import gradient
from jaxprop.layer import Layer, Step, inner_layers, map_inner
from jaxprop.layers import BatchNorm
from jaxprop.losses import Loss

ValueAndGrad = Callable[[Any, Any, Any], tuple[Array, Any]]


def value_and_grad(net: Layer, loss: Loss, *, loss_scale: float = 1.0) -> ValueAndGrad:
    """``f(params, x, target) -> (value, grads)`` by the hand-written chain.

    The same value and gradient as ``jax.value_and_grad(jp.loss_fn(net, loss))``: ``value`` is the
    mean of the loss over examples, ``grads`` has the structure, shapes and dtypes of params.

    The walk back starts from ``loss_scale`` times the cotangent, and each gradient is divided by it
    where it is summed: with a net that computes in float16 (``jp.cast``) a scale of 2.0**12, say,
    keeps small cotangents from becoming zero (Micikevicius et al. 2018,
    https://arxiv.org/abs/1710.03740).
    """

    def leave(step: Step) -> Any:
        return gradient(step.params, step.d_params, loss_scale)

    def source(loss: Loss, residuals: Any, examples: int) -> Any:
        ct = mean_gradient(loss, residuals, examples)
        return ct if loss_scale == 1 else jax.tree.map(lambda ct: ct * loss_scale, ct)

    back = walk(net, loss, leave, source)

    def value_and_gradient(params: Any, x: Any, target: Any) -> tuple[Array, Any]:
        value, grads, _ = back(params, x, target)
        return value, grads

    return value_and_gradient


def evaluation(net: Layer) -> Layer:
    """The net as it is used after training: every layer with a field ``training``, at False.

    Example:
        >>> import jaxprop as jp
        >>> jp.evaluation(jp.chain(jp.Dense(3), jp.BatchNorm()))
        chain(Dense(3), BatchNorm(training=False))
    """

    net = map_inner(net, evaluation)
    trains = isinstance(getattr(net, "training", None), bool)
    return dataclasses.replace(net, training=False) if trains else net


def with_statistics(net: Layer, params: Any, x: Any) -> Any:
    """params with each BatchNorm's running statistics moved towards those of the batch x.

    For a BatchNorm in training, running = momentum * running + (1 - momentum) * the batch's, where
    that is finite; all else is as it was. One that is ``shared`` raises ``ValueError``. In one
    ``jax.jit`` with ``value_and_grad`` of the same params, or with ``update`` of the params that it
    returns, the way forward is computed once:

        @jax.jit
        def step(params, state, x, target):
            return update(jp.with_statistics(net, params, x), state, x, target)
    """

    def leave(step: Step) -> Any:
        layer, residuals = step.layer, step.residuals
        while isinstance(layer, Wrapper):
            layer, residuals = layer.inside(residuals)
        if isinstance(layer, BatchNorm) and layer.training:
            return layer.with_statistics(step.params, residuals)
        if any(inner.batch_coupled for inner in inner_layers(layer)):
            raise ValueError(
                f"{layer}: a layer around a BatchNorm is a jp.Wrapper, which says where its "
                "statistics are"
            )
        return step.params

    y, residuals = net.forward(params, x)
    unused = jax.tree.map(jnp.zeros_like, y)
    return net.walk(params, residuals, unused, leave)[0]
