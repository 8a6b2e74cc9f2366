"""The quantities by ``jax.grad``, ``jax.vmap`` and ``jax.jacrev`` of ``loss_fn``.

The interface is that of jaxprop's functions, but none of its backward passes is used. Results have
the structure of the learned params.
"""

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

import jaxprop as jp
from jaxprop.core.tree import learned, merged


def one(example):
    return jax.tree.map(lambda leaf: leaf[None], example)


def per_example_grads(net, loss):
    def f(params, x, target):
        def own(arrays, x, target):
            return jp.loss_fn(net, loss)(merged(params, arrays), *one((x, target)))

        return jax.vmap(jax.grad(own), (None, 0, 0))(learned(params), x, target)

    return f


def of_grads(f):
    """The oracle that applies f to the per-example gradients; ``oracle.of(grads)`` is f itself."""

    def oracle(net, loss, *options):
        return lambda *args: f(per_example_grads(net, loss)(*args), *options)

    oracle.of = f
    return oracle


def _leaves(grads):
    return [leaf.reshape(leaf.shape[0], -1) for leaf in jax.tree.leaves(grads)]


@of_grads
def per_example_sq_norms(grads):
    return sum((leaf**2).sum(1) for leaf in _leaves(grads))


@of_grads
def gram(grads):
    return sum(leaf @ leaf.T for leaf in _leaves(grads))


@of_grads
def second_moment(grads):
    return jax.tree.map(lambda g: (g**2).mean(0), grads)


@of_grads
def variance(grads):
    return jax.tree.map(lambda g: ((g - g.mean(0, keepdims=True)) ** 2).mean(0), grads)


@of_grads
def noise_scale(grads, weights=None):
    flat = jnp.concatenate(_leaves(grads), 1)
    share = jnp.ones(len(flat)) if weights is None else jnp.asarray(weights, flat.dtype)
    share = share[:, None] / share.sum()
    mean, of_mean = (share * flat).sum(0), (share**2).sum()  # Var(mean) = of_mean * tr(S)
    trace = (share * (flat - mean[None]) ** 2).sum() / (1 - of_mean)
    return trace / ((mean**2).sum() - trace * of_mean)


@of_grads
def clipped(grads, max_norm):
    norms = jnp.sqrt(per_example_sq_norms.of(grads))
    weights = jnp.where(norms > max_norm, max_norm / norms, 1)
    return jax.tree.map(lambda g: jnp.tensordot(weights, g, 1) / len(weights), grads)


def clipped_grad(net, loss, max_norm):
    def f(*args):
        return jp.loss_fn(net, loss)(*args), clipped(net, loss, max_norm)(*args)

    return f


def ggn_blocks(net, loss):
    """J^T H J for each example and for each param alone: a tree like params of (N, P, P)."""

    def own(params, x, target):
        _, unflatten = ravel_pytree(net.forward(params, one(x))[0])

        def output(arrays):
            return ravel_pytree(net.forward(merged(params, arrays), one(x))[0])[0]

        def value(y):
            return loss.forward(unflatten(y), one(target))[0][0]

        y = output(learned(params))
        hessian = jax.hessian(value)(y)
        jacobian = jax.jacrev(output)(learned(params))

        def block(j):
            j = j.reshape(len(y), -1)
            return j.T @ hessian @ j

        return jax.tree.map(block, jacobian)

    return jax.vmap(own, (None, 0, 0))


def diagonals(params, blocks):
    """The blocks' diagonals for each example, shaped like params after an example axis."""
    return jax.tree.map(
        lambda p, b: jnp.diagonal(b, axis1=1, axis2=2).reshape(len(b), *p.shape),
        learned(params),
        blocks,
    )


def diagonal(params, blocks):
    """The mean over examples of the blocks' diagonals, shaped like params."""
    return jax.tree.map(lambda each: each.mean(0), diagonals(params, blocks))
