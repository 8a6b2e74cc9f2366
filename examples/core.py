"""The whole idea in a hundred lines of JAX: keep the last product of the chain rule in factors.

    python examples/core.py

In each example n a weight meets an input x_n, and a cotangent ct_n comes back to where they met.
The gradient is the sum over n of the outer products x_n ⊗ ct_n, which ``jax.grad`` multiplies out
at once. Kept as two factors, it answers other questions too: each example's gradient norm, or the
mean of the clipped gradients. At the end, all numbers are asserted to equal JAX's and jaxprop's.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class Outer(NamedTuple):  # a weight's cotangent, the sum over n of x_n ⊗ ct_n
    x: Any  # (N, I), and ct is (N, O)
    ct: Any

    def sq_norms(self):  # |x ⊗ ct|^2 = |x|^2 |ct|^2, without the product
        return (self.x**2).sum(1) * (self.ct**2).sum(1)

    def weighted_sum(self, weights):  # one matrix product; with equal weights, the gradient
        return (self.x * weights[:, None]).T @ self.ct


class Sum(NamedTuple):  # a bias's cotangent, the sum over n of ct_n
    ct: Any

    def sq_norms(self):
        return (self.ct**2).sum(1)

    def weighted_sum(self, weights):
        return weights @ self.ct


class Dense:  # y = x w + b; forward returns (y, residuals), and backward (d_params, d_x)
    def forward(self, params, x):
        w, b = params
        return x @ w + b, x

    def backward(self, params, x, ct):
        return (Outer(x, ct), Sum(ct)), ct @ params[0].T


class Relu:
    def forward(self, params, x):
        return jnp.maximum(x, 0), x > 0

    def backward(self, params, positive, ct):
        return (), ct * positive


def cross_entropy(y, target):  # each example's own loss, and its cotangent: no 1/N in either
    hot = jax.nn.one_hot(target, y.shape[1])
    return -(hot * jax.nn.log_softmax(y)).sum(1), jax.nn.softmax(y) - hot


def walk(chain, params, x, target, visit):  # forward, and back with visit at every layer
    steps = []
    for layer, own in zip(chain, params, strict=True):
        x, residuals = layer.forward(own, x)
        steps.append((layer, own, residuals))
    values, ct = cross_entropy(x, target)
    seen = []
    for layer, own, residuals in reversed(steps):
        d_params, ct = layer.backward(own, residuals, ct)
        seen.append(visit(d_params))
    return values.mean(), seen[::-1]


def sq_norms(forms):
    return sum((form.sq_norms() for form in forms), jnp.zeros(()))


def clipped(forms, max_norm):  # the mean over n of g_n min(1, max_norm / |g_n|)
    weights = jnp.minimum(1, max_norm / jnp.sqrt(sq_norms(forms)))
    return [form.weighted_sum(weights / len(weights)) for form in forms]


if __name__ == "__main__":
    import jaxprop as jp

    ours = (Dense(), Relu(), Dense())  # a chain is a tuple of layers
    net, loss = jp.chain(jp.Dense(9), jp.Relu(), jp.Dense(3)), jp.CrossEntropy()
    x, target = jax.random.normal(jax.random.key(0), (8, 4)), jnp.arange(8) % 3
    batch = net.init(jax.random.key(1), x), x, target
    value, steps = walk(ours, *batch, lambda forms: forms)
    forms = sum(steps, ())  # for w, b, w, b
    _, norms = walk(ours, *batch, sq_norms)  # the same, layer by layer, and no form is kept
    for got, expected in (
        ((value, clipped(forms, jnp.inf)), jax.value_and_grad(jp.loss_fn(net, loss))(*batch)),
        ((value, clipped(forms, jnp.inf)), jp.value_and_grad(net, loss)(*batch)),
        ((value, clipped(forms, 1.0)), jp.clipped_grad(net, loss, max_norm=1.0)(*batch)),
        (sum(norms), jp.per_example_sq_norms(net, loss)(*batch)),
    ):
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
            assert jnp.allclose(a, b, rtol=1e-5, atol=1e-7), (a, b)
    print("equal; the norms are", *(f"{norm:.2f}" for norm in jnp.sqrt(sum(norms))))
