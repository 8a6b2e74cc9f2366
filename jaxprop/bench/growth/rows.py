"""The rows of ``jaxprop bench --growth``: a quantity of a net, against one of its sizes."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from jaxprop.bench.measure import Function
from jaxprop.bench.networks import Network
from jaxprop.combinators.chain import chain
from jaxprop.core.layer import Layer
from jaxprop.core.loss import Loss
from jaxprop.core.types import Params
from jaxprop.layers import Dense, Embedding, GlobalAvgPool, Relu
from jaxprop.losses import CrossEntropy
from jaxprop.models import Gpt2Config, gpt2
from jaxprop.quantity.between import inner_products
from jaxprop.quantity.functions import clipped_grad, gram, per_example_sq_norms, second_moment
from jaxprop.training.gradients import value_and_grad

Of = Callable[[Layer, Loss], Function]


class Growing(NamedTuple):
    """A row.

    Attributes:
        along: the name of the size that grows.
        sizes: its values.
        of: makes the function to measure, from a net and a loss.
        network: makes the network of a given size.
    """

    along: str
    sizes: tuple[int, ...]
    of: Of
    network: Callable[[int], Network]


def mlp(depth: int = 4, width: int = 512, batch: int = 128) -> Network:
    """Return dense layers of one width with ReLU between."""
    layers: list[Layer] = []
    for _ in range(depth - 1):
        layers += [Dense(width), Relu()]
    keys = jax.random.split(jax.random.key(0), 2)
    x = jax.random.normal(keys[0], (batch, width), jnp.float32)
    return _of(chain(*layers, Dense(10)), x, jax.random.randint(keys[1], (batch,), 0, 10))


def small_gpt(length: int) -> Network:
    """Return a GPT of two blocks and 128 features, on two sequences."""
    config = Gpt2Config(vocab=128, length=length, features=128, heads=4, layers=2)
    tokens = _tokens(2, length + 1, config.vocab)
    return _of(gpt2(config, scan=False), tokens[:, :-1], tokens[:, 1:])


def embedding(length: int, vocab: int = 50257) -> Network:
    """Return an embedding of 64 features and the mean over positions, on eight sequences."""
    net = chain(Embedding(vocab, 64), GlobalAvgPool(), Dense(10))
    return _of(net, _tokens(8, length, vocab), jnp.arange(8) % 10)


def along_positions(length: int) -> Network:
    """Return two dense layers of 128 features along positions, on eight sequences."""
    x = jax.random.normal(jax.random.key(0), (8, length, 128), jnp.float32)
    target = jax.random.randint(jax.random.key(1), (8, length), 0, 10)
    return _of(chain(Dense(128), Relu(), Dense(10)), x, target)


def products(net: Layer, loss: Loss) -> Function:
    """Return ``f(params, x, target)``, the batch's gradients' inner products."""
    between = inner_products(net, loss)

    def of(params: Params, x: Array, target: Array) -> Array:
        return between(params, (x, target), (x, target))

    return of


def _of(net: Layer, x: Array, target: Array) -> Network:
    return net, CrossEntropy(), (net.init(jax.random.key(2), x), x, target)


def _tokens(*shape: int) -> Array:
    *shape_, vocab = shape
    return jax.random.randint(jax.random.key(0), shape_, 0, vocab, jnp.int32)


CLIPPED = functools.partial(clipped_grad, max_norm=1.0)
OF_MLP: dict[str, Of] = {
    "gradient": value_and_grad,
    "norms": per_example_sq_norms,
    "clipped": CLIPPED,
}
OF_ROWS: dict[str, Of] = {
    "norms": per_example_sq_norms,
    "clipped": CLIPPED,
    "second-moment": second_moment,
    "gram": gram,
    "products": products,
}
LENGTHS = (512, 1024, 2048, 4096, 8192)


def _rows() -> dict[str, Growing]:
    rows = {}
    for name, of in OF_MLP.items():
        depths = (4, 8, 16, 32, 64)
        rows |= {
            f"mlp-{name}/depth": Growing("depth", depths, of, lambda d: mlp(depth=d, width=256)),
            f"mlp-{name}/width": Growing(
                "width", (128, 256, 512, 1024, 2048), of, lambda width: mlp(width=width)
            ),
            f"mlp-{name}/batch": Growing(
                "batch", (32, 128, 512, 2048), of, lambda batch: mlp(batch=batch)
            ),
        }
    rows["gpt-gradient/length"] = Growing("length", (64, 128, 256, 512), value_and_grad, small_gpt)
    rows["gpt-norms/length"] = Growing("length", (64, 128, 256, 512), OF_MLP["norms"], small_gpt)
    rows["dense-norms/length"] = Growing("length", LENGTHS, OF_MLP["norms"], along_positions)
    for name, of in OF_ROWS.items():
        rows[f"embedding-{name}/length"] = Growing("length", LENGTHS, of, embedding)
    return rows


ROWS = _rows()
DEVICES = "data-parallel/devices"
"""The row for which only memory is known."""
