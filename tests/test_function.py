"""``jp.function`` on plain JAX: networks, and every way in which a param may meet data."""

import gc
import itertools
import operator
import re
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracles
import pytest
from functions import Untapped, drawn, hold, hold_leaves, integers, normal, squashed
from jax import export, lax
from jax.example_libraries import stax
from jax.sharding import AxisType, PartitionSpec
from table import relative_error

import jaxprop as jp

VOCAB, WIDTH, HEADS, LENGTH = 7, 6, 2, 4


def struct(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float64)


def as_row(b, x):
    return b.reshape((1,) * (x.ndim - 1) + b.shape)


def mlp(params, x):
    for layer in params[:-1]:
        x = jnp.tanh(x @ layer["w"] + as_row(layer["b"], x))
    return x @ params[-1]["w"] + as_row(params[-1]["b"], x)


def mlp_params(*sizes):
    return drawn([{"w": struct(i, o), "b": struct(o)} for i, o in itertools.pairwise(sizes)])


def normed(x, scale):
    x = x - x.mean(-1, keepdims=True)
    return x * lax.rsqrt(jnp.mean(x**2, -1, keepdims=True) + 1e-5) * scale[None, None]


def attended(block, x):
    """Attention whose kernels are (D, heads, d) and (heads, d, D), by einsum."""
    q, k, v = (jnp.einsum("ntd,dhk->nthk", x, block[name]) for name in "qkv")
    scores = jnp.einsum("nthk,nshk->nhts", q, k) / np.sqrt(q.shape[-1])
    seen = jnp.tril(jnp.ones(scores.shape[-2:], bool))
    weights = jax.nn.softmax(jnp.where(seen[None, None], scores, -1e30))
    return jnp.einsum("nthk,hkd->ntd", jnp.einsum("nhts,nshk->nthk", weights, v), block["o"])


def block_of(block, x):
    x = x + attended(block, normed(x, block["scale"]))
    return x + jax.nn.gelu(normed(x, block["scale2"]) @ block["up"]) @ block["down"]


def gpt(params, ids):
    x = params["table"][ids] + params["positions"][None, : ids.shape[1]]
    for block in params["blocks"]:
        x = block_of(block, x)
    return jnp.einsum("ntd,vd->ntv", normed(x, params["scale"]), params["table"])


def gpt_scanned(params, ids):
    x = jnp.take(params["table"], ids, axis=0) + params["positions"][None, : ids.shape[1]]
    body = jax.checkpoint(lambda x, block: (block_of(block, x), None))
    x, _ = lax.scan(body, x, params["blocks"])
    return jnp.einsum("ntd,vd->ntv", normed(x, params["scale"]), params["table"])


def gpt_params(scanned=False):
    each = WIDTH // HEADS
    block = {name: struct(WIDTH, HEADS, each) for name in "qkv"} | {
        "o": struct(HEADS, each, WIDTH),
        "up": struct(WIDTH, 8),
        "down": struct(8, WIDTH),
        "scale": struct(WIDTH),
        "scale2": struct(WIDTH),
    }
    blocks = [drawn(block, 1), drawn(block, 2)]
    rest = {"table": struct(VOCAB, WIDTH), "positions": struct(9, WIDTH), "scale": struct(WIDTH)}
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *blocks)
    return drawn(rest) | {"blocks": stacked if scanned else blocks}


