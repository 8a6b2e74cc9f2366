"""Backpropagate by hand through a 2-2-2 sigmoid network, with no library but JAX.

    python examples/two_layer.py

The network has two inputs, two hidden units and two outputs, no bias, and the error
E = sum of 1/2 (t - o)^2. The script computes the gradient by hand, asserts that it equals that of
``jax.grad``, and takes one step of gradient descent, which lowers the error.
"""

import jax
import jax.numpy as jnp

jax.config.update("jax_enable_x64", True)

# The weights of a unit are a row in z1 = w1 x1 + w2 x2, but a column in x @ w. Hence the transpose.
w1_to_w4 = jnp.array([[0.3, 0.25], [0.4, 0.35]]).T
w5_to_w8 = jnp.array([[0.45, 0.4], [0.7, 0.6]]).T
x, t = jnp.array([0.1, 0.2]), jnp.array([0.4, 0.6])


def forward(params, x):
    hidden, output = params
    h = jax.nn.sigmoid(x @ hidden)
    o = jax.nn.sigmoid(h @ output)
    return h, o


def loss(params, x, t):
    _, o = forward(params, x)
    return 0.5 * jnp.sum((t - o) ** 2)


def grad_by_hand(params, x, t):
    _, output = params
    h, o = forward(params, x)
    d_o = o - t  #                       dE/do
    d_z_out = d_o * o * (1 - o)  #       dE/dz = dE/do do/dz, with do/dz = o (1 - o)
    d_output = jnp.outer(h, d_z_out)  #  dE/dw = dE/dz dz/dw, with dz/dw = h
    d_h = output @ d_z_out  #            dE/dh, summed over the outputs that h feeds
    d_z_hid = d_h * h * (1 - h)
    d_hidden = jnp.outer(x, d_z_hid)
    return d_hidden, d_output


@jax.jit
def update(params, x, t, learning_rate=0.5):
    grads = grad_by_hand(params, x, t)
    return jax.tree.map(lambda w, d_w: w - learning_rate * d_w, params, grads)


if __name__ == "__main__":
    params = (w1_to_w4, w5_to_w8)
    by_hand, by_jax = grad_by_hand(params, x, t), jax.grad(loss)(params, x, t)
    for ours, theirs in zip(by_hand, by_jax, strict=True):
        assert jnp.allclose(ours, theirs, rtol=1e-12, atol=0), (ours, theirs)

    before = loss(params, x, t)
    params = update(params, x, t)
    after = loss(params, x, t)
    assert after < before
    print("w1..w4", *(f"{w:.8f}" for w in params[0].T.ravel()))
    print("w5..w8", *(f"{w:.8f}" for w in params[1].T.ravel()))
    print(f"E {before:.8f} -> {after:.8f}")
