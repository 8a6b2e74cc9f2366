"""An encoder and a decoder that attends to it, made of chain, branch and on."""

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from table import relative_error

import jaxprop as jp

D, VOCAB = 4, 7
LOSS = jp.CrossEntropy()


def attend(**fields):
    return jp.skip(
        jp.chain(jp.LayerNorm(), jp.Dense(3 * D), jp.Attention(2, **fields), jp.Dense(D))
    )


def widen():
    return jp.skip(jp.chain(jp.LayerNorm(), jp.Dense(2 * D), jp.Gelu(), jp.Dense(D)))


def cross():
    """(x, memory) to (x + f(x, memory), memory)."""
    read = jp.branch(
        jp.chain(jp.Item(0), jp.LayerNorm(), jp.Dense(D)),
        jp.chain(jp.Item(1), jp.Dense(2 * D)),
        join="tuple",
    )
    read = jp.chain(read, jp.Attention(2, causal=False), jp.Dense(D))
    return jp.branch(jp.branch(jp.Item(0), read), jp.Item(1), join="tuple")


def network():
    encoder = jp.chain(
        *(jp.Item(0), jp.Embedding(VOCAB, D), jp.SinusoidalPositions()),
        jp.repeat(jp.chain(attend(causal=False), widen()), 2),
    )
    block = jp.chain(jp.on(0, attend(masked=False)), cross(), jp.on(0, widen()))
    target = jp.chain(jp.Item(1), jp.Embedding(VOCAB, D), jp.SinusoidalPositions())
    return jp.chain(
        jp.branch(target, encoder, join="tuple"),
        jp.repeat(jp.recompute(block), 2),
        jp.Item(0),
        jp.Dense(VOCAB),
    )


NET = network()


def batch():
    rng = np.random.default_rng(0)
    source, target = (jnp.asarray(rng.integers(0, VOCAB, (4, t))) for t in (6, 5))
    real = jnp.arange(6)[None] < jnp.array([6, 4, 2, 5])[:, None]
    return NET.init(jax.random.key(0), (source, target[:, :-1])), source, target, real


@pytest.mark.full
@pytest.mark.few(1)
@pytest.mark.parametrize("masked", [False, True])
def test_gradients_norms_and_clipping(masked):
    params, source, target, real = batch()
    micro_batches = 2 if masked else 1
    args, given = (params, (source, target[:, :-1]), target[:, 1:]), {}
    each = oracles.per_example_grads(NET, LOSS)
    if masked:
        given = {"mask": real}

        def alone(params, x, target, real):
            x, target, real = jax.tree.map(lambda leaf: leaf[None], (x, target, real))
            return jax.grad(jp.loss_fn(NET, LOSS))(params, x, target, mask=real)

        each = lambda *args: jax.vmap(alone, (None, 0, 0, 0))(*args, real)  # noqa: E731
    grads = jax.jit(each)(*args)
    norms = oracles.per_example_sq_norms.of(grads)
    bound = float(np.median(np.sqrt(norms)))
    asked = {"grads": jp.Gradient(), "norms": jp.SqNorms(), "clipped": jp.Clipped(bound)}
    f = jp.quantities(NET, LOSS, micro_batches=micro_batches, **asked)
    got = jax.jit(f)(*args, **given)
    assert relative_error(got["grads"], jax.tree.map(lambda g: g.mean(0), grads)) <= 1e-11
    assert relative_error(got["norms"], norms) <= 1e-11
    assert relative_error(got["clipped"], oracles.clipped.of(grads, bound)) <= 1e-11
    by_jax = jax.jit(jax.grad(jp.loss_fn(NET, LOSS)))(*args, **given)
    assert relative_error(got["grads"], by_jax) <= 1e-11


@pytest.mark.full
def test_padding_of_the_source_changes_nothing():
    params, source, target, real = batch()
    args = (source, target[:, :-1]), target[:, 1:]
    f = jax.jit(jp.per_example_sq_norms(NET, LOSS))
    norms = f(params, *args, mask=real)
    other = f(params, (jnp.where(real, source, 3), args[0][1]), args[1], mask=real)
    assert relative_error(other, norms) == 0
    short = f(params, (source[2:3, :2], args[0][1][2:3]), args[1][2:3])
    assert relative_error(norms[2:3], short) <= 1e-12