def vit(params, images):
    x = lax.conv_general_dilated(
        images, params["patches"], (2, 2), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    x = x.reshape(len(images), -1, WIDTH)
    token = jnp.broadcast_to(params["class"], (len(images), 1, WIDTH))
    x = jnp.concatenate([x, token], 1) + params["positions"][None]
    x = block_of(params["block"], x)
    return normed(x, params["scale"])[:, -1] @ params["head"]


def vit_params():
    rest = {
        "patches": struct(2, 2, 3, WIDTH),
        "class": struct(1, 1, WIDTH),
        "positions": struct(5, WIDTH),
        "head": struct(WIDTH, 3),
    }
    return drawn(rest) | {"scale": jnp.ones(WIDTH), "block": gpt_params()["blocks"][0]}


def lora(params, x):
    for base, adapter in zip(params["base"], params["adapters"], strict=True):
        x = jnp.tanh(x @ base["w"] + as_row(base["b"], x) + x @ adapter["a"] @ adapter["b"] * 0.5)
    return x


def lora_params():
    adapters = [{"a": struct(5, 2), "b": struct(2, 4)}, {"a": struct(4, 2), "b": struct(2, 3)}]
    return {"base": jp.freeze(mlp_params(5, 4, 3)), "adapters": drawn(adapters)}


def test_an_mlp():
    x, target = normal(5, 4), integers(3, 5)
    hold(mlp, mlp_params(4, 6, 3), x, target, jp.CrossEntropy(), moments=True, diagonal=True)


@pytest.mark.full
def test_an_mlp_of_sequences():
    hold(mlp, mlp_params(3, 4, 2), normal(3, 5, 3), normal(3, 5, 2), diagonal=True)


@pytest.mark.few(1)
@pytest.mark.parametrize(
    "name", ["conv, groups", "conv_transpose", "heads", "a tied table", "time"]
)
def test_the_diagonal_of_what_has_positions(name):
    fn, params, x, target, *_ = case_of(name)
    hold(fn, params, x, target, diagonal=True)


@pytest.mark.full
@pytest.mark.parametrize("scanned", [True, False])
def test_a_gpt_of_einsums(scanned):
    ids, target = integers(VOCAB, 3, LENGTH), integers(VOCAB, 3, LENGTH, seed=1)
    fn = gpt_scanned if scanned else gpt
    hold(fn, gpt_params(scanned), ids, target, jp.CrossEntropy(), owned="positions|scale")


@pytest.mark.full
def test_a_vision_transformer():
    hold(
        vit,
        vit_params(),
        normal(3, 4, 4, 3),
        integers(3, 3),
        jp.CrossEntropy(),
        owned="positions|class",
    )


def test_adapters_beside_a_frozen_base():
    hold(lora, lora_params(), normal(4, 5), normal(4, 3), moments=True, diagonal=True)


@pytest.mark.full
def test_the_networks_of_stax(standard_promotion):
    init, mnist = stax.serial(
        stax.Dense(8), stax.Relu, stax.Dense(8), stax.Relu, stax.Dense(3), stax.LogSoftmax
    )
    _, params = init(jax.random.key(0), (-1, 6))
    params = jax.tree.map(lambda a: a.astype(jnp.float64), params)

    def loss_fn(params, batch):
        x, target = batch
        return -jnp.mean(jnp.sum(mnist(params, x) * target, axis=1))

    target = jax.nn.one_hot(integers(3, 5), 3, dtype=jnp.float64)
    hold(loss_fn, params, (normal(5, 6), target))


def conv(layouts=("NHWC", "HWIO", "NHWC"), strides=(1, 1), padding="SAME", **options):
    def f(w, x):
        return lax.conv_general_dilated(
            x, w, strides, padding, dimension_numbers=layouts, **options
        )

    return f


@jax.custom_vjp
def reversed_on_the_way_back(x):
    return jnp.sin(x)


reversed_on_the_way_back.defvjp(lambda x: (jnp.sin(x), x), lambda x, ct: (-0.5 * ct * jnp.cos(x),))


@jax.custom_vjp
def product_with_a_rule(w, x):
    return x @ w


product_with_a_rule.defvjp(
    lambda w, x: (x @ w, (w, x)), lambda saved, ct: (saved[1].T @ ct * 2, ct @ saved[0].T)
)


def through_time(w, x):
    def step(h, x):
        h = jnp.tanh(h @ w["h"] + x @ w["x"] + as_row(w["b"], h))
        return h, h

    h, _ = lax.scan(step, jnp.zeros_like(x[:, 0]), jnp.moveaxis(x, 1, 0))
    return h


def through_layers(w, x, turn=lambda w: w):
    h, _ = lax.scan(lambda h, layer: (jnp.tanh(h @ turn(layer)), None), x, w)
    return h


def layers_of_time(w, x):
    """A scan over layers, each with a scan over time."""

    def layer(x, w):
        def step(h, x):
            h = jnp.tanh(h @ w["h"] + x @ w["x"])
            return h, h

        return lax.scan(step, jnp.zeros(x.shape[1:]), x)[1], None

    return lax.scan(layer, jnp.moveaxis(x, 1, 0), w)[0][-1]


def time_of_layers(w, x):
    """A scan over time, with each step a scan over layers."""

    def step(h, x):
        h, _ = lax.scan(lambda h, w: (jnp.tanh(h @ w + x), None), h, w)
        return h, None

    return lax.scan(step, jnp.zeros((len(x), 3)), jnp.moveaxis(x, 1, 0))[0]


def layers_of_layers(w, x):
    def outer(x, w):
        return lax.scan(lambda x, w: (jnp.sin(x @ w), None), x, w)[0], None

    return lax.scan(outer, x, w)[0]


def carried(w, x):
    def step(carry, _):
        w, x = carry
        return (w * 0.5, jnp.tanh(x @ w)), None

    return lax.scan(step, (w, x), length=3)[0][1]


def looped(w, x):
    return lax.fori_loop(0, 3, lambda i, x: jnp.tanh(x @ w), x)


def looped_over_rows(w, x):
    """A loop whose steps index a stack of layers by the step's number."""
    return lax.fori_loop(0, 2, lambda i, x: jnp.tanh(x @ w[i]), x)


def either(w, x):
    """Each example takes its own branch, with its own params."""

    def of_one(x):
        return lax.cond(x[0] > 0, lambda x: jnp.tanh(x @ w["a"]), lambda x: x @ w["b"], x)

    return jax.vmap(of_one)(x)


def switched(w, x):
    """A switch by a number that does not depend on the example."""
    branches = [lambda x: jnp.tanh(x @ w["a"]), lambda x: x @ w["b"], lambda x: x]
    return lax.switch(w["which"].astype(int), branches, x)


def switched_in_a_scan(w, x):
    def step(x, i):
        return lax.cond(i % 2 == 0, lambda x: jnp.tanh(x @ w["a"]), lambda x: x @ w["b"], x), None

    return lax.scan(step, x, jnp.arange(3))[0]


def remat(w, x):
    return jax.checkpoint(lambda w, x: jnp.tanh(x @ w["a"]) @ w["b"])(w, x) @ w["b"].T


def lstm_of_joined_kernels(w, x):
    kernel = jnp.concatenate([w["i"], w["f"], w["g"], w["o"]], axis=-1)
    recurrent = jnp.concatenate([w["hi"], w["hf"], w["hg"], w["ho"]], axis=-1)

    def step(carry, x):
        c, h = carry
        i, f, g, o = jnp.split(x @ kernel + h @ recurrent, 4, axis=-1)
        c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
        return (c, jax.nn.sigmoid(o) * jnp.tanh(c)), None

    zero = jnp.zeros((len(x), 3))
    return lax.scan(step, (zero, zero), jnp.moveaxis(x, 1, 0))[0][1]


def twos(*names):
    return {name: struct(3, 3) for name in names}


# By name: a function, its params, the shape of x (or ids), and the params that have own shares.
X, SEQUENCE, IMAGES = (4, 3), (3, 5, 3), (2, 6, 5, 4)
DATA = jnp.asarray([[1.0, 2.0], [3.0, 4.0]])
NWC = ("NWC", "WIO", "NWC")
NO_AXES = lax.ConvDimensionNumbers((0, 1), (0, 1), (0, 1))


def below(*arrays):
    return jnp.concatenate(arrays, axis=0)


def beside(*arrays):
    return jnp.concatenate(arrays, axis=1)


CASES = {
    "x w": (lambda w, x: x @ w, struct(3, 2), X),
    "w x": (lambda w, x: (w @ x.T).T, struct(2, 3), X),
    "w.T": (lambda w, x: x @ w.T, struct(2, 3), X),
    "w x per example": (lambda w, x: jax.vmap(lambda x: w @ x)(x), struct(2, 3), X),
    "a vector": (lambda w, x: x @ w, struct(3), X),
    "no contraction": (lambda w, x: jnp.einsum("ni,o->nio", x, w), struct(2), X),
    "two contracted": (lambda w, x: jnp.einsum("nij,ijo->no", x, w), struct(5, 3, 2), SEQUENCE),
    "two contracted, crossed": (
        lambda w, x: jnp.einsum("nij,ojip->npo", x, w),
        struct(2, 3, 5, 2),
        SEQUENCE,
    ),
    "batched": (lambda w, x: jnp.einsum("nij,ijo->nio", x, w), struct(5, 3, 2), SEQUENCE),
    "batched, on the left": (
        lambda w, x: jnp.einsum("oij,nij->nio", w, x),
        struct(2, 5, 3),
        SEQUENCE,
    ),
    "batched twice": (lambda w, x: jnp.einsum("nijk,ijko->njio", x, w), struct(6, 5, 4, 2), IMAGES),
    "batched, nothing contracted": (
        lambda w, x: jnp.einsum("nij,io->nijo", x, w),
        struct(5, 2),
        SEQUENCE,
    ),
    "raw dimension numbers": (
        lambda w, x: lax.dot_general(x, w, (((3, 1), (0, 2)), ((2,), (1,)))).transpose(1, 0, 2),
        struct(4, 5, 6, 2),
        IMAGES,
    ),
    "raw, w on the left": (
        lambda w, x: lax.dot_general(w, x, (((2, 0), (1, 3)), ((1,), (2,)))).transpose(2, 0, 1),
        struct(4, 5, 6, 2),
        IMAGES,
    ),
    "heads": (
        lambda w, x: jnp.einsum(
            "nthk,hkd->ntd", jnp.tanh(jnp.einsum("ntd,dhk->nthk", x, w["i"])), w["o"]
        ),
        {"i": struct(3, 2, 4), "o": struct(2, 4, 3)},
        SEQUENCE,
    ),
    "positions before the contraction": (
        lambda w, x: jnp.einsum("ntd,ts->nsd", x, w),
        struct(5, 2),
        SEQUENCE,
    ),
    "nothing to contract": (
        lambda w, x: jnp.sin(x[:, :0] @ w["none"] + x @ w["w"]),
        {"none": struct(0, 2), "w": struct(3, 2)},
        X,
    ),
    "a bias": (lambda w, x: jnp.sin(x + as_row(w, x)), struct(3), SEQUENCE),
    "a scale": (lambda w, x: jnp.sin(x * as_row(w, x)), struct(3), SEQUENCE),
    "a scalar": (lambda w, x: x * w, struct(), X),
    "conv": (conv(), struct(3, 2, 4, 3), IMAGES),
    "conv, strides, padding, dilation": (
        conv(strides=(2, 1), padding=((1, 0), (2, 1)), rhs_dilation=(2, 1)),
        struct(2, 3, 4, 3),
        IMAGES,
    ),
    "conv, groups": (conv(feature_group_count=2), struct(3, 3, 2, 6), IMAGES),
    "conv, depthwise": (conv(feature_group_count=4, strides=(2, 2)), struct(3, 3, 1, 8), IMAGES),
    "conv, transposed": (
        conv(padding=((2, 1), (1, 1)), lhs_dilation=(2, 3)),
        struct(3, 2, 4, 3),
        IMAGES,
    ),
    "conv, NCHW OIHW": (conv(("NCHW", "OIHW", "NCHW")), struct(3, 6, 2, 2), IMAGES),
    "conv, mixed layouts": (conv(("NHWC", "WOHI", "NWCH")), struct(2, 3, 3, 4), IMAGES),
    "conv, a negative pad": (conv(padding=((-1, 1), (0, -1))), struct(2, 2, 4, 3), IMAGES),
    "conv, a flipped kernel": (lambda w, x: conv()(w[::-1, ::-1], x), struct(3, 2, 4, 3), IMAGES),
    "conv, kernel transposed first": (
        lambda w, x: conv()(w.transpose(1, 2, 3, 0), x),
        struct(3, 2, 2, 4),
        IMAGES,
    ),
    "conv_transpose": (
        lambda w, x: lax.conv_transpose(x, w, (2, 2), "SAME"),
        struct(3, 3, 4, 2),
        IMAGES,
    ),
    "conv_transpose, transposed kernel": (
        lambda w, x: lax.conv_transpose(x, w, (2, 1), "VALID", transpose_kernel=True),
        struct(3, 3, 2, 4),
        IMAGES,
    ),
    "conv of sequences": (
        lambda w, x: lax.conv_general_dilated(
            x, w, (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC")
        ),
        struct(3, 3, 2),
        SEQUENCE,
    ),
    "conv of volumes": (
        lambda w, x: lax.conv_general_dilated(
            x[..., None], w, (1, 2, 1), "SAME", dimension_numbers=("NDHWC", "DHWIO", "NDHWC")
        ),
        struct(2, 2, 2, 1, 2),
        IMAGES,
    ),
    "conv shared by frames": (
        lambda w, x: jax.vmap(
            lambda x: lax.conv_general_dilated(
                x, w, (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC")
            ),
            1,
            1,
        )(x),
        struct(2, 4, 3),
        IMAGES,
    ),
    "conv under vmap": (
        lambda w, x: jax.vmap(lambda x: conv()(w, x[None])[0])(x),
        struct(2, 2, 4, 3),
        IMAGES,
    ),
    "conv of several kernels": (
        lambda w, x: jax.vmap(lambda w: conv()(w, x), out_axes=1)(w),
        struct(2, 3, 3, 4, 2),
        IMAGES,
    ),
    "table[ids]": (lambda w, ids: w[ids], struct(7, 3), 7),
    "table[id] of each": (lambda w, ids: jax.vmap(jax.vmap(lambda i: w[i]))(ids), struct(7, 3), 7),
    "table[id] of each, matrices": (
        lambda w, ids: jax.vmap(jax.vmap(lambda i: w[i - 7]))(ids),
        struct(7, 2, 3),
        7,
    ),
    "table[id], one for an example": (
        lambda w, ids: jax.vmap(lambda ids: w[ids[0] + ids[1]])(ids),
        struct(7, 3),
        7,
    ),
    "table[id] of each, numbers": (
        lambda w, ids: jax.vmap(jax.vmap(lambda i: jnp.sin(w[i])))(ids),
        struct(7),
        7,
    ),
    "take, clipped": (lambda w, ids: jnp.take(w, ids + 3, axis=0, mode="clip"), struct(7, 3), 7),
    "take, filled": (
        lambda w, ids: jnp.take(w, ids + 3, axis=0, mode="fill", fill_value=0.0),
        struct(7, 3),
        7,
    ),
    "take of matrices": (lambda w, ids: w[ids], struct(7, 2, 3), 7),
    "take of numbers": (lambda w, ids: jnp.sin(w[ids]), struct(7), 7),
    "take of columns": (
        lambda w, ids: jnp.moveaxis(jnp.take(w, ids, axis=1), 0, -1),
        struct(3, 7),
        7,
        "",
    ),
    "one-hot": (lambda w, ids: jax.nn.one_hot(ids, 7, dtype=w.dtype) @ w, struct(7, 3), 7),
    "a tied table": (lambda w, ids: jnp.tanh(w[ids]) @ w.T, struct(7, 3), 7),
    "a table scaled": (lambda w, ids: (w * 2)[ids], struct(7, 3), 7, ""),
    "reshaped": (lambda w, x: x @ w.reshape(3, 4), struct(2, 6), X),
    "ravelled": (lambda w, x: x @ w[:6].reshape(3, 2) + as_row(w[6:], x), struct(8), X),
    "reshaped by columns": (lambda w, x: x @ w.reshape(3, 4, order="F"), struct(2, 6), X),
    "ravelled by columns": (lambda w, x: x @ w.ravel("F")[:3], struct(2, 6), X),
    "transposed and reshaped": (
        lambda w, x: x @ w.transpose(2, 0, 1).reshape(3, 4),
        struct(2, 2, 3),
        X,
    ),
    "squeezed": (lambda w, x: x @ w[0], struct(1, 3, 2), X),
    "sliced": (lambda w, x: x @ w[1:4, ::2], struct(5, 5), X),
    "all of a stack, one by one": (
        lambda w, x: jnp.tanh(jnp.tanh(x @ w[0]) @ w[1]) @ w[2],
        struct(3, 3, 3),
        X,
    ),
    "split in three": (
        lambda w, x: sum(jnp.tanh(x @ part) for part in jnp.split(w, 3, axis=1)),
        struct(3, 6),
        X,
    ),
    "turned around": (lambda w, x: x @ jnp.flip(w, 0), struct(3, 2), X),
    "cast": (lambda w, x: x @ w.astype(jnp.float64), struct(3, 2), X),
    "scaled": (lambda w, x: x @ (w * 0.3), struct(3, 2), X),
    "scaled by what is computed": (
        lambda w, x: x @ (2 / jnp.sqrt(jnp.float64(w.shape[0])) * -w / 3),
        struct(3, 2),
        X,
    ),
    "scaled before and after a move": (lambda w, x: x @ ((w * 0.5).T * 3), struct(2, 3), X),
    "scaled by another param": (
        lambda w, x: x @ (w["w"] * w["s"]),
        {"w": struct(3, 2), "s": struct()},
        X,
        "w",
    ),
    "weight normalization": (
        lambda w, x: x @ (w / jnp.linalg.norm(w, axis=0, keepdims=True)),
        struct(3, 2),
        X,
        "",
    ),
    "clipped": (lambda w, x: x @ jnp.clip(w, -0.3, 0.3), struct(3, 2), X, ""),
    "broadcast": (
        lambda w, x: jnp.einsum("ni,nio->no", x, jnp.broadcast_to(w, (len(x), *w.shape))),
        struct(3, 2),
        X,
        "",
    ),
    "columns joined": (
        lambda w, x: x @ jnp.concatenate([w["a"], w["b"]], 1),
        {"a": struct(3, 2), "b": struct(3, 1)},
        X,
    ),
    "rows joined": (
        lambda w, x: x @ jnp.concatenate([w["a"], w["b"]], 0),
        {"a": struct(2, 4), "b": struct(1, 4)},
        X,
    ),
    "rows joined, on the left": (
        lambda w, x: (jnp.concatenate([w["a"], w["b"]], 0) @ x.T).T,
        {"a": struct(2, 3), "b": struct(1, 3)},
        X,
    ),
    "joined along a batch axis": (
        lambda w, x: jnp.einsum("nij,ijo->nio", x, jnp.concatenate([w["a"], w["b"]], 0)),
        {"a": struct(2, 3, 2), "b": struct(3, 3, 2)},
        SEQUENCE,
    ),
    "joined with a constant": (
        lambda w, x: x @ jnp.concatenate([w, jnp.ones((1, 2))], 0),
        struct(2, 2),
        X,
    ),
    "joined, one of them twice": (
        lambda w, x: x @ jnp.concatenate([w["a"], w["b"], w["a"]], 1),
        {"a": struct(3, 2), "b": struct(3, 1)},
        X,
    ),
    "joined and transposed": (
        lambda w, x: x @ jnp.concatenate([w["a"], w["b"]], 0).T,
        twos("a", "b"),
        X,
        "",
    ),
    "stacked": (
        lambda w, x: jnp.einsum("ni,gio->ngo", x, jnp.stack([w["a"], w["b"]])),
        twos("a", "b"),
        X,
    ),
    "stacked along the last axis": (
        lambda w, x: jnp.einsum("ni,iog->ngo", x, jnp.stack([w["a"], w["b"].T], -1)),
        twos("a", "b"),
        X,
    ),
    "stacked for a scan": (
        lambda w, x: through_layers(jnp.stack([w["a"], w["b"]]), x),
        twos("a", "b"),
        X,
    ),
    "joined for a scan, and turned there": (
        lambda w, x: through_layers(jnp.concatenate([w["a"], w["b"], w["a"]]), x, jnp.transpose),
        {"a": struct(1, 3, 3), "b": struct(2, 3, 3)},
        X,
    ),
    "joined in each layer of a scan": (
        lambda w, x: through_layers(jnp.concatenate([w["a"], w["b"]], -1), x),
        {"a": struct(2, 3, 1), "b": struct(2, 3, 2)},
        X,
    ),
    "two params in one product": (lambda w, x: x @ (w["a"] @ w["b"]), twos("a", "b"), X, "a|b"),
    "twice": (lambda w, x: jnp.tanh(x @ w) @ w, struct(3, 3), X),
    "twice, once transposed": (lambda w, x: jnp.tanh(x @ w) @ w.T, struct(3, 2), X),
    "once in a product, once not": (
        lambda w, x: x @ w * jnp.sum(w**2) + jnp.sin(x) @ w,
        struct(3, 3),
        X,
        "",
    ),
    "batched, and once not": (
        lambda w, x: jnp.einsum("nij,ijo->nio", x, w) * jnp.sum(w**2),
        struct(5, 3, 2),
        SEQUENCE,
        "",
    ),
    "batched, as many as examples": (
        lambda w, x: jnp.sin(jnp.einsum("nij,ijo->nio", x[:, :3], w)) + x[:, :3] @ w[0],
        struct(3, 3, 2),
        SEQUENCE,
    ),
    "layers, and one of them alone": (
        lambda w, x: through_layers(w, x) + jnp.sin(x @ w[1]),
        struct(2, 3, 3),
        X,
    ),
    "unused": (lambda w, x: x @ w["a"], twos("a", "b"), X),
    "used for nothing": (
        lambda w, x: x @ w["a"] + 0 * lax.stop_gradient(x @ w["b"]),
        twos("a", "b"),
        X,
    ),
    "stopped on one way": (
        lambda w, x: jnp.sin(x @ w) + lax.stop_gradient(w.sum() * 1.0),
        struct(3, 3),
        X,
        "",
    ),
    "time": (through_time, {"h": struct(3, 3), "x": struct(3, 3), "b": struct(3)}, SEQUENCE),
    "layers": (through_layers, struct(4, 3, 3), X),
    "layers, of sequences": (through_layers, struct(2, 3, 3), SEQUENCE),
    "layers of time": (layers_of_time, {"h": struct(2, 3, 3), "x": struct(2, 3, 3)}, SEQUENCE),
    "time of layers": (time_of_layers, struct(2, 3, 3), SEQUENCE),
    "layers of layers": (layers_of_layers, struct(2, 3, 3, 3), X),
    "carried": (carried, struct(3, 3), X, ""),
    "fori_loop": (looped, struct(3, 3), X),
    "fori_loop over a stack": (looped_over_rows, struct(2, 3, 3), X, ""),
    "cond of each example": (either, twos("a", "b"), X, ""),
    "switch in a scan": (switched_in_a_scan, twos("a", "b"), X),
    "checkpoint": (remat, twos("a", "b"), X),
    "kernels joined in a scan": (
        lstm_of_joined_kernels,
        {name: struct(3, 3) for name in ("i", "f", "g", "o", "hi", "hf", "hg", "ho")},
        SEQUENCE,
    ),
    "custom_jvp": (lambda w, x: squashed(x @ w), struct(3, 3), X),
    "custom_vjp": (lambda w, x: reversed_on_the_way_back(x @ w), struct(3, 3), X),
    "custom_vjp of a param": (lambda w, x: product_with_a_rule(w, x), struct(3, 3), X, ""),
    "jit inside": (lambda w, x: jax.jit(lambda w, x: jnp.sin(x @ w))(w, x), struct(3, 3), X),
    "jit inside of what is not data": (
        lambda w, x: x @ jax.jit(lambda w: w.T * 2)(w),
        struct(3, 3),
        X,
    ),
    "vmap inside": (
        lambda w, x: jax.vmap(lambda x: jnp.tanh(w["a"] @ x) @ w["b"])(x),
        twos("a", "b"),
        X,
    ),
    "vmap over heads": (
        lambda w, x: jax.vmap(lambda w: jnp.tanh(x @ w), out_axes=-1)(w),
        struct(4, 3, 2),
        X,
    ),
    "vmap over positions": (
        lambda w, x: jax.vmap(lambda x: jnp.tanh(x @ w), 1, 1)(x),
        struct(3, 2),
        SEQUENCE,
    ),
    "numbers in a list": (
        lambda w, x: x @ w[0] + as_row(w[1][0], x),
        [struct(3, 2), (struct(2),)],
        X,
    ),
    "made complex": (
        lambda w, x: jnp.abs(jnp.exp(lax.complex(x, x @ w["a"])) @ lax.complex(w["a"], w["b"])),
        twos("a", "b"),
        X,
        "",
    ),
    "cast to complex": (
        lambda w, x: (lax.complex(x, x**2) @ w.astype(complex)).real,
        struct(3, 3),
        X,
        "",
    ),
    "pairs, added up": (
        lambda w, x: jnp.tanh((x @ w["a"])[:, :, None] + (x @ w["b"])[:, None]),
        twos("a", "b"),
        (4, 5, 3),
    ),
    "one for all of a row, added": (
        lambda w, x: x @ w["a"] + x.mean(1, keepdims=True) @ w["b"],
        twos("a", "b"),
        SEQUENCE,
    ),
    "one of each, added": (
        lambda w, x: x @ w["a"] + x @ w["b"],
        {"a": struct(3, 4), "b": struct(3, 1)},
        X,
    ),
    "rows of two tables, added": (
        lambda w, x: w["a"][x][:, :, None] + w["b"][x][:, None],
        twos("a", "b"),
        3,
    ),
    "joined with data, and again": (
        lambda w, x: jnp.sin(x @ below(below(DATA, w["a"][:2]), DATA)),
        {"a": struct(3, 2)},
        (3, 6),
        "",
    ),
    "joined with data, then with another part": (
        lambda w, x: jnp.sin(x @ below(below(DATA, w["a"][:2]), w["a"][2:])),
        {"a": struct(4, 2)},
        (3, 6),
        "",
    ),
    "joined with data, beside itself": (
        lambda w, x: jnp.sin(x @ beside(below(w[:2], DATA), below(w[:2], DATA))),
        struct(3, 2),
        (3, 4),
        "",
    ),
    "an axis of one batched, and all contracted": (
        lambda w, x: (
            jnp.sin(lax.dot_general(x, w, (((2,), (1,)), ((1,), (0,))))).sum(0)
            + jnp.cos(jnp.tensordot(x, w, ((1, 2), (0, 1))))
        ),
        struct(1, 2),
        (3, 1, 2),
        "",
    ),
    "a convolution over nothing": (
        lambda w, x: lax.conv_general_dilated(x, w, (), [], dimension_numbers=NO_AXES),
        struct(2, 3),
        X,
        "",
    ),
    "a vector as a row and as a column": (
        lambda w, x: jnp.tanh(x @ w)[:, None] * jnp.einsum("n,d->nd", jnp.cos(x @ w), w),
        struct(3),
        X,
    ),
    "fft": (
        lambda w, x: jnp.fft.irfft(jnp.fft.rfft(x) * jnp.fft.rfft(w)[None], n=3),
        struct(3),
        X,
    ),
    "grad inside": (lambda w, x: jax.grad(lambda x: jnp.sum(jnp.sin(x @ w)))(x), struct(3, 3), X),
    "cumulative, sorted, reduced": (
        lambda w, x: jnp.sort(jnp.cumsum(x @ w, axis=1), axis=1).max(1),
        struct(3, 3),
        SEQUENCE,
    ),
}


def case_of(name):
    fn, shapes, x, *owned = CASES[name]
    x = integers(x, 3, 4) if isinstance(x, int) else normal(*x)
    params = drawn(shapes)
    y = jax.eval_shape(fn, params, x)
    return fn, params, x, normal(*y.shape, seed=3), *owned


@pytest.mark.few(4)
@pytest.mark.parametrize("name", CASES)
def test_a_param_that_meets_data(name):
    fn, params, x, target, *owned = case_of(name)
    unused = {"unused": "b", "used for nothing": "b", "nothing to contract": "none"}
    unused = unused.get(name, "(?!)")
    hold(fn, params, x, target, owned=owned[0] if owned else "(?!)", zero=f"/{unused}$")


LOSS = jp.CrossEntropy()
MLP = mlp_params(4, 5, 3)
BATCH = normal(6, 4), integers(3, 6)


def oracle(fn, loss, *args, bound=None):
    """The mean loss, the mean of the clipped gradients, and each example's gradient."""
    plain = Untapped(fn)

    @jax.jit
    def of(*args):
        each = oracles.per_example_grads(plain, loss)(*args)
        mean = jax.tree.map(lambda g: g.mean(0), each)
        clipped = mean if bound is None else oracles.clipped.of(each, bound)
        return jp.loss_fn(plain, loss)(*args), clipped, each

    return of(*args)


def example_losses(params, batch):
    x, target = batch
    return -jnp.take_along_axis(jax.nn.log_softmax(mlp(params, x)), target[:, None], 1)[:, 0]


def mean_loss(params, batch):
    return jnp.mean(example_losses(params, batch))


@pytest.mark.few(1)
@pytest.mark.parametrize("loss_fn", [mean_loss, example_losses])
def test_a_whole_loss_of_a_batch(loss_fn):
    """It gives the same results as the network with the library's loss, and takes no target."""
    hold(loss_fn, MLP, BATCH)
    got = jax.jit(jp.clipped_grad(jp.function(loss_fn), jp.Mean(), 0.4))(MLP, BATCH)
    want = jax.jit(jp.clipped_grad(jp.function(mlp), LOSS, 0.4))(MLP, *BATCH)
    assert relative_error(got, want) <= 1e-12


@pytest.mark.full
def test_a_loss_of_several_numbers_an_example():
    hold(
        lambda params, batch: (mlp(params, batch[0]) - batch[1]) ** 2, MLP, (BATCH[0], normal(6, 3))
    )


@pytest.mark.few(1)
@pytest.mark.parametrize("key", [False, True], ids=["tuple", "dict"])
def test_a_y_of_several_arrays(key):
    def two(params, x):
        h = jnp.tanh(mlp(params["body"], x))
        a, b = h @ params["a"], jnp.cos(h @ params["b"])
        return {"a": a, "b": b} if key else (a, b)

    names = ("a", "b") if key else (0, 1)
    params = {"body": MLP} | drawn({"a": struct(3, 2), "b": struct(3, 4)})
    first, second = jp.CrossEntropy(), jp.HalfSquaredError()
    loss = (
        jp.total_loss(**{"a": first, "b": (0.5, second)})
        if key
        else jp.total_loss(first, (0.5, second))
    )
    targets = integers(2, 6), normal(6, 4)
    target = dict(zip(names, targets, strict=True)) if key else targets
    hold(two, params, BATCH[0], target, loss, diagonal=True)


def of_dict(params, x):
    h = jnp.tanh(x @ params)
    return {"h": h, "most": h.argmax(-1), "wave": jnp.exp(lax.complex(jnp.zeros_like(h), h))}


def from_dict(params, x):
    return x["h"] @ params + x["wave"].real @ params.T + params[x["most"]]


def test_integers_and_complex_numbers_between_two_functions():
    """Integers have no cotangent, and complex numbers have one."""
    params, x = tuple(drawn([struct(3, 3), struct(3, 3)])), normal(4, 3)
    net = jp.chain(jp.function(of_dict), jp.function(from_dict))
    loss, target = jp.HalfSquaredError(), normal(4, 3, seed=1)
    asked = {"each": jp.PerExampleGrads(), "norms": jp.SqNorms()}
    got = jax.jit(jp.quantities(net, loss, **asked))(params, x, target)

    def whole(params, x):
        return from_dict(params[1], of_dict(params[0], x))

    _, _, each = oracle(whole, loss, params, x, target)
    hold_leaves((got["each"], got["norms"]), (each, oracles.per_example_sq_norms.of(each)))


def loss_and_hits(params, batch):
    x, target = batch
    logits = mlp(params, x)
    hits = logits.argmax(-1) == target
    return example_losses(params, batch), {"hits": hits, "numbers": hits.astype(int)}


def test_ids_of_eight_bits():
    """A gather that clips its ids takes them from tables with more rows than uint8 can count."""
    ids, table = np.array([[0, 255], [200, 7], [3, 43]], np.uint8), drawn(struct(300, 2))

    def fn(w, x):
        return jnp.sin(jax.vmap(lambda ids: w.at[ids].get(mode="clip"))(x)).sum(1)

    f = jax.jit(jp.per_example_grads(jp.function(fn), jp.loss(jnp.sum)))
    got, want = f(table, ids), np.zeros((3, 300, 2))
    for n, row in enumerate(ids):
        for i in row:
            want[n, i] += np.cos(table[i])
    assert relative_error(got, want) <= 1e-12


@pytest.mark.usefixtures("standard_promotion")
def test_the_number_that_a_param_is_multiplied_by_is_not_rounded_to_the_data():
    x, w = normal(3, 8).astype(np.float16), normal(8, 4).astype(np.float32)

    def fn(w, x):
        return ((x @ (w * 1e-6)) * 1e6).sum(1, keepdims=True)

    each = jax.jit(jp.per_example_grads(jp.function(fn), jp.HalfSquaredError()))
    got = each(w, x, np.zeros((3, 1), np.float32))
    y = x.astype(np.float64) @ w.astype(np.float64)
    want = np.einsum("n,ni,o->nio", y.sum(1), x.astype(np.float64), np.ones(4))
    assert relative_error(np.asarray(got, np.float64), want) <= 1e-4


@pytest.mark.filterwarnings("ignore:Casting complex values")  # by jax.grad in JAX 0.8
@pytest.mark.usefixtures("standard_promotion")
def test_complex_data_and_real_params():
    def layers(w, x):
        h, _ = lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x + 1j, w["b"].astype(complex))
        return jnp.abs(h) ** 2

    params = drawn({"a": struct(3, 3), "b": struct(2, 3, 3)})
    hold(lambda w, x: jnp.abs(jnp.fft.fft(x) @ w) ** 2, params["a"], normal(4, 3), owned="")
    hold(layers, {"b": params["b"]}, normal(4, 3), owned="")


def test_where_no_window_fits_the_gradient_is_zero():
    def fn(w, x):
        options = {"rhs_dilation": (9,), "dimension_numbers": NWC}
        y = lax.conv_general_dilated(x, w, (1,), "VALID", **options)
        return y.sum((1, 2)) + x.sum((1, 2))

    each = jp.per_example_grads(jp.function(fn), jp.Mean())(drawn(struct(2, 5, 2)), normal(4, 3, 5))
    assert not each.any()


def test_what_nothing_reads_before_a_scan_through_layers():
    def fn(params, x):
        h = jnp.tanh(x @ params["a"]["k"])
        unread = jnp.sin(h)
        h, _ = lax.scan(lambda h, w: (jnp.tanh(h @ w["k"]), None), h, params["b"])
        jnp.cos(unread).sum()
        return h

    params = drawn({"a": {"k": struct(4, 4)}, "b": {"k": struct(2, 4, 4)}})
    hold(fn, params, BATCH[0], normal(6, 4))


def test_what_a_loss_function_returns_beside_its_value():
    """Integers and booleans in it have no cotangent."""
    net, loss = jp.function(loss_and_hits), jp.loss(operator.itemgetter(0))
    alone = jp.function(example_losses)
    for of in (jp.value_and_grad, jp.per_example_sq_norms, jp.second_moment):
        got = jax.jit(of(net, loss))(MLP, BATCH)
        assert relative_error(got, jax.jit(of(alone, jp.Mean()))(MLP, BATCH)) <= 1e-12
    got, want = (
        jax.jit(jp.hvp(*pair))(MLP, BATCH, v=MLP) for pair in ((net, loss), (alone, jp.Mean()))
    )
    assert relative_error(got, want) <= 1e-12


def test_a_loss_of_complex_numbers():
    """Complex outputs have a cotangent, as they have between two functions."""

    def loss(y, target):
        return jnp.sum((y["h"] - target) ** 2) + jnp.sum(y["wave"].real * target)

    def of_mean(w):
        y = of_dict(w, x)
        return jnp.mean(jax.vmap(loss)(y, target))

    w, x, target = drawn(struct(3, 3)), normal(4, 3), normal(4, 3, seed=1)
    _, got = jax.jit(jp.value_and_grad(jp.function(of_dict), jp.loss(loss)))(w, x, target)
    assert relative_error(got, jax.grad(of_mean)(w)) <= 1e-12


@pytest.mark.full
def test_curvature_of_a_loss_of_one_part_of_y():
    def both(params, x):
        y = mlp(params, x)
        return {"y": y, "best": y.argmax(-1)}

    def norm(y, target):
        return jnp.sum((y - target) ** 4)

    target = normal(6, 3)
    pairs = [
        (jp.function(both), jp.loss(lambda y, target: norm(y["y"], target))),
        (jp.function(mlp), jp.loss(norm)),
    ]
    for of in (jp.diag_ggn, jp.ggn_root):
        got, want = (jax.jit(of(*pair))(MLP, BATCH[0], target) for pair in pairs)
        assert relative_error(got, want) <= 1e-10
    for of in (jp.ggn_vp, jp.fisher_vp):
        got, want = (jax.jit(of(*pair))(MLP, BATCH[0], target, MLP) for pair in pairs)
        assert relative_error(got, want) <= 1e-10


@jax.custom_vjp
def reverse(x):
    return x


reverse.defvjp(lambda x: (x, ()), lambda _, ct: (-ct,))


def reversed_on_the_way(params, x):
    return mlp(params["rest"], reverse(jnp.tanh(x @ params["first"])))


def test_hessian_products_of_a_function_with_a_rule_of_its_own():
    """Forward over reverse uses the rule, as ``jax.jvp`` of ``jax.grad`` does."""
    params = {"first": normal(4, 4), "rest": MLP}
    net = jp.function(reversed_on_the_way)
    plain = jp.loss_fn(Untapped(reversed_on_the_way), LOSS)
    want = jax.jvp(jax.grad(lambda params: plain(params, *BATCH)), (params,), (params,))[1]
    assert relative_error(jax.jit(jp.hvp(net, LOSS))(params, *BATCH, v=params), want) <= 1e-12


def test_complex_params_are_refused():
    """Those that are not learned are accepted."""

    def fn(params, x):
        return jnp.abs(lax.complex(x, x) @ params["c"]) @ params["w"]

    params = {"c": lax.complex(normal(3, 3), normal(3, 3)), "w": normal(3, 2)}
    norms = jp.per_example_sq_norms(jp.function(fn), jp.HalfSquaredError())
    with pytest.raises(TypeError, match=r"params\['c'\] is complex128; what is learned is real"):
        norms(params, normal(4, 3), normal(4, 2))
    hold(fn, params | {"c": jp.Unlearned(params["c"])}, normal(4, 3), normal(4, 2))


def test_examples_coupled_by_an_imaginary_part_are_refused():
    def fn(w, x):
        return jnp.exp(lax.complex(x, x @ w - jnp.mean(x @ w, axis=0, keepdims=True)))

    net = jp.chain(jp.function(fn), jp.function(lambda _, x: x.imag))
    norms = jp.per_example_sq_norms(net, jp.HalfSquaredError())
    with pytest.raises(ValueError, match="a different y in a batch than alone"):
        norms((normal(3, 3), ()), normal(4, 3), normal(4, 3))


def test_an_x_of_floats_ids_and_a_key_for_each_example():
    def noisy(params, x):
        drop = jax.vmap(lambda key: jax.random.bernoulli(key, 0.7, (3,)))(x["key"])
        h = jnp.tanh(params["table"][x["ids"]] + x["floats"] @ params["w"])
        return jnp.where(drop, h, 0) @ params["out"]

    params = drawn({"table": struct(7, 3), "w": struct(4, 3), "out": struct(3, 2)})
    keys = jax.random.split(jax.random.key(0), 6)
    x = {"ids": integers(7, 6), "floats": BATCH[0], "key": keys}
    hold(noisy, params, x, normal(6, 2))


def test_params_that_are_no_floats():
    """Integers, booleans and keys reach the function, and have no gradient."""

    def f(params, x):
        noise = jax.random.normal(params["key"], (3,), jnp.float64)
        mask = jnp.where(params["mask"], params["w"], 0)
        return x @ mask * params["times"].astype(jnp.float64) + as_row(noise, x)

    fixed = {
        "key": jp.Unlearned(jax.random.key(0)),
        "mask": jp.Unlearned(jnp.array([[True, False, True]] * 4)),
        "times": jp.Unlearned(jnp.array(3)),
    }
    params = {"w": drawn(struct(4, 3))} | fixed
    hold(f, params, BATCH[0], normal(6, 3), owned="w")
    net, loss, bare = jp.function(f), jp.HalfSquaredError(), jp.Unlearned
    unmarked = {
        name: leaf.value if isinstance(leaf, bare) else leaf for name, leaf in params.items()
    }
    args = BATCH[0], normal(6, 3)
    norms = jax.jit(jp.per_example_sq_norms(net, loss))
    assert relative_error(norms(unmarked, *args), norms(params, *args)) <= 1e-12
    grad = jax.jit(jp.value_and_grad(net, loss))
    got, want = (grad(each, *args)[1]["w"] for each in (unmarked, params))
    assert relative_error(got, want) <= 1e-12


def test_params_of_numpy_and_of_numbers():
    params = {"w": np.asarray(drawn(struct(4, 3))), "s": 0.5}
    on_device = jax.tree.map(jnp.asarray, params)

    def f(params, x):
        return jnp.sin(x @ params["w"]) * params["s"]

    target = normal(6, 3)
    got = jp.clipped_grad(jp.function(f), jp.HalfSquaredError(), 0.5)(params, BATCH[0], target)
    want = oracle(f, jp.HalfSquaredError(), on_device, BATCH[0], target, bound=0.5)[:2]
    hold_leaves(got, want)
    each = jp.per_example_grads(jp.function(f), jp.HalfSquaredError())
    got = each(params | {"times": 2}, BATCH[0], target)
    assert got.pop("times") == ()
    hold_leaves(got, oracle(f, jp.HalfSquaredError(), on_device, BATCH[0], target)[2])


def test_a_batch_of_one():
    x, target = (leaf[:1] for leaf in BATCH)
    hold(mlp, MLP, x, target, LOSS)


@pytest.mark.full
def test_micro_batches():
    asked = {
        "grads": jp.Gradient(),
        "norms": jp.SqNorms(),
        "clipped": jp.Clipped(0.4),
        "moment": jp.SecondMoment(),
        "diagonal": jp.DiagGGN(),
    }
    net = jp.function(mlp)
    whole = jax.jit(jp.quantities(net, LOSS, **asked))(MLP, *BATCH)
    parts = jax.jit(jp.quantities(net, LOSS, **asked, micro_batches=3))(MLP, *BATCH)
    assert relative_error(parts, whole) <= 1e-10
    _, _, each = oracle(mlp, LOSS, MLP, *BATCH)
    hold_leaves(parts["clipped"], oracles.clipped.of(each, 0.4))


@pytest.mark.full
def test_weights_of_examples_and_padding():
    """An example of weight 2 counts as two copies, and one of weight 0 may hold anything."""
    x, target = BATCH
    weights = jnp.array([1, 2, 1, 0, 1, 3])
    times = np.repeat(np.arange(6), weights)
    asked = {"grads": jp.Gradient(), "moment": jp.SecondMoment(), "clipped": jp.Clipped(0.4)}
    f = jax.jit(jp.quantities(jp.function(mlp), LOSS, **asked))
    got = f(MLP, x.at[3].set(jnp.nan), target, weights=weights)
    want = f(MLP, x[times], target[times])
    assert relative_error(got, want) <= 1e-12
    _, _, each = oracle(mlp, LOSS, MLP, x[times], target[times])
    hold_leaves(got["clipped"], oracles.clipped.of(each, 0.4))


@pytest.mark.full
@pytest.mark.parametrize("fused", [True, False])
def test_an_update_is_optax_on_jax_grad(fused, standard_promotion):
    optimizer = optax.adamw(1e-2)
    params, ids = gpt_params(), integers(VOCAB, 4, LENGTH + 1)
    args = ids[:, :-1], ids[:, 1:]
    update = jp.make_update(jp.function(gpt), LOSS, optimizer, fused=fused, donate=False)
    state = update.init(params)
    plain = Untapped(gpt)

    @jax.jit
    def by_optax(params, state):
        value, grads = jax.value_and_grad(jp.loss_fn(plain, LOSS))(params, *args)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    other = params, optimizer.init(params)
    for _ in range(2):
        params, state, value = update(params, state, *args)
        *other, expected = by_optax(*other)
    assert relative_error(value, expected) <= 1e-12
    assert relative_error(params, other[0]) <= 1e-9


@pytest.mark.full
def test_an_update_of_adapters_leaves_the_base(standard_promotion):
    params, x, target = lora_params(), normal(4, 5), normal(4, 3)
    loss = jp.HalfSquaredError()
    for fused in (False, True):
        update = jp.make_update(
            jp.function(lora), loss, optax.adam(0.1), fused=fused, donate=False, max_norm=0.5
        )
        new, _, _ = update(params, update.init(params), x, target)
        same, moved = (
            jax.tree.map(lambda a, b: bool(jnp.all(a == b)), params[name], new[name])
            for name in ("base", "adapters")
        )
        assert all(jax.tree.leaves(same))
        assert not any(jax.tree.leaves(moved))


def test_a_whole_loss_is_trained(standard_promotion):
    update = jp.make_update(jp.function(mean_loss), jp.Mean(), optax.sgd(0.1), donate=False)
    params, _, value = update(MLP, update.init(MLP), BATCH)
    want, grads = jax.jit(jax.value_and_grad(mean_loss))(MLP, BATCH)
    assert relative_error(value, want) <= 1e-12
    stepped = jax.tree.map(lambda p, g: np.asarray(p) - 0.1 * np.asarray(g), MLP, grads)
    assert relative_error(params, stepped) <= 1e-12


@pytest.mark.full
def test_private_gradients():
    """The noise is that for layers with the same params, and both ways of clipping agree."""
    net, key = jp.function(mlp), jax.random.key(3)
    clean = jp.clipped_grad(net, LOSS, 0.4)(MLP, *BATCH)
    noisy = [
        jp.clipped_grad(net, LOSS, 0.4, noise_multiplier=1.5, two_pass=two_pass)(
            MLP, *BATCH, key=key
        )
        for two_pass in (False, True)
    ]
    assert relative_error(*noisy) <= 1e-12
    layers = jp.chain(jp.Dense(5), jp.Tanh(), jp.Dense(3))
    of_layers = layers.init(jax.random.key(0), BATCH[0])
    shapes = [leaf.shape for leaf in jax.tree.leaves(of_layers)]
    noise = jax.tree.map(jnp.subtract, noisy[0][1], clean[1])
    numbers = jnp.concatenate([leaf.ravel() for leaf in jax.tree.leaves(noise)])
    assert sum(np.prod(shape) for shape in shapes) == numbers.size
    assert 0.5 < jnp.std(numbers) / (1.5 * 0.4 / 6) < 1.5
    parts = jp.clipped_grad(net, LOSS, 0.4, noise_multiplier=1.5, micro_batches=2)
    assert relative_error(parts(MLP, *BATCH, key=key), noisy[0]) <= 1e-10


def test_clipped_in_one_walk_and_in_two():
    want = oracle(mlp, LOSS, MLP, *BATCH, bound=0.4)[:2]
    for options in ({}, {"two_pass": True}, {"drop_nonfinite": True}):
        f = jp.clipped_grad(jp.function(mlp), LOSS, 0.4, **options)
        hold_leaves(jax.jit(f)(MLP, *BATCH), want)


def test_each_module_of_params_is_clipped_by_itself():
    """A module is a group of arrays in the tree, or an array next to modules."""

    def fn(params, x):
        return mlp(params["layers"], x) * as_row(params["scale"], x)

    params, bound = {"layers": MLP, "scale": drawn(struct(3))}, 0.2
    _, _, each = oracle(fn, LOSS, params, *BATCH)
    modules = {"layers": [0, 1], "scale": 0}
    asked = {
        "norms": jp.SqNorms(per_layer=True),
        "clipped": jp.Clipped(bound, per_layer=True),
    }
    got = jax.jit(jp.quantities(jp.function(fn), LOSS, **asked))(params, *BATCH)

    def of_each(f):
        return jax.tree.map(lambda _, module: f(module), modules, each)

    hold_leaves(got["norms"], of_each(oracles.per_example_sq_norms.of))
    hold_leaves(got["clipped"], of_each(lambda module: oracles.clipped.of(module, bound)))


@pytest.mark.full
def test_an_example_without_a_finite_gradient_is_dropped():
    x = BATCH[0].at[2].set(jnp.inf)
    clipped = jp.clipped_grad(jp.function(mlp), LOSS, 0.4, drop_nonfinite=True)
    _, got = jax.jit(clipped)(MLP, x, BATCH[1])
    rest = jnp.array([0, 1, 3, 4, 5])
    _, want = oracle(mlp, LOSS, MLP, BATCH[0][rest], BATCH[1][rest], bound=0.4)[:2]
    hold_leaves(got, jax.tree.map(lambda g: g * 5 / 6, want))


def body(params, x):
    return jnp.tanh(x @ params["w"] + as_row(params["b"], x))


def body_init(key, x):
    width = x.shape[-1]
    return {"w": jax.random.normal(key, (width, width), x.dtype) / 2, "b": jnp.ones(width, x.dtype)}


BODY = jp.function(body, body_init)
NETS = {
    "chain": jp.chain(jp.Dense(3), BODY, jp.LayerNorm(), BODY, jp.Dense(3)),
    "skip": jp.chain(jp.skip(BODY), jp.skip(jp.chain(jp.Tanh(), BODY)), jp.Dense(3)),
    "repeat": jp.chain(jp.repeat(jp.skip(BODY), 3), jp.Dense(3)),
    "recompute": jp.chain(jp.recompute(jp.chain(jp.Dense(3), BODY)), jp.recompute(BODY)),
    "repeat of recompute": jp.chain(
        jp.repeat(jp.recompute(jp.chain(BODY, jp.Tanh())), 2), jp.Dense(3)
    ),
    "shared": jp.chain(jp.shared(BODY, 3), jp.Dense(3)),
    "branch": jp.chain(jp.branch(BODY, jp.Dense(4)), jp.Dense(3)),
    "frozen": jp.chain(jp.frozen(BODY), jp.Dense(3)),
}


@pytest.mark.few(1)
@pytest.mark.parametrize("name", NETS)
def test_beside_layers_written_by_hand(name):
    net, (x, target) = NETS[name], BATCH
    params = jax.jit(net.init)(jax.random.key(0), x)
    y = jax.eval_shape(net.forward, params, x)[0]
    target = normal(*y.shape)
    asked = {
        "grads": jp.Gradient(),
        "each": jp.PerExampleGrads(),
        "norms": jp.SqNorms(),
        "clipped": jp.Clipped(0.5),
        "moment": jp.SecondMoment(),
        "gram": jp.Gram(),
    }
    loss = jp.HalfSquaredError()

    @jax.jit
    def both(params, x, target):
        got = jp.quantities(net, loss, **asked)(params, x, target)
        each = oracles.per_example_grads(net, loss)(params, x, target)
        return got, {
            "grads": jax.tree.map(lambda g: g.mean(0), each),
            "each": each,
            "norms": oracles.per_example_sq_norms.of(each),
            "clipped": oracles.clipped.of(each, 0.5),
            "moment": oracles.second_moment.of(each),
            "gram": oracles.gram.of(each),
        }

    got, want = both(params, x, target)
    hold_leaves({quantity: got[quantity] for quantity in want}, want)
    with jax.numpy_dtype_promotion("standard"):
        optimizer = optax.adam(0.1)
        steps = [
            jp.make_update(net, loss, optimizer, fused=fused, donate=False)
            for fused in (False, True)
        ]
        whole, fused = (step(params, step.init(params), x, target) for step in steps)
    assert relative_error(fused, whole) <= 1e-8


def test_cast_to_bfloat16():
    """Products are computed in bfloat16, and gradients have the params' dtype."""
    narrow = jp.cast(jp.function(mlp), jnp.bfloat16)
    params, x = jax.tree.map(lambda leaf: np.asarray(leaf, np.float32), (MLP, BATCH[0]))
    got = jax.jit(jp.clipped_grad(narrow, LOSS, 0.4))(params, x, BATCH[1])
    want = oracle(mlp, LOSS, MLP, *BATCH, bound=0.4)[:2]
    assert {leaf.dtype for leaf in jax.tree.leaves(got[1])} == {jnp.dtype(jnp.float32)}
    assert 1e-6 < relative_error(got, want) <= 5e-2


def wide_product(w, x):
    return lax.dot_general(x, w * 0.5, (((1,), (0,)), ((), ())), preferred_element_type=jnp.float64)


def wide_convolution(w, x):
    layouts = ("NWC", "WIO", "NWC")
    return lax.conv_general_dilated(
        x, w, (1,), "SAME", dimension_numbers=layouts, preferred_element_type=jnp.float64
    )


@pytest.mark.few(1)
@pytest.mark.parametrize("name", ["floats", "integers", "windows"])
def test_a_product_of_two_dtypes(name):
    """The result is wider than the data, which may be integers."""
    fn = wide_convolution if name == "windows" else wide_product
    x = (integers(5, 4, 5, 3) if name == "windows" else integers(5, 4, 3)).astype(
        jnp.int8 if name == "integers" else jnp.float32
    )
    wide = normal(3, 3, 2) if name == "windows" else normal(3, 2)
    w = wide if name == "integers" else wide.astype(jnp.float32)
    target = normal(*jax.eval_shape(fn, w, x).shape)
    if name == "windows":
        try:
            jax.grad(lambda x: fn(w, x).sum())(x)
        except TypeError:
            pytest.skip("this version of JAX has no derivative of such a convolution")
    got = jax.jit(jp.per_example_grads(jp.function(fn), jp.HalfSquaredError()))(w, x, target)
    want = oracle(fn, jp.HalfSquaredError(), wide, x.astype(jnp.float64), target)[2]
    hold_leaves(got, want, tolerance=1e-12 if name == "integers" else 1e-5)


@pytest.mark.few(1)
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [("float32", 1e-5), ("bfloat16", 1e-1), ("float16", 1e-2)]
)
def test_narrow_dtypes_are_close_to_float64(dtype, tolerance):
    dtype = jnp.dtype(dtype)
    params, x = jax.tree.map(lambda leaf: np.asarray(leaf).astype(dtype), (MLP, BATCH[0]))
    asked = {"norms": jp.SqNorms(), "clipped": jp.Clipped(0.4), "moment": jp.SecondMoment()}
    got = jax.jit(jp.quantities(jp.function(mlp), LOSS, **asked))(params, x, BATCH[1])
    exact = jax.tree.map(lambda leaf: leaf.astype(np.float64), (params, x))
    _, clipped, each = oracle(mlp, LOSS, *exact, BATCH[1], bound=0.4)
    want = jax.jit(
        lambda each: {
            "norms": oracles.per_example_sq_norms.of(each),
            "clipped": clipped,
            "moment": oracles.second_moment.of(each),
        }
    )(each)
    hold_leaves({name: got[name] for name in want}, want, tolerance=tolerance)


@pytest.mark.few(2)
@pytest.mark.parametrize(
    ("fn", "params", "x"),
    [
        (mlp, MLP, BATCH[0]),
        (
            through_time,
            drawn({"h": struct(3, 3), "x": struct(3, 3), "b": struct(3)}),
            normal(2, 4, 3),
        ),
        (conv(feature_group_count=2), drawn(struct(3, 3, 2, 6)), normal(2, 4, 4, 4)),
        (lora, lora_params(), normal(3, 5)),
        (gpt, gpt_params(), integers(VOCAB, 2, LENGTH)),
    ],
    ids=["mlp", "scan", "conv", "lora", "gpt"],
)
def test_check_layer_passes(fn, params, x):
    jp.check_layer(jp.function(fn), x, params, rtol=1e-10)


def test_under_jit_vmap_and_a_scan_of_steps():
    net = jp.function(mlp)
    clipped = jp.clipped_grad(net, LOSS, 0.4)
    eager, jitted = clipped(MLP, *BATCH), jax.jit(clipped)
    assert relative_error(jitted(MLP, *BATCH), eager) <= 1e-12
    others = drawn(MLP, 9)
    stack = jax.tree.map(lambda *leaves: np.stack(leaves), MLP, others)
    of_stack = jax.jit(jax.vmap(clipped, (0, None, None)))(stack, *BATCH)
    for index, want in enumerate((eager, jitted(others, *BATCH))):
        got = jax.tree.map(lambda leaf, index=index: np.asarray(leaf)[index], of_stack)
        assert relative_error(got, want) <= 1e-10

    def step(params, _):
        value, grads = clipped(params, *BATCH)
        return jax.tree.map(lambda p, g: p - 0.5 * g, params, grads), value

    scanned, values = jax.jit(lambda params: lax.scan(step, params, length=3))(MLP)
    params, one = MLP, jax.jit(step)
    for index in range(3):
        params, value = one(params, None)
        assert relative_error(values[index], value) <= 1e-10
    assert relative_error(scanned, params) <= 1e-10


def mesh_of(devices):
    return jax.make_mesh((devices,), ("data",), axis_types=(AxisType.Auto,))


def summed_over_time(w, x):
    """A scan without params, over a product with one."""
    zero = jnp.zeros_like(x[:, 0])
    return lax.scan(lambda h, x: (jnp.tanh(h + x), None), zero, jnp.moveaxis(x @ w, 1, 0))[0]


def numbered(w, x):
    numbers, x = x
    return (x + numbers[:, None].astype(x.dtype)) @ w


IN_SHARD_MAP = {
    mlp: (MLP, BATCH[0]),
    through_time: (drawn({"h": struct(3, 3), "x": struct(3, 3), "b": struct(3)}), normal(6, 4, 3)),
    summed_over_time: (drawn(struct(3, 3)), normal(6, 4, 3)),
    through_layers: (drawn(struct(2, 3, 3)), normal(6, 3)),
    carried: (drawn(struct(3, 3)), normal(6, 3)),
    looped: (drawn(struct(3, 3)), normal(6, 3)),
    remat: (drawn(twos("a", "b")), normal(6, 3)),
    either: (drawn(twos("a", "b")), normal(6, 3)),
    switched_in_a_scan: (drawn(twos("a", "b")), normal(6, 3)),
}


@pytest.mark.few(1)
@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("fn", IN_SHARD_MAP)
def test_in_shard_map_each_device_has_its_examples(fn, check_vma):
    params, x = IN_SHARD_MAP[fn]
    loss, split = jp.HalfSquaredError(), PartitionSpec("data")
    target = normal(6, 3)
    asked = {"norms": jp.SqNorms(), "each": jp.PerExampleGrads()}
    f = jp.quantities(jp.function(fn), loss, **asked)

    def of_device(*args):
        result = f(*args)
        return result["norms"], result["each"]

    sharded = jax.shard_map(
        of_device,
        mesh=mesh_of(2),
        in_specs=(PartitionSpec(), split, split),
        out_specs=split,
        check_vma=check_vma,
    )
    _, _, each = oracle(fn, loss, params, x, target)
    got = jax.jit(sharded)(params, x, target)
    hold_leaves(got, (oracles.per_example_sq_norms.of(each), each))


@pytest.mark.few(1)
@pytest.mark.parametrize("fn", [numbered, lambda w, x: numbered(w, x[::-1])], ids=["first", "last"])
def test_in_shard_map_one_array_of_x_may_be_the_same_on_all_devices(fn):
    """For example, positions that each device numbers from 0."""
    w, x, target, split = drawn(struct(3, 2)), normal(6, 3), normal(6, 2), PartitionSpec("data")
    norms = jp.per_example_sq_norms(jp.function(fn), jp.HalfSquaredError())

    def of_device(w, x, target):
        pair = jnp.arange(len(x)), x
        return norms(w, pair if fn is numbered else pair[::-1], target)

    sharded = jax.shard_map(
        of_device, mesh=mesh_of(2), in_specs=(PartitionSpec(), split, split), out_specs=split
    )
    pair = np.tile(np.arange(3), 2), x
    want = jax.jit(norms)(w, pair if fn is numbered else pair[::-1], target)
    hold_leaves(jax.jit(sharded)(w, x, target), want)


@pytest.mark.full
def test_sharded_by_jit():
    mesh = mesh_of(2)
    params, ids = gpt_params(), integers(VOCAB, 4, LENGTH + 1)
    split = jax.NamedSharding(mesh, PartitionSpec("data"))
    args = jax.device_put((ids[:, :-1], ids[:, 1:]), split)
    clipped = jax.jit(jp.clipped_grad(jp.function(gpt), LOSS, 0.4))
    got = clipped(jax.device_put(params, jax.NamedSharding(mesh, PartitionSpec())), *args)
    assert relative_error(got, clipped(params, ids[:, :-1], ids[:, 1:])) <= 1e-10


@pytest.mark.full
@pytest.mark.parametrize("fn", [through_time, mlp, gpt])
def test_exported_for_any_batch_size(fn):
    pytest.importorskip("flatbuffers")
    params, x = {
        mlp: (MLP, BATCH[0]),
        through_time: (
            drawn({"h": struct(3, 3), "x": struct(3, 3), "b": struct(3)}),
            normal(6, 4, 3),
        ),
        gpt: (gpt_params(), integers(VOCAB, 6, LENGTH)),
    }[fn]
    target = normal(*jax.eval_shape(fn, params, x).shape)
    f = jax.jit(
        jp.quantities(
            jp.function(fn), jp.HalfSquaredError(), norms=jp.SqNorms(), clipped=jp.Clipped(0.3)
        )
    )
    (b,) = export.symbolic_shape("b")
    fixed = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), params)
    batch = [jax.ShapeDtypeStruct((b, *leaf.shape[1:]), leaf.dtype) for leaf in (x, target)]
    exported = export.export(f, platforms=("cpu", "cuda", "tpu"))(fixed, *batch)
    program = export.deserialize(exported.serialize()).call
    for examples in (6, 2):
        args = params, x[:examples], target[:examples]
        assert relative_error(program(*args), f(*args)) <= 1e-10


