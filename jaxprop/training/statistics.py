"""The running statistics of a BatchNorm: updated in training, used in inference."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax import Array

from jaxprop.core.checks import require
from jaxprop.core.child import layers_within
from jaxprop.core.combinator import Wrapper, map_children
from jaxprop.core.layer import Layer
from jaxprop.core.step import Step
from jaxprop.core.tree import SideInput
from jaxprop.core.types import Params, PyTree
from jaxprop.layers import BatchNorm


def inference_mode(net: Layer) -> Layer:
    """Return the net as it is used after training: every field ``training`` is False.

    Args:
        net: the network.

    Example:
        >>> import jaxprop as jp
        >>> jp.inference_mode(jp.chain(jp.Dense(3), jp.BatchNorm()))
        chain(Dense(3), BatchNorm(training=False))
    """
    require(net, Layer, "inference_mode: net")
    net = map_children(net, inference_mode)
    trains = isinstance(getattr(net, "training", None), bool)
    return dataclasses.replace(net, training=False) if trains else net


def holds_batch_stats(net: Layer) -> bool:
    """Return whether any BatchNorm in the net is in training."""
    return any(isinstance(each, BatchNorm) and each.training for each in layers_within(net))


def update_batch_stats(
    net: Layer,
    params: Params,
    x: PyTree,
    *,
    key: Array | None = None,
    mask: Array | None = None,
) -> Params:
    """Return params with each BatchNorm's running statistics moved towards those of the batch x.

    For a BatchNorm in training, running = momentum * running + (1 - momentum) * the batch's, where
    that is finite; everything else is unchanged. The update of ``jp.make_update`` does this for
    you. In a loop of your own, call it in one ``jax.jit`` with ``value_and_grad`` at the same
    params, so that the forward pass is computed only once:

        @jax.jit
        def step(params, state, x, target):
            value, grads = jp.value_and_grad(net, loss)(params, x, target)
            updates, state = optimizer.update(grads, state, params)
            params = jp.update_batch_stats(net, params, x)
            return optax.apply_updates(params, updates), state, value

    Args:
        net: the network.
        params: its params.
        x: a batch of inputs.
        key: the key of the step, for layers that draw.
        mask: the mask of the step.

    Raises:
        ValueError: for a BatchNorm that is ``shared``, or inside a layer that does not say where
            its statistics are.
    """

    require(net, Layer, "update_batch_stats: net")

    def visit(step: Step) -> Params:
        layer, residuals = step.layer, step.residuals
        while isinstance(layer, Wrapper):
            layer, residuals = layer.inside(residuals)
        if isinstance(layer, BatchNorm) and layer.training:
            return layer.with_batch_stats(step.params, residuals)
        if isinstance(step.params, SideInput):
            return ()
        if any(child.layer.batch_coupled for child in layer.children()):
            raise ValueError(
                f"{layer}: a layer around a BatchNorm is a jp.Wrapper, which says where its "
                "statistics are"
            )
        return step.params

    bound = net.bind(params, key=key, mask=mask)
    y, residuals = net.forward(bound, x)
    unused = jax.tree.map(jnp.zeros_like, y)
    return net.walk(bound, residuals, unused, visit)[0]
