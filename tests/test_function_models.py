"""Models in various coding styles, none of them written for this library."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from table import relative_error

import jaxprop as jp

CLOSE = 1e-10
RNG = np.random.default_rng(0)


def array(*shape, scale=0.5):
    return jnp.asarray(RNG.normal(size=shape) * scale)


def mixer():
    """An MLP-Mixer over patches, with products on either side of x."""
    params = {
        "patch": array(12, 8),
        "blocks": [
            {"token": (array(4, 6), array(6, 4)), "channel": (array(8, 10), array(10, 8))}
            for _ in range(2)
        ],
        "head": array(8, 3),
    }

    def apply(params, x):
        n = x.shape[0]
        x = x.reshape(n, 2, 2, 2, 2, 3).transpose(0, 1, 3, 2, 4, 5).reshape(n, 4, 12)
        x = x @ params["patch"]
        for block in params["blocks"]:
            up, down = block["token"]
            x = x + jnp.einsum("ntd,tu,us->nsd", x, up, down)
            up, down = block["channel"]
            x = x + jax.nn.gelu(x @ up) @ down
        return x.mean(1) @ params["head"]

    return apply, params, array(4, 4, 4, 3), ("token", "head", "patch", "channel")


def resnet_in_channels_first():
    """Residual blocks over images as NCHW, weights as OIHW, normalized by frozen statistics."""

    def conv(x, w, stride):
        return jax.lax.conv_general_dilated(
            x, w, (stride, stride), "SAME", dimension_numbers=("NCHW", "OIHW", "NCHW")
        )

    params = {
        "stem": array(6, 3, 3, 3),
        "blocks": [
            {"a": array(6, 6, 3, 3), "b": array(6, 6, 3, 3), "gain": jnp.ones(6)},
            {
                "a": array(8, 6, 3, 3),
                "b": array(8, 8, 3, 3),
                "gain": jnp.ones(8),
                "to": array(8, 6, 1, 1),
            },
        ],
        "out": array(8, 3),
    }

    def apply(params, x):
        x = conv(x, params["stem"], 1)
        for block in params["blocks"]:
            stride = 2 if "to" in block else 1
            y = conv(jax.nn.relu(conv(x, block["a"], stride)), block["b"], 1)
            y = y * block["gain"][None, :, None, None]
            x = jax.nn.relu(y + (conv(x, block["to"], 2) if "to" in block else x))
        return x.mean((2, 3)) @ params["out"]

    return apply, params, array(3, 3, 8, 8), ()


def state_space():
    """A selective state space layer, with its recurrence as an associative scan."""
    params = {"gate": array(5, 6), "inp": array(5, 6), "out": array(6, 3), "skip": array(5, 3)}

    def apply(params, x):
        decay, drive = jax.nn.sigmoid(x @ params["gate"]), x @ params["inp"]

        def join(a, b):
            return a[0] * b[0], b[0] * a[1] + b[1]

        _, state = jax.lax.associative_scan(join, (decay, drive), axis=1)
        return (state @ params["out"] + x @ params["skip"])[:, -1]

    return apply, params, array(4, 7, 5), ()


def experts():
    """A mixture of experts, each token sent to its best two, by one-hot products."""
    params = {
        "router": array(6, 4),
        "up": array(4, 6, 8),
        "down": array(4, 8, 6),
        "head": array(6, 3),
    }

    def apply(params, x):
        share = jax.nn.softmax(x @ params["router"])
        top, which = jax.lax.top_k(share, 2)
        send = (jax.nn.one_hot(which, 4, dtype=x.dtype) * top[..., None]).sum(-2)
        h = jax.nn.silu(jnp.einsum("ntd,edh->nteh", x, params["up"]))
        y = jnp.einsum("nteh,ehd,nte->ntd", h, params["down"], send)
        return (x + y).mean(1) @ params["head"]

    return apply, params, array(4, 5, 6), ()


def graph():
    """A graph network: messages along edges, added up by ``segment_sum``, one graph an example."""
    params = {"edge": array(10, 6), "node": array(5, 5), "join": array(6, 5), "out": array(5, 3)}

    def one(params, nodes, edges):
        for _ in range(2):
            ends = jnp.concatenate([nodes[edges[:, 0]], nodes[edges[:, 1]]], -1)
            messages = jax.nn.relu(ends @ params["edge"])
            gathered = jax.ops.segment_sum(messages, edges[:, 1], nodes.shape[0])
            nodes = jnp.tanh(nodes @ params["node"] + gathered @ params["join"])
        return nodes.sum(0) @ params["out"]

    def apply(params, x):
        return jax.vmap(one, (None, 0, 0))(params, *x)

    edges = jnp.asarray(RNG.integers(0, 4, (3, 7, 2)))
    return apply, params, (array(3, 4, 5), edges), ()


def flow_of_time():
    """A neural ODE by Runge-Kutta steps in a ``fori_loop``."""
    params = {"w1": array(4, 8), "b1": array(8), "w2": array(8, 4), "head": array(4, 3)}

    def slope(params, x):
        return jnp.tanh(x @ params["w1"] + params["b1"]) @ params["w2"]

    def apply(params, x):
        def step(_, x):
            k = slope(params, x)
            return x + 0.1 * slope(params, x + 0.05 * k)

        return jax.lax.fori_loop(0, 5, step, x) @ params["head"]

    return apply, params, array(4, 4), ()


def coupling_layers():
    """A normalizing flow of affine coupling layers: a whole loss, -log p of each example."""
    params = [
        {"w": array(2, 8), "b": array(8), "s": array(8, 2), "t": array(8, 2)} for _ in range(3)
    ]

    def loss(params, x):
        total = 0.0
        for layer in params:
            a, b = jnp.split(x, 2, -1)
            h = jnp.tanh(a @ layer["w"] + layer["b"])
            s = jnp.tanh(h @ layer["s"])
            x, total = jnp.concatenate([b * jnp.exp(s) + h @ layer["t"], a], -1), total + s.sum(-1)
        return 0.5 * (x**2).sum(-1) - total

    return loss, params, array(5, 4), ()


def weight_normalized():
    """Weights divided by their norms, which therefore have own shares."""
    params = {"v": array(5, 7), "g": jnp.ones(7), "head": array(7, 3)}

    def apply(params, x):
        w = params["v"] * (params["g"] / jnp.linalg.norm(params["v"], axis=0))[None]
        return jax.nn.elu(x @ w) @ params["head"]

    return apply, params, array(4, 5), ("v",)


def hypernetwork():
    """One network makes another's weights from the example itself."""
    params = {"make": array(3, 20), "first": array(3, 4), "last": array(5, 3)}

    def apply(params, x):
        w = (x @ params["make"]).reshape(-1, 4, 5)
        return jnp.tanh(jnp.einsum("ni,nio->no", x @ params["first"], w)) @ params["last"]

    return apply, params, array(4, 3), ()