def batch_norm(params, x):
    h = x @ params["w"]
    return (h - h.mean(0, keepdims=True)) / (h.std(0, keepdims=True) + 1e-3)


def less_the_mean(params, x):
    h = x @ params["w"]
    return h - jnp.mean(h, axis=0, keepdims=True)


def in_batch_negatives(params, x):
    h = x @ params["w"]
    return jax.nn.log_softmax(h @ h.T).diagonal()


def one_mask_for_all(params, x):
    h = x @ params["w"]
    return jnp.where(jax.random.bernoulli(params["key"], 0.5, h.shape), h, 0)


def the_sum_over_examples(params, x):
    return jnp.sum((x @ params["w"]) ** 2)


COUPLED = {
    batch_norm: "reduce_sum",
    less_the_mean: "reduce_sum",
    in_batch_negatives: "dot_general",
}


@pytest.mark.parametrize("fn", COUPLED)
def test_a_function_that_couples_examples_is_refused(fn):
    """The error names the operation and its line."""
    params, net = {"w": drawn(struct(4, 3))}, jp.function(fn)
    y = jax.eval_shape(fn, params, BATCH[0])
    loss = jp.Mean() if y.ndim == 1 else jp.HalfSquaredError()
    target = None if y.ndim == 1 else normal(*y.shape)
    with pytest.raises(
        ValueError, match="gives an example a different y in a batch than alone"
    ) as e:
        jp.per_example_sq_norms(net, loss)(params, BATCH[0], target)
    said = re.search(r": (\w+) at test_function\.py:(\d+)", str(e.value))
    assert said is not None, e.value
    first = fn.__code__.co_firstlineno
    assert said[1] == COUPLED[fn]
    assert first < int(said[2]) <= first + 3
    with pytest.raises(ValueError, match="a different y in a batch than alone"):
        jax.jit(jp.clipped_grad(net, loss, 1.0))(params, BATCH[0], target)


