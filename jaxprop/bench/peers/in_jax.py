"""The tasks for a peer's network in JAX, by ``jax.grad`` and libraries built on it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from jaxprop.bench.networks import Network
from jaxprop.bench.peers import ours
from jaxprop.bench.peers.pair import Pair, jitted
from jaxprop.core.types import Params, PyTree


class InJax(NamedTuple):
    """A peer's network in JAX.

    Attributes:
        loss: a scalar function of (params, x, target) in their layout.
        convert: converts our params, or a gradient, to their layout.
        params: our params, converted.
        x: the input in their layout.
        target: the target.
    """

    loss: Callable[[PyTree, Array, Array], Array]
    convert: Callable[[Params], PyTree]
    params: PyTree
    x: Array
    target: Array


def gradient(network: Network, peer: InJax) -> Pair:
    """Return the pair for the value and the gradient, theirs by ``jax.value_and_grad``."""

    def theirs(params: PyTree, x: Array, target: Array) -> PyTree:
        value, grads = jax.value_and_grad(peer.loss)(params, x, target)
        return {"value": value, "grads": grads}

    convert = ours.of_grads(peer.convert)
    return Pair(
        jitted(ours.gradient(network), *network[2], convert=convert),
        jitted(theirs, peer.params, peer.x, peer.target),
    )


def accumulated(network: Network, peer: InJax) -> Pair:
    """Return the pair for the same in micro-batches, where theirs sums gradients in array refs."""

    def theirs(params: PyTree, x: Array, target: Array) -> PyTree:
        sums = jax.tree.map(lambda param: jax.new_ref(jnp.zeros_like(param)), params)

        def part(total: Array, batch: tuple[Array, Array]) -> tuple[Array, None]:
            pullback: Any
            value, pullback = jax.vjp(lambda params: peer.loss(params, *batch), params)
            pullback.with_refs(sums)(jnp.full_like(value, 1 / ours.PARTS))
            return total + value / ours.PARTS, None

        parts = [a.reshape(ours.PARTS, -1, *a.shape[1:]) for a in (x, target)]
        value, _ = jax.lax.scan(part, jnp.zeros(()), (parts[0], parts[1]))
        return {"value": value, "grads": jax.tree.map(lambda ref: jax.freeze(ref), sums)}

    convert = ours.of_grads(peer.convert)
    return Pair(
        jitted(ours.accumulated(network), *network[2], convert=convert),
        jitted(theirs, peer.params, peer.x, peer.target),
    )


def clipped(network: Network, peer: InJax) -> Pair:
    """Return the pair for the mean of the clipped gradients, theirs by jax-privacy."""
    from jax_privacy.clipping import clipped_grad  # pyright: ignore[reportMissingImports]

    max_norm, batch = ours.bound(network), len(peer.target)
    of = clipped_grad(
        peer.loss,
        l2_clip_norm=max_norm,
        normalize_by=batch,
        batch_argnums=(1, 2),
        return_values=True,
    )

    def theirs(params: PyTree, x: Array, target: Array) -> PyTree:
        grads, aux = of(params, x, target)
        return {"value": aux.values.mean(), "grads": grads}

    convert = ours.of_grads(peer.convert)
    return Pair(
        jitted(ours.clipped(network, max_norm), *network[2], convert=convert),
        jitted(theirs, peer.params, peer.x, peer.target),
    )
