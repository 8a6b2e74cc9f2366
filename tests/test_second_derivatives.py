"""Second derivatives through the hand-written backward pass are those of autodiff."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from table import LOSSES, TABLE, at, relative_error, row_id

from jaxprop.core.cotangents import summed
from jaxprop.core.tree import learned, merged


def like(tree, seed):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), leaf.dtype), tree)


def moving(tree):
    """The floating leaves of a tree, and a function that puts others in their places."""
    leaves, structure = jax.tree.flatten(tree)
    flags = [jnp.issubdtype(leaf.dtype, jnp.floating) for leaf in leaves]

    def put(some):
        each = iter(some)
        return structure.unflatten(
            next(each) if flag else leaf for flag, leaf in zip(flags, leaves, strict=True)
        )

    return [leaf for flag, leaf in zip(flags, leaves, strict=True) if flag], put


@pytest.mark.few(4)
@pytest.mark.parametrize("row", TABLE, ids=row_id)
def test_the_derivative_of_backward_is_that_of_the_pullback(row):
    layer = row.layer
    params, x = at(row)
    floats, put = moving(x)
    ct = like(jax.eval_shape(lambda: layer.forward(params, x)[0]), 1)
    point = learned(params), floats

    def by_hand(arrays, floats):
        whole = merged(params, arrays)
        _, residuals = layer.forward(whole, put(floats))
        d_params, d_x = layer.backward(whole, residuals, ct)
        return jax.tree.leaves((learned(summed(d_params)), d_x))

    def by_autodiff(arrays, floats):
        def forward(arrays, floats):
            return layer.forward(merged(params, arrays), put(floats))[0]

        _, pull = jax.vjp(forward, arrays, floats)
        d_params, d_x = pull(ct)
        return jax.tree.leaves((learned(d_params), d_x))

    tangent = like(point, 2)
    got, want = (
        jax.jit(lambda p, t, f=f: jax.jvp(f, p, t)[1])(point, tangent)
        for f in (by_hand, by_autodiff)
    )
    scale = max(1e-3, *(float(jnp.abs(leaf).max()) for leaf in want if leaf.size))
    for a, b in zip(got, want, strict=True):
        assert a.shape == b.shape
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-11 * scale)


@pytest.mark.few(2)
@pytest.mark.parametrize(("loss", "y", "target"), LOSSES, ids=map(str, range(len(LOSSES))))
def test_the_derivative_of_a_loss_gradient_is_its_hessian(loss, y, target):
    y, target = jax.tree.map(jnp.asarray, (y, target))
    tangent = like(y, 3)

    def by_hand(y):
        return loss.backward(loss.forward(y, target)[1])

    def by_autodiff(y):
        return jax.grad(lambda y: loss.forward(y, target)[0].sum())(y)

    got, want = (jax.jvp(f, (y,), (tangent,))[1] for f in (by_hand, by_autodiff))
    confident = float(jnp.abs(y).max()) > 20 if hasattr(y, "shape") else False
    assert relative_error(got, want) <= (1e-8 if confident else 1e-10)  # autodiff rounds there