def printing(w, x):
    y = x @ w
    jax.debug.print("the mean is {}", y.mean())
    return y - y.mean(0, keepdims=True)


def printing_in_a_scan(w, x):
    def step(y, _):
        jax.debug.print("the mean is {}", y.mean())
        return jnp.tanh(y - y.mean(0, keepdims=True)), None

    return lax.scan(step, x @ w, None, length=2)[0]


def in_python(w, x):
    like = jax.ShapeDtypeStruct(x.shape, x.dtype)
    y = jax.pure_callback(np.cos, like, lax.stop_gradient(x), vmap_method="expand_dims") @ w
    return y - y.mean(0, keepdims=True)


@pytest.mark.parametrize("fn", [printing, printing_in_a_scan, in_python])
def test_a_function_that_calls_back_and_couples_examples_is_refused(fn):
    gradient = jp.value_and_grad(jp.function(fn), jp.HalfSquaredError())
    for f in (gradient, jax.jit(gradient)):
        with pytest.raises(ValueError, match="a different y in a batch than alone"):
            f(drawn(struct(3, 2)), normal(5, 3), normal(5, 2))


def test_one_key_for_all_examples_is_refused():
    """A mask that is drawn with the batch's shape differs for a batch of one."""
    params = {"w": drawn(struct(4, 3)), "key": jp.Unlearned(jax.random.key(0))}
    norms = jp.per_example_sq_norms(jp.function(one_mask_for_all), jp.HalfSquaredError())
    with pytest.raises(ValueError, match="give x a key for each example"):
        norms(params, BATCH[0], np.zeros((6, 3)))