def relative_attention():
    """Attention with learned biases by distance, and one projection, sliced for q, k and v."""
    params = {
        "qkv": array(6, 3, 2, 3),
        "bias": array(2, 9),
        "out": array(2, 3, 6),
        "head": array(6, 3),
    }

    def apply(params, x):
        q, k, v = (jnp.einsum("ntd,dhk->nhtk", x, params["qkv"][:, i]) for i in range(3))
        t = x.shape[1]
        distance = jnp.arange(t)[:, None] - jnp.arange(t)[None] + 4
        scores = jnp.einsum("nhtk,nhsk->nhts", q, k) + params["bias"][:, distance][None]
        y = jnp.einsum("nhts,nhsk,hkd->ntd", jax.nn.softmax(scores), v, params["out"])
        return (x + y).mean(1) @ params["head"]

    return apply, params, array(3, 5, 6), ("bias", "qkv")


MODELS = [
    mixer,
    resnet_in_channels_first,
    state_space,
    experts,
    graph,
    flow_of_time,
    coupling_layers,
    weight_normalized,
    hypernetwork,
    relative_attention,
]


@pytest.mark.full
@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.__name__)
def test_models_of_others(model):
    fn, params, x, owned = model()
    net, loss = jp.function(fn), jp.Mean()
    target = None
    n = jax.tree.leaves(x)[0].shape[0]
    if model is not coupling_layers:
        loss, target = jp.CrossEntropy(), jnp.arange(n) % 3

    def one(params, x, target):
        y = fn(params, jax.tree.map(lambda leaf: leaf[None], x))
        return loss.forward(y, None if target is None else target[None])[0][0]

    axes = None, 0, None if target is None else 0
    each = jax.vmap(jax.grad(one), axes)(params, x, target)
    asked = {
        "grads": jp.Gradient(),
        "each": jp.PerExampleGrads(),
        "norms": jp.SqNorms(),
        "gram": jp.Gram(),
        "moment": jp.SecondMoment(),
        "clipped": jp.Clipped(0.3),
    }
    got = jax.jit(jp.quantities(net, loss, **asked))(params, x, target)
    want = {
        "grads": jax.tree.map(lambda g: g.mean(0), each),
        "each": each,
        "norms": oracles.per_example_sq_norms.of(each),
        "gram": oracles.gram.of(each),
        "moment": oracles.second_moment.of(each),
        "clipped": oracles.clipped.of(each, 0.3),
    }
    for name, right in want.items():
        chex.assert_trees_all_equal_shapes(got[name], right)
        for a, b in zip(*map(jax.tree.leaves, (got[name], right)), strict=True):
            assert relative_error(a, b) <= CLOSE, name
    coverage = net.coverage(params, x)
    fell_back = {c.param for c in coverage.params if c.owned and len(c.shape) > 1}
    assert all(any(part in owned for part in param.split("/")) for param in fell_back), coverage