def test_a_sum_over_examples_is_refused():
    """A loss is the mean over examples; a sum has another value than for batches of one."""
    norms = jp.per_example_sq_norms(jp.function(the_sum_over_examples), jp.Mean())
    with pytest.raises(ValueError, match="a different y in a batch than alone"):
        norms({"w": drawn(struct(4, 3))}, BATCH[0])


def test_little_coupling_is_found_in_float64():
    def fn(w, x):
        y = x @ w
        return y + 1e-6 * y.mean(0, keepdims=True)

    norms = jp.per_example_sq_norms(jp.function(fn), jp.HalfSquaredError())
    with pytest.raises(ValueError, match="a different y in a batch than alone"):
        norms(drawn(struct(3, 2)), normal(5, 3), normal(5, 2))


def test_coupled_in_a_scan_is_refused():
    """The coupling operation is in the body of a scan."""

    def fn(params, x):
        def step(h, w):
            h = jnp.tanh(h @ w)
            return h - h.mean(0, keepdims=True), None

        return lax.scan(step, x, params)[0]

    norms = jp.per_example_sq_norms(jp.function(fn), jp.HalfSquaredError())
    with pytest.raises(ValueError, match="a different y in a batch than alone"):
        norms(drawn(struct(2, 4, 4)), BATCH[0], jnp.zeros((6, 4)))


def test_a_function_is_let_go_with_what_it_closes_over():
    def scaled(scale):
        return jp.function(lambda w, x: x @ (scale * w)), weakref.ref(scale)

    net, alive = scaled(np.full((3, 1), 2.0))
    jp.per_example_sq_norms(net, LOSS)(drawn(struct(3, 2)), BATCH[0][:, :3], BATCH[1] % 2)
    del net
    jax.clear_caches()
    gc.collect()
    assert alive() is None


def mean_of_labelled(params, batch):
    losses = jnp.sum((batch["x"] @ params) ** 2, axis=-1)
    counted = (batch["labels"] != -100).astype(losses.dtype)
    return jnp.sum(losses * counted) / jnp.sum(counted)


def mean_of_marked(params, batch):
    losses = jnp.sum((batch["x"] @ params) ** 2, axis=-1)
    marked = batch["marked"].astype(losses.dtype)
    return jnp.sum(losses * marked) / jnp.sum(marked)


@pytest.mark.parametrize(
    ("fn", "batch"),
    [
        (mean_of_labelled, {"x": normal(3, 5, 3), "labels": integers(2, 3, 5)}),
        (mean_of_marked, {"x": normal(6, 3), "marked": integers(2, 6)}),
    ],
    ids=["-100", "marked"],
)
def test_a_mean_over_what_counts_in_the_batch_is_refused(fn, batch):
    """An example's weight then depends on how many positions count in the others."""
    norms = jp.per_example_sq_norms(jp.function(fn), jp.Mean())
    with pytest.raises(ValueError, match="a different y in a batch than alone"):
        norms(normal(3, 2), batch)


def test_a_loop_without_a_derivative_by_x_is_explained():
    def fn(params, x, held=lambda x: x):
        _, x = lax.while_loop(lambda c: c[0] < 3, lambda c: (c[0] + 1, c[1] / 2), (0, held(x)))
        return x @ params

    args = normal(3, 2), normal(4, 3), normal(4, 2)
    norms = jp.per_example_sq_norms(jp.function(fn), jp.HalfSquaredError())
    with pytest.raises(ValueError, match="Reverse-mode") as e:
        norms(*args)
    assert any("jax.lax.stop_gradient(x)" in note for note in e.value.__notes__)
    hold(lambda params, x: fn(params, x, lax.stop_gradient), *args)


@pytest.mark.full
@pytest.mark.parametrize("name", ["x w", "layers", "checkpoint", "switch in a scan"])
def test_no_tracer_outlives_its_trace(name):
    fn, params, x, target, *_ = case_of(name)
    norms = jp.per_example_sq_norms(jp.function(fn), jp.HalfSquaredError())
    with jax.checking_leaks():
        jax.jit(norms)(params, x, target)


def test_a_single_array_of_params_has_a_name():
    (covered,) = jp.function(lambda w, x: x @ w).coverage(normal(3, 2), normal(4, 3)).params
    assert covered.param == "params"


WRONG = {
    "x of nothing": (lambda f: f(MLP, ()), TypeError, "takes x as arrays"),
    "x a number": (lambda f: f(MLP, 1.0), TypeError, "takes x as arrays"),
    "a scalar in x": (
        lambda f: f(MLP, {"x": BATCH[0], "t": jnp.ones(())}),
        ValueError,
        r"example on axis 0 of every leaf.*jp\.Unlearned",
    ),
    "two batch sizes": (
        lambda f: f(MLP, (BATCH[0], jnp.ones(5))),
        ValueError,
        "example on axis 0 of every leaf",
    ),
    "a word among params": (
        lambda f: f({"w": MLP, "name": "mlp"}, BATCH[0]),
        TypeError,
        r"params\['name'\] is 'mlp'",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_arguments_are_named(name):
    call, error, words = WRONG[name]
    gradient = jp.value_and_grad(jp.function(mlp), jp.HalfSquaredError())
    with pytest.raises(error, match=words):
        call(lambda params, x: gradient(params, x, normal(6, 3)))


@pytest.mark.parametrize("fn", [int, jp.Dense(3), 3, None])
def test_what_is_no_function_is_refused(fn):
    with pytest.raises(TypeError, match="function takes a function of"):
        jp.function(fn)


def test_a_y_without_the_example_on_axis_0_is_refused():
    norms = jp.per_example_sq_norms(jp.function(lambda w, x: (x @ w).T), jp.HalfSquaredError())
    with pytest.raises(ValueError, match="axis 0 of every array of y is the example"):
        norms(drawn(struct(4, 3)), BATCH[0], jnp.zeros((3, 6)))
    norms = jp.per_example_sq_norms(jp.function(lambda w, x: 3.0), jp.Mean())
    with pytest.raises(TypeError, match="not arrays"):
        norms(drawn(struct(4, 3)), BATCH[0])


def test_wrong_shapes_raise_what_jax_raises():
    norms = jp.per_example_sq_norms(jp.function(mlp), jp.HalfSquaredError())
    with pytest.raises(TypeError, match="dot_general requires contracting dimensions"):
        norms(MLP, normal(6, 5), normal(6, 3))
    with pytest.raises(TypeError, match="its params come from where the function does"):
        jp.function(mlp).init(jax.random.key(0), BATCH[0])


def factors_by_taps(product, loss, params, x, target):
    """For each product, the means over examples of mean_t x_t x_t^T and sum_t J_t^T H J_t.

    Args:
        product: a function of (params, x, zeros) for one example that adds a zero to each product
            and returns y, the operand of each, (positions, features), and the products.
        loss: the loss.
        params: its params.
        x: a batch.
        target: for the loss.
    """

    def of_one(x, target):
        shapes = jax.eval_shape(lambda: product(params, x, None))[2]
        zeros = [jnp.zeros(shape.shape) for shape in shapes]
        y, operands, _ = product(params, x, zeros)
        hessian = jax.hessian(lambda y: loss.forward(y[None], target[None])[0][0])(y)
        hessian = hessian.reshape(y.size, y.size)
        jacobians = jax.jacrev(lambda zeros: product(params, x, zeros)[0])(zeros)

        def of_ct(jacobian):
            j = jacobian.reshape(y.size, -1, jacobian.shape[-1])
            return jnp.einsum("pti,pq,qtj->ij", j, hessian, j)

        return [a.T @ a / len(a) for a in operands], list(map(of_ct, jacobians))

    means = jax.tree.map(lambda each: each.mean(0), jax.vmap(of_one)(x, target))
    return list(zip(*means, strict=True))


class Tapped:
    """A product that keeps its operands and results, and adds a zero to each result."""

    def __init__(self, zeros):
        self.zeros, self.operands, self.products = zeros, [], []

    def __call__(self, x, w):
        y = x @ w
        self.operands.append(x)
        self.products.append(y)
        return y if self.zeros is None else y + self.zeros[len(self.products) - 1]


def tapped_mlp(params, x, zeros=None):
    tapped, h = Tapped(zeros), x[None]
    for index, w in enumerate(params):
        h = tapped(h, w)
        h = jnp.tanh(h) if index < len(params) - 1 else h
    return h[0], tapped.operands, tapped.products


def tapped_attention(params, x, zeros=None):
    tapped = Tapped(zeros)
    q, k, v = (tapped(x, params[name]) for name in "qkv")
    y = tapped(jax.nn.softmax(q @ k.T) @ v, params["o"])
    return y, tapped.operands, tapped.products


def tapped_convolution(params, x, zeros=None):
    """A convolution over sequences, written as a product with its windows."""
    tapped = Tapped(zeros)
    windows = jnp.concatenate([x[start : start + 3] for start in range(3)], 1)
    h = jnp.tanh(tapped(windows, params["conv"].reshape(9, 2)))
    y = tapped(h, params["out"])
    return y, tapped.operands, tapped.products


@pytest.mark.few(1)
@pytest.mark.parametrize("name", ["mlp", "attention", "convolution"])
def test_kronecker_factors_are_those_of_jacobians(name):
    if name == "mlp":
        product = tapped_mlp
        fn = jax.vmap(lambda ws, x: tapped_mlp(ws, x)[0], (None, 0))
        params, x, order = drawn([struct(4, 5), struct(5, 3)]), BATCH[0], (0, 1)
    elif name == "attention":
        product = tapped_attention
        fn = jax.vmap(lambda params, x: tapped_attention(params, x)[0], (None, 0))
        params, x, order = drawn(twos(*"qkvo")), normal(4, 5, 3), "qkvo"
    else:
        product, x, order = tapped_convolution, normal(4, 5, 3), ("conv", "out")
        params = drawn({"conv": struct(3, 3, 2), "out": struct(2, 3)})

        def fn(params, x):
            layouts = ("NWC", "WIO", "NWC")
            h = lax.conv_general_dilated(
                x, params["conv"], (1,), "VALID", dimension_numbers=layouts
            )
            return jnp.tanh(h) @ params["out"]

    target = normal(*jax.eval_shape(fn, params, x).shape)
    loss = jp.HalfSquaredError()
    got = jax.jit(jp.kronecker_factors(jp.function(fn), loss))(params, x, target)
    want = jax.jit(lambda *args: factors_by_taps(product, loss, *args))(params, x, target)
    hold_leaves([tuple(got[index]) for index in order], want)
